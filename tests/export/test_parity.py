"""Exported graphs against transformers on the CPU in float32."""

from __future__ import annotations

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

VARIANTS: dict[str, dict[str, Any]] = {
    "llama-2": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "llama-3": {"rope_theta": 5e5},
    "llama-3.1": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama-3.2, tied": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "tinyllama": {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 128},
    "smollm2": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144},
    "one kv head": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, padded heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "head size 8, tied": {"head_dim": 8, "tie_word_embeddings": True},
    "head size 80": {"head_dim": 80, "num_attention_heads": 2, "num_key_value_heads": 1},
    "odd widths": {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 4},
    "one layer": {"num_hidden_layers": 1},
}

PROMPT = np.random.default_rng(1).integers(2, 400, 50)


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


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_transformers(
    variant: str, make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_llama(tmp_path / "checkpoint", **VARIANTS[variant])
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize="fp32")
    decoder = open_decoder(tmp_path / "bundle")
    expected = reference(model, PROMPT)
    for chunk in (len(PROMPT), 7, 1):
        assert relative_error(feed(decoder, PROMPT, chunk), expected) < 1e-4

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


# Heads of 16 and more are not padded by zeros, so blocks lie as in the checkpoint.
@pytest.mark.parametrize("variant", ["tinyllama", "smollm2", "head size 80"])
@pytest.mark.parametrize(("quantize", "block"), [("int8", 32), ("int4", 32), ("int4", 128)])
def test_quantized_graph_computes_with_the_dequantized_weights(
    variant: str, quantize: str, block: int, make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """Rounding the weights alone explains the graph's logits, but for int8 activations."""
    from edge_llm_export.quantize.rtn import dequantize_blocks, quantize_rows

    model = make_llama(tmp_path / "checkpoint", **VARIANTS[variant])
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize=quantize, block=block)
    bits = {"int8": 8, "int4": 4}[quantize]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                weights = parameter.numpy()
                integers, scales = quantize_rows(weights, bits=bits, block=block)
                rounded = dequantize_blocks(integers, scales, bits=bits, columns=weights.shape[1])
                assert np.abs(rounded - weights).max() > 0, name
                parameter.copy_(torch.from_numpy(rounded))
    expected = reference(model, PROMPT)
    got = feed(open_decoder(tmp_path / "bundle"), PROMPT, len(PROMPT))
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
    assert relative_error(got, expected) < 1e-4
