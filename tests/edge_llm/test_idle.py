"""An idle model costs no CPU: threads sleep between requests, and so do callers that wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_llm import LLM

# Process CPU seconds in a second of idleness; a single spinning thread would take 1.
SLACK = 0.3
SECOND = 1.0


def cpu_of_a_second() -> float:
    started = time.process_time()
    time.sleep(SECOND)
    return time.process_time() - started


def test_a_model_that_has_answered_is_idle(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle) as llm:
        llm.generate([1, 2, 3], max_tokens=8)
        assert cpu_of_a_second() < SLACK


def test_a_stream_that_nobody_reads_is_idle(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle) as llm:
        stream = llm.stream([1, 2, 3], max_tokens=20, min_tokens=20)
        next(stream)
        time.sleep(0.2)  # the answer is computed meanwhile
        assert cpu_of_a_second() < SLACK
        assert sum(len(chunk.tokens) for chunk in stream) > 0


def test_callers_that_wait_for_a_slow_answer_are_idle(tiny_bundle: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(tokens: Sequence[int], logits: Any) -> Any:
        entered.set()
        assert leave.wait(60)
        return logits

    answers: list[int] = []

    def ask(llm: LLM, **options: Any) -> None:
        answers.append(len(llm.generate([1, 2], max_tokens=2, min_tokens=2, **options).tokens))

    with LLM(tiny_bundle, slots=1) as llm:
        callers = [threading.Thread(target=ask, args=(llm,), kwargs={"logits_hook": slow})]
        callers[0].start()
        assert entered.wait(60)
        # They wait for the only slot, which a slow step holds.
        callers += [threading.Thread(target=ask, args=(llm,)) for _ in range(8)]
        for caller in callers[1:]:
            caller.start()
        try:
            assert cpu_of_a_second() < SLACK
        finally:
            leave.set()
            for caller in callers:
                caller.join(60)
    assert answers == [2] * 9
