"""Surgery: what is cut, what is kept, and the optimizer that goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import prunewise as pw
from prunewise.core.plan import ChannelPlan, fingerprint
from prunewise.core.sites import masked
from prunewise.core.surgery import Surgeon


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.bn(self.a(x)).relu())
        return self.fc(self.c(x).relu().mean((2, 3))) * self.temperature


X = torch.zeros(2, 3, 6, 6, dtype=torch.float64)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def plan_of(model: nn.Module, keep: dict[str, tuple[int, ...]], sizes: dict[str, int]) -> ChannelPlan:
    return ChannelPlan(keep, sizes, fingerprint(model))


@pytest.fixture
def plan(net: Net) -> ChannelPlan:
    return plan_of(net, {"a": (1, 2, 5), "c": (0, 3, 4, 5)}, {"a": 8, "c": 6})


def test_keeps_the_classes_and_sets_their_widths(net: Net, plan: ChannelPlan) -> None:
    small = pw.apply_plan(net, plan, X)
    assert type(small) is Net
    assert (small.a.in_channels, small.a.out_channels, small.bn.num_features) == (3, 3, 3)
    assert (small.b.in_channels, small.b.out_channels, small.b.groups) == (3, 3, 3)
    assert (small.c.in_channels, small.c.out_channels, small.fc.in_features) == (3, 4, 4)
    assert torch.equal(small.a.weight, net.a.weight[[1, 2, 5]])
    assert torch.equal(small.bn.running_var, net.bn.running_var[[1, 2, 5]])
    assert torch.equal(small.fc.weight, net.fc.weight[:, [0, 3, 4, 5]])


def test_the_input_is_not_changed(net: Net, plan: ChannelPlan) -> None:
    net.train()
    before, ids = copy.deepcopy(net.state_dict()), [id(p) for p in net.parameters()]
    small = pw.apply_plan(net, plan, X)
    assert [id(p) for p in net.parameters()] == ids
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert small.training
    assert all(m.training for m in net.modules())
    nn.init.zeros_(small.a.weight)
    assert net.a.weight.abs().sum() > 0


def test_applied_twice_gives_the_same(net: Net, plan: ChannelPlan) -> None:
    first, second = pw.apply_plan(net, plan, X), pw.apply_plan(net, plan, X)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_requires_grad_and_modes_go_along(net: Net, plan: ChannelPlan) -> None:
    net.a.weight.requires_grad_(False)
    net.bn.eval()
    net(torch.randn_like(X)).sum().backward()
    small = pw.apply_plan(net, plan, X)
    assert not small.a.weight.requires_grad
    assert small.c.weight.requires_grad
    assert not small.bn.training
    assert net.c.weight.grad is not None


def test_memory_format_goes_along(net: Net, plan: ChannelPlan) -> None:
    small = pw.apply_plan(net.to(memory_format=torch.channels_last), plan, X)
    assert small.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert small.a.weight.shape == (3, 3, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(net: Net, plan: ChannelPlan, dtype: torch.dtype) -> None:
    small = pw.apply_plan(net.to(dtype), plan, X.to(dtype))
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.emb(ids)
            return self.head(x + self.down(self.up(x).relu()))

    model = Tied().double()
    ids = torch.randint(0, 11, (2, 5))
    sizes = {g.name: g.size for g in pw.channel_groups(model, ids) if g.prunable}
    assert sorted(sizes.values()) == [6, 9]
    small = pw.apply_plan(model, plan_of(model, dict.fromkeys(sizes, (0, 2)), sizes), ids)
    assert small.head.weight is small.emb.weight
    assert small.emb.weight.shape == (11, 2)
    assert small.emb.embedding_dim == 2


def test_meta_model() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.zeros(2, 3, 6, 6)
    small = pw.apply_plan(model, plan_of(model, {"a": (1, 2)}, {"a": 8}), x)
    assert small.a.weight.shape == (2, 3, 3, 3)
    assert small.a.weight.is_meta


def test_gated_models_are_refused(net: Net, plan: ChannelPlan) -> None:
    session = pw.attach_gates(net, X, budget=pw.Budget(macs=0.8), total_steps=3)
    for call in (
        lambda: pw.apply_plan(net, plan, X),
        lambda: pw.plan_channels(net, X, budget=pw.Budget(macs=0.8)),
    ):
        with pytest.raises(pw.AlreadyGatedError, match=r"finish\(\) or"):
            call()
    session.detach()
    pw.apply_plan(net, plan, X)


def test_a_parameter_shared_with_another_model_is_refused(net: Net, plan: ChannelPlan) -> None:
    outside = nn.Linear(6, 4)
    outside.weight = net.fc.weight
    with pytest.raises(pw.SharedParameterError, match=r"fc\.weight"):
        pw.apply_plan(net, plan, X)
    both = nn.ModuleList([net, outside])
    assert len(both) == 2
    outside.weight = nn.Parameter(torch.zeros(4, 6))
    pw.apply_plan(net, plan, X)


# -- the reader's side of a gate ----------------------------------------------------------------------------------


def test_masking_is_undone_also_after_an_error(net: Net, plan: ChannelPlan) -> None:
    grouping = Surgeon.of(net, X).grouping
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="inside"), masked(net, grouping, plan.keep):
        assert (net.c.weight[:, [0, 3, 4, 6, 7]] == 0).all()
        assert (net.a.weight == before["a.weight"]).all()
        raise RuntimeError("inside")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# -- widths in the user's own modules -----------------------------------------------------------------------------


def test_integer_attributes_are_found_and_set() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.head_dim, self.width = 4, 3, 12
            self.scale = self.head_dim**-0.5
            self.qkv, self.out = nn.Linear(5, 36), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
            attention = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
            return self.out((attention @ v).transpose(1, 2).reshape(n, t, self.width))

    model = Heads().double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    (group,) = [g for g in pw.channel_groups(model, x) if g.prunable and g.size == 4]
    small = pw.apply_plan(model, plan_of(model, {group.name: (0, 3)}, {group.name: 4}), x)
    assert type(small) is Heads
    assert (small.heads, small.head_dim, small.width, small.scale) == (2, 3, 6, model.scale)
    assert (model.heads, model.width) == (4, 12)


def test_a_factor_that_is_a_width_too_is_not_touched() -> None:
    class Factor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu().reshape(-1, self.width)) / self.width

    model = Factor().double()
    x = torch.randn(2, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="graph module"):
        small = pw.apply_plan(model, plan_of(model, {"a": (0, 3)}, {"a": 8}), x)
    surgeon = Surgeon.of(model, x)
    with masked(model, surgeon.grouping, {"a": (0, 3)}), torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_number_computed_from_a_width_is_noticed_without_any_data() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h / h.shape[1] ** 0.5)

    with torch.device("meta"):
        model, x = Scaled(), torch.zeros(2, 5)
    with pytest.warns(UserWarning, match="graph module"):
        pw.apply_plan(model, plan_of(model, {"a": (0, 3)}, {"a": 8}), x)


# -- optimizers ---------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_step_is_that_of_the_masked_model(net: Net, plan: ChannelPlan, kind: str) -> None:
    """After migration, a step on the small model is the step of the big masked one, restricted to what stays."""
    optimizer = OPTIMIZERS[kind](list(net.parameters()))
    x, y = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    net.eval()
    for _ in range(3):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    small = pw.apply_plan(net, plan, X)
    surgeon = Surgeon.of(net, X)
    big = copy.deepcopy(net)
    big_optimizer = OPTIMIZERS[kind](list(big.parameters()))
    big_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pw.migrate_optimizer(optimizer, net, small, plan, X)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    assert set(map(id, optimizer.state)) <= {id(p) for p in small.parameters()}
    optimizer.zero_grad()
    big_optimizer.zero_grad()
    (small(x) - y).square().mean().backward()
    with masked(big, surgeon.grouping, plan.keep):
        (big(x) - y).square().mean().backward()
    optimizer.step()
    big_optimizer.step()
    want = surgeon.cut(big, plan.keep).state_dict()
    for key, value in small.state_dict().items():
        torch.testing.assert_close(value, want[key], rtol=1e-9, atol=1e-11, msg=key)


def test_gradients_go_along(net: Net, plan: ChannelPlan) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randn_like(X)).sum().backward()
    net.temperature.grad = None
    small = pw.apply_plan(net, plan, X)
    assert all(p.grad is None for p in small.parameters())
    pw.migrate_optimizer(optimizer, net, small, plan, X)
    assert torch.equal(small.c.weight.grad, net.c.weight.grad[[0, 3, 4, 5]][:, [1, 2, 5]])
    assert torch.equal(small.fc.bias.grad, net.fc.bias.grad)
    assert small.fc.bias.grad is not net.fc.bias.grad
    assert small.temperature.grad is None


def test_migration_keeps_groups_settings_and_strangers(net: Net, plan: ChannelPlan) -> None:
    stranger = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD(
        [{"params": [net.a.weight, net.c.weight], "lr": 0.5}, {"params": [net.temperature, stranger]}], lr=0.1
    )
    small = pw.apply_plan(net, plan, X)
    pw.migrate_optimizer(optimizer, net, small, plan, X)
    first, second = optimizer.param_groups
    assert first["lr"] == 0.5
    assert first["params"][0] is small.a.weight
    assert first["params"][1] is small.c.weight
    assert second["params"][0] is small.temperature
    assert second["params"][1] is stranger


def test_migration_with_the_wrong_plan_is_refused(net: Net, plan: ChannelPlan) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    small = pw.apply_plan(net, plan, X)
    other = plan_of(net, {"a": (1, 2)}, {"a": 8})
    with pytest.raises(pw.PlanError, match="does not come from this model"):
        pw.migrate_optimizer(optimizer, net, small, other, X)
    assert any(p is net.a.weight for p in optimizer.param_groups[0]["params"])


def test_an_attribute_that_is_a_width_here_and_another_one_there() -> None:
    class Product(nn.Module):
        """As in GPT-2: the number of outputs is an attribute, and of one value for widths that stay and that go."""

        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.n_out = n_out
            self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.randn(n_out))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.n_out)

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Product(6, 8), Product(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    model, x = Mlp(), torch.randn(2, 3, 6)
    small = pw.apply_plan(model, pw.plan_channels(model, x, budget=pw.Budget(macs=0.5)), x)
    assert type(small) is Mlp
    assert (small.up.n_out, small.down.n_out) == (4, 8)


def test_an_integer_that_means_the_stream_here_and_the_heads_there() -> None:
    """As GPT-2's: one class of layers for all, and the width of the heads only in a `split` before attention."""

    class Product(nn.Module):
        def __init__(self, n: int, nf: int) -> None:
            super().__init__()
            self.nf = nf
            self.weight, self.bias = nn.Parameter(torch.randn(n, nf) / 4), nn.Parameter(torch.randn(nf))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split_size, self.head_size = 16, 4
            self.qkv, self.out = Product(16, 48), Product(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            parts = [
                p.view(*p.shape[:-1], -1, self.head_size).transpose(1, 2)
                for p in self.qkv(x).split(self.split_size, dim=2)
            ]
            mask = torch.where(torch.ones(x.shape[1], x.shape[1]).tril().bool(), 0.0, -1e9).to(x.dtype)
            y = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
            return self.out(y.transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = Product(5, 16), nn.Linear(16, 3)
            self.layers = nn.ModuleList([Attention() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x)

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(2, 6, 5).double()
    surgeon = Surgeon.of(model, x)
    heads = [name for name, size in surgeon.costs.widths.items() if size == 4]
    stream = next(name for name, size in surgeon.costs.widths.items() if size == 16)
    keep = {stream: tuple(range(12)), heads[0]: (0, 1, 3), heads[1]: (0, 1, 2, 3), heads[2]: (2, 3)}
    small = surgeon.sliced(model, keep)
    assert [layer.split_size for layer in small.layers] == [12, 16, 8]
    assert [layer.out.nf for layer in small.layers] == [12, 12, 12]
