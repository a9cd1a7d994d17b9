"""Whose prompt is read next, and which other short ones along with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.engine.job import Feed
from edge_llm.engine.slot import Slot

__all__ = ["PromptChooser"]

# Of several prompts the one with the least left gets the next chunk, so that a short question need
# not wait for a long document; but every so many chunks the oldest gets it, however long it is.
OLDEST_EVERY = 4


class Prompting(Protocol):
    """A job whose prompt is read."""

    @property
    def slot(self) -> Slot:
        """Its row."""

    @property
    def feed(self) -> Feed:
        """What is left of its prompt."""


P = TypeVar("P", bound=Prompting)


class PromptChooser:
    """Chooses what the next step reads of prompts.

    A step costs something besides its tokens, so short prompts in rows beside each other are read
    in one. They are padded to the longest of them: at most half of what is saved goes into that.

    Args:
        planner: Knows how many tokens a step may take, and how many its own cost is worth.
    """

    def __init__(self, planner: ChunkPlanner) -> None:
        self._planner = planner
        self._steps = 0

    def next(self, prompting: Sequence[P]) -> list[P]:
        """One job, for a chunk of its prompt, or several, for all that is left of theirs.

        Args:
            prompting: All whose prompts are read, the oldest first.
        """
        self._steps += 1
        if self._steps % OLDEST_EVERY == 0:
            one = prompting[0]
        else:
            one = min(prompting, key=lambda job: len(job.feed.tokens))
        beside = {job.slot.row: job for job in prompting if job.feed.scored == 1}
        group = [one]
        if self._fits(group) and one.slot.row in beside:
            for direction in (1, -1):
                row = one.slot.row + direction
                while row in beside and self._fits([*group, beside[row]]):
                    group.append(beside[row])
                    row += direction
        return group

    def _fits(self, group: Sequence[Prompting]) -> bool:
        """Whether a step may read all of these prompts, and is the better for it."""
        lengths = [len(job.feed.tokens) for job in group]
        fed = len(group) * max(lengths)
        return (
            fed <= self._planner.tokens
            and fed - sum(lengths) <= (len(group) - 1) * self._planner.own_tokens / 2
            and max(lengths) <= min(job.slot.room for job in group)
        )
