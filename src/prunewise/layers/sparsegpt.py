"""SparseGPT on one weight: columns one after another, errors made up for by the columns still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from prunewise.layers.masks import top


def reconstruct(matrix: Tensor, hessian: Tensor, keep: int, *, block: int, damping: float) -> tuple[Tensor, Tensor]:
    """Prune `matrix` to `keep` weights, least change of its output first, and update those that stay.

    Args:
        matrix: shape (groups, rows, columns), float64.
        hessian: Σ x xᵀ of what each group multiplies, shape (groups, columns, columns), float64; its scale does not matter.
        keep: how many weights stay, over all groups.
        block: so many columns choose their mask together.
        damping: added to the Hessian's diagonal, as a share of its mean.

    Returns:
        keep_mask (bool) and the updated weights (0 where removed), both of the matrix's shape.

    Source: Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1.
    """
    groups, rows, columns = matrix.shape
    given, matrix = matrix, matrix.clone()
    keep_mask = torch.zeros(matrix.shape, dtype=torch.bool, device=matrix.device)
    size, done, used = matrix.numel(), 0, 0
    for g in range(groups):
        weights, factor, dead = matrix[g], *_inverse_factor(hessian[g].to(matrix.device), damping)
        weights[:, dead] = 0
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            done += rows * (stop - start)
            share = (keep * done + size // 2) // size - used  # so that the shares of all blocks sum to `keep`
            used += share
            diagonal = factor.diagonal()[start:stop]
            mask = top((weights[:, start:stop] / diagonal).square(), share)
            keep_mask[g, :, start:stop] = mask
            errors = torch.zeros(rows, stop - start, dtype=matrix.dtype, device=matrix.device)
            for i in range(stop - start):
                column = weights[:, start + i].clone()
                error = torch.where(mask[:, i], torch.zeros_like(column), column) / diagonal[i]
                weights[:, start + i : stop] -= torch.outer(error, factor[start + i, start + i : stop])
                errors[:, i] = error
            weights[:, stop:] -= errors @ factor[start:stop, stop:]
        weights[:, dead] = given[g][:, dead]
    return keep_mask, torch.where(keep_mask, matrix, torch.zeros_like(matrix))


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor U of the damped inverse (H⁻¹ = Uᵀ U), and which inputs were always zero."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    scale = diagonal.mean()
    hessian /= torch.where(scale > 0, scale, torch.ones_like(scale))
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True), dead
