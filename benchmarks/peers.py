"""How fast and lean is edge_llm beside llama.cpp, onnxruntime-genai and transformers?

The same weights, the same threads, by turns, every figure from processes that do nothing else.
Checkpoints of random weights have the shapes of real models, made on the spot from a seed; the
built-in model is measured too. Every engine runs what its own tool makes of the checkpoint.

- prefill N: tokens per second of a prompt of N tokens, until its first token is known.
- decode N: tokens per second behind N tokens in the cache (0: behind a single one).
- bandwidth: what decode 0 reads of weights, as a share of how fast the same threads read memory,
  measured in the same round.
- TTFT: seconds to the first token of a prompt of 128 tokens: in a fresh process, its start, imports
  and loading included (files are in the page cache); and in one that has answered already.
- TTFT baked: the same of a prompt whose first 1,000 tokens lie computed on disk (see
  ``benchmarks/peers_baked.py``), beside all of it computed.
- load: seconds of loading, libraries imported before.
- peak and anonymous: bytes resident, behind a prompt of 1,024 tokens and its answer.
- disk: bytes of graph and weights.

Prompts are random tokens, so none begins like another; nothing is drafted. A cell is a median over
rounds; the ratio beside it says how many times as good edge_llm is (faster, sooner, smaller), the
median of the rounds' own ratios. Everything can be chosen alone, and what was measured in several
runs can be shown together. The last line of stdout is a JSON document.

    python benchmarks/peers.py --shapes smollm2-135m --rows "decode*" --models "edge-llm" "llama*"
    python benchmarks/peers.py --show first.txt second.txt

The peers come with ``pip install 'edge-llm[benchmarks]'``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: only this folder is on sys.path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.engines.bandwidth import read_bandwidth, weights_read
from benchmarks.engines.engine import model_bytes, versions
from benchmarks.engines.making import ModelFolder, Recipe, recipe
from benchmarks.engines.own import compiled_bytes
from benchmarks.engines.timing import Process, Workload, by_turns, measure_process
from benchmarks.peers_baked import FRESH, LOADED, PROMPT_TOKENS, measure_baked
from benchmarks.peers_report import OWN, Figures, draw, judge, merge, show, show_goals
from benchmarks.shapes import SHAPES, make_checkpoint
from edge_llm import LLM
from edge_llm.cli.layout import notice
from edge_llm.measure import environment
from edge_llm.runtime.device import usable_cores
from edge_llm_export.builtin.bundle import MAX_CONTEXT
from edge_llm_export.builtin.train import CHECKPOINT

BUILTIN = "built-in"
MODELS = {
    OWN: recipe("edge-llm", "--quantize int4 --block 128"),
    "edge-llm compiled": recipe("edge-llm compiled", "--quantize int4 --block 128"),
    "llama.cpp Q4_0": recipe("llama.cpp", "Q4_0"),
    "llama.cpp Q4_K_M": recipe("llama.cpp", "Q4_K_M"),
    "genai b32": recipe("onnxruntime-genai", "int4 algo_config=rtn block_size=32"),
    "genai b128": recipe("onnxruntime-genai", "int4 algo_config=rtn block_size=128"),
    "transformers fp32": recipe("transformers", ""),
    "transformers bf16": recipe("transformers bfloat16", ""),
}
FURTHER = {
    "edge-llm b32": recipe("edge-llm", "--quantize int4 --block 32"),
    "edge-llm b64": recipe("edge-llm", "--quantize int4 --block 64"),
    "edge-llm int8": recipe("edge-llm", "--quantize int8 --block 32"),
    "edge-llm auto": recipe("edge-llm", "--quantize auto"),
    "llama.cpp Q8_0": recipe("llama.cpp", "Q8_0"),
}
"""Models that are only measured where a pattern of ``--models`` is their whole name."""

WARMUP_TOKENS = 512  # at most; longer prompts tell an engine nothing that it needs


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of a process that answers prompts of one length."""

    prompt_tokens: int
    read: Callable[[Process], float | None]
    decodes: bool = False


