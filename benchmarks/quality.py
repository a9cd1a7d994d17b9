"""What does quantizing cost, and what does it buy? Ours beside llama.cpp's and onnxruntime-genai's.

One checkpoint, one text, the same windows of it for everybody: perplexity, and KL divergence and
top-1 agreement with the checkpoint in float32, each with its standard error (windows are the
samples); bytes of graph and weights, tokenizers left out; and how fast greedy tokens follow each
other, on the same threads, by turns, each time in a fresh process. Every engine computes its own
model: llama.cpp a GGUF file written from the same weights and quantized by llama.cpp,
onnxruntime-genai what its own builder makes. Before anything is judged, transformers and the peers'
float32 models must agree with the reference, so that nobody is charged for a conversion.

    python benchmarks/quality.py CHECKPOINT TEXT --windows 60 --threads 1
    python benchmarks/quality.py --rows "int4*" "llama.cpp*" --also "--quantize int8 --block 128"

Without a checkpoint the built-in model answers its held-out requests, and is calibrated on others
of the same kind: windows are requests, of which only the answers' tokens count; and our bundles are
asked to answer, to the letter. The last
line of stdout is a JSON document. The peers come with ``pip install 'edge-llm[benchmarks]'``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: only this folder is on sys.path
    sys.path[0] = str(Path(__file__).parents[1])

from tokenizers import Tokenizer

from benchmarks.builtin import ask
from benchmarks.engines.engine import Engine, model_bytes, open_engine, versions
from benchmarks.engines.making import ModelFolder, Recipe, recipe
from benchmarks.engines.timing import Speed, Workload, ratio, time_by_turns
from benchmarks.fidelity import (
    Fidelity,
    Passage,
    measure_fidelity,
    request_passages,
    text_passages,
)
from edge_llm import LLM
from edge_llm.cli.layout import Progress, notice, table
from edge_llm.measure import environment
from edge_llm.quality import Estimate, read_text_file
from edge_llm_export.builtin.bundle import MAX_CONTEXT
from edge_llm_export.builtin.evaluation import exact_match, held_out_split
from edge_llm_export.builtin.generator import samples
from edge_llm_export.builtin.tokenizer import ANSWER, BOS, EOS, rendered
from edge_llm_export.builtin.train import CHECKPOINT

ROWS = {
    "fp32": recipe("edge-llm", "--quantize fp32"),
    "int8 b32": recipe("edge-llm", "--quantize int8 --block 32"),
    **{
        f"int4 b{block} {method}": recipe(
            "edge-llm", f"--quantize int4 --block {block} --method {method}"
        )
        for method in ("rtn", "gptq")
        for block in (32, 64, 128)
    },
    "auto": recipe("edge-llm", "--quantize auto"),
    **{f"llama.cpp {kind}": recipe("llama.cpp", kind) for kind in ("Q8_0", "Q4_0", "Q4_K_M")},
    "genai int4 b32": recipe("onnxruntime-genai", "int4"),
    "genai int4 b32 rtn": recipe("onnxruntime-genai", "int4 algo_config=rtn"),
    "genai int4 b32 k_quant": recipe("onnxruntime-genai", "int4 algo_config=k_quant"),
    "genai int4 b32 k_quant_mixed": recipe("onnxruntime-genai", "int4 algo_config=k_quant_mixed"),
    "genai int4 b128 rtn": recipe("onnxruntime-genai", "int4 algo_config=rtn block_size=128"),
}
REFERENCE = ROWS["fp32"]
BASELINE = "llama.cpp Q4_0"
UNQUANTIZED = {
    "llama.cpp": recipe("llama.cpp", "F32"),
    "onnxruntime-genai": recipe("onnxruntime-genai", "fp32"),
}
CHECKED_PASSAGES = 8
CALIBRATION_SEED, CALIBRATION_SAMPLES = 7, 4000
AGREEMENT = 1e-6  # nats per token; llama.cpp's float16 cache alone is worth 1e-8 to 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row.

    Attributes:
        recipe: How the model was made.
        size: Bytes of graph and weights.
        bits_per_weight: All of them, by the parameters of the checkpoint.
        fidelity: How true it is.
        exact: Requests that were answered to the letter, and all; None where none was put.
        speeds: Of each round.
    """

    recipe: Recipe
    size: int
    bits_per_weight: float
    fidelity: Fidelity
    exact: tuple[int, int] | None
    speeds: list[Speed]


