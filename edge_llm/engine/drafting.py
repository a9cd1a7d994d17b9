"""How many drafts a step verifies: what all requests of a model share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edge_llm.engine.step_costs import WIDTHS, StepCosts

if TYPE_CHECKING:
    from edge_llm.engine.job import Feed
    from edge_llm.engine.slot import Slot

__all__ = ["Drafting"]

# Bytes of logits that a step of several rows may give.
LOGITS_BYTES = 16 << 20


class Drafting:
    """Chooses the width of each step by what widths cost here, for each number of rows.

    Args:
        costs: What steps of one row cost.
        possible: Whether the graph can verify drafts.
        vocab: Width of the logits.

    Attributes:
        costs: What steps of one row cost.
        possible: Whether the graph can verify drafts.
        tried: Whether it is known that all widths give the same logits, or only one is used.
    """

    def __init__(self, costs: StepCosts, *, possible: bool, vocab: int) -> None:
        self.costs = costs
        self.possible = possible
        self.tried = False
        self._most_logits = max(1, LOGITS_BYTES // (4 * vocab))
        self._by_rows = {1: costs}
        self._single = dict[int, float]()

    def most(self, slot: Slot, remaining: int) -> int:
        """Most tokens of a row's next step.

        Near the end of the cache, and before a window moves on, drafts end as far ahead as the
        widest could reach: at the same place however wide they are. An answer's last token may be
        fed with a draft that cannot come true, for the same reason.

        Args:
            slot: What the step adds to.
            remaining: Tokens that the answer may still get, at least 1.
        """
        return min(WIDTHS[-1], max(1, min(slot.room - WIDTHS[-1], max(WIDTHS[0], remaining))))

    def width(self, feeds: Sequence[Feed]) -> int:
        """Most tokens of each row in a step over these: 1, and the drafts that pay."""
        rows = len(feeds)
        guesses = [(feed.chance, 1 + len(feed.drafts)) for feed in feeds if feed.drafts]
        if not guesses:
            return 1
        costs = self._costs(rows)
        if rows == 1:
            return costs.best(guesses)
        most = self._most_logits // rows
        return costs.best([(chance, min(own, most)) for chance, own in guesses], rows=rows)

    def observe(self, rows: int, width: int, seconds: float) -> None:
        """Learn what a step took."""
        if rows in self._by_rows:
            self._by_rows[rows].observe(width, seconds)
        elif width == 1:
            self._single[rows] = seconds

    def _costs(self, rows: int) -> StepCosts:
        """What steps of so many rows cost; at first, what a row of as many tokens would."""
        if rows not in self._by_rows:
            curve = self.costs.curve
            guess = {width: _tokens(curve, width * rows) / _tokens(curve, rows) for width in WIDTHS}
            single = self._single.get(rows, 1.0)
            self._by_rows[rows] = StepCosts(single=single, curve=guess)
        return self._by_rows[rows]


def _tokens(curve: Mapping[int, float], count: int) -> float:
    """The cost of a step over ``count`` tokens, on straight lines through a curve's points."""
    points = sorted({1: 1.0, **curve}.items())
    right = min(bisect_left(points, (count,), 1), len(points) - 1)
    (before, low), (behind, high) = points[right - 1 : right + 1]
    return max(low, low + (high - low) * (count - before) / (behind - before))
