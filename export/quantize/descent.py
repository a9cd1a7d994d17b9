"""Coordinate descent on rounded matrices: what GPTQ decides in one pass is looked at again.

GPTQ rounds each column knowing what the columns before it lost, not what those after it will lose.
With all of them known, the scales of a row that lose least are a small least-squares problem, and
then so is each integer given all the others. No step makes ``tr((W - Q) H (W - Q)^T)`` larger.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["descend"]

Floats = NDArray[np.float32]

AT_ONCE = 16
"""Columns whose effect on those behind them is one product; divides every block."""


def descend(
    weights: Floats, integers: Floats, scales: Floats, moments: Floats, *, half: int, rounds: int
) -> tuple[Floats, Floats]:
    """Refit the scales, then each integer in turn, some times over.

    Args:
        weights: What was rounded, [columns, rows].
        integers: From ``-half`` to ``half - 1``, [columns, rows].
        scales: [blocks, rows].
        moments: ``H``, positive definite, [columns, columns].
        half: 8 or 128.
        rounds: How many times.

    Returns:
        Integers and scales that lose less, or as much.
    """
    block = len(weights) // len(scales)
    for _ in range(rounds):
        scales = _fit_scales(weights, integers, moments, block)
        integers = _fit_integers(weights, integers, scales, moments, half)
    return integers, scales


def _fit_scales(weights: Floats, integers: Floats, moments: Floats, block: int) -> Floats:
    """Solve each row's normal equations, ``N^T H N s = N^T H w`` with a column of N per block."""
    columns, rows = weights.shape
    blocks = columns // block
    cut = integers.reshape(blocks, block, rows)
    normal = np.empty((rows, blocks, blocks))
    for j in range(blocks):
        stop = (j + 1) * block
        part = slice(stop - block, stop)
        pulls = (moments[:stop, part] @ integers[part]).reshape(j + 1, block, rows)
        normal[:, : j + 1, j] = np.einsum("bkr,bkr->rb", cut[: j + 1], pulls)
        normal[:, j, : j + 1] = normal[:, : j + 1, j]
    # A block of zeros has no scale: it gets 0 from equations that say nothing.
    floor = np.finfo(np.float64).tiny + 1e-12 * np.einsum("rbb->r", normal)
    normal += floor[:, None, None] * np.eye(blocks)
    aims = np.einsum("bkr,bkr->rb", cut, (moments @ weights).reshape(cut.shape))[..., None]
    return np.linalg.solve(normal, aims)[..., 0].T.astype(np.float32)


def _fit_integers(
    weights: Floats, integers: Floats, scales: Floats, moments: Floats, half: int
) -> Floats:
    """Round each weight again to what is best beside all the others as they are by then."""
    block = len(weights) // len(scales)
    integers = integers.copy()
    errors = weights - integers * scales.repeat(block, axis=0)
    strength = moments.diagonal()
    for index, scale in enumerate(scales):
        start, stop = index * block, (index + 1) * block
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
        slope = moments[start:stop] @ errors
        for first in range(start, stop, AT_ONCE):
            last = first + AT_ONCE
            near = moments[first:last, first:last]
            changes = np.empty((AT_ONCE, len(scale)), np.float32)
            for k, column in enumerate(range(first, last)):
                pull = slope[column - start] - near[k, :k] @ changes[:k]
                best = integers[column] + pull / strength[column] * inverse
                np.clip(np.rint(best), -half, half - 1, out=best)
                changes[k] = (best - integers[column]) * scale
                integers[column] = best
            errors[first:last] -= changes
            slope[last - start :] -= moments[last:stop, first:last] @ changes
    return integers
