"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from edge_llm.errors import ArgumentError

__all__ = ["StopMatcher"]


class StopMatcher:
    """Ends a text at the first stop string, however the text was cut into pieces.

    Of all stop strings the one that is complete first, as characters arrive one at a time, wins;
    of several that are complete at the same character, the one that starts first (the longest).
    The text before it is shown; the stop string and what follows are not.

    Args:
        stops: The stop strings; may be none.

    Raises:
        ArgumentError: A stop string is empty or no string.
    """

    __slots__ = ("_held", "_longest", "_stops", "matched")

    matched: str | None
    """The stop string that ended the text, or None while there is none."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ArgumentError("stop", "a sequence of strings that are not empty", stops)
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched = None

    def decode(self, piece: str) -> str:
        """Takes the next piece of text.

        Args:
            piece: Text; may be empty.

        Returns:
            The text that is safe to show now: neither part of a stop string nor, so far, the
            beginning of one. Empty after a match.
        """
        if self.matched is not None:
            return ""
        text = self._held + piece
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[:start]
        cut = len(text) - self._partial(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Ends the text.

        Returns:
            The text held back as the possible beginning of a stop string.
        """
        held, self._held = self._held, ""
        return held

    def _partial(self, text: str) -> int:
        """The length of the longest suffix of `text` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
