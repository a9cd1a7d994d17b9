"""A thousand requests of every kind at once on a real model, and each gets its own answer."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm import LLM, Completion
from edge_llm.runtime import device
from edge_llm_export import export_model
from edge_llm_export.builtin.evaluation import held_out_split
from edge_llm_export.builtin.train import CHECKPOINT

REQUESTS = 1000
CLIENTS = 24
SLOTS = 6

# On quantized weights a row of a batch rounds otherwise than a row alone: by at most this share of
# its logits' range (README: "Many requests").
TOLERANCE = 0.03


@dataclass
class Asked:
    """One request."""

    messages: list[dict[str, str]]
    options: dict[str, Any] = field(default_factory=dict)
    way: str = "plain"
    delay: float = 0.0


def requests(seed: int) -> list[Asked]:
    rng = random.Random(seed)
    texts = [one.request for one in held_out_split(300)]
    asked = []
    for i in range(REQUESTS):
        text = rng.choice(texts)
        if rng.random() < 0.2:  # longer ones, of more than one chunk
            text = " ".join(rng.choice(texts) for _ in range(rng.randrange(2, 12)))
        options: dict[str, Any] = {"max_tokens": rng.choice([1, 3, 20, 60]), "temperature": 0}
        if rng.random() < 0.4:
            options |= {"temperature": rng.choice([0.7, 1.3]), "top_k": 40, "seed": i}
        if rng.random() < 0.2:
            options["stop"] = rng.sample(['"', "kitchen", "e", ":{"], 2)
        if rng.random() < 0.1:
            options["priority"] = rng.randrange(-2, 3)
        way = rng.choice(["plain"] * 6 + ["cancel", "timeout", "close", "hook"])
        asked.append(Asked([{"role": "user", "content": text}], options, way, rng.random() * 0.03))
    return asked


class HookError(Exception):
    """A function of the caller's that fails."""


def serve(llm: LLM, one: Asked) -> tuple[tuple[int, ...], str]:
    """The tokens that a request got, and how it ended."""
    options = dict(one.options)
    if one.way == "timeout":
        options["timeout"] = one.delay + 1e-4
    if one.way == "hook":
        calls = iter(range(3))

        def hook(so_far: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
            if next(calls, None) is None:
                raise HookError
            return logits

        try:
            answer = llm.chat(one.messages, logits_hook=hook, **options)
        except HookError:
            return (), "failed"
        return answer.tokens, answer.finish_reason
    if one.way == "close":
        chunks = llm.stream_chat(one.messages, **options)
        first = next(chunks)
        chunks.close()  # type: ignore[attr-defined]
        return first.tokens, first.finish_reason or "closed"
    if one.way == "cancel":
        options["cancel"] = threading.Event()
        timer = threading.Timer(one.delay, options["cancel"].set)
        timer.start()
    answer = llm.chat(one.messages, **options)
    if one.way == "cancel":
        timer.cancel()
    return answer.tokens, answer.finish_reason


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
    path, asked = bundle("fp32"), requests(1)
    with LLM(path, slots=1) as llm:
        alone: list[Completion] = [llm.chat(one.messages, **one.options) for one in asked]
    with LLM(path, slots=SLOTS, queue_limit=CLIENTS) as llm, ThreadPoolExecutor(CLIENTS) as pool:
        half = list(pool.map(lambda one: serve(llm, one), asked[: REQUESTS // 2]))
        grown = device.resident_memory().get("anonymous", 0)
        got = half + list(pool.map(lambda one: serve(llm, one), asked[REQUESTS // 2 :]))
        grown = device.resident_memory().get("anonymous", 0) - grown
        engine = llm._model.engine
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.requests) == (0, 0, REQUESTS)
        assert engine._model is not None
        assert engine._model.slots.busy == 0
        assert stats.rows_per_step > 2, "they did share steps"
    ended: dict[str, int] = {}
    for one, expected, (tokens, reason) in zip(asked, alone, got, strict=True):
        ended[reason] = ended.get(reason, 0) + 1
        if reason in ("stop", "length"):
            assert (tokens, reason) == (expected.tokens, expected.finish_reason), one
        else:
            assert tokens == expected.tokens[: len(tokens)], one
    assert ended["stop"] > 250
    assert min(ended[way] for way in ("length", "cancelled", "timeout", "closed", "failed")) > 5
    assert grown < 10e6, "memory does not grow with the number of requests"


def test_quantized_rows_stay_within_the_tolerance_of_a_row_alone(
    bundle: Callable[[str], Path],
) -> None:
    """Each step's logits among neighbours, beside those of the same tokens computed alone."""
    texts = [one.request for one in held_out_split(120)]

    def record(llm: LLM, text: str) -> tuple[list[int], tuple[int, ...], NDArray[np.float32]]:
        seen: list[NDArray[np.float32]] = []

        def hook(so_far: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
            seen.append(logits.copy())
            return logits

        prompt = llm.apply_chat_template([{"role": "user", "content": text}])
        answer = llm.generate(prompt, max_tokens=60, temperature=0, logits_hook=hook)
        return prompt, answer.tokens, np.array(seen)

    with LLM(bundle("int4"), slots=SLOTS) as llm:
        with ThreadPoolExecutor(2 * SLOTS) as pool:
            found = list(pool.map(lambda text: record(llm, text), texts))
        assert llm.stats().rows_per_step > 2
        worst = 0.0
        for prompt, tokens, logits in found:
            alone = llm.logits([*prompt, *tokens[:-1]], last=len(tokens))
            spread = np.ptp(alone, axis=1)
            worst = max(worst, float((np.abs(logits - alone).max(axis=1) / spread).max()))
    assert worst < TOLERANCE
