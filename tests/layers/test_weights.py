"""Which layers count, and their weights as matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import prunewise as pw
from prunewise.layers.weights import check_finite, find_layers


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.b.weight = self.a.weight
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.embed(x))))


def test_tied_weights_count_once_and_all_owners_are_known() -> None:
    layers = find_layers(Tied())
    assert [layer.name for layer in layers] == ["a", "head"]
    assert [[owner.path for owner in layer.owners] for layer in layers] == [["a", "b"], ["embed", "head"]]


def test_frozen_layers_count_and_norms_do_not() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 2, 3)).requires_grad_(False)
    assert [layer.name for layer in find_layers(model)] == ["0", "2"]


def test_attention_is_two_layers_or_four() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert [found.name for found in find_layers(layer)] == [
        "self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2",
    ]  # fmt: skip
    (into, _) = find_layers(nn.MultiheadAttention(8, 2, bias=False))
    assert (into.groups, into.rows, into.columns) == (3, 8, 8)
    assert torch.equal(into.from_matrix(into.as_matrix(into.weight)), into.weight)
    other = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert [found.shape for found in find_layers(other)] == [(8, 8), (8, 4), (8, 6), (8, 8)]
    other.k_proj_weight = other.q_proj_weight
    first, *_ = find_layers(other)
    assert [owner.parameter_name for owner in first.owners] == ["q_proj_weight", "k_proj_weight"]


def test_choice_of_layers() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    assert [layer.name for layer in find_layers(model, exclude=["0", "[23]"])] == ["1"]
    assert [layer.name for layer in find_layers(model, include="[01]", exclude="1")] == ["0"]
    assert [layer.name for layer in find_layers(model, include=lambda layer: layer.name == "3")] == ["3"]
    assert [layer.name for layer in find_layers(Tied(), exclude="b")] == ["head"]  # "a" is the same weight
    shared = nn.ModuleDict({"a": model[0], "b": model[0], "c": model[1]})
    assert [layer.name for layer in find_layers(shared, include="b")] == ["a"]
    assert [layer.name for layer in find_layers(shared, exclude="b")] == ["c"]
    with pytest.raises(pw.PlanError, match="no layer matches 'layer9'; there are layers like: 0"):
        find_layers(model, exclude="layer9")
    with pytest.raises(pw.NoPrunableGroupError):
        find_layers(model, exclude="*")


def test_weights_that_are_no_plain_parameters() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(pw.PlanError, match="'0' is no plain parameter"):
        find_layers(model)
    assert [layer.name for layer in find_layers(model, exclude="0")] == ["1"]
    with pytest.raises(pw.PlanError, match="lazy"):
        find_layers(nn.LazyLinear(3))


def test_masked_layers_are_the_same_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    before = find_layers(model)[0].parameter
    prune.l1_unstructured(model[0], "weight", amount=5)
    (layer,) = find_layers(model)
    assert layer.parameter is before
    assert int((layer.weight != 0).sum()) == 4
    assert layer.keep_mask is not None and int(layer.keep_mask.sum()) == 4


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 4), (1, 4, 6)),
        (nn.Conv2d(6, 4, (2, 3), groups=2), (2, 2, 18)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 2, 27)),
        (nn.Conv1d(5, 5, 3, groups=5), (5, 1, 3)),
    ],
)
def test_matrices_go_there_and_back(module: nn.Module, shape: tuple[int, ...]) -> None:
    (layer,) = find_layers(module)
    matrix = layer.as_matrix(layer.weight)
    assert matrix.shape == shape
    assert torch.equal(layer.from_matrix(matrix), layer.weight)


def test_a_row_is_all_that_makes_one_output() -> None:
    module = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
    (layer,) = find_layers(module)
    with torch.no_grad():
        matrix = layer.as_matrix(layer.weight)
        matrix = matrix.clone()
        matrix[1, 2] = 0  # the last output channel
        module.weight.copy_(layer.from_matrix(matrix))
        out = module(torch.randn(2, 4, 5))
    assert (out[:, 5] == 0).all()
    assert (out[:, :5] != 0).any(dim=2).all()


def test_nan_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(pw.NonFiniteError, match="weight of '1'"):
        check_finite(find_layers(model))
    check_finite(find_layers(model, exclude="1"))


def test_linear_layers_of_transformers_with_turned_weights() -> None:
    """The class is known by its name, so one made here will do: y = x W + b with W (inputs, outputs)."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    Conv1D.__module__ = "transformers.pytorch_utils"
    torch.manual_seed(0)
    turned, plain = nn.Sequential(Conv1D()), nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        plain[0].weight.copy_(turned[0].weight.T)
    x = torch.randn(20, 6)
    for method in ("wanda", "sparsegpt", "channel_l1"):
        ours, theirs = (pw.sparsify_(copy.deepcopy(m), pw.allocate(m, 0.5, "capacity", [x], progress=False), method, data=[x])
                        for m in (turned, plain))  # fmt: skip
        torch.testing.assert_close(ours[0].weight.T, theirs[0].weight)


def test_by_position_has_one_matrix_a_group_and_kernel_position() -> None:
    layer = find_layers(nn.Conv2d(4, 6, (2, 3), groups=2))[0]
    weight = layer.weight
    matrices = layer.by_position(weight)
    assert matrices.shape == (2 * 6, 3, 2)
    # Group 1, position (1, 0): the fourth of its six.
    assert torch.equal(matrices[6 + 3], weight[3:, :, 1, 0])
    linear = find_layers(nn.Linear(3, 5))[0]
    assert torch.equal(linear.by_position(linear.weight)[0], linear.weight)
