"""How the commands write text, numbers and tables."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from edge_llm.errors import EdgeLLMError

if TYPE_CHECKING:
    from pathlib import Path

    from edge_llm.manifest import Manifest
    from edge_llm.options import GenerateOptions
    from edge_llm.results import FinishReason, Timings, Usage

__all__ = [
    "STDOUT",
    "Progress",
    "checked",
    "describe",
    "describe_mix",
    "explain",
    "megabytes",
    "notice",
    "read_text",
    "report_bundle",
    "stdin",
    "table",
    "write",
]

STDOUT = "stdout"


def write(text: str) -> None:
    """Write to stdout, at once, and what print() has left there.

    Raises:
        OSError: It cannot be written to; the error's ``filename`` is ``STDOUT``.
    """
    try:
        if text:  # unbuffered, even nothing fails on /dev/full
            sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        error.filename = STDOUT
        raise


def notice(text: str) -> None:
    """Tell the user something that is no part of an answer."""
    print(text, file=sys.stderr, flush=True)


def explain(reason: FinishReason | None, options: GenerateOptions) -> None:
    """Tell the user why an answer ended, unless it was finished."""
    if reason == "cancelled":
        notice("(stopped)")
    elif reason == "timeout":
        notice("(stopped: the time was up)")
    elif reason == "length":
        limit = "--max-tokens" if "max_tokens" in options else "the context is full"
        notice(f"(cut off: {limit})")


def stdin() -> TextIO:
    """The standard input.

    Raises:
        EdgeLLMError: The process was started without one.
    """
    if sys.stdin is None:
        raise EdgeLLMError("stdin is closed.", "Pipe a text in, or start from a terminal.")
    return sys.stdin


def checked(text: str, source: str) -> str:
    """A text from outside, if it is text.

    Raises:
        EdgeLLMError: Bytes in it could not be decoded.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # Python stands in lone surrogates for what it cannot decode
        raise _not_text(source, sys.getfilesystemencoding()) from None
    return text


def read_text(read: Callable[[], str], source: str) -> str:
    """What ``read()`` gives, if it is text.

    Raises:
        EdgeLLMError: Bytes in it could not be decoded.
    """
    try:
        return checked(read(), source)
    except UnicodeDecodeError as error:
        raise _not_text(source, error.encoding) from None


def _not_text(source: str, encoding: str) -> EdgeLLMError:
    return EdgeLLMError(
        f"{source} is not text in {encoding.upper()}.", "Convert it first, with iconv for example."
    )


def table(rows: Iterable[Sequence[object]], *, indent: str = "") -> str:
    """Rows as lines with aligned columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(indent + "  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def megabytes(size: int | None) -> str:
    """A number of bytes for people."""
    return "not told" if size is None else f"{size / 1e6:,.1f} MB"


def report_bundle(folder: Path, manifest: Manifest, *, as_json: bool) -> None:
    """Say that a bundle was written, in words or as one JSON document."""
    size = sum(entry.size for entry in manifest.files.values())
    if as_json:
        document = {"path": str(folder), "size": size, "manifest": dataclasses.asdict(manifest)}
        write(json.dumps(document) + "\n")
    else:
        trade = f"{describe_mix(manifest.info['mix'])}\n" if "mix" in manifest.info else ""
        write(
            f"{trade}Wrote {folder} ({megabytes(size)}). Run it with: "
            f"edge-llm run -m {shlex.quote(str(folder))} PROMPT\n"
        )


def describe_mix(mix: Any) -> str:
    """What was weighed against what, of a bundle whose matrices were chosen by measurement.

    Args:
        mix: The manifest's ``info["mix"]``. No format binds it, so that what is not as this
            version's exporter writes it is shown as it is.
    """
    try:
        return _mix_table(mix)
    except (KeyError, TypeError, ValueError, AttributeError):
        return f"mix: {mix}"


def _mix_table(mix: Mapping[str, Any]) -> str:
    chosen = mix["measured"]
    rows = [("mixes that were measured", "MB", "KL divergence", "perplexity", "top-1")]
    for one in sorted([*mix["tried"], chosen], key=lambda trial: -int(trial["size"])):
        name = f"taken: {mix['bits_per_weight']:.2f} bits a weight" if one is chosen else ""
        rows.append(
            (
                name,
                f"{one['size'] / 1e6:.2f}",
                f"{one['kl_divergence']:.5f}",
                f"{one['ppl_increase']:+.2%}",
                f"{one['top1_agreement']:.1%}",
            )
        )
    ((limit, value),) = mix["budget"].items()
    return f"{table(rows)}\n(budget: {limit.replace('_', ' ')} {value:,})"


def describe(usage: Usage, timings: Timings, reason: FinishReason) -> str:
    """A request's tokens and speed in two lines."""
    computed = usage.prompt_tokens - usage.reused_tokens
    source = ", from the prefix cache" if usage.reused_from_disk else ""
    parts = [f"prompt {usage.prompt_tokens} tokens ({usage.reused_tokens} reused{source})"]
    if usage.prefix_break is not None:
        parts.append(f"token {usage.prefix_break.position} differed from what was cached")
    if timings.prompt > 0:
        parts.append(f"{timings.prompt:.2f} s, {computed / timings.prompt:.0f} tok/s")
    if timings.first_token is not None:
        parts.append(f"first token after {timings.first_token:.2f} s")
    answer = [f"answer {usage.completion_tokens} tokens ({reason})"]
    if timings.per_token:
        answer.append(f"{1 / timings.per_token:.1f} tok/s, {timings.per_token * 1e3:.1f} ms each")
    if usage.drafted_tokens:
        answer.append(f"{usage.accepted_tokens} of {usage.drafted_tokens} drafted accepted")
    answer.append(f"loaded in {timings.load:.2f} s")
    return "\n".join([" · ".join(parts), " · ".join(answer)])


class Progress:
    """A line on stderr that is written over; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        """Put a text in the line's place; empty text clears it."""
        if self._terminal:
            print(f"\r{text.ljust(self._width)}", end="" if text else "\r", file=sys.stderr)
            sys.stderr.flush()
            self._width = len(text)
