"""Does edge_llm's own work cost speed? Its decoding against a bare ONNX Runtime loop.

Both run the same graph in this process, one after the other in changing order: edge_llm through
``LLM.generate`` and ``LLM.stream``, and a loop that holds nothing but one IOBinding, its buffers
and an argmax. All use one session: two sessions on one graph differ by some per cent for as long as
they live, by where their weights come to lie in memory, and that is not what is asked here. Times
are medians over rounds; ratios are taken within a round, so that a machine whose speed drifts does
not blur them. The last line of stdout is a JSON document.

    python benchmarks/decode.py BUNDLE
    python benchmarks/decode.py --shape smollm2-135m --block 32
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.cli.layout import table
from edge_llm.measure import environment, random_prompts
from edge_llm.options import GenerateOptions
from edge_llm.runtime.own_layout import OwnDecoder
from edge_llm.runtime.session import import_onnxruntime
from edge_llm_export import export_model


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of one prompt and of each token behind it, and the tokens."""

    prompt: float
    per_token: float
    tokens: tuple[int, ...]


class BareLoop:
    """The baseline: greedy decoding with ONNX Runtime and numpy, and nothing else.

    It has the model's session, and buffers and an IOBinding of its own.
    """

    def __init__(self, llm: LLM) -> None:
        manifest = llm.manifest
        self._ort = import_onnxruntime()
        loaded = llm._model.engine._model
        assert loaded is not None
        decoder = loaded.decoder
        assert isinstance(decoder, OwnDecoder), "a bundle of edge-llm's own layout is needed"
        self._session = decoder.graph.session
        self._binding = self._session.io_binding()
        self._kept: dict[str, tuple[NDArray[Any], Any]] = {}
        for state in manifest.decoder.state:
            value = self._input(state.input, np.zeros_like(decoder.cache.buffers[state.input]))
            self._binding.bind_ortvalue_output(state.output, value)
        self._query_lens = np.zeros(1, np.int32)
        self._seqlens_k = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._input("query_lens", self._query_lens)
        self._input("seqlens_k", self._seqlens_k)
        self._input("total_sequence_length", self._total)
        self._logits = np.zeros((1, manifest.dims.vocab), np.float32)
        value = self._ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._kept["logits"] = (self._logits, value)
        self._binding.bind_ortvalue_output("logits", value)

    def run(self, prompt: list[int], max_tokens: int) -> Run:
        """Answer greedily: the prompt in one feed, then token after token."""
        started = time.perf_counter()
        self._bind_tokens(np.asarray([prompt]))
        self._lengths(len(prompt), len(prompt))
        self._session.run_with_iobinding(self._binding)
        tokens = [int(self._logits[0].argmax())]
        prompted = time.perf_counter()
        current = np.zeros((1, 1), np.int64)
        self._bind_tokens(current)
        for length in range(len(prompt) + 1, len(prompt) + max_tokens):
            current[0, 0] = tokens[-1]
            self._lengths(1, length)
            self._session.run_with_iobinding(self._binding)
            tokens.append(int(self._logits[0].argmax()))
        ended = time.perf_counter()
        return Run(prompted - started, (ended - prompted) / (max_tokens - 1), tuple(tokens))

    def _bind_tokens(self, tokens: NDArray[np.int64]) -> None:
        self._input("input_ids", tokens)
        self._input("logits_index", np.asarray([tokens.shape[1] - 1]))

    def _lengths(self, new: int, total: int) -> None:
        self._query_lens[0] = new
        self._seqlens_k[0] = total - 1
        self._total[...] = total

    def _input(self, name: str, array: NDArray[Any]) -> Any:
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        self._kept[name] = (array, value)
        self._binding.bind_ortvalue_input(name, value)
        return value


def plain(max_tokens: int) -> GenerateOptions:
    """Options of a greedy answer of this length, token by token."""
    return {
        "max_tokens": max_tokens,
        "min_tokens": max_tokens,
        "temperature": 0.0,
        "speculation": "off",
    }


def generate(llm: LLM, prompt: list[int], max_tokens: int) -> Run:
    """The same through ``LLM.generate``."""
    answer = llm.generate(prompt, **plain(max_tokens))
    assert answer.usage.reused_tokens == 0
    assert answer.timings.per_token is not None
    return Run(answer.timings.prompt, answer.timings.per_token, answer.tokens)


