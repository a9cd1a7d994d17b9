"""What a row of the cache holds, copied for the disk while the row goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_llm.caching.prefixes import PrefixCache
    from edge_llm.runtime.decoder import StateCache

__all__ = ["Arrays", "Offer", "Snapshot"]

log = logging.getLogger("edge_llm")

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of what a row of the cache holds, for any thread to write while the row goes on.

    Attributes:
        cache: The decoder's state that it is from.
        tokens: int64 [tokens].
        arrays: See :meth:`~edge_llm.runtime.decoder.StateCache.read_row`.
    """

    cache: StateCache
    tokens: NDArray[np.int64]
    arrays: Arrays

    @classmethod
    def of(cls, cache: StateCache, row: int, tokens: NDArray[np.int64]) -> Snapshot:
        """Copy a row.

        Args:
            cache: The decoder's state.
            row: The row, which begins with the tokens.
            tokens: int64 [tokens].
        """
        views = cache.read_row(row, len(tokens))
        return cls(cache, tokens.copy(), {name: view.copy() for name, view in views.items()})


class Offer:
    """A prompt in a row of the cache, to be written when its answer is done.

    It is copied and written beside the engine's thread. While it is copied, only what comes behind
    it may change in the row; nobody waits for the disk. Nothing here is called by two threads at
    once.

    Args:
        prefixes: Where to.
        cache: The decoder's state.
        row: The row that holds it.
        tokens: int64 [tokens], the row's first ones.
    """

    def __init__(
        self, prefixes: PrefixCache, cache: StateCache, row: int, tokens: NDArray[np.int64]
    ) -> None:
        self._prefixes = prefixes
        self._cache = cache
        self._row = row
        self._tokens = tokens
        self._started = False
        self._read = threading.Event()
        self._read.set()

    def before_step(self, count: int) -> None:
        """So many tokens are about to be fed: write at once what windows would drop for them."""
        if not self._started:
            length = int(self._cache.lengths[self._row])
            if self._cache.shortest(length + count) > len(self._tokens):
                self.write()
                self.release()

    def write(self) -> None:
        """Begin to write, unless that has happened, or the row was lost in a step."""
        if self._started or self._cache.lengths[self._row] < len(self._tokens):
            return
        self._started = True
        self._read.clear()
        began = False
        try:
            began = self._prefixes.start(self._run)
        finally:
            if not began:  # nobody else would end the wait for it
                self._read.set()

    def move(self, row: int) -> None:
        """The prompt now stands in another row."""
        self.release()
        self._row = row

    def release(self) -> None:
        """Wait until the row has been copied: its beginning is about to change."""
        self._read.wait()

    def _run(self) -> None:
        try:
            try:
                held = Snapshot.of(self._cache, self._row, self._tokens)
            finally:
                self._read.set()
            self._prefixes.write(held)
        except MemoryError as error:  # nobody asked for it, so nobody is told
            log.debug("nothing is written: %r", error)
