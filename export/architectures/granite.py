"""Granite 3, and those of Granite 4 that are dense: attention in every layer, and no experts.

References: transformers' modeling_granite.py and modeling_granitemoehybrid.py.
"""

from __future__ import annotations

from edge_llm.errors import UnsupportedModelError

from ..config import ConfigReader
from .reading import Sizes, read_activation, read_layers, read_sizes
from .rope import RopeConfig, read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec, TensorNames

__all__ = ["read_granite", "read_granite_hybrid"]

_MAMBA = "chunk_size conv_bias d_conv d_head d_state expand n_groups n_heads proj_bias"
_TIME_STEPS = ("time_step_min", "time_step_max", "time_step_limit", "time_step_floor")


def read_granite(config: ConfigReader) -> DecoderSpec:
    """Read a ``GraniteConfig``."""
    return _spec(
        config,
        "granite",
        read_sizes(config, context=2048),
        read_layers(config),
        read_rope(config),
        TensorNames(),
        mlp_bias=config.get("mlp_bias", bool, False),
    )


def read_granite_hybrid(config: ConfigReader) -> DecoderSpec:
    """Read a ``GraniteMoeHybridConfig``.

    Raises:
        UnsupportedModelError: It has layers of Mamba, or experts.
    """
    layers = read_layers(config)
    types = config.get("layer_types", list, ["mamba"] * layers)
    if types != ["attention"] * layers:
        raise UnsupportedModelError(
            "config.json: layer_types must be 'attention' for each of "
            f"{layers} layers; this model has {types.count('mamba')} of 'mamba'.",
            "Export one of the dense models, such as granite-4.0-350m.",
        )
    config.honour("num_local_experts", {0}, 8)
    config.honour("normalization_function", {"rmsnorm"}, "rmsnorm")
    config.skip("num_experts_per_tok", "init_method", *_TIME_STEPS)
    config.skip(*(f"mamba_{name}" for name in _MAMBA.split()))
    sizes = read_sizes(config, context=2048, own_head_dim=False)
    # Without experts the shared MLP is the only one.
    sizes["intermediate"] = config.get("shared_intermediate_size", int, 1024, at_least=1)
    turns = config.honour("position_embedding_type", {"rope", "nope", None}, None) == "rope"
    rope = read_rope(config)
    return _spec(
        config,
        "granitemoehybrid",
        sizes,
        layers,
        rope if turns else None,
        TensorNames(
            gate_up=("model.layers.{i}.shared_mlp.input_linear",),
            down="model.layers.{i}.shared_mlp.output_linear",
        ),
    )


def _spec(
    config: ConfigReader,
    architecture: str,
    sizes: Sizes,
    layers: int,
    rope: RopeConfig | None,
    names: TensorNames,
    *,
    mlp_bias: bool = False,
) -> DecoderSpec:
    """What both have in common: multipliers.

    A block adds ``m * f(norm(x))`` to the stream x. For the stream x / m that is ``f(norm(x))``,
    and a norm of x / m is the norm of x where its epsilon is divided by m squared; so the residual
    multiplier costs nothing but another scale of the embedding.
    """

    def multiplier(name: str) -> float:
        return config.get(name, float, 1.0, at_least=1e-6)

    residual = multiplier("residual_multiplier")
    bias = config.get("attention_bias", bool, False)
    attention = AttentionSpec(rope=rope, scale=multiplier("attention_multiplier"))
    eps = config.get("rms_norm_eps", float, 1e-6, at_least=0)
    return DecoderSpec(
        architecture=architecture,
        **sizes,
        attention=(attention,) * layers,
        norm=NormSpec(eps=eps / residual**2),
        activation=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
        tied=config.get("tie_word_embeddings", bool, False),
        embedding_scale=multiplier("embedding_multiplier") / residual,
        logits_scale=1 / multiplier("logits_scaling"),
        names=names,
    )
