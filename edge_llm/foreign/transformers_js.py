"""A folder that transformers.js or optimum runs: config.json, and graphs of several precisions."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from edge_llm.errors import ArgumentError, UnsupportedFormatError
from edge_llm.foreign.found import Found, positive
from edge_llm.huggingface.files import MULTIMODAL, read_json
from edge_llm.runtime.kernels import slow_kernels

__all__ = ["CONFIG", "find_graphs", "preference", "read_transformers_js"]

CONFIG = "config.json"

# Decoding waits for the weights, so fewer bits are faster, as long as a kernel computes with them
# as they are: 4 bits in blocks, then 8. bnb4 is unpacked to float32 at every step, and float16
# arithmetic is emulated on most CPUs.
_EIGHTS = ("int8", "quantized", "uint8")
_OTHERS = ("fp32", "bnb4", "q4f16", "fp16")
_WHOLE = "fp32"
_FOLDERS = ("onnx", "")
_GRAPHS = ("model", "decoder_model_merged")

# What a size is called in config.json, by the families' own words.
_WORDS = {
    "layers": "num_hidden_layers n_layer n_layers num_layers",
    "hidden": "hidden_size n_embd d_model",
    "intermediate": "intermediate_size n_inner ffn_dim ffn_hidden_size",
    "heads": "num_attention_heads n_head n_heads",
    "vocab": "vocab_size",
    "context": "max_position_embeddings n_positions max_seq_len seq_length n_ctx",
}


def preference(
    machine: str = platform.machine(), features: Collection[str] | None = None
) -> tuple[str, ...]:
    """Variants, the fastest on a CPU first.

    Args:
        machine: The processor's kind, as :func:`platform.machine` calls it.
        features: Its instruction sets; by default this one's.
    """
    # Without integer kernels 4 bits are multiplied in float32, and 8 bits are not.
    slow = slow_kernels({(4, 4)}, machine=machine, features=features) is not None
    return (*_EIGHTS, "q4", *_OTHERS) if slow else ("q4", *_EIGHTS, *_OTHERS)


def find_graphs(folder: Path) -> dict[str, str]:
    """Paths inside the folder of the graphs of a decoder, by variant, the best for a CPU first."""
    for inner in _FOLDERS:
        for stem in _GRAPHS:
            names = {}
            for path in sorted((folder / inner).glob(f"{stem}*.onnx")):
                if found := re.fullmatch(rf"{stem}(?:_(.+))?\.onnx", path.name):
                    names[found[1] or _WHOLE] = path.relative_to(folder).as_posix()
            if names:
                known = [name for name in preference() if name in names]
                return {name: names[name] for name in dict.fromkeys([*known, *names])}
    return {}


def read_transformers_js(folder: Path, variant: str | None) -> Found:
    """Read config.json and choose a graph.

    Args:
        folder: The folder.
        variant: The graph's precision by the end of its name ("q4", "fp32"); by default the
            fastest on a CPU.

    Raises:
        ArgumentError: There is no such variant.
        CheckpointError: config.json is broken.
        UnsupportedFormatError: The model is no decoder alone.
    """
    config = read_json(folder / CONFIG)
    graphs = find_graphs(folder)
    variant = variant or next(iter(graphs))
    if variant not in graphs:
        raise ArgumentError(
            "variant", f"one of those in {str(folder)!r} ({', '.join(graphs)})", variant
        )
    _refuse_parts(folder, config)
    return Found(
        kind="transformers.js folder" if graphs[variant].startswith("onnx/") else "optimum folder",
        graph=graphs[variant],
        variant=variant,
        variants=tuple(graphs),
        config=config,
        sizes={size: _size(config, words.split()) for size, words in _WORDS.items()},
    )


def _refuse_parts(folder: Path, config: Mapping[str, Any]) -> None:
    stated = [name for name in MULTIMODAL if config.get(name) is not None]
    stated += [name for name in ("is_encoder_decoder",) if config.get(name)]
    files = [
        path.relative_to(folder).as_posix()
        for inner in _FOLDERS
        for path in sorted((folder / inner).glob("*encoder*.onnx"))
    ]
    if stated or files:
        raise UnsupportedFormatError(
            f"{str(folder)!r} holds more than a decoder of text: {CONFIG} has "
            f"{', '.join(stated) or 'no word of it'}"
            + (f", and there is {', '.join(files[:3])}." if files else "."),
            "Use a conversion of a text model in one graph.",
        )


def _size(config: Mapping[str, Any], words: list[str]) -> int | None:
    for word in words:
        if config.get(word) is not None:
            return positive(CONFIG, word, config[word])
    return None
