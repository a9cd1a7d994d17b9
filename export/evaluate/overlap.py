"""Calibration text must not be the text that is scored: a model fits what it was fitted to."""

from __future__ import annotations

import re
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError

__all__ = ["PASSAGE", "ScoredText", "check_disjoint"]

PASSAGE = 64
"""Characters that two texts must share to overlap; a power of two."""

_BASE = np.uint64(0x9E3779B97F4A7C15)  # any large odd number


def check_disjoint(calibration: str, scored: str) -> None:
    """Refuse a calibration text that shares a passage with the text that is to be scored.

    Args:
        calibration: What the weights are fitted to.
        scored: What the model is measured on.

    Raises:
        ArgumentError: See :meth:`ScoredText.passage`; it says on which lines the passage ends.
    """
    passage = ScoredText(scored).passage(calibration)
    if passage is not None:
        raise ArgumentError(
            "calibration",
            f"text of which the scored text has no passage of {PASSAGE} characters",
            passage,
            f"This passage ends on line {_last_line(calibration, passage)} of the calibration text "
            f"and on line {_last_line(scored, passage)} of the scored text: a model that was "
            "fitted to a text looks better on it than it is. Take another text for one of the two.",
        )


class ScoredText:
    """A text that a model is measured on, to be compared with others.

    Case, punctuation and white space do not matter: rulers and line breaks make no passage, and
    hide none.
    """

    def __init__(self, text: str) -> None:
        self._words = _words(text)
        self._hashes = _hashes(self._words)
        self._sorted = np.sort(self._hashes)

    def passage(self, other: str) -> str | None:
        """A passage of :data:`PASSAGE` characters that another text shares with this one.

        Of a text that is shorter, all of it is the passage.

        Returns:
            The first such passage of this text, in lower case with a space between words; None
            where there is none.
        """
        words = _words(other)
        shorter, longer = sorted((words, self._words), key=len)
        if len(shorter) < PASSAGE:
            return shorter if shorter and shorter in longer else None
        hashes = _hashes(words)
        nearest = np.searchsorted(self._sorted, hashes).clip(max=len(self._sorted) - 1)
        common = hashes[self._sorted[nearest] == hashes]
        if not len(common):
            return None
        for start in np.flatnonzero(np.isin(self._hashes, common)):
            passage = self._words[start : start + PASSAGE]
            if passage in words:  # a hash alone may lie
                return passage
        return None


def _last_line(text: str, passage: str) -> int:
    """The line on which a passage first ends, counted from 1."""
    lines, passage = text.split("\n"), passage.strip()
    counts = range(1, len(lines) + 1)
    return counts[bisect_left(counts, True, key=lambda n: passage in _words("\n".join(lines[:n])))]


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def _hashes(text: str) -> NDArray[np.uint64]:
    """A polynomial hash (modulo 2**64) of each passage, by doubling the length.

    Returns:
        uint64 [characters - PASSAGE + 1], or none.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes, base, length = codes.astype(np.uint64), _BASE, 1
    with np.errstate(over="ignore"):
        while length < PASSAGE:
            hashes = hashes[:-length] * base + hashes[length:]
            base, length = base * base, 2 * length
    return hashes
