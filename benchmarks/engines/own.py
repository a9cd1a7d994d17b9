"""edge_llm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.engine import Answer
from edge_llm import LLM, Bundle, GenerateOptions
from edge_llm.compiled import CompiledModels, compiled_folder
from edge_llm.runtime.session import import_onnxruntime

__all__ = [
    "BakedEdgeEngine",
    "CompiledEdgeEngine",
    "EdgeEngine",
    "compile_bundle",
    "compiled_bytes",
    "export",
    "plainly",
]

COMPILED = "compiled"
"""Folder beside a bundle's where its compiled weights lie."""
PREFIXES, PREFIX = "prefixes", "prefix.json"
"""Beside a bundle: the folder of kept beginnings of prompts, the file of the baked one's tokens."""


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


def plainly(max_tokens: int, *, reuse_prefix: bool = False) -> GenerateOptions:
    """Options of a greedy answer of exactly so many tokens, each of which takes a step."""
    return {
        "max_tokens": max_tokens,
        "min_tokens": max_tokens,
        "temperature": 0.0,
        "speculation": "off",
        "reuse_prefix": reuse_prefix,
    }


class EdgeEngine:
    """A bundle in edge_llm."""

    def __init__(self, path: Path, *, context: int, threads: int, **options: Path) -> None:
        self._llm = LLM(path, context=context, threads=threads, slots=1, **cast(Any, options))
        self._answered = False

    @staticmethod
    def import_library() -> None:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        import_onnxruntime()

    def logits(self, tokens: Sequence[int], *, last: int) -> NDArray[np.float32]:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        return self._llm.logits(tokens, last=last)

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """See :class:`~benchmarks.engines.engine.Engine`."""
        baked = self._is_baked(prompt)
        if baked and self._answered:  # what was baked lies on disk: the row must not hold it
            self._llm.generate([(prompt[0] + 1) % self._llm.manifest.dims.vocab], max_tokens=1)
        self._answered = True
        answer = self._llm.generate(prompt, **plainly(max_tokens, reuse_prefix=baked))
        assert bool(answer.usage.reused_tokens) == baked
        first = answer.timings.first_token
        assert first is not None
        return Answer(first, answer.timings.per_token or 0.0, answer.tokens)

    def _is_baked(self, prompt: Sequence[int]) -> bool:
        return False

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


class BakedEdgeEngine(EdgeEngine):
    """A bundle with a beginning of prompts on disk."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        folder = path.parent / PREFIXES
        super().__init__(path, context=context, threads=threads, prefix_cache=folder)
        self._file = path.parent / PREFIX
        self._prefix = json.loads(self._file.read_text()) if self._file.is_file() else []

    def bake(self, prefix: Sequence[int]) -> None:
        """See :class:`~benchmarks.engines.engine.BakingEngine`."""
        cast(Any, self._llm).bake(prefix)
        self._file.write_text(json.dumps(list(prefix)))

    def _is_baked(self, prompt: Sequence[int]) -> bool:
        return bool(self._prefix) and list(prompt[: len(self._prefix)]) == self._prefix
