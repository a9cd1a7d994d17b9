"""The embedded model: home commands in, one line of JSON out.

The bundle lies in this folder; how the model was made, and what it can and cannot do, stands in
the model card beside the exporter (``export/builtin/MODEL_CARD.md``).
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

__all__ = ["BUNDLE", "announce"]

BUNDLE = Path(__file__).parent / "bundle"

NOTICE = """\
This is edge_llm's small built-in model. It turns home commands ("turn on the kitchen light") into
JSON and sensor readings ("sensor: attic humidity=45%") into a sentence, in English, and nothing
else. For a general model: edge-llm export HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2, then
LLM("smollm2") or edge-llm run -m smollm2."""


@functools.cache
def announce() -> None:
    """Say on stderr, once per process, which model this is."""
    if sys.stderr is not None:
        print(NOTICE, file=sys.stderr, flush=True)
