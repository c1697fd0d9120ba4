"""Statistics of what goes through each layer, in one pass: sums in float64, the same for any batch size and order.

Memory is O(C²) a layer at the worst, whatever the number of samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from prunewise._progress import progress
from prunewise.core.batch import run
from prunewise.core.errors import DataError, NonFiniteError
from prunewise.core.untouched import untouched
from prunewise.layers.attention import WatchOutputProjections, projected_inputs, projected_outputs
from prunewise.layers.patches import channels_of, patches_of, squares_of
from prunewise.layers.weights import PROJECTIONS, TRANSPOSED, Layer, counted, is_masked

INPUT, OUTPUT, SQUARES, HESSIAN = "input", "output", "squares", "hessian"

# A covariance takes so many positions of a sample: neighbouring ones say nearly the same, and time grows with all.
POSITIONS = 16
# More channels than this are folded into so many before their covariance is summed up (`folded`).
WIDEST = 2048


def folded(rows: Tensor) -> Tensor:
    """Rows of more than `WIDEST` channels as rows of `WIDEST`: each channel is added, with a sign, to one of them at random.

    Inner products stay the same in expectation, so the spectrum of the covariance does nearly while its rank is well below
    `WIDEST`. Always the same for the same number of channels.

    Source: the count sketch, Charikar, Chen and Farach-Colton 2002.
    """
    channels = rows.shape[1]
    if channels <= WIDEST:
        return rows
    rng = torch.Generator().manual_seed(channels)
    into = torch.randint(WIDEST, (channels,), generator=rng, device="cpu").to(rows.device)
    sign = (torch.randint(2, (channels,), generator=rng, device="cpu") * 2 - 1).to(rows.device, rows.dtype)
    return rows.new_zeros(len(rows), WIDEST).index_add_(1, into, rows * sign)


@dataclass
class Moments:
    """Count, sum and sum of outer products of vectors (`folded` where they are long), float64."""

    count: int = 0
    total: Tensor | None = None  # (C,)
    outer: Tensor | None = None  # (C, C)

    def add(self, rows: Tensor) -> None:
        """Take in `rows`, shape (rows, C)."""
        rows = folded(rows.to(torch.float64))
        self.count += len(rows)
        total, outer = rows.sum(0), rows.T @ rows
        self.total = total if self.total is None else self.total.add_(total)
        self.outer = outer if self.outer is None else self.outer.add_(outer)

    def covariance(self) -> Tensor:
        """Covariance, shape (C, C), float64, divided by the count. Channels that do not vary are 0, without rounding noise."""
        assert self.total is not None and self.outer is not None
        mean = self.total / self.count
        covariance = self.outer / self.count - torch.outer(mean, mean)
        varies = (covariance.diagonal() > 1e-12 * self.outer.diagonal() / self.count).to(covariance.dtype)
        return covariance * torch.outer(varies, varies)


@dataclass
class LayerStatistics:
    """What was gathered of one layer; what was not asked for stays empty.

    Attributes:
        input, output: moments of the channels that go in and come out.
        squares: Σ x² over all that each column of the weight's matrices is multiplied with, shape (groups, columns).
        hessian: Σ x xᵀ of the same, shape (groups, columns, columns).
        rows: how many rows the sums are over (of queries, in attention).
    """

    input: Moments = field(default_factory=Moments)
    output: Moments = field(default_factory=Moments)
    squares: Tensor | None = None
    hessian: Tensor | None = None
    rows: int = 0
    calls: int = 0

    def add(
        self, layer: Layer, inputs: Sequence[Tensor], outputs: Callable[[], Tensor], wanted: Collection[str]
    ) -> None:
        """Take in one call of the layer: its input, or one for each group where they are not channels of one tensor."""
        if not all(x.numel() for x in inputs):  # an expert to which no token was sent
            return
        self.calls += 1
        distinct = {id(x): x for x in inputs}
        shape = outputs().shape if isinstance(layer.module, TRANSPOSED) else ()

        def of_each(sums: Callable[[Tensor], tuple[Tensor, int]]) -> tuple[Tensor, int]:
            found = {key: sums(x) for key, x in distinct.items()}
            return torch.cat([found[id(x)][0] for x in inputs]), found[id(inputs[0])][1]

        def products(x: Tensor) -> tuple[Tensor, int]:
            rows = patches_of(layer, x, shape).to(torch.float64)
            return rows.transpose(1, 2) @ rows, rows.shape[1]

        if INPUT in wanted:
            for x in distinct.values():
                self.input.add(channels_of(layer.module, x, POSITIONS))
        if OUTPUT in wanted:
            self.output.add(channels_of(layer.module, outputs(), POSITIONS))
        rows = 0
        if SQUARES in wanted:
            squares, rows = of_each(lambda x: squares_of(layer, x, shape))
            self.squares = squares if self.squares is None else self.squares.add_(squares)
        if HESSIAN in wanted:
            hessian, rows = of_each(products)
            self.hessian = hessian if self.hessian is None else self.hessian.add_(hessian)
        self.rows += rows

    def finite(self) -> bool:
        """True where no sum is NaN or infinite."""
        sums = (self.input.outer, self.output.outer, self.squares, self.hessian)
        return all(bool(torch.isfinite(s).all()) for s in sums if s is not None)


def gather(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Iterable[Any] | None,
    wanted: Collection[str],
    *,
    what: str,
    shown: bool = False,
) -> dict[str, LayerStatistics]:
    """Run `model` over `data` in eval mode, once, and sum up what goes through `layers`.

    Args:
        model: left as it was: hooks, modes, buffers, gradients.
        layers: from `find_layers`; calls of tied modules are summed together.
        data: batches; see `core.batch.inputs_of` for which part of them the model takes. Samples come first in every tensor.
        wanted: of "input", "output", "squares", "hessian".
        what: who asks for data, for the error messages.
        shown: show the progress on stderr.

    Returns:
        Statistics by layer, sums on the device of the activations.

    Raises:
        DataError: no data, an empty loader, or a layer that the model never calls.
        NonFiniteError: activations are NaN or infinite; names the first layer.
    """
    found = {layer.name: LayerStatistics() for layer in layers}
    with torch.no_grad(), untouched(model), _unfused(), _eager(), ExitStack() as hooks:
        watched: dict[nn.Module, Callable[[Tensor, Tensor], None]] = {}
        output_projections = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        for layer in layers:
            for owner in layer.owners:
                module = owner.module
                if owner.tensor not in counted(module):  # an embedding, say
                    continue
                own = layer.at(owner)
                take = partial(found[layer.name].add, own, wanted=wanted)
                if module in output_projections:
                    watched[module] = _taking(take)
                elif owner.tensor in PROJECTIONS:
                    handle = module.register_forward_pre_hook(_before_attention(own, take), with_kwargs=True)
                    hooks.callback(handle.remove)
                elif is_masked(module, owner.tensor) or not output_projections & {o.module for o in layer.owners}:
                    handle = module.register_forward_hook(_after(take), with_kwargs=True)
                    hooks.callback(handle.remove)
                # A linear layer that is tied to an output projection is seen where that is.
        if watched:
            hooks.enter_context(WatchOutputProjections(watched))
        for batch in batches(model, data, what, shown):
            run(model, batch)
    for layer in layers:
        statistics = found[layer.name]
        if not statistics.calls:
            raise DataError(
                f"the model never called {layer.name!r} on this data, so {what} has nothing to go by: give exclude={layer.name!r}"
            )
        if not statistics.finite():
            raise NonFiniteError(
                f"the activations of {layer.name!r} are not finite (NaN or infinite): look at the data and the weights before it"
            )
    return found


_Take = Callable[[Sequence[Tensor], Callable[[], Tensor]], None]


def _taking(take: _Take) -> Callable[[Tensor, Tensor], None]:
    return lambda inputs, output: take([inputs.detach()], output.detach)


def _after(take: _Take) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        _taking(take)(args[0] if args else kwargs["input" if "input" in kwargs else next(iter(kwargs))], output)

    return hook


def _before_attention(layer: Layer, take: _Take) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = projected_inputs(layer, args, kwargs)
        if inputs is not None:
            take(inputs, lambda: projected_outputs(layer, inputs))

    return hook


def batches(model: nn.Module, data: Iterable[Any] | None, what: str, shown: bool = False) -> Iterator[Any]:
    """The batches of `data`, with progress.

    Raises:
        DataError: there is no data, or no batch in it; or the model is on the meta device.
    """
    if data is None:
        others = "erk, lamp, ..." if what.startswith("importance") else "magnitude, random, ..."
        raise DataError(
            f"{what} needs data: give data=, a loader of a few hundred samples, or take one that needs none ({others})"
        )
    if isinstance(data, (Dataset, Tensor)) or not isinstance(data, Iterable):
        raise DataError(
            f"{what} needs batches, and data is a {type(data).__name__}: give a DataLoader, or a list of batches"
        )
    if any(p.is_meta for p in model.parameters()):
        raise DataError(f"{what} runs the model, which is on the meta device: load its weights first")
    total = None
    with suppress(TypeError):  # loaders of streams have a length that raises
        total = len(data) if isinstance(data, Sized) else None
    done = 0
    with progress(shown, total, what) as display:
        for batch in data:
            yield batch
            done += 1
            display.step(done)
    if not done:
        raise DataError(f"{what} needs data, and the loader is empty: give one with batches")


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled parts run uncompiled: hooks would be traced, and each of their counts compiled anew."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _unfused() -> Iterator[None]:
    """Transformer layers of torch call their modules one by one, so that hooks see them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
