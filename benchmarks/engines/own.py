"""edge_llm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.engine import Answer
from edge_llm import LLM

__all__ = ["EdgeEngine", "export"]


def export(checkpoint: Path, bundle: Path, flags: Sequence[str]) -> None:
    """Run ``edge-llm export`` with flags of its own."""
    command = [sys.executable, "-m", "edge_llm.cli.main", "export", str(checkpoint)]
    subprocess.run([*command, "-o", str(bundle), *flags], check=True, stdout=subprocess.DEVNULL)


class EdgeEngine:
    """A bundle in edge_llm."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        self._llm = LLM(path, context=context, threads=threads, slots=1)

    def logits(self, tokens: Sequence[int], *, last: int) -> NDArray[np.float32]:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        return self._llm.logits(tokens, last=last)

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        answer = self._llm.generate(
            prompt,
            max_tokens=max_tokens,
            min_tokens=max_tokens,
            temperature=0.0,
            speculation="off",
            reuse_prefix=False,
        )
        first = answer.timings.first_token
        assert first is not None
        return Answer(first, answer.timings.per_token or 0.0, answer.tokens)

    def close(self) -> None:
        """Free the model."""
        self._llm.close()

    def __enter__(self) -> EdgeEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
