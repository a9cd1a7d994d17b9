"""A decoder's state behind some tokens, as one file that is read by memory map.

Numbers are little-endian. Whatever a file holds is covered by its size, a hash or a checksum, but
for the padding, which nothing reads:

    0       8 bytes        "edge-kv" and a zero
    8       uint32         version of the format
    12      uint32         bytes of the header
    16      uint64         bytes of the file
    24      32 bytes       SHA-256 of the header
    56      header         JSON: what the file belongs to, the tokens' count and SHA-256, and of
                           each tensor its name, dtype, shape, offset and checksum
    then, each at a multiple of 64 bytes: the tokens, int32 [tokens], and the tensors in the order
    of the header, [kv_heads, positions, head_dim], the last `positions` of the tokens
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["DoubtfulFileError", "SavedState", "cut", "read_tokens", "write_state"]

MAGIC = b"edge-kv\0"
VERSION = 2
ALIGNMENT = 64
_BINARY = getattr(os, "O_BINARY", 0)  # Windows' own
PAGE = 512  # 64-bit numbers
START = struct.Struct("<8sIIQ32s")


class DoubtfulFileError(Exception):
    """A file is not, to the last byte, what :func:`write_state` wrote for this owner."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """A file that is open.

    Attributes:
        tokens: int32 [tokens].
        arrays: By name, read-only views of the mapped file, [kv_heads, positions, head_dim]: the
            last ``positions`` of the tokens. Nothing has looked at their content yet.
    """

    tokens: NDArray[np.int32]
    arrays: Mapping[str, NDArray[np.generic]]
    _checksums: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, owner: str) -> SavedState:
        """Map a file.

        Args:
            path: The file.
            owner: What it was written for.

        Raises:
            DoubtfulFileError: Something but the tensors' content is not as it must be.
            OSError: It cannot be read.
        """
        with path.open("rb") as file:
            header, at = _read_header(file, owner)
            tokens = _read_tokens(file, header, at)
            content = np.memmap(file, np.uint8, mode="r")
        arrays: dict[str, NDArray[np.generic]] = {}
        checksums: dict[str, str] = {}
        try:
            for one in header["tensors"]:
                name, dtype, shape = one["name"], np.dtype(one["dtype"]), one["shape"]
                start, stop = one["offset"], one["offset"] + _size(dtype, shape)
                arrays[name] = content[start:stop].view(dtype).reshape(shape)
                checksums[name] = one["checksum"]
        except (KeyError, TypeError, ValueError) as error:
            raise DoubtfulFileError(f"The header is not valid: {error}.") from error
        return cls(tokens, arrays, checksums)

    def cut(self, length: int) -> dict[str, NDArray[np.generic]]:
        """The arrays without what they hold behind the first ``length`` tokens."""
        return cut(self.arrays, len(self.tokens) - length)

    def verify(self) -> None:
        """Read all tensors, and compare their checksums.

        Raises:
            DoubtfulFileError: One differs.
        """
        for name, array in self.arrays.items():
            if _checksum(array) != self._checksums[name]:
                raise DoubtfulFileError(f"The tensor {name!r} is damaged.")


def cut(arrays: Mapping[str, NDArray[np.generic]], surplus: int) -> dict[str, NDArray[np.generic]]:
    """Views of arrays [kv_heads, positions, head_dim] without the last ``surplus`` positions."""
    return {name: array[:, : max(0, array.shape[1] - surplus)] for name, array in arrays.items()}


def write_state(
    path: Path,
    owner: str,
    tokens: NDArray[np.int64],
    arrays: Mapping[str, NDArray[np.generic]],
) -> None:
    """Write a file; who needs it whole or not at all gives a temporary path and renames it.

    Args:
        path: Where to.
        owner: What it belongs to: whoever reads it must name the same.
        tokens: int64 [tokens].
        arrays: By name, [kv_heads, positions, head_dim]: the last ``positions`` of the tokens. One
            after the other is copied.

    Raises:
        OSError: The system refuses.
    """
    stored = np.ascontiguousarray(tokens, "<i4")
    checksums = dict.fromkeys(arrays, "0" * 16)
    # For this user alone, whatever the folder is: a prompt can be read from it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        header, at = _header(owner, stored, arrays, checksums)
        file.seek(at)
        file.write(stored.data)
        for name, array in arrays.items():
            copy = np.ascontiguousarray(array)
            checksums[name] = _checksum(copy)
            file.seek(_aligned(file.tell()))
            file.write(copy.reshape(-1).view(np.uint8).data)
        end = file.tell()
        header, _ = _header(owner, stored, arrays, checksums)
        digest = hashlib.sha256(header).digest()
        file.seek(0)
        file.write(START.pack(MAGIC, VERSION, len(header), end, digest) + header)


def read_tokens(path: Path, owner: str) -> NDArray[np.int32]:
    """The tokens of a file, int32 [tokens]; reads nothing else of it.

    Raises:
        DoubtfulFileError: Header or tokens are not as they must be.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return _read_tokens(file, *_read_header(file, owner))


