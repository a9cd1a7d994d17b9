"""A thousand requests of every kind at once on a real model, and each gets its own answer."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm import LLM, Completion
from edge_llm.decoding.sampling import LogitsHook
from edge_llm.engine.statistics import EngineStats
from edge_llm.results import RequestReport
from edge_llm.runtime import device
from edge_llm_export import export_model
from edge_llm_export.builtin.evaluation import held_out_split
from edge_llm_export.builtin.train import CHECKPOINT

REQUESTS = 1000
CLIENTS = 24
SLOTS = 6

# Most prompts have more than one chunk; a batch of two takes two places in the queue.
MANY: dict[str, Any] = {
    "slots": SLOTS,
    "queue_limit": 2 * CLIENTS,
    "prefill_chunk": 16,
    "threads": 1,
}

# On quantized weights a row of a batch rounds otherwise than a row alone: by at most this share of
# its logits' range (README: "Many requests").
TOLERANCE = 0.03

# Of the calls that give one answer, those that somebody or something ends early among them.
SINGLE = (*["plain"] * 6, "cancel", "timeout", "close", "hook", "async")

Answer = tuple[Sequence[float], str]
"""Tokens (of a score: log-probabilities), and how they ended."""


@dataclass
class Asked:
    """One request."""

    messages: list[dict[str, str]]
    options: dict[str, Any] = field(default_factory=dict)
    way: str = "plain"
    delay: float = 0.0

    @property
    def count(self) -> int:
        """How many requests the engine sees."""
        return 2 if self.way in ("batch", "samples") else 1


def requests(seed: int, ways: Sequence[str]) -> list[Asked]:
    rng = random.Random(seed)
    texts = [one.request for one in held_out_split(300)]
    asked = []
    for i in range(REQUESTS):
        text = rng.choice(texts)
        if rng.random() < 0.1:  # longer ones, of many chunks
            text = " ".join(rng.choice(texts) for _ in range(rng.randrange(2, 8)))
        options: dict[str, Any] = {"max_tokens": rng.choice([1, 3, 9, 30]), "temperature": 0}
        if rng.random() < 0.4:
            options |= {"temperature": rng.choice([0.7, 1.3]), "top_k": 40, "seed": i}
        if rng.random() < 0.2:
            options["stop"] = rng.sample(['"', "kitchen", "e", ":{"], 2)
        if rng.random() < 0.1:
            options["priority"] = rng.randrange(-2, 3)
        messages = [{"role": "user", "content": text}]
        asked.append(Asked(messages, options, rng.choice(ways), rng.random() * 0.03))
    return asked


class HookError(Exception):
    """A function of the caller's that fails."""


def serve(llm: LLM, one: Asked, hook: LogitsHook | None = None) -> list[Answer]:
    """What a request got: each of its answers."""
    options = {**one.options, "logits_hook": hook}
    if one.way == "score":
        return [(llm.score(one.messages[0]["content"]).logprobs, "scored")]
    if one.way == "batch":
        results = llm.batch([one.messages] * 2, **options)
        return [ended(result.completion) for result in results if result.completion]
    if one.way == "samples":
        return [ended(answer) for answer in llm.samples(one.messages, 2, **options)]
    if one.way == "async":
        return [ended(asyncio.run(llm.achat(one.messages, **options)))]
    if one.way == "plain":
        return [ended(llm.chat(one.messages, **options))]
    return [ended_early(llm, one, options)]


def ended_early(llm: LLM, one: Asked, options: dict[str, Any]) -> Answer:
    """What a request got that somebody or something ends, if it is not too late."""
    if one.way == "close":
        chunks = llm.stream_chat(one.messages, **options)
        first = next(chunks)
        chunks.close()  # type: ignore[attr-defined]
        return first.tokens, first.finish_reason or "closed"
    if one.way == "hook":
        options["logits_hook"] = failing(options["logits_hook"])
    if one.way == "timeout":
        options["timeout"] = one.delay + 1e-4
    cancel = threading.Event()
    timer = threading.Timer(one.delay, cancel.set)
    if one.way == "cancel":
        options["cancel"] = cancel
        timer.start()
    try:
        return ended(llm.chat(one.messages, **options))
    except HookError:
        return (), "failed"
    finally:
        timer.cancel()


def ended(answer: Completion) -> Answer:
    return answer.tokens, answer.finish_reason


def failing(hook: LogitsHook | None) -> LogitsHook:
    """A hook that fails when it is called for the third time."""
    calls = itertools.count()

    def fail(so_far: Sequence[int], logits: NDArray[np.float32]) -> NDArray[Any]:
        if next(calls) == 2:
            raise HookError
        return logits if hook is None else hook(so_far, logits)

    return fail


