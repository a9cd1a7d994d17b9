"""Which prompts a step reads: one's next chunk, or several short ones together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.engine.job import Feed
from edge_llm.engine.prompting import OLDEST_EVERY, PromptChooser
from edge_llm.engine.slot import Slot
from edge_llm.runtime.kv_cache import KVCache
from tests.edge_llm.test_engine import (
    VOCAB,
    Counting,
    FakeDecoder,
    Prompting,
    make_engine,
    start,
    until,
    within,
)

ROWS, CAPACITY = 8, 64


@dataclass
class Reading:
    """A job that reads a prompt."""

    slot: Slot
    feed: Feed


def reading(lengths: Sequence[int], rows: Sequence[int], *, scored: int = 1) -> list[Reading]:
    cache = KVCache((), rows=ROWS, capacity=CAPACITY)
    return [
        Reading(Slot(cache, row), Feed(range(length), scored=scored))
        for length, row in zip(lengths, rows, strict=True)
    ]


def chooser(*, fixed: int | None = None) -> PromptChooser:
    """A token takes 3 ms, a step's own cost is 7 ms more: chunks are of 47 tokens."""
    return PromptChooser(ChunkPlanner(fixed=fixed, widest=512, single_token=0.01))


@given(
    lengths=st.lists(st.integers(2, CAPACITY), min_size=1, max_size=ROWS),
    order=st.permutations(range(ROWS)),
    fixed=st.none() | st.integers(1, 200),
)
def test_a_step_of_several_prompts_pays(
    lengths: list[int], order: list[int], fixed: int | None
) -> None:
    jobs = reading(lengths, order[: len(lengths)])
    planner = ChunkPlanner(fixed=fixed, widest=512, single_token=0.01)
    group = PromptChooser(planner).next(jobs)
    left = [len(job.feed.tokens) for job in group]
    assert left[0] == min(lengths)
    assert len({id(job) for job in group}) == len(group)
    if len(group) > 1:
        rows = sorted(job.slot.row for job in group)
        assert rows == list(range(rows[0], rows[-1] + 1))
        fed = len(group) * max(left)
        assert fed <= planner.tokens
        # Apart they would cost that many steps of their own, for which nothing is padded.
        assert fed - sum(left) <= (len(group) - 1) * planner.own_tokens / 2


def test_only_neighbours_of_about_the_same_length_are_read_together() -> None:
    jobs = reading([8, 8, 9, 8, 30, 8], [3, 2, 4, 0, 5, 6])
    assert chooser().next(jobs) == [jobs[0], jobs[2], jobs[1]]
    assert chooser(fixed=9).next(jobs) == [jobs[0]]
    # Of scored texts every token has logits: they are read one by one.
    assert chooser().next(reading([8, 8], [0, 1], scored=8))[1:] == []


def test_a_chunk_of_a_long_prompt_is_read_alone() -> None:
    jobs = reading([60, 60], [0, 1])
    assert chooser().next(jobs) == [jobs[0]]


def test_the_oldest_has_its_turn() -> None:
    jobs, choose = reading([60, 2, 2], [0, 1, 2]), chooser()
    assert [choose.next(jobs)[0] for _ in range(OLDEST_EVERY)] == [
        *[jobs[1]] * (OLDEST_EVERY - 1),
        jobs[0],
    ]


@pytest.mark.parametrize("lengths", [(8, 8, 8), (7, 8, 8)])
def test_prompts_that_come_together_take_one_step(lengths: tuple[int, ...]) -> None:
    decoder = FakeDecoder(rows=4)
    engine, _ = make_engine(decoder, fixed=None)
    release = threading.Event()
    blocker = Counting(before=release.wait)
    first = start(engine, blocker)
    until(blocker.ran.is_set)
    prompts = [range(20 * i + 10, 20 * i + 10 + length) for i, length in enumerate(lengths)]
    calls = [start(engine, Prompting(prompt)) for prompt in prompts]
    until(lambda: engine.stats().waiting == len(lengths))
    release.set()
    for prompt, call in zip(prompts, calls, strict=True):
        assert call.result() == [0, (0, (prompt[-1] + 1) % VOCAB)]
    first.result()
    within(engine.close)
    assert decoder.batches.count(3) == 1
    assert sorted(tokens for tokens, _ in decoder.fed if len(tokens) > 1) == [
        list(prompt) for prompt in prompts
    ]
