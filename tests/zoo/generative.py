"""Models that generate: language models, style transfer, diffusion, optical flow, autoencoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .registry import image, register

VOCAB = 23


def tokens():
    return torch.randint(1, VOCAB, (2, 10))


def image_pair():
    return torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)


class CausalSelfAttention(nn.Module):
    """nanoGPT's."""

    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd
        mask = torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size)
        self.register_buffer("bias", mask)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


@register("gpt2", tokens, "text", "attention", "tied")
class Gpt2(nn.Module):
    def __init__(self, n_embd=32, n_head=4, block_size=12):
        super().__init__()

        def block():
            mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))
            attn = CausalSelfAttention(n_embd, n_head, block_size)
            ln_1, ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
            return nn.ModuleDict({"ln_1": ln_1, "attn": attn, "ln_2": ln_2, "mlp": mlp})

        h = nn.ModuleList([block() for _ in range(2)])
        wte, wpe = nn.Embedding(VOCAB, n_embd), nn.Embedding(block_size, n_embd)
        self.transformer = nn.ModuleDict({"wte": wte, "wpe": wpe, "h": h, "ln_f": nn.LayerNorm(n_embd)})
        self.lm_head = nn.Linear(n_embd, VOCAB, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx):
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            x = x + block.attn(block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        return self.lm_head(self.transformer.ln_f(x))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.variance_epsilon = eps

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def repeat_kv(x, n_rep):
    batch, kv_heads, slen, head_dim = x.shape
    if n_rep == 1:
        return x
    x = x[:, :, None, :, :].expand(batch, kv_heads, n_rep, slen, head_dim)
    return x.reshape(batch, kv_heads * n_rep, slen, head_dim)


class LlamaAttention(nn.Module):
    def __init__(self, dim, heads, kv_heads, kind):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim, self.kind = heads, kv_heads, dim // heads, kind
        self.groups = heads // kv_heads
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, self.head_dim, 2) / self.head_dim))

    def forward(self, x):
        bsz, q_len, _ = x.size()
        q = self.q_proj(x).view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(bsz, q_len, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(bsz, q_len, self.kv_heads, self.head_dim).transpose(1, 2)
        freqs = torch.outer(torch.arange(q_len, device=x.device).to(x.dtype), self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos, sin = emb.cos()[None, None], emb.sin()[None, None]
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        if self.kind == "gqa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif self.kind == "interleave":
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = repeat_kv(k, self.groups), repeat_kv(v, self.groups)
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
            mask = torch.full((q_len, q_len), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
            out = torch.matmul(F.softmax(scores + torch.triu(mask, diagonal=1), dim=-1), v)
        return self.o_proj(out.transpose(1, 2).contiguous().reshape(bsz, q_len, -1))


class LlamaLayer(nn.Module):
    def __init__(self, dim, heads, kv_heads, kind):
        super().__init__()
        self.self_attn = LlamaAttention(dim, heads, kv_heads, kind)
        self.gate_proj = nn.Linear(dim, 40, bias=False)
        self.up_proj = nn.Linear(dim, 40, bias=False)
        self.down_proj = nn.Linear(40, dim, bias=False)
        self.input_layernorm = RMSNorm(dim)
        self.post_attention_layernorm = RMSNorm(dim)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


@register("llama", tokens, "text", "attention")
class Llama(nn.Module):
    def __init__(self, kind="eager", dim=32, heads=4, kv_heads=2):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleList([LlamaLayer(dim, heads, kv_heads, kind) for _ in range(2)])
        self.norm = RMSNorm(dim)
        self.lm_head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class MultiHeadedAttention(nn.Module):
    """The Annotated Transformer's: h and d_k are baked in, the width is h * d_k."""

    def __init__(self, h, d_model):
        super().__init__()
        self.d_k, self.h = d_model // h, h
        self.linears = nn.ModuleList([nn.Linear(d_model, d_model) for _ in range(4)])

    def forward(self, query, key, value, mask):
        n = query.size(0)
        inputs = zip(self.linears, (query, key, value), strict=False)
        query, key, value = [lin(x).view(n, -1, self.h, self.d_k).transpose(1, 2) for lin, x in inputs]
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        p_attn = scores.masked_fill(mask == 0, -1e9).softmax(dim=-1)
        x = torch.matmul(p_attn, value).transpose(1, 2).contiguous().view(n, -1, self.h * self.d_k)
        return self.linears[-1](x)


class SeqLayer(nn.Module):
    """An encoder layer, or with ``cross`` a decoder layer."""

    def __init__(self, d_model, h, d_ff, cross):
        super().__init__()
        self.self_attn = MultiHeadedAttention(h, d_model)
        self.src_attn = MultiHeadedAttention(h, d_model) if cross else None
        self.w_1, self.w_2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norms = nn.ModuleList([nn.LayerNorm(d_model) for _ in range(3 if cross else 2)])

    def forward(self, x, mask, memory=None, src_mask=None):
        x = self.norms[0](x + self.self_attn(x, x, x, mask))
        if self.src_attn is not None:
            x = self.norms[1](x + self.src_attn(x, memory, memory, src_mask))
        return self.norms[-1](x + self.w_2(F.relu(self.w_1(x))))


@register("seq2seq", lambda: (tokens(), tokens()[:, :8]), "text", "attention", "tied")
class Seq2Seq(nn.Module):
    """Translation: one embedding for source, target and output layer, scaled by the root of the width."""

    def __init__(self, d_model=32, h=4, d_ff=48, max_len=16):
        super().__init__()
        self.d_model = d_model
        self.embed = nn.Embedding(VOCAB, d_model, padding_idx=0)
        angle = torch.arange(max_len)[:, None] * torch.exp(torch.arange(0, d_model, 2) * -(math.log(10000.0) / d_model))
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], -1).reshape(1, max_len, d_model))
        self.encoder = nn.ModuleList([SeqLayer(d_model, h, d_ff, False) for _ in range(2)])
        self.decoder = nn.ModuleList([SeqLayer(d_model, h, d_ff, True) for _ in range(2)])
        self.generator = nn.Linear(d_model, VOCAB)
        self.generator.weight = self.embed.weight

    def embedding(self, ids):
        return self.embed(ids) * math.sqrt(self.d_model) + self.pe[:, : ids.size(1)]

    def forward(self, src, tgt):
        src_mask = (src != 0)[:, None, None, :]
        ones = torch.ones(tgt.size(1), tgt.size(1), dtype=torch.bool, device=tgt.device)
        memory, x = self.embedding(src), self.embedding(tgt)
        for layer in self.encoder:
            memory = layer(memory, src_mask)
        for layer in self.decoder:
            x = layer(x, torch.tril(ones)[None, None], memory, src_mask)
        return F.log_softmax(self.generator(x), dim=-1)


