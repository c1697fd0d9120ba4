"""torch's own multi-head attention with some heads removed.

`nn.MultiheadAttention` derives the size of a head from the width of its input, so it cannot hold fewer heads
than that width divided by the head size, nor more. This subclass can; everything else is as in the original,
`state_dict` names included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def apply_masks(module: nn.Module) -> None:
    """Make a module's weights under masks of torch.nn.utils.prune anew, as its hooks do before every call of it."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(module, ())


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose heads are fewer, or more, than input width / head size. Made by `adopt` only."""

    @staticmethod
    def adopt(module: nn.MultiheadAttention) -> None:
        """Turn `module`, whose tensors have been sliced, into this class. Does nothing where the original can hold them."""
        with torch.no_grad():  # what is under a mask was made of tensors that have been sliced since
            apply_masks(module)
            apply_masks(module.out_proj)
        width = module.out_proj.weight.shape[1]
        into = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
        if into.shape[1] == width == module.num_heads * module.head_dim:
            return
        if module.bias_k is not None or module.add_zero_attn:
            return  # not followed: the check that comes after finds out
        if not isinstance(module, PrunedMultiheadAttention):  # it may lose heads more than once
            module.__class__ = PrunedMultiheadAttention
            module._pruned_separate = not module._qkv_same_embed_dim  # type: ignore[assignment]
            module._qkv_same_embed_dim = False  # the encoder layer's fused path would assume full heads
        module.num_heads = width // module.head_dim

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
        """As `nn.MultiheadAttention.forward`; masks and shapes as documented there.

        The operations are those of torch, one by one, so the cost is what was predicted from the whole module.
        """
        if query.is_nested:  # an encoder in eval mode leaves the padding out
            lengths = [len(each) for each in query.unbind()]
            padded = query.to_padded_tensor(0.0)
            places = torch.arange(padded.shape[1], device=query.device)
            padding = places >= torch.tensor(lengths, device=query.device)[:, None]
            out, _ = self(padded, padded, padded, padding, need_weights=False)
            return torch.nested.as_nested_tensor([each[:n] for each, n in zip(out, lengths, strict=True)]), None
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            moved: dict[int, Tensor] = {}  # what was one tensor stays one: it is projected at once
            query, key, value = (moved.setdefault(id(t), t.transpose(0, 1)) for t in (query, key, value))
        length, batch, _ = query.shape
        heads, size = self.num_heads, self.head_dim
        causal = is_causal and attn_mask is not None and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(query, key_padding_mask, attn_mask)
        projected = self._projected(query, key, value)
        q, k, v = (t.view(t.shape[0], batch * heads, size).transpose(0, 1) for t in projected)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scaled, keys = q * math.sqrt(1.0 / size), k.transpose(-2, -1)
            scores = torch.bmm(scaled, keys) if mask is None else torch.baddbmm(mask, scaled, keys)
            weights = torch.softmax(scores, dim=-1)
            if dropout:
                weights = nn.functional.dropout(weights, dropout)
            out = torch.bmm(weights, v).transpose(0, 1)
            weights = weights.view(batch, heads, length, k.shape[1])
        else:
            if mask is not None:
                mask = mask.unsqueeze(0) if len(mask) == 1 else mask.view(batch, heads, -1, k.shape[1])
            q, k, v = (t.view(batch, heads, t.shape[1], size) for t in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal).permute(2, 0, 1, 3)
        out = out.reshape(length * batch, heads * size)
        out = nn.functional.linear(out, self.out_proj.weight, self.out_proj.bias).view(length, batch, -1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values, each (L or S, N, heads * head size)."""
        width = self.num_heads * self.head_dim
        runs = [(query, 1), (key, 1), (value, 1)]  # inputs, and how many of the three each is projected to
        if key is value and not self._pruned_separate:
            runs = [(query, 3)] if query is key else [(query, 1), (key, 2)]
        sizes = [n * width for _, n in runs]
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if not self._pruned_separate:
            weights = self.in_proj_weight.split(sizes)
        biases: Any = [None] * len(runs) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        found: list[Tensor] = []
        for (x, n), weight, bias in zip(runs, weights, biases, strict=True):
            y = nn.functional.linear(x, weight, bias)
            if n == 1:
                found.append(y)
            else:
                y = y.unflatten(-1, (n, width)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
                found += [y[i] for i in range(n)]
        return found

    def _mask(self, query: Tensor, padding: Tensor | None, attn: Tensor | None) -> Tensor | None:
        """Both masks as one to add, (1 or N * heads, 1 or L, S)."""

        def to_add(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask
            return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, float("-inf"))

        batch, heads = query.shape[1], self.num_heads
        if padding is not None:
            padding = to_add(padding)
        if attn is not None:
            attn = to_add(attn)
            attn = attn.unsqueeze(0) if attn.dim() == 2 else attn
            if len(attn) not in (1, batch * heads):
                raise ValueError(f"attn_mask is for {len(attn) // batch} heads; {heads} are left after pruning")
        if padding is None:
            return attn
        padding = padding.view(batch, 1, 1, -1).expand(-1, heads, -1, -1).reshape(batch * heads, 1, -1)
        return padding if attn is None else attn + padding
