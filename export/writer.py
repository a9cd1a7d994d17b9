"""Writing a bundle: into a folder beside the target, which is renamed when all is there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edge_llm.errors import ArgumentError, BundleError, ExportError
from edge_llm.manifest import MANIFEST_NAME, FileEntry, Manifest

from .graph.decoder import GRAPH_FILE
from .graph.recorder import GraphRecorder

__all__ = ["BundleWriter", "check_target", "staged"]

DATA_FILE = f"{GRAPH_FILE}.data"

# Memory maps start at multiples of the allocation granularity, 64 KiB on Windows; small tensors
# share a map's start, so they need no more than a cache line's alignment.
ALIGNMENT = 64


class BundleWriter:
    """Writes the files of one bundle into a folder and remembers their sizes and hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, FileEntry] = {}

    def write_graph(
        self, graph: GraphRecorder, *, producer: str, on_bytes: Callable[[int], None]
    ) -> None:
        """Compute the weights one after the other, write them, then the graph that points there.

        Args:
            graph: The recorded graph.
            producer: Version to record in the graph.
            on_bytes: Called with the number of bytes just written.
        """
        offsets: dict[str, int] = {}
        with self._create(DATA_FILE) as stream:
            for group in graph.deferred:
                for info, rows in zip(group.tensors, group.compute(), strict=True):
                    stream.write(b"\0" * (-stream.position % ALIGNMENT))
                    offsets[info.name] = stream.position
                    for array in rows:
                        assert array.dtype == info.dtype, info.name
                        stream.write(array.data.cast("B"))
                        on_bytes(array.nbytes)
                    assert stream.position - offsets[info.name] == info.size, info.name
        model = graph.model(DATA_FILE, offsets, producer)
        self.write(GRAPH_FILE, model.SerializeToString(deterministic=True))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self._create(name) as stream:
            stream.write(content)

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, last of all."""
        (self.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")

    @contextmanager
    def _create(self, name: str) -> Iterator[_HashingStream]:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            stream = _HashingStream(file)
            yield stream
        self.files[name] = FileEntry(size=stream.position, sha256=stream.hexdigest())


class _HashingStream:
    """A binary stream that hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.position = 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.position += len(content)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder that becomes ``target`` if the block ends well, and is removed if not.

    The folder lies beside the target, so that the last step is a rename on one file system. It is
    removed on every way out, an interrupt and a full disk included.

    Raises:
        ArgumentError: See :func:`check_target`.
        ExportError: The folder cannot be made or written.
    """
    target = check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(
            f"Cannot write beside {str(target)!r}: {error.strerror}.", "Choose another folder."
        ) from error
    try:
        stage.chmod(0o755)  # mkdtemp's 0o700 would keep other users from reading the bundle
        yield stage
        _replace(stage, target)
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ExportError(
            f"Writing {str(target)!r} failed: {error.strerror}; nothing was left behind.",
            "Free some disk space, or choose another folder." if full else "Choose another folder.",
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> Path:
    """Refuse a target that cannot be replaced, or that would destroy something, before any work.

    Returns:
        The target behind all symbolic links: they stay, and what they point to is replaced.

    Raises:
        ArgumentError: The target is not empty and ``overwrite`` is false, or it is not a bundle,
            or it is a folder that the system does not let go of.
        ExportError: The target cannot be read.
    """
    try:
        real = target.resolve()
        if real.is_symlink():
            raise RuntimeError("its symbolic links lead in a circle")  # resolve()'s own until 3.13
        if not real.exists():
            return real
        empty = real.is_dir() and not any(real.iterdir())
        held = os.path.ismount(real) or real in (Path.cwd(), *Path.cwd().parents)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(
            f"Cannot use {str(target)!r}: {reason}.", "Choose another folder."
        ) from error
    if not empty:
        _check_bundle(target, overwrite=overwrite)
    if held:
        raise ArgumentError(
            "output",
            "a folder that can be replaced as a whole, so no mount point, and neither the current "
            "folder nor one above it",
            str(target),
            "Name a folder inside it.",
        )
    return real


def _check_bundle(target: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise ArgumentError(
            "output",
            "a folder that does not exist or is empty",
            str(target),
            "Or pass overwrite=True (--overwrite) to replace the bundle in it.",
        )
    try:
        # Other things keep a manifest.json too, so its name alone does not make it a bundle's.
        Manifest.from_json((target / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, BundleError) as error:
        raise ArgumentError(
            "output", "a bundle, where it is to be overwritten", str(target), "Remove it yourself."
        ) from error


def _replace(stage: Path, target: Path) -> None:
    """Put the stage in the target's place; an old bundle stays whole until then."""
    if not target.exists():
        stage.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    moved = old / target.name
    try:
        target.replace(moved)
        stage.rename(target)
    finally:
        if not target.exists():
            _put_back(moved, target)
        shutil.rmtree(old, ignore_errors=True)


def _put_back(moved: Path, target: Path) -> None:
    try:
        moved.replace(target)
    except OSError as error:
        raise ExportError(
            f"Replacing {str(target)!r} failed, and so did putting it back: {error.strerror}.",
            f"The old bundle is whole and lies in {str(moved)!r}: move it yourself.",
        ) from error
