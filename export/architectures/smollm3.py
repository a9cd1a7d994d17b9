"""SmolLM3: every fourth layer does without positions.

Reference: transformers' modeling_smollm3.py.
"""

from __future__ import annotations

from edge_llm.errors import CheckpointError

from ..config import ConfigReader
from .reading import read_activation, read_layers, read_sizes, read_windows
from .rope import read_rope
from .spec import AttentionSpec, DecoderSpec, NormSpec

__all__ = ["read_smollm3"]


def read_smollm3(config: ConfigReader) -> DecoderSpec:
    """Read a ``SmolLM3Config``."""
    sizes = read_sizes(config, context=32_768, kv_heads=4)
    rope = read_rope(config, theta=2e6)
    bias = config.get("attention_bias", bool, False)
    turns = _read_turning(config, read_layers(config))
    slides = config.get("use_sliding_window", bool, False)
    window = config.optional("sliding_window", int, None, at_least=1) if slides else None
    config.skip("sliding_window", "max_window_layers")
    windows = read_windows(
        config, len(turns), window, lambda i: window is not None and not turns[i]
    )
    return DecoderSpec(
        architecture="smollm3",
        **sizes,
        attention=tuple(
            AttentionSpec(rope=rope if turn else None, window=one)
            for turn, one in zip(turns, windows, strict=True)
        ),
        norm=NormSpec(eps=config.get("rms_norm_eps", float, 1e-6, at_least=0)),
        activation=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.get("mlp_bias", bool, False),
        tied=config.get("tie_word_embeddings", bool, True),
    )


def _read_turning(config: ConfigReader, layers: int) -> list[bool]:
    """Which layers have positions; ``no_rope_layers`` says 1 for those that do."""
    every = config.get("no_rope_layer_interval", int, 4, at_least=1)
    default = [int((i + 1) % every != 0) for i in range(layers)]
    turns = config.get("no_rope_layers", list, default)
    if len(turns) != layers or any(turn not in (0, 1) for turn in turns):
        raise CheckpointError(
            f"config.json: no_rope_layers must be 0 or 1 for each of {layers} layers, got {turns}.",
            "Take the config.json that belongs to the weights.",
        )
    return [bool(turn) for turn in turns]
