"""GPT-NeoX: Pythia, and models trained like it.

Reference: transformers' modeling_gpt_neox.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .reading import read_activation, read_layers, read_sizes
from .rope import read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec, TensorNames

__all__ = ["read_gpt_neox"]

_LAYER = "gpt_neox.layers.{i}"
_NAMES = TensorNames(
    embedding="gpt_neox.embed_in",
    attention_norm=f"{_LAYER}.input_layernorm",
    qkv=(f"{_LAYER}.attention.query_key_value",),
    attention_output=f"{_LAYER}.attention.dense",
    mlp_norm=f"{_LAYER}.post_attention_layernorm",
    gate_up=(f"{_LAYER}.mlp.dense_h_to_4h",),
    down=f"{_LAYER}.mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)


def read_gpt_neox(config: ConfigReader) -> DecoderSpec:
    """Read a ``GPTNeoXConfig``."""
    sizes = read_sizes(config, context=2048, own_head_dim=False)
    rope = read_rope(config, theta_key="rotary_emb_base", fraction=0.25, fraction_key="rotary_pct")
    config.honour("num_key_value_heads", {sizes["heads"]}, sizes["heads"])
    # transformers 4 writes both under two names, and reads those above.
    config.honour("rope_theta", {rope.theta}, rope.theta)
    config.honour("partial_rotary_factor", {rope.fraction}, rope.fraction)
    attention = AttentionSpec(rope=rope)
    eps = config.get("layer_norm_eps", float, 1e-5, at_least=0)
    bias = config.get("attention_bias", bool, True)
    return DecoderSpec(
        architecture="gpt_neox",
        **sizes,
        attention=(attention,) * read_layers(config),
        norm=NormSpec(kind="layer", eps=eps, bias=True),
        activation=read_activation(config, "hidden_act", "gelu"),
        gated=False,
        parallel=config.get("use_parallel_residual", bool, True),
        qkv_by_head=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        tied=config.get("tie_word_embeddings", bool, False),
        names=_NAMES,
    )
