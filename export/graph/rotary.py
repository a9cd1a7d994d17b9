"""Cosines and sines of rotary position embedding, for every position of the exported context."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..architectures.rope import RopeConfig

__all__ = ["inverse_frequencies", "rotary_tables"]


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


def rotary_tables(
    rope: RopeConfig, *, head_dim: int, padded: int, context: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, each float32 [context, padded / 2]; other pairs do not turn."""
    # Angles are rounded to float32 as in the reference implementation, which computes them so.
    positions = np.arange(context, dtype=np.float32)
    width = rope.width(head_dim)
    angles = positions[:, None] * inverse_frequencies(rope, width, context)[None, :]
    cosines = np.ones((context, padded // 2), np.float32)
    sines = np.zeros((context, padded // 2), np.float32)
    cosines[:, : width // 2] = np.cos(angles.astype(np.float64)) * rope.attention_factor
    sines[:, : width // 2] = np.sin(angles.astype(np.float64)) * rope.attention_factor
    return cosines, sines
