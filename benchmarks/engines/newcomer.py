"""What a long prompt does to running streams of edge_llm.

    python -m benchmarks.engines.newcomer PATH TOKENS WORKLOAD

prints the :class:`Delay` of ``widths[0]`` streams while a prompt of so many tokens is computed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.together import EdgeTogether, Times, Workload

__all__ = ["Delay", "newcomer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """What a new prompt does to running streams.

    Attributes:
        before: Seconds between two tokens of a stream before it comes, the median.
        longest: The longest while it is computed.
        chunk: Seconds of its longest chunk; a step for the streams is not part of it.
        chunks: How many it has.
        prompt: Seconds from asking to its first token.
    """

    before: float
    longest: float
    chunk: float
    chunks: int
    prompt: float


def newcomer(path: Path, load: Workload, tokens: int) -> Delay:
    """Let a prompt of so many tokens come to ``widths[0]`` running streams of edge_llm."""
    model = EdgeTogether(path, dataclasses.replace(load, prompt_tokens=tokens))
    rng = np.random.default_rng(load.seed)
    prompts = rng.integers(load.vocab, size=(load.widths[0], load.prompt_tokens)).tolist()
    long = rng.integers(load.vocab, size=(2, tokens)).tolist()
    model.llm.generate(long[0], max_tokens=1)  # the size of chunks is learnt
    spans: list[tuple[float, float]] = []
    feed = model.llm._model.engine._model.stepper.prompt  # type: ignore[union-attr]

    def timed(slot: Any, wanted: Any) -> Any:
        began = time.perf_counter()
        found = feed(slot, wanted)
        spans.append((began, time.perf_counter()))
        return found

    stop = threading.Event()
    moments: Times = [[] for _ in prompts]

    def read(prompt: list[int], own: list[float]) -> None:
        options: Any = {"temperature": 0, "speculation": "off", "cancel": stop}
        for _ in model.llm.stream(prompt, min_tokens=load.max_tokens, **options):
            own.append(time.perf_counter())

    with ThreadPoolExecutor(len(prompts)) as pool:
        readers = [pool.submit(read, *pair) for pair in zip(prompts, moments, strict=True)]
        try:
            while min(map(len, moments)) < load.max_tokens // 4:
                check_running(readers)
                time.sleep(0.01)
            model.llm._model.engine._model.stepper.prompt = timed  # type: ignore[union-attr, method-assign]
            asked = time.perf_counter()
            model.llm.generate(long[1], max_tokens=1, speculation="off")
            ended = time.perf_counter()
            while min(one[-1] for one in moments) < ended:  # behind the last chunk
                check_running(readers)
                time.sleep(0.001)
        finally:
            stop.set()
    before = [np.diff([t for t in one if t < asked]) for one in moments]
    return Delay(
        before=float(np.median(np.concatenate(before))),
        longest=longest_gap(moments, spans),
        chunk=max(end - begin for begin, end in spans),
        chunks=len(spans),
        prompt=ended - asked,
    )


def check_running(readers: Sequence[Future[None]]) -> None:
    """See that all streams go on.

    Raises:
        RuntimeError: One has ended.
        BaseException: What one has failed with.
    """
    for reader in readers:
        if reader.done():
            reader.result()
            raise RuntimeError("a stream ended too early: ask for longer ones")


def longest_gap(moments: Times, spans: Sequence[tuple[float, float]]) -> float:
    """The longest time between two tokens of a stream in which a chunk was computed."""
    return max(
        later - earlier
        for one in moments
        for earlier, later in itertools.pairwise(one)
        if any(begin < later and earlier < end for begin, end in spans)
    )


def main() -> None:
    """Measure in this process."""
    importlib.import_module("edge_llm.runtime.session").import_onnxruntime()  # telemetry is off
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("tokens", type=int)
    parser.add_argument("workload", type=Workload.parse)
    arguments = parser.parse_args()
    delay = newcomer(arguments.path, arguments.workload, arguments.tokens)
    print(json.dumps(dataclasses.asdict(delay)))


if __name__ == "__main__":
    main()
