"""A GGUF file in float32 of a Llama or Qwen2 checkpoint.

Names, keys and the order of rows are those of llama.cpp's convert_hf_to_gguf.py. The file has no
vocabulary (``no_vocab``): token ids are fed and read directly.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_llm_export.architectures.registry import read_architecture
from edge_llm_export.architectures.rope import RopeConfig
from edge_llm_export.architectures.spec import DecoderSpec
from edge_llm_export.architectures.tensors import check_tensors
from edge_llm_export.checkpoint.weights import Weights
from edge_llm_export.config import read_config
from edge_llm_export.graph.rotary import inverse_frequencies

__all__ = ["interleave_pairs", "write_gguf"]

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
ROPE_FACTORS = "rope_freqs.weight"


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint's weights, one tensor in memory at a time.

    Raises:
        ValueError: llama.cpp's graph of the family has no place for what config.json asks for.
        CheckpointError: The checkpoint's files are not usable.
        UnsupportedModelError: So is its config.json.
    """
    spec = read_architecture(read_config(checkpoint))
    architecture = ARCHITECTURES.get(spec.architecture)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model_type must be one of {known}, got {spec.architecture!r}")
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    factors = _add_rope(writer, spec)
    _add_sizes(writer, spec)
    names = gguf.get_tensor_name_map(architecture, spec.layers)
    with Weights.open(checkpoint) as weights:
        check_tensors(weights, spec)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name, shape in spec.tensor_shapes().items():
            written = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if written is None:
                raise ValueError(f"GGUF has no name for tensor {name!r}")
            size = 4 * int(np.prod(shape))
            writer.add_tensor_info(written, shape, np.dtype(np.float32), size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name in spec.tensor_shapes():
            writer.write_tensor_data(_in_gguf_order(name, weights.read(name), spec))
    writer.close()


def interleave_pairs(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder each head's rows from halves to neighbours.

    transformers turns entry i together with entry i + head_dim / 2, llama.cpp's "llama" graph
    2i with 2i + 1.

    Args:
        rows: float32 [heads * head_dim, ...], a projection's weight or bias.
        heads: How many heads it holds.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _in_gguf_order(
    name: str, tensor: NDArray[np.float32], spec: DecoderSpec
) -> NDArray[np.float32]:
    if spec.architecture == "llama":
        for projection, heads in (("q_proj", spec.heads), ("k_proj", spec.kv_heads)):
            if f".{projection}." in name:
                return interleave_pairs(tensor, heads)
    return tensor


def _add_sizes(writer: gguf.GGUFWriter, spec: DecoderSpec) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(spec.vocab)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm.eps)
    writer.add_tokenizer_model("no_vocab")


def _add_rope(writer: gguf.GGUFWriter, spec: DecoderSpec) -> NDArray[np.float32] | None:
    """Write the rotary embedding's keys; return its divisors, float32 [head_dim / 2], or None."""
    first = spec.attention[0]
    rope = first.rope
    plain = all(one == first for one in spec.attention) and first.window is None
    if rope is None or not plain or rope.fraction != 1 or spec.activation != "silu":
        raise ValueError("llama.cpp's graph turns whole heads, sees all tokens, and has SiLU")
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.kind == "llama3":
        unscaled = inverse_frequencies(RopeConfig(theta=rope.theta), spec.head_dim, spec.context)
        return unscaled / inverse_frequencies(rope, spec.head_dim, spec.context)
    elif rope.kind != "default":
        raise ValueError(f"rotary scaling must be default, linear or llama3, got {rope.kind!r}")
    return None
