"""How likely the model finds a given text, and its whole distributions over next tokens."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.engine.job import Feed, Job, Steps
from edge_llm.errors import CancelledError, DeadlineError
from edge_llm.results import FinishReason, Score

if TYPE_CHECKING:
    from edge_llm.engine.slot import Slot

__all__ = [
    "Distributions",
    "ScoreEnd",
    "Scoring",
    "even_pieces",
    "log_probabilities",
    "scored_width",
]

# A row of logits takes 4 bytes per token of the vocabulary; this bounds the rows of a step.
LOGITS_BYTES = 16 << 20
WIDEST = 128
# A token that is fed alone takes another kernel, which rounds otherwise on quantized weights; at
# this width a text can be cut so that none is.
NARROWEST = 4


def scored_width(vocab: int) -> int:
    """Most tokens to score in a step, so that their logits take a bounded amount of memory."""
    return max(NARROWEST, min(WIDEST, LOGITS_BYTES // (4 * vocab)))


def even_pieces(tokens: NDArray[np.int64], width: int) -> list[NDArray[np.int64]]:
    """Cut int64 [tokens] into as few pieces of at most ``width`` as there can be, alike in size."""
    return np.array_split(tokens, -(-len(tokens) // width)) if len(tokens) else []


@dataclass(frozen=True, slots=True)
class ScoreEnd:
    """The scores, or why there are none."""

    logprobs: NDArray[np.float64]
    reason: FinishReason | None


class Scoring(Job):
    """Scores a text in steps whose logits stay within a fixed amount of memory.

    Beside other jobs they are as short as those of prompts.

    Puts one :class:`ScoreEnd`.

    Args:
        tokens: int64 [tokens], at most the context.
        vocab: Width of the logits.
        cancel: Ends the job when it is set.
        timeout: Seconds after which the job ends.
        priority: Of two waiting jobs the one with the higher priority is served first.
    """

    kind = "score"

    def __init__(
        self,
        tokens: NDArray[np.int64],
        *,
        vocab: int,
        cancel: threading.Event | None,
        timeout: float | None,
        priority: int = 0,
    ) -> None:
        super().__init__(cancel=cancel, timeout=timeout, priority=priority)
        self._timeout = timeout
        self._tokens = tokens
        self._width = scored_width(vocab)

    def steps(self, slot: Slot) -> Steps:
        """Feed all tokens but the last, and look up each next one in the logits."""
        slot.clear()
        targets = self._tokens[1:]
        scores = np.empty(len(targets), np.float64)
        done = 0
        for piece in even_pieces(self._tokens[:-1], self._width):
            left = piece
            while len(left):
                logits = yield Feed(left, scored=len(left), exact=True)
                assert logits is not None
                part = slice(done, done + len(logits))
                scores[part] = log_probabilities(logits, targets[part])
                done, left = part.stop, left[len(logits) :]
        self.put(ScoreEnd(scores, None))

    def interrupted(self) -> None:
        """Put the reason in place of scores."""
        self.put(ScoreEnd(np.empty(0), self.ended() or "cancelled"))

    def score(self, end: object) -> Score:
        """The caller's result.

        Args:
            end: What was put.

        Raises:
            DeadlineError: The time was up.
            CancelledError: The work was cancelled.
        """
        assert isinstance(end, ScoreEnd)
        if end.reason == "timeout":
            raise DeadlineError(
                f"Scoring took longer than {self._timeout} seconds.", "Allow it more."
            )
        if end.reason is not None:
            raise CancelledError("Scoring was cancelled.")
        return Score(tokens=tuple(self._tokens.tolist()), logprobs=tuple(end.logprobs.tolist()))


class Distributions(Job):
    """Gives the logits behind each of a sequence's last tokens.

    Puts one float32 [last, vocab], or None where it was ended. A long sequence is asked for piece
    by piece: each job goes on from what the one before left in the cache, or computes it again
    where another request came in between, so that nothing hangs on the order of requests.

    Args:
        tokens: int64 [tokens], at most the context.
        last: How many of them to give logits for, at least 1.
        continued: How many leading tokens the job before was given; 0 starts afresh.
    """

    kind = "logits"

    def __init__(self, tokens: NDArray[np.int64], *, last: int, continued: int) -> None:
        assert 0 <= continued <= len(tokens) - last < len(tokens)
        # Of a row no more than this is kept, so what is reused does not hang on other requests.
        super().__init__(
            cancel=None, timeout=None, prompt=tokens[: continued + 2 if continued else 0]
        )
        self._tokens = tokens
        self._last = last
        self._continued = continued

    def steps(self, slot: Slot) -> Steps:
        """Feed what the cache does not hold, all but the last tokens without logits."""
        if not self._continued or slot.rewind(self.prompt) != self._continued:
            slot.clear()  # what is reused would depend on who asked for what before
        begin = len(self._tokens) - self._last
        while slot.length < begin:
            yield Feed(self._tokens[slot.length : begin], scored=0, exact=True)
        parts = []
        while slot.length < len(self._tokens):
            left = self._tokens[slot.length :]
            logits = yield Feed(left, scored=len(left), exact=True)
            assert logits is not None
            parts.append(logits.copy())
        self.put(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def interrupted(self) -> None:
        """Put nothing in place of logits."""
        self.put(None)


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
