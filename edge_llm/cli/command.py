"""What a command is: edge_llm's own, and those that other packages bring by entry point."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Command"]


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
