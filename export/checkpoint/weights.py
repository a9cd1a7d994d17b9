"""Lazy reading of safetensors: a tensor's rows come from the file when they are asked for."""

from __future__ import annotations

import io
import json
import math
import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edge_llm.errors import ArgumentError, CheckpointError, ClosedError
from edge_llm.huggingface.files import read_json

__all__ = ["INDEX", "SINGLE", "Weights", "checked_rows", "read_index"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CHUNK = 1 << 18  # elements converted at a time: they stay in the second-level cache
# A file of the folder, on any system; the longest name that file systems take has 255 bytes.
_SHARD = re.compile(r"[^/\\:\0]{1,240}\.safetensors")
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_FETCH_AGAIN = "Download the checkpoint again."


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where a tensor lies.

    Attributes:
        path: The file.
        file: The same file, open and unbuffered.
        lock: Held while the file is read.
        offset: Position of the first byte in it.
        dtype: As safetensors names it.
        shape: Sizes of the axes.
    """

    path: Path
    file: io.FileIO
    lock: threading.Lock
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Weights:
    """The tensors of a checkpoint, in one file or in shards.

    Nothing but the headers is read before :meth:`read`. Use it as a context manager, or call
    :meth:`close`. Several threads may read at once.
    """

    def __init__(self, tensors: Mapping[str, _Tensor], files: ExitStack) -> None:
        self._tensors = dict(tensors)
        self._files = files
        self._closed = False

    @classmethod
    def open(cls, folder: Path) -> Weights:
        """Open the folder's ``model.safetensors``, or else the shards that its index names.

        Raises:
            CheckpointError: There are no safetensors, or a file is missing, corrupt, or
                contradicts the index.
        """
        index = None if (folder / SINGLE).is_file() else read_index(folder)
        if index is None and not (folder / SINGLE).is_file():
            raise _no_weights(folder)
        tensors: dict[str, _Tensor] = {}
        with ExitStack() as files:
            for shard in sorted(set(index.values())) if index is not None else [SINGLE]:
                for name, tensor in _read_header(folder / shard, files).items():
                    if name in tensors:
                        raise CheckpointError(
                            f"{folder}: {tensors[name].path.name} and {shard} both hold {name!r}.",
                            _FETCH_AGAIN,
                        )
                    tensors[name] = tensor
            for name, shard in (index or {}).items():
                if name not in tensors or tensors[name].path.name != shard:
                    raise CheckpointError(
                        f"{folder / INDEX} says that {name!r} is in {shard}, which does not hold "
                        "it.",
                        _FETCH_AGAIN,
                    )
            return cls(tensors, files.pop_all())

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of the tensor's axes.

        Raises:
            CheckpointError: There is no such tensor.
        """
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """The stored type as safetensors names it, such as "BF16"; :meth:`read` may refuse it.

        Raises:
            CheckpointError: There is no such tensor.
        """
        return self._tensor(name).dtype

    def read(
        self, name: str, start: int | None = None, stop: int | None = None
    ) -> NDArray[np.float32]:
        """Rows [start, stop) of the tensor's first axis, or the whole tensor.

        float16 and bfloat16 become float32 exactly. Needs memory for the rows and 1 MiB.

        Args:
            name: The tensor.
            start: The first row (default 0).
            stop: The row after the last one (default: all of them).

        Returns:
            float32 [stop - start, ...], writable and not shared.

        Raises:
            ArgumentError: The rows are not in the tensor.
            CheckpointError: There is no such tensor, its type is not F32, F16 or BF16, or its
                file cannot be read or was cut short since it was opened.
            ClosedError: The weights were closed.
        """
        tensor = self._open_tensor(name)
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{tensor.path}: {name!r} is stored as {tensor.dtype}; known are "
                f"{', '.join(_FLOATS)}.",
                "Export from a checkpoint whose weights are not quantized, in float32, float16 "
                "or bfloat16.",
            )
        if start is None and stop is None:
            return _read_floats(tensor, 0, tensor.shape)
        rows = tensor.shape[0] if tensor.shape else 0
        first, end = checked_rows(name, rows, start, stop)
        width = math.prod(tensor.shape[1:])
        return _read_floats(tensor, first * width, (end - first, *tensor.shape[1:]))

    def read_words(self, name: str) -> NDArray[np.int32]:
        """A whole tensor of 32-bit words, such as the integers that a quantizer packed.

        Raises:
            CheckpointError: There is no such tensor, its type is not I32, or its file cannot be
                read or was cut short since it was opened.
            ClosedError: The weights were closed.
        """
        tensor = self._open_tensor(name)
        if tensor.dtype != "I32":
            raise CheckpointError(
                f"{tensor.path}: {name!r} is stored as {tensor.dtype} and must be I32.",
                _FETCH_AGAIN,
            )
        words = np.empty(tensor.shape, np.int32)
        _fill(tensor, tensor.offset, words.reshape(-1))
        return words

    def close(self) -> None:
        """Close the files; safe to call again."""
        self._closed = True
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_tensor(self, name: str) -> _Tensor:
        tensor = self._tensor(name)
        if self._closed:
            raise ClosedError(f"{name!r} was read after close().", "Keep the Weights open.")
        return tensor

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise CheckpointError(
                f"The checkpoint has no tensor {name!r}.",
                "It is incomplete, or config.json is of another model.",
            )
        return self._tensors[name]


