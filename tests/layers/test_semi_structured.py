"""2:4 weights in torch's semi-structured form; the conversion itself needs an accelerator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.layers import semi_structured
from prunewise.layers.semi_structured import is_two_of_four


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def two_of_four(found: nn.Module) -> nn.Module:
    plan = pw.allocate(found, 0.5, "uniform", include=["0", "2"])
    return pw.make_permanent_(pw.sparsify_(found, plan, "2:4"))


def test_the_pattern_is_seen() -> None:
    found = two_of_four(model())
    assert [is_two_of_four(found[i].weight) for i in (0, 2, 4)] == [True, True, False]
    assert not is_two_of_four(torch.zeros(3, 6))
    assert not is_two_of_four(torch.zeros(0, 4))
    assert not is_two_of_four(torch.zeros(4, 4, 1, 1))
    assert is_two_of_four(torch.tensor([[1.0, 1, 0, 0, 0, 1, 1, 0]]))
    assert not is_two_of_four(torch.tensor([[0.0, 1, 1, 1, 0, 1, 0, 0]]))  # two of eight on the average


def test_without_sparse_cores_nothing_changes() -> None:
    found = two_of_four(model())
    before = {k: v.clone() for k, v in found.state_dict().items()}
    with pytest.raises(pw.MethodError, match="'0' is on cpu, which has no sparse tensor cores"):
        pw.to_semi_structured_(found)
    assert all(torch.equal(v, before[k]) for k, v in found.state_dict().items())


def test_what_is_not_sparse_or_still_masked_is_refused() -> None:
    with pytest.raises(pw.MethodError, match="no linear layer is 2:4 sparse"):
        pw.to_semi_structured_(model())
    found = model()
    pw.sparsify_(found, pw.allocate(found, 0.5, "uniform", include=["0"]), "2:4")
    with pytest.raises(pw.MethodError, match="a mask is in force on '0'"):
        pw.to_semi_structured_(found)


def test_what_torch_refuses_stays_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = two_of_four(model())
    before = found[0].weight

    def convert(weight: Tensor) -> Tensor:
        if torch.equal(weight, before):
            raise RuntimeError("this shape is not supported!\nmore")
        return weight.to_sparse_csr()

    monkeypatch.setattr(semi_structured, "_has_sparse_cores", lambda device: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    with pytest.warns(UserWarning, match="1 of 2 layers .* '0' because: this shape is not supported!$"):
        assert pw.to_semi_structured_(found) == ["2"]
    assert found[0].weight is before
    assert found[2].weight.layout == torch.sparse_csr
    assert not found[2].weight.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs sparse tensor cores")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_outputs_on_sparse_cores(dtype: torch.dtype) -> None:
    found = two_of_four(model()).eval().to("cuda", dtype)
    x = torch.randn(64, 64, device="cuda", dtype=dtype)
    with torch.inference_mode():
        want = found(x)
        assert pw.to_semi_structured_(found) == ["0", "2"]
        torch.testing.assert_close(found(x), want, rtol=2e-2, atol=2e-2)