class ConvNorm(nn.Module):
    def __init__(self, cin, cout, kernel, stride=1):
        super().__init__()
        self.pad = nn.ReflectionPad2d(kernel // 2)
        self.conv = nn.Conv2d(cin, cout, kernel, stride)
        self.norm = nn.InstanceNorm2d(cout, affine=True)

    def forward(self, x):
        return self.norm(self.conv(self.pad(x)))


class StyleResidual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(width, width, 3), ConvNorm(width, width, 3)

    def forward(self, x):
        return self.conv2(F.relu(self.conv1(x))) + x


@register("style_transfer_ps", image(), "vision", "generative")
class StyleTransfer(nn.Module):
    """Johnson et al.'s net, upsampling by pixel shuffle or by transposed convolution."""

    def __init__(self, deconv=False, width=8):
        super().__init__()
        self.down = nn.Sequential(
            ConvNorm(3, width, 5), nn.ReLU(), ConvNorm(width, 2 * width, 3, 2), nn.ReLU(),
            ConvNorm(2 * width, 3 * width, 3, 2), nn.ReLU(),
        )  # fmt: skip
        self.res = nn.Sequential(StyleResidual(3 * width), StyleResidual(3 * width))
        up = []
        for cin, cout in ((3 * width, 2 * width), (2 * width, width)):
            if deconv:
                up.append(nn.ConvTranspose2d(cin, cout, 3, stride=2, padding=1, output_padding=1))
            else:
                up += [nn.Conv2d(cin, cout * 4, 3, padding=1), nn.PixelShuffle(2)]
            up += [nn.InstanceNorm2d(cout, affine=True), nn.ReLU()]
        self.up = nn.Sequential(*up)
        self.out = nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(width, 3, 5))

    def forward(self, x):
        return torch.sigmoid(self.out(self.up(self.res(self.down(x)))))


