"""How fast a loaded model is here: prompt and decode speed, first token, memory, heat.

Prompts are random tokens, and each starts with another one than the prompt before, so that none
finds its prefix in the cache. Every figure is a median over repeats that come after a warm-up.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edge_llm.errors import ArgumentError
from edge_llm.llm import LLM
from edge_llm.options import GenerateOptions
from edge_llm.results import Chunk
from edge_llm.runtime import device
from edge_llm.runtime.session import import_onnxruntime

__all__ = [
    "DecodeSpeed",
    "Environment",
    "MemoryUse",
    "PromptSpeed",
    "Report",
    "environment",
    "measure",
    "measure_decode",
    "measure_prompt",
    "random_prompts",
]

PROMPT_TOKENS = (128, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpeed:
    """Reading a prompt of which the cache holds nothing.

    Attributes:
        prompt_tokens: Its length.
        seconds: Computing it.
        tokens_per_second: ``prompt_tokens / seconds``.
        first_token: Seconds from the call until the first token was chosen.
    """

    prompt_tokens: int
    seconds: float
    tokens_per_second: float
    first_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpeed:
    """Answering token by token.

    Attributes:
        prompt_tokens: Tokens in front of the answer.
        tokens: Tokens of each answer.
        per_token: Seconds from one token to the next: each answer's mean, the median of answers.
        per_token_p95: The 95th percentile of the gaps in which a reader of ``stream()`` gets them.
        tokens_per_second: ``1 / per_token``.
    """

    prompt_tokens: int
    tokens: int
    per_token: float
    per_token_p95: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes resident in this process; None where the system does not tell.

    Attributes:
        total: Now, pages of mapped files included.
        anonymous: Now, without them: what cannot be read again from a file.
        peak: The most so far.
    """

    total: int | None
    anonymous: int | None
    peak: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What was measured on.

    Attributes:
        cpu: The processor's name.
        features: Its instruction sets that matter here.
        cores: Cores that this process may use.
        threads: Threads that computed.
        system: Operating system and machine type.
        python: Version of Python.
        onnxruntime: Version of ONNX Runtime.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int
    system: str
    python: str
    onnxruntime: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that :func:`measure` finds.

    Attributes:
        model: The bundle's name.
        bits: Bits of a weight.
        block: Weights that share a scale, or None.
        context: Tokens that the cache was made for.
        repeats: How often each figure was measured.
        load: Seconds that loading took.
        prompt: By length of the prompt.
        decode: Token by token.
        memory: After all of it.
        throttled: Whether the processor was slowed down by heat meanwhile; None if not told.
        environment: What was measured on.
    """

    model: str
    bits: int
    block: int | None
    context: int
    repeats: int
    load: float
    prompt: tuple[PromptSpeed, ...]
    decode: DecodeSpeed
    memory: MemoryUse
    throttled: bool | None
    environment: Environment


def measure(
    llm: LLM,
    *,
    prompt_tokens: Sequence[int] | None = None,
    max_tokens: int = 64,
    repeats: int = 3,
    on_phase: Callable[[str], None] | None = None,
) -> Report:
    """Measure everything.

    Args:
        llm: The model; nobody else may use it meanwhile.
        prompt_tokens: Lengths of prompts; by default 128 and 512 as far as the context allows. The
            first is also what stands in front of decoded answers.
        max_tokens: Tokens of each decoded answer, at least 2.
        repeats: How often to measure each figure.
        on_phase: Called with what is being measured next.

    Raises:
        ArgumentError: An argument is outside its domain.
        ContextLengthError: Prompt and answer do not fit into the context.
    """
    _check("max_tokens", max_tokens, 2)
    _check("repeats", repeats, 1)
    if prompt_tokens is None:
        room = max(1, llm.context - max_tokens)
        prompt_tokens = sorted({min(length, room) for length in PROMPT_TOKENS})
    if not prompt_tokens:
        raise ArgumentError("prompt_tokens", "at least one length", prompt_tokens)
    _check("prompt_tokens", min(prompt_tokens), 1)
    tell = on_phase or (lambda phase: None)
    heat = device.throttle_events()
    tell(f"decoding {max_tokens} tokens")
    # One for all phases, or the last prompt of one could begin like the first of the next.
    prompts = random_prompts(llm, max(prompt_tokens))
    decode = measure_decode(
        llm, prompts, prompt_tokens=prompt_tokens[0], max_tokens=max_tokens, repeats=repeats
    )
    speeds = []
    for length in prompt_tokens:
        tell(f"reading prompts of {length} tokens")
        speeds.append(measure_prompt(llm, prompts, prompt_tokens=length, repeats=repeats))
    resident = device.resident_memory()
    after = device.throttle_events()
    return Report(
        model=llm.manifest.name,
        bits=llm.manifest.quantization.bits,
        block=llm.manifest.quantization.block,
        context=llm.context,
        repeats=repeats,
        load=llm.load_seconds,
        prompt=tuple(speeds),
        decode=decode,
        memory=MemoryUse(
            total=resident.get("total"),
            anonymous=resident.get("anonymous"),
            peak=device.peak_memory(),
        ),
        throttled=None if heat is None or after is None else after > heat,
        environment=environment(llm),
    )


def measure_prompt(
    llm: LLM, prompts: Iterator[list[int]], *, prompt_tokens: int, repeats: int = 3
) -> PromptSpeed:
    """Measure how fast prompts of one length are read.

    Args:
        llm: The model.
        prompts: What :func:`random_prompts` gives, at least as long; what is longer is cut.
        prompt_tokens: Their length.
        repeats: How often to measure, after a warm-up.

    Raises:
        ArgumentError: An argument is outside its domain.
        ContextLengthError: The prompt does not fit into the context.
    """
    seconds, first = [], []
    for repeat in range(1 + repeats):
        prompt = next(prompts)[:prompt_tokens]
        answer = llm.generate(prompt, max_tokens=1, temperature=0.0, reuse_prefix=False)
        assert answer.timings.first_token is not None
        if repeat:  # the first is the warm-up, in which the engine learns the size of its chunks
            seconds.append(answer.timings.prompt)
            first.append(answer.timings.first_token)
    median = statistics.median(seconds)
    return PromptSpeed(
        prompt_tokens=prompt_tokens,
        seconds=median,
        tokens_per_second=prompt_tokens / median,
        first_token=statistics.median(first),
    )


def measure_decode(
    llm: LLM,
    prompts: Iterator[list[int]],
    *,
    prompt_tokens: int,
    max_tokens: int,
    repeats: int = 3,
) -> DecodeSpeed:
    """Measure how fast tokens follow each other in a greedy, streamed answer.

    Args:
        llm: The model.
        prompts: As for :func:`measure_prompt`.
        prompt_tokens: Tokens in front of the answer.
        max_tokens: Tokens of each answer, at least 2.
        repeats: How often to measure, after a warm-up.

    Raises:
        ArgumentError: An argument is outside its domain.
        ContextLengthError: Prompt and answer do not fit into the context.
    """
    _check("max_tokens", max_tokens, 2)
    gaps: list[float] = []
    means: list[float] = []
    for repeat in range(1 + repeats):
        measured, last = _gaps(llm, next(prompts)[:prompt_tokens], max_tokens)
        assert last.timings is not None
        assert last.timings.per_token is not None
        if repeat:
            gaps += measured
            means.append(last.timings.per_token)
    median = statistics.median(means)
    return DecodeSpeed(
        prompt_tokens=prompt_tokens,
        tokens=max_tokens,
        per_token=median,
        per_token_p95=float(np.percentile(gaps, 95)),
        tokens_per_second=1 / median,
    )


def random_prompts(llm: LLM, tokens: int, *, seed: int = 0) -> Iterator[list[int]]:
    """Endless prompts of random tokens, each starting with another token than the one before.

    Raises:
        ArgumentError: ``tokens`` is below 1, or the vocabulary has a single token.
    """
    _check("prompt_tokens", tokens, 1)
    vocab = llm.manifest.dims.vocab
    if vocab < 2:
        raise ArgumentError("llm", "a model of at least 2 tokens", vocab)
    return _prompts(np.random.default_rng([seed, tokens]), vocab, tokens)


def environment(llm: LLM) -> Environment:
    """What the model runs on."""
    return Environment(
        cpu=device.cpu_name(),
        features=device.cpu_features(),
        cores=device.usable_cores(),
        threads=llm.threads,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        onnxruntime=import_onnxruntime().__version__,
    )


def _prompts(rng: np.random.Generator, vocab: int, tokens: int) -> Iterator[list[int]]:
    first = int(rng.integers(vocab))
    while True:
        prompt = rng.integers(vocab, size=tokens).tolist()
        first = prompt[0] = (first + int(rng.integers(1, vocab))) % vocab
        yield prompt


def _gaps(llm: LLM, prompt: list[int], max_tokens: int) -> tuple[list[float], Chunk]:
    """Seconds before each token but the first, and the last chunk.

    A chunk of several tokens shares its time out.
    """
    started = time.perf_counter()
    arrivals = []
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "min_tokens": max_tokens,
        "temperature": 0.0,
        "speculation": "off",
        "reuse_prefix": False,
    }
    for chunk in llm.stream(prompt, **options):
        arrivals.append((time.perf_counter(), len(chunk.tokens)))
    assert chunk.timings is not None
    assert chunk.timings.first_token is not None
    # A character may need several tokens, so the first token may come with others.
    before = started + chunk.timings.first_token
    arrivals[0] = (arrivals[0][0], arrivals[0][1] - 1)
    gaps: list[float] = []
    for now, tokens in arrivals:
        gaps += [(now - before) / tokens] * tokens if tokens else []
        before = now
    assert len(gaps) == max_tokens - 1
    return gaps, chunk


def _check(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise ArgumentError(name, f"an integer of at least {lowest}", value)
