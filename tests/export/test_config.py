"""config.json: nothing in it is ignored unless it is known to change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import ArgumentError, CheckpointError, UnsupportedModelError
from edge_llm_export.config import ConfigReader, RopeConfig, read_config

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
READ_BY_LLAMA: dict[str, type] = {
    "attention_bias": bool,
    "head_dim": int,
    "hidden_act": str,
    "hidden_size": int,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "mlp_bias": bool,
    "num_attention_heads": int,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
    "vocab_size": int,
}


def consumed(config: dict[str, Any]) -> ConfigReader:
    """A reader that has read what a Llama reader would."""
    reader = ConfigReader(config)
    for name, kind in READ_BY_LLAMA.items():
        reader.get(name, kind, kind())
    reader.rope()
    return reader


def test_every_key_of_a_llama_config_of_transformers_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    config = json.loads(transformers.LlamaConfig().to_json_string(use_diff=False))
    assert config.keys() > {"pruned_heads", "torchscript", "typical_p", "vocab_size"}
    consumed(config).finish()


@pytest.mark.parametrize("model", ["stories260k", "books7m"])
def test_every_key_of_a_real_checkpoint_is_known(shared: Path, model: str) -> None:
    reader = consumed(read_config(shared / "models" / model))
    assert reader.rope() == RopeConfig()
    reader.finish()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 100),
        ("foo", 1),
        ("_sliding_window_pattern", 6),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("rope_interleaved", 0),
    ],
)
def test_unread_keys_are_refused_by_name_with_the_remedy(name: str, value: object) -> None:
    reader = ConfigReader({name: value, "model_type": "llama"})
    with pytest.raises(UnsupportedModelError, match=f"{name} = .*--ignore-config {name} if it"):
        reader.finish()
    reader.finish(allowed_unknown=[name])


def test_all_unread_keys_are_named_at_once() -> None:
    with pytest.raises(UnsupportedModelError, match="foo = 1, bar = '2'"):
        ConfigReader({"foo": 1, "bar": "2"}).finish(["baz"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partial_rotary_factor", 1.0),
        ("partial_rotary_factor", 1),
        ("sliding_window", None),
        ("pruned_heads", {}),
        ("unsloth_version", "2025.1"),
        ("transformers.js_config", {"dtype": "q4"}),
        ("use_cache", False),
        ("eos_token_id", [1, 2]),
        ("quantization_config", None),
    ],
)
def test_what_changes_nothing_passes(name: str, value: object) -> None:
    ConfigReader({name: value}).finish()


def test_require_and_get_read_types() -> None:
    reader = ConfigReader({"i": 3, "f": 1, "b": False, "s": "x", "d": {}, "n": None})
    assert reader.require("i", int) == 3
    eps = reader.require("f", float)
    assert (eps, type(eps)) == (1.0, float)
    assert reader.require("b", bool) is False
    assert reader.get("s", str, "y") == "x"
    assert reader.get("d", dict, {"a": 1}) == {}
    assert reader.get("n", int, 7) == 7
    assert reader.get("absent", float, 0.5) == 0.5
    reader.finish()


@pytest.mark.parametrize(
    ("value", "kind", "domain"),
    [
        (True, int, "an integer"),
        (True, float, "a finite number"),
        (2.0, int, "an integer"),
        ("2", int, "an integer"),
        (1, bool, "true or false"),
        (float("nan"), float, "a finite number"),
        (float("inf"), float, "a finite number"),
        (["a"], str, "a string"),
        ("a", dict, "an object"),
        ({}, list, "a list"),
    ],
)
def test_type_errors_name_key_domain_and_value(value: Any, kind: type, domain: str) -> None:
    reader = ConfigReader({"key": value})
    for arguments in ((), (None,)):
        read: Any = reader.get if arguments else reader.require
        with pytest.raises(CheckpointError) as caught:
            read("key", kind, *arguments)
        assert f"config.json: key must be {domain}, got {value!r}." in caught.value.message


@pytest.mark.parametrize("config", [{}, {"hidden_size": None}])
def test_require_names_a_missing_key(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no hidden_size"):
        ConfigReader(config).require("hidden_size", int)


def test_honour() -> None:
    reader = ConfigReader({"hidden_act": "gelu", "bias": False, "zero": 0, "odd": ["silu"]})
    assert reader.honour("absent", {"silu"}, "silu") == "silu"
    assert reader.honour("bias", {False}, False) is False
    with pytest.raises(UnsupportedModelError, match=r"hidden_act is 'gelu'.*Supported: 'silu'"):
        reader.honour("hidden_act", {"silu"}, "silu")
    with pytest.raises(UnsupportedModelError, match="zero is 0"):
        reader.honour("zero", {False}, False)
    with pytest.raises(UnsupportedModelError, match="odd is"):
        reader.honour("odd", {"silu"}, "silu")
    reader.finish()


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_quantized_checkpoints_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{name} .*\(gptq\).*unquantized checkpoint"):
        ConfigReader({name: {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(UnsupportedModelError, match=name):
        ConfigReader({name: "odd"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, RopeConfig()),
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 500000, "rope_scaling": None}, RopeConfig(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(kind="linear", factor=2.0)),
        (
            {"rope_scaling": {"type": "default", "rope_type": "default"}, "rope_theta": 1e6},
            RopeConfig(theta=1e6),
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            RopeConfig(theta=1e6),
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0, "factor": None}},
            RopeConfig(theta=1e6),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(
                theta=5e5,
                kind="llama3",
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_context=8192,
            ),
        ),
        (
            {
                "rope_theta": 2.0,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2.0},
            },
            RopeConfig(theta=2.0, kind="linear", factor=2.0),
        ),
    ],
)
def test_rope_normalises_both_dialects(config: dict[str, Any], expected: RopeConfig) -> None:
    reader = ConfigReader(config)
    assert reader.rope() == expected
    reader.finish()


def test_rope_takes_the_familys_theta_only_where_the_file_has_none() -> None:
    assert ConfigReader({}).rope(1e6).theta == 1e6
    assert ConfigReader({"rope_theta": 1e4}).rope(1e6).theta == 1e4


@given(
    theta=st.floats(1.0, 1e9),
    factor=st.floats(1.0, 1e3),
    low=st.floats(0.1, 4.0),
    context=st.integers(1, 10**6),
)
def test_the_two_dialects_mean_the_same(
    theta: float, factor: float, low: float, context: int
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + 1,
        "original_max_position_embeddings": context,
    }
    old = ConfigReader({"rope_theta": theta, "rope_scaling": scaling}).rope()
    new = ConfigReader({"rope_parameters": scaling | {"rope_theta": theta}}).rope()
    assert old == new
    assert (old.theta, old.factor, old.original_context) == (theta, factor, context)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*remove rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'; supported: default"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'.*remove rope_parameters"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "asks for rope_type"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "'llama3' and type 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "beta = 1"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, r"factor = 2\.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0\.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "full_attention = ",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta and rope_parameters contradict",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"type": "linear", "factor": 4.0},
            },
            "rope_scaling and rope_parameters contradict",
        ),
    ],
)
def test_rope_refuses_what_it_does_not_know(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ConfigReader(config).rope()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_theta": 0}, "rope_theta: theta must be a positive number, got 0.0"),
        ({"rope_theta": "1e4"}, "rope_theta must be a finite number"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number of at"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor must be a"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "has no high_freq_factor, low_freq"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            r"high_freq_factor must be greater than low_freq_factor \(4\.0\)",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    **LLAMA3,
                    "original_max_position_embeddings": 8192.0,
                }
            },
            "original_max_position_embeddings must be an integer",
        ),
    ],
)
def test_rope_names_values_outside_their_domain(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ConfigReader(config).rope()


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"kind": "yarn"}, "kind"),
        ({"theta": -1.0}, "theta"),
        ({"factor": 0.0}, "factor"),
        ({"kind": "llama3", "low_freq_factor": 0.0}, "low_freq_factor"),
        ({"kind": "llama3", "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"kind": "llama3"}, "original_context"),
    ],
)
def test_rope_config_checks_itself(fields: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        RopeConfig(**fields)
    assert caught.value.argument == argument


def test_read_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "text_config": null}')
    assert read_config(tmp_path) == {"model_type": "llama", "text_config": None}
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "text_config": {}}')
    with pytest.raises(UnsupportedModelError, match=r"text_config .*'gemma3' model is multimodal"):
        read_config(tmp_path)
