"""Penalties on tokens that were used before; their cost does not grow with the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenCounts", "apply_count_penalties", "apply_repetition_penalty"]


class TokenCounts:
    """The distinct tokens seen so far and how often each was seen.

    Args:
        tokens: Token ids to start with.
    """

    __slots__ = ("_counts", "_slots", "_tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        start, counts = np.unique(np.fromiter(tokens, np.int64), return_counts=True)
        self._tokens = start.astype(np.int64)  # (capacity,), the first len(self._slots) are in use
        self._counts = counts.astype(np.int64)
        self._slots = {token: slot for slot, token in enumerate(start.tolist())}

    def add(self, token: int) -> None:
        """Counts one more occurrence of a token.

        Args:
            token: The token's id.
        """
        used = len(self._slots)
        slot = self._slots.setdefault(token, used)
        if slot < used:
            self._counts[slot] += 1
            return
        if used == self._tokens.size:
            room = np.zeros(max(64, used), np.int64)
            self._tokens = np.concatenate([self._tokens, room])
            self._counts = np.concatenate([self._counts, room])
        self._tokens[slot] = token
        self._counts[slot] = 1

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The distinct ids: (distinct,) int64, a view that the next `add` may outdate."""
        return self._tokens[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each of `tokens` was seen: (distinct,) int64, a view like `tokens`."""
        return self._counts[: len(self._slots)]


def apply_repetition_penalty(
    logits: NDArray[np.float32], tokens: NDArray[np.int64], penalty: float
) -> None:
    """Divides positive and multiplies negative logits of the given tokens by the penalty, in place.

    Source: CTRL (Keskar et al. 2019, arXiv:1909.05858), in the form that transformers'
    RepetitionPenaltyLogitsProcessor gives it.

    Args:
        logits: (vocab,) float32, changed.
        tokens: (distinct,) int64, each id once.
        penalty: Above 1 makes the tokens less likely, below 1 more likely.
    """
    scores = logits[tokens]
    logits[tokens] = np.where(scores < 0, scores * penalty, scores / penalty)


def apply_count_penalties(
    logits: NDArray[np.float32],
    tokens: NDArray[np.int64],
    counts: NDArray[np.int64],
    *,
    presence: float,
    frequency: float,
) -> None:
    """Subtracts `presence + frequency * count` from the logits of the given tokens, in place.

    Source: the OpenAI API's `presence_penalty` and `frequency_penalty`.

    Args:
        logits: (vocab,) float32, changed.
        tokens: (distinct,) int64, each id once.
        counts: (distinct,) int64, how often each was used.
        presence: What a token loses for being there at all, in logits.
        frequency: What it loses for each occurrence, in logits.
    """
    logits[tokens] -= (presence + frequency * counts).astype(np.float32)
