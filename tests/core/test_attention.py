"""nn.MultiheadAttention without some of its heads, against the original with these heads zeroed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunewise.core.attention import PrunedMultiheadAttention
from prunewise.core.cost import measure
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon

HEADS, SIZE, KEPT = 4, 3, (1, 3)
WIDTH = HEADS * SIZE
ROWS = torch.tensor([h * SIZE + i for h in KEPT for i in range(SIZE)])


def pair(**kwargs: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """(the original with heads zeroed at the output projection, the pruned one)."""
    torch.manual_seed(0)
    full = nn.MultiheadAttention(WIDTH, HEADS, **kwargs).double()
    if full.in_proj_bias is not None:
        nn.init.normal_(full.in_proj_bias)
    small = copy.deepcopy(full)
    with torch.no_grad():
        gone = torch.ones(WIDTH, dtype=torch.bool)
        gone[ROWS] = False
        full.out_proj.weight[:, gone] = 0
        small.out_proj.weight = nn.Parameter(small.out_proj.weight[:, ROWS])
        stacked = torch.cat([ROWS, ROWS + WIDTH, ROWS + 2 * WIDTH])
        if small.in_proj_weight is not None:
            small.in_proj_weight = nn.Parameter(small.in_proj_weight[stacked])
        else:
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                setattr(small, name, nn.Parameter(getattr(small, name)[ROWS]))
        if small.in_proj_bias is not None:
            small.in_proj_bias = nn.Parameter(small.in_proj_bias[stacked])
    PrunedMultiheadAttention.adopt(small)
    assert type(small) is PrunedMultiheadAttention
    assert small.num_heads == len(KEPT)
    return full.eval(), small.eval()


def same(full: nn.MultiheadAttention, small: nn.MultiheadAttention, *args: Tensor, **kwargs: Any) -> None:
    want, want_weights = full(*args, **kwargs, average_attn_weights=False)
    got, got_weights = small(*args, **kwargs, average_attn_weights=False)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    if want_weights is None:
        assert got_weights is None
    else:
        torch.testing.assert_close(got_weights, want_weights[..., list(KEPT), :, :], rtol=1e-9, atol=1e-12)


@pytest.fixture(params=[False, True], ids=["sequence first", "batch first"])
def batch_first(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_self_attention(batch_first: bool, need_weights: bool, bias: bool) -> None:
    full, small = pair(batch_first=batch_first, bias=bias)
    x = draw(2, 5, WIDTH)
    same(full, small, x, x, x, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "each"])
def test_masks(batch_first: bool, need_weights: bool, padding: str | None, mask: str | None) -> None:
    full, small = pair(batch_first=batch_first)
    q, kv = (draw(2, 5, WIDTH), draw(2, 7, WIDTH)) if batch_first else (draw(5, 2, WIDTH), draw(7, 2, WIDTH))
    kwargs: dict[str, Any] = {"need_weights": need_weights}
    if padding:
        gone = torch.zeros(2, 7, dtype=torch.bool)
        gone[1, 4:] = True
        kwargs["key_padding_mask"] = gone if padding == "bool" else draw(2, 7)
    small_kwargs = dict(kwargs)
    if mask == "each":  # one mask a head: the pruned module takes those of its own heads
        each = draw(2, HEADS, 5, 7)
        kwargs["attn_mask"] = each.flatten(0, 1)
        small_kwargs["attn_mask"] = each[:, list(KEPT)].flatten(0, 1)
    elif mask:
        hidden = torch.triu(torch.ones(5, 7, dtype=torch.bool), 2)
        kwargs["attn_mask"] = small_kwargs["attn_mask"] = hidden if mask == "bool" else draw(5, 7)
    if padding == "bool" and mask in ("float", "each"):
        kwargs["key_padding_mask"] = torch.zeros(2, 7, dtype=torch.float64).masked_fill(gone, float("-inf"))
    want = full(q, kv, kv, **kwargs, average_attn_weights=False)
    got = small(q, kv, kv, **small_kwargs, average_attn_weights=False)
    torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(got[1], want[1][:, list(KEPT)], rtol=1e-9, atol=1e-12)


def test_a_mask_for_heads_that_are_gone_is_an_error() -> None:
    _, small = pair(batch_first=True)
    x = draw(2, 5, WIDTH)
    with pytest.raises(ValueError, match="4 heads; 2 are left"):
        small(x, x, x, attn_mask=draw(2 * HEADS, 5, 5))


@pytest.mark.parametrize("need_weights", [False, True])
def test_without_a_batch(batch_first: bool, need_weights: bool) -> None:
    full, small = pair(batch_first=batch_first)
    same(full, small, draw(5, WIDTH), draw(7, WIDTH), draw(7, WIDTH), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
def test_keys_and_values_of_other_widths(batch_first: bool, need_weights: bool) -> None:
    full, small = pair(batch_first=batch_first, kdim=5, vdim=7)
    lead = (2, 6) if batch_first else (6, 2)
    same(full, small, draw(2, 4, WIDTH) if batch_first else draw(4, 2, WIDTH), draw(*lead, 5), draw(*lead, 7),
         need_weights=need_weights)  # fmt: skip


def test_causal(batch_first: bool) -> None:
    full, small = pair(batch_first=batch_first)
    x = draw(5, 5, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    same(full, small, x, x, x, need_weights=False, attn_mask=mask, is_causal=True)


def test_averaged_weights_are_those_of_the_heads_left() -> None:
    _, small = pair(batch_first=True)
    x = draw(2, 5, WIDTH)
    averaged, each = small(x, x, x)[1], small(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(averaged, each.mean(1))


def test_dropout_works_in_training() -> None:
    _, small = pair(batch_first=True, dropout=0.5)
    small.train()
    x = draw(2, 5, WIDTH)
    assert not torch.equal(small(x, x, x)[0], small(x, x, x)[0])
    assert torch.equal(small.eval()(x, x, x)[0], small(x, x, x)[0])


def test_state_dict_names_stay() -> None:
    full, small = pair()
    assert list(full.state_dict()) == list(small.state_dict())


def test_whole_modules_are_left_alone() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS)
    PrunedMultiheadAttention.adopt(module)
    assert type(module) is nn.MultiheadAttention


def test_in_an_encoder_layer_in_eval_mode() -> None:
    """The layer's own fused path must not be taken with fewer heads."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True).double().eval()
    full, layer.self_attn = pair(batch_first=True)
    whole = copy.deepcopy(layer)
    whole.self_attn = full
    x = draw(2, 5, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "apart", "other widths", "unbatched", "masked"])
