"""How likely the model finds a given text."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.engine.job import Job
from edge_llm.results import FinishReason

if TYPE_CHECKING:
    from edge_llm.engine.slot import Slot

__all__ = ["ScoreEnd", "Scoring", "log_probabilities"]

# A row of logits takes 4 bytes per token of the vocabulary; this bounds the rows of a step.
LOGITS_BYTES = 16 << 20
WIDEST = 128


@dataclass(frozen=True, slots=True)
class ScoreEnd:
    """The scores, or why there are none."""

    logprobs: NDArray[np.float64]
    reason: FinishReason | None


class Scoring(Job):
    """Scores a text in steps whose logits stay within a fixed amount of memory.

    Puts one :class:`ScoreEnd`.

    Args:
        tokens: int64 [tokens], at most the context.
        vocab: Width of the logits.
        cancel: Ends the job when it is set.
        timeout: Seconds after which the job ends.
    """

    def __init__(
        self,
        tokens: NDArray[np.int64],
        *,
        vocab: int,
        cancel: threading.Event | None,
        timeout: float | None,
    ) -> None:
        super().__init__(cancel=cancel, timeout=timeout)
        self._tokens = tokens
        self._width = max(1, min(WIDEST, LOGITS_BYTES // (4 * vocab)))

    def run(self, slot: Slot) -> None:
        """Feed all tokens but the last, and look up each next one in the logits."""
        slot.clear()
        inputs, targets = self._tokens[:-1], self._tokens[1:]
        scores = np.empty(len(targets), np.float64)
        for start in range(0, len(inputs), self._width):
            if self.ended():
                self.interrupted()
                return
            part = slice(start, start + self._width)
            chunk = inputs[part]
            scores[part] = log_probabilities(slot.feed(chunk, scored=len(chunk)), targets[part])
        self.put(ScoreEnd(scores, None))

    def interrupted(self) -> None:
        """Put the reason in place of scores."""
        self.put(ScoreEnd(np.empty(0), self.ended() or "cancelled"))


def log_probabilities(
    logits: NDArray[np.float32], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Log-softmax of each row at its target.

    Args:
        logits: float32 [n, vocab].
        targets: int64 [n].

    Returns:
        float64 [n], in nats.
    """
    scores = np.empty(len(targets), np.float64)
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):
        highest = row.max()
        total = np.exp(row - highest).sum(dtype=np.float64)
        scores[i] = row[target] - highest - np.log(total)
    return scores
