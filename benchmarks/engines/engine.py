"""What a benchmark asks of an engine."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ENGINES",
    "Answer",
    "BakingEngine",
    "Engine",
    "engine_class",
    "model_bytes",
    "open_engine",
    "versions",
]

ENGINES = {
    "edge-llm": "own.EdgeEngine",
    "edge-llm compiled": "own.CompiledEdgeEngine",
    "edge-llm baked": "own.BakedEdgeEngine",
    "llama.cpp": "llama_cpp.LlamaCppEngine",
    "llama.cpp baked": "llama_cpp.BakedLlamaCppEngine",
    "onnxruntime-genai": "genai.GenaiEngine",
    "transformers": "huggingface.TransformersEngine",
    "transformers bfloat16": "huggingface.BFloat16Engine",
}
"""Module and class of each engine; a module is imported when its engine is opened."""

DISTRIBUTIONS = {
    "own": ("edge-llm", "onnxruntime"),
    "llama_cpp": ("llama-cpp-python", "gguf"),
    "genai": ("onnxruntime-genai",),
    "huggingface": ("torch", "transformers"),
}
"""What each module measures."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer.

    Attributes:
        first_token: Seconds until the first token was known.
        per_token: Seconds of each further token, their mean; 0 where there is none.
        tokens: The answer.
    """

    first_token: float
    per_token: float
    tokens: tuple[int, ...]

    @classmethod
    def timed(cls, tokens: Sequence[int], *, started: float, first: float, ended: float) -> Answer:
        """An answer by the times on one clock when it began, had its first token, and ended."""
        further = len(tokens) - 1
        return cls(first - started, (ended - first) / further if further else 0.0, tuple(tokens))


class Engine(Protocol):
    """A loaded model; one sequence at a time, nothing kept from one call to the next."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None: ...

    @staticmethod
    def import_library() -> None:
        """Import what the module has not imported already."""

    def logits(self, tokens: Sequence[int], *, last: int) -> NDArray[np.float32]:
        """What follows each of a sequence's last ``last`` tokens, float32 [last, vocab]."""

    def answer(self, prompt: Sequence[int], *, max_tokens: int) -> Answer:
        """Answer greedily with exactly ``max_tokens`` tokens."""

    def close(self) -> None:
        """Free the model."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class BakingEngine(Engine, Protocol):
    """An engine that keeps a prompt's beginning on disk, and starts from there."""

    def bake(self, prefix: Sequence[int]) -> None:
        """Compute a beginning, and keep it beside the model for later processes."""


def engine_class(name: str) -> type[Engine]:
    """An engine's class, its library imported: so that loading a model can be timed alone."""
    module, kind = ENGINES[name].split(".")
    engine: type[Engine] = getattr(importlib.import_module(f"{__package__}.{module}"), kind)
    engine.import_library()
    return engine


def open_engine(name: str, path: Path, *, context: int, threads: int) -> Engine:
    """Load a model.

    Args:
        name: One of ``ENGINES``.
        path: A bundle, a GGUF file, onnxruntime-genai's folder, or a checkpoint.
        context: Most tokens of a sequence.
        threads: To compute with.
    """
    return engine_class(name)(path, context=context, threads=threads)


def model_bytes(path: Path) -> int:
    """Bytes of a model's graph and weights, on disk.

    The tokenizer counts nowhere: it is the same for everybody, and no part of the GGUF files here.
    """
    if path.is_file():
        return path.stat().st_size
    weights = [*path.glob("*.onnx*"), *path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in weights)


def versions(engines: Iterable[str]) -> dict[str, str]:
    """The versions of what some engines, keys of `ENGINES`, are made of."""
    modules = {ENGINES[engine].split(".")[0] for engine in engines}
    return {name: version(name) for module in sorted(modules) for name in DISTRIBUTIONS[module]}