def test_it_costs_what_was_predicted(batch_first: bool, need_weights: bool, kind: str) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = {"kdim": 5, "vdim": 7} if kind == "other widths" else {}
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **widths)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
            q, k, v = {"cross": (q, k, k), "apart": (q, k, v), "other widths": (q, k, v)}.get(kind, (q, q, q))
            padding, mask = masks or (None, None)
            out: Tensor = self.attn(q, k, v, padding, need_weights, mask)[0]
            return out

    lead = (5,) if kind == "unbatched" else (2, 5) if batch_first else (5, 2)
    last = (5, 7) if kind == "other widths" else (WIDTH, WIDTH)
    inputs = (draw(*lead, WIDTH), draw(*lead, last[0]), draw(*lead, last[1]))
    if kind == "masked":
        inputs += (torch.zeros(2, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).triu(1))
    surgeon = Surgeon.of(Attends().double(), inputs)
    (heads,) = [g.name for g in surgeon.grouping.groups if g.prunable]
    small = surgeon.cut(Attends().double(), {heads: KEPT})
    assert isinstance(small.attn, PrunedMultiheadAttention)
    predicted, measured = surgeon.costs({heads: len(KEPT)}), measure(small, inputs)
    assert (measured, measured.by_layer()) == (predicted, predicted.by_layer())


@pytest.mark.parametrize("widths", [{}, {"kdim": WIDTH, "vdim": 7}])
def test_it_loses_heads_twice(widths: dict[str, int]) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS, **widths)

        def forward(self, q: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.attn(q, q, v)[0]
            return out

    model: nn.Module = Attends().double()
    inputs = (draw(5, 2, WIDTH), draw(5, 2, widths.get("vdim", WIDTH)))
    for left in (3, 2):
        surgeon = Surgeon.of(model, inputs)
        (heads,) = [g.name for g in surgeon.grouping.groups if g.prunable]
        model = surgeon.cut(model, {heads: tuple(range(left))})
        assert isinstance(model, Attends)
        assert model.attn.num_heads == left


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_in_an_encoder_that_leaves_the_padding_out() -> None:
    """In eval mode torch's encoder turns a padded batch into a nested tensor, and padding comes out as zeros."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2).eval()
    inputs = {"src": draw(2, 5, WIDTH), "src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}
    surgeon = Surgeon.of(model, inputs)
    keep = {g.name: KEPT for g in surgeon.grouping.groups if g.prunable and g.size == HEADS}
    small = surgeon.cut(model, keep)
    with torch.no_grad(), masked(model, surgeon.grouping, keep):
        want, got = model(**inputs), small(**inputs)
    assert len(keep) == 2
    assert want[1, 3:].abs().max() == 0
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
