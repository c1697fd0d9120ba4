"""SparseGPT with an inverse of its own for every column: slow, and nothing shared with the one in use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def sparsegpt(weight: Array, inputs: Array, keeps: list[int], block: int, damping: float) -> tuple[Array, Array]:
    """`weight` (rows, columns) pruned on `inputs` (samples, columns); `keeps`: how many weights stay in each block of columns."""
    weight = weight.copy()
    rows, columns = weight.shape
    hessian = inputs.T @ inputs
    hessian += damping * hessian.diagonal().mean() * np.eye(columns)
    keep_mask = np.zeros(weight.shape, dtype=bool)
    for number, start in enumerate(range(0, columns, block)):
        stop = min(start + block, columns)
        saliency = np.zeros((rows, stop - start))
        for j in range(start, stop):  # of the weights as they are when the block begins
            saliency[:, j - start] = weight[:, j] ** 2 / np.linalg.inv(hessian[j:, j:])[0, 0]
        ranked = np.argsort(-saliency, axis=None, kind="stable")[: keeps[number]]
        chosen = np.zeros(saliency.size, dtype=bool)
        chosen[ranked] = True
        keep_mask[:, start:stop] = chosen.reshape(saliency.shape)
        for j in range(start, stop):
            inverse = np.linalg.inv(hessian[j:, j:])
            for row in range(rows):
                if not keep_mask[row, j]:
                    weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
    return keep_mask, np.where(keep_mask, weight, 0.0)
