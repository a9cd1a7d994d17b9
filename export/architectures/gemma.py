"""Gemma, Gemma 2 and the text models of Gemma 3.

References: transformers' modeling_gemma.py, modeling_gemma2.py and modeling_gemma3.py.
"""

from __future__ import annotations

import math

from ..config import ConfigReader
from .reading import Sizes, read_activation, read_layers, read_sizes, read_windows
from .rope import read_rope
from .spec import Activation, AttentionSpec, DecoderSpec, NormSpec, QKNormSpec, TensorNames

__all__ = ["read_gemma", "read_gemma2", "read_gemma3"]

# Norms stand before attention and MLP, and behind them.
_SANDWICH = TensorNames(
    attention_post_norm="model.layers.{i}.post_attention_layernorm",
    mlp_norm="model.layers.{i}.pre_feedforward_layernorm",
    mlp_post_norm="model.layers.{i}.post_feedforward_layernorm",
)
_GELU = "gelu_pytorch_tanh"


def read_gemma(config: ConfigReader) -> DecoderSpec:
    """Read a ``GemmaConfig``."""
    sizes = read_sizes(config, context=8192, kv_heads=16, head_dim=256)
    attention = AttentionSpec(rope=read_rope(config))
    # configuration_gemma.py: hidden_activation overwrites hidden_act. (modeling_gemma.py of
    # transformers 4.57 forgets it; the weights were trained with the approximation by tanh.)
    legacy = config.get("hidden_act", str, _GELU)
    return _spec(
        config,
        "gemma",
        sizes,
        (attention,) * read_layers(config),
        read_activation(config, "hidden_activation", legacy),
        names=TensorNames(),
    )


def read_gemma2(config: ConfigReader) -> DecoderSpec:
    """Read a ``Gemma2Config``: every second layer slides, and scores and logits are bounded."""
    sizes = read_sizes(config, context=8192, kv_heads=4, head_dim=256)
    layers = read_layers(config)
    window = config.optional("sliding_window", int, 4096, at_least=1)
    rope, scale = read_rope(config), _read_scale(config)
    softcap = _read_softcap(config, "attn_logit_softcapping", 50.0)
    config.skip("hidden_act")  # modeling_gemma2.py reads hidden_activation alone
    attention = tuple(
        AttentionSpec(rope=rope, scale=scale, window=one, softcap=softcap)
        for one in read_windows(config, layers, window, lambda i: i % 2 == 0)
    )
    return _spec(
        config,
        "gemma2",
        sizes,
        attention,
        read_activation(config, "hidden_activation", _GELU),
        names=_SANDWICH,
        softcap=_read_softcap(config, "final_logit_softcapping", 30.0),
    )


def read_gemma3(config: ConfigReader) -> DecoderSpec:
    """Read a ``Gemma3TextConfig``: layers that slide turn by a base of their own."""
    sizes = read_sizes(config, context=131_072, kv_heads=4, head_dim=256)
    layers = read_layers(config)
    window = config.optional("sliding_window", int, 4096, at_least=1)
    scale = _read_scale(config)
    every = config.get("sliding_window_pattern", int, 6, at_least=1)
    config.skip("_sliding_window_pattern")  # written beside layer_types, and never read
    config.honour("attn_logit_softcapping", {None}, None)
    config.honour("use_bidirectional_attention", {False}, False)
    everywhere = read_rope(config, theta=1e6, layer_type="full_attention")
    nearby = read_rope(
        config, theta_key="rope_local_base_freq", scaling_key="", layer_type="sliding_attention"
    )
    attention = tuple(
        AttentionSpec(rope=nearby if one else everywhere, scale=scale, window=one)
        for one in read_windows(config, layers, window, lambda i: (i + 1) % every != 0)
    )
    return _spec(
        config,
        "gemma3_text",
        sizes,
        attention,
        read_activation(config, "hidden_activation", _GELU),
        names=_SANDWICH,
        softcap=_read_softcap(config, "final_logit_softcapping", None),
        qk_normed=True,
    )


def _spec(
    config: ConfigReader,
    architecture: str,
    sizes: Sizes,
    attention: tuple[AttentionSpec, ...],
    activation: Activation,
    *,
    names: TensorNames,
    softcap: float = 0.0,
    qk_normed: bool = False,
) -> DecoderSpec:
    """What the three have in common: norms that store their gain minus 1, a scaled embedding."""
    norm = NormSpec(eps=config.get("rms_norm_eps", float, 1e-6, at_least=0), gain_offset=1.0)
    bias = config.get("attention_bias", bool, False)
    return DecoderSpec(
        architecture=architecture,
        **sizes,
        attention=attention,
        norm=norm,
        qk_norm=QKNormSpec(norm=norm) if qk_normed else None,
        activation=activation,
        qkv_bias=bias,
        output_bias=bias,
        tied=config.get("tie_word_embeddings", bool, True),
        embedding_scale=sizes["hidden"] ** 0.5,
        logits_softcap=softcap,
        names=names,
    )


def _read_scale(config: ConfigReader) -> float:
    return 1 / math.sqrt(config.get("query_pre_attn_scalar", float, 256.0, at_least=1e-3))


def _read_softcap(config: ConfigReader, key: str, default: float | None) -> float:
    return config.optional(key, float, default, at_least=1e-3) or 0.0
