"""Phi-3 and Phi-3.5 mini, Phi-4-mini.

Reference: transformers' modeling_phi3.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .reading import read_activation, read_layers, read_sizes
from .rope import read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec, TensorNames

__all__ = ["read_phi3"]


def read_phi3(config: ConfigReader) -> DecoderSpec:
    """Read a ``Phi3Config``."""
    sizes = read_sizes(config, context=4096)
    for key, only in {"full_attn_mod": 1, "interpolate_factor": 1}.items():
        config.honour(key, {only}, only)
    config.honour("lm_head_bias", {False}, False)
    trained = config.get("original_max_position_embeddings", int, 4096, at_least=2)
    attention = AttentionSpec(
        rope=read_rope(config, fraction=1.0, contexts=(sizes["context"], trained)),
        window=config.optional("sliding_window", int, None, at_least=1),
    )
    return DecoderSpec(
        architecture="phi3",
        **sizes,
        attention=(attention,) * read_layers(config),
        norm=NormSpec(eps=config.get("rms_norm_eps", float, 1e-5, at_least=0)),
        activation=read_activation(config, "hidden_act", "silu"),
        tied=config.get("tie_word_embeddings", bool, False),
        names=TensorNames(
            qkv=("model.layers.{i}.self_attn.qkv_proj",),
            gate_up=("model.layers.{i}.mlp.gate_up_proj",),
        ),
    )
