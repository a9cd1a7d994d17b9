"""The decoder's state in buffers that are allocated once and updated in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError, UnsupportedFormatError
from edge_llm.manifest import StateTensor
from edge_llm.runtime.decoder import WIDEST_STEP

__all__ = ["KVCache", "allocate", "state_bytes", "state_capacity"]

# Rows of a window's buffer besides the window: so many tokens come between two evictions, and so
# many at most can be taken back. A prompt's widest chunk fits, so that few are staged in a copy.
WINDOW_SLACK = WIDEST_STEP


class KVCache:
    """One buffer per state tensor, [rows, kv_heads, capacity, head_dim], and each row's length.

    What lies behind a row's length is never read, so rolling back is a smaller length. A window's
    buffer holds fewer tokens: GroupQueryAttention moves its last ones to the front whenever it is
    full, and then only what came since can be taken back.

    Memory is committed by the system only as rows grow: an untouched page of zeros costs nothing.

    Args:
        state: The decoder's state, as the manifest lists it.
        rows: Sequences that are held at once.
        capacity: Most tokens of a row.

    Raises:
        UnsupportedFormatError: A tensor is not a shared buffer.
        ArgumentError: There is no memory for this capacity.
    """

    def __init__(self, state: Sequence[StateTensor], *, rows: int, capacity: int) -> None:
        for one in state:
            if not one.shared:
                raise UnsupportedFormatError(
                    f"The state {one.input!r} is not shared by input and output, which this "
                    "layout's buffers are.",
                    "Export the bundle again.",
                )
        self.rows = rows
        self.capacity = capacity
        self.lengths = np.zeros(rows, np.int32)
        shapes = {one.input: _shape(one, rows, capacity) for one in state}
        self.buffers = allocate(shapes, state, rows=rows, capacity=capacity)
        # Of each tensor that is a window: its buffer's rows and its width.
        self._window_of = {
            one.input: (state_capacity(one, capacity), one.window) for one in state if one.window
        }
        self._windows = sorted(set(self._window_of.values()))

    def advance(self, row: int, count: int) -> None:
        """A step has added ``count`` tokens to a row."""
        self.lengths[row] += count

    def abandon(self, row: int, count: int) -> None:
        """A step that was to add ``count`` tokens was ended in the middle.

        Some layers' windows may have moved on for it already; then nothing in the row is of use.
        """
        length = int(self.lengths[row])
        if self.shortest(length + count) > length:
            self.lengths[row] = 0

    def truncate(self, row: int, length: int) -> int:
        """Forget what a row holds from ``length`` on.

        Returns:
            What is left: ``length``, or 0 where a window no longer holds what is in front of it.
        """
        held = int(self.lengths[row])
        assert 0 <= length <= held
        if length < self.shortest(held):
            length = 0
        self.lengths[row] = length
        return length

    def copy(self, source: int, target: int, length: int) -> int:
        """Let a row hold what the first ``length`` tokens of another one are.

        Returns:
            What it holds then: ``length``, or 0 where a window no longer holds what is in front.
        """
        held = int(self.lengths[source])
        assert 0 <= length <= held
        self.lengths[target] = 0
        if length < self.shortest(held):
            return 0
        for buffer in self.buffers.values():
            # A window's rows stand where its eviction put them; nothing is behind the others.
            stop = length if buffer.shape[2] == self.capacity else buffer.shape[2]
            buffer[target, :, :stop] = buffer[source, :, :stop]
        self.lengths[target] = held
        return self.truncate(target, length)

    def room(self, row: int) -> int:
        """Tokens that a row can be given so that all of them can be taken back."""
        length = int(self.lengths[row])
        full = self.capacity
        for capacity, window in self._windows:
            full = min(full, capacity + _dropped(length, capacity, window))
        return full - length

    def shortest(self, length: int) -> int:
        """The length, besides 0, below which a row of ``length`` tokens cannot be rolled back.

        What a window's buffer holds follows from the length alone, so it is the same for a shorter
        row as long as the same tokens would have been dropped there: down to the window's width
        behind them.
        """
        shortest = 0
        for capacity, window in self._windows:
            if dropped := _dropped(length, capacity, window):
                shortest = max(shortest, dropped + window)
        return shortest

    def read_row(self, row: int, length: int) -> dict[str, NDArray[np.generic]]:
        """See :meth:`~edge_llm.runtime.decoder.StateCache.read_row`; views of the buffers."""
        held = int(self.lengths[row])
        assert self.shortest(held) <= length <= held
        return {
            name: buffer[row, :, : self._held(name, length)]
            for name, buffer in self.buffers.items()
        }

    def accepts(self, length: int, arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """See :meth:`~edge_llm.runtime.decoder.StateCache.accepts`."""
        return length <= self.capacity and all(
            (array := arrays.get(name)) is not None
            and array.ndim == 3
            and (array.dtype, array.shape[0], array.shape[2])
            == (buffer.dtype, buffer.shape[1], buffer.shape[3])
            and array.shape[1] >= self._held(name, length)
            for name, buffer in self.buffers.items()
        )

    def write_row(self, row: int, length: int, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """See :meth:`~edge_llm.runtime.decoder.StateCache.write_row`."""
        assert self.accepts(length, arrays)
        self.lengths[row] = 0  # whatever comes in between, nothing half-written is ever used
        for name, buffer in self.buffers.items():
            held = self._held(name, length)
            array = arrays[name]
            buffer[row, :, :held] = array[:, array.shape[1] - held :]
        self.lengths[row] = length

    def _held(self, name: str, length: int) -> int:
        """How many of a row's ``length`` tokens a tensor's buffer holds: the last ones."""
        return length - _dropped(length, *self._window_of.get(name, (self.capacity, 1)))


def _dropped(length: int, capacity: int, window: int) -> int:
    """How many of ``length`` tokens a window's buffer no longer holds: the first ones.

    With a capacity of C rows, a window of W and G = C - W + 1, GroupQueryAttention has dropped the
    first ``G * ceil((T - C) / G)`` of T tokens (0 up to T = C) and holds the others from its first
    row on (github.com/microsoft/onnxruntime, pull request 32419).
    """
    block = capacity - window + 1
    return block * max(0, -((capacity - length) // block))


def state_capacity(state: StateTensor, capacity: int) -> int:
    """Tokens for which a tensor's buffer has room, in a cache of ``capacity`` tokens a row."""
    if state.window is None:
        return capacity
    # The operator refuses a buffer below the window, even where the context is shorter.
    return max(state.window, min(capacity, state.window + WINDOW_SLACK))