def _header(
    owner: str,
    tokens: NDArray[np.int32],
    arrays: Mapping[str, NDArray[np.generic]],
    checksums: Mapping[str, str],
) -> tuple[bytes, int]:
    """The header, and where the tokens begin: offsets count from there while it is written."""
    document: dict[str, Any] = {
        "owner": owner,
        "tokens": len(tokens),
        "tokens_sha256": hashlib.sha256(tokens.data).hexdigest(),
        "tensors": [
            {
                "name": name,
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "offset": 0,
                "checksum": checksums[name],
            }
            for name, array in arrays.items()
        ],
    }
    # Offsets are numbers of variable width in front of what they point at: room for any of them.
    room = len(json.dumps(document)) + 20 * len(arrays)
    at = _aligned(START.size + room)
    offset = at + tokens.nbytes
    for tensor, array in zip(document["tensors"], arrays.values(), strict=True):
        tensor["offset"] = _aligned(offset)
        offset = tensor["offset"] + array.nbytes
    return json.dumps(document).ljust(room).encode(), at


def _read_header(file: BinaryIO, owner: str) -> tuple[dict[str, Any], int]:
    """The header of a file of this owner, and where the tokens begin."""
    start = file.read(START.size)
    if len(start) < START.size:
        raise DoubtfulFileError("It is cut off.")
    magic, version, length, size, digest = START.unpack(start)
    if magic != MAGIC:
        raise DoubtfulFileError("It is no state of a decoder.")
    if version != VERSION:
        raise DoubtfulFileError(f"It is of version {version}; this runtime reads {VERSION}.")
    if size != os.fstat(file.fileno()).st_size:
        raise DoubtfulFileError("It is cut off, or something was written behind it.")
    header = file.read(length) if length <= size else b""
    if hashlib.sha256(header).digest() != digest:
        raise DoubtfulFileError("Its header is damaged.")
    try:
        document: dict[str, Any] = json.loads(header)
        written_for, tokens = document["owner"], document["tokens"]
        if not (isinstance(tokens, int) and 0 <= 4 * tokens <= size):
            raise ValueError(f"{tokens!r} tokens")
    except (KeyError, TypeError, ValueError) as error:
        raise DoubtfulFileError(f"The header is not valid: {error}.") from error
    if written_for != owner:
        raise DoubtfulFileError(
            "It was written for another model, version of onnxruntime, or processor."
        )
    return document, _aligned(START.size + length)


def _read_tokens(file: BinaryIO, header: Mapping[str, Any], at: int) -> NDArray[np.int32]:
    file.seek(at)
    content = file.read(4 * header["tokens"])
    if hashlib.sha256(content).hexdigest() != header.get("tokens_sha256"):
        raise DoubtfulFileError("Its tokens are damaged.")
    return np.frombuffer(content, "<i4").astype(np.int32, copy=False)


def _checksum(array: NDArray[np.generic]) -> str:
    """A hash of the sums of a contiguous array's pages, each of 64-bit numbers modulo 2**64.

    Any single changed word changes it, and pages that change places do; it is as fast as memory can
    be read. What it is to find are blocks that a disk lost or mixed up, not forgeries: a cache is
    trusted as its folder is.
    """
    content = array.reshape(-1).view(np.uint8)
    paged = len(content) // (8 * PAGE) * (8 * PAGE)
    sums = content[:paged].view("<u8").reshape(-1, PAGE).sum(axis=1, dtype="<u8")
    digest = hashlib.sha256(sums.data)
    digest.update(content[paged:].data)
    return digest.hexdigest()[:16]


def _size(dtype: np.dtype[Any], shape: Sequence[int]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
