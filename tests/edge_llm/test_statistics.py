"""What LLM.stats() says of the work so far, and its speed."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_llm import LLM, ArgumentError
from edge_llm.engine import statistics
from edge_llm.engine.statistics import EngineStats, Recorder
from edge_llm.errors import CancelledError, ClosedError, DeadlineError, QueueFullError
from edge_llm.results import RequestReport
from tests.edge_llm.test_engine import LONG, Call, until


class Clock:
    """Stands still until it is set."""

    now = 100.0


def speed(recorder: Recorder) -> float:
    return recorder.snapshot(slots=1, running=0, waiting=0).tokens_per_second


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(statistics, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_speed_is_that_of_the_last_seconds(clock: Clock) -> None:
    recorder = Recorder()
    assert speed(recorder) == 0
    recorder.chosen(1)
    assert speed(recorder) == 0, "one moment is no time"
    clock.now += 1e-4
    assert speed(recorder) == 0
    clock.now = 100.0
    for step in range(1, 1001):  # 4 rows have a token every 20 ms, for 20 seconds
        clock.now = 100 + step * 0.02
        recorder.chosen(4)
        if step >= 2:
            assert speed(recorder) == pytest.approx(200, rel=0.01)
    clock.now += 5
    assert speed(recorder) == pytest.approx(100, rel=0.02), "idle for half the time"
    clock.now += 6
    assert speed(recorder) == 0


def test_the_prompts_time_is_part_of_it(clock: Clock) -> None:
    recorder = Recorder()
    recorder.chosen(0)  # a chunk of a prompt
    clock.now += 1
    recorder.chosen(1)
    clock.now += 1
    recorder.chosen(1)
    assert speed(recorder) == 1


def test_time_in_the_queue(tiny_bundle: Path) -> None:
    go_on = threading.Event()

    def hold(so_far: Any, logits: Any) -> Any:
        go_on.wait(10)
        return logits

    with LLM(tiny_bundle, slots=1) as llm, ThreadPoolExecutor(2) as pool:
        first = pool.submit(llm.generate, "a", max_tokens=1, logits_hook=hold)
        while llm.stats().running == 0:
            assert not first.done()
        second = pool.submit(llm.generate, "b", max_tokens=1)
        while llm.stats().waiting == 0:
            assert not second.done()
        go_on.wait(0.1)
        go_on.set()
        queued = sum(one.result().timings.queued for one in (first, second))
        assert llm.stats().queued_seconds == pytest.approx(queued, abs=0.05)
        assert queued > 0.1


def test_rates_are_those_of_all_answers_together(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, slots=1) as llm:
        empty = llm.stats()
        assert (empty.cache_hit_rate, empty.acceptance_rate, empty.rows_per_step) == (0, 0, 0)
        prompt = llm.tokenize("the age of wisdom, it was the age of wisdom, it was the age")
        answers = [llm.generate(prompt, max_tokens=n, temperature=0).usage for n in (30, 10, 60)]
        stats = llm.stats()
    reused = sum(one.reused_tokens for one in answers)
    assert stats.cache_hit_rate == reused / (3 * len(prompt)) > 0.5
    drafted, accepted = (
        sum(getattr(one, name) for one in answers) for name in ("drafted_tokens", "accepted_tokens")
    )
    assert stats.acceptance_rate == accepted / drafted > 0


# Each request's one report


def outcomes(stats: EngineStats) -> dict[str, int]:
    """How many requests ended in each way; their sum is that of all."""
    names = ("finished", "cancelled", "timed_out", "refused", "failed")
    counts = {name: getattr(stats, name) for name in names}
    assert sum(counts.values()) == stats.requests
    return {name: count for name, count in counts.items() if count}


def fail(so_far: Any, logits: Any) -> Any:
    if len(so_far) == 7:
        raise ZeroDivisionError
    return logits


def test_answers_end_in_one_report_each(tiny_bundle: Path) -> None:
    reports: list[RequestReport] = []
    cancel = threading.Event()
    cancel.set()
    prompt = [5, 6, 7, 8]
    with LLM(tiny_bundle, slots=1, on_request=reports.append) as llm:
        llm.generate(prompt, max_tokens=3, min_tokens=3)
        llm.generate(prompt, cancel=cancel)
        llm.generate(prompt, timeout=1e-9)
        with pytest.raises(ZeroDivisionError):
            llm.generate(prompt, max_tokens=9, min_tokens=9, logits_hook=fail)
        stream = llm.stream(prompt, max_tokens=200, min_tokens=200)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        until(lambda: llm.stats().requests == 5)
        stats = llm.stats()
    ways = ["finished", "cancelled", "timed_out", "failed", "cancelled"]
    assert [report.outcome for report in reports] == ways
    assert outcomes(stats) == {"finished": 1, "cancelled": 2, "timed_out": 1, "failed": 1}
    failed = reports[3]
    assert isinstance(failed.error, ZeroDivisionError)
    assert failed.finish_reason is None
    assert failed.usage is not None
    assert failed.timings is not None
    # Three tokens were chosen, and two of the prompt's were still there.
    assert (failed.usage.completion_tokens, failed.usage.reused_tokens) == (3, 2)
    usages = [report.usage for report in reports if report.usage is not None]
    assert len(usages) == 5
    assert stats.completion_tokens == sum(usage.completion_tokens for usage in usages)
    assert stats.prompt_tokens == 5 * len(prompt)


def test_other_requests_end_in_one_report_each(tiny_bundle: Path, tmp_path: Path) -> None:
    reports: list[RequestReport] = []
    cancel = threading.Event()
    cancel.set()
    with LLM(tiny_bundle, on_request=reports.append) as llm:
        llm.score([5, 6, 7])
        with pytest.raises(CancelledError):
            llm.score([5, 6, 7], cancel=cancel)
        with pytest.raises(DeadlineError):
            llm.score([5, 6, 7], timeout=1e-9)
        llm.logits([5, 6])
        llm.save_session(tmp_path / "session")
        stats = llm.stats()
    assert [(one.kind, one.outcome, one.finish_reason, one.usage) for one in reports] == [
        ("score", "finished", None, None),
        ("score", "cancelled", "cancelled", None),
        ("score", "timed_out", "timeout", None),
        ("logits", "finished", None, None),
        ("session", "finished", None, None),
    ]
    assert outcomes(stats) == {"finished": 3, "cancelled": 1, "timed_out": 1}


def test_refused_and_unserved_requests_end_in_one_report_each(tiny_bundle: Path) -> None:
    reports: list[RequestReport] = []
    gate = threading.Event()

    def hold(so_far: Any, logits: Any) -> Any:
        gate.wait(LONG)
        return logits

    llm = LLM(tiny_bundle, slots=1, queue_limit=1, on_request=reports.append)
    running = Call(lambda: llm.generate([5], max_tokens=1, logits_hook=hold))
    until(lambda: llm.stats().running)
    waiting = Call(lambda: llm.generate([5, 6], max_tokens=1))
    until(lambda: llm.stats().waiting)

    async def refused() -> None:
        await llm.agenerate([5, 6, 7], max_tokens=1)

    for ask in (
        lambda: llm.generate([5, 6, 7], max_tokens=1),
        lambda: list(llm.stream([5, 6, 7], max_tokens=1)),
        lambda: asyncio.run(refused()),
        lambda: llm.score([5, 6, 7]),
    ):
        with pytest.raises(QueueFullError):
            ask()
    assert [report.outcome for report in reports] == ["refused"] * 4
    assert {report.usage for report in reports} == {None}
    assert llm.stats().prompt_tokens == 0
    # A batch asks again until there is room: that is one request, and none refused.
    batch = Call(lambda: list(llm.batch([[7, 8]] * 2, max_tokens=1)))
    with pytest.raises(ArgumentError):
        llm.generate([5], max_tokens=0)
    assert outcomes(llm.stats()) == {"refused": 4}
    gate.set()
    for call in (running, waiting, batch):
        call.result()
    assert outcomes(llm.stats()) == {"refused": 4, "finished": 4}
    gate.clear()
    running = Call(lambda: llm.generate([5], max_tokens=1, logits_hook=hold))
    until(lambda: llm.stats().running)
    waiting = Call(lambda: llm.generate([5, 6], max_tokens=1))
    until(lambda: llm.stats().waiting)
    closing = Call(llm.close)
    until(llm._model.engine._closed.is_set)
    gate.set()
    closing.result()
    for call in (running, waiting):
        with pytest.raises(ClosedError):
            call.result()
    assert [report.outcome for report in reports[-2:]] == ["failed"] * 2
    assert outcomes(llm.stats()) == {"refused": 4, "finished": 4, "failed": 2}
    assert len(reports) == 10
