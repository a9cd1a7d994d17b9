"""Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM and SmolLM2.

Reference: transformers' modeling_llama.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .reading import read_activation, read_layers, read_sizes
from .rope import read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec

__all__ = ["read_llama"]


def read_llama(config: ConfigReader) -> DecoderSpec:
    """Read a ``LlamaConfig``."""
    sizes = read_sizes(config, context=2048)
    attention = AttentionSpec(rope=read_rope(config))
    bias = config.get("attention_bias", bool, False)
    return DecoderSpec(
        architecture="llama",
        **sizes,
        attention=(attention,) * read_layers(config),
        norm=NormSpec(eps=config.get("rms_norm_eps", float, 1e-6, at_least=0)),
        activation=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.get("mlp_bias", bool, False),
        tied=config.get("tie_word_embeddings", bool, False),
    )
