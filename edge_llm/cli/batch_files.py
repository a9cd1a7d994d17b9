"""The two files of ``edge-llm batch``: requests line by line, and answers that outlive a kill."""

from __future__ import annotations

import array
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_llm.caching.folder import write_through
from edge_llm.errors import ArgumentError, EdgeLLMError

__all__ = ["Answers", "InputLine", "read_lines", "read_request"]

MOST_BYTES = 16 << 20
"""Of a request."""

MOST_ANSWER_BYTES = 256 << 20
DIGEST_BYTES = 8
HEAD = b'{"index": '


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line that asks for an answer.

    Attributes:
        index: Its place in the file, from 0; blank lines count.
        digest: A hash of it: 16 hexadecimal digits.
        text: The line, without its end; None where it is longer than ``MOST_BYTES``.
    """

    index: int
    digest: str
    text: bytes | None


def read_lines(source: IO[bytes]) -> Iterator[InputLine]:
    """The lines of a file that are not blank, one at a time."""
    index = 0
    while piece := source.readline(MOST_BYTES):
        text: bytes | None = piece.rstrip(b"\r\n")
        digest = hashlib.sha256(piece.rstrip(b"\r\n"))
        while not piece.endswith(b"\n") and (piece := source.readline(MOST_BYTES)):
            text = None
            digest.update(piece.rstrip(b"\r\n"))
        if text is None or text.strip():
            yield InputLine(index, digest.digest()[:DIGEST_BYTES].hex(), text)
        index += 1


def read_request(line: InputLine) -> dict[str, Any]:
    """The request that a line writes down.

    Raises:
        ArgumentError: It is none.
    """
    name, domain = f"Line {line.index + 1}", 'a JSON object with a "prompt" or with "messages"'
    if line.text is None:
        raise ArgumentError(name, f"of at most {MOST_BYTES} bytes", "a longer one")
    try:
        found = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        shown = line.text.decode(errors="replace")
        raise ArgumentError(name, domain, shown, f"JSON: {error}.") from None
    if not isinstance(found, dict) or ("prompt" in found) == ("messages" in found):
        raise ArgumentError(name, domain, found)
    prompt, messages = found.get("prompt", ""), found.get("messages", [{}])
    if not isinstance(prompt, str | list) or any(isinstance(one, dict) for one in prompt):
        raise ArgumentError("prompt", "text, or a list of tokens", prompt)
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ArgumentError("messages", "a list of objects", messages)
    if not messages:
        raise ArgumentError("messages", "a list of at least one object", messages)
    return found


class Answers:
    """A file of answers, one a line: what it holds, and adding to it.

    Each line is one write, so whatever ends this process leaves whole lines and at most one that is
    torn, which the next process cuts off. What is there is remembered in 16 bytes a line.

    Args:
        path: The file; need not be there.
        retry: Leave out the lines of requests that failed.

    Attributes:
        failed: Lines of requests that failed, among those that count.
        in_order: Whether indices rise from line to line.

    Raises:
        EdgeLLMError: The file was not written by this command.
        OSError: The system refuses.
    """

    def __init__(self, path: Path, *, retry: bool = False) -> None:
        self.path = path
        self.failed = 0
        self._retry = retry
        self._retried = 0
        self._size = 0  # of the whole lines
        self._file: IO[bytes] | None = None
        if path.exists() and not path.is_file():
            raise EdgeLLMError(f"{path} is no file.", "Name a file for the answers.")
        indices, digests = array.array("Q"), array.array("Q")
        for document in self._documents():
            failed = "error" in document
            if failed and retry:
                self._retried += 1
                continue
            self.failed += failed
            indices.append(document["index"])
            digests.append(int(document["hash"], 16))
        found = np.frombuffer(indices, np.uint64) if indices else np.zeros(0, np.uint64)
        order = np.argsort(found, kind="stable")
        self.in_order = bool((found[1:] > found[:-1]).all())
        self._indices = found[order]
        self._digests = np.array(digests, np.uint64)[order]
        twice = self._indices[1:][self._indices[1:] == self._indices[:-1]]
        if len(twice):
            raise self._foreign(f"it answers line {int(twice[0]) + 1} twice")

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def last(self) -> int:
        """The highest index, or -1."""
        return int(self._indices[-1]) if len(self) else -1

    def digest(self, index: int) -> str | None:
        """The hash of the request that was answered under an index; None where none was."""
        place = int(np.searchsorted(self._indices, index))
        if place == len(self) or self._indices[place] != index:
            return None
        return f"{int(self._digests[place]):0{2 * DIGEST_BYTES}x}"

    def open(self) -> None:
        """Cut off what is torn, leave out what shall be done again, and be ready for more.

        Raises:
            OSError: The system refuses.
        """
        if self._retried:
            write_through(self.path, self._write_kept)
        elif self.path.exists() and self.path.stat().st_size > self._size:
            os.truncate(self.path, self._size)
        self._file = self.path.open("ab", buffering=0)

    def add(self, document: dict[str, object]) -> None:
        """Append one line.

        Raises:
            OSError: It cannot be written whole; the error names the file.
        """
        assert self._file is not None
        line = memoryview(json.dumps(document).encode() + b"\n")
        try:
            while line:  # a second turn only where the disk is full, and raises
                line = line[self._file.write(line) :]
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        """Close the file, with all of it on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _documents(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._whole_lines()):
            try:
                found = json.loads(line)
                right = (
                    line.startswith(HEAD)
                    and type(found["index"]) is int
                    and 0 <= found["index"] < 1 << 63
                    and len(bytes.fromhex(found["hash"])) == DIGEST_BYTES
                    and ("error" in found or "text" in found)
                )
            except (ValueError, TypeError, KeyError, RecursionError):
                right = False
            if not right:
                raise self._foreign(f"line {number + 1} is no answer")
            yield found

    def _whole_lines(self) -> Iterator[bytes]:
        if not self.path.exists():
            return
        self._size = 0
        with self.path.open("rb") as file:
            while line := file.readline(MOST_ANSWER_BYTES):
                if not line.endswith(b"\n"):
                    if not line.startswith(HEAD[: len(line)]):
                        raise self._foreign("its end is no part of an answer")
                    return
                self._size += len(line)
                yield line

    def _write_kept(self, target: Path) -> None:
        with target.open("wb") as file:
            for line in self._whole_lines():
                if "error" not in json.loads(line):
                    file.write(line)

    def _foreign(self, reason: str) -> EdgeLLMError:
        return EdgeLLMError(
            f"{self.path} was not written by `edge-llm batch`: {reason}.",
            "Name another file for the answers, or remove this one.",
        )
