"""Seeded random checkpoints with the shapes of real small models, made on the spot.

Speed and memory depend on shapes alone, so a benchmark needs no download: random weights of the
right widths cost what the real ones cost. Each is a Llama-family checkpoint folder with bfloat16
weights and a byte-level tokenizer that fills the vocabulary.

    python benchmarks/shapes.py smollm2-135m FOLDER
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = ["SHAPES", "Shape", "make_checkpoint"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-family model with a tied head."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    theta: float


SHAPES = {
    "tiny": Shape(2, 256, 768, 4, 2, 64, 4096, 1024, 1e4),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152, 8192, 1e5),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, 32768, 1e6),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5),
}


def make_checkpoint(shape: Shape, folder: Path, *, seed: int = 0) -> None:
    """Write config, tokenizer and random weights; what is there already is kept.

    Args:
        shape: Sizes.
        folder: Where to write.
        seed: Of the random weights.
    """
    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2), encoding="utf-8")
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.context}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    _tokenizer(shape.vocab).save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        values *= np.float32(columns**-0.5)
        return values.astype(ml_dtypes.bfloat16)

    ones = np.ones(shape.hidden, ml_dtypes.bfloat16)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": matrix(shape.vocab, shape.hidden)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": ones.copy(),
            f"{layer}.post_attention_layernorm.weight": ones.copy(),
            f"{layer}.self_attn.q_proj.weight": matrix(queries, shape.hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(keys, shape.hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(keys, shape.hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(shape.hidden, queries),
            f"{layer}.mlp.gate_proj.weight": matrix(shape.intermediate, shape.hidden),
            f"{layer}.mlp.up_proj.weight": matrix(shape.intermediate, shape.hidden),
            f"{layer}.mlp.down_proj.weight": matrix(shape.hidden, shape.intermediate),
        }
    tensors["model.norm.weight"] = ones
    temporary = folder / "model.safetensors.partial"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.rename(folder / "model.safetensors")


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _tokenizer(vocab: int) -> Tokenizer:
    """Every byte, then pairs and triples of letters until the vocabulary is full."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = list(alphabet)
    pieces += [a + b for a in letters for b in letters]
    pieces += [a + b + c for a in alphabet for b in letters for c in letters]
    if len(pieces) < vocab:
        raise ValueError(f"vocab must be at most {len(pieces)}, got {vocab}")
    ids = {piece: i for i, piece in enumerate(pieces[:vocab])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main() -> None:
    """Make one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make_checkpoint(SHAPES[arguments.shape], arguments.folder)


if __name__ == "__main__":
    main()
