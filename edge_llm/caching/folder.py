"""A bounded folder of derived files that processes share; losing it costs nothing but time."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_llm.errors import CacheWarning, PlatformError

__all__ = [
    "CacheFolder",
    "default_cache_folder",
    "exclusive",
    "is_readable",
    "is_writable",
    "own_cache_folder",
    "write_through",
]

log = logging.getLogger("edge_llm")

LOCK = ".lock"
STAGE = ".stage"

# A file that is being written changes all the time: one that has not for so many seconds was left
# by a writer that was killed.
ABANDONED = 3600


class CacheFolder:
    """Entries by name, each a file or a folder, published whole and never changed afterwards.

    * An entry is written beside its place, synced, and renamed: who finds a name finds all of it,
      whenever a writer was killed. What a killed writer left is removed by the next one.
    * Writers of all processes take turns by a lock file, which the system lets go of when its
      holder dies. Readers need no lock: an open or mapped file outlives its removal.
    * Beyond ``limit`` bytes the entries go that were found least recently.
    * What the system refuses (a full disk, a folder that is not writable) ends writing for this
      object, with one :class:`~edge_llm.errors.CacheWarning`; what is there can still be found.

    Names are the caller's keys: content must follow from the name, so that any writer's will do.

    Args:
        path: The folder; made by the first entry.
        limit: Most bytes of all entries together, at least 1.
        named: What entries' names look like. All else that lies there is somebody's own, which is
            neither counted nor removed.
        lasting: Entries whose names begin so go only when no others are left.
        mode: Rights that the folder is made with; by default it is for this user alone.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limit: int,
        named: str = r"[^.].*",
        lasting: tuple[str, ...] = (),
        mode: int = 0o700,
    ) -> None:
        assert limit > 0
        self.path = Path(path).absolute()  # the process may go to work elsewhere
        self.limit = limit
        self._named = re.compile(named)
        self._lasting = lasting
        self._mode = mode
        self._writable = True
        self._degrading = threading.Lock()

    @property
    def writable(self) -> bool:
        """Whether nothing has ended writing yet."""
        return self._writable

    def names(self) -> list[str]:
        """The names of all entries."""
        try:
            return [one.name for one in os.scandir(self.path) if self._named.fullmatch(one.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            self._degrade(error)
            return []

    def find(self, name: str) -> Path | None:
        """An entry's path, or None; marks it as used.

        It may be removed the moment after: whoever opens it treats a failure as None.
        """
        path = self.path / name
        # Where the folder is not writable nobody evicts, so the mark is not missed.
        with contextlib.suppress(OSError):
            os.utime(path)
        return path if _is_there(path) else None

    def publish(
        self, name: str, write: Callable[[Path], None], *, wait: bool = True, size: int = 0
    ) -> Path | None:
        """Write an entry, unless there is one of this name.

        Args:
            name: The entry's name.
            write: Makes a file or folder at the path that it gets; may raise OSError.
            wait: Wait for other writers, rather than leave it where one is at work.
            size: Bytes that it takes at least: what is larger than the limit is not begun.

        Returns:
            The entry's path, or None where it is not there: another writer was at work, it is
            larger than the limit, or the folder cannot be written (a warning told of that).
        """
        assert self._named.fullmatch(name)
        if not self._writable or size > self.limit:
            return None
        target = self.path / name
        try:
            self.path.mkdir(mode=self._mode, parents=True, exist_ok=True)
            with exclusive(self.path / LOCK, wait=wait) as held:
                if held and not target.exists():
                    self._write(target, write)
                return target if target.exists() else None
        except OSError as error:
            self._degrade(error)
            return None

    def remove(self, name: str) -> None:
        """Remove an entry, if it is there and may be removed."""
        try:
            with exclusive(self.path / LOCK, wait=True):
                self._remove(self.path / name)
        except FileNotFoundError:
            return
        except OSError as error:
            self._degrade(error)

    def prune(self, limit: int | None = None) -> int:
        """Remove the entries beyond a limit in bytes, this folder's own by default.

        Returns:
            Bytes that were freed.
        """
        try:
            with exclusive(self.path / LOCK, wait=True):
                self._sweep()
                return self._evict(self.limit if limit is None else limit)
        except (FileNotFoundError, NotADirectoryError):
            return 0
        except OSError as error:
            self._degrade(error)
            return 0

    def _write(self, target: Path, write: Callable[[Path], None]) -> None:
        """Write, sync and rename an entry; the lock is held."""
        self._sweep()
        stage = self.path / f"{STAGE}.{target.name}"
        try:
            write(stage)
            size = _size(stage)
            if size > self.limit:
                log.debug("%s: %d bytes are more than the limit of %d", target, size, self.limit)
                return
            _sync(stage)
            self._evict(self.limit - size)
            stage.rename(target)
            os.utime(target)
            _sync_folder(self.path)
        finally:
            _delete(stage)

    def _sweep(self) -> None:
        """Remove what killed writers left; who holds the lock is the only living one."""
        for left in self.path.glob(f"{STAGE}.*"):
            if self._named.fullmatch(left.name.removeprefix(f"{STAGE}.")):
                _delete(left)

    def _evict(self, room: int) -> int:
        """Remove entries until all together take at most ``room`` bytes; gives what was freed."""
        entries = [self.path / name for name in self.names()]
        sizes = {one: _size(one) for one in entries}
        freed, surplus = 0, sum(sizes.values()) - room
        for one in sorted(entries, key=self._rank):
            if freed >= surplus:
                break
            self._remove(one)
            freed += sizes[one]
        return freed

    def _rank(self, entry: Path) -> tuple[bool, int]:
        return entry.name.startswith(self._lasting), entry.stat().st_mtime_ns

    def _remove(self, entry: Path) -> None:
        # A folder is not removed at once, so it loses its name first.
        hidden = entry.with_name(f"{STAGE}.{entry.name}")
        entry.rename(hidden)
        _delete(hidden)

    def _degrade(self, error: OSError) -> None:
        with self._degrading:
            first, self._writable = self._writable, False
        if first:
            warnings.warn(
                f"The cache folder {str(self.path)!r} cannot be used: {error.strerror or error}. "
                "Nothing more is kept there by this process.",
                CacheWarning,
                stacklevel=3,
            )


def default_cache_folder(kind: str) -> Path:
    """Where this user's cached files of a kind lie unless told otherwise (XDG Base Directory).

    Raises:
        PlatformError: The system knows no home of this user.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "edge-llm" / kind
    except RuntimeError as error:
        raise PlatformError(
            "This user has no home directory, in which a cache folder would be.",
            "Name a folder, or set XDG_CACHE_HOME to one.",
        ) from error


def own_cache_folder(kind: str) -> Path | None:
    """That folder where it is there and may be read; else, and without a home, None."""
    try:
        folder = default_cache_folder(kind)
    except PlatformError:
        return None
    return folder if is_readable(folder) else None


def is_readable(folder: Path) -> bool:
    """Whether a folder is there, and this user may look into it."""
    try:
        return folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    except OSError:  # one around it may not be looked into
        return False


def is_writable(folder: Path) -> bool:
    """Whether this user may write into a folder, which is made where it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def write_through(target: Path, write: Callable[[Path], None]) -> None:
    """Write one file so that its place holds the old content or the new one, never a mixture.

    What a killed writer of this file left beside it goes when one comes an hour later.

    Raises:
        OSError: The system refuses; nothing is left behind.
    """
    # Two threads may write to one place: each has a file of its own until one after the other is
    # renamed.
    own = f"{os.getpid()}-{threading.get_ident()}"
    stage = target.with_name(f".{target.name}.{own}{STAGE}")
    try:
        _clear_abandoned(target)
        write(stage)
        _sync(stage)
        stage.replace(target)
        _sync_folder(target.parent)
    finally:
        _delete(stage)


def _clear_abandoned(target: Path) -> None:
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{STAGE}"):
        with contextlib.suppress(OSError):  # another one clears it, or it is not this user's
            if time.time() - left.stat().st_mtime > ABANDONED:
                _delete(left)


@contextlib.contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock file, which the system lets go of when this process dies.

    Args:
        path: The file, made where there is none; it stays.
        wait: Wait for another holder, rather than give False.

    Raises:
        OSError: The system refuses.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        held = _lock(descriptor, wait=wait)
        try:
            yield held
        finally:
            if held:
                _unlock(descriptor)
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> bool:
        while True:
            try:  # LK_LOCK gives up after ten seconds
                msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
            else:
                return True

    def _unlock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

    def _sync_folder(path: Path) -> None:
        """A folder cannot be opened to be synced here; its file system keeps a journal."""

else:
    import fcntl

    def _lock(descriptor: int, *, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        # Closing would not do where a child was forked meanwhile: it has the descriptor too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _sync_folder(path: Path) -> None:
        _sync_one(path, os.O_RDONLY)


def _sync(path: Path) -> None:
    """Have a file, or all of a folder, on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
        _sync_folder(path)
    else:
        _sync_one(path, os.O_RDWR)


def _sync_one(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files if one.is_file())


def _delete(path: Path) -> None:
    """Remove a file or a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
