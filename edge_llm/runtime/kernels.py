"""Whether this CPU has fast kernels for the quantized matrices of a graph.

What decides is how ONNX Runtime 1.32 computes MatMulNBits. In integers: on x86 with AVX2 and on ARM
with dot products, at accuracy level 4. Else 4 bits on ARM go through a kernel in float32, and all
others are unpacked to float32 as a whole matrix at every call. The operators that take int8 with a
scale per row (DynamicQuantizeMatMul, QGemm) have integer kernels on every CPU.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from edge_llm.runtime.device import cpu_features

if TYPE_CHECKING:
    from edge_llm.foreign.onnx_file import Node

__all__ = ["NO_DOT_PRODUCT", "BlockProduct", "block_products", "slow_kernels"]

NO_DOT_PRODUCT = "arm64-nodotprod"
"""The target whose int8 matrices have fast kernels on every CPU."""

BlockProduct = tuple[int, int]
"""Bits of a weight, and the accuracy level at which MatMulNBits multiplies it."""

_INTEGERS = 4  # the accuracy level that lets activations be rounded to 8 bits


def block_products(nodes: Iterable[Node]) -> frozenset[BlockProduct]:
    """The kinds of MatMulNBits among a graph's nodes."""
    return frozenset(
        (node.integers.get("bits", 4), node.integers.get("accuracy_level", 0))
        for node in nodes
        if node.operator == "MatMulNBits"
    )


def slow_kernels(
    products: Collection[BlockProduct],
    *,
    target: str | None = None,
    machine: str | None = None,
    features: Collection[str] | None = None,
) -> str | None:
    """Why a graph is slow on this CPU, and what to do; None where it is not.

    Args:
        products: See :func:`block_products`.
        target: What the graph was made for. 4 bits for a CPU without dot products are a choice,
            not a mistake.
        machine: The processor's kind, as :func:`platform.machine` calls it; by default this one's.
        features: Its instruction sets; by default this one's.
    """
    machine = platform.machine() if machine is None else machine
    features = cpu_features() if features is None else features
    bits = {bits for bits, _ in products}
    lacking = _lacking(machine, features)
    if lacking and bits - {4}:
        text = f"{lacking}: its weights of {_listed(bits - {4})} bits are unpacked at every step"
    elif lacking and bits and machine == "aarch64" and target != NO_DOT_PRODUCT:
        text = f"{lacking}: its 4-bit weights are multiplied in float32, which makes prompts slow"
    elif lacking and bits and machine != "aarch64":
        text = f"{lacking}: its 4-bit weights are unpacked at every step"
    elif unpacked := {bits for bits, level in products if bits != 4 and level != _INTEGERS}:
        return (
            f"The model has slow kernels on every CPU: its weights of {_listed(unpacked)} bits are "
            f"unpacked at every step, since its MatMulNBits nodes have no accuracy_level "
            f"{_INTEGERS}. Take a 4-bit conversion, or export the checkpoint with edge-llm."
        )
    else:
        return None
    return (
        f"The model has no fast kernels on {text}. Export it with `--target {NO_DOT_PRODUCT}`, "
        "whose int8 kernels are fast here."
    )


def _lacking(machine: str, features: Collection[str]) -> str | None:
    """What a processor lacks for integer products of blocks, where the system tells."""
    # Linux says "aarch64" and tells features; macOS says "arm64" and has dot products always.
    if machine == "aarch64" and "asimddp" not in features:
        return "this ARM processor without dot products (asimddp)"
    if "sse4_2" in features and "avx2" not in features:
        return "this x86 processor without AVX2"
    return None


def _listed(bits: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(bits)))