def checked_rows(name: str, rows: int, start: int | None, stop: int | None) -> tuple[int, int]:
    """Rows [start, stop) of a tensor that has ``rows``; None stands for its first and last.

    Raises:
        ArgumentError: It does not have them.
    """
    first, end = start or 0, rows if stop is None else stop
    if not 0 <= first <= end <= rows:
        raise ArgumentError(
            "start, stop", f"0 <= start <= stop <= {rows} (rows of {name!r})", (start, stop)
        )
    return first, end


def read_index(folder: Path) -> dict[str, str] | None:
    """The folder's index, from a tensor's name to its shard's; None where there is none.

    Raises:
        CheckpointError: The index is broken, or names a file outside the folder.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path} has no weight_map.", _FETCH_AGAIN)
    for shard in shards.values():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{path} names {shard!r}, which is not a file of the folder.", _FETCH_AGAIN
            )
    return shards


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickles:
        return CheckpointError(
            f"{folder} has pickled weights only ({', '.join(pickles[:3])}), and unpickling runs "
            "whatever code the file holds, so this exporter refuses pickles.",
            "If you trust the file, convert it with transformers: AutoModelForCausalLM"
            ".from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True).",
        )
    return CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}"
        + (f", only {', '.join(others[:3])}." if others else "."),
        "Give the folder of a whole checkpoint, as save_pretrained() writes it.",
    )


def _read_header(path: Path, files: ExitStack) -> dict[str, _Tensor]:
    """Every tensor of one file, which stays open until ``files`` closes."""
    # The library checks the header, the offsets and the file's length. It does not do the reading:
    # it has no bfloat16 for numpy, and what it maps counts as this process's memory once read.
    try:
        with safe_open(path, framework="numpy"):
            pass
        file = files.enter_context(path.open("rb", buffering=0))
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(size), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} lacks {path.name}, which {INDEX} names.", _FETCH_AGAIN
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}.", _FETCH_AGAIN
        ) from error
    header.pop("__metadata__", None)
    lock = threading.Lock()
    return {
        name: _Tensor(
            path,
            file,
            lock,
            8 + size + entry["data_offsets"][0],
            entry["dtype"],
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; of two tensors of one name, readers differ in which they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return content


def _read_floats(tensor: _Tensor, skip: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """``shape`` elements in float32, after the first ``skip`` ones."""
    dtype = _FLOATS[tensor.dtype]
    rows = np.empty(shape, np.float32)
    flat = rows.reshape(-1)
    buffer = None if dtype == np.float32 else np.empty(min(_CHUNK, flat.size), dtype)
    for begin in range(0, flat.size, _CHUNK):
        target = flat[begin : begin + _CHUNK]
        chunk = target if buffer is None else buffer[: target.size]
        _fill(tensor, tensor.offset + (skip + begin) * dtype.itemsize, chunk)
        if buffer is not None:
            target[:] = chunk
    return rows


def _fill(tensor: _Tensor, offset: int, target: NDArray[Any]) -> None:
    """Read the bytes at ``offset`` of the tensor's file into a contiguous array."""
    # Threads share the file and its position. (Reads without one, preadv, Windows lacks.)
    view, done = target.view(np.uint8).data, 0
    try:
        with tensor.lock:
            tensor.file.seek(offset)
            # One call gives at most 2 GiB.
            while done < target.nbytes and (count := tensor.file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise CheckpointError(
            f"{tensor.path} cannot be read: {error.strerror}.", _FETCH_AGAIN
        ) from error
    if done != target.nbytes:
        raise CheckpointError(f"{tensor.path} was cut short during the export.", _FETCH_AGAIN)
