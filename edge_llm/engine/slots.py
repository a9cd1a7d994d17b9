"""Which row of the cache a job works on."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from edge_llm.caching.prefixes import PrefixCache, common_length
from edge_llm.engine.slot import Slot
from edge_llm.runtime.decoder import StateCache

__all__ = ["Slots"]

# From so many tokens on, that another job is about to compute, it is worth waiting for them: they
# can be copied then, in far less time than they take to compute.
WORTH_WAITING = 32


class Slots:
    """The rows of a cache, each with what it last held.

    A step computes rows that lie beside each other, and one that lies between them idly costs as
    much as one that works. So jobs are given rows beside those that work, and the highest comes
    down where a gap stays open. What a prompt shares with any row, be it at work or not, is copied.

    Args:
        cache: The decoder's state.
        rows: How many rows it has.
        prefixes: Where prompts' beginnings are looked up and kept.
    """

    def __init__(self, cache: StateCache, rows: int, prefixes: PrefixCache | None = None) -> None:
        self.all: tuple[Slot, ...] = tuple(Slot(cache, row, prefixes) for row in range(rows))
        self._prompts: dict[Slot, NDArray[np.int64]] = {}
        self._used = dict.fromkeys(self.all, 0)
        self._clock = itertools.count(1)

    @property
    def busy(self) -> int:
        """Rows that jobs work on."""
        return len(self._prompts)

    def take(self, prompt: NDArray[np.int64], *, latest: bool = False) -> Slot | None:
        """A row for a prompt, with as much of it as any row holds.

        Args:
            prompt: int64 [tokens].
            latest: Give the row that was used last, as it is; an empty one where its content had
                to make room.

        Returns:
            None where all rows are taken, where another job is computing the same tokens now, or
            is at work on the row that was used last: ask again after its next step.
        """
        free = [slot for slot in self.all if slot not in self._prompts]
        if not free:
            return None
        if latest:
            slot = max(self.all, key=self._used.__getitem__)
            if slot in self._prompts:
                return None
            self._prompts[slot] = prompt
            return slot
        shared = {slot: slot.reusable(prompt) for slot in self.all} if len(prompt) else {}
        source = max(self.all, key=lambda slot: shared.get(slot, 0))
        most = shared.get(source, 0)
        if self._coming(prompt) >= most + WORTH_WAITING:
            return None
        target = min(
            free,
            key=lambda slot: (
                self._gaps(slot),
                shared.get(slot, 0) < max(most, 1),
                slot.length > 0,
                self._used[slot],
            ),
        )
        if shared.get(target, 0) < most:
            target.copy(source, most)
        self._prompts[target] = prompt
        return target

    def release(self, slot: Slot, *, used: bool = True) -> None:
        """A job has done with its row, which it has ``used``, or left as it was."""
        del self._prompts[slot]
        if used:
            self._used[slot] = next(self._clock)

    def give_back(self, slot: Slot, *, latest: bool = False) -> None:
        """A row was taken for nothing, which counts as no use; what was copied into it goes.

        Args:
            slot: The row.
            latest: As it was for :meth:`take`.
        """
        del self._prompts[slot]
        if not latest:
            slot.clear()

    def close_gap(self, working: list[Slot]) -> None:
        """Bring the highest of the rows that work down into a gap between them, if there is one.

        What the gap held is lost, so of several that one is filled that was used least recently.
        """
        rows = sorted(slot.row for slot in working)
        if rows[-1] - rows[0] < len(rows):
            return
        free = [slot for slot in self.all if slot not in self._prompts]
        gaps = [slot for slot in free if rows[0] < slot.row < rows[-1]]
        if gaps:
            highest = max(working, key=lambda slot: slot.row)
            highest.swap(min(gaps, key=self._used.__getitem__))

    def _coming(self, prompt: NDArray[np.int64]) -> int:
        """Most tokens of a prompt that a job is about to compute for its own."""
        most = 0
        for slot, other in self._prompts.items():
            if slot.length < len(other) - 1:
                most = max(most, min(common_length(other, prompt), len(prompt) - 2))
        return most

    def _gaps(self, slot: Slot) -> int:
        """Rows without work between those that work and this one."""
        rows = [one.row for one in (*self._prompts, slot)]
        return max(rows) - min(rows) + 1 - len(rows)