def stream(llm: LLM, prompt: list[int], max_tokens: int) -> Run:
    """The same through ``LLM.stream``."""
    tokens: list[int] = []
    for chunk in llm.stream(prompt, **plain(max_tokens)):
        tokens += chunk.tokens
    assert chunk.timings is not None
    assert chunk.timings.per_token is not None
    return Run(chunk.timings.prompt, chunk.timings.per_token, tuple(tokens))


def alternate(llm: LLM, *, length: int, max_tokens: int, rounds: int) -> dict[str, list[Run]]:
    """Run all three ``rounds`` times by turns, after a warm-up round."""
    bare = BareLoop(llm)
    ways: dict[str, Callable[[list[int]], Run]] = {
        "bare": lambda prompt: bare.run(prompt, max_tokens),
        "generate": lambda prompt: generate(llm, prompt, max_tokens),
        "stream": lambda prompt: stream(llm, prompt, max_tokens),
    }
    orders = itertools.cycle(itertools.permutations(ways))
    prompts = random_prompts(llm, length)
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for round_ in range(1 + rounds):
        prompt = next(prompts)
        for name in next(orders):
            # Empties edge_llm's cache of this prompt, which one of the other ways has left there.
            llm.generate([(prompt[0] + 1) % llm.manifest.dims.vocab], max_tokens=1)
            run = ways[name](prompt)
            if round_:
                runs[name].append(run)
    return runs


def summarize(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians of times, and of each round's ratios to the bare loop."""
    bare = runs["bare"]
    summary: dict[str, Any] = {}
    for name, own in runs.items():
        pairs = list(zip(own, bare, strict=True))
        summary[name] = {
            "per_token": statistics.median(run.per_token for run in own),
            "prompt": statistics.median(run.prompt for run in own),
            "per_token_ratio": statistics.median(a.per_token / b.per_token for a, b in pairs),
            "prompt_ratio": statistics.median(a.prompt / b.prompt for a, b in pairs),
            "same_tokens": all(a.tokens == b.tokens for a, b in pairs),
        }
    return summary


def show(summary: dict[str, Any], length: int) -> str:
    """The summary as a table."""
    rows = [("", "ms per token", "tok/s", "ratio", f"prompt of {length}, tok/s", "ratio", "tokens")]
    for name, one in summary.items():
        rows.append(
            (
                name,
                f"{one['per_token'] * 1e3:.3f}",
                f"{1 / one['per_token']:.1f}",
                f"{one['per_token_ratio']:.3f}",
                f"{length / one['prompt']:.0f}",
                f"{one['prompt_ratio']:.3f}",
                "same" if one["same_tokens"] else "DIFFERENT",
            )
        )
    return table(rows)


def find_bundle(arguments: argparse.Namespace) -> Path:
    """The bundle that was named, or one of the shape, made where it is not there yet."""
    if arguments.bundle is not None:
        return Path(arguments.bundle)
    name = f"{arguments.shape}-{arguments.quantize}-{arguments.block}"
    bundle: Path = arguments.folder / name
    if not bundle.is_dir():
        checkpoint = arguments.folder / arguments.shape
        shapes = Path(__file__).with_name("shapes.py")
        subprocess.run([sys.executable, shapes, arguments.shape, checkpoint], check=True)
        export_model(checkpoint, bundle, quantize=arguments.quantize, block=arguments.block)
    return bundle


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", help="a bundle; without one, --shape makes one")
    parser.add_argument("--shape", default="smollm2-135m", help="a shape of benchmarks/shapes.py")
    parser.add_argument("--quantize", choices=("int4", "int8"), default="int4")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("bundles"),
        help="where what --shape makes lies",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=24)
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    length, max_tokens = arguments.prompt_tokens, arguments.max_tokens
    path = find_bundle(arguments)
    with LLM(path, context=length + max_tokens, threads=arguments.threads) as llm:
        summary = summarize(
            alternate(llm, length=length, max_tokens=max_tokens, rounds=arguments.rounds)
        )
    document = {
        "benchmark": "decode",
        "model": llm.manifest.name,
        "bits": llm.manifest.quantization.bits,
        "block": llm.manifest.quantization.block,
        "prompt_tokens": length,
        "max_tokens": max_tokens,
        "rounds": arguments.rounds,
        **summary,
        "environment": dataclasses.asdict(environment(llm)),
    }
    print(f"{document['model']}: ratios of seconds to the bare loop's; below 1 is faster")
    print(show(summary, length))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
