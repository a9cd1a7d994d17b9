"""What a command is: edge_llm's own, and those that other packages bring by entry point."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from edge_llm.errors import EdgeLLMError

__all__ = ["Command", "Unavailable", "further_commands"]

GROUP = "edge_llm.commands"
INSTALL_EXPORT = "Install it with `pip install 'edge-llm[export]'`."


@dataclass(frozen=True, slots=True)
class Command:
    """One word behind ``edge-llm``.

    Another package adds a command by an entry point of the group ``edge_llm.commands`` that names
    a ``Command``. Its module must import fast, for ``edge-llm --help`` imports it.

    Attributes:
        name: The word.
        summary: A line for ``edge-llm --help``.
        configure: Adds the command's arguments to its parser.
        run: Does the work; gives the exit status. Errors of edge_llm become a line on stderr.
    """

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Unavailable(Command):
    """A command that is known but not installed, or not installed rightly."""


def further_commands() -> dict[str, Command]:
    """The commands of other packages by name; "export" is always one."""
    from importlib.metadata import entry_points

    found: dict[str, Command] = {}
    for entry in entry_points(group=GROUP):
        try:
            command = entry.load()
        except (ImportError, AttributeError) as error:
            command = _unavailable(entry.name, str(error))
        found.setdefault(entry.name, command)
    found.setdefault("export", _unavailable("export", "it is not installed"))
    return found


def _unavailable(name: str, reason: str) -> Command:
    remedy = INSTALL_EXPORT if name == "export" else "Install the package that brings it again."

    def refuse(arguments: argparse.Namespace) -> NoReturn:
        raise EdgeLLMError(f"`edge-llm {name}` cannot run: {reason}.", remedy)

    return Unavailable(name, "(not installed)", lambda parser: None, refuse)
