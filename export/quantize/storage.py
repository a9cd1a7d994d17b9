"""How a matrix is stored, and the tensors that its storage consists of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..graph.matrices import Matrix
from .packing import block_count, pack
from .rtn import quantize_rows

__all__ = ["FLOAT32", "Storage", "float_rows", "quantized_tensors", "transposed"]

# 256k weights are 1 MB as float32: the passes over a chunk stay in the second-level cache.
CHUNK_WEIGHTS = 1 << 18

# A thread rounds some 150 million weights a second, 300 MB of bfloat16: four keep up with a disk,
# and cannot swamp a container whose quota of the processor the affinity mask does not show.
MOST_THREADS = 4


@dataclass(frozen=True, slots=True)
class Storage:
    """float32 (``bits`` 32, no block), or blocks of 4- or 8-bit integers with a float32 scale."""

    bits: int
    block: int | None

    def blob_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Shape of the packed bytes [rows, blocks, bytes of a block]."""
        assert self.block is not None
        return rows, block_count(columns, self.block), self.block * self.bits // 8


FLOAT32 = Storage(32, None)


def quantized_tensors(
    matrix: Matrix, storage: Storage
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.float32]]]:
    """Quantize a matrix a few rows at a time, several chunks at once.

    Returns:
        The packed bytes, uint8 [rows, blocks, bytes], and the scales, float32 [rows, blocks]; each
        as the one element of a list, the form in which deferred weights are written.
    """
    assert storage.block is not None
    block, bits = storage.block, storage.bits
    rows, columns = matrix.shape
    packed = np.empty(storage.blob_shape(rows, columns), np.uint8)
    scales = np.empty(packed.shape[:2], np.float32)
    step = max(1, CHUNK_WEIGHTS // columns)

    def quantize(start: int) -> None:
        stop = min(start + step, rows)
        integers, scales[start:stop] = quantize_rows(
            matrix.read(start, stop), bits=bits, block=block
        )
        packed[start:stop] = pack(integers, bits)

    # numpy releases the interpreter lock inside its loops, so threads do run side by side.
    with ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(quantize, range(0, rows, step)):
            pass
    return [packed], [scales]


def float_rows(matrix: Matrix) -> Iterator[NDArray[np.float32]]:
    """The matrix as it is, a few rows at a time."""
    rows, columns = matrix.shape
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        yield matrix.read(start, min(start + step, rows))


def transposed(matrix: Matrix) -> NDArray[Any]:
    """The whole matrix, [columns, rows]."""
    return np.ascontiguousarray(matrix.read(0, matrix.shape[0]).T)


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return min(MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)
