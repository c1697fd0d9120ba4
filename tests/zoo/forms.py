"""Odd forms: raw parameters, tables, sets, graphs, recurrence, gates, unusual outputs."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .registry import image, register

VOCAB = 23


def rows():
    return torch.randn(6, 10)


def sequences():
    return torch.randn(2, 9, 6)


def tokens():
    return torch.randint(1, VOCAB, (3, 8))


@register("functional_linear", rows, "raw")
class FunctionalLinear(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(hidden, 10) * 0.3), nn.Parameter(torch.zeros(hidden))
        self.w2, self.b2 = nn.Parameter(torch.randn(20, hidden) * 0.3), nn.Parameter(torch.zeros(20))
        self.w3 = nn.Parameter(torch.randn(20, 4) * 0.3)

    def forward(self, x):
        x = F.relu(F.linear(x, self.w1, self.b1))
        x = F.relu(F.linear(x, self.w2, self.b2))
        return x @ self.w3


@register("einsum_mlp", sequences, "raw")
class EinsumMlp(nn.Module):
    def __init__(self, dim=16, hidden=24):
        super().__init__()
        self.embed = nn.Parameter(torch.randn(6, dim) * 0.4)
        self.w_in = nn.Parameter(torch.randn(dim, hidden) * 0.3)
        self.b_in = nn.Parameter(torch.zeros(hidden))
        self.w_out = nn.Parameter(torch.randn(hidden, dim) * 0.3)
        self.head = nn.Linear(dim, 4)

    def forward(self, x):
        x = torch.einsum("bti,id->btd", x, self.embed)
        h = F.gelu(torch.einsum("btd,dh->bth", x, self.w_in) + self.b_in)
        x = x + torch.einsum("bth,hd->btd", h, self.w_out)
        return self.head(x.mean(1))


@register("parameter_list_mlp", rows, "raw")
class ParameterListMlp(nn.Module):
    def __init__(self, sizes=(10, 16, 20, 4)):
        super().__init__()
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(i, o) / math.sqrt(i)) for i, o in pairs])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(o)) for _, o in pairs])

    def forward(self, x):
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.addmm(b, x, w)
            if i < len(self.weights) - 1:
                x = torch.tanh(x)
        return x


@register("tied_mlp_lm", lambda: torch.randint(0, VOCAB, (5, 3)), "text", "tied")
class TiedMlpLm(nn.Module):
    """Bengio's: three embedded words, concatenated by view with the width baked in; the decoder is tied."""

    def __init__(self, dim=16, hidden=32):
        super().__init__()
        self.emb_size = dim
        self.emb = nn.Embedding(VOCAB, dim)
        self.fc1, self.fc2 = nn.Linear(3 * dim, hidden), nn.Linear(hidden, dim)
        self.decoder = nn.Linear(dim, VOCAB)
        self.decoder.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids).view(-1, 3 * self.emb_size)
        return self.decoder(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


@register("lstm_classifier", tokens, "text", "rnn")
class LstmClassifier(nn.Module):
    def __init__(self, dim=16, hidden=12):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.lstm = nn.LSTM(dim, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.fc1, self.fc2 = nn.Linear(2 * hidden, 16), nn.Linear(16, 3)

    def forward(self, ids):
        _, (hidden, _) = self.lstm(self.embedding(ids))
        return self.fc2(F.relu(self.fc1(torch.cat((hidden[-2], hidden[-1]), dim=1))))


@register("gru_classifier", sequences, "rnn")
class GruClassifier(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.conv, self.gru = nn.Conv1d(6, 16, 3, padding=1), nn.GRU(16, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 4)

    def forward(self, x):
        x = F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.gru(x)[0][:, -1, :])


@register("pointnet", lambda: torch.randn(3, 3, 20), "points")
class PointNet(nn.Module):
    """With the spatial transformer; the width is baked into every view and repeat, as in the original."""

    def __init__(self, width=32):
        super().__init__()
        self.width = width
        self.stn = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.stn_fc = nn.Linear(16, 9)
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, width, 1), nn.BatchNorm1d(width)
        self.conv3, self.bn3 = nn.Conv1d(width + 16, 24, 1), nn.BatchNorm1d(24)
        self.fc1, self.fc2, self.seg = nn.Linear(width, 16), nn.Linear(16, 5), nn.Conv1d(24, 4, 1)

    def forward(self, x):
        trans = self.stn_fc(torch.max(self.stn(x), 2)[0]).view(-1, 3, 3)
        trans = trans + torch.eye(3, dtype=x.dtype, device=x.device)
        x = torch.bmm(x.transpose(2, 1), trans).transpose(2, 1)
        pointfeat = F.relu(self.bn1(self.conv1(x)))
        x = torch.max(self.bn2(self.conv2(pointfeat)), 2, keepdim=True)[0].view(-1, self.width)
        spread = torch.cat([x.view(-1, self.width, 1).repeat(1, 1, pointfeat.size(2)), pointfeat], 1)
        return self.fc2(F.relu(self.fc1(x))), self.seg(F.relu(self.bn3(self.conv3(spread))))


class GraphConvolution(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x, adj):
        return torch.matmul(adj, torch.matmul(x, self.weight)) + self.bias


@register("gnn", lambda: (torch.randn(2, 7, 6), (torch.rand(2, 7, 7) < 0.4).float()), "graph", "raw")
class Gnn(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.gc1, self.gc2 = GraphConvolution(6, hidden), GraphConvolution(hidden, 24)
        self.self_loop = nn.Linear(hidden, 24, bias=False)
        self.head = nn.Linear(2 * 24, 3)

    def forward(self, x, adj):
        adj = adj + torch.eye(adj.size(-1), dtype=adj.dtype, device=adj.device)
        adj = adj / adj.sum(-1, keepdim=True)
        x = F.relu(self.gc1(x, adj))
        x = F.relu(self.gc2(x, adj) + self.self_loop(x))
        return self.head(torch.cat([x.mean(dim=1), x.sum(dim=1)], dim=-1))


CARDINALITIES = (5, 7, 3)


def table():
    columns = [torch.randint(0, n, (6,)) for n in CARDINALITIES]
    return torch.stack(columns, dim=1), torch.randn(6, 4)


@register("tabular", table, "tabular")
class Tabular(nn.Module):
    """fastai's: embeddings of several columns beside normalised numbers; the first width is a sum of widths."""

    def __init__(self):
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(n, 2 + n // 2) for n in CARDINALITIES])
        n_emb = sum(e.embedding_dim for e in self.embeds)
        self.bn_cont = nn.BatchNorm1d(4)
        self.layers = nn.Sequential(
            nn.Linear(n_emb + 4, 24), nn.ReLU(inplace=True), nn.BatchNorm1d(24), nn.Linear(24, 16), nn.ReLU(),
            nn.BatchNorm1d(16), nn.Linear(16, 2),
        )  # fmt: skip

    def forward(self, x_cat, x_cont):
        x = torch.cat([e(x_cat[:, i]) for i, e in enumerate(self.embeds)], 1)
        return self.layers(torch.cat([x, self.bn_cont(x_cont)], 1))


@register("wide_and_deep", table, "tabular")
class WideAndDeep(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.offsets = [0, 5, 12]
        self.wide, self.wide_dense = nn.Embedding(sum(CARDINALITIES), 1), nn.Linear(4, 1)
        self.embedding = nn.Embedding(sum(CARDINALITIES), dim)
        self.embed_output_dim = len(CARDINALITIES) * dim
        tail = [nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1)]
        self.mlp = nn.Sequential(nn.Linear(self.embed_output_dim + 4, 24), *tail)

    def forward(self, x_cat, x_cont):
        ids = x_cat + x_cat.new_tensor(self.offsets).unsqueeze(0)
        deep = torch.cat([self.embedding(ids).view(-1, self.embed_output_dim), x_cont], dim=1)
        return torch.sigmoid(self.wide(ids).sum(dim=1) + self.wide_dense(x_cont) + self.mlp(deep)).squeeze(1)


@register("embedding_bag", lambda: {"ids": tokens(), "weights": torch.rand(3, 8)}, "text")
class EmbeddingBagClassifier(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCAB, dim, mode="sum")
        self.fc1, self.fc2 = nn.Linear(dim, 24), nn.Linear(24, 3)

    def forward(self, ids, weights):
        return self.fc2(F.relu(self.fc1(self.bag(ids, per_sample_weights=weights))))


@register("siamese", lambda: (torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)), "vision", "shared")
class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        conv = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        self.cnn = nn.Sequential(*conv, nn.Conv2d(16, 8, 3), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(8 * 2 * 2, 24), nn.Sigmoid())
        self.out = nn.Linear(24, 1)

    def forward_once(self, x):
        x = self.cnn(x)
        return self.fc(x.view(x.size()[0], -1))

    def forward(self, x1, x2):
        return self.out(torch.abs(self.forward_once(x1) - self.forward_once(x2)))


@register("highway_mlp", rows, "gated")
class HighwayMlp(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.inp = nn.Linear(10, dim)
        self.layers = nn.ModuleList([nn.Linear(dim, dim * 2) for _ in range(2)])
        self.glu, self.head = nn.Linear(dim, 2 * 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.inp(x)
        for layer in self.layers:
            h, gate = layer(x).chunk(2, -1)
            gate = torch.sigmoid(gate)
            x = gate * F.relu(h) + (1 - gate) * x
        return self.head(F.glu(self.glu(x), dim=-1))


@register("residual_mlp", rows)
class ResidualMlp(nn.Module):
    def __init__(self, dim=16, hidden=24):
        super().__init__()
        self.inp = nn.Linear(10, dim)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            layers = [nn.BatchNorm1d(dim), nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)]
            self.blocks.append(nn.Sequential(*layers))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(F.relu(x))


@dataclass
class MlpOutput:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class ModelOutput(OrderedDict):
    """The idea of transformers' ModelOutput: a dataclass that is an ordered mapping too."""

    def __post_init__(self):
        for field in fields(self):
            self[field.name] = getattr(self, field.name)


@dataclass
class MlpModelOutput(ModelOutput):
    logits: torch.Tensor = None
    hidden: torch.Tensor = None


@register("model_output", rows, "dataclass")
class ModelOutputMlp(nn.Module):
    output_class = MlpModelOutput

    def __init__(self, hidden=16):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(10, hidden), nn.Linear(hidden, 20), nn.Linear(20, 3)

    def forward(self, x):
        hidden = F.gelu(self.fc1(x))
        return self.output_class(logits=self.head(F.relu(self.fc2(hidden))), hidden=hidden)


@register("plain_dataclass", rows, "dataclass")
class DataclassMlp(ModelOutputMlp):
    output_class = MlpOutput


class SelfAttention2d(nn.Module):
    """SAGAN / non-local: 1x1 convolutions, no heads, a learned gamma."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 2, 1)
        self.key = nn.Conv2d(channels, channels // 2, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.7))
        self.scale = math.sqrt(channels // 2)

    def forward(self, x):
        b, c, h, w = x.size()
        q = self.query(x).view(b, -1, h * w).permute(0, 2, 1)
        k = self.key(x).view(b, -1, h * w)
        v = self.value(x).view(b, -1, h * w)
        attn = torch.softmax(torch.bmm(q, k) / self.scale, dim=-1)
        out = torch.bmm(v, attn.permute(0, 2, 1)).view(b, c, h, w)
        return self.gamma * out + x


@register("single_head_attention", image(), "vision", "attention")
class SingleHead(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width)
        self.attn = SelfAttention2d(width)
        self.conv2 = nn.Conv2d(width, 24, 3, 2, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = F.leaky_relu(self.conv2(self.attn(F.relu(self.bn1(self.conv1(x))))), 0.2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class T5Attention(nn.Module):
    def __init__(self, d_model, heads, d_kv):
        super().__init__()
        self.n_heads, self.key_value_proj_dim, self.inner_dim = heads, d_kv, heads * d_kv
        self.q, self.k, self.v = (nn.Linear(d_model, self.inner_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(self.inner_dim, d_model, bias=False)

    def forward(self, x, position_bias):
        shape = (x.shape[0], -1, self.n_heads, self.key_value_proj_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attn = F.softmax(torch.matmul(q, k.transpose(3, 2)) + position_bias, dim=-1)
        return self.o(torch.matmul(attn, v).transpose(1, 2).contiguous().view(x.shape[0], -1, self.inner_dim))


@register("t5_encoder", tokens, "text", "attention")
class T5Encoder(nn.Module):
    """One table of relative biases, Embedding(num_buckets, heads), shared by all layers."""

    def __init__(self, d_model=24, heads=4, d_kv=8):
        super().__init__()
        self.shared, self.relative_attention_bias = nn.Embedding(VOCAB, d_model), nn.Embedding(16, heads)
        self.attn = nn.ModuleList([T5Attention(d_model, heads, d_kv) for _ in range(2)])
        self.norms = nn.ModuleList([nn.RMSNorm(d_model, eps=1e-6) for _ in range(5)])
        self.wi_0 = nn.ModuleList([nn.Linear(d_model, 40, bias=False) for _ in range(2)])
        self.wi_1 = nn.ModuleList([nn.Linear(d_model, 40, bias=False) for _ in range(2)])
        self.wo = nn.ModuleList([nn.Linear(40, d_model, bias=False) for _ in range(2)])

    def compute_bias(self, length, device):
        relative = torch.arange(length, device=device)[None, :] - torch.arange(length, device=device)[:, None]
        n = relative.abs()
        large = (4 + torch.log(n.clamp(min=1).float() / 4) / math.log(32 / 4) * 4).long().clamp(max=7)
        bucket = (relative > 0).long() * 8 + torch.where(n < 4, n, large)
        return self.relative_attention_bias(bucket).permute([2, 0, 1]).unsqueeze(0)

    def forward(self, ids):
        x, bias = self.shared(ids), self.compute_bias(ids.size(1), ids.device)
        for i, attn in enumerate(self.attn):
            x = x + attn(self.norms[2 * i](x), bias)
            h = self.norms[2 * i + 1](x)
            x = x + self.wo[i](F.gelu(self.wi_0[i](h), approximate="tanh") * self.wi_1[i](h))
        return self.norms[-1](x)


def plain_mlp(norm):
    hidden = [nn.Linear(10, 24), norm(24), nn.ReLU(), nn.Linear(24, 16), norm(16), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(16, 3))


register("mlp_batchnorm", rows)(lambda: plain_mlp(nn.BatchNorm1d))
register("mlp_layernorm", rows)(lambda: plain_mlp(nn.LayerNorm))
