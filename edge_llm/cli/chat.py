"""``edge-llm chat``: a conversation."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_llm.cli.command import Command
from edge_llm.cli.layout import checked, describe, explain, notice, read_text, stdin, write
from edge_llm.cli.options import (
    add_generate_flags,
    add_model_flags,
    add_template_flags,
    generate_options,
    load_model,
    require_template,
)
from edge_llm.errors import EdgeLLMError

if TYPE_CHECKING:
    from edge_llm.llm import LLM
    from edge_llm.options import GenerateOptions
    from edge_llm.results import Chunk

__all__ = ["COMMAND", "Chat"]

HELP = """\
/reset  forget the conversation (the system message stays)
/stats  tokens and speed of the last answer, and how full the context is
/help   this list
/exit   leave; so does Ctrl-D
Ctrl-C stops an answer; at the prompt, twice, it leaves."""


class Chat:
    """A conversation, turn by turn; answers go to stdout, everything else to stderr.

    Args:
        llm: The model.
        system: The system message, or None.
        template: Name of the chat template.
        options: Options of each answer.
    """

    def __init__(
        self, llm: LLM, *, system: str | None, template: str, options: GenerateOptions
    ) -> None:
        self._llm = llm
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._template = template
        self._options = options
        self._last: Chunk | None = None
        self.history: list[dict[str, str]] = []

    def handle(self, line: str) -> bool:
        """Answer a line, or obey it where it is a command; False when it is to leave."""
        line = line.strip()
        if not re.fullmatch(r"/\w+", line):
            if line:
                self.answer(line)
        elif line == "/exit":
            return False
        elif line == "/reset":
            self.history.clear()
            notice("The conversation is forgotten.")
        elif line == "/stats":
            self._stats()
        elif line == "/help":
            notice(HELP)
        else:
            notice(f"There is no command {line}.\n{HELP}")
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to a message; an interrupt from the keyboard ends the answer only.

        What was answered stays in the history; a message without any answer does not.
        """
        cancel = threading.Event()
        options: GenerateOptions = {**self._options, "cancel": cancel}
        pieces: list[str] = []
        with _interrupts(cancel):
            message = {"role": "user", "content": text}
            dropped = self._turns_to_drop(message)
            kept = [*self.history[2 * dropped :], message]
            # What is refused is refused by this call, before anything is forgotten.
            chunks = self._llm.stream_chat(
                [*self._system, *kept], template=self._template, **options
            )
            self.history = kept
            if dropped:
                notice(f"(the context is full: forgot the oldest {dropped} of our turns)")
            try:
                for chunk in chunks:
                    pieces.append(chunk.text)
                    write(chunk.text)
            finally:
                answer = "".join(pieces)
                if answer or (pieces and not cancel.is_set()):
                    self.history.append({"role": "assistant", "content": answer})
                else:
                    self.history.pop()
        self._last = chunk
        write("" if answer.endswith("\n") else "\n")
        explain(chunk.finish_reason, self._options)

    def _turns_to_drop(self, message: dict[str, str]) -> int:
        """How many of the oldest turns to forget, so that prompt and answer fit into the context.

        A shortened conversation is computed anew from where it differs, so at once enough is
        dropped to leave half of the room free: the next turns then find their prefix in the cache.
        """
        reserve = self._options.get("max_tokens") or self._llm.context // 4
        room = self._llm.context - reserve

        def tokens(dropped: int) -> int:
            messages = [*self._system, *self.history[2 * dropped :], message]
            return len(self._llm.apply_chat_template(messages, template=self._template))

        if tokens(0) <= room:
            return 0
        turns = range(len(self.history) // 2)
        return bisect.bisect_left(turns, True, key=lambda dropped: tokens(dropped) <= room // 2)

    def _stats(self) -> None:
        last = self._last
        if last is None:
            notice("There is no answer yet.")
            return
        assert last.usage is not None
        assert last.timings is not None
        assert last.finish_reason is not None
        notice(describe(last.usage, last.timings, last.finish_reason))
        held = last.usage.total_tokens if self.history else 0
        notice(f"context {held} of {self._llm.context} tokens · {len(self.history) // 2} turns")


@contextlib.contextmanager
def _interrupts(event: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set an event in place of raising KeyboardInterrupt."""
    previous = signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Talk with a model that has a chat template. Ctrl-C stops an answer; /help lists the "
        "commands. Each line of stdin is a message, so a conversation can come from a pipe too."
    )
    add_template_flags(parser)
    add_model_flags(parser)
    add_generate_flags(parser)


def _run(arguments: argparse.Namespace) -> int:
    terminal = stdin().isatty()
    system = None if arguments.system is None else checked(arguments.system, "--system")
    template = arguments.template or "default"
    with load_model(arguments) as llm:
        require_template(llm, template)
        chat = Chat(llm, system=system, template=template, options=generate_options(arguments))
        if terminal:
            notice(f"{llm.manifest.name} · context {llm.context} tokens · /help lists the commands")
        return _loop(chat, terminal=terminal)


def _loop(chat: Chat, *, terminal: bool) -> int:
    """Read and answer lines until there are no more; the exit status."""
    interrupted = False
    while True:
        try:
            line = _read_terminal() if terminal else read_text(sys.stdin.readline, "stdin")
            if not line or not chat.handle(line):
                return 0
            interrupted = False
        except KeyboardInterrupt:
            if interrupted:
                return 130
            interrupted = True
            notice("\nCtrl-C again, Ctrl-D or /exit leaves.")
        except EdgeLLMError as error:
            if not terminal:  # nobody is there to put it right
                raise
            notice(f"edge-llm: {error}")


def _read_terminal() -> str:
    """A line and its end, edited with readline where there is one; empty at the end of input."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - input() uses it once it is imported
    try:
        if sys.stdout.isatty():
            return read_text(lambda: input("> "), "the message") + "\n"
        print("> ", end="", file=sys.stderr, flush=True)  # stdout is a file: answers only
        return read_text(input, "the message") + "\n"
    except EOFError:
        notice("")
        return ""


COMMAND = Command("chat", "talk with a model", _configure, _run)
