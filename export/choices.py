"""What an export can be asked for; imports nothing, so that ``edge-llm --help`` need not wait."""

from __future__ import annotations

__all__ = [
    "BLOCKS",
    "DEFAULT_BLOCK",
    "DEFAULT_QUANTIZATION",
    "KV_CACHES",
    "LONGEST_DEFAULT_CONTEXT",
    "METHODS",
    "QUANTIZATIONS",
    "VIAS",
]

QUANTIZATIONS = {"fp32": 32, "int8": 8, "int4": 4}
"""Bits of a weight, by name."""
DEFAULT_QUANTIZATION = "int4"  # of weights that the checkpoint has as floats

METHODS = ("rtn", "gptq")
"""How weights are rounded: to the nearest integers, or by GPTQ; the first is the default."""

KV_CACHES = ("fp32", "int8")
"""How keys and values are kept; the first is the default."""

BLOCKS = (32, 64, 128)
"""How many weights may share a scale."""
DEFAULT_BLOCK = 32

# A longer context is a matter of --max-context: its rotary tables and its cache cost memory.
LONGEST_DEFAULT_CONTEXT = 8192

VIAS = ("auto", "builder", "optimum")
"""Who makes the graph: the graph builder, optimum's exporter, or the first that knows the model."""
