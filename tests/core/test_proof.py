"""The comparison that stands at the end of every cut: strict, and no false alarm where numbers are rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunewise.core.errors import VerificationError
from prunewise.core.proof import check_equal, compare, outputs
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon

KEEP = {"a": tuple(range(0, 256, 3))}


class Net(nn.Module):
    """With a large `offset`, all digits but the last few cancel; with `dtype`, it runs in that one only."""

    def __init__(self, offset: float = 0.0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 256), nn.Linear(256, 8)
        self.offset, self.dtype = offset, dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.dtype is None else x.to(self.dtype)
        x = self.b((self.a(x) + self.offset).relu())
        return x - x.mean(0)


def cut(model: nn.Module, x: Tensor) -> tuple[Surgeon, nn.Module]:
    surgeon = Surgeon.of(model, x)
    return surgeon, surgeon.cut(model, KEEP)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (Net(offset=1e4), torch.float32),
        (Net(), torch.bfloat16),
        (Net(dtype=torch.bfloat16), torch.bfloat16),
        (Net(dtype=torch.float32), torch.float32),
    ],
    ids=["digits cancel", "half precision", "half precision in the code", "single precision in the code"],
)
def test_rounding_is_no_alarm(model: nn.Module, dtype: torch.dtype) -> None:
    model, x = model.to(dtype), torch.randn(512, 64, dtype=dtype)
    surgeon, small = cut(model, x)
    check_equal(model, small, surgeon.grouping, KEEP, x)


def test_rounding_is_told_by_float64() -> None:
    model, x = Net(offset=1e4), torch.randn(512, 64)
    surgeon, small = cut(model, x)
    with masked(model, surgeon.grouping, KEEP):
        want = outputs(model, x, False)
    with pytest.raises(VerificationError):
        compare(want, outputs(small, x, False), "the small model")
    assert check_equal(model, small, surgeon.grouping, KEEP, x) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_small_mistake_is_found(dtype: torch.dtype) -> None:
    """Less than what rounding may come to in float32 and in half precision."""
    model, x = Net().to(dtype), torch.randn(16, 64, dtype=dtype)
    surgeon, small = cut(model, x)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        small.b.weight *= 1.03 if dtype == torch.bfloat16 else 1.0005
    with pytest.raises(VerificationError, match=r"eval mode\) differs"):
        check_equal(model, small, surgeon.grouping, KEEP, x)
    assert all(p.dtype == dtype and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_kernel_that_takes_no_such_width_is_named_with_the_remedy() -> None:
    class Picky(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("strides should be a multiple of 16 bytes")

    model, x = Net(), torch.randn(4, 64)
    with pytest.raises(VerificationError, match="multiple of 16 bytes.*round_to="):
        check_equal(model, Picky(), Surgeon.of(model, x).grouping, KEEP, x)
