"""Steps of the decoder for the rows of jobs."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.engine.drafting import Drafting
from edge_llm.engine.job import Feed
from edge_llm.engine.prompting import PromptChooser
from edge_llm.engine.slot import Slot
from edge_llm.runtime.decoder import Decoder

__all__ = ["Stepper"]

# Two widths whose logits are compared, and the only one that is used where they differ.
NARROW, WIDE = 2, 8
ONLY_WIDTH = 4

# This thread's own time leaves out when other programs had its core; on Windows it is too coarse.
_clock = time.perf_counter if sys.platform == "win32" else time.thread_time


class Stepper:
    """Computes what jobs want fed, and watches what it costs.

    Which width a draft gets depends on the clock, so the text must not depend on the width. It does
    not where a step gives a token the same logits, bit for bit, at every width of choice. That is
    tried once; where it is not so, all drafts get one width.

    Args:
        decoder: The model.
        planner: Sizes of chunks.
        drafting: Sizes of drafts.

    Attributes:
        chooser: Chooses the prompts of a step.
    """

    def __init__(self, decoder: Decoder, planner: ChunkPlanner, drafting: Drafting) -> None:
        self._decoder = decoder
        self._planner = planner
        self.chooser = PromptChooser(planner)
        # Where many logits are wanted, each token costs more: such chunks are watched apart.
        self._scoring_planner = copy.copy(planner)
        self._drafting = drafting

    def answer(self, slots: Sequence[Slot], feeds: Sequence[Feed]) -> list[NDArray[np.float32]]:
        """Feed each row its next token and drafts in one step.

        Args:
            slots: The rows.
            feeds: What each of them gets; one token each.

        Returns:
            Of each row float32 [1 + drafts that were fed, vocab], valid until the next step.
        """
        width = self._drafting.width(feeds)
        if width > 1 and not self._drafting.tried:
            slot, feed = next((s, f) for s, f in zip(slots, feeds, strict=True) if f.drafts)
            if not self._agree(slot, [*feed.tokens, *feed.drafts]):
                self._drafting.costs.widths = (ONLY_WIDTH,)
            self._drafting.tried = True
            width = self._drafting.width(feeds)
        if width > min(slot.room for slot in slots):
            width = 1  # every row of a step needs room for the widest one's tokens
        fed = [[*feed.tokens, *feed.drafts[: width - 1]] for feed in feeds]
        for slot, row in zip(slots, fed, strict=True):
            slot.note(row)
        started = _clock()
        logits = self._step(slots, fed, scored=[len(row) for row in fed])
        self._drafting.observe(len(slots), max(map(len, fed)), _clock() - started)
        return logits

    def prompts(self, slots: Sequence[Slot], feeds: Sequence[Feed]) -> list[NDArray[np.float32]]:
        """Feed several rows all of what is left of their prompts in one step.

        Args:
            slots: The rows; each has room for the longest of the prompts.
            feeds: What each of them gets; no drafts.

        Returns:
            Of each row float32 [scored, vocab], valid until the next step.
        """
        fed = [feed.tokens for feed in feeds]
        for slot, row in zip(slots, fed, strict=True):
            slot.note(row)
        return self._step(slots, fed, scored=[feed.scored for feed in feeds])

    def prompt(self, slot: Slot, feed: Feed) -> NDArray[np.float32] | None:
        """Feed a row several tokens, or the first of them as far as a chunk goes.

        Returns:
            float32 [scored, vocab] of what was fed, valid until the next step; None where nothing
            of it was to be scored and some was left over.
        """
        planner = self._scoring_planner if feed.scored > 1 else self._planner
        count = len(feed.tokens)
        chunk = planner.next(count, timed=not feed.exact)
        scored = max(0, feed.scored - (count - chunk))
        started = time.perf_counter()
        logits = self._feed(slot, feed.tokens[:chunk], scored=scored)
        planner.observe(chunk, time.perf_counter() - started)
        return logits if scored or chunk == count else None

    def _feed(
        self, slot: Slot, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        slot.note(tokens)
        return self._step([slot], [tokens], scored=[scored])[0]

    def _step(
        self,
        slots: Sequence[Slot],
        fed: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        scored: Sequence[int],
    ) -> list[NDArray[np.float32]]:
        """Run the graph for rows that have noted what they are fed; gives the logits of each."""
        first = min(slot.row for slot in slots)
        count = max(slot.row for slot in slots) - first + 1
        tokens: list[Sequence[int] | NDArray[np.int64]] = [()] * count
        wanted = [0] * count
        for slot, row, last in zip(slots, fed, scored, strict=True):
            tokens[slot.row - first], wanted[slot.row - first] = row, last
        logits = self._decoder.step_rows(tokens, scored=wanted, first=first)
        ends = np.cumsum(wanted)
        return [
            logits[ends[slot.row - first] - last : ends[slot.row - first]]
            for slot, last in zip(slots, scored, strict=True)
        ]

    def _agree(self, slot: Slot, tokens: Sequence[int]) -> bool:
        """Whether two widths give the same logits; leaves nothing behind."""
        trial = (list(tokens) * WIDE)[:WIDE]
        narrow = self._feed(slot, trial[:NARROW], scored=NARROW).copy()
        slot.drop(NARROW)
        wide = self._feed(slot, trial, scored=WIDE)
        slot.drop(WIDE)
        return np.array_equal(narrow, wide[:NARROW])
