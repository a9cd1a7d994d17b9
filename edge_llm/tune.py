"""Measures which way of running a bundle is fastest on this device.

The defaults stay unless another way wins clearly: both are opened anew several times, since where
its weights come to lie makes a session some per cent faster or slower for as long as it lives, and
each time they answer by turns, so that a machine that changes its pace does so to both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_llm.bundle import Bundle
from edge_llm.compiled import find_compiled
from edge_llm.engine.step_costs import WIDTHS
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.device import big_cpus, cpus_of_cores, usable_cores
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import open_session, resolve_threads
from edge_llm.tuning import Tuning, check_tunable

__all__ = ["Trial", "tune"]

# A way must be so much faster than the default, by the median of the rounds of each opening, and
# win so many of all rounds.
CLEARLY = 1.03
MOST_ROUNDS = 0.75
OPENINGS = 2

# An answer: what one way of running is compared with another by.
PROMPT, ANSWER = 128, 32
CAPACITY = 512
SPINS = (0, 200, 5000)
CHUNKS = (16, 32, 64, 128, 256, 512)
# The bound on a chunk is there for others to be served in between; see engine/chunking.py.
CHUNK_SECONDS = 0.2
CHUNK_SLACK = 1.03


@dataclass(frozen=True, slots=True)
class Trial:
    """A way of running against the one that was the best before.

    Attributes:
        name: What differs.
        speedup: Seconds of an answer without it by those with it: the median over rounds, of the
            opening in which it did worse.
        wins: Share of all rounds in which it was faster.
        taken: Whether that was clear enough.
    """

    name: str
    speedup: float
    wins: float
    taken: bool


def tune(
    bundle: Bundle,
    *,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    rounds: int = 5,
    on_phase: Callable[[str], object] = lambda phase: None,
) -> tuple[Tuning, list[Trial]]:
    """Measure, and choose.

    Args:
        bundle: The bundle; its weights are opened twice at once.
        threads: Threads to measure with, rather than choose them.
        cache_dir: Where a compiled form may lie besides the usual places.
        rounds: Answers of each way in each opening, at least 1.
        on_phase: Called with the name of what is measured next.

    Returns:
        The choice, and what was tried.

    Raises:
        ArgumentError: The bundle is a foreign folder, or ``threads`` is out of its domain.
    """
    check_tunable(bundle)
    default = resolve_threads(threads)
    compiled = find_compiled(bundle, cache_dir=cache_dir)
    best, trials = Tuning(threads=default), list[Trial]()

    def compare(name: str, **changes: object) -> None:
        nonlocal best
        on_phase(name)
        other = dataclasses.replace(best, **changes)  # type: ignore[arg-type]
        trial = _compare(bundle, name, best, other, compiled, rounds)
        trials.append(trial)
        best = other if trial.taken else best

    if threads is None:
        for count in _thread_counts(default):
            compare(f"{count} threads", threads=count)
    if best.threads > 1 and (places_of_threads := choose_affinities(best.threads)):
        compare("threads bound to the fastest cores", affinities=places_of_threads)
    if best.threads > 1:
        for spin in SPINS:
            compare(f"spinning for {spin} us", spin=spin)
    if compiled is not None:
        compare("without the compiled form", compiled=False)
    decoder = _open(bundle, best, compiled)
    on_phase("chunks of prompts")
    chunk = _best_chunk(decoder, rounds)
    on_phase("steps of several tokens")
    costs = _step_costs(decoder, 2 * rounds) if decoder.verifies else {}
    return dataclasses.replace(best, prefill_chunk=chunk, step_costs=costs), trials


def _thread_counts(default: int) -> list[int]:
    """Other counts worth a try: half, one less, all fast and slow cores, all hardware threads."""
    most = usable_cores(physical=False)
    counts = {default // 2, default - 1, default + 1, most, usable_cores(big=False)}
    return sorted(count for count in counts if 1 <= count <= most and count != default)


def _compare(
    bundle: Bundle, name: str, base: Tuning, other: Tuning, compiled: Path | None, rounds: int
) -> Trial:
    medians, wins = [], 0
    for opening in range(OPENINGS):
        order = (base, other) if opening % 2 == 0 else (other, base)
        decoders = {id(one): _open(bundle, one, compiled) for one in order}
        for one in order:
            _answer(decoders[id(one)])  # brings weights and buffers into memory
        ratios = []
        for round_ in range(rounds):
            turns = (base, other) if round_ % 2 == 0 else (other, base)
            seconds = {id(one): _answer(decoders[id(one)]) for one in turns}
            ratios.append(seconds[id(base)] / seconds[id(other)])
        medians.append(statistics.median(ratios))
        wins += sum(ratio > 1 for ratio in ratios)
    return judge(name, medians, wins / (OPENINGS * rounds))


def judge(name: str, medians: list[float], wins: float) -> Trial:
    """Whether a way won clearly: in each opening, and in most of all rounds.

    Args:
        name: Its name.
        medians: Of each opening, the median over rounds of the base's seconds by its own.
        wins: Share of all rounds in which it was faster.
    """
    return Trial(name, min(medians), wins, min(medians) >= CLEARLY and wins >= MOST_ROUNDS)


def _open(bundle: Bundle, tuning: Tuning, compiled: Path | None) -> Decoder:
    manifest = bundle.manifest
    session = open_session(
        bundle.file(manifest.decoder.graph),
        compiled=compiled if tuning.compiled else None,
        threads=tuning.threads,
        minimum=manifest.min_onnxruntime,
        spin=tuning.spin,
        affinities=tuning.affinities,
    )
    return open_decoder(session, manifest, capacity=_capacity(bundle), rows=1)


def _capacity(bundle: Bundle) -> int:
    return min(bundle.manifest.dims.context, CAPACITY)


def _answer(decoder: Decoder) -> float:
    """Seconds of reading a prompt and giving an answer."""
    capacity = decoder.cache.capacity
    prompt, answer = min(PROMPT, capacity // 2), min(ANSWER, capacity // 4)
    started = time.perf_counter()
    decoder.step(_tokens(prompt), scored=1)
    for token in range(answer):
        decoder.step([token % 2], scored=1)
    elapsed = time.perf_counter() - started
    decoder.cache.truncate(0, 0)
    return elapsed


def _best_chunk(decoder: Decoder, rounds: int) -> int | None:
    """The shortest chunk that feeds a token about as fast as any that others can wait for."""
    most = min(decoder.widest, decoder.cache.capacity)
    sizes = [size for size in CHUNKS if size <= most]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for round_ in range(1 + rounds):
        for size in sizes if round_ % 2 else reversed(sizes):
            elapsed = _timed(decoder, size)
            decoder.cache.truncate(0, 0)
            if round_:
                seconds[size].append(elapsed)
    medians = {size: statistics.median(seconds[size]) for size in sizes}
    return choose_chunk(medians)


def choose_affinities(threads: int) -> str | None:
    """A fast core for each thread but the first, which is the caller's; None where cores are alike.

    Args:
        threads: At least 2.

    Returns:
        CPUs as onnxruntime writes them: counted from 1, one of each physical core ("4;6").
    """
    cores = cpus_of_cores(big_cpus())
    if usable_cores(big=False) == usable_cores() or len(cores) < threads:
        return None
    return ";".join(str(cpu + 1) for cpu in cores[1 - threads :])


def choose_chunk(seconds: dict[int, float]) -> int | None:
    """The bound on chunks, given what each size takes; None where longer is always better."""
    within = {size: took / size for size, took in seconds.items() if took <= CHUNK_SECONDS}
    if not within:
        return None
    least = min(within.values())
    best = min(size for size, each in within.items() if each <= CHUNK_SLACK * least)
    return None if best == max(within) else best


def _step_costs(decoder: Decoder, rounds: int) -> dict[int, float]:
    """Medians of steps over several tokens, relative to one token's."""
    widths = (1, *WIDTHS)
    if decoder.cache.capacity < 2 * sum(widths):
        return {}
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for round_ in range(1 + rounds):
        decoder.step(_tokens(min(PROMPT, decoder.cache.capacity - sum(widths))), scored=1)
        for width in widths if round_ % 2 else reversed(widths):
            elapsed = _timed(decoder, width, scored=width)
            if round_:
                seconds[width].append(elapsed)
        decoder.cache.truncate(0, 0)
    single = statistics.median(seconds[1])
    return {width: statistics.median(seconds[width]) / single for width in WIDTHS}


def _timed(decoder: Decoder, tokens: int, *, scored: int = 1) -> float:
    started = time.perf_counter()
    decoder.step(_tokens(tokens), scored=scored)
    return time.perf_counter() - started


def _tokens(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(count, dtype=np.int64) % 2
