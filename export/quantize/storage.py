"""How a matrix is stored, and the tensors that its storage consists of."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from ..graph.matrices import Matrix
from .packing import Blocks, block_count, pack
from .rtn import quantize_channels, quantize_rows

__all__ = [
    "CHANNELS",
    "FLOAT32",
    "QuantizedMatrix",
    "RoundedMatrix",
    "RowRange",
    "Storage",
    "channel_tensors",
    "float_rows",
    "quantized_tensors",
    "transposed",
]

# Wide enough for GPTQ's products of matrices; rounding to nearest is as fast with a quarter.
CHUNK_WEIGHTS = 1 << 20

# A thread rounds some 150 million weights a second, 300 MB of bfloat16: four keep up with a disk,
# and cannot swamp a container whose quota of the processor the affinity mask does not show.
MOST_THREADS = 4

# The limit is the whole process's: of two that overlap, the later one would keep what it found.
_ONE_BLAS_THREAD = threading.Lock()


@dataclass(frozen=True, slots=True)
class Storage:
    """float32 (``bits`` 32), or 4- or 8-bit integers that share float32 scales.

    Those of a ``block`` share one; where it is None those of a row do. Blocks that are not
    ``symmetric`` have a zero point each.
    """

    bits: int
    block: int | None
    symmetric: bool = True

    def __str__(self) -> str:
        if self.block is None:
            return f"fp{self.bits}"
        return f"int{self.bits}-block{self.block}"

    def blob_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Shape of the packed bytes [rows, blocks, bytes of a block]."""
        assert self.block is not None
        return rows, block_count(columns, self.block), self.block * self.bits // 8

    def zero_points_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the packed zero points [rows, bytes of a row's]."""
        _, blocks, _ = self.blob_shape(rows, columns)
        return rows, -(-blocks * self.bits // 8)


FLOAT32 = Storage(32, None)
CHANNELS = Storage(8, None)


class QuantizedMatrix(Protocol):
    """A matrix as blocks of integers, which are read a few rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, as stored."""
        ...

    @property
    def storage(self) -> Storage:
        """What the integers are; ``block`` is not None."""
        ...

    @property
    def order(self) -> NDArray[np.int64] | None:
        """Which element of the input each column multiplies, [columns]; None: each its own."""
        ...

    def blocks(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop)."""
        ...


@dataclass(frozen=True, slots=True)
class RoundedMatrix:
    """A float matrix, rounded to nearest."""

    source: Matrix
    storage: Storage
    order: None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.source.shape

    def blocks(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop)."""
        bits, block = self.storage.bits, self.storage.block
        assert block is not None
        integers, scales = quantize_rows(self.source.read(start, stop), bits=bits, block=block)
        return Blocks(integers, scales, np.full(scales.shape, 1 << (bits - 1), np.uint8))


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, stop) of a quantized matrix."""

    source: QuantizedMatrix
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.stop - self.start, self.source.shape[1]

    @property
    def storage(self) -> Storage:
        """The source's."""
        return self.source.storage

    @property
    def order(self) -> NDArray[np.int64] | None:
        """The source's."""
        return self.source.order

    def blocks(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop) of these."""
        return self.source.blocks(self.start + start, self.start + stop)


def quantized_tensors(matrix: QuantizedMatrix) -> list[list[NDArray[Any]]]:
    """Read and pack a matrix a few rows at a time, several chunks at once.

    Returns:
        The packed bytes, uint8 [rows, blocks, bytes], the scales, float32 [rows, blocks], and,
        unless the storage is symmetric, the packed zero points, uint8 [rows, bytes]; each as the
        one element of a list, the form in which deferred weights are written.
    """
    storage, (rows, columns) = matrix.storage, matrix.shape
    packed = np.empty(storage.blob_shape(rows, columns), np.uint8)
    scales = np.empty(packed.shape[:2], np.float32)
    zero_points = np.empty(storage.zero_points_shape(rows, columns), np.uint8)

    def store(start: int, stop: int) -> None:
        blocks = matrix.blocks(start, stop)
        packed[start:stop] = pack(blocks.integers, storage.bits)
        scales[start:stop] = blocks.scales
        if not storage.symmetric:
            zero_points[start:stop] = _pack_rows(blocks.zero_points, storage.bits)

    _by_rows(matrix.shape, store)
    return [[packed], [scales], *([] if storage.symmetric else [[zero_points]])]


def channel_tensors(matrix: Matrix, *, transposed: bool) -> list[list[NDArray[Any]]]:
    """Round a matrix with a scale per row, a few rows at a time, several chunks at once.

    Args:
        matrix: float32 [rows, columns].
        transposed: Give the integers as [columns, rows].

    Returns:
        Integers, int8 [rows, columns], and scales, float32 [rows], in the form of
        :func:`quantized_tensors`.
    """
    rows, columns = matrix.shape
    integers = np.empty((columns, rows) if transposed else (rows, columns), np.int8)
    by_row = integers.T if transposed else integers
    scales = np.empty(rows, np.float32)

    def store(start: int, stop: int) -> None:
        by_row[start:stop], scales[start:stop] = quantize_channels(matrix.read(start, stop))

    _by_rows(matrix.shape, store)
    return [[integers], [scales]]


def _by_rows(shape: tuple[int, int], store: Callable[[int, int], None]) -> None:
    """Call ``store`` with a start and a stop for all rows, on several threads."""
    rows, columns = shape
    threads = _threads()
    # As many chunks for each thread, so that none waits for the last.
    chunks = -(-rows * columns // (CHUNK_WEIGHTS * threads)) * threads
    step = max(1, -(-rows // max(1, chunks)))
    # numpy releases the interpreter lock inside its loops, so threads do run side by side. A BLAS
    # with threads of its own lets in one at a time, and calibrating takes half as long again.
    limit = _blas().limit(limits=1, user_api="blas")
    with _ONE_BLAS_THREAD, limit, ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda at: store(at, min(at + step, rows)), range(0, rows, step)):
            pass


def _pack_rows(zero_points: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack [n, blocks], where an odd number leaves half a byte of each row empty."""
    odd = zero_points.shape[1] % 2 * (8 - bits) // 4
    return pack(np.pad(zero_points, ((0, 0), (0, odd))), bits)


def float_rows(matrix: Matrix) -> Iterator[NDArray[np.float32]]:
    """The matrix as it is, a few rows at a time."""
    rows, columns = matrix.shape
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        yield matrix.read(start, min(start + step, rows))


def transposed(matrix: Matrix) -> NDArray[Any]:
    """The whole matrix, [columns, rows]."""
    return np.ascontiguousarray(matrix.read(0, matrix.shape[0]).T)


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return min(MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)
