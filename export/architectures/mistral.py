"""Mistral 7B: v0.1 with a sliding window, v0.2 and v0.3 without.

Reference: transformers' modeling_mistral.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .reading import read_activation, read_layers, read_sizes
from .rope import read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec

__all__ = ["read_mistral"]


def read_mistral(config: ConfigReader) -> DecoderSpec:
    """Read a ``MistralConfig``."""
    sizes = read_sizes(config, context=131_072, kv_heads=8)
    attention = AttentionSpec(
        rope=read_rope(config),
        window=config.optional("sliding_window", int, 4096, at_least=1),
    )
    return DecoderSpec(
        architecture="mistral",
        **sizes,
        attention=(attention,) * read_layers(config),
        norm=NormSpec(eps=config.get("rms_norm_eps", float, 1e-6, at_least=0)),
        activation=read_activation(config, "hidden_act", "silu"),
        tied=config.get("tie_word_embeddings", bool, False),
    )
