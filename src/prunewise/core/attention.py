"""torch's own multi-head attention with some heads removed.

`nn.MultiheadAttention` derives the size of a head from the width of its input, so it cannot hold fewer heads
than that width divided by the head size. This subclass can; everything else is as in the original,
`state_dict` names included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose heads are fewer than input width / head size. Made by `adopt` only."""

    @staticmethod
    def adopt(module: nn.MultiheadAttention) -> None:
        """Turn `module`, whose tensors have been sliced, into this class. Does nothing if no head was removed."""
        width = module.out_proj.weight.shape[1]
        if width == module.num_heads * module.head_dim:
            return
        if module.bias_k is not None or module.add_zero_attn:
            return  # not followed: the check that comes after finds out
        module.__class__ = PrunedMultiheadAttention
        module.num_heads = width // module.head_dim
        module._pruned_separate = not module._qkv_same_embed_dim  # type: ignore[assignment]
        module._qkv_same_embed_dim = False  # the encoder layer's fused path would assume full heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; masks and shapes as documented there."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (self._heads(t, i) for i, t in enumerate((query, key, value)))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            if dropout:
                weights = nn.functional.dropout(weights, dropout)
            out = weights @ v
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, x: Tensor, which: int) -> Tensor:
        """Queries (0), keys (1) or values (2): (N, heads, L, head size)."""
        width = self.num_heads * self.head_dim
        if self._pruned_separate:
            weight: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[which]
        else:
            weight = self.in_proj_weight[which * width : (which + 1) * width]
        bias = None if self.in_proj_bias is None else self.in_proj_bias[which * width : (which + 1) * width]
        projected: Tensor = nn.functional.linear(x, weight, bias)
        heads: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attn: Tensor | None) -> Tensor | None:
        """Both masks as one additive one that broadcasts to (N, heads, L, S)."""
        mask: Tensor | None = None
        for part, is_padding in ((padding, True), (attn, False)):
            if part is None:
                continue
            if part.dtype == torch.bool:
                part = torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, float("-inf"))
            if is_padding:
                part = part.reshape(-1, 1, 1, k.shape[2])
            elif part.dim() == 3:
                heads = part.shape[0] // q.shape[0]
                if heads != self.num_heads:
                    raise ValueError(f"attn_mask is for {heads} heads; {self.num_heads} are left after pruning")
                part = part.reshape(q.shape[0], heads, *part.shape[1:])
            mask = part if mask is None else mask + part
        return mask
