"""What the config.json of several families have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from edge_llm.errors import CheckpointError, UnsupportedModelError

from ..config import ConfigReader
from .spec import Activation

__all__ = ["Sizes", "check_layers", "read_activation", "read_layers", "read_sizes", "read_windows"]

MOST_LAYERS = 1_000

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


class Sizes(TypedDict):
    """Sizes of a decoder, fields of ``DecoderSpec``."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int


def read_sizes(
    config: ConfigReader,
    *,
    context: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    own_head_dim: bool = True,
) -> Sizes:
    """Sizes, by the names that most families have for them.

    Args:
        config: The file.
        context: The family's longest sequence where the file names none.
        kv_heads: Its key/value heads where the file names none; None: as many as query heads.
        head_dim: Its size of a head where the file names none; None: hidden_size over heads.
        own_head_dim: The family reads ``head_dim`` at all.
    """
    hidden = config.require("hidden_size", int, at_least=1)
    heads = config.require("num_attention_heads", int, at_least=1)
    kv = config.optional("num_key_value_heads", int, kv_heads, at_least=1)
    size = config.optional("head_dim", int, head_dim, at_least=2) if own_head_dim else None
    return Sizes(
        hidden=hidden,
        intermediate=config.require("intermediate_size", int, at_least=1),
        heads=heads,
        kv_heads=heads if kv is None else kv,
        head_dim=hidden // heads if size is None else size,
        vocab=config.require("vocab_size", int, at_least=1),
        context=config.get("max_position_embeddings", int, context, at_least=2),
    )


def read_layers(config: ConfigReader, key: str = "num_hidden_layers") -> int:
    """How many blocks there are.

    Raises:
        CheckpointError: There is no number, or one beyond all models.
    """
    return check_layers(key, config.require(key, int, at_least=1))


def check_layers(name: str, layers: int) -> int:
    """Refuse more layers than any model has, for the tensors of each one are to be listed.

    Raises:
        CheckpointError: There are more.
    """
    if layers > MOST_LAYERS:
        raise CheckpointError(
            f"config.json: {name} must be at most {MOST_LAYERS}, got {layers}.",
            "Take the config.json that belongs to the weights.",
        )
    return layers


def read_activation(config: ConfigReader, key: str, default: str) -> Activation:
    """The MLP's activation."""
    return _ACTIVATIONS[config.honour(key, _ACTIVATIONS, default)]


def read_windows(
    config: ConfigReader, layers: int, window: int | None, sliding: Callable[[int], bool]
) -> list[int | None]:
    """The window of each layer, from ``layer_types``.

    Args:
        config: The file.
        layers: Number of blocks.
        window: Tokens that a layer of sliding attention attends to; None: the file names none.
        sliding: Whether a layer slides, where the file does not list their types.

    Raises:
        CheckpointError: The list is of another length.
        UnsupportedModelError: A type is not known, or a layer slides without a window.
    """
    default = ["sliding_attention" if sliding(i) else "full_attention" for i in range(layers)]
    types = config.get("layer_types", list, default)
    if len(types) != layers:
        raise CheckpointError(
            f"config.json: layer_types has {len(types)} entries for {layers} layers.",
            "Take the config.json that belongs to the weights.",
        )
    windows = {"full_attention": None, "sliding_attention": window}
    for kind in types:
        if kind not in windows:
            raise UnsupportedModelError(
                f"config.json: layer_types has {kind!r}, which this family's reader does not know.",
                f"Supported: {', '.join(windows)}.",
            )
        if kind == "sliding_attention" and window is None:
            raise UnsupportedModelError(
                "config.json: layer_types has 'sliding_attention', but sliding_window names no "
                "window, or use_sliding_window is false.",
                "Take the config.json that belongs to the weights.",
            )
    return [windows[kind] for kind in types]
