"""Word lists and sentence templates, one entry a line; an entry weighs as often as it stands."""

from __future__ import annotations

from pathlib import Path


def lines(name: str) -> tuple[str, ...]:
    """The entries of one list.

    Args:
        name: The file's name without ".txt".

    Returns:
        Its lines, in order.
    """
    path = Path(__file__).with_name(f"{name}.txt")
    return tuple(path.read_text("utf-8").splitlines())
