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
from edge_llm.runtime.kernels import NO_DOT_PRODUCT

from .choices import (
    AUTO,
    AUTO_BITS,
    BLOCKS,
    DEFAULT_BLOCK,
    KV_CACHES,
    LONGEST_DEFAULT_CONTEXT,
    METHODS,
    QUANTIZATIONS,
    TARGETS,
    VIAS,
    VOCABULARIES,
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
    _add_storage(parser)
    _add_calibration(parser)
    _add_cache(parser)
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


def _add_storage(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how weights are stored")
    group.add_argument(
        "--quantize",
        choices=(AUTO, *QUANTIZATIONS),
        help=f"{AUTO}: each matrix in as many bits as measuring shows it to be worth, {AUTO_BITS} "
        "on the average (default, where none of --block, --method and --vocabulary is given); a "
        "checkpoint that GPTQ or AWQ quantized keeps its integers, unless this is fp32",
    )
    group.add_argument(
        "--max-kld",
        type=float,
        metavar="NATS",
        help="the smallest mix whose KL divergence from float32 is at most this",
    )
    group.add_argument(
        "--max-ppl-increase",
        type=float,
        metavar="SHARE",
        help="the smallest mix whose perplexity grows by at most this share, such as 0.01",
    )
    group.add_argument(
        "--max-size", metavar="SIZE", help="the truest mix of at most this size, such as 90MB"
    )
    group.add_argument(
        "--block",
        type=int,
        choices=BLOCKS,
        help=f"weights that share a scale (default: {DEFAULT_BLOCK})",
    )
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="the CPU that the bundle is for (default: x86 or arm64, which take the same graph); "
        f"{NO_DOT_PRODUCT} is for a Raspberry Pi 3 or 4: int8 unless int4 is asked for",
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        help=f"how weights are rounded (default: {METHODS[0]}, to nearest); gptq takes minutes and "
        "loses about half as much",
    )
    group.add_argument(
        "--vocabulary",
        choices=VOCABULARIES,
        help="how the embedding and the head are stored (default: int8 with gptq, or else as the "
        "rest)",
    )


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        default=KV_CACHES[0],
        help=f"how keys and values are kept (default: {KV_CACHES[0]}); int8 takes a quarter of the "
        "memory, with scales calibrated on text; --evaluate tells what it loses",
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what they are calibrated on, where not rounded to nearest")
    group.add_argument("--calibrate", metavar="FILE", help="a text (default: the model writes it)")
    group.add_argument(
        "--samples", type=int, metavar="N", help="windows of that text (default: 64)"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="of the text that the model writes (default: 0)"
    )
    group.add_argument(
        "--work-dir",
        metavar="DIR",
        help="keep results there, so that the same command can go on after an interruption",
    )


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
    from .quantize.budget import parse_size

    size = arguments.max_size
    with _bar() as progress:
        return export_model(
            arguments.source,
            arguments.output,
            quantize=arguments.quantize,
            block=arguments.block,
            target=arguments.target,
            method=arguments.method,
            vocabulary=arguments.vocabulary,
            max_kld=arguments.max_kld,
            max_ppl_increase=arguments.max_ppl_increase,
            max_size=None if size is None else parse_size(size),
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
