"""``edge-llm eval``: how true a bundle is."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge_llm.cli.command import Command, further_commands
from edge_llm.cli.layout import Progress, table, write
from edge_llm.cli.options import add_variant_flag
from edge_llm.errors import BundleNotFoundError

if TYPE_CHECKING:
    from edge_llm.llm import LLM
    from edge_llm.quality import Estimate, QualityReport

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure how well a bundle predicts a text (perplexity), and how far it is from a "
        "reference: KL divergence and the share of tokens where both find the same one likeliest. "
        "Standard errors are over windows."
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="BUNDLE",
        help="the folder of a bundle, or of a model that onnxruntime-genai, transformers.js or "
        "optimum runs (default: the small built-in home-command model)",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="the text, in UTF-8")
    parser.add_argument(
        "--reference",
        metavar="FOLDER",
        help="what the bundle is compared with: another bundle, or the checkpoint that it was made "
        "from, which is exported as float32 for the time (needs edge-llm[export])",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens that the model sees at once at most (default: 512, or the shorter context)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window's start to the next one's (default: half a window); every "
        "token counts once, with at least window - stride tokens before it from the second window "
        "on",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="use only the first N tokens of the text"
    )
    add_variant_flag(parser)
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads to compute with (default: one per core)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the SHA-256 of every file first"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    from edge_llm.quality import evaluate, read_text_file

    text = read_text_file(arguments.text)
    progress = Progress()
    progress.show("loading ...")
    try:
        with contextlib.ExitStack() as stack:
            llm = stack.enter_context(_open_model(arguments))
            reference = None
            if arguments.reference is not None:
                reference = stack.enter_context(_open_reference(arguments, llm, progress))
            report = evaluate(
                llm,
                text,
                reference=reference,
                window=arguments.window,
                stride=arguments.stride,
                max_tokens=arguments.max_tokens,
                progress=lambda done, total: progress.show(f"scored {done} of {total} tokens ..."),
            )
    finally:
        progress.show("")
    if arguments.json:
        # A bundle and its original have one name.
        paths = {name: getattr(arguments, name) for name in ("model", "reference", "text")}
        write(json.dumps({"paths": paths, **dataclasses.asdict(report)}) + "\n")
    else:
        write(_describe(report, arguments) + "\n")
    return 0


def _open_model(arguments: argparse.Namespace) -> LLM:
    from edge_llm.builtin import BUNDLE, announce
    from edge_llm.quality import open_for_evaluation

    if arguments.model is None:
        announce()
    return open_for_evaluation(
        BUNDLE if arguments.model is None else arguments.model,
        window=arguments.window,
        variant=arguments.variant,
        threads=arguments.threads,
        verify=arguments.verify,
    )


@contextlib.contextmanager
def _open_reference(arguments: argparse.Namespace, llm: LLM, progress: Progress) -> Iterator[LLM]:
    from edge_llm.quality import open_for_evaluation

    with contextlib.ExitStack() as stack:
        folder = Path(arguments.reference)
        if _is_checkpoint(folder):
            progress.show("")  # the export draws its own
            parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            # Rotary scaling may hang on the exported context, so it is the bundle's.
            _export(folder, parent / folder.resolve().name, context=llm.manifest.dims.context)
            folder = parent / folder.resolve().name
        yield stack.enter_context(
            open_for_evaluation(folder, window=arguments.window, threads=arguments.threads)
        )


def _is_checkpoint(folder: Path) -> bool:
    from edge_llm.bundle import Bundle

    if not (folder / "manifest.json").exists() and any(folder.glob("*.safetensors")):
        return True  # though it may have graphs beside them, quantized ones too
    try:
        Bundle.open(folder)
    except BundleNotFoundError:
        if (folder / "config.json").is_file():
            return True
        raise
    return False


def _export(source: Path, output: Path, *, context: int) -> None:
    """Make a float32 bundle by the command of the export package, which this one cannot import."""
    command = further_commands()["export"]
    parser = argparse.ArgumentParser()
    command.configure(parser)
    argv = [str(source), "-o", str(output), "--quantize", "fp32", "--max-context", str(context)]
    arguments, _ = parser.parse_known_args(argv)
    with contextlib.redirect_stdout(io.StringIO()):
        command.run(arguments)


def _describe(report: QualityReport, arguments: argparse.Namespace) -> str:
    rows = [("perplexity", *_figure(report.perplexity))]
    if report.reference_perplexity is not None:
        rows.append(("  of the reference", *_figure(report.reference_perplexity)))
    if report.log_perplexity_ratio is not None:
        rows.append(("  ln(ratio)", *_figure(report.log_perplexity_ratio)))
    if report.kl_divergence is not None:
        rows.append(("KL divergence (nats per token)", *_figure(report.kl_divergence)))
    if report.top1_agreement is not None:
        rows.append(("top-1 agreement", *_figure(report.top1_agreement)))
    model = report.model if arguments.model is None else arguments.model
    reference = "" if arguments.reference is None else f" against {arguments.reference}"
    windows = "window" if report.windows == 1 else "windows"
    bos = ", BOS in front of each" if report.bos else ""
    return "\n".join(
        [
            f"{model}{reference} on {arguments.text} (SHA-256 {report.text_sha256[:12]}...)",
            f"{report.tokens} tokens in {report.windows} {windows} of {report.window}, "
            f"stride {report.stride}{bos}",
            "",
            table(rows),
        ]
    )


def _figure(one: Estimate) -> tuple[str, str]:
    error = one.standard_error
    return f"{one.value:.6g}", "one window" if error is None else f"± {error:.2g}"


COMMAND = Command(
    "eval", "measure how true a bundle is to its text and its original", _configure, _run
)
