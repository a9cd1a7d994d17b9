"""What config.json may say of a family's sizes."""

from __future__ import annotations

from typing import Any

import pytest

from edge_llm.errors import CheckpointError, UnsupportedModelError
from edge_llm_export.architectures.registry import read_architecture

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 400,
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def test_defaults_are_those_of_transformers() -> None:
    spec = read_architecture(LLAMA)
    assert (spec.kv_heads, spec.head_dim, spec.context, spec.norm_eps) == (8, 8, 2048, 1e-6)
    assert {spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.tied} == {False}


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_their_least_are_named(name: str, value: int) -> None:
    message = rf"config\.json: {name} must be an integer of at least [12], got {value}\."
    with pytest.raises(CheckpointError, match=message):
        read_architecture(LLAMA | {name: value})


def test_the_norms_epsilon_is_not_negative() -> None:
    message = r"config\.json: rms_norm_eps must be a finite number of at least 0, got -1\."
    with pytest.raises(CheckpointError, match=message):
        read_architecture(LLAMA | {"rms_norm_eps": -1})
    assert read_architecture(LLAMA | {"rms_norm_eps": 0}).norm_eps == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3 key/value heads"),
        ({"head_dim": 7}, "head_dim .*must be even .*got 7"),
        ({"num_attention_heads": 128}, "hidden_size // num_attention_heads.*at least 2, got 0"),
        ({"model_type": "unheard_of"}, "model_type 'unheard_of' is not one.*It knows: .*llama"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_architecture(LLAMA | changes)
