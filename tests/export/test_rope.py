"""Rotary embedding in config.json: both dialects, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import ArgumentError, CheckpointError, UnsupportedModelError
from edge_llm_export.architectures.rope import RopeConfig, read_rope
from edge_llm_export.config import ConfigReader

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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
    assert read_rope(reader) == expected
    reader.finish()


def test_rope_takes_the_familys_theta_only_where_the_file_has_none() -> None:
    assert read_rope(ConfigReader({}), theta=1e6).theta == 1e6
    assert read_rope(ConfigReader({"rope_theta": 1e4}), theta=1e6).theta == 1e4


@given(
    theta=st.floats(1.0, 1e9),
    factor=st.floats(1.0, 1e3),
    low=st.floats(0.1, 4.0),
    context=st.integers(2, 10**6),
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
    old = read_rope(ConfigReader({"rope_theta": theta, "rope_scaling": scaling}))
    new = read_rope(ConfigReader({"rope_parameters": scaling | {"rope_theta": theta}}))
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
        read_rope(ConfigReader(config))


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
        read_rope(ConfigReader(config))


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"kind": "yarn"}, "kind"),
        ({"theta": -1.0}, "theta"),
        ({"factor": 0.0}, "factor"),
        ({"kind": "llama3", "low_freq_factor": 0.0}, "low_freq_factor"),
        ({"kind": "llama3", "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"kind": "llama3"}, "original_context"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"attention_factor": 0.0}, "attention_factor"),
        ({"kind": "longrope", "original_context": 9}, "short_factor"),
        ({"kind": "longrope", "short_factor": (1.0,), "long_factor": (0.0,)}, "long_factor"),
        ({"kind": "longrope", "short_factor": (1.0,), "long_factor": (1.0,)}, "original_context"),
    ],
)
def test_rope_config_checks_itself(fields: dict[str, Any], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        RopeConfig(**fields)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    "config",
    [
        {"partial_rotary_factor": 0.75},
        {"rope_parameters": {"partial_rotary_factor": 0.75}},
        {"partial_rotary_factor": 0.75, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"rope_type": "default"}, "partial_rotary_factor": 0.75},
    ],
)
def test_the_part_that_turns(config: dict[str, Any]) -> None:
    rope = read_rope(ConfigReader(config), fraction=0.25)
    assert (rope.fraction, rope.width(128), rope.width(20)) == (0.75, 96, 15)
    assert read_rope(ConfigReader({}), fraction=0.25).fraction == 0.25
    other = ConfigReader(config)

    def read_in_a_family_without() -> None:
        read_rope(other)
        other.finish()

    with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor = 0\.75"):
        read_in_a_family_without()


def test_two_parts_that_turn_contradict_each_other() -> None:
    config = {"rotary_pct": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}}
    with pytest.raises(UnsupportedModelError, match="rotary_pct and rope_parameters contradict"):
        read_rope(ConfigReader(config), fraction=1.0, fraction_key="rotary_pct")
    with pytest.raises(CheckpointError, match="rotary_pct: fraction must be a number above 0"):
        read_rope(ConfigReader({"rotary_pct": 2}), fraction=1.0, fraction_key="rotary_pct")


FACTORS = {"short_factor": [1, 1.5], "long_factor": [2.0, 8.0]}


@pytest.mark.parametrize(
    ("config", "attention_factor"),
    [
        ({"rope_scaling": {"type": "longrope", **FACTORS}}, math.sqrt(1 + 5 / 12)),
        ({"rope_scaling": {"type": "su", **FACTORS}}, math.sqrt(1 + 5 / 12)),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "type": "longrope",
                    "factor": 32.0,
                    "original_max_position_embeddings": 4096,
                    **FACTORS,
                }
            },
            math.sqrt(1 + 5 / 12),
        ),
        ({"rope_scaling": {"type": "longrope", "attention_factor": 1.25, **FACTORS}}, 1.25),
    ],
)
def test_longrope(config: dict[str, Any], attention_factor: float) -> None:
    reader = ConfigReader(config)
    rope = read_rope(reader, contexts=(131_072, 4096))
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert rope == RopeConfig(
        kind="longrope",
        short_factor=(1.0, 1.5),
        long_factor=(2.0, 8.0),
        original_context=4096,
        attention_factor=rope.attention_factor,
    )
    reader.finish()


def test_longrope_that_reaches_no_further_is_not_scaled() -> None:
    reader = ConfigReader({"rope_scaling": {"type": "longrope", **FACTORS}})
    assert read_rope(reader, contexts=(4096, 4096)).attention_factor == 1


@pytest.mark.parametrize(
    ("details", "error", "message"),
    [
        ({"factor": 2.0}, UnsupportedModelError, "factor is not 32, which is max_position"),
        ({"short_mscale": 1.0}, UnsupportedModelError, r"short_mscale = 1\.0"),
        ({"long_factor": None}, CheckpointError, "has no long_factor"),
        ({"long_factor": []}, CheckpointError, "long_factor must be positive numbers"),
        ({"long_factor": [1.0, "2"]}, CheckpointError, r"long_factor\[\] must be a finite number"),
        ({"short_factor": [1.0, -2.0]}, CheckpointError, "short_factor must be positive numbers"),
    ],
)
def test_longrope_that_makes_no_sense(
    details: dict[str, Any], error: type[Exception], message: str
) -> None:
    scaling = {"type": "longrope", **FACTORS} | details
    with pytest.raises(error, match=message):
        read_rope(ConfigReader({"rope_scaling": scaling}), contexts=(131_072, 4096))


NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def test_a_dictionary_for_each_type_of_layer() -> None:
    reader = ConfigReader({"rope_parameters": NESTED})
    everywhere = read_rope(reader, layer_type="full_attention")
    assert everywhere == RopeConfig(theta=1e6, kind="linear", factor=8.0)
    assert read_rope(reader, theta=1.0, layer_type="sliding_attention") == RopeConfig()
    reader.finish()
    broken: dict[str, Any]
    for broken in ({"full_attention": {}}, {**NESTED, "chunked_attention": {}}):
        with pytest.raises(UnsupportedModelError, match="needs full_attention and sliding_att"):
            read_rope(ConfigReader({"rope_parameters": broken}), layer_type="full_attention")
