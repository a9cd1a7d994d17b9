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
    "Scaled",
    "Stacked",
    "Transposed",
    "checkpoint_names",
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


@dataclass(frozen=True, slots=True)
class Transposed:
    """The source's rows as columns; a read goes through the whole source."""

    source: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.source.shape
        return columns, rows

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        return self.source.read(0, self.source.shape[0])[:, start:stop].T.copy()


@dataclass(frozen=True, slots=True)
class Scaled:
    """The source times a number."""

    source: Matrix
    factor: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.source.shape

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        return self.source.read(start, stop) * np.float32(self.factor)


def checkpoint_names(matrix: Matrix) -> list[str]:
    """Names of the tensors that a matrix is made from."""
    if isinstance(matrix, CheckpointMatrix):
        return [matrix.name]
    if isinstance(matrix, Stacked):
        return [name for part in matrix.parts for name in checkpoint_names(part)]
    assert isinstance(matrix, MappedRows | MappedColumns | Transposed | Scaled)
    return checkpoint_names(matrix.source)


def head_map(
    heads: int,
    head_dim: int,
    padded: int,
    *,
    width: int | None = None,
    start: int = 0,
    stride: int | None = None,
) -> NDArray[np.int64]:
    """Where each row of zero-padded heads comes from, int64 [heads * padded]; -1 is a zero row.

    In the graph the whole head turns, entry i together with i + padded / 2. Where only the first
    ``width`` entries of the source turn, i with i + width / 2, those that do not are divided among
    the two halves behind those that do, and then each half is filled up with zeros.

    Args:
        heads: Number of heads.
        head_dim: Entries of a head in the source.
        padded: Entries of a head in the graph.
        width: Entries of the source that turn (default: all).
        start: The first head's first row in the source.
        stride: Rows from one head to the next in the source (default: no gap).
    """
    turning = (head_dim if width is None else width) // 2
    still = head_dim // 2 - turning
    one = np.full((2, padded // 2), -1, np.int64)
    one[:, :turning] = np.arange(2 * turning).reshape(2, turning)
    one[:, turning : turning + still] = np.arange(2 * turning, head_dim).reshape(2, still)
    steps = head_dim if stride is None else stride
    offsets = start + np.arange(heads, dtype=np.int64)[:, None] * steps
    return np.where(one.reshape(-1) < 0, -1, offsets + one.reshape(-1)).reshape(-1)
