"""The limit of decoding: how fast memory is read, and what a token must read of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.foreign.onnx_file import read_onnx

__all__ = ["read_bandwidth", "weights_read"]

SIZE = 512 << 20  # far beyond the caches
PASSES = 8
ELSEWHERE = {"Gather", "GatherBlockQuantized", "GroupQueryAttention"}
"""Operators that read a few rows of a table: of embeddings, and of sines and cosines."""


def read_bandwidth(threads: int, *, size: int = SIZE) -> float:
    """Bytes per second that threads read together: the best of several passes over an array.

    Args:
        threads: Each reads a part of its own.
        size: Bytes of the array.
    """
    parts = np.array_split(np.ones(size // 8, np.uint64), threads)
    return sum(part.nbytes for part in parts) / min(_pass(parts) for _ in range(PASSES))


def _pass(parts: list[NDArray[np.uint64]]) -> float:
    readers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
    started = time.perf_counter()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return time.perf_counter() - started


def weights_read(path: Path) -> int:
    """Bytes of weights that each token reads: all but an embedding table that is only gathered.

    Args:
        path: A GGUF file, a folder with ``model.onnx``, or a checkpoint with a tied head.
    """
    if path.is_file():
        return _gguf_weights(path)
    graph = path / "model.onnx"
    if graph.is_file():
        return _onnx_weights(graph)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _onnx_weights(path: Path) -> int:
    model = read_onnx(path)
    used = {name for node in model.nodes if node.operator not in ELSEWHERE for name in node.inputs}
    return sum(tensor.nbytes for tensor in model.tensors if tensor.name in used)


def _gguf_weights(path: Path) -> int:
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())
