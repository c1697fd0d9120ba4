"""How much each layer matters: pure functions of a weight, of a covariance, of gradients. Higher = keep more.

None of these is the metric of "How Compact?" (arXiv 1901.02757), whose formulas are not public here; the choice of those that
`allocate` knows by name, and of its default, is in `layers.allocate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunewise.core.batch import Loss, differentiable, gradients, loss_of, mapped, run
from prunewise.core.errors import DataError, NonFiniteError
from prunewise.core.trace import tensors_of
from prunewise.core.untouched import untouched
from prunewise.layers.masks import top, with_weights
from prunewise.layers.statistics import batches
from prunewise.layers.weights import Layer

# -- of a covariance ----------------------------------------------------------------------------------------------


def effective_rank(covariance: Tensor) -> float:
    """Exp of the entropy of the normalised eigenvalues: how many directions are in use, in [1, C]; 0 for a zero matrix.

    Args:
        covariance: symmetric, positive semidefinite, shape (C, C), float64.

    Source: Roy and Vetterli 2007 (EUSIPCO), "The effective rank", there of singular values; here of the eigenvalues of the
    covariance, which are shares of the variance.

    Example:
        >>> round(effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))), 6)
        3.0
    """
    share = _spectrum(covariance)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def coding_rate(covariance: Tensor, *, distortion: float = 0.5) -> float:
    """½ log₂ det(I + C·Σ / (ε² tr Σ)): bits a vector takes at a distortion of ε of its scale, ≥ 0; 0 for a zero matrix.

    Args:
        covariance: as for `effective_rank`.
        distortion: ε, as a share of the root mean square of a channel.

    Source: Ma et al. 2007 (TPAMI 29(9)), equation 7; here Σ is divided by its mean eigenvalue, so that the rate does not
    depend on the scale of the activations.
    """
    share = _spectrum(covariance)
    return float(0.5 * torch.log2(1 + share * len(share) / distortion**2).sum())


def _spectrum(covariance: Tensor) -> Tensor:
    """Eigenvalues as shares of their sum, shape (C,), float64; all 0 where the sum is."""
    values = torch.linalg.eigvalsh(covariance.double().cpu()).clamp(min=0)
    # Rounding leaves tiny ones where the rank is not full.
    values = torch.where(values > values[-1] * len(values) * 1e-12, values, torch.zeros_like(values))
    total = values.sum()
    return values / total if total > 0 else values


def per_weight(directions_in: float, directions_out: float, layer: Layer) -> float:
    """Weights that `directions_in` + `directions_out` call for (and the kernel's positions), as a share of the layer's.

    With all directions in use it is the ratio of Erdős–Rényi-kernel: (in + out + Σ kernel) / weights. So a layer of
    which few directions are in use gets fewer weights than its shape alone would give it.
    """
    kernel = layer.shape[2:] if layer.positions > 1 else ()
    return (directions_in + directions_out + sum(kernel)) / layer.size


# -- of a weight --------------------------------------------------------------------------------------------------


def stable_rank(matrix: Tensor) -> float:
    """‖W‖²_F / ‖W‖²₂ of each matrix, summed over groups; in [1, min(rows, columns)] for one matrix, 0 for zeros.

    Args:
        matrix: shape (groups, rows, columns) or (rows, columns).

    Source: Rudelson and Vershynin 2007, arXiv math/0503442.
    """
    squares = _singular_squares(matrix)
    largest = squares.amax(-1)
    return float(torch.where(largest > 0, squares.sum(-1) / largest, torch.zeros_like(largest)).sum())


def freedom(rank: float, layer: Layer) -> float:
    """Degrees of freedom of matrices of this rank (summed over groups), r·(rows + columns − r), as a share of the weights."""
    each = rank / layer.groups
    return each * (layer.rows + layer.columns - each) * layer.groups / layer.size


def tail_exponent(matrix: Tensor) -> float:
    """Hill estimate of the power-law exponent of the weight spectrum, from the upper half of the eigenvalues of WᵀW.

    Lower = heavier tail = better trained, so more of it should be kept. 1 + k / Σ ln(λ_i / λ_k+1), over the k largest.

    Args:
        matrix: shape (matrices, rows, columns) or (rows, columns); the eigenvalues of all are taken together. Of a convolution
            it is one matrix a kernel position (`Layer.by_position`), as in the authors' code.

    Returns:
        The exponent, > 1; NaN where it is undefined (fewer than 4 eigenvalues above zero, or the upper half all alike).

    Source: Lu et al. 2024, arXiv 2410.10912 (AlphaPruning), equation 2, with k half of the eigenvalues: what the authors' code
    calls xmin_mid and takes for image classifiers (for language models it looks for the peak of the spectrum).
    """
    values = _singular_squares(matrix).flatten().sort(descending=True).values
    values = values[values > values[0] * 1e-14]
    k = len(values) // 2
    if k < 2:
        return math.nan
    spread = float((values[:k] / values[k]).log().sum())
    return 1 + k / spread if spread > 1e-9 * k else math.nan


def _singular_squares(matrix: Tensor) -> Tensor:
    """Squared singular values, shape (..., min(rows, columns)), float64, of a matrix scaled to a largest entry of 1."""
    matrix = matrix.detach().double().cpu()
    largest = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    matrix = matrix / largest if largest > 0 else matrix
    wide = matrix.shape[-1] > matrix.shape[-2]
    small = matrix @ matrix.mT if wide else matrix.mT @ matrix
    values: Tensor = torch.linalg.eigvalsh(small)
    return values.clamp(min=0)


def outlier_ratio(matrix: Tensor, squares: Tensor, *, factor: float = 5.0) -> float:
    """Share of weights whose score |w|·‖x‖ exceeds `factor` times the layer's mean score; in [0, 1].

    Args:
        matrix: shape (groups, rows, columns).
        squares: Σ x² of what each column is multiplied with, shape (groups, columns).
        factor: how large an outlier is.

    Source: Yin et al. 2024, arXiv 2310.05175 (OWL), equation 1, whose M is `factor`; there of a transformer block, here of a layer.
    """
    scores = matrix.detach().double().abs() * squares.to(matrix.device).sqrt().unsqueeze(1)
    return float((scores > factor * scores.mean()).double().mean())


# -- of the outputs ------------------------------------------------------------------------------------------------

# So many samples say how much each layer moves the outputs: one backward pass a sample, and layers differ by orders of magnitude.
PROBED = 32


def directions(layer: Layer) -> int:
    """Inputs + outputs + kernel lengths: how many directions a layer has to say something in; Erdős–Rényi-kernel's numerator."""
    return sum(layer.shape)


def sensitivity(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Iterable[Any] | None,
    *,
    samples: int = PROBED,
    what: str = "capacity",
    shown: bool = False,
) -> dict[str, float]:
    """Σ_w w²·E‖∂f/∂w‖²/‖f‖² by layer, ≥ 0: how far the outputs f move, at first order, when a layer's weights go one by one.

    The squared norm is estimated by a random sign for each output (Hutchinson), always the same for the same sample. Of several
    outputs each counts relative to its own norm. No targets are needed, and batch sizes do not matter.

    Args:
        model: run in eval mode, sample by sample; batches are split along their first dimension.
        layers: from `find_layers`.
        data: batches; no more than needed are drawn.
        samples: at most so many are looked at, the first ones.
        what: who asks for data, for the error messages.
        shown: show the progress on stderr.

    Raises:
        DataError: no data, an empty loader, a layer that the outputs never depend on, or outputs that depend on no weight.
        NonFiniteError: a gradient is NaN or infinite; names the layer.
    """
    watched = [layer.parameter for layer in layers]
    sums = [torch.zeros((), dtype=torch.float64, device=p.device) for p in watched]
    used, seen = [False] * len(layers), 0
    with differentiable(model, watched):
        for sample in _first(batches(model, data, f"importance {what!r}", shown), samples):
            probe = _probe(run(model, sample), seen)
            for i, (layer, gradient) in enumerate(zip(layers, gradients(probe, watched), strict=True)):
                if gradient is not None:
                    used[i] = True
                    sums[i] += _moved(gradient, layer)
            seen += 1
    _check_samples(seen, f"importance {what!r}")
    _check_used(layers, used, "outputs never depend on", f"importance {what!r}")
    result = {layer.name: total / seen for layer, total in zip(layers, sums, strict=True)}
    _check_gradients(result)
    return {name: float(value) for name, value in result.items()}


def _moved(gradient: Tensor, layer: Layer) -> Tensor:
    """Σ (w·∂/∂w)² of a layer, float64.

    In float64 only from the sum on: whole copies in it would take as long as the backward pass.
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    moved = gradient.detach().to(dtype) * layer.weight.to(dtype)
    norm: Tensor = torch.linalg.vector_norm(moved, dtype=torch.float64)
    return norm.square()


def _first(batches_: Iterable[Any], samples: int) -> Iterable[Any]:
    """The first samples, each a batch of one."""
    left = samples
    for batch in batches_:
        for sample in _split(batch):
            yield sample
            left -= 1
            if not left:
                return


def _probe(outputs: Any, number: int) -> Tensor:
    """One number: all outputs that can be differentiated, each scaled to length 1, with signs drawn for this sample."""
    rng = torch.Generator().manual_seed(number)
    total = None
    for value in tensors_of(outputs):
        if value.requires_grad and value.is_floating_point():
            sign = (torch.randint(2, value.shape, generator=rng, device="cpu") * 2 - 1).to(value)
            norm = value.detach().double().norm()
            scaled = (value * sign).double().sum() / torch.where(norm > 0, norm, torch.ones_like(norm))
            total = scaled if total is None else total + scaled
    if total is None:
        raise DataError(
            "no output of the model can be differentiated: take an importance that needs no gradients (lamp, erk, owl, ...)"
        )
    return total


# -- of the loss --------------------------------------------------------------------------------------------------


def mean_gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Iterable[Any] | None,
    *,
    loss: Loss | None = None,
    what: str = "importance 'taylor'",
    shown: bool = False,
) -> dict[str, Tensor]:
    """∂loss/∂w averaged over all samples, by layer, shape of the weight, float64; in eval mode.

    The loss of a batch should be the mean over its samples: batches count by their size, so that sizes do not matter.

    Raises:
        DataError: no data, an empty loader, or a layer that the loss never depends on.
        NonFiniteError: a gradient is NaN or infinite; names the layer.
    """
    watched = [layer.parameter for layer in layers]
    sums = [torch.zeros(layer.shape, dtype=torch.float64, device=layer.parameter.device) for layer in layers]
    used, samples, value = [False] * len(layers), 0, loss_of(loss)
    with differentiable(model, watched):
        for batch in batches(model, data, what, shown):
            size = _samples_in(batch)
            if not size:
                continue
            for i, gradient in enumerate(gradients(value(model, batch), watched)):
                if gradient is not None:
                    used[i] = True
                    sums[i] += gradient.detach().double() * size
            samples += size
    _check_samples(samples, what)
    _check_used(layers, used, "loss never depends on", what)
    result = {layer.name: total / samples for layer, total in zip(layers, sums, strict=True)}
    _check_gradients(result)
    return result


def fisher_mass(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Iterable[Any] | None,
    *,
    loss: Loss | None = None,
    shown: bool = False,
) -> dict[str, float]:
    """½ Σ_w w²·E[(∂loss/∂w)²] by layer, ≥ 0: what the loss gains at second order when a layer goes, by Fisher's curvature.

    One backward pass a sample: the square is of each sample's own gradient, so batch sizes do not matter. Batches are
    split along their first dimension.

    Source: Theis et al. 2018, arXiv 1801.05787, equation 6 (empirical Fisher); there of feature maps, here of the weights, summed
    over a layer.

    Raises:
        DataError: no data, an empty loader, or a layer that the loss never depends on.
        NonFiniteError: a gradient is NaN or infinite; names the layer.
    """
    watched = [layer.parameter for layer in layers]
    sums = [torch.zeros((), dtype=torch.float64, device=layer.parameter.device) for layer in layers]
    used, samples, value, what = [False] * len(layers), 0, loss_of(loss), "importance 'fisher'"
    with differentiable(model, watched):
        for batch in batches(model, data, what, shown):
            for sample in _split(batch):
                for i, gradient in enumerate(gradients(value(model, sample), watched)):
                    if gradient is not None:
                        used[i] = True
                        sums[i] += _moved(gradient, layers[i])
                samples += 1
    _check_samples(samples, what)
    _check_used(layers, used, "loss never depends on", what)
    result = {layer.name: total / (2 * samples) for layer, total in zip(layers, sums, strict=True)}
    _check_gradients(result)
    return {name: float(value) for name, value in result.items()}


def taylor_mass(gradient: Tensor, weight: Tensor) -> float:
    """Σ |w·∂loss/∂w|, ≥ 0: what the loss may change at first order when weights of a layer go.

    Source: Molchanov et al. 2019, arXiv 1906.10771, equation 8 without the square, of single weights.
    """
    return float((gradient.double() * weight.detach().double()).abs().sum())


def loss_increase(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Iterable[Any] | None,
    *,
    removed: float = 0.5,
    loss: Loss | None = None,
    shown: bool = False,
) -> dict[str, float]:
    """How much the mean loss rises when the smallest half (or another share) of one layer's weights goes alone; ≥ 0.

    A loss that falls counts as no rise. Each batch is run 1 + L times (L layers), in eval mode; the weights are put back
    bit for bit.

    Source: sensitivity analysis as in Han et al. 2015, arXiv 1506.02626; the form is ours.

    Raises:
        DataError: no data, or an empty loader.
        NonFiniteError: a loss is NaN or infinite.
    """
    kept = [layer.weight * top(layer.weight.abs(), layer.size - round(layer.size * removed)) for layer in layers]
    base, rises, samples = 0.0, [0.0] * len(layers), 0
    value, what = loss_of(loss), "importance 'loss_increase'"
    with torch.no_grad(), untouched(model):
        for batch in batches(model, data, what, shown):
            size = _samples_in(batch)
            if not size:
                continue
            samples += size
            base += size * float(value(model, batch))
            for i, layer in enumerate(layers):
                with with_weights([(layer, kept[i])]):
                    rises[i] += size * float(value(model, batch))
    _check_samples(samples, what)
    for layer, total in zip(layers, rises, strict=True):
        if not math.isfinite(total) or not math.isfinite(base):
            raise NonFiniteError(
                f"the loss is not finite with {layer.name!r} half removed, or before: look at the data"
            )
    return {layer.name: max(0.0, (total - base) / samples) for layer, total in zip(layers, rises, strict=True)}


def _check_gradients(found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"the gradient of {name!r} is not finite: look at the data, the loss and the weights")


def _check_samples(samples: int, what: str) -> None:
    if not samples:
        raise DataError(f"{what} needs data, and all batches are empty: give some with samples")


def _check_used(layers: Sequence[Layer], used: Sequence[bool], which: str, what: str) -> None:
    for layer, called in zip(layers, used, strict=True):
        if not called:
            raise DataError(
                f"the {which} {layer.name!r} on this data, so {what} has nothing to go by: give exclude={layer.name!r}"
            )


def _samples_in(batch: Any) -> int:
    """How many samples a batch has: the first dimension that most of its tensors have; of two as frequent the first, if not 1."""
    sizes: list[int] = []
    mapped(batch, lambda tensor: sizes.extend(tensor.shape[:1]))
    if not sizes:
        raise DataError("a batch holds no tensor with samples along its first dimension: give batches of tensors")
    return max(sizes, key=lambda size: (sizes.count(size), size != 1))


def _split(batch: Any) -> Iterable[Any]:
    """The samples of a batch, each a batch of one."""
    size = _samples_in(batch)

    def one(i: int, value: Tensor) -> Tensor:
        return value[i : i + 1] if value.dim() and len(value) == size else value

    for i in range(size):
        yield mapped(batch, partial(one, i))
