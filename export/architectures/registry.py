"""Which families the graph builder knows, by the ``model_type`` of config.json."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from edge_llm.errors import UnsupportedModelError

from ..config import ConfigReader
from .llama import read_llama
from .spec import DecoderSpec

__all__ = ["ARCHITECTURES", "read_architecture"]

ARCHITECTURES: dict[str, Callable[[ConfigReader], DecoderSpec]] = {
    "llama": read_llama,
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
            f"It knows: {', '.join(sorted(ARCHITECTURES))}.",
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
            "Take the config.json that belongs to the weights.",
        )
