"""OLMo 2: norms stand behind attention and MLP, not before them.

Reference: transformers' modeling_olmo2.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .reading import read_activation, read_layers, read_sizes
from .rope import read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec, QKNormSpec, TensorNames

__all__ = ["read_olmo2"]


def read_olmo2(config: ConfigReader) -> DecoderSpec:
    """Read an ``Olmo2Config``."""
    sizes = read_sizes(config, context=2048)
    norm = NormSpec(eps=config.get("rms_norm_eps", float, 1e-5, at_least=0))
    attention = AttentionSpec(rope=read_rope(config))
    bias = config.get("attention_bias", bool, False)
    return DecoderSpec(
        architecture="olmo2",
        **sizes,
        attention=(attention,) * read_layers(config),
        norm=norm,
        qk_norm=QKNormSpec(norm=norm, over="projection"),
        activation=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        output_bias=bias,
        tied=config.get("tie_word_embeddings", bool, False),
        names=TensorNames(
            attention_norm=None,
            attention_post_norm="model.layers.{i}.post_attention_layernorm",
            mlp_norm=None,
            mlp_post_norm="model.layers.{i}.post_feedforward_layernorm",
        ),
    )
