"""A row of the cache and the tokens that it holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_llm.runtime.decoder import StateCache

__all__ = ["Slot", "common_prefix"]


class Slot:
    """Remembers what is in a row of the cache.

    Args:
        cache: The decoder's state.
        row: Which row of it; moves when the engine closes a gap between two rows.
    """

    def __init__(self, cache: StateCache, row: int) -> None:
        self.row = row
        self._cache = cache
        # What the cache's row holds: the first `length` entries.
        self._held = np.zeros(cache.capacity, np.int64)

    @property
    def length(self) -> int:
        """Tokens in the row."""
        return int(self._cache.lengths[self.row])

    @property
    def room(self) -> int:
        """Tokens that can be appended and all be dropped again."""
        return self._cache.room(self.row)

    @property
    def held(self) -> NDArray[np.int64]:
        """The row's tokens, int64 [length]."""
        return self._held[: self.length]

    def drop(self, count: int) -> None:
        """Take back the last ``count`` tokens, of which there was :attr:`room` before them."""
        if count:
            length = self.length - count
            left = self._cache.truncate(self.row, length)
            assert left == length

    def rewind(self, prompt: NDArray[np.int64]) -> int:
        """Keep the longest common prefix of the row and ``prompt``, drop the rest.

        The prompt's last token is left to be computed, for its logits, and the one before it too:
        a token alone takes another kernel, which rounds otherwise, and the same prompt shall give
        the same logits however much of it is reused.

        Returns:
            How many of the prompt's tokens are in the row; none where what comes behind them cannot
            be dropped from a window.
        """
        return self._cache.truncate(self.row, self.reusable(prompt))

    def reusable(self, prompt: NDArray[np.int64]) -> int:
        """Tokens of a prompt that :meth:`rewind` would keep where the row can be rolled back."""
        return min(common_prefix(self.held, prompt), max(0, len(prompt) - 2))

    def clear(self) -> None:
        """Forget everything."""
        self._cache.truncate(self.row, 0)

    def note(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Remember tokens that the next step appends."""
        start = self.length
        self._held[start : start + len(tokens)] = tokens

    def copy(self, other: Slot, length: int) -> None:
        """Take over the first ``length`` tokens of another row, or none where they are gone."""
        kept = self._cache.copy(other.row, self.row, length)
        self._held[:kept] = other._held[:kept]

    def swap(self, other: Slot) -> None:
        """Change places with a row that nobody needs: this one's content is in both then."""
        other.copy(self, self.length)
        self.row, other.row = other.row, self.row


def common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many leading tokens are the same."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter
