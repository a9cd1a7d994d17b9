"""llama.cpp, through the low-level functions of llama-cpp-python.

Everything but the threads is as llama.cpp sets it: a float16 cache, flash attention where it finds
it faster, weights repacked for this processor.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.engine import Answer

__all__ = ["BakedLlamaCppEngine", "LlamaCppEngine", "lib", "quantize"]

_silent = lib.llama_log_callback(lambda level, text, data: None)
lib.llama_log_set(_silent, ctypes.c_void_p(0))
lib.llama_backend_init()


def quantize(source: Path, target: Path, file_type: str, *, threads: int) -> None:
    """Quantize a GGUF file.

    Args:
        source: In float32.
        target: To be written.
        file_type: "Q8_0", "Q4_0", "Q4_K_M" and so on.
        threads: To compute with.

    Raises:
        ValueError: There is no such type.
        RuntimeError: llama.cpp refuses.
    """
    params = lib.llama_model_quantize_default_params()
    params.nthread = threads
    constant = f"LLAMA_FTYPE_MOSTLY_{file_type}"
    if not hasattr(lib, constant):
        raise ValueError(f"file_type must be one of llama.cpp's, such as Q4_K_M, got {file_type!r}")
    params.ftype = getattr(lib, constant)
    failed = lib.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama.cpp cannot quantize {source} to {file_type}")


class LlamaCppEngine:
    """A GGUF file in llama.cpp."""

    @staticmethod
    def import_library() -> None:
        """See :class:`~benchmarks.engines.engine.Engine`."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model: Any = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        self._context: Any = lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no memory for {context} tokens of {path}")
        self._vocab: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def logits(self, tokens: Sequence[int], *, last: int) -> NDArray[np.float32]:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        self._clear()
        self._decode(tokens, last)
        return self._read(last).copy()

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        self._clear()
        started = time.perf_counter()
        self._decode(prompt[self._recall(prompt) :], 1)
        tokens = [int(self._read(1).argmax())]
        first = time.perf_counter()
        for _ in range(max_tokens - 1):
            self._decode(tokens[-1:], 1)
            tokens.append(int(self._read(1).argmax()))
        return Answer.timed(tokens, started=started, first=first, ended=time.perf_counter())

    def close(self) -> None:
        """Free the model."""
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _recall(self, prompt: Sequence[int]) -> int:
        """Take up a kept beginning of a prompt; how long it is."""
        return 0

    def _clear(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], scored: int) -> None:
        """Append tokens to the sequence, and compute what follows the last ``scored``."""
        count = len(tokens)
        ids = (lib.llama_token * count)(*tokens)  # of which the batch has the address only
        batch = lib.llama_batch_get_one(ids, count)
        if scored > 1:  # without flags, the last one
            batch.logits = (ctypes.c_int8 * count)(*([0] * (count - scored) + [1] * scored))
        status = lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {count} tokens returns {status}")

    def _read(self, rows: int) -> NDArray[np.float32]:
        """The logits of the last step, float32 [rows, vocab], until the next one."""
        values = ctypes.cast(lib.llama_get_logits(self._context), ctypes.c_void_p).value
        assert values
        buffer: Any = (ctypes.c_float * (rows * self._vocab)).from_address(values)
        logits: NDArray[np.float32] = np.frombuffer(buffer, np.float32)
        return logits.reshape(rows, self._vocab)


class BakedLlamaCppEngine(LlamaCppEngine):
    """A GGUF file, and the state behind a beginning of prompts in a file beside it."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        super().__init__(path, context=context, threads=threads)
        self._file = path.with_name(f"{path.name}.state")
        self._found = (lib.llama_token * context)()  # where the file's tokens are read to

    def bake(self, prefix: Sequence[int]) -> None:
        """See :class:`~benchmarks.engines.engine.BakingEngine`."""
        self._clear()
        self._decode(prefix, 1)
        tokens = (lib.llama_token * len(prefix))(*prefix)
        name = str(self._file).encode()
        if not lib.llama_state_seq_save_file(self._context, name, 0, tokens, len(prefix)):
            raise RuntimeError(f"llama.cpp cannot write {self._file}")

    def _recall(self, prompt: Sequence[int]) -> int:
        count = ctypes.c_size_t()
        name, found, room = str(self._file).encode(), self._found, len(self._found)
        read = lib.llama_state_seq_load_file(
            self._context, name, 0, found, room, ctypes.byref(count)
        )
        if read and found[: count.value] == list(prompt[: count.value]):
            return count.value
        self._clear()
        return 0
