"""Where the rows of a graph's matrix come from: checkpoint tensors, stacked or padded, lazily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import CheckpointError

from ..checkpoint.weights import Weights

__all__ = [
    "CheckpointMatrix",
    "MappedColumns",
    "MappedRows",
    "Matrix",
    "Stacked",
    "head_map",
    "read_finite",
]


class Matrix(Protocol):
    """A float32 matrix [rows, columns] that is read a few rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        ...

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointMatrix:
    """A tensor as it stands in the checkpoint."""

    weights: Weights
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.weights.shape(self.name)
        return rows, columns

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        return read_finite(self.weights, self.name, start, stop)


def read_finite(
    weights: Weights, name: str, start: int | None = None, stop: int | None = None
) -> NDArray[np.float32]:
    """Rows [start, stop) of a tensor, none of them infinite or not a number.

    Raises:
        CheckpointError: One is; it would spread to every answer, or be rounded to nonsense.
    """
    rows = weights.read(name, start, stop)
    if not np.isfinite(rows).all():
        raise CheckpointError(
            f"Tensor {name!r} holds weights that are infinite or not a number.",
            "The training went wrong, or a conversion to float16 overflowed: use the checkpoint "
            "in its original precision.",
        )
    return rows


@dataclass(frozen=True, slots=True)
class Stacked:
    """Matrices of one width below one another."""

    parts: Sequence[Matrix]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        pieces, offset = [], 0
        for part in self.parts:
            rows = part.shape[0]
            low, high = max(start - offset, 0), min(stop - offset, rows)
            if low < high:
                pieces.append(part.read(low, high))
            offset += rows
        if not pieces:
            return np.zeros((0, self.shape[1]), np.float32)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True, slots=True)
class MappedRows:
    """Row r is row ``index[r]`` of the source, or zeros where the index is -1."""

    source: Matrix
    index: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.index), self.source.shape[1]

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        index = self.index[start:stop]
        out = np.zeros((len(index), self.source.shape[1]), np.float32)
        real = index >= 0
        if real.any():
            low, high = int(index[real].min()), int(index[real].max()) + 1
            out[real] = self.source.read(low, high)[index[real] - low]
        return out


@dataclass(frozen=True, slots=True)
class MappedColumns:
    """Column c is column ``index[c]`` of the source, or zeros where the index is -1."""

    source: Matrix
    index: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.source.shape[0], len(self.index)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        rows = self.source.read(start, stop)
        out = np.zeros((len(rows), len(self.index)), np.float32)
        real = self.index >= 0
        out[:, real] = rows[:, self.index[real]]
        return out


def head_map(heads: int, head_dim: int, padded: int) -> NDArray[np.int64]:
    """Where each row of zero-padded heads comes from, int64 [heads * padded]; -1 is a zero row.

    Each half of a head is padded at its own end, so that the pairs which rotary embedding turns
    together (i and i + size / 2) stay pairs.
    """
    half, padded_half = head_dim // 2, padded // 2
    one = np.full(padded, -1, np.int64)
    one[:half] = np.arange(half)
    one[padded_half : padded_half + half] = np.arange(half, head_dim)
    offsets = np.arange(heads, dtype=np.int64)[:, None] * head_dim
    return np.where(one < 0, -1, offsets + one).reshape(-1)
