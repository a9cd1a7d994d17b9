"""``edge-llm batch``: a file of requests, a file of answers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from edge_llm.cli.command import Command
from edge_llm.cli.layout import Progress, notice, stdin
from edge_llm.cli.options import (
    add_generate_flags,
    add_model_flags,
    generate_options,
    load_model,
)
from edge_llm.errors import ArgumentError, EdgeLLMError

if TYPE_CHECKING:
    from edge_llm.batching import BatchItem, BatchResult
    from edge_llm.cli.batch_files import Answers, InputLine
    from edge_llm.options import ChatOptions

__all__ = ["COMMAND"]

REDRAW_SECONDS = 0.1
# Options that JSON cannot say.
FUNCTIONS = frozenset({"logits_hook", "cancel", "on_prompt"})
OWN = ("id", "prompt", "messages")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Answer the lines of a JSON Lines file, many at a time: {"prompt": TEXT or TOKENS}, which '
        'is gone on from as it is, or {"messages": [...]}, each with an "id" and with options of '
        "its own under the names of the Python API, which win over the flags. Each answer is a "
        "line of OUT as soon as it is done: index, id, hash of the request, text, finish_reason "
        "and usage, or the error in their place. The same command goes on after an interruption "
        "or a kill: what OUT answers is not done again."
    )
    parser.add_argument("input", metavar="IN", help="the requests; - reads stdin")
    parser.add_argument("output", metavar="OUT", help="the answers; added to where it is there")
    parser.add_argument(
        "--ordered", action="store_true", help="write answers in the order of the requests"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="do lines again that OUT has an error for"
    )
    add_model_flags(parser)
    add_generate_flags(parser)


def _run(arguments: argparse.Namespace) -> int:
    from edge_llm.caching.folder import exclusive
    from edge_llm.cli.batch_files import Answers

    if arguments.ordered and arguments.retry_errors:
        arguments.parser.error("--retry-errors adds to the end of OUT: drop --ordered")
    output = Path(arguments.output).resolve()
    if not output.parent.is_dir():
        raise EdgeLLMError(f"There is no folder {output.parent}.", "Make it first.")
    with contextlib.ExitStack() as stack:
        source = _open_input(arguments.input, stack)
        if arguments.input != "-" and output.exists() and output.samefile(arguments.input):
            raise EdgeLLMError("IN and OUT are one file.", "Name another file for the answers.")
        lock = output.with_name(f".{output.name}.lock")
        if not stack.enter_context(exclusive(lock, wait=False)):
            raise EdgeLLMError(
                f"Another process writes {output} now.", "Wait for its end, or end it."
            )
        answers = Answers(output, retry=arguments.retry_errors)
        return _Batch(source, answers, arguments).run()


def _open_input(name: str, stack: contextlib.ExitStack) -> IO[bytes]:
    """Open the requests, and close them with the stack where they are a file.

    A pipe stays open, and sys.stdin, which Python closes when it exits, is not read: closing would
    wait for the thread that waits for the next line.
    """
    if name == "-":
        return os.fdopen(stdin().fileno(), "rb", closefd=False)
    if not Path(name).is_file():
        return Path(name).open("rb")
    return stack.enter_context(Path(name).open("rb"))


class _Batch:
    """One run over the requests that have no answer yet.

    Args:
        source: The requests.
        answers: The file of answers.
        arguments: The command's.
    """

    def __init__(self, source: IO[bytes], answers: Answers, arguments: argparse.Namespace) -> None:
        self._source = source
        self._answers = answers
        self._arguments = arguments
        self._under_way: dict[int, InputLine] = {}  # by their place among the requests of this run
        self._ids: dict[int, object] = {}
        self._done = self._failed = self._tokens = 0
        self._started = time.perf_counter()

    def run(self) -> int:
        """Answer them; gives the exit status."""
        total = self._count()
        if total != 0:
            with load_model(self._arguments) as llm, contextlib.closing(self._answers):
                self._answers.open()
                self._started = time.perf_counter()
                results = llm.batch(
                    self._items(),
                    ordered=self._arguments.ordered,
                    errors="return",
                    **generate_options(self._arguments),
                )
                self._write(results, total)
        self._report("")
        return 1 if self._failed or self._answers.failed else 0

    def _count(self) -> int | None:
        """How many requests have no answer, where a file can be read twice.

        Raises:
            EdgeLLMError: Requests and answers do not belong together.
        """
        named = self._arguments.input != "-"
        if not (named and stat.S_ISREG(os.fstat(self._source.fileno()).st_mode)):
            return None
        total = sum(1 for _ in self._pending())
        self._source.seek(0)
        return total

    def _pending(self) -> Iterator[InputLine]:
        """The requests that have no answer.

        Raises:
            EdgeLLMError: Requests and answers do not belong together.
        """
        from edge_llm.cli.batch_files import read_lines

        answers, met = self._answers, 0
        for line in read_lines(self._source):
            known = answers.digest(line.index)
            if known is None:
                if self._arguments.ordered and not (answers.in_order and line.index > answers.last):
                    raise EdgeLLMError(
                        f"The answers in {answers.path} are in no order.",
                        "Drop --ordered, or name another file for the answers.",
                    )
                yield line
            elif known != line.digest:
                raise self._stranger(f"Line {line.index + 1} of {self._arguments.input} is not")
            else:
                met += 1
        if met < len(answers):
            raise self._stranger(f"{self._arguments.input} has fewer lines than")

    def _stranger(self, what: str) -> EdgeLLMError:
        return EdgeLLMError(
            f"{what} what {self._answers.path} has answers to.",
            "Name the requests that it was begun with, or another file for the answers.",
        )

    def _items(self) -> Iterator[BatchItem]:
        for place, line in enumerate(self._pending()):
            self._under_way[place] = line
            yield self._item(place, line)

    def _item(self, place: int, line: InputLine) -> BatchItem:
        from edge_llm.batching import BatchItem
        from edge_llm.cli.batch_files import read_request

        try:
            found = read_request(line)
        except ArgumentError as error:
            return BatchItem(error)
        if "id" in found:
            self._ids[place] = found["id"]
        prompt = found["prompt"] if "prompt" in found else found["messages"]
        options = {name: value for name, value in found.items() if name not in OWN}
        for name in FUNCTIONS & options.keys():
            domain = "left out (a line cannot say it)"
            return BatchItem(ArgumentError(name, domain, options[name]))
        if isinstance(bias := options.get("logit_bias"), dict):  # JSON's keys are text
            options["logit_bias"] = {_integer(key): value for key, value in bias.items()}
        return BatchItem(prompt, cast("ChatOptions", options))

    def _write(self, results: Iterator[BatchResult], total: int | None) -> None:
        """Write answers as they come, and tell how far it is."""
        progress, drawn = Progress(), 0.0
        try:
            for result in results:
                self._answers.add(self._document(result))
                if (now := time.perf_counter()) - drawn >= REDRAW_SECONDS:
                    progress.show(self._state(total))
                    drawn = now
        except KeyboardInterrupt:
            progress.show("")
            self._report("interrupted; the same command goes on. ")
            raise
        finally:
            progress.show("")
            results.close()  # type: ignore[attr-defined]

    def _document(self, result: BatchResult) -> dict[str, object]:
        """The line of a result."""
        line = self._under_way.pop(result.index)
        document: dict[str, object] = {"index": line.index}
        if result.index in self._ids:
            document["id"] = self._ids.pop(result.index)
        document["hash"] = line.digest
        if (answer := result.completion) is None:
            assert result.error is not None
            self._failed += 1
            error = {"type": type(result.error).__name__, "message": str(result.error)}
            return document | {"error": error}
        self._done += 1
        self._tokens += answer.usage.completion_tokens
        document |= {"text": answer.text, "finish_reason": answer.finish_reason}
        document["usage"] = dataclasses.asdict(answer.usage)
        if answer.logprobs is not None:
            document["logprobs"] = [dataclasses.asdict(one) for one in answer.logprobs]
        return document

    def _state(self, total: int | None) -> str:
        """How far it is, in a line."""
        seconds, done = time.perf_counter() - self._started, self._done + self._failed
        parts = [f"{done} of {total}" if total else f"{done}"]
        parts += [f"{self._failed} failed"] if self._failed else []
        parts.append(f"{self._tokens / seconds:.0f} tokens/s")
        if total:
            parts.append(f"{_duration(seconds * (total - done) / done)} left")
        return " · ".join(parts)

    def _report(self, prefix: str) -> None:
        seconds = time.perf_counter() - self._started
        parts = [f"{self._done} answered", f"{self._failed} failed"]
        if before := len(self._answers):
            failed = self._answers.failed
            parts.append(f"{before} done before" + (f", {failed} of them failed" if failed else ""))
        parts.append(f"{self._tokens} tokens in {seconds:.1f} s")
        if self._tokens:
            parts.append(f"{self._tokens / seconds:.0f} tokens/s")
        notice(prefix + " · ".join(parts))


def _integer(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


COMMAND = Command("batch", "answer a file of prompts", _configure, _run)
