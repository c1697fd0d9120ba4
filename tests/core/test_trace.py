"""One forward pass, recorded; the model is left as it was."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import prunewise as pw
from prunewise.core.trace import as_call, record, tensors_of


def names(model: nn.Module, inputs: Any, **kwargs: Any) -> list[str]:
    return [op.name for op in record(model, inputs, **kwargs).ops]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu_(self.bn(self.a(x)))))


def test_records_operations_with_names_modules_and_lines() -> None:
    trace = record(Plain(), torch.zeros(2, 3, 6, 6))
    ops = {op.name: op for op in trace.ops if op.name != "detach"}
    assert ops["relu"].func._schema.name == "aten::relu_"
    assert ops["relu"].where.startswith(__file__)
    convolutions = [op for op in trace.ops if op.name == "convolution"]
    assert [op.module for op in convolutions] == ["a", "b"]
    assert trace.tensors[convolutions[0].args["weight"].id].name == "a.weight"
    assert trace.tensors[trace.outputs[0]].shape == (2, 4, 4, 4)


def test_train_mode_shows_dropout() -> None:
    assert "native_dropout" not in names(Plain(), torch.zeros(2, 3, 6, 6))
    assert {"native_dropout", "bernoulli"} & set(names(Plain(), torch.zeros(2, 3, 6, 6), training=True))


@pytest.mark.parametrize("training", [False, True])
def test_leaves_everything_as_it_was(training: bool) -> None:
    model = Plain().train()
    model.a.eval()
    x = torch.randn(2, 3, 6, 6)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    identities = {n: id(p) for n, p in model.named_parameters()}
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    record(model, x, training=training)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(isinstance(t, FakeTensor) for t in model.state_dict().values())
    assert not torch.nn.modules.module._global_forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_views_in_place_change_the_shape_from_there_on() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y.transpose_(0, 1)
            y.unsqueeze_(0)
            return y.mul_(2)

    trace = record(Model(), torch.zeros(2, 3))
    assert trace.tensors[trace.outputs[0]].shape == (1, 3, 2)
    multiplied = next(op for op in trace.ops if op.name == "mul")
    assert trace.tensors[multiplied.inputs[0]].shape == (1, 3, 2)


def test_attributes_set_in_forward_go_away_again() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.a(x)
            self.new = self.last * 2
            return self.new

    model = Model()
    record(model, torch.zeros(2, 3))
    assert model.last is None
    assert not hasattr(model, "new")


def test_hooks_of_the_user_run_and_do_not_leak() -> None:
    model = Plain()
    calls: list[str] = []
    model.a.register_forward_hook(lambda m, args, out: calls.append("hook") or out * 2)
    trace = record(model, torch.zeros(2, 3, 6, 6))
    assert calls == ["hook"]
    assert "mul" in [op.name for op in trace.ops]
    assert not isinstance(model(torch.zeros(2, 3, 6, 6)), FakeTensor)


@functools.lru_cache
def _table(n: int) -> Tensor:
    return torch.ones(n, 1)


class Caches(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a = kind, nn.Linear(3, 4)
        self.store: dict[Any, Any] = {"inner": {}}
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        if self.kind == "lru":
            return self.a(x) * _table(n)
        if self.kind == "dict" and n not in self.store:
            self.store[n] = torch.ones(n, 1)
        if self.kind == "nested" and n not in self.store["inner"]:
            self.store["inner"][n] = torch.ones(n, 1)
        if self.kind == "list" and not self.log:
            self.log.append(torch.ones(n, 1))
        table = {"dict": self.store.get(n), "nested": self.store["inner"].get(n), "list": (self.log or [None])[0]}
        return self.a(x) * table[self.kind]


@pytest.mark.parametrize("kind", ["dict", "list", "nested", "lru"])
def test_caches_made_in_forward_hold_no_fakes_afterwards(kind: str) -> None:
    _table.cache_clear()
    model = Caches(kind)
    x = torch.randn(2, 3)
    pw.measure(model, x)
    out = model(x)
    assert not isinstance(out, FakeTensor)
    assert torch.equal(out, model.a(x))


@pytest.mark.parametrize("legacy", [False, True])
def test_weight_norm(legacy: bool) -> None:
    norm = nn.utils.weight_norm if legacy else nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(3, 5)), nn.ReLU(), norm(nn.Linear(5, 2)))
    x = torch.randn(4, 3)
    want = model(x)
    trace = record(model, x)
    got = model(x)
    assert not isinstance(got, FakeTensor)
    assert torch.equal(want, got)
    state = {trace.tensors[i].name for i in trace.used_state()}
    assert {"0.weight_v" if legacy else "0.parametrizations.weight.original1"} <= state


def test_meta_model_is_traced_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10_000, 100_000), nn.ReLU(), nn.Linear(100_000, 10))
        x = torch.zeros(1, 10_000)
    cost = pw.measure(model, x)
    assert cost.macs == 10_000 * 100_000 + 100_000 * 10
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [(torch.zeros(2, 5), "(2, 5)"), ({"y": torch.zeros(2, 3)}, "y=(2, 3)"), ((1, 2), "int, int")],
)
def test_trace_error_names_model_shapes_and_cause(inputs: Any, shown: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(pw.TraceError) as caught:
        record(model, inputs)
    message = str(caught.value)
    assert "Sequential" in message
    assert shown in message
    assert "Give inputs that" in message
    assert type(caught.value.__cause__).__name__ in message
    assert not any(isinstance(p, FakeTensor) for p in model.parameters())
    model(torch.zeros(2, 3))


class Picks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a = kind, nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "mask":
            return x[x > 0]
        return x * x.sum().item()


@pytest.mark.parametrize(
    ("kind", "named", "remedy"),
    [
        ("mask", r"aten\.(index|nonzero)", r"torch\.where\(mask, x, 0\)"),
        ("item", r"aten\._local_scalar_dense", "Python number"),
    ],
)
def test_trace_error_names_the_operation_that_needs_values(kind: str, named: str, remedy: str) -> None:
    with pytest.raises(pw.TraceError, match=rf"Picks.*{named}.*test_trace\.py:\d+.*{remedy}") as caught:
        record(Picks(kind).to("meta"), torch.zeros(2, 3, device="meta"))
    assert "Give inputs that" not in str(caught.value)


def test_as_call() -> None:
    x = torch.zeros(1)
    assert as_call(x) == ((x,), {})
    assert as_call((x, 2)) == ((x, 2), {})
    assert as_call([x]) == ((x,), {})
    assert as_call({"a": x}) == ((), {"a": x})
    pair = torch.return_types.max((x, x))
    assert as_call(pair)[1] == {}


def test_tensors_of_any_output() -> None:
    class Thing:
        def __init__(self) -> None:
            self.t, self.me = torch.zeros(1), self

    out = {"a": (torch.zeros(2), None, 3), "b": [Thing(), "x"]}
    assert sorted(t.numel() for t in tensors_of(out)) == [1, 2]


def test_tied_parameters_are_one_tensor() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    trace = record(model, torch.zeros(1, 4))
    assert trace.state["0.weight"] == trace.state["1.weight"]
    assert trace.tensors[trace.state["1.weight"]].name == "0.weight"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_followed_in_single_precision_too(kind: type[nn.RNNBase]) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.recurrent, self.head = nn.Linear(6, 8), kind(8, 10, batch_first=True), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(self.embed(x))[0])

    model, x = Tagger().eval(), torch.randn(2, 5, 6)  # on CPUs, LSTM has a fused path for this
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.5)), x)
    assert small.recurrent.hidden_size < 10
    assert small.recurrent.input_size < 8


def test_a_module_that_converts_itself_to_what_it_is() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.score = self.score.to(x.dtype)
            return self.out(self.score(x).relu())

    model, x = Router(), torch.randn(2, 5)
    before = dict(model.named_parameters())
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.5)), x)
    assert small.score.weight.shape == (4, 5)
    assert all(before[name] is p for name, p in model.named_parameters())
    assert model.half().score.weight.dtype == torch.float16, "and converts as ever afterwards"


def test_what_train_mode_alone_does_with_parameters_is_told_where_it_cannot_be_followed() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.aux = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Conv2d(8, 4, 7)

        def forward(self, x: Tensor) -> Any:
            h = self.stem(x)
            out = self.head(h.mean((2, 3)))
            return (out, self.aux(h)) if self.training else out

    with pytest.warns(UserWarning, match=r"in train mode .*aux\.weight and 1 others.*inputs that both modes take"):
        pw.channel_groups(Auxiliary(), torch.zeros(1, 3, 8, 8))  # the auxiliary head takes no map of 6 x 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = pw.channel_groups(Auxiliary(), torch.zeros(1, 3, 9, 9))
    assert [g.prunable for g in groups if g.name == "stem"] == [True]
    assert "aux.weight" in {m.name for g in groups if g.name == "stem" for m in g.members}