def alone(llm: LLM, one: Asked) -> list[Answer]:
    """What a request gets that is asked in the plainest way, and to its end."""
    if one.way == "score":
        return serve(llm, one)
    plain = replace(one, way="plain")
    answers = serve(llm, plain)
    if one.way == "samples" and "seed" in one.options:
        other = one.options | {"seed": one.options["seed"] + 1}
        return answers + serve(llm, replace(plain, options=other))
    return answers * one.count


def until_idle(llm: LLM, count: int) -> EngineStats:
    """Wait until so many requests have ended: one that was closed may have a step to go."""
    deadline = time.monotonic() + 30
    while (stats := llm.stats()).running or stats.waiting or stats.requests < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return stats


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(quantize: str) -> Path:
        folder = tmp_path_factory.mktemp("builtin") / quantize
        export_model(
            CHECKPOINT,
            folder,
            quantize=quantize,
            block=None if quantize == "fp32" else 32,
            max_context=512,
        )
        return folder

    return make


def test_a_thousand_interleaved_requests_get_their_own_answers(
    bundle: Callable[[str], Path],
) -> None:
    path, asked = bundle("fp32"), requests(1, (*SINGLE, "batch", "samples", "score"))
    with LLM(path, slots=1, threads=1) as llm:
        expected = [alone(llm, one) for one in asked]
    reports: list[RequestReport] = []

    def on_request(report: RequestReport) -> None:
        reports.append(report)
        if len(reports) % 20 == 0:
            raise HookError

    with (
        LLM(path, **MANY | {"on_request": on_request}) as llm,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        half = list(pool.map(lambda one: serve(llm, one), asked[: REQUESTS // 2]))
        grown = device.resident_memory().get("anonymous", 0)
        got = half + list(pool.map(lambda one: serve(llm, one), asked[REQUESTS // 2 :]))
        grown = device.resident_memory().get("anonymous", 0) - grown
        count = sum(one.count for one in asked)
        stats = until_idle(llm, count)
        assert stats.requests == count
        engine = llm._model.engine
        assert engine._model is not None
        assert engine._model.slots.busy == 0
        assert stats.rows_per_step > 1.1, "they share steps, though a prompt's chunk has its own"
    assert len(reports) == count
    ways = Counter(report.outcome for report in reports)
    assert ways == {way: number for way in ways if (number := getattr(stats, way))}
    assert ways.total() == count
    assert ways.keys() == {"finished", "cancelled", "timed_out", "failed"}
    reasons = Counter(check(*one) for one in zip(asked, expected, got, strict=True))
    assert reasons["stop"] > 250
    few = ("length", "cancelled", "timeout", "closed", "failed", "scored")
    assert min(reasons[reason] for reason in few) > 5, reasons
    assert grown < 10e6, "memory does not grow with the number of requests"


def check(one: Asked, expected: list[Answer], got: list[Answer]) -> str:
    """Compare what a request got with what it gets alone; says how it ended."""
    assert len(got) == len(expected) == one.count
    for (whole, reason), (found, how) in zip(expected, got, strict=True):
        if how == "scored":
            assert found == pytest.approx(whole, abs=1e-4), one
        elif how in ("stop", "length"):
            assert (found, how) == (whole, reason), one
        else:
            assert found == whole[: len(found)], one
    return got[0][1]


@dataclass
class Seen:
    """A hook that notes each step's logits, and what stands before the last of them."""

    tokens: list[int] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)

    def __call__(self, so_far: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self.tokens = list(so_far)
        self.logits.append(logits.copy())
        return logits


def test_quantized_rows_stay_within_the_tolerance_of_a_row_alone(
    bundle: Callable[[str], Path],
) -> None:
    """Each step's logits among neighbours, beside those of the same tokens computed alone."""
    path, asked = bundle("int4"), requests(2, SINGLE)
    seen = [Seen() for _ in asked]
    with LLM(path, **MANY) as llm, ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda one, hook: serve(llm, one, hook), asked, seen))
        assert until_idle(llm, REQUESTS).rows_per_step > 1.1
    reasons = Counter(reason for ((_, reason),) in answers)
    assert min(reasons[reason] for reason in ("cancelled", "timeout", "closed", "failed")) > 5
    with LLM(path, slots=1, threads=1) as llm:
        worst = max(deviation(llm, one) for one in seen if one.logits)
    assert worst < TOLERANCE


def deviation(llm: LLM, seen: Seen) -> float:
    """The largest difference to the same tokens' logits, as a share of their range."""
    right = llm.logits(seen.tokens, last=len(seen.logits))
    off = np.abs(np.array(seen.logits) - right).max(axis=1)
    return float((off / np.ptp(right, axis=1)).max())