def choose_rows(patterns: Sequence[str], also: Sequence[str]) -> dict[str, Recipe]:
    """The rows whose names match a pattern, and one for each string of export flags.

    Raises:
        SystemExit: A pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in ROWS):
            sys.exit(f"--rows must match one of {', '.join(map(repr, ROWS))}; got {pattern!r}")
    rows = {
        name: row
        for name, row in ROWS.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    return rows | {flags: recipe("edge-llm", flags) for flags in also}


def write_calibration_text(file: Path) -> Path:
    """Write requests and answers of the built-in model's training side, in the form it sees.

    It was trained on answers alone, so the requests that it would write itself are no text.
    """
    made = islice(samples(CALIBRATION_SEED), CALIBRATION_SAMPLES)
    text = (f"{BOS}{rendered(one.request)}{ANSWER}{one.answer}{EOS}" for one in made)
    file.write_text("".join(text), encoding="utf-8")
    return file


def calibrated(row: Recipe, text: Path) -> Recipe:
    """The recipe, calibrated on a text if it is calibrated at all."""
    if row.engine == "edge-llm" and not {"auto", "gptq"}.isdisjoint(row.arguments):
        return dataclasses.replace(row, arguments=(*row.arguments, "--calibrate", str(text)))
    return row


def check_conversions(
    models: dict[str, Path], reference: Engine, passages: Sequence[Passage], load: Workload
) -> dict[str, float]:
    """KL divergence from the reference of what was converted and not quantized, nats per token.

    Args:
        models: By engine.
        reference: Our float32 bundle.
        passages: The first few are enough.
        load: Whose vocabulary and threads are meant.

    Raises:
        SystemExit: One is another model than the reference.
    """
    found = {}
    context = max(len(passage.tokens) for passage in passages)
    for name, path in models.items():
        with open_engine(name, path, context=context, threads=load.threads) as model:
            fidelity = measure_fidelity(model, reference, passages, vocab=load.vocab)
        found[name] = fidelity.kl_divergence.value
        if found[name] > AGREEMENT:
            sys.exit(
                f"{name} in float32 is {found[name]:.2g} nats per token from our float32 bundle: "
                "one of the two does not compute what the checkpoint says"
            )
    return found


def measure_fidelities(
    rows: dict[str, tuple[str, Path]],
    reference: Engine,
    passages: Sequence[Passage],
    load: Workload,
) -> dict[str, Fidelity]:
    """How true each row's model is."""
    progress, found = Progress(), {}
    context = max(len(passage.tokens) for passage in passages)
    for name, (engine, path) in rows.items():

        def show(done: int, total: int, name: str = name) -> None:
            progress.show(f"{name}: {done} of {total} windows")

        with open_engine(engine, path, context=context, threads=load.threads) as model:
            found[name] = measure_fidelity(
                model, reference, passages, vocab=load.vocab, progress=show
            )
        progress.show("")
    return found


def count_exact(path: Path, requests: int, threads: int) -> tuple[int, int]:
    """Held-out requests that the built-in model answers to the letter, and all."""
    samples = held_out_split(requests)
    with LLM(path, threads=threads) as llm:
        answers, _ = ask(llm, [sample.request for sample in samples])
    return exact_match(samples, answers)["all"]


def show_table(results: dict[str, Result]) -> str:
    """A row per model."""
    base = BASELINE if BASELINE in results else next(iter(results))
    exact = any(result.exact for result in results.values())
    header = ["", "bits", "MB", "KLD", "±", "top-1 %", "±", "perplexity", "±", "tok/s"]
    rows = [[*header, f"x {base}", *(["exact %"] if exact else [])]]
    for name, result in results.items():
        fidelity = result.fidelity
        loss = fidelity.loss
        perplexity = math.exp(loss.value)
        # exp passes errors on in first order.
        error = None if loss.standard_error is None else perplexity * loss.standard_error
        row = [name, f"{result.bits_per_weight:.2f}", f"{result.size / 1e6:.2f}"]
        row += _cells(fidelity.kl_divergence, 5) + _cells(fidelity.top1_agreement, 2, 100)
        row += _cells(Estimate(value=perplexity, standard_error=error), 3)
        if result.speeds:
            per_token = statistics.median(speed.per_token for speed in result.speeds)
            row += [f"{1 / per_token:.0f}", f"{ratio(result.speeds, results[base].speeds):.2f}"]
        else:
            row += ["", ""]
        if exact:
            right, asked = result.exact or (0, 0)
            row.append(f"{100 * right / asked:.2f}" if asked else "")
        rows.append(row)
    return table(rows)


def _cells(estimate: Estimate, digits: int, factor: float = 1.0) -> list[str]:
    error = estimate.standard_error
    return [
        f"{factor * estimate.value:.{digits}f}",
        "" if error is None else f"{factor * error:.{digits}f}",
    ]


