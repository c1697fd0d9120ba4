"""Where scores split into labels that the model accepts and labels that it contradicts: a group and its mirror image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunewise.samples.scores import Floats

FEWEST = 30  # scores; a distribution cannot be told from fewer
_BINS, _STEPS, _NARROWEST, _LIMIT = 300, 300, 0.05, 0.9999
_MOST = 0.45  # share of the image above which the two sides are too alike to be told apart
_WORSE = 0.02  # log-likelihood a score by which one bell may be better; between what hard and what noisy data gave


@dataclass(frozen=True)
class Split:
    """How scores split.

    Attributes:
        cut: scores above it are more likely of the contradicted group; 1 where there is no such group.
        count: how many scores belong to the contradicted group, in expectation.
        centre: the score at which the mirror stands; 0, or below it.
        separable: False where a group and its image do not explain the scores: the image is nearly as large, or a single
            normal distribution explains them clearly better.
    """

    cut: float
    count: float
    centre: float
    separable: bool = True


def mirrored_split(score: Floats, *, memorised: bool) -> Split:
    """The most likely split of scores in [-1, 1], lower = the label is accepted.

    A model that generalises treats a sample alike, whatever label the sample came with. So a wrong label is contradicted as
    firmly as a right one would be confirmed: the scores of wrong labels are the mirror image of the scores of right ones, about 0.
    What is learned by heart later lowers the scores of wrong labels, which puts the mirror below 0. In x = artanh(score),
    which gives both groups bell shapes:

        density(x) = (1 − π) g(x) + π g(2c − x),   g: two normal distributions, for easy and for hard samples

    fitted by expectation-maximisation to a histogram, so that the time does not depend on the number of scores. The group g is
    the same on both sides: a tail of hard samples is no second group. Both normal distributions lie at least one standard
    deviation below c (even of the hard samples, the model accepts five in six); π is at most a half.

    Args:
        score: at least `FEWEST` of them, finite.
        memorised: the mirror c may stand below 0; otherwise it stands at 0.
    """
    x = np.arctanh(np.clip(score, -_LIMIT, _LIMIT))
    count, edges = np.histogram(x, bins=_BINS)
    held = count > 0
    weight, middle, upper = count[held].astype(np.float64), ((edges[1:] + edges[:-1]) / 2)[held], edges[1:][held]
    starts = {0.0, min(0.0, two_groups(x))} if memorised else {0.0}
    fits = [
        _fit(middle, weight, centre, share, memorised)
        for centre in sorted(starts)
        if (middle < centre).any()
        for share in (0.05, 0.3)
    ]
    if not fits:  # no label is accepted: there is nothing to compare with
        contradicted = float((score > 0).sum())
        return Split(0.0, contradicted, 0.0, separable=not contradicted)
    likelihood, centre, wrong, share = max(fits, key=lambda fit: fit[0])
    separable = share < _MOST and likelihood > _one_bell(middle, weight) - _WORSE * float(weight.sum())
    # scores from the top down, as long as they bring more of the contradicted group than of the other
    gain = np.cumsum(((2 * wrong - 1) * weight)[::-1])
    best = int(gain.argmax())
    if gain[best] <= 0:
        return Split(1.0, float(wrong @ weight), float(np.tanh(centre)), separable)
    # just below the lowest bin that belongs to the group
    lowest = len(middle) - 1 - best
    cut = upper[lowest - 1] if lowest else edges[0] - 1
    return Split(float(np.tanh(cut)), float(wrong @ weight), float(np.tanh(centre)), separable)


def _one_bell(x: Floats, weight: Floats) -> float:
    """Log-likelihood of the most likely single normal distribution, up to the constant that `_log_normal` leaves out."""
    mean = np.average(x, weights=weight)
    spread = max(float(np.sqrt(np.average((x - mean) ** 2, weights=weight))), _NARROWEST)
    return float(_log_normal(x, np.array([mean]), np.array([spread]))[0] @ weight)


def _fit(x: Floats, weight: Floats, centre: float, share: float, free: bool) -> tuple[float, float, Floats, float]:
    """Log-likelihood, centre, the probability of each x to be of the mirrored group, and the share of that group."""
    below = x < centre
    mean = float(np.average(x[below], weights=weight[below]))
    spread = max(float(np.sqrt(np.average((x[below] - mean) ** 2, weights=weight[below]))), _NARROWEST)
    mu = mean + spread * np.array([-0.3, 0.8])
    sigma, part = np.full(2, spread), np.array([0.7, 0.3])
    total, before = weight.sum(), -np.inf
    wrong = np.zeros_like(x)
    for _ in range(_STEPS):
        mirrored = 2 * centre - x
        sides = [
            np.log(max(p, 1e-12) * part)[:, None] + _log_normal(values, mu, sigma)
            for p, values in ((1 - share, x), (share, mirrored))
        ]
        joint = np.concatenate(sides)
        top = joint.max(0)
        density = top + np.log(np.exp(joint - top).sum(0))
        likelihood = float(density @ weight)
        posterior = np.exp(joint - density)
        wrong = posterior[2:].sum(0)
        if likelihood - before < 1e-3:
            break
        before = likelihood
        own, image = posterior[:2] * weight, posterior[2:] * weight
        share = min(float(image.sum() / total), 0.5)
        size = own.sum(1) + image.sum(1) + 1e-9
        part = size / size.sum()
        precision = 1 / sigma[:, None] ** 2
        if free and (mass := float((image * precision).sum())) > 1e-9:
            centre = min(0.0, float((image * precision * (x + mu[:, None])).sum()) / mass / 2)
            mirrored = 2 * centre - x
        mu = np.minimum((own @ x + image @ mirrored) / size, centre - sigma)
        squares = (own * (x - mu[:, None]) ** 2).sum(1) + (image * (mirrored - mu[:, None]) ** 2).sum(1)
        sigma = np.maximum(np.sqrt(squares / size), _NARROWEST)
    return likelihood, centre, wrong, share


def _log_normal(x: Floats, mu: Floats, sigma: Floats) -> Floats:
    """Up to a constant; a row a component."""
    return np.asarray(-np.log(sigma)[:, None] - 0.5 * ((x - mu[:, None]) / sigma[:, None]) ** 2)


def two_groups(values: Floats) -> float:
    """The cut between two groups of values that leaves the least variance within them (Otsu 1979)."""
    ordered = np.sort(values)
    n = len(ordered)
    if n < 2 or ordered[0] == ordered[-1]:
        return float(ordered[-1]) if n else 0.0
    below = np.arange(1, n)
    sums = np.cumsum(ordered)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * gap**2
    between[ordered[1:] == ordered[:-1]] = -1  # no cut between equals
    best = int(between.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)
