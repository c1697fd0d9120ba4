"""The zoo itself: every model builds, runs, trains and is deterministic."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.zoo import ZOO, build, call, flat_tensors

NAMES = sorted(ZOO)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads, the more so where several test workers share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outputs(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    torch.manual_seed(123)  # dropout and noise inside the forward
    found = flat_tensors(call(model, inputs))
    assert found
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_and_backward_in_float64(name: str, mode: str) -> None:
    model, inputs = build(name)
    model.train(mode == "train")
    floating = [t for t in outputs(model, inputs) if t.is_floating_point()]
    assert floating
    for t in floating:
        assert t.dtype == torch.float64
        assert torch.isfinite(t).all()
    sum(t.flatten() @ torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype) for t in floating).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_trainable_parameters_all_get_a_gradient_in_train_mode(name: str) -> None:
    if "unused" in ZOO[name].tags:
        pytest.skip("the model holds parameters that its forward does not use")
    model, inputs = build(name)
    sum(t.pow(2).sum() for t in outputs(model.train(), inputs) if t.is_floating_point()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_deterministic_after_reseeding(name: str, mode: str) -> None:
    first, second = (build(name, seed=7) for _ in range(2))
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    a = outputs(first[0].train(mode == "train"), first[1])
    b = outputs(second[0].train(mode == "train"), second[1])
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_the_same_model(name: str) -> None:
    wide, narrow = build(name), build(name, dtype=torch.float32)
    for a, b in zip(wide[0].state_dict().values(), narrow[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a.to(b.dtype), b)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_left_to_hide_behind(name: str) -> None:
    model, _ = build(name)
    for module in model.modules():
        norm = isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))
        if norm and module.weight is not None and module.weight.numel() > 1:
            assert module.weight.std() > 0.01
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.bias is not None:
            assert (module.bias != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_fast(name: str) -> None:
    model, inputs = build(name)
    model.eval()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            call(model, inputs)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0
