"""Writing a bundle's files, whose sizes and hashes its manifest needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edge_llm.errors import BundleError
from edge_llm.manifest import MANIFEST_NAME, FileEntry, Manifest

__all__ = ["FolderWriter", "HashingStream"]

_CHUNK = 1 << 22  # bytes copied at a time


class FolderWriter:
    """Writes files into a folder and remembers their sizes and hashes.

    Args:
        folder: The folder.

    Attributes:
        files: What was written, by path inside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, FileEntry] = {}

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self.create(name) as stream:
            stream.write(content)

    def copy(self, name: str, source: Path, *, on_bytes: Callable[[int], None]) -> None:
        """Copy a file's content, whatever links lead to it.

        Args:
            name: Path inside the folder.
            source: The file.
            on_bytes: Called with the number of bytes just written.

        Raises:
            BundleError: The source cannot be read.
        """
        with self.create(name) as stream:
            for content in _read(source):
                stream.write(content)
                on_bytes(len(content))

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, last of all."""
        (self.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")

    @contextmanager
    def create(self, name: str) -> Iterator[HashingStream]:
        """Give a stream into a new file, which is remembered when the block ends."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            stream = HashingStream(file)
            yield stream
        self.files[name] = FileEntry(size=stream.position, sha256=stream.hexdigest())


class HashingStream:
    """A binary stream that hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.position = 0

    def write(self, content: bytes | memoryview) -> None:
        """Write bytes."""
        self._file.write(content)
        self._hash.update(content)
        self.position += len(content)

    def hexdigest(self) -> str:
        """SHA-256 of all bytes so far, in hexadecimal."""
        return self._hash.hexdigest()


def _read(source: Path) -> Iterator[bytes]:
    """A file's content in pieces; an error in reading it is not one in writing the copy."""
    try:
        with source.open("rb") as file:
            while content := file.read(_CHUNK):
                yield content
    except OSError as error:
        raise BundleError(
            f"{str(source)!r} cannot be read: {error.strerror}.",
            "Give this user the right to read it, or download it again.",
        ) from error
