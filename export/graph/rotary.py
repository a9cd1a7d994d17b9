"""Cosines and sines of rotary position embedding, for every position of the exported context."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..architectures.rope import RopeConfig
from .recorder import GraphRecorder

__all__ = ["inverse_frequencies", "pair_frequencies", "record_rotary_tables"]


def inverse_frequencies(rope: RopeConfig, width: int, context: int) -> NDArray[np.float32]:
    """Radians per position of each rotated pair, float32 [width / 2].

    Sources: RoFormer (arXiv 2104.09864); position interpolation (arXiv 2306.15595) for "linear";
    transformers' ``_compute_llama3_parameters`` for "llama3"; LongRoPE (arXiv 2402.13753).

    Args:
        rope: The embedding.
        width: Entries of a head that turn.
        context: Longest sequence; chooses between longrope's two sets of factors.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = np.power(np.float32(rope.theta), exponents)
    if rope.kind == "longrope":
        beyond = context > rope.original_context
        powers *= np.array(rope.long_factor if beyond else rope.short_factor, np.float32)
    frequencies: NDArray[np.float32] = np.reciprocal(powers)
    if rope.kind == "linear":
        frequencies /= np.float32(rope.factor)
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: NDArray[np.float32], rope: RopeConfig) -> NDArray[np.float32]:
    """Slow frequencies are divided by the factor, fast ones kept, those between are blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_context / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
    slowed = (1 - blend) * frequencies / np.float32(rope.factor)
    return (slowed + blend * frequencies).astype(np.float32)


def pair_frequencies(
    rope: RopeConfig, *, head_dim: int, padded: int, context: int
) -> NDArray[np.float32]:
    """Radians per position of each pair of a head, float32 [padded / 2]; 0 does not turn."""
    frequencies = np.zeros(padded // 2, np.float32)
    width = rope.width(head_dim)
    frequencies[: width // 2] = inverse_frequencies(rope, width, context)
    return frequencies


def record_rotary_tables(
    graph: GraphRecorder, rope: RopeConfig, *, head_dim: int, padded: int, context: int, suffix: str
) -> tuple[str, str]:
    """Record the cosines and sines of every position, each float32 [context, padded / 2].

    They are recorded as what computes them, which ONNX Runtime does once, when it loads the graph:
    as numbers they would be some per cent of a small model's file. Angles are rounded to float32 as
    in the reference implementation, which computes them so; cosines and sines are exact.

    Returns:
        The tables' names.
    """
    path = f"/rotary{suffix}"
    frequencies = pair_frequencies(rope, head_dim=head_dim, padded=padded, context=context)
    zero, one = (graph.constant(f"int_{n}", np.array(n, np.int64)) for n in (0, 1))
    limit = graph.constant("rotary_context", np.array(context, np.int64))
    column = graph.constant("rotary_column", np.array([-1, 1], np.int64))
    integers = graph.op("Range", f"{path}/Range", [zero, limit, one])
    positions = graph.op("Cast", f"{path}/Cast", [integers], to=TensorProto.FLOAT)
    positions = graph.op("Reshape", f"{path}/Reshape", [positions, column])
    each = graph.constant(f"rotary_frequencies{suffix}", frequencies)
    angles = graph.op("Mul", f"{path}/Mul", [positions, each])
    angles = graph.op("Cast", f"{path}/angles/Cast", [angles], to=TensorProto.DOUBLE)
    # What does not turn is not scaled either.
    scales = np.where(frequencies != 0, rope.attention_factor, 1.0)
    names = (f"rotary_cos{suffix}", f"rotary_sin{suffix}")
    for operator, name in zip(("Cos", "Sin"), names, strict=True):
        values = graph.op(operator, f"{path}/{operator}", [angles])
        if rope.attention_factor != 1.0:
            factor = graph.constant(f"rotary_scales{suffix}", scales)
            values = graph.op("Mul", f"{path}/{operator}/Mul", [values, factor])
        cast = f"{path}/{operator}/Cast"
        graph.op("Cast", cast, [values], outputs=[name], to=TensorProto.FLOAT)
    return names
