"""``edge-llm export``; imported by ``edge-llm --help``, so the export stack waits for the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_llm.cli.command import Command
from edge_llm.cli.layout import report_bundle
from edge_llm.errors import ExportError

from .choices import (
    BLOCKS,
    DEFAULT_BLOCK,
    DEFAULT_QUANTIZATION,
    KV_CACHES,
    LONGEST_DEFAULT_CONTEXT,
    METHODS,
    QUANTIZATIONS,
    VIAS,
)

if TYPE_CHECKING:
    from edge_llm.manifest import Manifest

    from .pipeline import Progress
    from .quantize.calibration import Calibration

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn a Hugging Face checkpoint into a bundle that the other commands run, and try it once."
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a hub id such as owner/name")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the bundle's folder, new or empty"
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help=f"how weights are stored (default: {DEFAULT_QUANTIZATION}); a checkpoint that GPTQ "
        "or AWQ quantized keeps its integers, unless this is fp32",
    )
    parser.add_argument(
        "--block",
        type=int,
        choices=BLOCKS,
        help=f"weights that share a scale (default: {DEFAULT_BLOCK})",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help=f"how weights are rounded (default: {METHODS[0]}, to nearest); gptq takes minutes and "
        "loses about half as much",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="text for --method gptq and --kv-cache int8 (default: the model writes it)",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="windows of that text (default: 64)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the text that the model writes (default: 0)"
    )
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="keep the text that the model writes, and what --method gptq has done, there, so that "
        "the same command can go on after an interruption",
    )
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        default=KV_CACHES[0],
        help=f"how keys and values are kept (default: {KV_CACHES[0]}); int8 takes a quarter of the "
        "memory, with scales calibrated on text; --evaluate tells what it loses",
    )
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="longest sequence, in tokens (default: the model's own, but at most "
        f"{LONGEST_DEFAULT_CONTEXT})",
    )
    parser.add_argument(
        "--via",
        choices=VIAS,
        default=VIAS[0],
        help="who makes the graph (default: the graph builder where it knows the model, or else "
        "optimum)",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    parser.add_argument(
        "--ignore-config",
        action="append",
        default=[],
        metavar="KEY",
        help="a key of config.json that does not change the computation (may be repeated)",
    )
    parser.add_argument(
        "--evaluate",
        metavar="FILE",
        help="measure perplexity, KL divergence and top-1 agreement with the float32 original on "
        "this text; `edge-llm info` shows them",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object at the end")


def _run(arguments: argparse.Namespace) -> int:
    try:
        manifest = _export(arguments)
    except ImportError as error:
        raise ExportError(
            f"edge-llm export cannot import {error.name or error}.",
            "Install what it needs with `pip install 'edge-llm[export]'`.",
        ) from error
    report_bundle(Path(arguments.output), manifest, as_json=arguments.json)
    return 0


def _export(arguments: argparse.Namespace) -> Manifest:
    from .pipeline import export_model

    with _bar() as progress:
        return export_model(
            arguments.source,
            arguments.output,
            quantize=arguments.quantize,
            block=arguments.block,
            method=arguments.method,
            calibration=_calibration(arguments),
            work_dir=arguments.work_dir,
            kv_cache=arguments.kv_cache,
            max_context=arguments.max_context,
            via=arguments.via,
            revision=arguments.revision,
            overwrite=arguments.overwrite,
            ignore_config=arguments.ignore_config,
            evaluate=arguments.evaluate,
            progress=progress,
            warn=_warn,
        )


def _calibration(arguments: argparse.Namespace) -> Calibration | None:
    """What was said of it; None: nothing."""
    from .quantize.calibration import Calibration

    flags = {"text": "calibrate", "samples": "samples", "seed": "seed"}
    given = {name: getattr(arguments, flag) for name, flag in flags.items()}
    said = {name: value for name, value in given.items() if value is not None}
    return Calibration(**said) if said else None


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress callback that draws a bar per phase on stderr, where that is a terminal."""
    from tqdm import tqdm

    bar: Any = None
    current = ""

    def show(phase: str, done: int, total: int) -> None:
        nonlocal bar, current
        if phase != current:
            current = phase
            if bar is not None:
                bar.close()
            size = {"unit": "B", "unit_scale": True} if phase.endswith("writing") else {}
            bar = tqdm(desc=phase, total=total, disable=None, file=sys.stderr, leave=False, **size)
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _warn(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"edge-llm: {text}", file=sys.stderr)


COMMAND = Command("export", "turn a Hugging Face checkpoint into a bundle", _configure, _run)
