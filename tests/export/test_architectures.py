"""What config.json may say: of sizes that make no model, and in the files of published models."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest

from edge_llm.errors import CheckpointError, EdgeLLMError, UnsupportedModelError
from edge_llm_export import architectures
from edge_llm_export.architectures.olmo2 import read_olmo2
from edge_llm_export.architectures.registry import ARCHITECTURES, read_architecture
from edge_llm_export.architectures.spec import DecoderSpec

# The config.json of published checkpoints, save longrope's lists, whose numbers are made up.
PUBLISHED: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "configs").glob("*.json"))
}
# Parameters of each, in millions, as its authors count them (a tied head once).
MILLIONS = {
    "distilgpt2": 82,
    "gemma-2-2b-it": 2614,
    "gemma-2b-it": 2506,
    "gemma-3-1b-it": 1000,
    "gemma-3-270m-it": 268,
    "gpt2": 124,
    "granite-3.3-2b-instruct": 2534,
    "granite-4.0-1b": 1632,
    "granite-4.0-350m": 352,
    "llama-3.2-1b-instruct": 1236,
    "mistral-7b-v0.1": 7242,
    "mistral-7b-v0.3": 7248,
    "olmo-2-0425-1b": 1485,
    "phi-3-mini-128k-instruct": 3821,
    "phi-3-mini-4k-instruct": 3821,
    "phi-4-mini-instruct": 3836,
    "pythia-160m": 162,
    "pythia-70m": 70,
    "qwen2.5-0.5b-instruct": 494,
    "qwen3-0.6b": 596,
    "smollm3-3b": 3075,
    "stablelm-2-1_6b": 1645,
    "stablelm-zephyr-3b": 2795,
}

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


def windows(spec: DecoderSpec) -> list[int | None]:
    return [layer.window for layer in spec.attention]


def test_defaults_of_a_llama() -> None:
    spec = read_architecture(LLAMA)
    assert (spec.kv_heads, spec.head_dim, spec.context, spec.norm.eps) == (8, 8, 2048, 1e-6)
    assert {spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.tied} == {False}
    assert windows(spec) == [None] * 3


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
    assert read_architecture(LLAMA | {"rms_norm_eps": 0}).norm.eps == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3 key/value heads"),
        ({"head_dim": 7}, "head_dim .*must be even .*got 7"),
        ({"num_attention_heads": 128}, "hidden_size // num_attention_heads.*at least 2, got 0"),
        ({"model_type": "unheard_of"}, "model_type 'unheard_of' is not one.*It knows: .*llama"),
        ({"model_type": "unheard_of"}, r"Adding one .*pydoc edge_llm_export\.architectures`"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_architecture(LLAMA | changes)


def test_every_family_has_a_published_config() -> None:
    # "gemma3" is what some call a text model's file that "gemma3_text" is meant in.
    assert {config["model_type"] for config in PUBLISHED.values()} == ARCHITECTURES.keys() - {
        "gemma3"
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    spec = read_architecture(PUBLISHED[name])
    parameters = sum(map(math.prod, spec.tensor_shapes().values()))
    assert round(parameters / 1e6) == MILLIONS[name]
    assert spec.architecture == PUBLISHED[name]["model_type"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_those_of_transformers(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**PUBLISHED[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert read_architecture(PUBLISHED[name]).tensor_shapes() == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_absent_and_null_mean_what_they_mean_to_transformers(name: str) -> None:
    """Each key in turn is taken out or set to null, and transformers fills in its defaults."""
    from transformers import AutoConfig

    published = PUBLISHED[name]
    compared = 0
    for key in published.keys() - {"model_type"}:
        for config in (
            {other: value for other, value in published.items() if other != key},
            published | {key: None},
        ):
            try:
                got = read_architecture(config)
            except EdgeLLMError:
                continue  # refused, and so not misread
            try:
                filled = AutoConfig.for_model(**config).to_dict()
            except TypeError:
                continue  # a null that has no meaning to transformers either
            assert got == read_architecture(filled), key
            compared += 1
    assert compared > len(published)


def test_keys_of_other_families_are_refused() -> None:
    odd = {"alibi": True, "use_parallel_residual": True, "residual_multiplier": 0.5, "n_ctx": 5}
    with pytest.raises(
        UnsupportedModelError, match=r"--ignore-config alibi .*--ignore-config n_ctx"
    ):
        read_architecture(PUBLISHED["mistral-7b-v0.1"] | odd)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma-3-270m-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-3-270m-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma-3-270m-it", {"layer_types": ["chunked_attention"] * 18}, "'chunked_attention'"),
        ("gemma-3-270m-it", {"sliding_window": None}, "sliding_window names no window"),
        ("gemma-2-2b-it", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("qwen2.5-0.5b-instruct", {"use_mrope": True}, "use_mrope = True"),
        ("qwen3-0.6b", {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window is false"),
        ("phi-4-mini-instruct", {"full_attn_mod": 2}, "full_attn_mod is 2"),
        ("phi-4-mini-instruct", {"lm_head_bias": True}, "lm_head_bias is True"),
        ("phi-4-mini-instruct", {"attention_bias": True}, "attention_bias = True"),
        ("phi-4-mini-instruct", {"partial_rotary_factor": 0.5}, "short_factor must have 32"),
        ("phi-3-mini-4k-instruct", {"partial_rotary_factor": 0.01}, "turns 0 entries .*even"),
        ("phi-3-mini-4k-instruct", {"partial_rotary_factor": 0.1}, "turns 9 entries .*even"),
        ("granite-4.0-350m", {"layer_types": ["mamba"] * 28}, "has 28 of 'mamba'"),
        ("granite-4.0-350m", {"num_local_experts": 32}, "num_local_experts is 32"),
        ("granite-4.0-350m", {"normalization_function": "layernorm"}, "normalization_function"),
        ("granite-4.0-350m", {"position_embedding_type": "alibi"}, "is 'alibi'"),
        ("stablelm-zephyr-3b", {"qk_layernorm": True, "hidden_size": 2816}, "of 16, got 88"),
        ("pythia-70m", {"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ("pythia-70m", {"rope_theta": 5e5}, "rope_theta is 500000.0"),
        ("pythia-70m", {"partial_rotary_factor": 1.0}, "partial_rotary_factor is 1.0"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ],
)
def test_what_a_family_cannot_honour_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_architecture(PUBLISHED[name] | changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma-3-270m-it", {"layer_types": ["full_attention"]}, "has 1 entries for 18 layers"),
        ("smollm3-3b", {"no_rope_layers": [1, 2] * 18}, "no_rope_layers must be 0 or 1"),
        ("granite-3.3-2b-instruct", {"residual_multiplier": 0}, "residual_multiplier must be"),
        ("mistral-7b-v0.1", {"sliding_window": 0}, "sliding_window must be .*at least 1, got 0"),
        ("gpt2", {"n_layer": None}, "has no n_layer"),
    ],
)
def test_values_that_make_no_model_are_named(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_architecture(PUBLISHED[name] | changes)


def test_windows() -> None:
    def of(name: str, **changes: Any) -> list[int | None]:
        return windows(read_architecture(PUBLISHED[name] | changes))

    assert of("mistral-7b-v0.1") == [4096] * 32
    assert of("mistral-7b-v0.3") == [None] * 32
    assert of("qwen2.5-0.5b-instruct") == [None] * 24
    slides = {"use_sliding_window": True, "sliding_window": 1024}
    assert of("qwen2.5-0.5b-instruct", **slides) == [None] * 21 + [1024] * 3
    assert of("gemma-2-2b-it") == [4096, None] * 13
    assert of("gemma-3-1b-it") == ([512] * 5 + [None]) * 4 + [512] * 2
    assert of("gemma-3-270m-it") == ([512] * 5 + [None]) * 3
    assert of("phi-3-mini-4k-instruct") == [2047] * 32
    assert of("smollm3-3b", **slides) == [None] * 36, "layer_types has none that slides"
    assert of("smollm3-3b", layer_types=None, **slides) == [None, None, None, 1024] * 9


def test_windows_that_hold_the_whole_context_are_none() -> None:
    spec = read_architecture(PUBLISHED["gemma-3-1b-it"])
    assert set(windows(spec.within(512))) == {None}
    assert windows(spec.within(513)) == windows(spec)


def test_rotary_embedding_by_layer() -> None:
    gemma = read_architecture(PUBLISHED["gemma-3-1b-it"]).attention
    assert {(layer.window, layer.rope.theta) for layer in gemma if layer.rope} == {
        (512, 1e4),
        (None, 1e6),
    }
    smollm = read_architecture(PUBLISHED["smollm3-3b"]).attention
    assert [layer.rope is None for layer in smollm] == [False, False, False, True] * 9


def test_the_rope_dictionaries_of_transformers_5() -> None:
    def moved(name: str, parameters: dict[str, Any], *gone: str) -> DecoderSpec:
        config = {key: value for key, value in PUBLISHED[name].items() if key not in gone}
        return read_architecture(config | {"rope_parameters": parameters})

    old = {name: read_architecture(config) for name, config in PUBLISHED.items()}
    plain = {"rope_theta": 1e6, "rope_type": "default"}
    assert moved("qwen3-0.6b", plain, "rope_theta", "rope_scaling") == old["qwen3-0.6b"]
    by_type = {
        "full_attention": plain,
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    gone = ("rope_theta", "rope_local_base_freq", "rope_scaling")
    assert moved("gemma-3-270m-it", by_type, *gone) == old["gemma-3-270m-it"]
    partial = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}
    assert moved("pythia-70m", partial, "rotary_pct", "rotary_emb_base") == old["pythia-70m"]
    scaling = PUBLISHED["phi-4-mini-instruct"]["rope_scaling"]
    longrope = {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "rope_type": "longrope",
    }
    gone = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    assert moved("phi-4-mini-instruct", scaling | longrope, *gone) == old["phi-4-mini-instruct"]


def test_names_of_a_checkpoint_that_was_saved_without_its_head() -> None:
    spec = read_architecture(PUBLISHED["gpt2"])
    tensors = spec.tensor_shapes()
    assert spec.as_stored(tensors) is spec
    bare = {name.removeprefix("transformer.") for name in tensors}
    assert spec.as_stored(bare).tensor_shapes().keys() == bare
    assert spec.as_stored({"odd"}) is spec, "the missing tensor is named as the family has it"


def test_the_page_on_adding_a_family_shows_the_file_as_it_is() -> None:
    page = textwrap.dedent(architectures.__doc__ or "")
    shown = page[page.index("        def read_olmo2") : page.index("   Its defaults are")]
    source = inspect.getsource(read_olmo2).replace('    """Read an ``Olmo2Config``."""\n', "")
    assert source.strip() == textwrap.dedent(shown).strip()


def test_longrope_is_exported_for_what_its_short_factors_reach_by_default() -> None:
    long = read_architecture(PUBLISHED["phi-3-mini-128k-instruct"])
    assert (long.context, long.default_context) == (131072, 4096)
    plain = read_architecture(PUBLISHED["llama-3.2-1b-instruct"])
    assert plain.default_context == plain.context
