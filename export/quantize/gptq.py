"""GPTQ: rounding a matrix so that what one column loses, the columns after it make up for.

GPTQ (arXiv 2210.17323) takes the columns one after the other and, with the inverse of the inputs'
second moments, changes those that are still floats. QuIP (arXiv 2307.13304, theorem 6) shows that
this is the same as rounding column k of ``W`` to ``W_k + (W - Q)[:, :k] U[:k, k]``, where
``H = U D U^T`` with a unit upper triangle ``U``: no inverse is needed, no weight is changed, and
what is lost in all, ``tr((W - Q) H (W - Q)^T)``, is column by column ``D_k`` times the square of
what rounding to that target loses. So a scale is searched for least such loss, when the columns in
front of its block are rounded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError

from ..graph.matrices import Matrix
from .descent import AT_ONCE, descend
from .packing import Blocks, block_count, blocks_of
from .rtn import dequantize_blocks
from .storage import QuantizedMatrix, Storage

__all__ = [
    "DEFAULT_DAMPING",
    "DEFAULT_ROUNDS",
    "Feedback",
    "GPTQMatrix",
    "added_damping",
    "factorize",
    "factorize_each",
    "row_losses",
    "search_scales",
]

DEFAULT_DAMPING = 0.01
DEFAULT_ROUNDS = 2

# Which shares of the scale that just reaches the largest weight are tried, by bits: what is cut
# off is worth it where few integers have to do.
_SHARES = {4: np.linspace(0.5, 1.1, 25, dtype=np.float32), 8: np.array([0.98, 1], np.float32)}


@dataclass(frozen=True, slots=True)
class Feedback:
    """What rounding must know of the inputs; columns are filled up to whole blocks.

    Attributes:
        order: In which order the columns are rounded, int64 [columns]. A block's stay together, so
            that the storage needs no order.
        upper: ``U`` in that order, float32 [columns, columns], 1 on its diagonal.
        loss: ``D`` in that order, float32 [columns].
        moments: ``H`` in that order, float32 [columns, columns].
        block: Weights that share a scale.
    """

    order: NDArray[np.int64]
    upper: NDArray[np.float32]
    loss: NDArray[np.float32]
    moments: NDArray[np.float32]
    block: int


def factorize(
    moments: NDArray[np.float64],
    *,
    block: int,
    damping: float = DEFAULT_DAMPING,
    act_order: bool = False,
) -> Feedback:
    """Factorize the inputs' second moments.

    Args:
        moments: ``X^T X`` of inputs ``X`` [samples, columns], float64 [columns, columns].
        block: Weights that share a scale.
        damping: What is added to the diagonal, as a share of its mean over columns with any input.
            A column without, as those that pad heads, is thereby rounded to nearest.
        act_order: Round the columns with the strongest inputs first: blocks by their sum, and a
            block's columns among themselves.

    Raises:
        ArgumentError: ``damping`` is outside its domain, or too small for these moments.
    """
    if not 0 < damping <= 1:
        raise ArgumentError("damping", "above 0 and at most 1", damping)
    columns = len(moments)
    width = block_count(columns, block) * block
    padded = np.zeros((width, width))
    padded[:columns, :columns] = moments
    energy = padded.diagonal().copy()
    padded.flat[:: width + 1] += added_damping(energy, damping)
    order = _strongest_first(energy, block) if act_order else np.arange(width)
    ordered = padded[np.ix_(order, order)]
    # The lower factor of the matrix turned by 180 degrees is the upper one, turned.
    try:
        turned = np.linalg.cholesky(ordered[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise ArgumentError(
            "damping",
            "large enough for the moments to be factorized",
            damping,
            "Pass a larger one.",
        ) from error
    root = turned.diagonal()[::-1]
    upper = np.divide(turned[::-1, ::-1], root)
    # What rounding does with them needs no more digits, and takes half as long.
    return Feedback(
        order,
        upper.astype(np.float32),
        np.square(root).astype(np.float32),
        ordered.astype(np.float32),
        block,
    )


def factorize_each(
    moments: NDArray[np.float64],
    blocks: Collection[int],
    *,
    damping: float = DEFAULT_DAMPING,
    act_order: bool = False,
) -> dict[int, Feedback]:
    """The factors for blocks of several lengths, see :func:`factorize`, by that length."""
    if act_order:
        return {
            block: factorize(moments, block=block, damping=damping, act_order=True)
            for block in blocks
        }
    # Columns that fill up blocks come last and have nothing to do with those before them.
    longest = factorize(moments, block=max(blocks), damping=damping)
    return {block: _shortened(longest, len(moments), block) for block in blocks}


def _shortened(longest: Feedback, columns: int, block: int) -> Feedback:
    part = slice(block_count(columns, block) * block)
    return replace(
        longest,
        order=longest.order[part],
        upper=longest.upper[part, part],
        loss=longest.loss[part],
        moments=longest.moments[part, part],
        block=block,
    )


def added_damping(energy: NDArray[np.float64], damping: float) -> float:
    """What is added to the diagonal of moments whose own is ``energy`` [columns]; see above."""
    live = energy > 0
    return damping * float(energy[live].mean()) if live.any() else 1.0


def _strongest_first(energy: NDArray[np.float64], block: int) -> NDArray[np.int64]:
    """Columns in falling order of energy inside blocks, which are in falling order of theirs."""
    blocks = energy.reshape(-1, block)
    inside = np.argsort(-blocks, axis=1, kind="stable")
    across = np.argsort(-blocks.sum(axis=1), kind="stable")
    return (inside + np.arange(len(blocks))[:, None] * block)[across].reshape(-1)


@dataclass(frozen=True, slots=True)
class GPTQMatrix:
    """A float matrix, rounded by GPTQ when its rows are read; a ``QuantizedMatrix``.

    Rows know nothing of one another, so any number of them may be read at a time.

    Attributes:
        source: The matrix.
        storage: Symmetric blocks.
        feedback: Of its inputs.
        rounds: Of coordinate descent behind GPTQ's one pass.
    """

    source: Matrix
    storage: Storage
    feedback: Feedback
    rounds: int = DEFAULT_ROUNDS
    order: None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.source.shape

    def blocks(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop)."""
        bits, block, feedback = self.storage.bits, self.feedback.block, self.feedback
        rows = blocks_of(self.source.read(start, stop), block)
        weights = np.ascontiguousarray(rows.reshape(len(rows), -1).T[feedback.order])
        half = 1 << (bits - 1)
        integers, scales = _round(weights, feedback, bits)
        integers, scales = descend(
            weights, integers, scales, feedback.moments, half=half, rounds=self.rounds
        )
        stored = np.empty(integers.shape, np.uint8)
        stored[feedback.order] = integers + half
        ordered = np.empty(scales.shape, np.float32)
        ordered[feedback.order[::block] // block] = scales
        return Blocks(
            np.ascontiguousarray(stored.T).reshape(rows.shape),
            np.ascontiguousarray(ordered.T),
            np.full(rows.shape[:2], half, np.uint8),
        )


def _round(
    weights: NDArray[np.float32], feedback: Feedback, bits: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Round weights [columns, rows], both in the order of rounding.

    Returns:
        Integers from ``-half`` on, float32 [columns, rows], and scales, float32 [blocks, rows].
    """
    half, block, upper = 1 << (bits - 1), feedback.block, feedback.upper
    columns, rows = weights.shape
    integers = np.empty_like(weights)
    scales = np.empty((columns // block, rows), np.float32)
    errors = np.empty_like(weights)
    for index, start in enumerate(range(0, columns, block)):
        stop = start + block
        made_up = upper[:start, start:stop].T @ errors[:start]
        # What the targets will be if this block's own columns lose nothing.
        ahead = weights[start:stop] + np.linalg.solve(upper[start:stop, start:stop].T, made_up)
        scale = search_scales(ahead, feedback.loss[start:stop], bits=bits)
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
        for first in range(start, stop, AT_ONCE):
            last = first + AT_ONCE
            for k in range(first, last):
                target = weights[k] + made_up[k - start] + upper[first:k, k] @ errors[first:k]
                integer = np.clip(np.rint(target * inverse), -half, half - 1)
                integers[k] = integer
                errors[k] = weights[k] - integer * scale
            made_up[last - start :] += upper[first:last, last:stop].T @ errors[first:last]
        scales[index] = scale
    return integers, scales


def row_losses(
    matrix: Matrix, moments: NDArray[np.float32], quantized: QuantizedMatrix
) -> NDArray[np.float32]:
    """What each row's product with the inputs loses: the mean square, float32 [rows].

    Args:
        matrix: The weights.
        moments: Mean of ``x x^T`` over the inputs ``x``, float32 [columns, columns].
        quantized: What they are rounded to.
    """
    rows, columns = matrix.shape
    losses = np.empty(rows, np.float32)
    step = max(1, (1 << 20) // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        blocks = quantized.blocks(start, stop)
        errors = matrix.read(start, stop) - dequantize_blocks(
            blocks.integers, blocks.scales, bits=quantized.storage.bits, columns=columns
        )
        losses[start:stop] = np.einsum("ij,ij->i", errors @ moments, errors)
    return losses


def search_scales(
    weights: NDArray[np.float32], loss: NDArray[np.float32], *, bits: int
) -> NDArray[np.float32]:
    """The scale of each row's block that loses least, of some shares of its largest weight's.

    Args:
        weights: float32 [block, rows].
        loss: What the square of a weight's error costs, float32 [block].
        bits: 4 or 8.

    Returns:
        float32 [rows]; 0 where all weights are so small that a scale's inverse overflows.
    """
    half = 1 << (bits - 1)
    highest, lowest = weights.max(axis=0), weights.min(axis=0)
    full = np.where(highest > -lowest, highest, lowest) / np.float32(-half)
    usable = np.abs(full) >= 4 * np.finfo(np.float32).tiny
    full = np.where(usable, full, np.float32(1))
    cost = loss / loss.sum()
    best, least = full, np.full(len(full), np.inf, np.float32)
    for share in _SHARES[bits]:
        scale = full * share
        integers = weights / scale
        np.rint(integers, out=integers)
        np.clip(integers, -half, half - 1, out=integers)
        # Of the scales with these integers, the one of least squares.
        weighted = cost[:, None] * integers
        squares = (weighted * integers).sum(axis=0)
        fitted = (weighted * weights).sum(axis=0)
        scale = np.divide(fitted, squares, out=scale, where=squares > 0)
        integers *= scale
        integers -= weights
        np.square(integers, out=integers)
        lost = cost @ integers
        better = lost < least
        best, least = np.where(better, scale, best), np.where(better, lost, least)
    best = np.where(usable & (np.abs(best) >= np.finfo(np.float32).tiny), best, np.float32(0))
    return best.astype(np.float32)
