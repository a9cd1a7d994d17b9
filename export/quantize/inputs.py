"""What a matrix must know of its inputs to be quantized, and to take back what others changed.

Behind quantized matrices a matrix ``W`` multiplies inputs ``X`` that are not the ``F`` that it has
in the float32 model, and adds to a stream ``S`` that is not the ``T`` there. The matrix that gives
``W F^T + T^T`` most nearly is ``W + (W (F - X)^T X + (T - S)^T X) (X^T X)^-1``; a share of that
correction is made before rounding (GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629, of the
inputs alone; LoaQ, arXiv 2509.06297, of the stream too). Not all of it: what calibration text says
of the correction is not quite true of other text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..graph.matrices import Matrix
from .gptq import added_damping
from .session import PartSession, batches

__all__ = ["Corrected", "Correction", "InputSums", "solve_correction", "sum_inputs"]


@dataclass(frozen=True, slots=True)
class InputSums:
    """Sums over all tokens; ``X`` and ``F`` are an input behind quantized matrices and without.

    Attributes:
        tokens: How many there are.
        moments: ``X^T X``, float64 [columns, columns].
        drift: ``(F - X)^T X``, float64 [columns, columns]; None where ``F`` is not known.
        lags: ``(T - S)^T X`` for streams ``S`` and ``T`` of a name, float64 [hidden, columns].
    """

    tokens: int
    moments: NDArray[np.float64]
    drift: NDArray[np.float64] | None
    lags: dict[str, NDArray[np.float64]]


def sum_inputs(
    plain: PartSession | None,
    quantized: PartSession,
    exact: NDArray[np.float32] | None,
    stream: NDArray[np.float32],
    *,
    source: str,
    streams: Collection[str],
) -> InputSums:
    """Run a part side by side without quantized matrices and with those that there are already.

    Args:
        plain: The part in float32; None: it is not run.
        quantized: The part up to this input as it will be.
        exact: What the float32 model's part reads, float32 [windows, tokens, hidden], if it is run.
        stream: What the quantized model's part reads, likewise.
        source: The input's name.
        streams: Names of what products with this input are added to.
    """
    names = [source] if plain is None else [source, *sorted(streams)]
    sums: dict[str, NDArray[np.float64]] = {}
    moments, tokens = np.zeros(()), stream.shape[0] * stream.shape[1]
    for rows, changed in zip(
        batches(stream if exact is None else exact), batches(stream), strict=True
    ):
        found = quantized.step(changed, names)
        inputs = _flat(found[source])
        moments = moments + (inputs.T @ inputs).astype(np.float64)
        if plain is None:
            continue
        true = plain.step(rows, names)
        for name in names:
            product = (_flat(true[name] - found[name]).T @ inputs).astype(np.float64)
            sums[name] = sums[name] + product if name in sums else product
    return InputSums(tokens, moments, sums.pop(source, None), sums)


def _flat(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values.reshape(-1, values.shape[-1])


@dataclass(frozen=True, slots=True)
class Correction:
    """What matrices of one input take back.

    Attributes:
        turn: What their rows are multiplied by and added to themselves, float32 [columns, columns].
        shifts: What is added to the rows of those whose product is added to a stream, by its name,
            float32 [hidden, columns].
    """

    turn: NDArray[np.float32]
    shifts: dict[str, NDArray[np.float32]]

    def apply(self, matrix: Matrix, added: str) -> Matrix:
        """The matrix, corrected.

        Args:
            matrix: As the checkpoint has it.
            added: Name of the stream that its product is added to; empty: none.
        """
        return Corrected(matrix, self.turn, self.shifts[added] if added else None)


def solve_correction(sums: InputSums, *, damping: float, share: float) -> Correction | None:
    """The correction of matrices that have these inputs; None where nothing is known to correct.

    Args:
        sums: Of the inputs.
        damping: As :func:`factorize` takes it.
        share: How much of the correction is made, 0 to 1.
    """
    if sums.drift is None:
        return None
    damped = sums.moments.copy()
    damped.flat[:: len(damped) + 1] += added_damping(damped.diagonal(), damping)
    parts = [sums.drift, *sums.lags.values()]
    # The moments are symmetric: what they divide from the right, they divide transposed from left.
    solved = np.linalg.solve(damped, share * np.concatenate(parts).T).T.astype(np.float32)
    turn, *shifts = np.split(solved, np.cumsum([len(part) for part in parts[:-1]]))
    return Correction(turn, dict(zip(sums.lags, shifts, strict=True)))


@dataclass(frozen=True, slots=True)
class Corrected:
    """``W + W T``, or ``W + W T + R``, for a matrix ``W``."""

    source: Matrix
    turn: NDArray[np.float32]
    shift: NDArray[np.float32] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.source.shape

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        rows = self.source.read(start, stop)
        rows += rows @ self.turn
        if self.shift is not None:
            rows += self.shift[start:stop]
        return rows
