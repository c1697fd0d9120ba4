"""Transformers, written the way timm, transformers and the usual repositories write them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .registry import image, register

VOCAB = 23
images = image(size=12)


def sequences():
    return torch.randn(2, 9, 6)


def bert_inputs():
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return torch.randint(1, VOCAB, (2, 10)), mask, torch.randint(0, 2, (2, 10))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, act=nn.GELU):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, attn, mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimmAttention(nn.Module):
    """timm's fused qkv: the head dim is baked in, C is read from the input."""

    def __init__(self, dim, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class SdpaAttention(TimmAttention):
    def forward(self, x):
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(B, N, -1))


class QkNormAttention(nn.Module):
    """As in ViT-22B and SD3: LayerNorm over the head dim of queries and keys; H and D inferred from C."""

    def __init__(self, dim, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = nn.LayerNorm(dim // num_heads)
        self.k_norm = nn.LayerNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class EinsumAttention(nn.Module):
    def __init__(self, dim, heads=4):
        super().__init__()
        d = dim // heads
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(dim, heads, d) * dim**-0.5) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(heads, d, dim) * dim**-0.5)
        self.bo = nn.Parameter(torch.zeros(dim))
        self.scale = d**-0.5

    def forward(self, x):
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.wq, self.wk, self.wv))
        attn = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * self.scale, dim=-1)
        out = torch.einsum("bhij,bhjd->bhid", attn, v)
        return torch.einsum("bhnd,hdc->bnc", out, self.wo) + self.bo


class DenseMoe(nn.Module):
    """Every expert runs, a softmax weighs them; the experts are stacked in (E, C, F) parameters."""

    def __init__(self, dim, hidden, experts=3):
        super().__init__()
        self.gate = nn.Linear(dim, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.b1 = nn.Parameter(torch.randn(experts, hidden) * 0.1)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x):
        gates = F.softmax(self.gate(x), dim=-1)
        h = F.gelu(torch.einsum("bnc,ecf->bnef", x, self.w1) + self.b1)
        y = torch.einsum("bnef,efc->bnec", h, self.w2)
        return torch.einsum("bne,bnec->bnc", gates, y)


class VisionTransformer(nn.Module):
    """The timm skeleton with mean pooling, around one kind of token mixing."""

    def __init__(self, attention, mlp=Mlp, pos=True, dim=32, depth=2, num_classes=5):
        super().__init__()
        self.patch_embed = PatchEmbed(4, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 9, dim) * 0.2) if pos else None
        self.blocks = nn.Sequential(*[Block(dim, attention(dim), mlp(dim, dim * 2)) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class MhaBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim))

    def forward(self, x):
        y = self.ln_1(x)
        y, _ = self.attn(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


@register("vit_mha", images, "vision", "attention", "mha")
class VitMha(nn.Module):
    """torchvision's ViT: nn.MultiheadAttention and a class token; the width is baked into the reshape."""

    def __init__(self, dim=32, heads=4, depth=2, num_classes=5):
        super().__init__()
        self.hidden_dim = dim
        self.conv_proj = nn.Conv2d(3, dim, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.2)
        self.pos_embedding = nn.Parameter(torch.randn(1, 9 + 1, dim) * 0.2)
        self.layers = nn.Sequential(*[MhaBlock(dim, heads) for _ in range(depth)])
        self.ln = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        n, _, h, w = x.shape
        x = self.conv_proj(x).reshape(n, self.hidden_dim, (h // 4) * (w // 4)).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.pos_embedding
        return self.head(self.ln(self.layers(x))[:, 0])


@register("encoder_layer", sequences, "attention", "mha")
class EncoderLayerModel(nn.Module):
    def __init__(self, dim=24, norm_first=False, activation="relu"):
        super().__init__()
        self.embed = nn.Linear(6, dim)
        layer = nn.TransformerEncoderLayer(
            dim, 4, 40, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(dim) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 4)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class TokenMlp(nn.Module):
    """The Mixer's token mixing: an MLP over the nine tokens, channels kept apart."""

    def __init__(self, dim):
        super().__init__()
        self.mlp_tokens = Mlp(9, 16)

    def forward(self, x):
        return self.mlp_tokens(x.transpose(1, 2)).transpose(1, 2)


def window_partition(x, window_size):
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size * window_size, C)


def window_reverse(windows, window_size, H, W):
    B = int(windows.shape[0] / (H * W / window_size / window_size))
    x = windows.view(B, H // window_size, W // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    """Swin's: a table of relative position biases, one column a head, read through an index buffer."""

    def __init__(self, dim, ws, num_heads):
        super().__init__()
        self.dim, self.ws, self.num_heads = dim, ws, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * ws - 1) ** 2, num_heads) * 0.3)
        coords = torch.stack(torch.meshgrid(torch.arange(ws), torch.arange(ws), indexing="ij")).flatten(1)
        rel = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + ws - 1
        self.register_buffer("relative_position_index", rel[..., 0] * (2 * ws - 1) + rel[..., 1])
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            nW = mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        x = (attn.softmax(-1) @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class SwinBlock(nn.Module):
    def __init__(self, dim, size, ws, num_heads, shift):
        super().__init__()
        self.size, self.ws, self.shift = size, ws, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, ws, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim * 2)
        mask = None
        if shift:
            edges = torch.zeros(size, dtype=torch.long)
            edges[-ws:-shift], edges[-shift:] = 1, 2
            region = window_partition((edges[:, None] * 3 + edges[None, :])[None, :, :, None], ws)[..., 0]
            different = region[:, :, None] != region[:, None, :]
            mask = different.to(torch.get_default_dtype()) * -100.0
        self.register_buffer("attn_mask", mask)

    def forward(self, x):
        H = W = self.size
        B, _, C = x.shape
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = self.attn(window_partition(x, self.ws), mask=self.attn_mask)
        x = window_reverse(windows, self.ws, H, W)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(B, H * W, C)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, size, dim):
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        B, _, C = x.shape
        x = x.view(B, self.size, self.size, C)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x.view(B, -1, 4 * C)))


