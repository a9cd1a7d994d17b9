"""Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM and SmolLM2.

Reference: transformers' modeling_llama.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .spec import DecoderSpec

__all__ = ["read_llama"]


def read_llama(config: ConfigReader) -> DecoderSpec:
    """Read a ``LlamaConfig``."""
    hidden = config.require("hidden_size", int, at_least=1)
    heads = config.require("num_attention_heads", int, at_least=1)
    config.honour("hidden_act", {"silu"}, "silu")
    config.honour("rope_interleaved", {False}, False)
    bias = config.get("attention_bias", bool, False)
    return DecoderSpec(
        architecture="llama",
        layers=config.require("num_hidden_layers", int, at_least=1),
        hidden=hidden,
        intermediate=config.require("intermediate_size", int, at_least=1),
        heads=heads,
        kv_heads=config.get("num_key_value_heads", int, heads, at_least=1),
        head_dim=config.get("head_dim", int, hidden // heads, at_least=2),
        vocab=config.require("vocab_size", int, at_least=1),
        context=config.get("max_position_embeddings", int, 2048, at_least=2),
        norm_eps=config.get("rms_norm_eps", float, 1e-6, at_least=0),
        rope=config.rope(),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.get("mlp_bias", bool, False),
        tied=config.get("tie_word_embeddings", bool, False),
    )
