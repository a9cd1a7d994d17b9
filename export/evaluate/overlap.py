"""Calibration text must not be the text that is scored: a model fits what it was fitted to."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError

__all__ = ["PASSAGE", "check_disjoint", "shared_passage"]

PASSAGE = 64
"""Characters that two texts must share to overlap; a power of two."""

_BASE = np.uint64(0x9E3779B97F4A7C15)  # any large odd number


def check_disjoint(calibration: str, scored: str) -> None:
    """Refuse a calibration text that shares a passage with the text that is to be scored.

    Args:
        calibration: What the weights are fitted to.
        scored: What the model is measured on.

    Raises:
        ArgumentError: See :func:`shared_passage`.
    """
    passage = shared_passage(calibration, scored)
    if passage is not None:
        raise ArgumentError(
            "calibration",
            f"text of which the scored text has no passage of {PASSAGE} characters",
            passage,
            "This passage is in both: a model that was fitted to a text looks better on it than it "
            "is. Take another text for one of the two.",
        )


def shared_passage(calibration: str, scored: str) -> str | None:
    """A passage of :data:`PASSAGE` characters that two texts share.

    Case, punctuation and white space do not matter: rulers and line breaks make no passage, and
    hide none. Of a text that is shorter, all of it is the passage.

    Returns:
        The first such passage of ``scored``, in lower case with a space between words; None where
        there is none.
    """
    left, right = _words(calibration), _words(scored)
    shorter, longer = sorted((left, right), key=len)
    if len(shorter) < PASSAGE:
        return shorter if shorter and shorter in longer else None
    for start in np.flatnonzero(np.isin(_hashes(right), _hashes(left))):
        passage = right[start : start + PASSAGE]
        if passage in left:  # a hash alone may lie
            return passage
    return None


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def _hashes(text: str) -> NDArray[np.uint64]:
    """A polynomial hash (modulo 2**64) of each passage, by doubling the length.

    Returns:
        uint64 [characters - PASSAGE + 1].
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes, base, length = codes.astype(np.uint64), _BASE, 1
    with np.errstate(over="ignore"):
        while length < PASSAGE:
            hashes = hashes[:-length] * base + hashes[length:]
            base, length = base * base, 2 * length
    return hashes
