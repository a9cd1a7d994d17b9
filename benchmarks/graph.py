"""What does each operator of a decoder's graph cost, and which other graph would cost less?

Builds variants of one decoder with random weights at a real model's shape, differing in one thing
each, and runs them by turns with the plain one: decode behind ``--depths`` tokens, and prompts of
``--prompts`` tokens. Ratios are medians over rounds of the plain graph's seconds to the variant's:
above 1 the variant is faster. ``--profile`` lists the plain graph's operators instead. What was
learnt is in LOG.md. The last line of stdout is a JSON document.

    python benchmarks/graph.py --shape smollm2-135m mlp=qmoe kv=int8
    python benchmarks/graph.py --shape qwen2.5-0.5b --profile
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: only this folder is on sys.path
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np
from numpy.typing import NDArray

from benchmarks.graph_variants import Builder, Variant, parse_variant, save
from benchmarks.shapes import SHAPES, Shape
from edge_llm.cli.layout import table
from edge_llm.runtime.session import import_onnxruntime

CHUNK = 512  # tokens of a prompt that are fed at once
DECODE, PROMPT = "decode at", "prompt of"
AGAIN = "the same again"


@dataclass(frozen=True, slots=True)
class Model:
    """A variant that is written to a file."""

    path: Path
    shape: Shape
    variant: Variant
    capacity: int
    threads: int

    def open(self, profile: str = "") -> Running:
        """A session."""
        return Running(self, profile)


class Running:
    """A session of one variant on bound buffers, as the runtime has it."""

    def __init__(self, model: Model, profile: str = "") -> None:
        shape, variant, capacity = model.shape, model.variant, model.capacity
        self.ort = import_onnxruntime()
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = model.threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
        options.add_session_config_entry("session.x64quantprecision", "1")
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        self.session = self.ort.InferenceSession(
            str(model.path), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        self.kept: dict[str, Any] = {}
        self.vocab = shape.vocab
        rng = np.random.default_rng(0)
        width = shape.head_dim // (2 if variant.kv == "int4" else 1)
        size = (1, shape.kv_heads, capacity, width)
        self.lengths = [np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((), np.int32)]
        for i in range(shape.layers):
            for part in ("key", "value"):
                if variant.kv in ("float32", "float16"):
                    cache = rng.standard_normal(size, dtype=np.float32).astype(variant.kv)
                else:
                    integers = rng.integers(-100, 100, size, np.int8)
                    cache = integers.view(np.uint8) if variant.kv == "int4" else integers
                value = self.bind(f"past.{i}.{part}", cache)
                self.binding.bind_ortvalue_output(f"present.{i}.{part}", value)
        for name, array in zip(
            ("query_lens", "seqlens_k", "total_sequence_length"), self.lengths, strict=True
        ):
            self.bind(name, array)
        self.logits = np.zeros((1, shape.vocab), np.float32)
        self.binding.bind_ortvalue_output("logits", self.keep("logits", self.logits))

    def keep(self, name: str, array: NDArray[Any]) -> Any:
        """An OrtValue on an array; both are kept alive."""
        value = self.ort.OrtValue.ortvalue_from_numpy(array)
        self.kept[name] = (array, value)
        return value

    def bind(self, name: str, array: NDArray[Any]) -> Any:
        """Bind an input."""
        value = self.keep(name, array)
        self.binding.bind_ortvalue_input(name, value)
        return value

    def feed(self, past: int, tokens: int) -> None:
        """One step of ``tokens`` behind ``past``."""
        rng = np.random.default_rng(past)
        if "input_ids" not in self.kept or self.kept["input_ids"][0].shape[1] != tokens:
            self.bind("input_ids", rng.integers(0, self.vocab, (1, tokens), np.int64))
            self.bind("logits_index", np.array([tokens - 1], np.int64))
        self.lengths[0][0] = tokens
        self.lengths[1][0] = past + tokens - 1
        self.lengths[2][...] = past + tokens
        self.session.run_with_iobinding(self.binding)

    def decode(self, depth: int, steps: int) -> float:
        """Seconds of a token behind ``depth``."""
        for _ in range(3):
            self.feed(depth, 1)
        started = time.perf_counter()
        for step in range(steps):
            self.feed(depth + step, 1)
        return (time.perf_counter() - started) / steps

    def prompt(self, length: int) -> float:
        """Seconds of a prompt in chunks."""
        started = time.perf_counter()
        for past in range(0, length, CHUNK):
            self.feed(past, min(CHUNK, length - past))
        return time.perf_counter() - started


def compare(
    models: dict[str, Model], cases: list[tuple[str, int]], rounds: int, steps: int
) -> dict[str, Any]:
    """Medians, and ratios to the first within each round.

    Where a session's memory happens to lie changes its speed by a tenth and more, so each round
    opens its sessions anew.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        f"{kind} {count}": {name: [] for name in models} for kind, count in cases
    }
    names = list(models)
    for round_ in range(rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            running = models[name].open()
            for kind, count in cases:
                once = running.decode(count, steps) if kind == DECODE else running.prompt(count)
                seconds[f"{kind} {count}"][name].append(once)
            del running
    base = names[0]
    return {
        case: {
            name: {
                "milliseconds": statistics.median(own) * 1e3,
                "ratio": statistics.median(
                    theirs / mine for mine, theirs in zip(own, ways[base], strict=True)
                ),
            }
            for name, own in ways.items()
        }
        for case, ways in seconds.items()
    }


def profile(model: Model, cases: list[tuple[str, int]], steps: int) -> dict[str, Any]:
    """Microseconds by operator."""
    found: dict[str, Any] = {}
    for kind, count in cases:
        with tempfile.TemporaryDirectory() as folder:
            running = model.open(f"{folder}/p")
            runs = steps if kind == DECODE else 4
            for _ in range(runs):
                if kind == DECODE:
                    running.feed(count, 1)
                else:
                    running.prompt(count)
            events = json.loads(Path(running.session.end_profiling()).read_text("utf-8"))
        nodes: dict[str, list[float]] = collections.defaultdict(list)
        for event in events:
            if event["name"].endswith("_kernel_time"):
                label = event["args"]["op_name"]
                if label == "MatMulNBits":
                    label += " " + event["name"].split(".")[-1].removesuffix("_kernel_time")
                nodes[label].append(event["dur"])
        found[f"{kind} {count}"] = {
            name: {
                "count": len(each) / runs,
                "each_us": statistics.median(each),
                "total_ms": sum(each) / runs / 1e3,
            }
            for name, each in sorted(nodes.items(), key=lambda item: -sum(item[1]))
        }
    return found


def show(document: dict[str, Any]) -> None:
    """Tables of what was measured."""
    for case, nodes in document.get("profile", {}).items():
        rows: list[tuple[str, ...]] = [(case, "count", "us each", "ms")]
        rows += [
            (name, f"{n['count']:.0f}", f"{n['each_us']:.0f}", f"{n['total_ms']:.2f}")
            for name, n in nodes.items()
        ]
        print(table(rows))
    cases = document.get("cases", {})
    if cases:
        rows = [("", *(f"{case}, ms (ratio)" for case in cases))]
        for name in next(iter(cases.values())):
            cells = [case[name] for case in cases.values()]
            rows.append((name, *(f"{c['milliseconds']:.2f} ({c['ratio']:.3f})" for c in cells)))
        print(table(rows))


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help="such as mlp=qmoe,block=64")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--base", default="", help="what they are compared with")
    parser.add_argument("--depths", type=int, nargs="*", default=[16, 1024, 4096])
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    shape = SHAPES[arguments.shape]
    cases = [(DECODE, depth) for depth in arguments.depths]
    cases += [(PROMPT, length) for length in arguments.prompts]
    capacity = max(count for _, count in cases) + arguments.steps + CHUNK
    document: dict[str, Any] = {"benchmark": "graph", "shape": arguments.shape}
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Model] = {}
        # The plain graph twice: what the two differ by is noise.
        texts = ["", *([] if arguments.profile else [AGAIN, *arguments.variants])]
        for number, text in enumerate(texts):
            variant = parse_variant(text if text and text != AGAIN else arguments.base)
            at = Path(folder) / str(number)
            at.mkdir()
            path = save(Builder(shape, variant, capacity).build(), at)
            models[text or "plain"] = Model(path, shape, variant, capacity, arguments.threads)
        if arguments.profile:
            document["profile"] = profile(models["plain"], cases, arguments.steps)
        else:
            document["cases"] = compare(models, cases, arguments.rounds, arguments.steps)
    show(document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
