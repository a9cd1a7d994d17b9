"""Rotary tables against transformers', and against the formula in float64."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edge_llm.runtime.session import create_session
from edge_llm_export.architectures.rope import RopeConfig, read_rope
from edge_llm_export.config import ConfigReader
from edge_llm_export.graph.recorder import GraphRecorder
from edge_llm_export.graph.rotary import inverse_frequencies, record_rotary_tables

HEAD_DIMS = (8, 16, 48, 64, 80, 100, 128)
THETAS = (10_000.0, 500_000.0, 1_000_000.0, 12_345.678)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"kind": "default"},
    "linear": {"kind": "linear", "factor": 4.0},
    "linear, odd factor": {"kind": "linear", "factor": 2.7},
    "llama3.1": {"kind": "llama3", "factor": 8.0, **LLAMA3},
    "llama3.2": {"kind": "llama3", "factor": 32.0, **LLAMA3},
    "llama3, short context": {
        "kind": "llama3",
        "factor": 2.5,
        "low_freq_factor": 0.5,
        "high_freq_factor": 7.0,
        "original_context": 64,
    },
}
# Two float32 libraries disagree in the last digits of a power; llama3's blend is the difference
# of two numbers that are nearly equal at its ends, which leaves one digit fewer.
TOLERANCE = {"default": 4e-7, "linear": 4e-7, "llama3": 5e-6}


def rotary_tables(
    rope: RopeConfig, *, head_dim: int, padded: int, context: int
) -> list[NDArray[np.float32]]:
    """What a graph has for tables when it is loaded."""
    graph = GraphRecorder("tables")
    names = record_rotary_tables(
        graph, rope, head_dim=head_dim, padded=padded, context=context, suffix=""
    )
    for name in names:
        graph.output(name, np.float32, [context, padded // 2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tables.onnx"
        onnx.save(graph.model("none", {}, "test"), path)
        tables: list[NDArray[np.float32]] = create_session(path, threads=1, minimum="1.32").run(
            names, {}
        )
    return tables


def scaled(name: str, theta: float) -> RopeConfig:
    return RopeConfig(theta=theta, **SCALINGS[name])


def reference_config(rope: RopeConfig, head_dim: int) -> Any:
    from transformers import LlamaConfig

    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context,
        }
    return LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_theta=rope.theta,
        rope_scaling=scaling,
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for theta in THETAS:
        rope = scaled(name, theta)
        expected, attention_scaling = ROPE_INIT_FUNCTIONS[rope.kind](
            reference_config(rope, head_dim), "cpu"
        )
        assert attention_scaling == 1.0
        ours = inverse_frequencies(rope, head_dim, 100)
        assert ours.dtype == np.float32
        assert ours.shape == (head_dim // 2,)
        np.testing.assert_allclose(ours, expected.numpy(), rtol=TOLERANCE[rope.kind])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_the_formula(name: str, head_dim: int) -> None:
    for theta in THETAS:
        rope = scaled(name, theta)
        expected = []
        for pair in range(head_dim // 2):
            frequency = theta ** (-2 * pair / head_dim)
            if rope.kind == "linear":
                frequency /= rope.factor
            if rope.kind == "llama3":
                turns = rope.original_context * frequency / (2 * np.pi)
                kept = (turns - rope.low_freq_factor) / (
                    rope.high_freq_factor - rope.low_freq_factor
                )
                kept = min(max(kept, 0.0), 1.0)
                frequency *= kept + (1 - kept) / rope.factor
            expected.append(frequency)
        ours = inverse_frequencies(rope, head_dim, 100)
        # The reference rounds its exponents to float32, and ours follow it in that.
        np.testing.assert_allclose(ours, expected, rtol=2 * TOLERANCE[rope.kind])


def test_llama3_keeps_divides_and_blends() -> None:
    rope, plain = scaled("llama3.2", 500_000.0), scaled("default", 500_000.0)
    ratios = inverse_frequencies(plain, 128, 100) / inverse_frequencies(rope, 128, 100)
    assert ratios[0] == 1
    assert ratios[-1] == 32
    assert np.logical_and(ratios > 1.01, ratios < 31.9).any(), "no pair was blended"
    assert (np.diff(ratios) >= 0).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_padded_pairs_do_not_turn(head_dim: int) -> None:
    rope = scaled("default", 10_000.0)
    exact = rotary_tables(rope, head_dim=head_dim, padded=head_dim, context=50)
    padded = rotary_tables(rope, head_dim=head_dim, padded=head_dim + 32, context=50)
    half = head_dim // 2
    for table, wide, still in zip(exact, padded, (1, 0), strict=True):
        assert table.dtype == wide.dtype == np.float32
        assert (table.shape, wide.shape) == ((50, half), (50, half + 16))
        np.testing.assert_array_equal(wide[:, :half], table)
        assert (wide[:, half:] == still).all()


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_the_angles_of_every_position(name: str) -> None:
    rope, context = scaled(name, 10_000.0), 8192
    cosines, sines = rotary_tables(rope, head_dim=64, padded=64, context=context)
    frequencies = inverse_frequencies(rope, 64, context)
    # The angles are float32, as in transformers; their cosines and sines are exact to the last bit.
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies
    assert angles.dtype == np.float32
    np.testing.assert_array_equal(cosines, np.cos(angles.astype(np.float64)).astype(np.float32))
    np.testing.assert_array_equal(sines, np.sin(angles.astype(np.float64)).astype(np.float32))
    assert (cosines[0] == 1).all()
    assert not sines[0].any()


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name: str) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, context = scaled(name, 500_000.0), 1024
    reference = LlamaRotaryEmbedding(reference_config(rope, 64))
    expected = reference(torch.zeros(1), torch.arange(context)[None])
    ours = rotary_tables(rope, head_dim=64, padded=64, context=context)
    # Frequencies that differ in the last bits have turned apart by this much at the end.
    apart = TOLERANCE[rope.kind] * context
    for table, both_halves in zip(ours, expected, strict=True):
        wide = both_halves[0].numpy()
        np.testing.assert_allclose(np.concatenate([table, table], axis=1), wide, atol=apart)


@pytest.mark.parametrize("context", [64, 65])
def test_longrope_is_that_of_transformers(context: int) -> None:
    """One set of factors up to the trained context, another beyond."""
    import torch
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    pairs = 12
    scaling = {
        "type": "longrope",
        "short_factor": [1 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5**i for i in range(pairs)],
    }
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=2,
        partial_rotary_factor=0.75,
        max_position_embeddings=1024,
        original_max_position_embeddings=64,
        rope_scaling=scaling,
    )
    rope = read_rope(
        ConfigReader({"rope_scaling": scaling, "partial_rotary_factor": 0.75}),
        fraction=1.0,
        contexts=(1024, 64),
    )
    expected = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(context)[None])
    ours = rotary_tables(rope, head_dim=32, padded=48, context=context)
    assert ours[0][0, 0] == pytest.approx(np.sqrt(1 + 4 / 6), rel=1e-6)
    for table, both_halves, still in zip(ours, expected, (1, 0), strict=True):
        wide = both_halves[0].numpy()
        np.testing.assert_allclose(table[:, :pairs], wide[:, :pairs], atol=3e-5)
        assert (table[:, pairs:] == still).all()
