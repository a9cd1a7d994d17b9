"""The decoder's state for graphs that give it anew, one token longer, at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import UnsupportedFormatError
from edge_llm.manifest import StateTensor
from edge_llm.runtime.kv_cache import allocate

__all__ = ["GrowingCache"]


class GrowingCache:
    """Two buffers per state tensor: a step reads one side and writes the other.

    Such a graph wants tensors that are exactly as long as the sequence, so a side is the front of
    flat memory, seen in the shape of its length. Other than in place, a shorter sequence therefore
    lies otherwise in memory: rolling back copies what stays to the other side.

    Args:
        state: The decoder's state, as the manifest lists it.
        capacity: Most tokens of the sequence.

    Attributes:
        capacity: Most tokens of the sequence.
        lengths: int32 [1], tokens that the sequence has.
        side: Which buffers hold it, 0 or 1.

    Raises:
        UnsupportedFormatError: A tensor is shared by input and output, or does not grow.
        ArgumentError: There is no memory for this capacity.
    """

    def __init__(self, state: Sequence[StateTensor], *, capacity: int) -> None:
        for one in state:
            if one.shared or one.kind != "kv":
                raise UnsupportedFormatError(
                    f"The state {one.input!r} is of kind {one.kind!r}, shared {one.shared}; this "
                    "layout's grows a row a token and is not shared.",
                    "Export the bundle again.",
                )
        self.capacity = capacity
        self.lengths = np.zeros(1, np.int32)
        self.side = 0
        self._axes = [(one.shape, one.sequence_axis) for one in state]
        self._names = [one.input for one in state]
        flat = {one.input: (math.prod(_sizes(one.shape, capacity)),) for one in state}
        self._sides = [
            list(allocate(flat, state, rows=1, capacity=capacity).values()) for _ in range(2)
        ]

    def views(self, side: int, length: int) -> list[NDArray[np.generic]]:
        """Each tensor's memory on a side, in the shape of a sequence of ``length`` tokens."""
        views = []
        for flat, (shape, _) in zip(self._sides[side], self._axes, strict=True):
            sizes = _sizes(shape, length)
            views.append(flat[: math.prod(sizes)].reshape(sizes))
        return views

    def advance(self, row: int, count: int) -> None:
        """A step has written the sequence and ``count`` more tokens to the other side."""
        self.lengths[row] += count
        self.side = 1 - self.side

    def abandon(self, row: int, count: int) -> None:
        """A step was ended in the middle; the side that it read is whole."""

    def room(self, row: int) -> int:
        """Tokens that the sequence can be given so that all of them can be taken back."""
        return self.capacity - int(self.lengths[row])

    def copy(self, source: int, target: int, length: int) -> int:
        """There is one row, which holds what it holds."""
        assert source == target
        return self.truncate(target, length)

    def shortest(self, length: int) -> int:
        """0: a sequence can be rolled back to any length."""
        return 0

    def read_row(self, row: int, length: int) -> dict[str, NDArray[np.generic]]:
        """See :meth:`~edge_llm.runtime.decoder.StateCache.read_row`."""
        views = self.views(self.side, int(self.lengths[row]))
        return {
            name: view[0][(slice(None),) * (axis - 1) + (slice(length),)]
            for name, view, (_, axis) in zip(self._names, views, self._axes, strict=True)
        }

    def accepts(self, length: int, arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """See :meth:`~edge_llm.runtime.decoder.StateCache.accepts`."""
        return length <= self.capacity and all(
            (array := arrays.get(name)) is not None
            and array.dtype == view.dtype
            and array.shape == view.shape[1:]
            for name, view in zip(self._names, self.views(self.side, length), strict=True)
        )

    def write_row(self, row: int, length: int, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """See :meth:`~edge_llm.runtime.decoder.StateCache.write_row`."""
        assert self.accepts(length, arrays)
        self.lengths[row] = 0  # whatever comes in between, nothing half-written is ever used
        for name, view in zip(self._names, self.views(self.side, length), strict=True):
            view[0] = arrays[name]
        self.lengths[row] = length

    def truncate(self, row: int, length: int) -> int:
        """Forget what the sequence holds from ``length`` on; gives ``length``."""
        held = int(self.lengths[row])
        assert 0 <= length <= held
        if 0 < length < held:
            sources, targets = self.views(self.side, held), self.views(1 - self.side, length)
            for source, target, (_, axis) in zip(sources, targets, self._axes, strict=True):
                target[...] = source[(slice(None),) * axis + (slice(length),)]
            self.side = 1 - self.side
        self.lengths[row] = length
        return length


def _sizes(shape: Sequence[int | str], length: int) -> tuple[int, ...]:
    sizes = {"batch": 1, "capacity": length}
    return tuple(sizes[size] if isinstance(size, str) else size for size in shape)
