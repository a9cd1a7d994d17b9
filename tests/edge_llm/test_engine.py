"""Jobs of many threads on one model, ended in every way that there is; no onnxruntime needed."""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm.engine import thread
from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.engine.drafting import Drafting
from edge_llm.engine.job import Feed, Job, Steps
from edge_llm.engine.scheduler import Engine
from edge_llm.engine.slot import Slot
from edge_llm.engine.slots import Slots
from edge_llm.engine.step_costs import StepCosts
from edge_llm.engine.stepper import Stepper
from edge_llm.errors import ArgumentError, ClosedError, RuntimeFailure
from edge_llm.results import RequestReport
from edge_llm.runtime.decoder import Decoder, Interrupted
from edge_llm.runtime.kv_cache import KVCache

VOCAB = 16
LONG = 60.0  # a step that nobody would wait for: whoever passes a test has ended it
SOON = 10.0  # far above what an idle machine needs, far below LONG

T = TypeVar("T")


class FakeDecoder:
    """The decoder's interface; the likeliest token is the last one plus one."""

    def __init__(self, *, rows: int = 1, capacity: int = 256, delay: float = 0.0) -> None:
        self.cache = KVCache((), rows=rows, capacity=capacity)
        self.rows = rows
        self.widest = 64
        self.verifies = True
        self.batches: list[int] = []
        self.delay = delay
        self.in_step = threading.Event()
        self.fed: list[tuple[list[int], int]] = []
        self.threads: set[int] = set()
        self._terminate = threading.Event()

    def step(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        return self.step_rows([tokens], scored=[scored])

    def step_rows(
        self,
        tokens: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        scored: Sequence[int],
        first: int = 0,
    ) -> NDArray[np.float32]:
        past = self.cache.lengths[first : first + len(tokens)]
        assert max(map(len, tokens)) > 0
        assert all(len(t) <= self.cache.capacity - n for t, n in zip(tokens, past, strict=True))
        self.threads.add(threading.get_ident())
        self.in_step.set()
        if self._terminate.wait(self.delay):
            raise Interrupted
        past += [len(row) for row in tokens]
        self.batches.append(sum(1 for row in tokens if len(row)))
        last = []
        for row, count in zip(tokens, scored, strict=True):
            if len(row):
                self.fed.append(([int(token) for token in row], count))
            last += [int(token) for token in row[len(row) - count :]]
        logits = np.zeros((len(last), VOCAB), np.float32)
        logits[range(len(last)), [(token + 1) % VOCAB for token in last]] = 1
        return logits

    def interrupt(self) -> None:
        self._terminate.set()

    def resume(self) -> None:
        self._terminate.clear()


class Counting(Job):
    """Feeds ``count`` tokens, one a step, and puts each; the last result says how it ended."""

    kind = "answer"

    def __init__(
        self,
        count: int = 3,
        *,
        cancel: threading.Event | None = None,
        timeout: float | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(cancel=cancel, timeout=timeout)
        self.count = count
        self.before = before
        self.ran = threading.Event()

    def steps(self, slot: Slot) -> Steps:
        self.ran.set()
        slot.clear()
        if self.before is not None:
            self.before()
        for i in range(self.count):
            yield Feed([i % VOCAB])
            self.put(i)
        self.put("stop")

    def interrupted(self) -> None:
        self.put(self.ended() or "cancelled")


def make_engine(
    decoder: FakeDecoder, *, fixed: int | None = 4, queue_limit: int = 100, on_request: Any = None
) -> tuple[Engine, Slots]:
    whole = cast("Decoder", decoder)
    planner = ChunkPlanner(fixed=fixed, widest=64, single_token=0.01)
    drafting = Drafting(StepCosts(single=0.01), possible=True, vocab=VOCAB)
    slots = Slots(whole.cache, decoder.rows)
    stepper = Stepper(whole, planner, drafting)
    engine = Engine(whole, stepper, slots, queue_limit=queue_limit, on_request=on_request)
    return engine, slots


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def engine(decoder: FakeDecoder) -> Iterator[Engine]:
    engine, _ = make_engine(decoder)
    yield engine
    decoder.interrupt()  # should a test have failed in the middle of a step
    within(engine.close)


class Call(threading.Thread):
    """A function on a thread of its own, so that a deadlock fails a test and does not stop it."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.value: object = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error

    def result(self, seconds: float = SOON) -> object:
        self.join(seconds)
        if self.is_alive():
            faulthandler.dump_traceback()
            pytest.fail(f"not done after {seconds} seconds")
        if self.error is not None:
            raise self.error
        return self.value


def within(function: Callable[[], T]) -> T:
    return cast("T", Call(function).result())


def serve(engine: Engine, job: Job) -> list[object]:
    return within(lambda: list(engine.execute(job)))


def start(engine: Engine, job: Job) -> Call:
    return Call(lambda: list(engine.execute(job)))


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


def assert_serves(engine: Engine) -> None:
    assert serve(engine, Counting(2)) == [0, 1, "stop"]


def test_a_job_gives_its_results_in_order(engine: Engine, decoder: FakeDecoder) -> None:
    assert serve(engine, Counting(5)) == [0, 1, 2, 3, 4, "stop"]
    assert serve(engine, Counting(0)) == ["stop"]
    assert [tokens for tokens, _ in decoder.fed] == [[i] for i in range(5)]


def test_all_steps_are_done_on_one_thread(engine: Engine, decoder: FakeDecoder) -> None:
    assert decoder.threads == set(), "nothing runs before the first job"
    for call in [start(engine, Counting()) for _ in range(5)]:
        assert call.result() == [0, 1, 2, "stop"]
    assert len(decoder.threads) == 1
    assert threading.get_ident() not in decoder.threads


def test_jobs_are_served_in_the_order_in_which_they_came(engine: Engine) -> None:
    order: list[int] = []
    gate, first = blocked(engine)
    calls = [first]
    for i in range(6):
        calls.append(start(engine, Counting(1, before=partial(order.append, i))))
        until(lambda: len(engine._waiting) == len(calls) - 1)
    gate.set()
    for call in calls:
        call.result()
    assert order == list(range(6))


def test_a_slow_reader_holds_nobody_up(engine: Engine) -> None:
    slow = engine.execute(Counting(200))
    assert within(lambda: next(slow)) == 0
    assert_serves(engine)
    # And nothing of what it was slow to read is lost.
    assert within(lambda: list(slow)) == [*range(1, 200), "stop"]


def test_a_job_is_queued_by_the_first_read(engine: Engine) -> None:
    never = engine.execute(Counting())
    assert_serves(engine)
    never.close()
    assert not engine._waiting


class Endless(Counting):
    """Nobody but the caller ends it."""

    def steps(self, slot: Slot) -> Steps:
        while True:
            slot.clear()
            yield Feed([1])
            self.put("more")


@pytest.mark.parametrize("how", ["close", "drop", "throw"])
def test_an_abandoned_job_makes_room(how: str, engine: Engine, decoder: FakeDecoder) -> None:
    decoder.delay = 0.001
    job = Endless()
    results = engine.execute(job)
    assert within(lambda: next(results)) == "more"
    if how == "close":
        results.close()
    elif how == "drop":
        del results
        gc.collect()
    else:
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt())
    assert job.ended() == "cancelled"
    assert_serves(engine)


def test_an_abandoned_job_is_interrupted_inside_its_step(
    engine: Engine, decoder: FakeDecoder
) -> None:
    class Stalling(Counting):
        def steps(self, slot: Slot) -> Steps:
            yield Feed([0])
            decoder.delay = LONG
            decoder.in_step.clear()
            self.put(0)
            yield Feed([1])

    results = engine.execute(Stalling())
    assert within(lambda: next(results)) == 0
    until(decoder.in_step.is_set)
    results.close()
    decoder.delay = 0
    assert_serves(engine)


def blocked(engine: Engine) -> tuple[threading.Event, Call]:
    """Occupy the engine until the event is set."""
    gate = threading.Event()
    call = start(engine, Counting(1, before=gate.wait))
    until(lambda: engine._running)
    return gate, call


@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
def test_a_waiting_job_ends_at_once(reason: str, engine: Engine) -> None:
    gate, first = blocked(engine)
    cancel = threading.Event()
    job = Counting(cancel=cancel, timeout=0.1 if reason == "timeout" else None)
    call = start(engine, job)
    until(lambda: job in engine._waiting)
    last = start(engine, Counting(1))
    if reason == "cancelled":
        cancel.set()
    assert call.result() == [reason]
    assert not job.ran.is_set()
    gate.set()
    assert first.result() == [0, "stop"]
    assert last.result() == [0, "stop"]
    assert not job.ran.is_set()


def test_a_job_that_was_cancelled_before_it_came(engine: Engine) -> None:
    cancel = threading.Event()
    cancel.set()
    assert serve(engine, Counting(cancel=cancel)) == ["cancelled"]
    assert serve(engine, Counting(timeout=1e-9)) == ["timeout"]
    assert_serves(engine)


@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
def test_a_step_ends_in_the_middle(reason: str, engine: Engine, decoder: FakeDecoder) -> None:
    assert serve(engine, Counting(3)) == [0, 1, 2, "stop"]
    decoder.in_step.clear()
    decoder.delay = LONG
    cancel = threading.Event()
    call = start(engine, Counting(cancel=cancel, timeout=0.2 if reason == "timeout" else None))
    until(decoder.in_step.is_set)
    if reason == "cancelled":
        cancel.set()
    assert call.result() == [reason]
    assert decoder.cache.lengths[0] == 0, "the step that was ended left nothing behind"
    decoder.delay = 0
    assert_serves(engine)


def test_the_end_of_one_job_does_not_end_the_next(engine: Engine, decoder: FakeDecoder) -> None:
    # The interrupt of a job may come when its last step is already done.
    for _ in range(50):
        cancel = threading.Event()
        call = start(engine, Counting(1, cancel=cancel, before=cancel.set))
        assert call.result() in (["cancelled"], [0, "stop"])
        assert_serves(engine)


class Prompting(Job):
    """Computes a prompt, putting what is done of it, and the token that comes next."""

    kind = "answer"

    def __init__(self, prompt: Sequence[int], *, cancel: threading.Event | None = None) -> None:
        super().__init__(cancel=cancel, timeout=None, prompt=np.array(prompt, np.int64))

    def steps(self, slot: Slot) -> Steps:
        reused, logits = slot.rewind(self.prompt), None
        while logits is None:
            self.put(slot.length)
            logits = yield Feed(self.prompt[slot.length :])
        self.put((reused, int(logits.argmax())))

    def interrupted(self) -> None:
        self.put("interrupted")


def test_a_prompt_is_cancelled_between_its_chunks(engine: Engine, decoder: FakeDecoder) -> None:
    cancel, prompt = threading.Event(), list(range(14))
    results = []
    decoder.delay = 0.05
    for result in engine.execute(Prompting(prompt, cancel=cancel)):
        results.append(result)
        cancel.set()
    assert results[-1] == "interrupted"
    done = int(decoder.cache.lengths[0])
    assert done < len(prompt)
    decoder.delay = 0
    # What was computed is kept, and is right.
    *progress, last = serve(engine, Prompting(prompt))
    assert last == (done, 14)
    assert progress == list(range(done, 14, 4))
    assert [t for tokens, _ in decoder.fed for t in tokens] == prompt


class OddError(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), OddError("odd"), SystemExit(3), KeyboardInterrupt(), StopIteration(1)],
)
def test_what_a_job_raises_reaches_its_caller_and_nobody_else(
    error: BaseException, engine: Engine
) -> None:
    def fail() -> None:
        raise error

    gate, _ = blocked(engine)
    bad = start(engine, Counting(before=fail))
    until(lambda: len(engine._waiting) == 1)
    good = start(engine, Counting(1))
    gate.set()
    # Python turns a StopIteration that leaves a generator into a RuntimeError.
    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(expected) as caught:
        bad.result()
    assert error in (caught.value, caught.value.__cause__)
    assert good.result() == [0, "stop"]
    assert_serves(engine)


def test_an_error_while_a_job_is_being_ended(engine: Engine, decoder: FakeDecoder) -> None:
    class Clumsy(Counting):
        def interrupted(self) -> None:
            raise OddError("while ending")

    decoder.delay = LONG
    with pytest.raises(OddError):
        serve(engine, Clumsy(timeout=0.1))
    decoder.delay = 0
    gate, _ = blocked(engine)
    with pytest.raises(OddError):
        serve(engine, Clumsy(timeout=0.1))
    gate.set()
    assert_serves(engine)


class Broken(threading.Event):
    """A caller's own kind of event, which fails once it is told to."""

    def is_set(self) -> bool:
        if super().is_set():
            raise OddError("a broken event")
        return False


@pytest.mark.parametrize("when", ["waiting", "between steps", "inside a step"])
def test_a_cancel_event_that_raises_ends_its_own_job_alone(when: str) -> None:
    decoder = FakeDecoder(rows=1 if when == "waiting" else 2)
    engine, _ = make_engine(decoder)
    cancel, gate = Broken(), threading.Event()
    good = start(engine, Counting(1, before=gate.wait))
    until(lambda: engine._running)
    bad = start(engine, Endless(cancel=cancel))
    until(lambda: len(engine._waiting) == 1)
    if when == "waiting":
        cancel.set()
        with pytest.raises(OddError):
            bad.result()
    gate.set()
    assert good.result() == [0, "stop"]
    if when == "inside a step":
        decoder.in_step.clear()
        decoder.delay = LONG
        until(decoder.in_step.is_set)
    cancel.set()
    with pytest.raises(OddError):
        bad.result()
    decoder.delay = 0
    assert_serves(engine)
    within(engine.close)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), OddError()])
