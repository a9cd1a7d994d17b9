"""Exported graphs against transformers on the CPU in float32."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from edge_llm import LLM
from edge_llm.bundle import Bundle
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.kv_cache import KVCache
from edge_llm.runtime.layouts import open_decoder as open_graph
from edge_llm.runtime.session import create_session
from edge_llm_export import export_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# One width for each pair that turns, longer than any trained context.
SHORT_LONG = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0, 9.0]}
LONGROPE = {
    "max_position_embeddings": 256,
    "rope_scaling": {"type": "longrope", **SHORT_LONG},
}
GRANITE = {
    "num_attention_heads": 4,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
DENSE = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 100,
    "mamba_n_heads": 8,
}

# Every family, and what its config.json can turn on and off. Windows are shorter than the prompt.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama 2": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "llama 3": {"rope_theta": 5e5},
    "llama 3.1": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama 3.2, tied": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama, linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, tinyllama": {"num_key_value_heads": 2, "hidden_size": 128},
    "llama, smollm2": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144},
    "llama, one kv head": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16},
    "llama, attention bias": {"attention_bias": True},
    "llama, mlp bias": {"mlp_bias": True},
    "llama, biases, padded": {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "llama, head size 8, tied": {"head_dim": 8, "tie_word_embeddings": True},
    "llama, head size 80": {"head_dim": 80, "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama, odd widths": {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 4},
    "llama, one layer": {"num_hidden_layers": 1},
    "mistral 0.1": {"sliding_window": 16, "rms_norm_eps": 1e-5},
    "mistral 0.3": {"sliding_window": None, "rope_theta": 1e6, "head_dim": 16},
    "mistral, window of 1": {"sliding_window": 1},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2, sliding": {
        "hidden_size": 128,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 16, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3, padded heads": {"head_dim": 24, "attention_bias": True, "rms_norm_eps": 0.1},
    "gemma": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 16,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "num_hidden_layers": 4,
    },
    "gemma2, uncapped": {
        "head_dim": 16,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 48,
    },
    "gemma3_text, scaled": {
        "head_dim": 20,
        "num_attention_heads": 4,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 4.0,
    },
    "phi3": {"sliding_window": 15, "num_key_value_heads": 8},
    "phi3, longrope, short": {**LONGROPE, "original_max_position_embeddings": 200},
    "phi3, longrope, long": {**LONGROPE, "original_max_position_embeddings": 32},
    "phi3, partial, tied": {
        "partial_rotary_factor": 0.75,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 6,
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
        },
    },
    "phi3, width 10 of 20": {
        "hidden_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 256,
    },
    "smollm3": {"num_hidden_layers": 4, "rope_theta": 5e6, "num_attention_heads": 4},
    "smollm3, sliding": {
        "no_rope_layers": [0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "granite": {**GRANITE, "tie_word_embeddings": True},
    "granite, untied": {**GRANITE, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.1},
    "granitemoehybrid": {
        **GRANITE,
        **DENSE,
        "layer_types": ["attention"] * 3,
        "position_embedding_type": "rope",
        "tie_word_embeddings": True,
    },
    "granitemoehybrid, nope": {**GRANITE, **DENSE, "layer_types": ["attention"] * 3},
    "olmo2": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 5e5},
    "olmo2, padded": {"head_dim": 12, "attention_bias": True, "rms_norm_eps": 0.1},
    "stablelm 2": {"use_qkv_bias": True, "hidden_size": 128},
    "stablelm zephyr": {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2},
    "stablelm, parallel": {
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "hidden_size": 128,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {"hidden_size": 128, "rotary_pct": 0.25},
    "gpt_neox, sequential": {
        "hidden_size": 160,
        "rotary_pct": 0.3,
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt2, padded": {
        "n_embd": 72,
        "n_layer": 2,
        "n_head": 6,
        "n_inner": 100,
        "n_positions": 100,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
    "gpt2, unscaled": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "scale_attn_weights": False,
        "activation_function": "gelu",
    },
}


def write(make_checkpoint: Callable[..., Any], folder: Path, variant: str) -> Any:
    """A checkpoint of the variant; the first word but its number is the model type."""
    model_type = re.split(r"[ ,]", variant)[0]
    return make_checkpoint(folder, model_type, **VARIANTS[variant])


PROMPT = np.random.default_rng(1).integers(2, 400, 50)
ANSWER = np.random.default_rng(2).integers(2, 400, 32)


def open_decoder(folder: Path, *, context: int = 128) -> Decoder:
    bundle = Bundle.open(folder, verify=True)
    manifest = bundle.manifest
    session = create_session(
        bundle.file(manifest.decoder.graph), threads=1, minimum=manifest.min_onnxruntime
    )
    return open_graph(session, manifest, capacity=context)


def feed(decoder: Decoder, tokens: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
    """Logits of every token, fed from an empty cache in chunks."""
    decoder.cache.truncate(0, 0)
    parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    return np.concatenate([decoder.step(part, scored=len(part)).copy() for part in parts])


def reference(model: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor(tokens[None])).logits[0].numpy()
    return logits


# Measured: below 1e-6. A GELU in place of its approximation by tanh is 5e-5.
def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_transformers(
    variant: str, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """A prompt in one piece and in chunks, and 32 steps of one token behind it."""
    model = write(make_checkpoint, tmp_path / "checkpoint", variant)
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize="fp32", max_context=100)
    decoder = open_decoder(tmp_path / "bundle", context=100)
    tokens = np.concatenate([PROMPT, ANSWER])
    expected = reference(model, tokens)
    for chunk in (len(PROMPT), 7):
        prompt = feed(decoder, PROMPT, chunk)
        steps = [decoder.step([token], scored=1).copy() for token in ANSWER]
        assert relative_error(np.concatenate([prompt, *steps]), expected) < 1e-5


# What an engine makes of it must not depend on the family; these cover the layouts of the stream.
@pytest.mark.parametrize("variant", ["llama 3.1", "mistral 0.1", "gemma3_text", "olmo2", "gpt2"])
def test_greedy_answers_are_those_of_transformers(
    variant: str, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    model = write(make_checkpoint, tmp_path / "checkpoint", variant)
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize="fp32")
    greedy = model.generate(
        torch.tensor(PROMPT[None]),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=[1],  # the ending token, which min_tokens forbids
    )[0, len(PROMPT) :].tolist()
    for chunk_size in (None, 7):
        with LLM(tmp_path / "bundle", prefill_chunk=chunk_size) as llm:
            got = llm.generate(PROMPT.tolist(), max_tokens=64, min_tokens=64, temperature=0)
            assert list(got.tokens) == greedy


@pytest.mark.parametrize("variant", ["llama 3.1", "mistral 0.1", "qwen3", "gpt2"])
def test_rows_of_a_ragged_batch_are_those_alone(
    variant: str, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """Three rows of different length take 3, 1 and 0 new tokens in one right-padded step."""
    model = write(make_checkpoint, tmp_path / "checkpoint", variant)
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize="fp32", max_context=64)
    pasts, news, capacity = [40, 61, 12], [3, 1, 0], 67
    manifest = Bundle.open(tmp_path / "bundle").manifest
    session = create_session(
        tmp_path / "bundle" / "model.onnx", threads=1, minimum=manifest.min_onnxruntime
    )
    state = KVCache(manifest.decoder.state, rows=3, capacity=capacity).buffers

    def step(
        rows: slice, tokens: NDArray[np.int64], new: list[int], pasts: list[int]
    ) -> NDArray[np.float32]:
        lengths = np.array(new) + np.array(pasts)
        feeds = {name: buffer[rows] for name, buffer in state.items()} | {
            "input_ids": tokens,
            "query_lens": np.array(new, np.int32),
            "seqlens_k": (lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(lengths.max(), np.int32),
            "logits_index": np.arange(tokens.size, dtype=np.int64),
        }
        outputs = [one.output for one in manifest.decoder.state]
        logits, *present = session.run(["logits", *outputs], feeds)
        for one, buffer in zip(manifest.decoder.state, present, strict=True):
            state[one.input][rows] = buffer
        by_row: NDArray[np.float32] = logits.reshape(*tokens.shape, -1)
        return by_row

    rng = np.random.default_rng(2)
    texts = [rng.integers(2, 400, past + new) for past, new in zip(pasts, news, strict=True)]
    for row, (text, past) in enumerate(zip(texts, pasts, strict=True)):
        step(slice(row, row + 1), text[None, :past], [past], [0])
    padded = np.full((3, max(news)), 7)
    for row, (text, past) in enumerate(zip(texts, pasts, strict=True)):
        padded[row, : news[row]] = text[past:]
    got = step(slice(0, 3), padded, news, pasts)
    for row in (0, 1):
        expected = reference(model, texts[row])[pasts[row] :]
        assert relative_error(got[row, : news[row]], expected) < 1e-5
    # The idle row stands as it was: its next token sees all of its past.
    alone = step(slice(2, 3), np.array([[5]]), [1], [12])
    assert relative_error(alone[0], reference(model, np.append(texts[2], 5))[-1:]) < 1e-5


# Heads of 16 and more are not padded by zeros, so blocks lie as in the checkpoint.
QUANTIZED = [
    "llama, tinyllama",
    "llama, smollm2",
    "llama, head size 80",
    "mistral 0.3",
    "qwen2, sliding",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3, partial, tied",
    "smollm3",
    "granite",
    "granitemoehybrid",
    "olmo2",
    "stablelm 2",
    "stablelm, parallel",
    "gpt_neox",
    "gpt2",
]


@pytest.mark.parametrize("variant", QUANTIZED)
@pytest.mark.parametrize(("quantize", "block"), [("int8", 32), ("int4", 32), ("int4", 128)])
def test_quantized_graph_computes_with_the_dequantized_weights(
    variant: str, quantize: str, block: int, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """Rounding the weights alone explains the graph's logits, but for int8 activations."""
    from edge_llm_export.quantize.rtn import dequantize_blocks, quantize_rows

    model = write(make_checkpoint, tmp_path / "checkpoint", variant)
    export_model(
        tmp_path / "checkpoint",
        tmp_path / "bundle",
        quantize=quantize,
        block=block,
        max_context=64,
    )
    bits = {"int8": 8, "int4": 4}[quantize]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "wpe" not in name:
                # GPT-2's projections are stored as [columns, rows].
                stored = parameter.T if "c_" in name else parameter
                weights = stored.numpy()
                integers, scales = quantize_rows(weights, bits=bits, block=block)
                rounded = dequantize_blocks(integers, scales, bits=bits, columns=weights.shape[1])
                assert np.abs(rounded - weights).max() > 0, name
                stored.copy_(torch.from_numpy(rounded))
    expected = reference(model, PROMPT)
    got = feed(open_decoder(tmp_path / "bundle", context=64), PROMPT, len(PROMPT))
    # Activations are rounded to int8 per block, a hundredth of the range in these tiny models.
    assert relative_error(got, expected) < 0.03
    assert np.mean(got.argmax(-1) == expected.argmax(-1)) > 0.9


def test_chunks_of_two_and_more_are_bit_identical(tiny_bundle: Path) -> None:
    decoder = open_decoder(tiny_bundle)
    whole = feed(decoder, PROMPT, len(PROMPT))
    assert np.array_equal(feed(decoder, PROMPT, 5), whole)


def test_shards_and_dtypes_give_the_same_bundle(
    make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_llama(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sharded" / name).write_bytes((tmp_path / "single" / name).read_bytes())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    one = export_model(tmp_path / "single", tmp_path / "a", quantize="int4")
    two = export_model(tmp_path / "sharded", tmp_path / "b", quantize="int4")
    assert one.files == two.files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_are_read_exactly(
    dtype: torch.dtype, make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    make_llama(tmp_path / "checkpoint").to(dtype).save_pretrained(tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize="fp32")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    expected = reference(model, PROMPT)
    got = feed(open_decoder(tmp_path / "bundle"), PROMPT, len(PROMPT))
    assert relative_error(got, expected) < 1e-5