@register("swin", image(), "vision", "attention")
class Swin(nn.Module):
    def __init__(self, dim=16, num_classes=5):
        super().__init__()
        self.patch_embed = PatchEmbed(4, dim)
        self.patch_norm = nn.LayerNorm(dim)
        self.stage1 = nn.Sequential(SwinBlock(dim, 4, 2, 2, 0), SwinBlock(dim, 4, 2, 2, 1))
        self.merge = PatchMerging(4, dim)
        self.stage2 = SwinBlock(2 * dim, 2, 2, 4, 0)
        self.norm = nn.LayerNorm(2 * dim)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(2 * dim, num_classes)

    def forward(self, x):
        x = self.stage1(self.patch_norm(self.patch_embed(x)))
        x = self.norm(self.stage2(self.merge(x)))
        return self.head(torch.flatten(self.avgpool(x.transpose(1, 2)), 1))


class BertSelfAttention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_attention_heads = num_heads
        self.attention_head_size = int(hidden_size / num_heads)
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query = nn.Linear(hidden_size, self.all_head_size)
        self.key = nn.Linear(hidden_size, self.all_head_size)
        self.value = nn.Linear(hidden_size, self.all_head_size)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)

    def transpose_for_scores(self, x):
        return x.view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).transpose(1, 2)

    def forward(self, hidden, mask):
        q = self.transpose_for_scores(self.query(hidden))
        k = self.transpose_for_scores(self.key(hidden))
        v = self.transpose_for_scores(self.value(hidden))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        probs = F.softmax(scores + mask, dim=-1)
        context = torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous()
        context = context.view(context.size()[:-2] + (self.all_head_size,))  # noqa: RUF005
        return self.LayerNorm(self.dense(context) + hidden)


class BertLayer(nn.Module):
    def __init__(self, hidden_size, num_heads, intermediate):
        super().__init__()
        self.attention = BertSelfAttention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, intermediate)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)

    def forward(self, hidden, mask):
        hidden = self.attention(hidden, mask)
        return self.LayerNorm(self.mlp(hidden) + hidden)


@register("bert", bert_inputs, "text", "attention")
class Bert(nn.Module):
    """Token, position and type embeddings, an additive mask, a pooler; returns (tokens, pooled)."""

    def __init__(self, hidden_size=32, num_heads=4):
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(16, hidden_size)
        self.token_type_embeddings = nn.Embedding(2, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(16).expand((1, -1)), persistent=False)
        self.layer = nn.ModuleList([BertLayer(hidden_size, num_heads, 48) for _ in range(2)])
        self.pooler = nn.Linear(hidden_size, hidden_size)

    def forward(self, input_ids, attention_mask, token_type_ids):
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = self.LayerNorm(x + self.position_embeddings(self.position_ids[:, : input_ids.size(1)]))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layer:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))


register("vit_timm", images, "vision", "attention")(lambda: VisionTransformer(TimmAttention))
register("vit_sdpa", images, "vision", "attention")(lambda: VisionTransformer(SdpaAttention))
register("vit_qk_norm", images, "vision", "attention")(lambda: VisionTransformer(QkNormAttention))
register("encoder_layer_prenorm", sequences, "attention", "mha")(lambda: EncoderLayerModel(24, True, "gelu"))
register("einsum_attention", images, "vision", "attention", "raw")(lambda: VisionTransformer(EinsumAttention))
register("moe", images, "vision", "attention", "raw")(lambda: VisionTransformer(SdpaAttention, DenseMoe))
register("mlp_mixer", images, "vision")(lambda: VisionTransformer(TokenMlp, pos=False))
