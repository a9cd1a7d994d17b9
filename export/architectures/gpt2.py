"""GPT-2, DistilGPT-2 and what was trained like them.

Reference: transformers' modeling_gpt2.py.
"""

from __future__ import annotations

from ..config import ConfigReader
from .reading import read_activation, read_layers
from .spec import AttentionSpec, DecoderSpec, NormSpec, TensorNames

__all__ = ["read_gpt2"]

_LAYER = "transformer.h.{i}"
_NAMES = TensorNames(
    embedding="transformer.wte",
    positions="transformer.wpe",
    attention_norm=f"{_LAYER}.ln_1",
    qkv=(f"{_LAYER}.attn.c_attn",),
    attention_output=f"{_LAYER}.attn.c_proj",
    mlp_norm=f"{_LAYER}.ln_2",
    gate_up=(f"{_LAYER}.mlp.c_fc",),
    down=f"{_LAYER}.mlp.c_proj",
    final_norm="transformer.ln_f",
)


def read_gpt2(config: ConfigReader) -> DecoderSpec:
    """Read a ``GPT2Config``."""
    hidden = config.require("n_embd", int, at_least=1)
    heads = config.require("n_head", int, at_least=1)
    layers = read_layers(config, "n_layer")
    # A head of size 0 is refused once all is read.
    scaled = config.get("scale_attn_weights", bool, True)
    scale = (hidden // heads or 1) ** -0.5 if scaled else 1.0
    by_layer = config.get("scale_attn_by_inverse_layer_idx", bool, False)
    config.skip("n_ctx", "reorder_and_upcast_attn")  # float32 is what we compute in
    return DecoderSpec(
        architecture="gpt2",
        hidden=hidden,
        intermediate=config.get("n_inner", int, 4 * hidden, at_least=1),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=config.require("vocab_size", int, at_least=1),
        context=config.get("n_positions", int, 1024, at_least=2),
        attention=tuple(
            AttentionSpec(rope=None, scale=scale / (i + 1 if by_layer else 1))
            for i in range(layers)
        ),
        norm=NormSpec(
            kind="layer", eps=config.get("layer_norm_epsilon", float, 1e-5, at_least=0), bias=True
        ),
        activation=read_activation(config, "activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        transposed=True,
        tied=config.get("tie_word_embeddings", bool, True),
        names=_NAMES,
    )
