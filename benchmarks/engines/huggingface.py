"""transformers in float32, the reference of what a checkpoint computes, and in bfloat16."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.engines.engine import Answer

__all__ = ["BFloat16Engine", "TransformersEngine"]


class TransformersEngine:
    """A checkpoint in transformers, on the CPU, in float32."""

    dtype = torch.float32

    @staticmethod
    def import_library() -> None:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        # Which transformers imports where it is first asked for.
        importlib.import_module("transformers.models.llama.modeling_llama")

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        torch.set_num_threads(threads)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model: Any = load(path, dtype=self.dtype).eval()

    def logits(self, tokens: Sequence[int], *, last: int) -> NDArray[np.float32]:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        with torch.inference_mode():
            step = self._model(torch.tensor([list(tokens)]), logits_to_keep=last)
        logits: NDArray[np.float32] = step.logits[0].float().numpy()
        return logits

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        started = time.perf_counter()
        tokens, past, ends = list(prompt), None, []
        with torch.inference_mode():
            for _ in range(max_tokens):
                read = torch.tensor([tokens[-1:] if past else tokens])
                step = self._model(read, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = step.past_key_values
                tokens.append(int(step.logits[0, -1].argmax()))
                ends.append(time.perf_counter())
        answer = tokens[len(prompt) :]
        return Answer.timed(answer, started=started, first=ends[0], ended=ends[-1])

    def close(self) -> None:
        """Free the model."""
        del self._model

    def __enter__(self) -> TransformersEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class BFloat16Engine(TransformersEngine):
    """The same in bfloat16."""

    dtype = torch.bfloat16
