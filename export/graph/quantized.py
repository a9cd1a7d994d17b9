"""Which integers a graph's matrix consists of: the checkpoint's own, or floats to be rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import UnsupportedModelError

from ..checkpoint.packed import packed_tensor
from ..quantize.packing import Blocks
from ..quantize.storage import QuantizedMatrix, RoundedMatrix, Storage
from .matrices import CheckpointMatrix, MappedColumns, MappedRows, Matrix, Stacked

__all__ = ["quantized_parts"]


def quantized_parts(matrix: Matrix, storage: Storage) -> list[QuantizedMatrix]:
    """The matrix as quantized ones below one another, as few as can be.

    Args:
        matrix: Where its rows come from.
        storage: How to store what the checkpoint holds as floats. Its integers stay as they are.

    Raises:
        UnsupportedModelError: Integers would have to be mixed with floats, or in another order.
    """
    parts = matrix.parts if isinstance(matrix, Stacked) else [matrix]
    both = [(part, _packed(part)) for part in parts]
    found: list[QuantizedMatrix] = []
    for kind, run in groupby(both, lambda pair: _kind(pair[1])):
        floats, integers = zip(*run, strict=True)
        if kind is None:
            source = floats[0] if len(floats) == 1 else Stacked(floats)
            found.append(RoundedMatrix(source, storage))
        else:
            found.append(integers[0] if len(integers) == 1 else _StackedBlocks(integers))
    return found


def _packed(matrix: Matrix) -> QuantizedMatrix | None:
    """The matrix in the checkpoint's own integers; None where it has floats."""
    if isinstance(matrix, CheckpointMatrix):
        return packed_tensor(matrix.weights, matrix.name)
    if isinstance(matrix, Stacked):
        packed = [_packed(part) for part in matrix.parts]
        if len({_kind(part) for part in packed}) > 1:
            raise UnsupportedModelError(
                "A matrix is quantized in part only, or its parts in different orders.",
                "Export with fp32, or from the unquantized checkpoint that it was made from.",
            )
        return _StackedBlocks([part for part in packed if part is not None]) if packed[0] else None
    if isinstance(matrix, MappedRows) and (source := _packed(matrix.source)):
        return _MappedRowBlocks(source, matrix.index)
    if isinstance(matrix, MappedColumns) and (source := _packed(matrix.source)):
        return _Reordered(source, _positions(matrix.index))
    return None


def _kind(matrix: QuantizedMatrix | None) -> object:
    """What matrices must have in common to be stored as one."""
    if matrix is None:
        return None
    order = None if matrix.order is None else matrix.order.tobytes()
    return matrix.storage.bits, matrix.storage.block, order


def _positions(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in ``index`` each of 0, 1, 2 and so on stands."""
    order = np.argsort(index, kind="stable")
    return order[np.count_nonzero(index < 0) :]


@dataclass(frozen=True, slots=True)
class _StackedBlocks:
    """Matrices of one width, one order and one storage below one another."""

    parts: Sequence[QuantizedMatrix]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def storage(self) -> Storage:
        first = self.parts[0].storage
        symmetric = all(part.storage.symmetric for part in self.parts)
        return Storage(first.bits, first.block, symmetric)

    @property
    def order(self) -> NDArray[np.int64] | None:
        return self.parts[0].order

    def blocks(self, start: int, stop: int) -> Blocks:
        pieces, offset = [], 0
        for part in self.parts:
            rows = part.shape[0]
            low, high = max(start - offset, 0), min(stop - offset, rows)
            if low < high:
                pieces.append(part.blocks(low, high))
            offset += rows
        return Blocks(
            np.concatenate([piece.integers for piece in pieces]),
            np.concatenate([piece.scales for piece in pieces]),
            np.concatenate([piece.zero_points for piece in pieces]),
        )


@dataclass(frozen=True, slots=True)
class _MappedRowBlocks:
    """Row r is row ``index[r]`` of the source, or zeros where the index is -1."""

    source: QuantizedMatrix
    index: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.index), self.source.shape[1]

    @property
    def storage(self) -> Storage:
        return self.source.storage

    @property
    def order(self) -> NDArray[np.int64] | None:
        return self.source.order

    def blocks(self, start: int, stop: int) -> Blocks:
        index = self.index[start:stop]
        real = index >= 0
        low, high = (int(index[real].min()), int(index[real].max()) + 1) if real.any() else (0, 1)
        rows = self.source.blocks(low, high)
        taken = np.where(real, index - low, 0)
        scales = rows.scales[taken]
        scales[~real] = 0  # whatever the integers are, they stand for zeros
        return Blocks(rows.integers[taken], scales, rows.zero_points[taken])


@dataclass(frozen=True, slots=True)
class _Reordered:
    """A matrix whose input is gathered from a wider one, at ``positions``."""

    source: QuantizedMatrix
    positions: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return self.source.shape

    @property
    def storage(self) -> Storage:
        return self.source.storage

    @property
    def order(self) -> NDArray[np.int64]:
        return self.positions if self.source.order is None else self.positions[self.source.order]

    def blocks(self, start: int, stop: int) -> Blocks:
        return self.source.blocks(start, stop)
