"""A row of the cache and the tokens that it holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.caching.prefixes import Offer, PrefixCache, common_length
from edge_llm.caching.state_file import SavedState, write_state
from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.results import PrefixBreak
from edge_llm.runtime.decoder import Decoder

__all__ = ["Reuse", "Slot"]


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
    """Feeds prompts in chunks and answers token by token, and remembers what is in the cache.

    Args:
        decoder: The model.
        planner: Sizes of chunks.
        prefixes: Where prompts' beginnings are looked up and kept.
    """

    def __init__(
        self, decoder: Decoder, planner: ChunkPlanner, prefixes: PrefixCache | None = None
    ) -> None:
        self._decoder = decoder
        self._planner = planner
        self._prefixes = prefixes
        # The prompt that the row begins with, where it is to be written to the prefix cache.
        self._offer: Offer | None = None
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
        self._withdraw()
        common = common_length(self._held[: self.length], prompt[: max(0, len(prompt) - 2)])
        return self._decoder.cache.truncate(0, common)

    def recall(self, prompt: NDArray[np.int64]) -> Reuse:
        """Do as :meth:`rewind`, and take more of the prompt from the prefix cache if it is there.

        Args:
            prompt: int64 [tokens].
        """
        known: list[NDArray[np.integer]] = [self._held[: self.length].copy()]
        reused, loaded = self.rewind(prompt), 0
        if self._prefixes is not None:
            known.append(self._prefixes.closest(prompt))
            loaded = self._prefixes.restore(self._decoder.cache, 0, prompt, beyond=reused)
            self._held[:loaded] = prompt[:loaded]
        return Reuse(loaded or reused, loaded, _first_break(prompt, known))

    def settle(self) -> None:
        """Begin to write the prompt that the row begins with, if it is to be kept.

        For after a job: nobody waits for an answer then.
        """
        if self._offer is not None:
            self._offer.write()

    def bake(self) -> Path | None:
        """Write all that the row holds to the prefix cache, to last; None where that fails."""
        assert self._prefixes is not None
        return self._prefixes.bake(self._decoder.cache, 0, self._held[: self.length])

    def save(self, path: Path, owner: str) -> int:
        """Write all that the row holds to a file of its own.

        Args:
            path: Where to.
            owner: See :func:`~edge_llm.states.state_owner`.

        Returns:
            How many tokens that are.

        Raises:
            OSError: The system refuses.
        """
        length = self.length
        arrays = self._decoder.cache.read_row(0, length)
        write_state(path, owner, self._held[:length], arrays)
        return length

    def load(self, saved: SavedState) -> bool:
        """Put what :meth:`save` wrote into the row; False where it does not fit into this cache."""
        length = len(saved.tokens)
        if not self._decoder.cache.accepts(length, saved.arrays):
            return False
        self._withdraw()
        self._decoder.cache.write_row(0, length, saved.arrays)
        self._held[:length] = saved.tokens
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._withdraw()
        self._decoder.cache.truncate(0, 0)

    def _withdraw(self) -> None:
        """See to it that nobody reads the row's beginning, before it changes."""
        if self._offer is not None:
            self._offer.release()
            self._offer = None

    def feed(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        """Append tokens; logits float32 [scored, vocab] of the last ones, valid until the next."""
        if self._offer is not None:
            self._offer.before_step(len(tokens))
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
        done = reused = self.length
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
                if self._prefixes is not None:
                    self._offer = self._prefixes.offer(
                        self._decoder.cache, 0, prompt, computed=len(prompt) - reused
                    )
                row: NDArray[np.float32] = logits[0]
                return row


def _first_break(
    prompt: NDArray[np.int64], known: Sequence[NDArray[np.integer]]
) -> PrefixBreak | None:
    """Where a prompt differs from that of some sequences which it follows farthest."""
    at, cached = max(((common_length(one, prompt), one) for one in known), key=lambda pair: pair[0])
    if not 0 < at < min(len(cached), len(prompt)):
        return None
    return PrefixBreak(position=at, cached=int(cached[at]), prompt=int(prompt[at]))
