"""Many requests on one set of weights: rows, steps that they share, order, limits, prefixes."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.engine.drafting import Drafting
from edge_llm.engine.job import Feed, Job, Steps
from edge_llm.engine.prompting import OLDEST_EVERY
from edge_llm.engine.scheduler import Engine
from edge_llm.engine.scoring import Distributions, ScoreEnd, Scoring
from edge_llm.engine.slot import Slot
from edge_llm.engine.slots import WORTH_WAITING, Slots
from edge_llm.engine.step_costs import WIDTHS, StepCosts
from edge_llm.engine.waiting import AGING_SECONDS, WaitingJobs
from edge_llm.errors import CancelledError, ClosedError, DeadlineError, QueueFullError
from edge_llm.manifest import StateTensor
from edge_llm.results import RequestReport
from edge_llm.runtime.kv_cache import KVCache
from tests.edge_llm.test_engine import (
    VOCAB,
    Call,
    Counting,
    FakeDecoder,
    Prompting,
    make_engine,
    start,
    until,
    within,
)

ROWS = 4


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder(rows=ROWS)


@pytest.fixture
def engine(decoder: FakeDecoder) -> Iterator[Engine]:
    engine, _ = make_engine(decoder)
    yield engine
    decoder.interrupt()
    within(engine.close)


class Holding(Counting):
    """Takes its second step only when it may."""

    def __init__(self, count: int = 1) -> None:
        super().__init__(count)
        self.gate = threading.Event()

    def steps(self, slot: Slot) -> Steps:
        self.slot = slot
        slot.clear()
        yield Feed([0])
        self.ran.set()
        while not self.gate.is_set():
            slot.clear()
            yield Feed([0])
        self.put("stop")


def fill(engine: Engine, count: int = ROWS) -> list[tuple[Holding, Call]]:
    """Occupy so many rows."""
    held = []
    for _ in range(count):
        job = Holding()
        held.append((job, start(engine, job)))
        until(job.ran.is_set)
    return held


def let_go(held: Sequence[tuple[Holding, Call]]) -> None:
    for job, _ in held:
        job.gate.set()
    for _, call in held:
        assert call.result() == ["stop"]


def test_answers_share_steps(engine: Engine, decoder: FakeDecoder) -> None:
    held = fill(engine)
    until(lambda: decoder.batches[-1] == ROWS)
    let_go(held)
    calls = [start(engine, Counting(50)) for _ in range(3 * ROWS)]
    for call in calls:
        assert call.result() == [*range(50), "stop"]
    stats = engine.stats()
    assert stats.requests == 4 * ROWS
    assert stats.running == stats.waiting == stats.failed == 0
    assert 1 < stats.rows_per_step <= ROWS


def test_a_prompt_holds_answers_up_for_one_chunk_at_most(
    engine: Engine, decoder: FakeDecoder
) -> None:
    held = fill(engine, 2)
    del decoder.fed[:]
    assert within(lambda: list(engine.execute(Prompting(range(40)))))[-1] == (0, 40 % 16)
    widths = [len(tokens) for tokens, _ in decoder.fed]
    let_go(held)
    chunks = [i for i, width in enumerate(widths) if width == 4]
    assert len(chunks) == 10
    # Between any two chunks, both answers take a step.
    for left, right in itertools.pairwise(chunks):
        assert widths[left + 1 : right] == [1, 1]


@pytest.mark.parametrize("kind", ["score", "logits"])
def test_logits_of_many_tokens_hold_answers_up_for_one_chunk_at_most(
    kind: str, engine: Engine, decoder: FakeDecoder
) -> None:
    text = np.arange(150) % VOCAB
    held = fill(engine, 2)
    del decoder.fed[:]
    job: Job
    if kind == "score":
        job = Scoring(text, vocab=VOCAB, cancel=None, timeout=None)
    else:
        job = Distributions(text, last=100, continued=0)
    (result,) = within(lambda: list(engine.execute(job)))
    widths = [len(tokens) for tokens, _ in decoder.fed]
    let_go(held)
    assert max(widths) == 4
    # The likeliest token is the next one, whatever the pieces were.
    if kind == "score":
        assert np.ptp(cast("ScoreEnd", result).logprobs) == 0
    else:
        best = cast("NDArray[np.float32]", result).argmax(axis=1)
        np.testing.assert_array_equal(best, (text[50:] + 1) % VOCAB)


def test_the_clock_decides_how_many_tokens_are_scored_only_beside_others(
    decoder: FakeDecoder,
) -> None:
    engine, _ = make_engine(decoder, fixed=None)

    def scored() -> list[int]:
        del decoder.fed[:]
        job = Scoring(np.arange(129) % VOCAB, vocab=VOCAB, cancel=None, timeout=None)
        within(lambda: list(engine.execute(job)))
        return [len(tokens) for tokens, count in decoder.fed if len(tokens) == count > 1]

    held = fill(engine, 1)
    assert scored()[0] < 64, "the first guess errs on the short side"
    let_go(held)
    assert scored() == [64, 64]
    within(engine.close)


def test_short_prompts_come_first_but_the_oldest_is_not_forgotten(
    engine: Engine, decoder: FakeDecoder
) -> None:
    gate = Holding()
    call = start(engine, gate)
    until(gate.ran.is_set)
    decoder.delay = 0.002
    long = Prompting(range(1000, 1200))
    decoder.cache.capacity = 256
    first = start(engine, long)
    until(lambda: any(tokens[0] == 1000 for tokens, _ in decoder.fed))
    done: list[int] = []
    for i in range(6):
        within(lambda i=i: list(engine.execute(Prompting(range(100 * i, 100 * i + 8)))))  # type: ignore[misc]
        done.append(i)
    first.result()
    gate.gate.set()
    call.result()
    order = [
        "long" if tokens[0] >= 1000 else "short" for tokens, _ in decoder.fed if len(tokens) > 1
    ]
    shorts = [i for i, kind in enumerate(order) if kind == "short"]
    between = order[shorts[0] : shorts[-1] + 1].count("long")
    assert between + 2 >= 12 // OLDEST_EVERY
    assert order[-1] == "long", "the short ones did not wait for it"


def test_a_step_that_others_wait_for_is_not_ended(engine: Engine, decoder: FakeDecoder) -> None:
    held = fill(engine, 2)
    decoder.in_step.clear()
    decoder.delay = 0.3
    until(decoder.in_step.is_set)
    started = time.monotonic()
    engine.abandon(held[0][0])
    assert held[0][1].result() == ["cancelled"]
    assert time.monotonic() - started < 3
    decoder.delay = 0
    let_go(held[1:])


def test_a_step_ends_when_all_that_wait_for_it_are_gone(
    engine: Engine, decoder: FakeDecoder
) -> None:
    held = fill(engine, 3)
    decoder.in_step.clear()
    decoder.delay = 60
    until(decoder.in_step.is_set)
    for job, _ in held:
        engine.abandon(job)
    for _, call in held:
        assert call.result() == ["cancelled"]
    decoder.delay = 0


def test_an_error_in_a_step_belongs_to_all_of_its_rows_and_to_no_other(
    engine: Engine, decoder: FakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = fill(engine, 2)

    def fail(*args: object, **kwargs: object) -> NDArray[np.float32]:
        monkeypatch.undo()
        raise MemoryError("no")

    monkeypatch.setattr(decoder, "step_rows", fail)
    for _, call in held:
        with pytest.raises(MemoryError):
            call.result()
    assert within(lambda: list(engine.execute(Counting(2)))) == [0, 1, "stop"]
    assert engine.stats().failed == 2


def test_one_that_fails_leaves_its_neighbours_alone(engine: Engine) -> None:
    class Failing(Holding):
        def steps(self, slot: Slot) -> Steps:
            for _ in range(3):
                yield Feed([0])
            raise ValueError("mine")

    held = fill(engine, 2)
    with pytest.raises(ValueError, match="mine"):
        within(lambda: list(engine.execute(Failing())))
    let_go(held)


def test_the_queue_is_bounded() -> None:
    decoder = FakeDecoder(rows=1)
    engine, _ = make_engine(decoder, queue_limit=2)
    held = fill(engine, 1)
    waiting = [start(engine, Counting(1)) for _ in range(2)]
    until(lambda: len(engine._waiting) == 2)
    with pytest.raises(QueueFullError, match="2 requests wait already") as caught:
        within(lambda: list(engine.execute(Counting(1))))
    assert caught.value.limit == 2
    let_go(held)
    for call in waiting:
        call.result()
    within(engine.close)


def test_jobs_for_which_rows_are_free_do_not_count_as_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, slots = make_engine(FakeDecoder(rows=ROWS), queue_limit=1)
    seeing, take = threading.Event(), slots.take

    def late(prompt: NDArray[np.int64], *, latest: bool = False) -> Slot | None:
        seeing.wait(60)
        return take(prompt, latest=latest)

    monkeypatch.setattr(slots, "take", late)
    calls = [start(engine, Counting(1)) for _ in range(ROWS + 1)]
    until(lambda: engine.stats().waiting == ROWS + 1)
    with pytest.raises(QueueFullError):
        within(lambda: list(engine.execute(Counting(1))))
    seeing.set()
    for call in calls:
        assert call.result() == [0, "stop"]
    within(engine.close)


def test_priority_and_then_the_order_of_coming(engine: Engine) -> None:
    order: list[str] = []

    class Ordered(Counting):
        def __init__(self, name: str, priority: int) -> None:
            super().__init__(1, before=lambda: order.append(name))
            self.priority = priority

    decoder = FakeDecoder(rows=1)
    one, _ = make_engine(decoder)
    held = fill(one, 1)
    calls = []
    for name, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 2), ("e", 1), ("f", -1)):
        calls.append(start(one, Ordered(name, priority)))
        until(lambda: len(one._waiting) == len(calls))
    let_go(held)
    for call in calls:
        call.result()
    assert order == ["d", "b", "e", "a", "c", "f"]
    within(one.close)


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 60)), max_size=20))
def test_nobody_waits_for_ever(jobs: list[tuple[int, float]]) -> None:
    """A job is served before every one that came so much later that its priority does not count."""
    waiting = WaitingJobs(100)
    now = time.perf_counter()
    for priority, age in jobs:
        job = Counting(1)
        job.priority, job.created = priority, now - age
        waiting.add(job)
    order = list(waiting)
    assert len(order) == len(jobs)
    for i, first in enumerate(order):
        for second in order[i + 1 :]:
            lead = first.priority - second.priority
            assert first.created - second.created <= lead * AGING_SECONDS + 1e-6


def test_on_request_hears_of_every_end_and_its_errors_harm_nobody() -> None:
    reports: list[RequestReport] = []

    def note(report: RequestReport) -> None:
        reports.append(report)
        raise ValueError("a broken exporter")

    decoder = FakeDecoder(rows=2)
    engine, _ = make_engine(decoder, on_request=note)
    assert within(lambda: list(engine.execute(Counting(1)))) == [0, "stop"]
    with pytest.raises(ZeroDivisionError):
        within(lambda: list(engine.execute(Counting(1, before=lambda: divmod(1, 0)))))
    within(engine.close)
    assert [type(report.error) for report in reports] == [type(None), ZeroDivisionError]


# Rows


def state(window: int | None = None) -> StateTensor:
    return StateTensor(
        input="past",
        output="present",
        dtype="float32",
        shape=("batch", 1, "capacity", 1),
        batch_axis=0,
        sequence_axis=2,
        shared=True,
        kind="kv" if window is None else "window",
        window=window,
    )


def hold(cache: KVCache, slot: Slot, tokens: Sequence[int]) -> None:
    """Let a row hold tokens, and in its buffers numbers that tell which."""
    slot.clear()
    slot.note(tokens)
    for buffer in cache.buffers.values():
        buffer[slot.row, 0, : len(tokens), 0] = tokens
    cache.advance(slot.row, len(tokens))


def content(cache: KVCache, slot: Slot) -> list[int]:
    buffer = next(iter(cache.buffers.values()))
    return [int(x) for x in buffer[slot.row, 0, : slot.length, 0]]


def taken(slots: Slots, prompt: NDArray[np.int64]) -> Slot:
    slot = slots.take(prompt)
    assert slot is not None
    return slot


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@given(
    st.lists(prompts, min_size=ROWS, max_size=ROWS),
    st.lists(st.tuples(prompts, st.integers(0, ROWS - 1)), max_size=12),
)
def test_a_row_holds_the_longest_prefix_that_any_row_held(
    held: list[list[int]], wanted: list[tuple[list[int], int]]
) -> None:
    cache = KVCache([state()], rows=ROWS, capacity=32)
    slots = Slots(cache, ROWS)
    for slot, tokens in zip(slots.all, held, strict=True):
        hold(cache, slot, tokens)
    busy: list[Slot] = []
    for prompt, ended in wanted:
        array = np.array(prompt, np.int64)
        longest = max(slot.reusable(array) for slot in slots.all)
        slot = taken(slots, array)
        assert slot.rewind(array) == longest
        assert content(cache, slot) == slot.held.tolist() == prompt[:longest]
        hold(cache, slot, prompt)
        busy.append(slot)
        if len(busy) > 1:
            slots.close_gap(busy)
            assert sorted(one.row for one in slots.all) == list(range(ROWS))
        for one in slots.all:
            assert content(cache, one) == one.held.tolist()
        if len(busy) > ended or len(busy) == ROWS:
            slots.release(busy.pop(ended % len(busy)))


def test_rows_at_work_lie_beside_each_other() -> None:
    cache = KVCache([state()], rows=6, capacity=32)
    slots = Slots(cache, 6)
    none = np.zeros(0, np.int64)
    busy = [taken(slots, none) for _ in range(5)]
    assert sorted(slot.row for slot in busy) == [0, 1, 2, 3, 4]
    for slot in busy:
        hold(cache, slot, [slot.row] * 3)
    for row in (1, 3):
        slot = next(one for one in busy if one.row == row)
        slots.release(slot)
        busy.remove(slot)
    for _ in range(2):
        slots.close_gap(busy)
    assert sorted(slot.row for slot in busy) == [0, 1, 2]
    assert sorted(content(cache, slot)[0] for slot in busy) == [0, 2, 4]
    # And the next one comes beside them.
    assert taken(slots, none).row == 3


def test_a_row_that_was_used_last_holds_no_other_callers_tokens() -> None:
    cache = KVCache([state()], rows=4, capacity=32)
    slots = Slots(cache, 4)
    none = np.zeros(0, np.int64)
    busy = [taken(slots, none) for _ in range(4)]
    for slot in busy:
        hold(cache, slot, [slot.row] * 3)
    older, last = busy[1], busy[2]
    for slot in (older, last):
        slots.release(slot)
        busy.remove(slot)
    # Of two gaps the older one goes.
    slots.close_gap(busy)
    assert slots.take(none, latest=True) is last
    assert content(cache, last) == [2, 2, 2]
    slots.release(last)
    # Where the only gap was used last, that is gone, and known to be.
    slots.release(busy.pop(0))
    for slot in (taken(slots, none), taken(slots, none)):
        hold(cache, slot, [9] * 3)
        busy.append(slot)
    busy.sort(key=lambda slot: slot.row)
    middle = busy.pop(1)
    slots.release(middle)
    slots.close_gap(busy)
    assert slots.take(none, latest=True) is middle
    assert middle.length == 0


def test_what_was_used_last_is_waited_for_while_another_works_on_it() -> None:
    slots = Slots(KVCache([state()], rows=2, capacity=32), 2)
    none = np.zeros(0, np.int64)
    for _ in range(2):
        slots.release(taken(slots, none))
    last = slots.take(none, latest=True)
    assert last is not None
    assert slots.take(none, latest=True) is None
    slots.release(last)
    assert slots.take(none, latest=True) is last


def test_a_prompt_waits_for_tokens_that_another_is_computing(engine: Engine) -> None:
    prompt = list(range(200))
    decoder = FakeDecoder(rows=ROWS)
    engine, _ = make_engine(decoder)
    held = fill(engine, 1)
    decoder.delay = 0.002
    calls = [start(engine, Prompting([*prompt, i, i, i])) for i in range(3)]
    reused = sorted(call.result()[-1][0] for call in calls)  # type: ignore[index]
    decoder.delay = 0
    let_go(held)
    within(engine.close)
    assert reused[0] == 0
    assert min(reused[1:]) > 200 - WORTH_WAITING, "most of it was computed once"


def test_windows_that_moved_on_are_not_copied() -> None:
    cache = KVCache([state(window=8)], rows=2, capacity=2000)
    slots = Slots(cache, 2)
    cache.advance(0, 600)  # beyond window and slack: the first tokens are gone
    slots.all[0]._held[:600] = np.arange(600)
    assert cache.copy(0, 1, 590) == 590
    assert cache.copy(0, 1, 10) == 0
    assert cache.lengths.tolist() == [600, 0]


# Drafts


def drafting(curve: dict[int, float]) -> Drafting:
    costs = StepCosts(single=1.0, curve=curve)
    return Drafting(costs, possible=True, vocab=100)


def test_drafts_are_made_only_while_they_pay_for_the_rows() -> None:
    cheap = drafting({2: 1.05, 4: 1.1, 8: 1.2, 16: 1.4})
    sure, none = Feed([1], drafts=[2] * 15, chance=0.95), Feed([1])
    assert cheap.width([sure]) > 1
    assert cheap.width([sure] * 2) > 1
    assert cheap.width([none] * 4) == 1
    steep = drafting({2: 1.9, 4: 3.8, 8: 7.6, 16: 15.0})
    assert steep.width([sure]) > 1, "one row alone does what the tokens say"
    assert steep.width([sure] * 4) == 1
    # One row's drafts must pay for the others' padding.
    assert drafting({2: 1.3, 4: 1.6, 8: 2.4, 16: 4.0}).width([sure, *[none] * 7]) == 1


def test_what_steps_cost_is_learnt_for_each_number_of_rows() -> None:
    one = drafting({2: 1.05, 4: 1.1, 8: 1.2, 16: 1.4})
    sure = Feed([1], drafts=[2] * 15, chance=0.95)
    assert one.width([sure] * 4) > 1
    for _ in range(10):
        one.observe(4, 1, 1.0)
        for width in WIDTHS:
            one.observe(4, width, 1.0 * width)
    assert one.width([sure] * 4) == 1
    assert one.width([sure]) > 1


def test_logits_of_a_step_are_bounded() -> None:
    wide = Drafting(
        StepCosts(single=1.0, curve={2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}), possible=True, vocab=1 << 18
    )
    sure = Feed([1], drafts=[2] * 15, chance=0.95)
    assert wide.width([sure]) == 16
    assert wide.width([sure] * 8) * 8 * 4 * (1 << 18) <= 16 << 20


# A real model


TEXTS = ["It was the best of times", "the age of wisdom, it was", "東京 and 1,024", "a", "epoch"]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 40},
    {"temperature": 0.8, "seed": 3, "max_tokens": 30},
    {"temperature": 1.0, "top_k": 20, "seed": 5, "max_tokens": 25, "logprobs": 2},
    {"temperature": 0, "max_tokens": 35, "repetition_penalty": 1.3},
    {"temperature": 0, "max_tokens": 50, "stop": ["e", "00"], "min_tokens": 5},
    {"temperature": 0.7, "seed": 9, "max_tokens": 20, "speculation": "off"},
]


@pytest.mark.parametrize("slots", [2, 5])
def test_an_answer_does_not_hang_on_its_neighbours(slots: int, tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, slots=1) as llm:
        alone = [llm.generate(text, **way) for text in TEXTS for way in WAYS]
    with LLM(tiny_bundle, slots=slots) as llm:
        calls = [
            Call(lambda text=text, way=way: llm.generate(text, **way))  # type: ignore[misc]
            for text in TEXTS
            for way in WAYS
        ]
        for call, expected in zip(calls, alone, strict=True):
            answer: Any = call.result(60)
            assert (answer.tokens, answer.text) == (expected.tokens, expected.text)
            for ours, theirs in zip(answer.logprobs or (), expected.logprobs or (), strict=True):
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        stats = llm.stats()
    assert stats.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert stats.rows_per_step > 1.2


def test_scores_beside_answers(tiny_bundle: Path) -> None:
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    with LLM(tiny_bundle, slots=3) as llm:
        expected = llm.score(text)
        answers = [
            Call(lambda: llm.generate(TEXTS[0], max_tokens=100, temperature=0)) for _ in range(2)
        ]
        for _ in range(5):
            score: Any = Call(lambda: llm.score(text)).result()
            assert score.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert answers[0].result().tokens == answers[1].result().tokens  # type: ignore[attr-defined]


def test_scores_wait_as_answers_do(tiny_bundle: Path) -> None:
    """By priority; and who waits can be cancelled, or run out of time."""
    gate, entered, order = threading.Event(), threading.Event(), list[str]()

    def hold(so_far: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        entered.set()
        gate.wait(60)
        return logits

    def note(report: RequestReport) -> None:
        order.append(f"{report.kind} {report.outcome}")

    async def ascore() -> None:
        await llm.ascore("a b", priority=2)

    cancel = threading.Event()
    with LLM(tiny_bundle, slots=1, on_request=note) as llm:
        calls = [Call(lambda: llm.generate("a", max_tokens=1, logits_hook=hold))]
        assert entered.wait(60)
        for ask in (
            lambda: llm.generate("a b", max_tokens=1),
            lambda: llm.score("a b", priority=1),
            lambda: asyncio.run(ascore()),
        ):
            calls.append(Call(ask))
            until(lambda: llm.stats().waiting == len(calls) - 1)
        cancelled = Call(lambda: llm.score("a b", cancel=cancel, priority=3))
        until(lambda: llm.stats().waiting == 4)
        cancel.set()
        with pytest.raises(CancelledError):
            cancelled.result()
        with pytest.raises(DeadlineError):
            within(lambda: llm.score("a b", timeout=0.1, priority=3))
        gate.set()
        for call in calls:
            call.result()
    assert order == [
        *("score cancelled", "score timed_out", "answer finished"),
        *("score finished", "score finished", "answer finished"),
    ]


def test_memory_does_not_grow_with_requests(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, slots=4) as llm:
        for round_ in range(3):
            calls = [
                Call(lambda i=i: llm.generate(TEXTS[i % 5], max_tokens=20))  # type: ignore[misc]
                for i in range(20)
            ]
            for call in calls:
                call.result()
            engine = llm._model.engine
            assert not engine._running
            assert not engine._waiting
            assert engine._model is not None
            assert engine._model.slots.busy == 0, round_


def test_a_stream_whose_event_loop_was_closed_ends(tiny_bundle: Path) -> None:
    def slow(so_far: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        time.sleep(0.01)
        return logits

    with LLM(tiny_bundle, slots=1) as llm:
        options: dict[str, Any] = {"max_tokens": 200, "min_tokens": 200, "speculation": "off"}
        stream = llm.astream("a", logits_hook=slow, **options)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(anext(stream))
        loop.close()
        until(lambda: llm.stats().requests == 1)
        assert llm.stats().completion_tokens < 200
        del stream


def test_close_ends_all_rows(tiny_bundle: Path) -> None:
    llm, gate = LLM(tiny_bundle, slots=3), threading.Event()

    def wait(so_far: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        gate.wait(0.05)
        return logits

    calls = [
        Call(lambda: llm.generate("a", max_tokens=200, min_tokens=200, logits_hook=wait))
        for _ in range(8)
    ]
    until(lambda: llm.stats().running == 3)
    within(llm.close)
    for call in calls:
        with pytest.raises(ClosedError):
            call.result()
