"""Prompts' beginnings on the disk: what one process computed, later ones read."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.caching.folder import CacheFolder
from edge_llm.caching.state_file import (
    DoubtfulFileError,
    SavedState,
    cut,
    read_tokens,
    write_state,
)

if TYPE_CHECKING:
    from edge_llm.runtime.decoder import StateCache

__all__ = ["LIMIT", "Offer", "PrefixCache", "common_length"]

log = logging.getLogger("edge_llm")

BAKED = "baked-"
NAMED = rf"({BAKED})?[0-9a-f]{{32}}-[0-9a-f]{{32}}"

LIMIT = 1 << 30
"""Bytes of a prefix cache by default: some twenty prompts of 1,000 tokens of a 135M model."""

# So many tokens must have been computed, and be on no disk yet, for a prompt to be written.
WORTH = 256
# To read a token takes less than this share of computing it (benchmarks/prefix.py), so reading
# pays where more than this share of what is read would have to be computed.
READING = 1 / 16

Arrays = Mapping[str, NDArray[np.generic]]


class PrefixCache:
    """The prefixes of one model in a folder that processes share.

    An entry holds the state behind some tokens, and these tokens, which are compared with the
    prompt's: no hash is trusted. Also a part of it serves, up to the first token that differs. What
    is not whole, or was written for another model, runtime or processor, is as if it were not
    there.

    Args:
        path: The folder. Prompts lie in it in the clear; it is made for this user alone.
        owner: What the model is, see :func:`~edge_llm.states.state_owner`.
        limit: Most bytes of all entries together. Baked ones go last.
        writes: Whether to write; else entries are only read.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, owner: str, limit: int = LIMIT, writes: bool = True
    ) -> None:
        self._folder = CacheFolder(path, limit=limit, named=NAMED, lasting=(BAKED,))
        self.path = self._folder.path
        self.owner = owner
        self.writes = writes
        # Tokens by entry's name, as far as they were read; None of an entry that is no good.
        self._tokens: dict[str, NDArray[np.int32] | None] = {}
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def restore(
        self, cache: StateCache, row: int, prompt: NDArray[np.int64], *, beyond: int
    ) -> int:
        """Put into a row the longest prefix of a prompt that there is, if that is worth it.

        The prompt's last two tokens are left to be computed, see
        :meth:`~edge_llm.engine.slot.Slot.rewind`.

        Args:
            cache: The decoder's state.
            row: Which row to overwrite.
            prompt: int64 [tokens].
            beyond: Tokens of the prompt that the row holds.

        Returns:
            Tokens that the row now holds; 0 where it was left as it is.
        """
        for name, common in self._ranked(prompt[:-2]):
            if common - beyond <= READING * common:
                return 0
            saved = self._open(name)
            if saved is None or not np.array_equal(saved.tokens[:common], prompt[:common]):
                continue
            arrays = saved.cut(common)
            if cache.accepts(common, arrays):
                try:
                    saved.verify()
                except DoubtfulFileError as error:
                    self._discard(name, error)
                    continue
                cache.write_row(row, common, arrays)
                return common
        return 0

    def closest(self, prompt: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tokens, int32, of the entry that has most in common with a prompt."""
        ranked = self._ranked(prompt)
        tokens = self._tokens.get(ranked[0][0]) if ranked else None
        return np.zeros(0, np.int32) if tokens is None else tokens

    def offer(
        self, cache: StateCache, row: int, prompt: NDArray[np.int64], *, computed: int
    ) -> Offer | None:
        """Take note of a prompt that a row has just been fed with, if it is worth being written.

        Args:
            cache: The decoder's state.
            row: The row, which holds the prompt and nothing more.
            prompt: int64 [tokens].
            computed: How many of the tokens had to be computed.
        """
        if not self.writes or computed < WORTH:
            return None
        # The same prompt needs all but its last two tokens, of windows just these.
        length = len(prompt) - 2
        if length < cache.shortest(len(prompt)):
            length = len(prompt)
        return Offer(self, cache, row, prompt[:length].copy())

    def bake(self, cache: StateCache, row: int, tokens: NDArray[np.int64]) -> Path | None:
        """Write a prefix that is to last, and wait until it is on the disk.

        Args:
            cache: The decoder's state.
            row: The row, which holds the tokens and nothing more.
            tokens: int64 [tokens].

        Returns:
            The entry, or None where the folder cannot be written or its limit is too low.
        """
        name = self._name(tokens, baked=True)
        if self._folder.find(name) is not None and not self._is_sound(name):
            self._folder.remove(name)
        return self._publish(name, tokens, cache, row, wait=True, done=lambda: None)

    def prune(self, limit: int | None = None) -> int:
        """Remove the entries beyond a limit in bytes, baked ones last; gives the bytes freed."""
        return self._folder.prune(limit)

    def start(self, write: Callable[[], None]) -> bool:
        """Do something beside the engine's thread.

        Returns:
            False where that is busy with another, or the system has no thread left.
        """
        if self._writer is not None and self._writer.is_alive():
            return False
        writer = threading.Thread(target=write, name="edge_llm-prefixes", daemon=True)
        try:
            writer.start()
        except RuntimeError as error:
            log.debug("nothing is written: %s", error)
            return False
        self._writer = writer
        return True

    def flush(self) -> None:
        """Wait until all that was begun to be written is on the disk."""
        if self._writer is not None and self._writer is not threading.current_thread():
            self._writer.join()

    def write(
        self, cache: StateCache, row: int, tokens: NDArray[np.int64], *, done: Callable[[], None]
    ) -> None:
        """Write a prefix, unless nearly all of it is there or another process is writing.

        Args:
            cache: The decoder's state.
            row: The row, which begins with the tokens.
            tokens: int64 [tokens].
            done: Called when the row has been read.
        """
        for name, common in self._ranked(tokens):
            if len(tokens) - common >= WORTH:
                break
            saved = self._open(name)
            if saved is not None and cache.accepts(common, saved.cut(common)):
                return
        name = self._name(tokens, baked=False)
        self._publish(name, tokens, cache, row, wait=False, done=done)

    def _publish(
        self,
        name: str,
        tokens: NDArray[np.int64],
        cache: StateCache,
        row: int,
        *,
        wait: bool,
        done: Callable[[], None],
    ) -> Path | None:
        arrays = cache.read_row(row, len(tokens))

        def write(stage: Path) -> None:
            started = time.perf_counter()
            write_state(stage, self.owner, tokens, arrays)
            done()
            log.debug("wrote %s in %.3f s", name, time.perf_counter() - started)

        size = sum(array.nbytes for array in arrays.values())
        path = self._folder.publish(name, write, wait=wait, size=size)
        if path is not None:
            with self._lock:
                self._tokens[name] = tokens.astype(np.int32)
            self._supersede(name, tokens, cache, arrays)
        return path

    def _supersede(
        self, name: str, tokens: NDArray[np.int64], cache: StateCache, arrays: Arrays
    ) -> None:
        """Remove the entries that the new one can stand for; baked ones stay."""
        for other, common in self._ranked(tokens):
            held = self._tokens.get(other)
            if other == name or other.startswith(BAKED) or held is None:
                continue
            length = len(held)
            if common == length and cache.accepts(length, cut(arrays, len(tokens) - length)):
                self._folder.remove(other)

    def _ranked(self, prompt: NDArray[np.int64]) -> list[tuple[str, int]]:
        """Entries that begin as a prompt does, by how many tokens that holds for: most first.

        Of two that have as much in common the shorter one comes first: less is read of it.
        """
        found = []
        with self._lock:
            names = [name for name in self._folder.names() if self.owner in name]
            for name in names:
                if name not in self._tokens:
                    self._tokens[name] = self._read_tokens(name)
                tokens = self._tokens[name]
                if tokens is not None and (common := common_length(tokens, prompt)):
                    found.append((-common, len(tokens), name))
            for name in set(self._tokens).difference(names):
                del self._tokens[name]
        return [(name, -common) for common, _, name in sorted(found)]

    def _read_tokens(self, name: str) -> NDArray[np.int32] | None:
        try:
            return read_tokens(self.path / name, self.owner)
        except DoubtfulFileError as error:
            self._drop(name, error)
        except OSError as error:  # it was removed meanwhile, or may not be read
            log.debug("%s is not used: %s", name, error)
        return None

    def _open(self, name: str) -> SavedState | None:
        """Map an entry, and mark it as used; None where it is gone or not sound."""
        path = self._folder.find(name)
        try:
            return None if path is None else SavedState.open(path, self.owner)
        except DoubtfulFileError as error:
            self._discard(name, error)
        except OSError as error:  # it was removed meanwhile, or may not be read
            log.debug("%s is not used: %s", name, error)
        return None

    def _is_sound(self, name: str) -> bool:
        try:
            SavedState.open(self.path / name, self.owner).verify()
        except (DoubtfulFileError, OSError):
            return False
        return True

    def _discard(self, name: str, error: DoubtfulFileError) -> None:
        """Never look at an entry again."""
        with self._lock:
            self._tokens[name] = None
        self._drop(name, error)

    def _drop(self, name: str, error: DoubtfulFileError) -> None:
        """Remove an entry that is damaged, so that its name is free for a whole one."""
        log.debug("%s is not used: %s", name, error)
        if self.writes:
            self._folder.remove(name)

    def _name(self, tokens: NDArray[np.int64], *, baked: bool) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").data).hexdigest()[:32]
        return f"{BAKED if baked else ''}{self.owner}-{digest}"


class Offer:
    """A prompt in a row of the cache, to be written when its answer is done.

    It is written beside the engine's thread, straight from the row, in which only what comes behind
    it may change meanwhile. Nothing here is called by two threads at once.

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
        """Wait until the row has been read: its beginning is about to change."""
        self._read.wait()

    def _run(self) -> None:
        try:
            self._prefixes.write(self._cache, self._row, self._tokens, done=self._read.set)
        finally:
            self._read.set()


def common_length(one: NDArray[np.integer], other: NDArray[np.integer]) -> int:
    """How many tokens two sequences begin with in common."""
    limit = min(len(one), len(other))
    different = np.flatnonzero(one[:limit] != other[:limit])
    return int(different[0]) if len(different) else limit