def test_whatever_on_request_raises_the_engine_lives_on(error: BaseException) -> None:
    def fail(report: RequestReport) -> None:
        raise error

    engine, _ = make_engine(FakeDecoder(), on_request=fail)
    assert_serves(engine)
    assert_serves(engine)
    within(engine.close)


def test_an_engine_that_fails_ends_everything(
    engine: Engine, decoder: FakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, running = blocked(engine)
    waiting = [start(engine, Counting()) for _ in range(3)]
    until(lambda: len(engine._waiting) == 3)

    def fail() -> None:
        raise OddError("a defect")

    monkeypatch.setattr(decoder, "resume", fail)
    gate.set()
    for call in (running, *waiting):
        with pytest.raises(RuntimeFailure, match="a defect") as caught:
            call.result()
        assert isinstance(caught.value.__cause__, OddError)
    with pytest.raises(ClosedError):
        serve(engine, Counting())
    within(engine.close)


def test_a_job_that_goes_while_it_gets_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may find the iterator of a job's results on the engine's thread."""
    engine, slots = make_engine(FakeDecoder())
    job, take = Counting(), slots.take
    results = engine.execute(job)

    def collect(prompt: NDArray[np.int64], *, latest: bool = False) -> Slot | None:
        slot = take(prompt, latest=latest)
        if not job.ended():
            engine.abandon(job)
        return slot

    monkeypatch.setattr(slots, "take", collect)
    assert within(lambda: list(results)) == ["cancelled"]
    assert not job.ran.is_set()
    assert_serves(engine)
    assert not slots.busy
    within(engine.close)


def test_close_ends_a_job_that_is_getting_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FakeDecoder()
    decoder.delay = LONG
    engine, slots = make_engine(decoder)
    closing: list[Call] = []
    take = slots.take

    def close(prompt: NDArray[np.int64], *, latest: bool = False) -> Slot | None:
        slot = take(prompt, latest=latest)
        closing.append(Call(engine.close))
        until(engine._closed.is_set)
        return slot

    monkeypatch.setattr(slots, "take", close)
    with pytest.raises(ClosedError):
        serve(engine, Counting())
    until(lambda: closing)
    closing[0].result()
    assert not decoder.fed


def test_nobody_waits_for_a_row_that_is_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, slots = make_engine(FakeDecoder(rows=2))
    copying, gate, take = threading.Event(), threading.Event(), slots.take

    def copy(prompt: NDArray[np.int64], *, latest: bool = False) -> Slot | None:
        copying.set()
        gate.wait(LONG)
        return take(prompt, latest=latest)

    monkeypatch.setattr(slots, "take", copy)
    jobs = [Counting(), Counting()]
    calls = [start(engine, jobs[0])]
    until(copying.is_set)
    calls.append(start(engine, jobs[1]))
    until(lambda: within(engine.stats).waiting == 2)
    within(lambda: engine.abandon(jobs[1]))
    assert calls[1].result() == ["cancelled"]
    gate.set()
    assert calls[0].result() == [0, 1, 2, "stop"]
    within(engine.close)


def test_a_system_without_a_thread_left(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    start_thread = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "edge_llm-engine":
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            serve(engine, Counting())
    assert engine.stats().waiting == 0
    assert_serves(engine)


def test_a_job_that_asks_its_own_engine_is_refused(engine: Engine) -> None:
    with pytest.raises(ArgumentError, match="logits_hook"):
        serve(engine, Counting(before=lambda: list(engine.execute(Counting()))))
    assert_serves(engine)


def test_the_function_is_named_that_asks_its_own_engine() -> None:
    errors: list[str] = []

    def ask(report: RequestReport) -> None:
        with pytest.raises(ArgumentError) as caught:
            list(busy.execute(Counting()))
        errors.append(caught.value.argument)

    busy, _ = make_engine(FakeDecoder(), on_request=ask)
    assert_serves(busy)
    with pytest.raises(ArgumentError, match="logits_hook"):
        serve(busy, Counting(before=lambda: list(busy.execute(Counting()))))
    within(busy.close)
    assert errors == ["on_request", "on_request"]


def test_close_ends_the_running_job_and_those_that_wait(
    engine: Engine, decoder: FakeDecoder
) -> None:
    decoder.delay = LONG
    running = start(engine, Counting())
    until(decoder.in_step.is_set)
    waiting = [start(engine, Counting()) for _ in range(3)]
    until(lambda: len(engine._waiting) == 3)
    within(engine.close)
    for call in (running, *waiting):
        with pytest.raises(ClosedError, match="closed"):
            call.result()
    with pytest.raises(ClosedError, match="Load it again"):
        serve(engine, Counting())
    with pytest.raises(ClosedError):
        engine.check_usable()


def test_close_ends_a_job_that_is_between_two_steps(engine: Engine) -> None:
    class Thinking(Counting):
        def steps(self, slot: Slot) -> Steps:
            self.ran.set()
            while not self.ended():
                time.sleep(0.001)
            yield Feed([0])

    job = Thinking()
    call = start(engine, job)
    until(job.ran.is_set)
    within(engine.close)
    with pytest.raises(ClosedError):
        call.result()


def test_close_by_many_at_once_and_again(engine: Engine) -> None:
    assert_serves(engine)
    for call in [Call(engine.close) for _ in range(8)]:
        call.result()
    within(engine.close)
    assert engine._thread.started
    assert not engine._thread.alive


def test_close_of_an_engine_that_was_never_used(engine: Engine) -> None:
    within(engine.close)
    with pytest.raises(ClosedError):
        serve(engine, Counting())


def test_close_from_inside_a_job(engine: Engine) -> None:
    # The garbage collector may close a model on any thread, the engine's own included.
    call = start(engine, Counting(before=engine.close))
    with pytest.raises(ClosedError):
        call.result()
    until(lambda: not engine._thread.alive)


class Hanging:
    """A caller's function that does not return until it may."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        self.gate.wait(LONG)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of callers' are left behind at once."""
    monkeypatch.setattr(thread, "CLOSE_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
def test_close_leaves_a_hook_behind_that_does_not_return(decoder: FakeDecoder) -> None:
    hook, reports = Hanging(), list[RequestReport]()
    engine, slots = make_engine(decoder, on_request=reports.append)
    model = weakref.ref(slots)
    del slots
    calls = [start(engine, Counting(before=hook))]
    assert hook.entered.wait(LONG)
    calls += [start(engine, Counting()) for _ in range(2)]
    until(lambda: len(engine._waiting) == 2)
    within(engine.close)
    for call in calls:
        with pytest.raises(ClosedError):
            call.result()
    with pytest.raises(ClosedError):
        serve(engine, Counting())
    assert not reports
    # What is left to do is done when it returns.
    hook.gate.set()
    until(lambda: not engine._thread.alive)
    assert [report.outcome for report in reports] == ["failed"] * 3
    stats = within(engine.stats)
    assert (stats.requests, stats.running, stats.waiting) == (3, 0, 0)
    del calls
    gc.collect()
    assert model() is None


@pytest.mark.usefixtures("impatient")
def test_close_leaves_on_request_behind_that_does_not_return() -> None:
    hang, reports = Hanging(), list[RequestReport]()

    def on_request(report: RequestReport) -> None:
        hang()
        reports.append(report)

    engine, _ = make_engine(FakeDecoder(rows=2), on_request=on_request)
    first = start(engine, Counting(1))
    assert hang.entered.wait(LONG)
    second = start(engine, Counting(1))
    until(lambda: len(engine._waiting) == 1)
    within(engine.close)
    assert first.result() == [0, "stop"], "it had its answer"
    with pytest.raises(ClosedError):
        second.result()
    hang.gate.set()
    until(lambda: not engine._thread.alive)
    assert [report.outcome for report in reports] == ["finished", "failed"]


@pytest.mark.usefixtures("impatient")
def test_close_leaves_on_request_behind_when_it_is_told_of_the_close() -> None:
    hang, reports = Hanging(), list[RequestReport]()

    def on_request(report: RequestReport) -> None:
        if report.outcome == "failed":
            hang()
        reports.append(report)

    engine, _ = make_engine(FakeDecoder(), on_request=on_request)
    hook = Hanging()
    calls = [start(engine, Counting(before=hook))]
    assert hook.entered.wait(LONG)
    calls += [start(engine, Counting()) for _ in range(3)]
    until(lambda: len(engine._waiting) == 3)
    closing = Call(engine.close)
    until(engine._closed.is_set)
    hook.gate.set()
    closing.result()
    for call in calls:
        with pytest.raises(ClosedError):
            call.result()
    hang.gate.set()
    until(lambda: not engine._thread.alive)
    assert [report.outcome for report in reports] == ["failed"] * 4
    assert not engine._waiting
    assert not engine._running


@pytest.mark.usefixtures("impatient")
def test_a_hook_may_wait_for_the_thread_that_closes(engine: Engine) -> None:
    closing: list[Call] = []

    def close() -> None:
        closing.append(Call(engine.close))
        closing[0].result()

    call = start(engine, Counting(before=close))
    with pytest.raises(ClosedError):
        call.result()
    closing[0].result()
    until(lambda: not engine._thread.alive)


@pytest.mark.usefixtures("impatient")
def test_close_waits_for_a_step_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python must not end while the graph runs, even where a step does not end early."""
    decoder, stepping = FakeDecoder(), Hanging()
    engine, _ = make_engine(decoder)
    step_rows = decoder.step_rows

    def slow(*args: Any, **kwargs: Any) -> Any:
        stepping()
        return step_rows(*args, **kwargs)

    monkeypatch.setattr(decoder, "step_rows", slow)
    monkeypatch.setattr(decoder, "interrupt", lambda: None)
    call = start(engine, Counting())
    assert stepping.entered.wait(LONG)
    closing = Call(engine.close)
    closing.join(0.3)
    assert closing.is_alive()
    stepping.gate.set()
    closing.result()
    with pytest.raises(ClosedError):
        call.result()


def test_a_reader_that_is_behind_gets_what_was_there_before_close(engine: Engine) -> None:
    results = engine.execute(Counting(3))
    assert within(lambda: next(results)) == 0
    until(lambda: not engine._running)
    within(engine.close)
    assert within(lambda: list(results)) == [1, 2, "stop"]


def test_close_frees_the_model() -> None:
    decoder = FakeDecoder()
    engine, slots = make_engine(decoder)
    assert_serves(engine)
    alive: list[weakref.ref[Any]] = [weakref.ref(decoder), weakref.ref(slots)]
    within(engine.close)
    del decoder, slots
    gc.collect()
    assert [one() for one in alive] == [None, None]


def test_results_of_old_jobs_are_not_kept(engine: Engine) -> None:
    job = Counting(1)
    alive = weakref.ref(job)
    assert serve(engine, job) == [0, "stop"]
    until(lambda: not engine._running)
    del job
    gc.collect()
    until(lambda: alive() is None)


FORK = """
    import os, sys, threading, time
    sys.path.insert(0, {tests!r})
    from test_engine import Counting, FakeDecoder, make_engine
    from edge_llm.errors import ForkError

    engine, _ = make_engine(FakeDecoder())
    assert list(engine.execute(Counting(1))) == [0, "stop"]
    held = threading.Event()

    def hold():  # as the engine's thread does when it takes a job
        with engine._changed:
            held.set()
            time.sleep(1)

    if {locked}:
        threading.Thread(target=hold, daemon=True).start()
        held.wait()
    pid = os.fork()
    if pid == 0:
        for ask in (lambda: list(engine.execute(Counting(1))), engine.stats) * 2:
            try:
                ask()
            except ForkError as error:
                assert "spawn" in error.remedy and "forked" in error.message
            else:
                os._exit(1)
        engine.close()
        sys.exit(42)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert list(engine.execute(Counting(1))) == [0, "stop"]
    engine.close()
    print("fine")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
@pytest.mark.parametrize("locked", [False, True])
def test_a_forked_child_is_told_what_to_do_and_exits_cleanly(locked: bool) -> None:
    code = textwrap.dedent(FORK).format(tests=os.path.dirname(__file__), locked=locked)  # noqa: PTH120
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def customer(engine: Engine, seed: int) -> int:
    """Twenty requests, most of them ended early in one way or another."""
    rng = random.Random(seed)
    for _ in range(20):
        steps, cancel = rng.randrange(30), threading.Event()
        way = rng.choice(["plain", "timeout", "cancel", "later", "close", "fail", "late"])
        timeout = rng.random() * 0.02 if way == "timeout" else None
        before: Callable[[], object] | None = cancel.set if way == "late" else None
        if way == "fail":
            before = partial(divmod, 1, 0)
        results = engine.execute(Counting(steps, cancel=cancel, timeout=timeout, before=before))
        if way == "cancel":
            cancel.set()
        timer = threading.Timer(rng.random() * 0.02, cancel.set)
        if way == "later":
            timer.start()
        got: list[object] = []
        try:
            for result in results:
                got.append(result)
                if way == "close" and rng.random() < 0.3:
                    results.close()
        except ZeroDivisionError:
            assert way == "fail"
            continue
        finally:
            timer.cancel()
        counted = [one for one in got if isinstance(one, int)]
        assert counted == list(range(len(counted)))
        if got[-1:] == ["stop"]:
            assert len(counted) == steps
        else:
            assert way != "plain"
    return seed


def test_many_threads_and_many_ways_to_end(engine: Engine, decoder: FakeDecoder) -> None:
    decoder.delay = 0.0005
    calls = [Call(partial(customer, engine, seed)) for seed in range(8)]
    assert [call.result(60) for call in calls] == list(range(8))
    assert not engine._waiting
    until(lambda: not engine._running)
    assert len(decoder.threads) == 1
    assert_serves(engine)


def test_close_under_load(engine: Engine, decoder: FakeDecoder) -> None:
    decoder.delay = 0.0005
    calls = [Call(partial(customer, engine, seed)) for seed in range(8)]
    until(lambda: len(decoder.fed) > 50)
    within(engine.close)
    for call in calls:
        with pytest.raises(ClosedError):
            call.result()


tokens = st.integers(0, 2)


def feed(decoder: FakeDecoder, slot: Slot, fed: Sequence[int]) -> None:
    slot.note(fed)
    decoder.step_rows([fed], scored=[0], first=slot.row)


@given(st.lists(tokens, max_size=12), st.lists(tokens, min_size=1, max_size=12))
def test_the_longest_common_prefix_is_kept(held: list[int], prompt: list[int]) -> None:
    decoder = FakeDecoder(capacity=16)
    slot = Slot(decoder.cache, 0)
    if held:
        feed(decoder, slot, held)
    common = 0
    while common < min(len(held), len(prompt) - 2) and held[common] == prompt[common]:
        common += 1
    assert slot.rewind(np.array(prompt, np.int64)) == common
    assert slot.length == common
    feed(decoder, slot, prompt[common:])
    # What is held now is what was fed.
    assert slot.rewind(np.array([*prompt, 0, 0], np.int64)) == len(prompt)


@given(st.lists(tokens, min_size=1, max_size=20), st.integers(1, 5))
def test_a_prompt_is_fed_in_chunks_and_only_its_end_is_scored(
    prompt: list[int], fixed: int
) -> None:
    decoder = FakeDecoder()
    engine, _ = make_engine(decoder, fixed=fixed)
    *progress, last = list(engine.execute(Prompting(prompt)))
    engine.close()
    assert last == (0, prompt[-1] + 1)
    assert progress == list(range(0, len(prompt), fixed))
    assert [t for fed, _ in decoder.fed for t in fed] == prompt
    assert [scored for _, scored in decoder.fed] == [0] * (len(progress) - 1) + [1]


def test_tokens_behind_a_rewound_cache_are_forgotten() -> None:
    decoder = FakeDecoder()
    slot = Slot(decoder.cache, 0)
    feed(decoder, slot, [1, 2, 3, 4])
    assert slot.rewind(np.array([1, 2, 9, 9])) == 2
    # 3 and 4 still stand in memory, but are no longer in the cache.
    assert slot.rewind(np.array([1, 2, 3, 4, 5, 6])) == 2
    slot.clear()
    assert slot.rewind(np.array([1, 2, 3])) == 0


def test_an_interrupted_chunk_leaves_the_cache_valid(decoder: FakeDecoder, engine: Engine) -> None:
    cancel = threading.Event()

    class Interrupting(Prompting):
        def put(self, result: object) -> None:
            super().put(result)
            if result == 8:
                decoder.delay = LONG
                cancel.set()

    assert serve(engine, Interrupting(range(10), cancel=cancel)) == [0, 4, 8, "interrupted"]
    decoder.delay = 0
    prompt = [0, 1, 2, 3, 4, 5, 6, 7, 9, 9]
    assert serve(engine, Prompting(prompt)) == [8, (8, 10)]
