"""Which families the graph builder knows, by the ``model_type`` of config.json."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from edge_llm.errors import UnsupportedModelError

from ..config import ConfigReader
from .gemma import read_gemma, read_gemma2, read_gemma3
from .gpt2 import read_gpt2
from .gpt_neox import read_gpt_neox
from .granite import read_granite, read_granite_hybrid
from .llama import read_llama
from .mistral import read_mistral
from .olmo2 import read_olmo2
from .phi3 import read_phi3
from .qwen import read_qwen2, read_qwen3
from .rope import RopeConfig
from .smollm3 import read_smollm3
from .spec import DecoderSpec
from .stablelm import read_stablelm

__all__ = ["ARCHITECTURES", "read_architecture"]

ARCHITECTURES: dict[str, Callable[[ConfigReader], DecoderSpec]] = {
    "gemma": read_gemma,
    "gemma2": read_gemma2,
    "gemma3": read_gemma3,
    "gemma3_text": read_gemma3,
    "gpt2": read_gpt2,
    "gpt_neox": read_gpt_neox,
    "granite": read_granite,
    "granitemoehybrid": read_granite_hybrid,
    "llama": read_llama,
    "mistral": read_mistral,
    "olmo2": read_olmo2,
    "phi3": read_phi3,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "smollm3": read_smollm3,
    "stablelm": read_stablelm,
}


def read_architecture(config: dict[str, Any], *, ignore: Collection[str] = ()) -> DecoderSpec:
    """Turn config.json into a spec.

    Args:
        config: The content of config.json.
        ignore: Keys that the user vouches do not change the computation.

    Raises:
        CheckpointError: A key is missing, or its value is of another type or too small.
        UnsupportedModelError: The family, a key or a value is not known.
    """
    reader = ConfigReader(config)
    family = reader.require("model_type", str)
    if family not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model_type {family!r} is not one that the graph builder knows.",
            f"It knows: {', '.join(sorted(ARCHITECTURES))}. Adding one is a page: "
            "`python -m pydoc edge_llm_export.architectures`.",
        )
    spec = ARCHITECTURES[family](reader)
    reader.finish(ignore)
    _check(spec)
    return spec


def _check(spec: DecoderSpec) -> None:
    """Refuse sizes that do not go together, before any weight is read."""
    if spec.heads % spec.kv_heads:
        raise UnsupportedModelError(
            f"config.json: {spec.heads} query heads cannot share {spec.kv_heads} key/value heads.",
            "num_attention_heads must be a multiple of num_key_value_heads.",
        )
    if spec.head_dim < 2 or spec.head_dim % 2:
        raise UnsupportedModelError(
            "config.json: head_dim (or else hidden_size // num_attention_heads) must be even for "
            f"rotary embedding and at least 2, got {spec.head_dim}.",
            _RIGHT_CONFIG,
        )
    for layer in spec.attention:
        if layer.rope is not None:
            _check_rope(layer.rope, spec.head_dim)
    qk_norm = spec.qk_norm
    if qk_norm and qk_norm.norm.kind == "layer" and spec.head_dim != spec.padded_head_dim:
        raise UnsupportedModelError(
            "config.json: a LayerNorm of queries and keys needs heads whose size is a multiple of "
            f"16, got {spec.head_dim}.",
            "Please report the model that has it.",
        )


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    width = rope.width(head_dim)
    if width < 2 or width % 2:
        raise UnsupportedModelError(
            f"config.json: rotary embedding turns {width} entries of a head, {rope.fraction:g} of "
            f"{head_dim}; they must be even in number and at least 2.",
            _RIGHT_CONFIG,
        )
    for name in ("short_factor", "long_factor") if rope.kind == "longrope" else ():
        factors = getattr(rope, name)
        if len(factors) != width // 2:
            raise UnsupportedModelError(
                f"config.json: {name} must have {width // 2} entries, one for each pair of a head "
                f"that turns, got {len(factors)}.",
                _RIGHT_CONFIG,
            )


_RIGHT_CONFIG = "Take the config.json that belongs to the weights."
