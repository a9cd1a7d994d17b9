"""What a cache holds, how far it can be rolled back, and what it costs."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError, UnsupportedFormatError
from edge_llm.manifest import StateTensor
from edge_llm.runtime.growing_cache import GrowingCache
from edge_llm.runtime.kv_cache import WINDOW_SLACK, KVCache, state_bytes, state_capacity


def tensor(**changes: Any) -> StateTensor:
    values: dict[str, Any] = {
        "input": "past",
        "output": "present",
        "dtype": "float32",
        "shape": ("batch", 2, "capacity", 3),
        "batch_axis": 0,
        "sequence_axis": 2,
        "shared": True,
        "kind": "kv",
    }
    return StateTensor(**(values | changes))


def windowed(window: int) -> StateTensor:
    return tensor(input=f"past.{window}", kind="window", window=window)


def growing(**changes: Any) -> StateTensor:
    return tensor(shared=False, **changes)


class Sequence:
    """A sequence as a plain list beside the cache that is tested: row t is filled with its value.

    A step does what a graph does: it writes the whole sequence, one or more rows longer.
    """

    def __init__(self, cache: GrowingCache, axes: list[int]) -> None:
        self.cache, self.axes, self.rows = cache, axes, list[int]()

    def append(self, values: list[int]) -> None:
        self.check()
        total = len(self.rows) + len(values)
        for before, after, axis in zip(
            self.cache.views(self.cache.side, len(self.rows)),
            self.cache.views(1 - self.cache.side, total),
            self.axes,
            strict=True,
        ):
            new = self._along(np.array(values), axis, before.ndim)
            shape = list(after.shape)
            shape[axis] = len(values)
            after[...] = np.concatenate([before, np.broadcast_to(new, shape)], axis=axis)
        self.cache.advance(0, len(values))
        self.rows += values

    def truncate(self, length: int) -> None:
        assert self.cache.truncate(0, length) == length
        del self.rows[length:]

    def check(self) -> None:
        assert self.cache.lengths[0] == len(self.rows)
        views = self.cache.views(self.cache.side, len(self.rows))
        for view, axis in zip(views, self.axes, strict=True):
            assert view.flags.c_contiguous
            expected = self._along(np.array(self.rows), axis, view.ndim)
            assert np.array_equal(view, np.broadcast_to(expected, view.shape))

    @staticmethod
    def _along(values: NDArray[Any], axis: int, ndim: int) -> NDArray[Any]:
        return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


STEPS = st.lists(
    st.lists(st.integers(1, 99), min_size=1, max_size=5).map(lambda values: ("append", values))
    | st.integers(0, 100).map(lambda percent: ("truncate", percent))
    | st.just(("fail", None)),
    max_size=12,
)


@given(STEPS)
def test_a_growing_cache_holds_the_sequence(steps: list[tuple[str, Any]]) -> None:
    # transformers' shape, one with the tokens first, and one with them last.
    state = [
        growing(input="a"),
        growing(input="b", shape=("capacity", "batch", 4), sequence_axis=0, batch_axis=1),
        growing(input="c", shape=("batch", 2, 3, "capacity"), sequence_axis=3, dtype="float16"),
    ]
    cache = GrowingCache(state, capacity=60)
    sequence = Sequence(cache, [2, 0, 3])
    for what, argument in steps:
        if what == "append":
            sequence.append(argument)
        elif what == "truncate":
            sequence.truncate(len(sequence.rows) * argument // 100)
        else:  # the graph wrote something and did not come to an end
            for view in cache.views(1 - cache.side, min(60, len(sequence.rows) + 2)):
                view[...] = -1
            cache.abandon(0, 2)
        sequence.check()


def test_views_of_a_growing_cache_cost_no_memory() -> None:
    cache = GrowingCache([growing(shape=("batch", 8, "capacity", 64))], capacity=4096)
    cache.advance(0, 4000)
    tracemalloc.start()
    try:
        for length in range(4000, 4096):
            cache.views(cache.side, length)
            cache.views(1 - cache.side, length + 1)
            cache.advance(0, 1)
        cache.truncate(0, 3000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000


@pytest.mark.parametrize(
    "make",
    [
        lambda: KVCache([growing()], rows=1, capacity=8),
        lambda: GrowingCache([tensor()], capacity=8),
        lambda: GrowingCache([growing(kind="window", window=4)], capacity=8),
    ],
)
def test_state_of_another_layout_is_refused(make: Any) -> None:
    with pytest.raises(UnsupportedFormatError, match="'past'"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: KVCache([tensor()], rows=1, capacity=10**15),
        lambda: GrowingCache([growing()], capacity=10**15),
    ],
)
def test_too_large_a_context_is_named_with_its_bytes(make: Any) -> None:
    with pytest.raises(ArgumentError, match=r"context.*\d{17} bytes"):
        make()


def test_bytes() -> None:
    row = 2 * 3 * 4
    assert (
        state_bytes([tensor(), tensor(dtype="float16")], rows=2, capacity=10) == 2 * 10 * row * 1.5
    )
    assert state_bytes([growing()], rows=1, capacity=10) == 2 * 10 * row
    # A window of 100 costs the same in every context that is longer.
    for capacity in (1000, 10_000):
        expected = (100 + WINDOW_SLACK) * row
        assert state_bytes([windowed(100)], rows=1, capacity=capacity) == expected
    cache = KVCache([tensor(input="a"), windowed(100)], rows=1, capacity=1000)
    held = sum(buffer.nbytes for buffer in cache.buffers.values())
    assert held == (1000 + 100 + WINDOW_SLACK) * row


def test_a_windows_buffer_is_never_shorter_than_the_window_nor_longer_than_needed() -> None:
    assert state_capacity(windowed(100), 50) == 100
    assert state_capacity(windowed(100), 300) == 300
    assert state_capacity(windowed(100), 5000) == 100 + WINDOW_SLACK
    assert state_capacity(tensor(), 5000) == 5000


@given(
    window=st.integers(1, 40),
    capacity=st.integers(1, 3000),
    data=st.data(),
)
def test_rolling_back_stays_where_nothing_was_dropped(
    window: int, capacity: int, data: st.DataObject
) -> None:
    """Against the operator's rule as it is written, tried for every shorter length."""
    cache = KVCache([windowed(window)], rows=1, capacity=capacity)
    rows = cache.buffers[f"past.{window}"].shape[2]
    gap = rows - window + 1

    def dropped(length: int) -> int:
        return 0 if length <= rows else gap * -(-(length - rows) // gap)

    length = data.draw(st.integers(1, capacity))
    possible = [n for n in range(1, length + 1) if dropped(n) == dropped(length)]
    assert max(1, cache.shortest(length)) == possible[0]
    wanted = data.draw(st.integers(0, length))
    cache.advance(0, length)
    left = cache.truncate(0, wanted)
    assert left == cache.lengths[0] == (wanted if wanted in possible else 0)


def test_a_step_that_ended_early_empties_only_a_window_that_moved() -> None:
    cache = KVCache([tensor(input="a"), windowed(4)], rows=1, capacity=4096)
    full = 4 + WINDOW_SLACK
    for past, count, left in (
        (100, 50, 100),
        (full - 5, 5, full - 5),
        (full - 5, 6, 0),
        (full + 1, 1, full + 1),
        (full + 1, WINDOW_SLACK, full + 1),
        (full + 1, WINDOW_SLACK + 1, 0),
    ):
        cache.lengths[0] = past
        cache.abandon(0, count)
        assert cache.lengths[0] == left


@given(st.lists(st.integers(1, 20), max_size=12), st.lists(st.integers(0, 9), max_size=9))
def test_a_growing_row_that_is_read_and_written_back(values: list[int], others: list[int]) -> None:
    cache = GrowingCache([growing(), growing(input="other", dtype="int8")], capacity=20)
    sequence = Sequence(cache, [2, 2])
    if values:
        sequence.append(values)
    length = len(values) * 2 // 3
    saved = {name: one.copy() for name, one in cache.read_row(0, length).items()}
    sequence.truncate(0)
    if others:
        sequence.append(others)
    assert cache.accepts(length, saved)
    assert not cache.accepts(length + 1, saved)
    assert not cache.accepts(21, saved)
    assert not cache.accepts(length, {"past": saved["past"]})
    cache.write_row(0, length, saved)
    sequence.rows = values[:length]
    sequence.append([1, 2])
    sequence.check()
