"""Small language models that answer at once, in your own Python program, on your own CPU.

    from edge_llm import LLM

    with LLM("smollm2-int4") as llm:
        for chunk in llm.stream("Once upon a time", max_tokens=50):
            print(chunk.text, end="", flush=True)

Importing this package does no work: numpy, onnxruntime and the rest are imported when a name that
needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edge_llm.errors import ArgumentError, BundleError, ContextLengthError, EdgeLLMError

if TYPE_CHECKING:
    from edge_llm.bundle import Bundle
    from edge_llm.llm import LLM
    from edge_llm.manifest import Manifest
    from edge_llm.options import GenerateOptions
    from edge_llm.results import Chunk, Completion, Score, Timings, Usage

__all__ = [
    "LLM",
    "ArgumentError",
    "Bundle",
    "BundleError",
    "Chunk",
    "Completion",
    "ContextLengthError",
    "EdgeLLMError",
    "GenerateOptions",
    "Manifest",
    "Score",
    "Timings",
    "Usage",
]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm",
    "Bundle": "bundle",
    "Manifest": "manifest",
    "GenerateOptions": "options",
    "Chunk": "results",
    "Completion": "results",
    "Score": "results",
    "Timings": "results",
    "Usage": "results",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_llm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"edge_llm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
