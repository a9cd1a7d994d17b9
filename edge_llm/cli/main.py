"""The ``edge-llm`` command: finds the commands, and turns errors into exit statuses.

0 is success, 1 an error with a line on stderr, 2 wrong usage, 130 an interrupt from the keyboard
and 141 a reader that closed the pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from edge_llm import __version__
from edge_llm.cli import bake, batch, bench, chat, compile_, evaluate, import_, info, run, tune
from edge_llm.cli.command import Command, Unavailable, further_commands
from edge_llm.cli.layout import STDOUT, write
from edge_llm.errors import ArgumentError, EdgeLLMError, EdgeLLMWarning

__all__ = ["main"]

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit status.
    """
    _prepare_streams()
    if sys.stdout is None:
        print("edge-llm: stdout is closed.", file=sys.stderr)
        return 1
    try:
        try:
            return _dispatch(argv)
        finally:
            write("")
    except SystemExit as end:  # argparse's way to end
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt goes on a line of its own
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        # A file that cannot be read or written; without a name it is no mistake of the user's.
        if error.filename is None:
            raise
        if error.filename == STDOUT:
            _discard_stdout()
        return _fail(f"{error.filename}: {error.strerror}")


def _prepare_streams() -> None:
    # Python has None for a stream that was closed before it started; print(file=None) is stdout.
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        # A terminal or a pipe of another encoding gets "?" rather than an end in mid-answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _dispatch(argv: Sequence[str] | None) -> int:
    parser = _parser(_commands())
    arguments, unknown = parser.parse_known_args(argv)
    command: Command = arguments.command
    if unknown and not isinstance(command, Unavailable):
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    with _logging(arguments.verbose), _plain_warnings():
        try:
            return command.run(arguments)
        except EdgeLLMError as error:
            return _fail(_in_flags(error, arguments))


def _discard_stdout() -> None:
    # Python flushes stdout once more when it exits, and would complain.
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    write("")
    print("edge-llm:", " ".join(message.splitlines()), file=sys.stderr)
    return 1


def _in_flags(error: EdgeLLMError, arguments: argparse.Namespace) -> str:
    """The message, with the argument's name as the user writes it here, where it was given."""
    text = str(error)
    if isinstance(error, ArgumentError) and text.startswith(f"{error.argument} "):
        for action in arguments.parser._actions:
            flags: list[str] = [flag for flag in action.option_strings if flag.startswith("--")]
            given = getattr(arguments, action.dest, action.default) != action.default
            if action.dest == error.argument and flags and given:
                return flags[0] + text[len(error.argument) :]
    return text


def _commands() -> dict[str, Command]:
    """The commands by name: edge_llm's own, then those of other packages."""
    modules = (run, chat, batch, info, bench, tune, compile_, bake, evaluate, import_)
    own = {module.COMMAND.name: module.COMMAND for module in modules}
    return own | further_commands() | own  # ours come first, and nobody replaces them


def _parser(commands: dict[str, Command]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-llm",
        description="Small language models on your own CPU.",
        epilog="Exit status: 0 success, 1 an error (a line on stderr says which), 2 wrong usage, "
        "130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edge-llm {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="write what is being done to stderr"
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands.values():
        one = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary, allow_abbrev=False
        )
        # Both places are natural; what stands before the command must not be reset behind it.
        one.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            default=argparse.SUPPRESS,
            help="write what is being done to stderr",
        )
        command.configure(one)
        one.set_defaults(command=command, parser=one)
    return parser


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Write warnings of edge_llm as a user reads them, without the line of code that they name."""
    usual = warnings.formatwarning

    def plain(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if issubclass(category, EdgeLLMWarning):
            return f"edge-llm: warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


@contextlib.contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Send the log of edge_llm to stderr while the command runs, where it is wanted."""
    if not verbose:
        yield
        return
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log = logging.getLogger("edge_llm")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