class ResBlock(nn.Module):
    def __init__(self, cin, cout, emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb = nn.Linear(emb, cout)
        self.norm2, self.conv2 = nn.GroupNorm(4, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb(F.silu(emb))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.skip(x)


class AttnBlock(nn.Module):
    """The DDPM mid attention: heads of 8 channels, counted in __init__."""

    def __init__(self, channels):
        super().__init__()
        self.num_heads = channels // 8
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.proj = nn.Conv1d(channels, channels * 3, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        b, c, *spatial = x.shape
        q, k, v = self.qkv(self.norm(x.reshape(b, c, -1))).chunk(3, dim=1)
        q, k, v = (t.reshape(b * self.num_heads, c // self.num_heads, -1) for t in (q, k, v))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) * (c // self.num_heads) ** -0.5, dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        return x + self.proj(h).reshape(b, c, *spatial)


@register("diffusion_unet", lambda: (torch.randn(2, 3, 8, 8), torch.tensor([3, 41])), "vision", "generative")
class DiffusionUnet(nn.Module):
    def __init__(self, ch=16, emb=32):
        super().__init__()
        self.ch = ch
        self.time_mlp = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down1, self.pool1 = ResBlock(ch, ch, emb), nn.Conv2d(ch, ch, 3, stride=2, padding=1)
        self.down2, self.pool2 = ResBlock(ch, 2 * ch, emb), nn.Conv2d(2 * ch, 2 * ch, 3, stride=2, padding=1)
        self.mid1, self.attn, self.mid2 = (
            ResBlock(2 * ch, 2 * ch, emb), AttnBlock(2 * ch), ResBlock(2 * ch, 2 * ch, emb),
        )  # fmt: skip
        self.up2, self.up1 = ResBlock(4 * ch, ch, emb), ResBlock(2 * ch, ch, emb)
        self.norm_out, self.conv_out = nn.GroupNorm(4, ch), nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, x, t):
        half = self.ch // 2
        freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=x.dtype, device=x.device))
        args = t[:, None].to(x.dtype) * freqs[None]
        emb = self.time_mlp(torch.cat([args.sin(), args.cos()], dim=-1))
        h1 = self.down1(self.conv_in(x), emb)
        h2 = self.down2(self.pool1(h1), emb)
        h = self.mid2(self.attn(self.mid1(self.pool2(h2), emb)), emb)
        h = self.up2(torch.cat([F.interpolate(h, scale_factor=2), h2], dim=1), emb)
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2), h1], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))


@register("optical_flow", image_pair, "vision", "shared")
class OpticalFlow(nn.Module):
    """A siamese encoder and a correlation volume: the sum (or mean) over channels for each shift."""

    def __init__(self, mean=False, width=16, radius=1):
        super().__init__()
        self.mean, self.radius = mean, radius
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, 24, 3, 2, 1), nn.LeakyReLU(0.1)
        )
        self.redir = nn.Conv2d(24, 8, 1)
        self.conv1 = nn.Conv2d((2 * radius + 1) ** 2 + 8, 20, 3, 1, 1)
        self.conv2, self.flow = nn.Conv2d(20, width, 3, 1, 1), nn.Conv2d(width, 2, 3, 1, 1)

    def corr(self, f1, f2):
        r, (_, _, h, w) = self.radius, f1.shape
        padded, volume = F.pad(f2, (r, r, r, r)), []
        for dy in range(2 * r + 1):
            for dx in range(2 * r + 1):
                product = f1 * padded[:, :, dy : dy + h, dx : dx + w]
                volume.append(product.mean(1, keepdim=True) if self.mean else product.sum(1, keepdim=True))
        return torch.cat(volume, dim=1)

    def forward(self, img1, img2):
        f1, f2 = self.encoder(img1), self.encoder(img2)
        x = torch.cat([F.leaky_relu(self.corr(f1, f2), 0.1), self.redir(f1)], dim=1)
        flow = self.flow(F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.1)), 0.1))
        return F.interpolate(flow * 4.0, scale_factor=4, mode="bilinear", align_corners=False)


@register("autoencoder_unflatten", image(1, 8), "vision", "generative")
class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        convs = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(True), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(True)]
        self.encoder = nn.Sequential(*convs, nn.Flatten(start_dim=1), nn.Linear(2 * 2 * 16, 12))
        lin = [nn.Linear(12, 2 * 2 * 16), nn.ReLU(True), nn.Unflatten(dim=1, unflattened_size=(16, 2, 2))]
        self.decoder = nn.Sequential(
            *lin, nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(True), nn.ConvTranspose2d(8, 1, 2, 2)
        )

    def forward(self, x):
        return torch.sigmoid(self.decoder(self.encoder(x)))


@register("vae", image(3, 8), "vision", "generative")
class Vae(nn.Module):
    """PyTorch-VAE's, without the noise: the mean is decoded. Returns (reconstruction, mu, log_var)."""

    def __init__(self, latent=8):
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.fc_mu, self.fc_var = nn.Linear(24 * 4, latent), nn.Linear(24 * 4, latent)
        self.fc_dec = nn.Linear(latent, 24 * 4)
        self.dec1, self.dec2 = nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, x):
        h = torch.flatten(F.leaky_relu(self.enc2(F.leaky_relu(self.enc1(x)))), start_dim=1)
        mu, log_var = self.fc_mu(h), self.fc_var(h)
        z = self.fc_dec(mu).view(-1, 24, 2, 2)
        return torch.tanh(self.dec2(F.leaky_relu(self.dec1(z)))), mu, log_var


register("llama_gqa_sdpa", tokens, "text", "attention")(lambda: Llama("gqa"))
register("llama_gqa_interleave", tokens, "text", "attention")(lambda: Llama("interleave"))
register("style_transfer_deconv", image(), "vision", "generative")(lambda: StyleTransfer(deconv=True))
register("optical_flow_mean", image_pair, "vision", "shared")(lambda: OpticalFlow(mean=True))
