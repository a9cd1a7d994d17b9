"""A row of the cache and the tokens that it holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.runtime.decoder import Decoder

__all__ = ["Slot"]


class Slot:
    """Feeds prompts in chunks and answers token by token, and remembers what is in the cache.

    Args:
        decoder: The model.
        planner: Sizes of chunks.
    """

    def __init__(self, decoder: Decoder, planner: ChunkPlanner) -> None:
        self._decoder = decoder
        self._planner = planner
        # What the cache's row holds: the first `length` entries.
        self._held = np.zeros(decoder.cache.capacity, np.int64)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._decoder.cache.lengths[0])

    @property
    def room(self) -> int:
        """Tokens that can be appended and all be dropped again."""
        return self._decoder.cache.room(0)

    def drop(self, count: int) -> None:
        """Take back the last ``count`` tokens, of which there was :attr:`room` before them."""
        if count:
            length = self.length - count
            left = self._decoder.cache.truncate(0, length)
            assert left == length

    def rewind(self, prompt: NDArray[np.int64]) -> int:
        """Keep the longest common prefix of the cache and ``prompt``, drop the rest.

        The prompt's last token is left to be computed, for its logits, and the one before it too:
        a token alone takes another kernel, which rounds otherwise, and the same prompt shall give
        the same logits however much of it is reused.

        Returns:
            How many tokens of the prompt are in the cache; none where what comes behind them
            cannot be dropped from a window.
        """
        limit = min(self.length, max(0, len(prompt) - 2))
        different = np.flatnonzero(self._held[:limit] != prompt[:limit])
        common = int(different[0]) if len(different) else limit
        return self._decoder.cache.truncate(0, common)

    def clear(self) -> None:
        """Forget everything."""
        self._decoder.cache.truncate(0, 0)

    def feed(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        """Append tokens; logits float32 [scored, vocab] of the last ones, valid until the next."""
        start = self.length
        self._held[start : start + len(tokens)] = tokens
        return self._decoder.step(tokens, scored=scored)

    def prefill(
        self, prompt: NDArray[np.int64], *, between: Callable[[int], bool]
    ) -> NDArray[np.float32] | None:
        """Feed what the cache does not hold of ``prompt``, in chunks.

        Args:
            prompt: All tokens of the prompt; the cache holds a proper prefix of it.
            between: Called before each chunk with the number of tokens done; True stops.

        Returns:
            Logits of the last token, float32 [vocab], or None if it was stopped.
        """
        done = self.length
        while True:
            if between(done):
                return None
            chunk = self._planner.next(len(prompt) - done)
            last = done + chunk == len(prompt)
            started = time.perf_counter()
            logits = self.feed(prompt[done : done + chunk], scored=int(last))
            self._planner.observe(chunk, time.perf_counter() - started)
            done += chunk
            if last:
                row: NDArray[np.float32] = logits[0]
                return row
