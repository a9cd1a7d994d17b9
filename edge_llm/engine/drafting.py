"""Steps that verify drafts: what all requests of a model share."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.engine.step_costs import WIDTHS, StepCosts

if TYPE_CHECKING:
    from edge_llm.engine.slot import Slot

__all__ = ["Drafting"]

# Two widths whose logits are compared, and the only one that is used where they differ.
NARROW, WIDE = 2, 8
ONLY_WIDTH = 4

# This thread's own time leaves out when other programs had its core; on Windows it is too coarse.
_clock = time.perf_counter if sys.platform == "win32" else time.thread_time


class Drafting:
    """Feeds tokens and drafts, and watches what they cost.

    Which width a draft gets depends on the clock, so the text must not depend on the width. It does
    not where a step gives a token the same logits, bit for bit, at every width of choice. That is
    tried once; where it is not so, all drafts get one width.

    Args:
        costs: What steps cost on this machine.
        possible: Whether the graph can verify drafts.

    Attributes:
        costs: What steps cost on this machine.
        possible: Whether the graph can verify drafts.
    """

    def __init__(self, costs: StepCosts, *, possible: bool) -> None:
        self.costs = costs
        self.possible = possible
        self._tried = False

    def most(self, slot: Slot, remaining: int) -> int:
        """Most tokens of the next step.

        Near the end of the cache, and before a window moves on, drafts end as far ahead as the
        widest could reach: at the same place however wide they are. An answer's last token may be
        fed with a draft that cannot come true, for the same reason.

        Args:
            slot: What the step adds to.
            remaining: Tokens that the answer may still get, at least 1.
        """
        return max(1, min(slot.room - WIDTHS[-1], max(WIDTHS[0], remaining)))

    def feed(self, slot: Slot, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; logits float32 [tokens, vocab], valid until the next step."""
        if len(tokens) > 1 and not self._tried:
            if not self._agree(slot, tokens):
                self.costs.widths = (ONLY_WIDTH,)
            self._tried = True
        started = _clock()
        logits = slot.feed(tokens, scored=len(tokens))
        self.costs.observe(len(tokens), _clock() - started)
        return logits

    def _agree(self, slot: Slot, tokens: Sequence[int]) -> bool:
        """Whether two widths give the same logits; leaves nothing behind."""
        trial = (list(tokens) * WIDE)[:WIDE]
        narrow = slot.feed(trial[:NARROW], scored=NARROW).copy()
        slot.drop(NARROW)
        wide = slot.feed(trial, scored=WIDE)
        slot.drop(WIDE)
        return np.array_equal(narrow, wide[:NARROW])
