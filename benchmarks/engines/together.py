"""Many requests at once in one engine, each greedy and of equal lengths: when which token comes.

    python -m benchmarks.engines.together ENGINE PATH WORKLOAD

prints, for each number of requests, the :class:`Together` of one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.own import plainly

__all__ = ["ENGINES", "EdgeTogether", "Times", "Together", "Workload"]

Times = list[list[float]]
"""Of each request the seconds at which its tokens came, counted from when all were asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is answered: prompts of random tokens.

    Attributes:
        vocab: Tokens to draw from.
        prompt_tokens: Length of each prompt.
        max_tokens: Length of each answer.
        threads: To compute with.
        widths: Numbers of requests, one after the other.
        slots: Requests that edge_llm is loaded for.
        seed: Of the prompts.
    """

    vocab: int
    prompt_tokens: int
    max_tokens: int
    threads: int
    widths: tuple[int, ...]
    slots: int
    seed: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """What another process has written down as JSON."""
        fields = json.loads(text)
        return cls(**fields | {"widths": tuple(fields["widths"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """What several requests got together.

    Attributes:
        all: Tokens per second from asking to the end, prompts included.
        decode: Tokens per second while all of them got tokens: between the last one's first token
            and the first one's last.
        first: Seconds to a request's first token, p50 and p95.
        gaps: Seconds between a request's tokens, p50 and p95; None where answers come whole.
    """

    all: float
    decode: float
    first: tuple[float, float]
    gaps: tuple[float, float] | None

    @classmethod
    def of(cls, times: Times, *, whole: bool = False) -> Together:
        """What the times of tokens come to.

        Args:
            times: When they came.
            whole: Whether answers came whole, so that nothing is known of the gaps within them.

        Raises:
            RuntimeError: At no time all requests got tokens.
        """
        begin, end = max(one[0] for one in times), min(one[-1] for one in times)
        if begin >= end:
            raise RuntimeError("an answer ended before another one began: ask for longer ones")
        between = sum(begin < moment <= end for one in times for moment in one)
        gaps = np.concatenate([np.diff(one) for one in times])
        return cls(
            all=sum(map(len, times)) / max(one[-1] for one in times),
            decode=between / (end - begin),
            first=percentiles([one[0] for one in times]),
            gaps=None if whole else percentiles(gaps),
        )


def percentiles(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """The 50th and the 95th."""
    median, high = np.percentile(values, [50, 95])
    return float(median), float(high)


class Engine(Protocol):
    """A loaded model.

    Attributes:
        whole: Whether its answers come whole.
    """

    whole: bool

    def answer(self, prompts: list[list[int]], *, max_tokens: int) -> Times:
        """Answer all prompts with exactly ``max_tokens`` tokens each."""


class EdgeTogether:
    """edge_llm: a thread for each request reads its stream."""

    whole = False

    def __init__(self, path: Path, load: Workload) -> None:
        from edge_llm import LLM

        context = load.prompt_tokens + load.max_tokens + 1
        self.llm = LLM(path, context=context, threads=load.threads, slots=load.slots)

    def answer(self, prompts: list[list[int]], *, max_tokens: int) -> Times:
        """See :class:`Engine`."""
        times: Times = [[] for _ in prompts]
        ready = threading.Barrier(len(prompts) + 1)
        started = 0.0

        def read(prompt: list[int], own: list[float]) -> None:
            ready.wait()
            for chunk in self.llm.stream(prompt, **plainly(max_tokens)):
                # A token without a character of its own comes with the next one.
                own += [time.perf_counter() - started] * len(chunk.tokens)

        readers = [
            threading.Thread(target=read, args=pair) for pair in zip(prompts, times, strict=True)
        ]
        for reader in readers:
            reader.start()
        started = time.perf_counter()
        ready.wait()
        for reader in readers:
            reader.join()
        return times


class EdgeBatch(EdgeTogether):
    """edge_llm: one ``LLM.batch`` of all prompts, whose answers come whole."""

    whole = True

    def answer(self, prompts: list[list[int]], *, max_tokens: int) -> Times:
        """See :class:`Engine`; each answer's tokens are spread evenly behind its first."""
        times: Times = []
        for result in self.llm.batch(prompts, **plainly(max_tokens)):
            assert result.completion is not None
            timings = result.completion.timings
            assert timings.first_token is not None
            steps = np.arange(max_tokens) * (timings.per_token or 0.0)
            times.append((timings.first_token + steps).tolist())
        return times


