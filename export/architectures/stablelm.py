"""StableLM 3B, StableLM Zephyr 3B, StableLM 2.

Reference: transformers' modeling_stablelm.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .reading import read_activation, read_layers, read_sizes
from .rope import read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec, QKNormSpec, TensorNames

__all__ = ["read_stablelm"]


def read_stablelm(config: ConfigReader) -> DecoderSpec:
    """Read a ``StableLmConfig``."""
    sizes = read_sizes(config, context=4096, kv_heads=32, own_head_dim=False)
    eps = config.get("layer_norm_eps", float, 1e-5, at_least=0)
    attention = AttentionSpec(rope=read_rope(config, fraction=0.25))
    normed = config.get("qk_layernorm", bool, False)
    parallel = config.get("use_parallel_residual", bool, False)
    return DecoderSpec(
        architecture="stablelm",
        **sizes,
        attention=(attention,) * read_layers(config),
        norm=NormSpec(kind="layer", eps=eps, bias=True),
        qk_norm=QKNormSpec(norm=NormSpec(kind="layer", eps=eps), over="each_head")
        if normed
        else None,
        activation=read_activation(config, "hidden_act", "silu"),
        parallel=parallel,
        qkv_bias=config.get("use_qkv_bias", bool, False),
        tied=config.get("tie_word_embeddings", bool, False),
        names=TensorNames(
            query_norm="model.layers.{i}.self_attn.q_layernorm.norms.{h}",
            key_norm="model.layers.{i}.self_attn.k_layernorm.norms.{h}",
            mlp_norm=None if parallel else "model.layers.{i}.post_attention_layernorm",
        ),
    )
