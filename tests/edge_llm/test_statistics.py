"""What LLM.stats() says of the work so far, and its speed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_llm import LLM
from edge_llm.engine import statistics
from edge_llm.engine.statistics import Recorder


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