def state_bytes(state: Sequence[StateTensor], *, rows: int, capacity: int) -> int:
    """Bytes that a cache of this size takes when it is full.

    A state that is not shared is held twice: a step reads one copy and writes the other.
    """
    return sum(
        math.prod(_shape(one, rows, capacity))
        * np.dtype(one.dtype).itemsize
        * (1 if one.shared else 2)
        for one in state
    )


def allocate(
    shapes: Mapping[str, tuple[int, ...]], state: Sequence[StateTensor], *, rows: int, capacity: int
) -> dict[str, NDArray[np.generic]]:
    """Zeros for every tensor of a state, by input's name.

    Raises:
        ArgumentError: There is no memory for this capacity.
    """
    try:
        return {one.input: np.zeros(shapes[one.input], one.dtype) for one in state}
    except (MemoryError, ValueError) as error:  # numpy has two words for "too large"
        size = state_bytes(state, rows=rows, capacity=capacity)
        raise ArgumentError(
            "context",
            f"small enough for its cache of {size} bytes to be allocated",
            capacity,
            "Load the model with a smaller context.",
        ) from error


def _shape(state: StateTensor, rows: int, capacity: int) -> tuple[int, ...]:
    sizes = {"batch": rows, "capacity": state_capacity(state, capacity)}
    return tuple(sizes[size] if isinstance(size, str) else size for size in state.shape)