def draw(results: dict[str, Result], file: Path) -> None:
    """Fidelity against speed: the lower and the further to the right, the better."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 7))
    quantized = {name: one for name, one in results.items() if one.recipe != REFERENCE}
    for engine in dict.fromkeys(one.recipe.engine for one in quantized.values()):
        own = {name: one for name, one in quantized.items() if one.recipe.engine == engine}
        speeds = [1 / statistics.median(s.per_token for s in one.speeds) for one in own.values()]
        losses = [one.fidelity.kl_divergence for one in own.values()]
        axes.errorbar(
            speeds,
            [one.value for one in losses],
            yerr=[one.standard_error or 0.0 for one in losses],
            fmt="o",
            label=engine,
        )
        for name, speed, loss in zip(own, speeds, losses, strict=True):
            axes.annotate(f" {name}", (speed, loss.value), fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("decoding, tokens per second")
    axes.set_ylabel("KL divergence to float32, nats per token")
    axes.legend()
    figure.savefig(file, bbox_inches="tight")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a Llama's or Qwen2's folder")
    parser.add_argument("text", nargs="?", help="a file of UTF-8 text that the model never saw")
    parser.add_argument("--windows", type=int, help="default: 60, or 500 requests")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window of text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--rows", nargs="+", default=["*"], metavar="PATTERN", help=f"of {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="FLAGS",
        help="a further row: flags of `edge-llm export` (may be repeated)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0: none")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="before timed answers")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a timed answer")
    parser.add_argument(
        "--requests", type=int, default=2000, help="put to the built-in model's bundles; 0: none"
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the models there, and take those that are there"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="fidelity against speed")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) != (options.text is None):
        parser.error("CHECKPOINT and TEXT go together")
    if options.plot and not options.rounds:
        parser.error("--plot needs --rounds of at least 1")
    return options


def read_passages(arguments: argparse.Namespace, reference: LLM) -> list[Passage]:
    """What everybody is scored on."""
    if arguments.text is None:
        tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
        return request_passages(tokenizer, held_out_split(arguments.windows or 500))
    text = read_text_file(arguments.text)
    limit = arguments.windows or 60
    return text_passages(reference, text, window=arguments.window, limit=limit)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    arguments = parse(argv)
    builtin = arguments.checkpoint is None
    checkpoint = CHECKPOINT if builtin else arguments.checkpoint
    rows = choose_rows(arguments.rows, arguments.also)
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if builtin:
            text = write_calibration_text(folder / "calibration.txt")
            rows = {name: calibrated(row, text) for name, row in rows.items()}
        models = ModelFolder(
            checkpoint,
            folder,
            flags=("--max-context", str(MAX_CONTEXT)) if builtin else (),
            threads=arguments.threads,
        )
        document, results = compare(arguments, checkpoint, models, rows)
    print(show_table(results))
    if arguments.plot:
        draw(results, arguments.plot)
    print(json.dumps(document))


def compare(
    arguments: argparse.Namespace, checkpoint: Path, models: ModelFolder, rows: dict[str, Recipe]
) -> tuple[dict[str, Any], dict[str, Result]]:
    """Make all models, and measure them; the JSON document and the rows."""
    made: dict[str, tuple[str, Path]] = {}
    for name, row in rows.items():
        notice(f"making {name}")
        made[name] = (row.engine, models.make(row))
    engines = {row.engine for row in rows.values()}
    plain = {name: models.make(one) for name, one in UNQUANTIZED.items() if name in engines}
    bundle = models.make(REFERENCE)
    with LLM(bundle, threads=arguments.threads) as llm:
        passages = read_passages(arguments, llm)
        dims, machine = llm.manifest.dims, environment(llm)
    load = Workload(
        vocab=dims.vocab,
        prompt_tokens=arguments.prompt_tokens,
        max_tokens=arguments.max_tokens,
        threads=arguments.threads,
    )
    context = max(len(passage.tokens) for passage in passages)
    with open_engine("edge-llm", bundle, context=context, threads=load.threads) as reference:
        plain["transformers"] = checkpoint
        checks = check_conversions(plain, reference, passages[:CHECKED_PASSAGES], load)
        fidelities = measure_fidelities(made, reference, passages, load)
    speeds = time_by_turns(made, load, rounds=arguments.rounds, progress=notice)
    asked = arguments.requests if arguments.checkpoint is None else 0
    results = {}
    for name, (engine, path) in made.items():
        size, ours = model_bytes(path), engine == "edge-llm"
        results[name] = Result(
            recipe=rows[name],
            size=size,
            bits_per_weight=8 * size / dims.parameters,
            fidelity=fidelities[name],
            exact=count_exact(path, asked, load.threads) if asked and ours else None,
            speeds=speeds[name],
        )
    document = {
        "benchmark": "quality",
        "checkpoint": checkpoint.resolve().name,
        "text": None if arguments.text is None else Path(arguments.text).name,
        "windows": len(passages),
        "tokens": sum(passage.scored for passage in passages),
        "parameters": dims.parameters,
        "checks": checks,
        "workload": dataclasses.asdict(load),
        "rows": {name: dataclasses.asdict(result) for name, result in results.items()},
        "environment": dataclasses.asdict(machine),
        "versions": versions({"edge-llm", *engines}),
    }
    return document, results


if __name__ == "__main__":
    main()
