"""config.json: nothing in it is ignored unless it is known to change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_llm.errors import CheckpointError, UnsupportedModelError
from edge_llm_export.architectures.registry import read_architecture
from edge_llm_export.config import ConfigReader, read_config


def test_every_key_of_a_llama_config_of_transformers_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    config = json.loads(transformers.LlamaConfig().to_json_string(use_diff=False))
    assert config.keys() > {"pruned_heads", "torchscript", "typical_p", "vocab_size"}
    read_architecture(config)


@pytest.mark.parametrize("model", ["stories260k", "books7m"])
def test_every_key_of_a_real_checkpoint_is_known(shared: Path, model: str) -> None:
    read_architecture(read_config(shared / "models" / model))


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
        ("attention_bias", False),
        ("cache_implementation", "hybrid"),
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


def test_optional_tells_null_from_absent() -> None:
    reader = ConfigReader({"null": None, "three": 3})
    assert reader.optional("null", int, 7) is None
    assert reader.optional("absent", int, 7) == 7
    assert reader.optional("absent", int, None) is None
    assert reader.optional("three", int, 7) == 3
    with pytest.raises(CheckpointError, match="three must be an integer of at least 4"):
        reader.optional("three", int, 7, at_least=4)
    reader.finish()


def test_skipped_keys_are_known() -> None:
    reader = ConfigReader({"odd": 1, "other": 2})
    reader.skip("odd", "other", "absent")
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


def test_read_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "text_config": null}')
    assert read_config(tmp_path) == {"model_type": "llama", "text_config": None}
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "text_config": {}}')
    with pytest.raises(UnsupportedModelError, match=r"text_config .*'gemma3' model is multimodal"):
        read_config(tmp_path)
