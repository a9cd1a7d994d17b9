"""Default sampling: what generation_config.json says, as far as the runtime has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from edge_llm.errors import CheckpointError

__all__ = ["read_sampling"]

# Generation settings that the runtime does not have, by the value at which each does nothing.
_OFF_AT_NULL = """
    bad_words_ids begin_suppress_tokens constraints dola_layers exponential_decay_length_penalty
    force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id max_time
    sequence_bias stop_strings suppress_tokens watermarking_config"""
_OFF_AT_0 = """
    epsilon_cutoff eta_cutoff no_repeat_ngram_size encoder_no_repeat_ngram_size min_length
    min_new_tokens penalty_alpha token_healing"""
_OFF_AT_1 = "num_beams num_return_sequences typical_p encoder_repetition_penalty guidance_scale"
_UNSUPPORTED: dict[str, int | None] = (
    dict.fromkeys(_OFF_AT_NULL.split(), None)
    | dict.fromkeys(_OFF_AT_0.split(), 0)
    | dict.fromkeys(_OFF_AT_1.split(), 1)
)
_SAMPLERS = ("typical_p", "epsilon_cutoff", "eta_cutoff")  # do nothing where nothing is drawn
_HONOURED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number of at least 0", lambda value: value >= 0),
    "top_k": ("an integer of at least 0", lambda value: value >= 0 and value == int(value)),
    "top_p": ("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("a number above 0", lambda value: value > 0),
}
# Lengths and caches are the caller's, beams are reported by num_beams, speculation changes nothing.
_INERT_GENERATION = """
    _from_model_config _commit_hash transformers_version do_sample bos_token_id eos_token_id
    pad_token_id decoder_start_token_id max_length max_new_tokens use_cache cache_implementation
    cache_config return_legacy_cache prefill_chunk_size output_attentions output_hidden_states
    output_scores output_logits return_dict_in_generate early_stopping length_penalty
    num_beam_groups diversity_penalty is_assistant num_assistant_tokens assistant_early_exit
    num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens
    max_matching_ngram_size assistant_lookbehind target_lookbehind compile_config disable_compile
    low_memory renormalize_logits remove_invalid_values use_model_defaults trust_remote_code
    use_mtp max_cache_len assistant_ensemble_weight speculation_type continuous_batching_config"""
_KNOWN_GENERATION = frozenset(_INERT_GENERATION.split()) | {*_HONOURED, *_UNSUPPORTED}


def read_sampling(
    generation: Mapping[str, Any], *, strict: bool
) -> tuple[dict[str, float | int], tuple[str, ...]]:
    """Default sampling, and the settings left out.

    Args:
        generation: generation_config.json, or config.json in its place.
        strict: Report keys that are not known either.
    """
    draws = generation.get("do_sample")
    if draws is not None and not isinstance(draws, bool):
        raise _bad_setting("do_sample", "true or false", draws)
    # null differs from a missing key: it switches the setting off.
    values = dict.fromkeys(_HONOURED) | {"temperature": 1.0, "top_k": 50}
    values |= {name: generation[name] for name in _HONOURED if name in generation}
    if not draws:
        values = {"temperature": 0, "repetition_penalty": values["repetition_penalty"]}
    sampling = {name: _setting(name, value) for name, value in values.items() if value is not None}
    if not sampling.get("top_k", 1):
        del sampling["top_k"]
    ignored = [
        name
        for name, value in generation.items()
        if (name in _UNSUPPORTED or (strict and name not in _KNOWN_GENERATION))
        and value not in (None, [], {}, _UNSUPPORTED.get(name))
        and (draws or name not in _SAMPLERS)
    ]
    return sampling, tuple(ignored)


def _setting(name: str, value: object) -> float | int:
    domain, fits = _HONOURED[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad_setting(name, domain, value)
    if not math.isfinite(value) or not fits(value):
        raise _bad_setting(name, domain, value)
    return int(value) if name == "top_k" else value


def _bad_setting(name: str, domain: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"generation_config.json: {name} must be {domain}, got {value!r}.",
        "Repair it, or remove the key.",
    )
