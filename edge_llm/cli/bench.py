"""``edge-llm bench``: how fast a bundle is on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from edge_llm.cli.command import Command
from edge_llm.cli.layout import Progress, megabytes, table, write
from edge_llm.cli.options import add_model_flags, load_model

if TYPE_CHECKING:
    from edge_llm.measure import Report

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure a bundle on this machine: medians over repeats, after a warm-up, with random "
        "prompts of which nothing is in the cache."
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="lengths of prompts (default: 128 and 512, as the context allows); the first is also "
        "what stands in front of the decoded answer",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens of a decoded answer (default: 64)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="repeats of each figure (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    add_model_flags(parser)


def _run(arguments: argparse.Namespace) -> int:
    from edge_llm.measure import measure

    progress = Progress()
    progress.show("loading ...")
    try:
        with load_model(arguments) as llm:
            report = measure(
                llm,
                prompt_tokens=arguments.prompt_tokens,
                max_tokens=arguments.max_tokens,
                repeats=arguments.repeats,
                on_phase=lambda phase: progress.show(f"{phase} ..."),
            )
    finally:
        progress.show("")
    text = json.dumps(dataclasses.asdict(report)) if arguments.json else _describe(report)
    write(text + "\n")
    return 0


def _describe(report: Report) -> str:
    environment, decode, memory = report.environment, report.decode, report.memory
    features = ", ".join(environment.features) or "no features told"
    block = "" if report.block is None else f", block {report.block}"
    heat = {None: "not told by this system", False: "none", True: "YES: these figures are too low"}
    rows: list[tuple[str, str, str]] = [
        (
            f"prompt of {one.prompt_tokens} tokens",
            f"{one.tokens_per_second:.1f} tok/s",
            f"first token after {one.first_token * 1e3:.1f} ms",
        )
        for one in report.prompt
    ]
    rows += [
        (
            f"decode {decode.tokens} tokens behind {decode.prompt_tokens}",
            f"{decode.tokens_per_second:.1f} tok/s",
            f"{decode.per_token * 1e3:.2f} ms each (95 %: {decode.per_token_p95 * 1e3:.2f} ms)",
        ),
        ("load", f"{report.load:.2f} s", ""),
        ("memory", megabytes(memory.total), f"{megabytes(memory.anonymous)} without mapped files"),
        ("peak memory", megabytes(memory.peak), ""),
    ]
    return "\n".join(
        [
            f"{report.model} · {report.bits} bits{block} · context {report.context} tokens",
            f"{environment.cpu} ({features}) · {environment.threads} of {environment.cores} cores",
            f"{environment.system} · Python {environment.python} · "
            f"onnxruntime {environment.onnxruntime} · medians of {report.repeats}",
            "",
            table(rows),
            f"thermal throttling: {heat[report.throttled]}",
        ]
    )


COMMAND = Command("bench", "measure speed and memory on this machine", _configure, _run)