def prefill(length: int) -> Row:
    """Tokens per second of a prompt."""
    return Row(length, lambda process: length / process.speed.first_token)


def decode(length: int) -> Row:
    """Tokens per second behind a prompt."""
    return Row(max(1, length), lambda process: 1 / process.speed.per_token, decodes=True)


ROWS = {
    **{f"prefill {length}": prefill(length) for length in (128, 1024, 4096)},
    **{f"decode {length}": decode(length) for length in (0, 1024, 4096)},
    "bandwidth": decode(0),
    "TTFT fresh process": Row(128, lambda process: process.fresh),
    "TTFT loaded": Row(128, lambda process: process.speed.first_token),
    "load": Row(128, lambda process: process.load),
    "peak": Row(1024, lambda process: process.peak, decodes=True),
    "anonymous": Row(1024, lambda process: process.anonymous, decodes=True),
}
DISK = "disk"


def measure(
    models: dict[str, tuple[str, Path]], rows: dict[str, Row], load: Workload, rounds: int
) -> Figures:
    """Measure the rows of one shape.

    Args:
        models: Engine and path of each.
        rows: Those that are wanted.
        load: With the lengths of no particular row.
        rounds: How often.
    """
    figures: Figures = {row: {} for row in rows}
    for length in sorted({row.prompt_tokens for row in rows.values()}):
        own = {name: row for name, row in rows.items() if row.prompt_tokens == length}
        work = dataclasses.replace(
            load,
            prompt_tokens=length,
            max_tokens=load.max_tokens if any(row.decodes for row in own.values()) else 1,
            answers=1 if length > WARMUP_TOKENS else load.answers,
            warmup_tokens=min(length, WARMUP_TOKENS),
        )

        bandwidths: list[float] = []

        def one(
            name: str, round_: int, work: Workload = work, told: list[float] = bandwidths
        ) -> Process:
            if round_ == len(told):
                told.append(read_bandwidth(load.threads))
            return measure_process(*models[name], work, seed=round_)

        def tell(text: str, length: int = length) -> None:
            notice(f"prompts of {length}, {text}")

        found = by_turns(list(models), one, rounds=rounds, progress=tell)
        for name, row in own.items():
            for model, processes in found.items():
                values = [value for one in processes if (value := row.read(one)) is not None]
                if name == "bandwidth":
                    size = bytes_read(*models[model])
                    pairs = zip(values, bandwidths, strict=True)
                    values = [size * value / limit for value, limit in pairs]
                figures[name][model] = values
    return figures


def bytes_read(engine: str, path: Path) -> int:
    """Bytes of weights that a token reads; checkpoints lie in bfloat16."""
    return weights_read(path) * (2 if engine == "transformers" else 1)


def disk(engine: str, path: Path) -> float:
    """Bytes of a model's files."""
    compiled = compiled_bytes(path) if engine == "edge-llm compiled" else 0
    return float(model_bytes(path) + compiled)


def make_models(
    shape: str, wanted: dict[str, Recipe], work: Path, threads: int
) -> dict[str, tuple[str, Path]]:
    """Engine and path of each model, made where it is not there yet."""
    folder = work / shape
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, flags = folder / "checkpoint", tuple[str, ...]()
    if shape == BUILTIN:
        checkpoint, flags = CHECKPOINT, ("--max-context", str(MAX_CONTEXT))
    else:
        make_checkpoint(SHAPES[shape], checkpoint)
    models = ModelFolder(checkpoint, folder, flags=flags, threads=threads)
    made = {}
    for name, one in wanted.items():
        notice(f"{shape}: {name}")
        made[name] = (one.engine, models.make(one))
    return made


