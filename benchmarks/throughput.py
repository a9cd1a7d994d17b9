"""How much do many requests get together, and how long does each of them wait?

For 1 to 16 requests at once, greedy, of equal lengths and without a common beginning: edge_llm
(a thread reads each stream; and one ``LLM.batch`` of all), llama.cpp (one ``llama_decode`` a step
for a token of every sequence) and onnxruntime-genai (its generator over a batch). The same random
weights, the same threads, by turns, each time in a process of its own; nothing is drafted.

- all: tokens of all answers per second, from asking to the end, prompts included.
- decode: tokens per second while all requests get them.
- first, gap: milliseconds to a request's first token and between two of its tokens, p50 / p95;
  answers of ``LLM.batch`` come whole, without gaps.

Two more rows are edge_llm's own: a single stream where there are 16 slots against one where there
is one (``slots``), and what a prompt of 1,000 tokens does to 8 running streams (``newcomer``). A
cell is a median over rounds, a ratio the median of the rounds' own. The last line of stdout is a
JSON document.

    python benchmarks/throughput.py --shapes smollm2-135m --engines edge-llm llama.cpp --widths 1 16

The peers come with ``pip install 'edge-llm[benchmarks]'``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: only this folder is on sys.path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.engines.engine import versions
from benchmarks.engines.making import ModelFolder, recipe
from benchmarks.engines.together import Workload
from benchmarks.shapes import SHAPES, make_checkpoint
from edge_llm import LLM
from edge_llm.builtin import BUNDLE
from edge_llm.cli.layout import notice, table
from edge_llm.measure import environment
from edge_llm.runtime.device import usable_cores

ROOT = Path(__file__).parents[1]
BUILTIN = "built-in"
OWN = "edge-llm"
RECIPES = {
    OWN: recipe(OWN, "--quantize int4 --block 128"),
    "edge-llm batch": recipe(OWN, "--quantize int4 --block 128"),
    "llama.cpp": recipe("llama.cpp", "Q4_0"),
    "onnxruntime-genai": recipe("onnxruntime-genai", "int4 algo_config=rtn block_size=32"),
}
ROWS = ("widths", "slots", "newcomer")
STREAMS, STREAM_TOKENS, NEWCOMER = 8, 200, 1000

Run = dict[str, Any]
"""What a process prints."""


def measure(program: str, *arguments: str | Path, load: Workload) -> Run:
    """Run a program of ``benchmarks.engines`` in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.engines.{program}", *map(str, arguments)]
    asked = json.dumps(dataclasses.asdict(load))
    done = subprocess.run(
        [*command, asked], stdout=subprocess.PIPE, check=True, cwd=ROOT, text=True
    )
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


