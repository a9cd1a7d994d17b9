"""Qwen2, Qwen2.5 and Qwen3 (dense).

References: transformers' modeling_qwen2.py and modeling_qwen3.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .reading import read_activation, read_layers, read_sizes, read_windows
from .rope import read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec, QKNormSpec

__all__ = ["read_qwen2", "read_qwen3"]


def read_qwen2(config: ConfigReader) -> DecoderSpec:
    """Read a ``Qwen2Config``."""
    sizes = read_sizes(config, context=32_768, kv_heads=32)
    return DecoderSpec(
        architecture="qwen2",
        **sizes,
        attention=_read_attention(config),
        norm=_read_norm(config),
        activation=read_activation(config, "hidden_act", "silu"),
        qkv_bias=True,
        tied=config.get("tie_word_embeddings", bool, False),
    )


def read_qwen3(config: ConfigReader) -> DecoderSpec:
    """Read a ``Qwen3Config``."""
    sizes = read_sizes(config, context=32_768, kv_heads=32, head_dim=128)
    norm = _read_norm(config)
    bias = config.get("attention_bias", bool, False)
    return DecoderSpec(
        architecture="qwen3",
        **sizes,
        attention=_read_attention(config),
        norm=norm,
        qk_norm=QKNormSpec(norm=norm),
        activation=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        output_bias=bias,
        tied=config.get("tie_word_embeddings", bool, False),
    )


def _read_attention(config: ConfigReader) -> tuple[AttentionSpec, ...]:
    """The layers from ``max_window_layers`` on slide, where any do."""
    layers = read_layers(config)
    slides = config.get("use_sliding_window", bool, False)
    window = config.optional("sliding_window", int, 4096, at_least=1) if slides else None
    config.skip("sliding_window")
    first = config.get("max_window_layers", int, 28)
    rope = read_rope(config)
    return tuple(
        AttentionSpec(rope=rope, window=one)
        for one in read_windows(config, layers, window, lambda i: bool(window) and i >= first)
    )


def _read_norm(config: ConfigReader) -> NormSpec:
    return NormSpec(eps=config.get("rms_norm_eps", float, 1e-6, at_least=0))
