"""What an export can be asked for; imports little, so that ``edge-llm --help`` need not wait."""

from __future__ import annotations

from edge_llm.runtime.kernels import NO_DOT_PRODUCT

__all__ = [
    "AUTO",
    "AUTO_BITS",
    "BLOCKS",
    "DEFAULT_BLOCK",
    "KV_CACHES",
    "LONGEST_DEFAULT_CONTEXT",
    "METHODS",
    "QUANTIZATIONS",
    "TARGETS",
    "VIAS",
    "VOCABULARIES",
]

QUANTIZATIONS = {"fp32": 32, "int8": 8, "int4": 4}
"""Bits of a weight, by name."""

AUTO = "auto"
"""Each matrix in as many bits as it is worth; the default."""
AUTO_BITS = 4.8
"""Bits of a weight that it takes at most, scales included, on the average."""

METHODS = ("rtn", "gptq")
"""How weights are rounded: to the nearest integers, or by GPTQ."""

VOCABULARIES = ("int4", "int8")
"""How the embedding and the head may be stored."""

KV_CACHES = ("fp32", "int8")
"""How keys and values are kept; the first is the default."""

BLOCKS = (32, 64, 128)
"""How many weights may share a scale."""
DEFAULT_BLOCK = 32

TARGETS = ("x86", "arm64", NO_DOT_PRODUCT)
"""CPUs by the kernels that they have. The first two take the same graph, which is the default."""

# A longer context is a matter of --max-context: its rotary tables and its cache cost memory.
LONGEST_DEFAULT_CONTEXT = 8192

VIAS = ("auto", "builder", "optimum")
"""Who makes the graph: the graph builder, optimum's exporter, or the first that knows the model."""
