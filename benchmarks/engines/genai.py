"""onnxruntime-genai: its model builder and its generator."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.engine import Answer
from edge_llm.runtime.session import import_onnxruntime

__all__ = ["GenaiEngine", "build"]

BUILDER = Path(__file__).parents[1] / "genai_builder.py"


def build(
    checkpoint: Path, folder: Path, *, precision: str = "int4", options: Sequence[str] = ()
) -> None:
    """Run onnxruntime-genai's model builder.

    Args:
        checkpoint: A Hugging Face folder.
        folder: To be written.
        precision: "int4" or "fp32".
        options: The builder's ``--extra_options``, such as ``algo_config=k_quant``.

    Raises:
        RuntimeError: The builder fails; what it said follows.
    """
    cache = folder.parent / "genai-cache"
    command = [sys.executable, BUILDER, "-i", checkpoint, "-o", folder, "-c", cache, "-e", "cpu"]
    extra = ["--extra_options", *options] if options else []
    done = subprocess.run(
        [*map(str, command), "-p", precision, *extra], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder fails:\n{done.stdout}{done.stderr}")


class GenaiEngine:
    """A folder of the builder's in onnxruntime-genai."""

    @staticmethod
    def import_library() -> None:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        import_onnxruntime()  # its telemetry is off from here on
        importlib.import_module("onnxruntime_genai")

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        self.import_library()
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        self._context = context
        config = onnxruntime_genai.Config(str(path))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model: Any = onnxruntime_genai.Model(config)

    def logits(self, tokens: Sequence[int], *, last: int) -> NDArray[np.float32]:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        generator = self._generator(self._context)
        generator.append_tokens(np.array(tokens, np.int32))
        found: NDArray[np.float32] = generator.get_output("logits")
        return np.array(found[0, -last:], np.float32)

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        generator = self._generator(len(prompt) + max_tokens)
        started = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(max_tokens - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        return Answer.timed(tokens, started=started, first=first, ended=ended)

    def close(self) -> None:
        """Free the model."""
        del self._model

    def __enter__(self) -> GenaiEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _generator(self, length: int) -> Any:
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return self._library.Generator(self._model, params)
