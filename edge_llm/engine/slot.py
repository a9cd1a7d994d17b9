"""A row of the cache and the tokens that it holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_llm.caching.offers import Offer, Snapshot
from edge_llm.caching.prefixes import Found, PrefixCache, common_length
from edge_llm.caching.state_file import SavedState
from edge_llm.engine.job import Feed
from edge_llm.results import PrefixBreak
from edge_llm.runtime.decoder import StateCache

__all__ = ["Reuse", "Slot"]

log = logging.getLogger("edge_llm")

# By then a slow card has read a long prompt of a large model. A share that is gone may never
# answer: the prompt is computed.
PATIENCE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Reuse:
    """What of a prompt need not be computed.

    Attributes:
        tokens: Tokens that the row holds.
        from_disk: How many of them the prefix cache gave: all or none.
        broken: Where the prompt stopped matching what there was.
    """

    tokens: int
    from_disk: int
    broken: PrefixBreak | None


class Slot:
    """Remembers what is in a row of the cache.

    Args:
        cache: The decoder's state.
        row: Which row of it; moves when the engine closes a gap between two rows.
        prefixes: Where prompts' beginnings are looked up and kept.
    """

    def __init__(self, cache: StateCache, row: int, prefixes: PrefixCache | None = None) -> None:
        self.row = row
        self._cache = cache
        self._prefixes = prefixes
        # The prompt that the row begins with, where it is to be written to the prefix cache.
        self._offer: Offer | None = None
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
        self._withdraw()
        return self._cache.truncate(self.row, self.reusable(prompt))

    def recall(
        self, prompt: NDArray[np.int64]
    ) -> Generator[Feed, NDArray[np.float32] | None, Reuse]:
        """Steps that do as :meth:`rewind`, and take more from the prefix cache if it is there.

        Args:
            prompt: int64 [tokens].
        """
        known: list[NDArray[np.integer]] = [self.held.copy()]
        reused, loaded = self.rewind(prompt), 0
        search = None
        if self._prefixes is not None:
            search = self._prefixes.seek(
                self._cache, prompt, beyond=reused, patience=PATIENCE_SECONDS
            )
        if search is not None:
            try:
                yield Feed((), until=search, latest=time.perf_counter() + PATIENCE_SECONDS)
            finally:
                search.cancel()  # the job may have been ended meanwhile, or have waited long enough
        if search is not None and (found := _found(search)) is not None:
            known.append(found.closest)
            if found.arrays is not None:
                loaded = found.length
                self._cache.write_row(self.row, loaded, found.arrays)
                self._held[:loaded] = prompt[:loaded]
        return Reuse(loaded or reused, loaded, _first_break(prompt, known))

    def reusable(self, prompt: NDArray[np.int64]) -> int:
        """Tokens of a prompt that :meth:`rewind` would keep where the row can be rolled back."""
        return common_length(self.held, prompt[: max(0, len(prompt) - 2)])

    def clear(self) -> None:
        """Forget everything."""
        self._withdraw()
        self._cache.truncate(self.row, 0)

    def note(self, tokens: Sequence[int] | NDArray[np.int64]) -> None:
        """Remember tokens that the next step appends."""
        if self._offer is not None:
            self._offer.before_step(len(tokens))
        start = self.length
        self._held[start : start + len(tokens)] = tokens

    def copy(self, other: Slot, length: int) -> None:
        """Take over the first ``length`` tokens of another row, or none where they are gone."""
        self._withdraw()
        kept = self._cache.copy(other.row, self.row, length)
        self._held[:kept] = other._held[:kept]

    def swap(self, other: Slot) -> None:
        """Change places with a row that nobody needs, and which is empty then."""
        other.copy(self, self.length)
        self.row, other.row = other.row, self.row
        if self._offer is not None:
            self._offer.move(self.row)
        # A copy of this one's content would pass for what the other's caller has left there.
        other.clear()

    def offer(self, prompt: NDArray[np.int64], *, computed: int) -> None:
        """Have the prompt that the row was just fed with kept, if it is worth that.

        Args:
            prompt: int64 [tokens], all that the row holds.
            computed: How many of them had to be computed.
        """
        if self._prefixes is not None:
            self._offer = self._prefixes.offer(self._cache, self.row, prompt, computed=computed)

    def settle(self) -> None:
        """Begin to write the prompt that the row begins with, if it is to be kept.

        For after a job: nobody waits for an answer then.
        """
        if self._offer is not None:
            self._offer.write()

    def snapshot(self) -> Snapshot:
        """A copy of all that the row holds."""
        return Snapshot.of(self._cache, self.row, self.held)

    def load(self, saved: SavedState) -> bool:
        """Put what was once a row's into this one; False where it does not fit into this cache."""
        length = len(saved.tokens)
        if not self._cache.accepts(length, saved.arrays):
            return False
        self._withdraw()
        self._cache.write_row(self.row, length, saved.arrays)
        self._held[:length] = saved.tokens
        return True

    def _withdraw(self) -> None:
        """See to it that nobody reads the row's beginning, before it changes."""
        if self._offer is not None:
            self._offer.release()
            self._offer = None


def _found(search: Future[Found]) -> Found | None:
    """What was found; None on any doubt, for a prompt can always be computed."""
    try:
        return search.result(timeout=0)
    except Exception as error:
        log.debug("nothing is read: %r", error)
        return None


def _first_break(
    prompt: NDArray[np.int64], known: Sequence[NDArray[np.integer]]
) -> PrefixBreak | None:
    """Where a prompt differs from that of some sequences which it follows farthest."""
    at, cached = max(((common_length(one, prompt), one) for one in known), key=lambda pair: pair[0])
    if not 0 < at < min(len(cached), len(prompt)):
        return None
    return PrefixBreak(position=at, cached=int(cached[at]), prompt=int(prompt[at]))
