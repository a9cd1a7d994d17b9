from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm_export.checkpoint.weights import Weights
from tests.conftest import MakeCheckpoint

gguf = pytest.importorskip("gguf")
gguf_file = pytest.importorskip("benchmarks.engines.gguf_file")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama 3": {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama, linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2": {"model_type": "qwen2"},
}


def turned(vector: NDArray[np.float32], angles: NDArray[np.float32]) -> NDArray[np.float32]:
    """A head turned as transformers does it: entry i with entry i + half."""
    first, second = np.split(vector, 2)
    cosines, sines = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines])


def test_turning_neighbours_of_interleaved_rows_is_turning_halves() -> None:
    rng = np.random.default_rng(0)
    heads, size, width = 3, 8, 5
    rows = rng.normal(size=(heads * size, width)).astype(np.float32)
    x = rng.normal(size=width).astype(np.float32)
    angles = rng.normal(size=size // 2).astype(np.float32)
    pairs = (gguf_file.interleave_pairs(rows, heads) @ x).reshape(heads, size // 2, 2)
    turn = np.exp(1j * angles)
    neighbours = ((pairs[..., 0] + 1j * pairs[..., 1]) * turn).astype(np.complex64)
    halves = np.stack([turned(head, angles) for head in (rows @ x).reshape(heads, size)])
    expected = halves[:, : size // 2] + 1j * halves[:, size // 2 :]
    np.testing.assert_allclose(neighbours, expected, rtol=1e-5, atol=1e-6)


def test_the_file_holds_every_weight_in_float32(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, "llama", attention_bias=True)
    gguf_file.write_gguf(tmp_path, tmp_path / "model.gguf")
    written = {
        tensor.name: np.array(tensor.data)
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    with Weights.open(tmp_path) as weights:
        assert len(written) == len(weights.names)
        for name, kept in (
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("model.layers.2.self_attn.v_proj.weight", "blk.2.attn_v.weight"),
            ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ):
            np.testing.assert_array_equal(written[kept], weights.read(name))
        queries = weights.read("model.layers.0.self_attn.q_proj.bias")
        np.testing.assert_array_equal(
            written["blk.0.attn_q.bias"], gguf_file.interleave_pairs(queries, 8)
        )


def test_refuses_what_llama_cpp_would_compute_otherwise(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ValueError, match="one of llama, qwen2, got 'gpt2'"):
        gguf_file.write_gguf(tmp_path / "gpt2", tmp_path / "gpt2.gguf")
    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    make_checkpoint(tmp_path / "qwen2", "qwen2", **sliding)
    with pytest.raises(ValueError, match="sees all tokens"):
        gguf_file.write_gguf(tmp_path / "qwen2", tmp_path / "qwen2.gguf")


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_transformers_does(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, variant: str
) -> None:
    pytest.importorskip("llama_cpp")
    from benchmarks.engines.huggingface import TransformersEngine
    from benchmarks.engines.llama_cpp import LlamaCppEngine

    make_checkpoint(tmp_path, **VARIANTS[variant])
    gguf_file.write_gguf(tmp_path, tmp_path / "model.gguf")
    tokens = np.random.default_rng(1).integers(400, size=100).tolist()
    with TransformersEngine(tmp_path, context=128, threads=1) as reference:
        expected = reference.logits(tokens, last=90)
        answer = reference.answer(tokens, max_tokens=5).tokens
    with LlamaCppEngine(tmp_path / "model.gguf", context=128, threads=1) as engine:
        got = engine.logits(tokens, last=90)
        again = engine.logits(tokens, last=90)
        assert engine.answer(tokens, max_tokens=5).tokens == answer
    assert np.abs(got - expected).max() < 2e-3 * np.ptp(expected)  # its cache is float16
    np.testing.assert_array_equal(got, again)


def test_llama_cpp_quantizes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from benchmarks.engines.llama_cpp import LlamaCppEngine, quantize

    make_checkpoint(tmp_path, "llama", intermediate_size=192)
    source, target = tmp_path / "f32.gguf", tmp_path / "q8.gguf"
    gguf_file.write_gguf(tmp_path, source)
    with pytest.raises(ValueError, match=r"such as Q4_K_M, got 'Q4_X'"):
        quantize(source, target, "Q4_X", threads=1)
    with pytest.raises(RuntimeError, match="cannot quantize"):
        quantize(tmp_path / "absent.gguf", target, "Q8_0", threads=1)
    quantize(source, target, "Q8_0", threads=1)
    assert target.stat().st_size < 0.35 * source.stat().st_size
    tokens = list(range(20))
    with LlamaCppEngine(source, context=32, threads=1) as model:
        expected = model.logits(tokens, last=1)
    with LlamaCppEngine(target, context=32, threads=1) as model:
        error = np.abs(model.logits(tokens, last=1) - expected).max() / np.ptp(expected)
    assert 0 < error < 0.05