class LlamaCppTogether:
    """llama.cpp: all prompts in one batch, and then one ``llama_decode`` for a token of each."""

    whole = False

    def __init__(self, path: Path, load: Workload) -> None:
        import llama_cpp

        import benchmarks.engines.llama_cpp  # noqa: F401 - silences it

        self._lib: Any = llama_cpp
        self._most = max(load.widths)
        self._length = load.prompt_tokens + load.max_tokens
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        self._vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._threads = load.threads

    def answer(self, prompts: list[list[int]], *, max_tokens: int) -> Times:
        """See :class:`Engine`."""
        lib, rows = self._lib, len(prompts)
        settings = lib.llama_context_default_params()
        # A sequence's share of the cache is padded to whole blocks of 256.
        settings.n_ctx = rows * -(-self._length // 256) * 256
        settings.n_seq_max = rows
        settings.n_batch = max(512, sum(map(len, prompts)))
        settings.n_threads = settings.n_threads_batch = self._threads
        context = lib.llama_init_from_model(self._model, settings)
        if not context:
            raise RuntimeError(f"llama.cpp has no memory for {rows} sequences")
        batch = lib.llama_batch_init(settings.n_batch, 0, 1)
        times: Times = [[] for _ in prompts]
        # What every server does once: the first step is slower.
        self._decode(context, batch, [[1]] * rows, 0)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        started = time.perf_counter()
        tokens, position = prompts, 0
        for _ in range(max_tokens):
            chosen = self._decode(context, batch, tokens, position)
            now = time.perf_counter() - started
            for own in times:
                own.append(now)
            position += len(tokens[0])
            tokens = [[token] for token in chosen]
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return times

    def _decode(
        self, context: Any, batch: Any, tokens: list[list[int]], position: int
    ) -> list[int]:
        """Append tokens to each sequence; gives the likeliest next one of each."""
        count = 0
        for sequence, row in enumerate(tokens):
            for offset, token in enumerate(row):
                batch.token[count] = token
                batch.pos[count] = position + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = offset == len(row) - 1
                count += 1
        batch.n_tokens = count
        status = self._lib.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {count} tokens returns {status}")
        logits = self._lib.llama_get_logits(context)
        values = np.ctypeslib.as_array(logits, (len(tokens), self._vocab))
        found: list[int] = values.argmax(axis=1).tolist()
        return found


class GenaiTogether:
    """onnxruntime-genai: a generator over a batch."""

    whole = False

    def __init__(self, path: Path, load: Workload) -> None:
        from benchmarks.engines.genai import GenaiEngine

        length = load.prompt_tokens + load.max_tokens
        self._engine = GenaiEngine(path, context=length, threads=load.threads)

    def answer(self, prompts: list[list[int]], *, max_tokens: int) -> Times:
        """See :class:`Engine`."""
        library, model = self._engine._library, self._engine._model
        params = library.GeneratorParams(model)
        length = len(prompts[0]) + max_tokens
        params.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
        )
        generator = library.Generator(model, params)
        times: Times = [[] for _ in prompts]
        started = time.perf_counter()
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(max_tokens):
            generator.generate_next_token()
            now = time.perf_counter() - started
            for own in times:
                own.append(now)
        return times


ENGINES: dict[str, type[Any]] = {
    "edge-llm": EdgeTogether,
    "edge-llm batch": EdgeBatch,
    "llama.cpp": LlamaCppTogether,
    "onnxruntime-genai": GenaiTogether,
}


def run(engine: str, path: Path, load: Workload) -> dict[int, Together]:
    """Load an engine, and answer once for each width, and once before for warming up."""
    rng = np.random.default_rng(load.seed)
    model: Engine = ENGINES[engine](path, load)

    def ask(rows: int, max_tokens: int) -> Times:
        prompts = rng.integers(load.vocab, size=(rows, load.prompt_tokens)).tolist()
        return model.answer(prompts, max_tokens=max_tokens)

    ask(max(load.widths), 4)
    return {
        width: Together.of(ask(width, load.max_tokens), whole=model.whole) for width in load.widths
    }


def main() -> None:
    """Measure one engine in this process."""
    importlib.import_module("edge_llm.runtime.session").import_onnxruntime()  # telemetry is off
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("path", type=Path)
    parser.add_argument("workload", type=Workload.parse)
    arguments = parser.parse_args()
    found = run(arguments.engine, arguments.path, arguments.workload)
    print(json.dumps({width: dataclasses.asdict(one) for width, one in found.items()}))


if __name__ == "__main__":
    main()
