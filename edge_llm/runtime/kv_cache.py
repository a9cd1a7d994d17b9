"""The decoder's state: buffers that are allocated once and updated in place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError, UnsupportedFormatError
from edge_llm.manifest import StateTensor

__all__ = ["KVCache", "state_bytes"]


class KVCache:
    """One buffer per state tensor, [rows, kv_heads, capacity, head_dim], and each row's length.

    What lies behind a row's length is never read, so rolling back is a smaller length. Memory is
    committed by the system only as rows grow: an untouched page of zeros costs nothing.

    Args:
        state: The decoder's state, as the manifest lists it.
        rows: Sequences that are held at once.
        capacity: Most tokens of a row.

    Raises:
        UnsupportedFormatError: A tensor is not a shared buffer that grows a row a token.
        ArgumentError: There is no memory for this capacity.
    """

    def __init__(self, state: Sequence[StateTensor], *, rows: int, capacity: int) -> None:
        for one in state:
            if one.kind != "kv" or not one.shared:
                raise UnsupportedFormatError(
                    f"The state {one.input!r} is of kind {one.kind!r}, shared {one.shared}; this "
                    "runtime holds the kind 'kv' in shared buffers only.",
                    "Upgrade edge-llm.",
                )
        self.rows = rows
        self.capacity = capacity
        self.lengths = np.zeros(rows, np.int32)
        try:
            self.buffers: dict[str, NDArray[np.generic]] = {
                one.input: np.zeros(_shape(one, rows, capacity), one.dtype) for one in state
            }
        except (MemoryError, ValueError) as error:  # numpy has two words for "too large"
            size = state_bytes(state, rows=rows, capacity=capacity)
            raise ArgumentError(
                "context",
                f"small enough for its cache of {size} bytes to be allocated",
                capacity,
                "Load the model with a smaller context.",
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row holds from ``length`` on."""
        assert 0 <= length <= self.lengths[row]
        self.lengths[row] = length


def state_bytes(state: Sequence[StateTensor], *, rows: int, capacity: int) -> int:
    """Bytes that a cache of this size takes when it is full."""
    return sum(
        math.prod(_shape(one, rows, capacity)) * np.dtype(one.dtype).itemsize for one in state
    )


def _shape(state: StateTensor, rows: int, capacity: int) -> tuple[int, ...]:
    sizes = {"batch": rows, "capacity": capacity}
    return tuple(sizes[size] if isinstance(size, str) else size for size in state.shape)
