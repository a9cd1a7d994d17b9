"""Prompts' beginnings on the disk: what one process computed, later ones read."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.caching.background import Background
from edge_llm.caching.folder import CacheFolder
from edge_llm.caching.offers import Arrays, Offer, Snapshot
from edge_llm.caching.state_file import (
    DoubtfulFileError,
    SavedState,
    cut,
    read_tokens,
    write_state,
)

if TYPE_CHECKING:
    from edge_llm.runtime.decoder import StateCache

__all__ = ["LIMIT", "Found", "PrefixCache", "common_length"]

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


@dataclass(frozen=True, slots=True)
class Found:
    """What a prefix cache has of a prompt.

    Attributes:
        closest: int32 [tokens], those of the entry that has most in common with the prompt.
        length: Tokens of the prompt that can be put into a row, or 0.
        arrays: The state behind them, of a file that was verified, and so read, just now.
    """

    closest: NDArray[np.int32]
    length: int = 0
    arrays: Arrays | None = None


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
        self._reading = Background("edge_llm-prefixes-reading")
        self._writer: threading.Thread | None = None

    def seek(
        self, cache: StateCache, prompt: NDArray[np.int64], *, beyond: int, patience: float
    ) -> Future[Found] | None:
        """Have :meth:`look_up` done beside the engine's thread.

        Args:
            cache: As there, like ``prompt`` and ``beyond``.
            prompt: See there.
            beyond: See there.
            patience: Seconds after which a disk that is asked is not expected to answer any more.

        Returns:
            None where nothing that may be there is worth reading, or where the disk does not answer
            another prompt, or no thread is left to read.
        """
        if not _pays(len(prompt) - 2, beyond) or self._reading.busy_seconds > patience:
            return None
        try:
            return self._reading.submit(partial(self.look_up, cache, prompt, beyond=beyond))
        except RuntimeError as error:
            log.debug("nothing is read: %s", error)
            return None

    def look_up(self, cache: StateCache, prompt: NDArray[np.int64], *, beyond: int) -> Found:
        """Read the longest prefix of a prompt that there is, if that is worth it.

        The prompt's last two tokens are left to be computed, see
        :meth:`~edge_llm.engine.slot.Slot.rewind`.

        Args:
            cache: The decoder's state, of which nothing but its shape is looked at.
            prompt: int64 [tokens].
            beyond: Tokens of the prompt that a row holds.
        """
        begun = self._begun(prompt)
        ranked = _ranked(begun, len(prompt))
        closest = begun[ranked[0][0]][0] if ranked else np.zeros(0, np.int32)
        for name, common in _ranked(begun, len(prompt) - 2):
            if not _pays(common, beyond):
                break
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
                return Found(closest, common, arrays)
        return Found(closest)

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

    def bake(self, held: Snapshot) -> Path | None:
        """Write a prefix that is to last, and wait until it is on the disk.

        Returns:
            The entry, or None where the folder cannot be written or its limit is too low.
        """
        name = self._name(held.tokens, baked=True)
        if self._folder.find(name) is not None and not self._is_sound(name):
            self._folder.remove(name)
        return self._publish(name, held, wait=True)

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

    def write(self, held: Snapshot) -> None:
        """Write a prefix, unless nearly all of it is there or another process is writing."""
        tokens = held.tokens
        for name, common in _ranked(self._begun(tokens), len(tokens)):
            if len(tokens) - common >= WORTH:
                break
            saved = self._open(name)
            if saved is not None and held.cache.accepts(common, saved.cut(common)):
                return
        self._publish(self._name(tokens, baked=False), held, wait=False)

    def _publish(self, name: str, held: Snapshot, *, wait: bool) -> Path | None:
        def write(stage: Path) -> None:
            started = time.perf_counter()
            write_state(stage, self.owner, held.tokens, held.arrays)
            log.debug("wrote %s in %.3f s", name, time.perf_counter() - started)

        size = sum(array.nbytes for array in held.arrays.values())
        path = self._folder.publish(name, write, wait=wait, size=size)
        if path is not None:
            with self._lock:
                self._tokens[name] = held.tokens.astype(np.int32)
            self._supersede(name, held)
        return path

    def _supersede(self, name: str, new: Snapshot) -> None:
        """Remove the entries that the new one can stand for; baked ones stay."""
        for other, (held, common) in self._begun(new.tokens).items():
            if other == name or other.startswith(BAKED):
                continue
            length = len(held)
            part = cut(new.arrays, len(new.tokens) - length)
            if common == length and new.cache.accepts(length, part):
                self._folder.remove(other)

    def _begun(self, prompt: NDArray[np.int64]) -> dict[str, tuple[NDArray[np.int32], int]]:
        """Entries that begin as a prompt does: their tokens, and for how many that holds."""
        found = {}
        with self._lock:
            names = [name for name in self._folder.names() if self.owner in name]
            for name in names:
                if name not in self._tokens:
                    self._tokens[name] = self._read_tokens(name)
                tokens = self._tokens[name]
                if tokens is not None and (common := common_length(tokens, prompt)):
                    found[name] = tokens, common
            for name in set(self._tokens).difference(names):
                del self._tokens[name]
        return found

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


def _ranked(begun: Mapping[str, tuple[NDArray[np.int32], int]], most: int) -> list[tuple[str, int]]:
    """Entries by how many tokens they have in common with a prompt's first ``most``: most first.

    Of two that have as much in common the shorter one comes first: less is read of it.
    """
    found = sorted(
        (-min(common, most), len(tokens), name) for name, (tokens, common) in begun.items()
    )
    return [(name, -common) for common, _, name in found]


def _pays(common: int, beyond: int) -> bool:
    """Whether to read so many tokens is better than to compute those that are not at hand."""
    return common - beyond > READING * common


def common_length(one: NDArray[np.integer], other: NDArray[np.integer]) -> int:
    """How many tokens two sequences begin with in common."""
    limit = min(len(one), len(other))
    different = np.flatnonzero(one[:limit] != other[:limit])
    return int(different[0]) if len(different) else limit