def compare(shape: str, arguments: argparse.Namespace, work: Path) -> tuple[Figures, Any]:
    """Make and measure one shape's models; also tells the machine."""
    made = make_models(shape, choose_models(arguments.models), work, arguments.threads)
    bundle = make_models(shape, {OWN: MODELS[OWN]}, work, arguments.threads)[OWN][1]
    with LLM(bundle, context=2, threads=arguments.threads) as llm:
        dims, machine = llm.manifest.dims, dataclasses.asdict(environment(llm))
    load = Workload(
        vocab=dims.vocab,
        prompt_tokens=1,
        max_tokens=arguments.max_tokens,
        threads=arguments.threads,
        answers=arguments.answers,
    )
    rows = choose_rows(arguments.rows)
    room = dims.context - arguments.max_tokens
    fitting = {name: row for name, row in rows.items() if row.prompt_tokens <= room}
    figures = measure(made, fitting, load, arguments.rounds)
    wanted = [row for row in (LOADED, FRESH) if matches(row, arguments.rows)]
    if wanted and room >= PROMPT_TOKENS:
        figures |= measure_baked(made, wanted, load, rounds=arguments.rounds, progress=notice)
    if matches(DISK, arguments.rows):
        figures[DISK] = {name: [disk(*one)] * arguments.rounds for name, one in made.items()}
    return figures, machine


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def choose_models(patterns: Sequence[str]) -> dict[str, Recipe]:
    """The models that patterns name.

    Raises:
        SystemExit: One names none.
    """
    for pattern in patterns:
        if pattern not in FURTHER and not any(fnmatchcase(name, pattern) for name in MODELS):
            known = ", ".join(map(repr, MODELS | FURTHER))
            sys.exit(f"--models must match one of {known}; got {pattern!r}")
    chosen = {name: one for name, one in MODELS.items() if matches(name, patterns)}
    return chosen | {name: one for name, one in FURTHER.items() if name in patterns}


def choose_rows(patterns: Sequence[str]) -> dict[str, Row]:
    """The rows that patterns name; what needs no process is not among them.

    Raises:
        SystemExit: One names none.
    """
    known = [*ROWS, LOADED, FRESH, DISK]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            sys.exit(f"--rows must match one of {', '.join(map(repr, known))}; got {pattern!r}")
    return {name: row for name, row in ROWS.items() if matches(name, patterns)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = [*SHAPES, BUILTIN]
    default = [shape for shape in shapes if shape != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=default, metavar="SHAPE")
    known = ", ".join([*ROWS, LOADED, FRESH, DISK])
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help=f"of {known}")
    known = f"{', '.join(MODELS)}; or by whole names {', '.join(FURTHER)}"
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help=f"of {known}")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=3, help="of a process to a short prompt")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--work", type=Path, help="keep what is made there, and take what is there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="tokens per second by length")
    parser.add_argument(
        "--show", nargs="+", type=Path, metavar="FILE", help="what was printed before; run nothing"
    )
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all that was asked for; the JSON document."""
    shapes: dict[str, Figures] = {}
    machine: dict[str, Any] = {}
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for shape in arguments.shapes:
            shapes[shape], machine = compare(shape, arguments, work)
    return {
        "benchmark": "peers",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "max_tokens": arguments.max_tokens,
        "shapes": shapes,
        "environment": machine,
        "versions": versions(one.engine for one in choose_models(arguments.models).values()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    arguments = parse(argv)
    document = merge(arguments.show) if arguments.show else run(arguments)
    for shape, figures in document["shapes"].items():
        print(f"{shape}; in brackets, how many times as good edge_llm is\n{show(figures)}\n")
    judged = judge(document["shapes"])
    if judged:
        print(f"{show_goals(judged)}\n")
    if arguments.plot:
        draw(document["shapes"], arguments.plot)
    goals = [{**dataclasses.asdict(goal), "reached": reached} for goal, reached in judged]
    print(json.dumps(document | {"goals": goals}))


if __name__ == "__main__":
    main()
