"""Measuring speed: what is counted, and that nothing is measured which the cache already held."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest

from edge_llm import LLM, Chunk, Timings, Usage
from edge_llm.errors import ArgumentError, ContextLengthError
from edge_llm.measure import measure, measure_decode, measure_prompt, random_prompts
from edge_llm.runtime import device


def test_report(tiny_llm: LLM) -> None:
    phases: list[str] = []
    report = measure(
        tiny_llm, prompt_tokens=[8, 40], max_tokens=4, repeats=2, on_phase=phases.append
    )
    assert phases == [
        "decoding 4 tokens",
        "reading prompts of 8 tokens",
        "reading prompts of 40 tokens",
    ]
    assert [one.prompt_tokens for one in report.prompt] == [8, 40]
    for one in report.prompt:
        assert one.tokens_per_second == pytest.approx(one.prompt_tokens / one.seconds)
        assert one.first_token > 0
    assert (report.decode.prompt_tokens, report.decode.tokens) == (8, 4)
    assert report.decode.tokens_per_second == pytest.approx(1 / report.decode.per_token)
    assert report.decode.per_token_p95 > 0
    assert report.load == tiny_llm.load_seconds
    assert (report.bits, report.block) == (32, None)
    assert report.environment.threads == tiny_llm.threads
    assert report.environment.onnxruntime.count(".") >= 1
    json.dumps(dataclasses.asdict(report))


def test_default_lengths_fit_the_context(tiny_llm: LLM) -> None:
    report = measure(tiny_llm, max_tokens=100, repeats=1)
    assert [one.prompt_tokens for one in report.prompt] == [128, 156]


def test_prompts_never_share_a_prefix(tiny_llm: LLM) -> None:
    prompts = list(itertools.islice(random_prompts(tiny_llm, 5), 300))
    vocab = tiny_llm.manifest.dims.vocab
    assert all(len(prompt) == 5 and min(prompt) >= 0 and max(prompt) < vocab for prompt in prompts)
    assert all(a[0] != b[0] for a, b in itertools.pairwise(prompts))
    assert prompts[:3] == list(itertools.islice(random_prompts(tiny_llm, 5), 3))


def test_one_row_of_prompts_for_all_phases(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of one length would be equal, and the end of one may begin like the next."""
    spies = [Mock(side_effect=tiny_llm.stream), Mock(side_effect=tiny_llm.generate)]
    monkeypatch.setattr(tiny_llm, "stream", spies[0])
    monkeypatch.setattr(tiny_llm, "generate", spies[1])
    measure(tiny_llm, prompt_tokens=[8, 8, 12], max_tokens=2, repeats=2)
    prompts = [call.args[0] for spy in spies for call in spy.call_args_list]
    assert [len(prompt) for prompt in prompts] == [8] * 9 + [12] * 3
    assert all(a[0] != b[0] for a, b in itertools.pairwise(prompts))
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 12


def test_what_the_cache_held_before_does_not_matter(tiny_llm: LLM) -> None:
    before = tiny_llm.stats().reused_tokens
    for _ in range(2):
        for phase in (measure_prompt, partial(measure_decode, max_tokens=2)):
            phase(tiny_llm, random_prompts(tiny_llm, 8), prompt_tokens=8, repeats=1)
    assert tiny_llm.stats().reused_tokens == before


@pytest.mark.parametrize(
    "arguments",
    [{"max_tokens": 1}, {"repeats": 0}, {"prompt_tokens": []}, {"prompt_tokens": [0]}],
)
def test_refusals(arguments: dict[str, Any], tiny_llm: LLM) -> None:
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        measure(tiny_llm, **arguments)


def test_prompt_beyond_the_context(tiny_llm: LLM) -> None:
    with pytest.raises(ContextLengthError):
        measure_prompt(
            tiny_llm, random_prompts(tiny_llm, tiny_llm.context), prompt_tokens=tiny_llm.context
        )


class Stub:
    """Answers five tokens in chunks of ``sizes``, the first of them 5 s after the call."""

    manifest = SimpleNamespace(dims=SimpleNamespace(vocab=9))

    def __init__(self, *sizes: int) -> None:
        self._sizes = sizes

    def stream(self, prompt: list[int], **options: object) -> Any:
        assert options.pop("speculation") == "off"  # what is measured is a step over one token
        assert options.pop("reuse_prefix") is False
        assert options == {"max_tokens": 5, "min_tokens": 5, "temperature": 0.0}
        usage = Usage(prompt_tokens=3, reused_tokens=0, completion_tokens=5)
        timings = Timings(load=0, queued=0, prompt=5, first_token=5, per_token=0.25, total=9)
        for size in self._sizes[:-1]:
            yield Chunk(text="a", tokens=(0,) * size)
        yield Chunk(
            text="b",
            tokens=(0,) * self._sizes[-1],
            finish_reason="length",
            usage=usage,
            timings=timings,
        )


@pytest.mark.parametrize(
    ("sizes", "gaps"),
    [
        ((1, 1, 1, 1, 1), [1, 4, 2, 8]),
        ((1, 2, 0, 2), [0.5, 0.5, 1, 1]),
        ((3, 2), [1, 1, 0.5, 0.5]),  # the first token came at 5, the chunk at 7
        ((5,), [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_a_chunk_of_several_tokens_shares_its_time_out(
    sizes: tuple[int, ...], gaps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.cycle([0.0, 7.0, 8.0, 12.0, 14.0, 22.0][: len(sizes) + 1])
    monkeypatch.setattr("edge_llm.measure.time.perf_counter", lambda: next(clock))
    llm = cast(LLM, Stub(*sizes))
    prompts = random_prompts(llm, 3)
    speed = measure_decode(llm, prompts, prompt_tokens=3, max_tokens=5, repeats=2)
    # The engine's own mean: what waits for a slow reader has no gaps.
    assert speed.per_token == 0.25
    assert speed.per_token_p95 == pytest.approx(np.percentile(gaps * 2, 95))
    assert speed.tokens_per_second == 1 / speed.per_token


@pytest.mark.parametrize(
    ("counts", "throttled"), [((None, None), None), ((3, 3), False), ((3, 4), True)]
)
def test_throttling(
    counts: tuple[int | None, int | None],
    throttled: bool | None,
    tiny_llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings = iter(counts)
    monkeypatch.setattr(device, "throttle_events", lambda: next(readings))
    report = measure(tiny_llm, prompt_tokens=[4], max_tokens=2, repeats=1)
    assert report.throttled is throttled
