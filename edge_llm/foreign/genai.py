"""A folder that onnxruntime-genai runs: genai_config.json beside the graph.

Source of its keys: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from edge_llm.errors import CheckpointError, UnsupportedFormatError
from edge_llm.foreign.external_data import inner_path
from edge_llm.foreign.found import Found, positive
from edge_llm.foreign.state import CacheSizes
from edge_llm.huggingface.files import read_json

__all__ = ["CONFIG", "read_genai"]

CONFIG = "genai_config.json"

T = TypeVar("T", dict[str, Any], str, list[Any])

# Parts of models that are no decoder alone.
_PARTS = ("encoder", "encoder_decoder_init", "embedding", "vision", "speech", "joiner")
# Settings of the search that are no defaults of an answer: lengths, memory, batches.
_NO_DEFAULTS = (
    "batch_size",
    "chunk_size",
    "max_length",
    "min_length",
    "past_present_share_buffer",
    "random_seed",
)
_NAMES = {"past_key_names": "present_key_names", "past_value_names": "present_value_names"}
_FIXED = {
    "inputs": ("input_ids", "attention_mask", "position_ids"),
    "outputs": ("logits",),
}


def read_genai(folder: Path) -> Found:
    """Read genai_config.json.

    Raises:
        CheckpointError: It is broken.
        IntegrityError: It names a graph outside the folder.
        UnsupportedFormatError: It asks for other hardware, or for more than a decoder.
    """
    content = read_json(folder / CONFIG)
    model = _get(content, "", "model", {})
    decoder = _get(model, "model.", "decoder", {})
    search = _get(content, "", "search", {})
    _refuse_parts(model, decoder)
    _refuse_providers(decoder)
    inputs, outputs = (_get(decoder, "model.decoder.", part, {}) for part in ("inputs", "outputs"))
    for part, names in (("inputs", inputs), ("outputs", outputs)):
        for name in _FIXED[part]:
            if names.get(name, name) != name:
                raise UnsupportedFormatError(
                    f"{CONFIG}: model.decoder.{part}.{name} is {names[name]!r}; this runtime knows "
                    f"it as {name!r} only.",
                    "Build the folder again with the usual names.",
                )
    size = _Sizes(decoder, "model.decoder.")
    overall = _Sizes(model, "model.")
    ids = {name: model.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Found(
        kind="onnxruntime-genai folder",
        graph=inner_path(
            _get(decoder, "model.decoder.", "filename", "model.onnx"),
            f"{CONFIG}: model.decoder.filename",
        ),
        config={"model_type": _get(model, "model.", "type", "unknown"), **ids},
        generation=ids | {key: search[key] for key in search if key not in _NO_DEFAULTS},
        names={
            _pattern(inputs, past, f"past_key_values.%d.{kind}"): _pattern(
                outputs, present, f"present.%d.{kind}"
            )
            for (past, present), kind in zip(_NAMES.items(), ("key", "value"), strict=True)
        },
        window=_window(decoder, overall["context_length"]),
        cache=CacheSizes(kv_heads=size["num_key_value_heads"], head_dim=size["head_size"]),
        sizes={
            "layers": size["num_hidden_layers"],
            "hidden": size["hidden_size"],
            "intermediate": None,
            "heads": size["num_attention_heads"],
            "vocab": overall["vocab_size"],
            "context": overall["context_length"],
        },
    )


def _window(decoder: Mapping[str, Any], context: int | None) -> int | None:
    """The sliding window, where it is shorter than the longest text."""
    where = "model.decoder.sliding_window."
    sliding = _get(decoder, "model.decoder.", "sliding_window", {})
    window = positive(CONFIG, where + "window_size", sliding.get("window_size"))
    return window if window is not None and (context is None or window < context) else None


class _Sizes:
    """Sizes in one object of the configuration, by key."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self._content = content
        self._where = where

    def __getitem__(self, key: str) -> int | None:
        return positive(CONFIG, self._where + key, self._content.get(key))


def _refuse_parts(model: Mapping[str, Any], decoder: Mapping[str, Any]) -> None:
    parts = [f"model.{name}" for name in _PARTS if model.get(name)]
    parts += [f"model.decoder.{name}" for name in ("pipeline",) if decoder.get(name)]
    sliding = _get(decoder, "model.decoder.", "sliding_window", {})
    parts += [
        f"model.decoder.sliding_window.{name}"
        for name in ("slide_key_value_cache", "slide_inputs")
        if sliding.get(name)
    ]
    if parts:
        raise UnsupportedFormatError(
            f"{CONFIG} has {', '.join(parts)}; this runtime runs a single decoder graph.",
            "Use a conversion of a text model in one graph.",
        )


def _refuse_providers(decoder: Mapping[str, Any]) -> None:
    options = _get(decoder, "model.decoder.", "session_options", {})
    providers = _get(options, "model.decoder.session_options.", "provider_options", [])
    names = [name for entry in providers if isinstance(entry, dict) for name in entry]
    if others := [name for name in names if name.lower() not in ("cpu", "cpuexecutionprovider")]:
        raise UnsupportedFormatError(
            f"{CONFIG} asks for the execution provider {', '.join(others)}; this runtime is for "
            "CPUs.",
            "Take the folder's version for the CPU, or build one with `-e cpu`.",
        )


def _pattern(names: Mapping[str, Any], key: str, default: str) -> str:
    pattern = names.get(key, default)
    if not isinstance(pattern, str) or pattern.count("%d") != 1:
        raise CheckpointError(
            f"{CONFIG}: {key} must be a string with one %d, got {pattern!r}.",
            "Take the file that belongs to the graph.",
        )
    return pattern


def _get(content: Mapping[str, Any], where: str, key: str, default: T) -> T:
    """A value, if it is of its default's type."""
    value = content.get(key)
    if value is None:
        return default
    if not isinstance(value, type(default)):
        shown = {dict: "an object", str: "a string", list: "a list"}[type(default)]
        raise CheckpointError(
            f"{CONFIG}: {where}{key} must be {shown}, got {type(value).__name__}.",
            "Take the file that belongs to the graph.",
        )
    return value