def by_turns(
    names: Sequence[str], one: Callable[[str, int], Run], rounds: int
) -> dict[str, list[Run]]:
    """Measure each once in a round, every other round in the opposite order."""
    found: dict[str, list[Run]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in names if round_ % 2 == 0 else reversed(names):
            notice(f"round {round_ + 1} of {rounds}: {name}")
            found[name].append(one(name, round_))
    return found


def compare(
    paths: Mapping[str, Path], load: Workload, rounds: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Medians of each engine's figures, by width, and edge_llm's ratios to it."""

    def one(name: str, round_: int) -> Run:
        own = dataclasses.replace(load, seed=round_)
        return measure("together", name, paths[name].resolve(), load=own)

    runs = by_turns(list(paths), one, rounds)
    return {
        engine: {str(width): figures(runs, engine, str(width)) for width in load.widths}
        for engine in paths
    }


def figures(runs: Mapping[str, list[Run]], engine: str, width: str) -> dict[str, Any]:
    """One cell: medians, ratios to the narrowest width, and of edge_llm to this engine."""
    own = [run[width] for run in runs[engine]]
    first = min(runs[engine][0], key=int)
    cell: dict[str, Any] = {}
    for name in ("all", "decode"):
        cell[name] = statistics.median(run[name] for run in own)
        cell[f"{name}_gain"] = statistics.median(
            run[width][name] / run[first][name] for run in runs[engine]
        )
        if OWN in runs:
            cell[f"{name}_ratio"] = statistics.median(
                a[width][name] / b[name] for a, b in zip(runs[OWN], own, strict=True)
            )
    for name in ("first", "gaps"):
        known = all(run[name] is not None for run in own)
        cell[name] = (
            [statistics.median(run[name][i] for run in own) for i in range(2)] if known else None
        )
    return cell


def show(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The table of one shape."""
    rows = [("engine, requests", "decode", "x 1", "own x", "all", "x 1", "own x", "first", "gap")]
    for engine, widths in found.items():
        for width, cell in widths.items():
            parts = []
            for name in ("decode", "all"):
                parts += [f"{cell[name]:.0f}", f"{cell[f'{name}_gain']:.2f}"]
                ratio = cell.get(f"{name}_ratio")
                parts.append("" if ratio is None or engine == OWN else f"{ratio:.2f}")
            waits = [
                " / ".join(f"{1e3 * seconds:.0f}" for seconds in cell[name] or ())
                for name in ("first", "gaps")
            ]
            rows.append((f"{engine}, {width}", *parts, *waits))  # type: ignore[arg-type]
    return table(rows)


def slots(path: Path, load: Workload, rounds: int) -> dict[str, float]:
    """A single stream in a model with all slots, against one with one."""
    single = dataclasses.replace(load, widths=(1,))

    def one(name: str, round_: int) -> Run:
        own = dataclasses.replace(single, slots=int(name), seed=round_)
        found: Run = measure("together", OWN, path.resolve(), load=own)["1"]
        return found

    runs = by_turns([str(load.slots), "1"], one, rounds)
    many, alone = ([run["decode"] for run in runs[name]] for name in (str(load.slots), "1"))
    return {
        "slots": load.slots,
        "many": statistics.median(many),
        "one": statistics.median(alone),
        "ratio": statistics.median(a / b for a, b in zip(many, alone, strict=True)),
    }


def newcomer(path: Path, load: Workload, rounds: int) -> dict[str, float]:
    """The median round of what a long prompt does to running streams."""
    own = dataclasses.replace(load, widths=(STREAMS,), slots=STREAMS + 1, max_tokens=STREAM_TOKENS)
    runs = [
        measure(
            "newcomer",
            path.resolve(),
            str(NEWCOMER),
            load=dataclasses.replace(own, seed=round_),
        )
        for round_ in range(rounds)
    ]
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    share = statistics.median(run["longest"] / (run["chunk"] + run["before"]) for run in runs)
    return found | {"longest_of_chunk_and_step": share}


def make_models(shape: str, engines: Sequence[str], work: Path, threads: int) -> dict[str, Path]:
    """The model of each engine, made where it is not there yet."""
    if shape == BUILTIN:
        return {OWN: BUNDLE}
    folder = work / shape
    make_checkpoint(SHAPES[shape], folder / "checkpoint")
    models = ModelFolder(folder / "checkpoint", folder, threads=threads)
    return {engine: models.make(RECIPES[engine]) for engine in engines}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all that was asked for; prints tables, gives the JSON document."""
    shapes: dict[str, dict[str, Any]] = {}
    machine: dict[str, Any] = {}
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for shape in arguments.shapes:
            own = make_models(shape, [OWN], work, arguments.threads)[OWN]
            with LLM(own, context=2, threads=arguments.threads) as llm:
                dims, machine = llm.manifest.dims, dataclasses.asdict(environment(llm))
            load = Workload(
                vocab=dims.vocab,
                prompt_tokens=arguments.prompt_tokens,
                max_tokens=arguments.max_tokens,
                threads=arguments.threads,
                widths=tuple(sorted(arguments.widths)),
                slots=max(arguments.widths),
                seed=0,
            )
            fitting = argparse.Namespace(**vars(arguments))
            if dims.context <= NEWCOMER + STREAM_TOKENS:  # its prompt would not fit
                fitting.rows = [row for row in arguments.rows if row != "newcomer"]
            shapes[shape] = report(shape, own, load, fitting, work)
    return {
        "benchmark": "throughput",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "prompt_tokens": arguments.prompt_tokens,
        "max_tokens": arguments.max_tokens,
        "shapes": shapes,
        "environment": machine,
        "versions": versions({RECIPES[name].engine for name in (OWN, *arguments.engines)}),
    }


def report(
    shape: str, own: Path, load: Workload, arguments: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """Measure and print the rows of one shape."""
    found: dict[str, Any] = {}
    if "widths" in arguments.rows:
        paths = make_models(shape, arguments.engines, work, arguments.threads)
        found["engines"] = compare(paths, load, arguments.rounds)
        print(f"{shape}: tokens/s, gain over one request, edge_llm's ratio to it; milliseconds")
        print(show(found["engines"]) + "\n")
    if "slots" in arguments.rows:
        row = found["slots"] = slots(own, load, arguments.rounds)
        print(
            f"{shape}: one stream in {load.slots} slots {row['many']:.1f} tokens/s, in one "
            f"{row['one']:.1f}: ratio {row['ratio']:.3f}\n"
        )
    if "newcomer" in arguments.rows:
        row = found["newcomer"] = newcomer(own, load, arguments.rounds)
        print(
            f"{shape}: {STREAMS} streams with a token every {1e3 * row['before']:.0f} ms; while a "
            f"prompt of {NEWCOMER} tokens comes ({row['chunks']:.0f} chunks, "
            f"{row['prompt']:.2f} s), none waits longer than {1e3 * row['longest']:.0f} ms; the "
            f"longest chunk takes {1e3 * row['chunk']:.0f} ms\n"
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ["smollm2-135m", "qwen2.5-0.5b", BUILTIN]
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, BUILTIN], default=default)
    parser.add_argument("--engines", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--work", type=Path, help="keep what is made there, and take what is there")
    print(json.dumps(run(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
