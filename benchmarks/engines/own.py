"""edge_llm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.engine import Answer
from edge_llm import LLM, Bundle
from edge_llm.compiled import CompiledModels, compiled_folder
from edge_llm.runtime.session import import_onnxruntime

__all__ = ["CompiledEdgeEngine", "EdgeEngine", "compile_bundle", "compiled_bytes", "export"]

COMPILED = "compiled"
"""Folder beside a bundle's where its compiled weights lie."""


def export(checkpoint: Path, bundle: Path, flags: Sequence[str]) -> None:
    """Run ``edge-llm export`` with flags of its own."""
    command = [sys.executable, "-m", "edge_llm.cli.main", "export", str(checkpoint)]
    subprocess.run([*command, "-o", str(bundle), *flags], check=True, stdout=subprocess.DEVNULL)


def compile_bundle(bundle: Path) -> None:
    """Run ``edge-llm compile``, where that is not done already."""
    command = [sys.executable, "-m", "edge_llm.cli.main", "compile", str(bundle)]
    cache = str(bundle.parent / COMPILED)
    subprocess.run([*command, "--cache-dir", cache], check=True, stdout=subprocess.DEVNULL)


def compiled_bytes(bundle: Path) -> int:
    """Bytes of what :func:`compile_bundle` has written beside a bundle."""
    models = CompiledModels(compiled_folder(bundle.parent / COMPILED))
    found = models.find(Bundle.open(bundle))
    assert found is not None
    return sum(file.stat().st_size for file in found.parent.iterdir())


class EdgeEngine:
    """A bundle in edge_llm."""

    def __init__(
        self, path: Path, *, context: int, threads: int, cache_dir: Path | None = None
    ) -> None:
        self._llm = LLM(path, context=context, threads=threads, cache_dir=cache_dir)
        self._cached = False  # whether the cache may hold what a prompt begins with

    @staticmethod
    def import_library() -> None:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        import_onnxruntime()

    def logits(self, tokens: Sequence[int], *, last: int) -> NDArray[np.float32]:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        self._cached = True
        return self._llm.logits(tokens, last=last)

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        if self._cached:
            self._llm.generate([(prompt[0] + 1) % self._llm.manifest.dims.vocab], max_tokens=1)
        self._cached = True
        answer = self._llm.generate(
            prompt,
            max_tokens=max_tokens,
            min_tokens=max_tokens,
            temperature=0.0,
            speculation="off",
        )
        assert answer.usage.reused_tokens == 0  # the request in front of it emptied the cache
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


class CompiledEdgeEngine(EdgeEngine):
    """A bundle with compiled weights, which :func:`compile_bundle` has made."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        super().__init__(path, context=context, threads=threads, cache_dir=path.parent / COMPILED)
