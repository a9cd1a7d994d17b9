"""config.json, read so that nothing in it is ignored unless it is known to change nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edge_llm.errors import CheckpointError, UnsupportedModelError
from edge_llm.huggingface.files import MULTIMODAL, read_json

__all__ = ["ConfigReader", "read_config", "same", "shorten", "typed"]

T = TypeVar("T")

_DOMAINS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    list: "a list",
    dict: "an object",
}

# Keys that do not change a decoder's forward pass at inference: where the file comes from and how
# transformers is to load it, training, other heads and tasks, and what read_tokenizer and
# read_packing read.
_LOADING = """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    _flash_attn_2_enabled _from_model_config architectures model_type auto_map
    transformers_version transformers.js_config torch_dtype dtype attn_implementation
    is_llama_config use_bfloat16 tf_legacy_loss torchscript pretraining_tp
    gradient_checkpointing use_cache return_dict use_return_dict output_attentions
    output_hidden_states output_router_logits keys_to_ignore_at_inference num_logits_to_keep
    output_past seq_length max_sequence_length
    logits_to_keep is_decoder chunk_size_feed_forward tie_encoder_decoder cache_implementation
    quantization_config"""
_TRAINING = """
    initializer_range initializer_factor attention_dropout hidden_dropout residual_dropout
    embedding_dropout activation_dropout dropout hidden_dropout_prob attention_probs_dropout_prob
    attn_pdrop embd_pdrop resid_pdrop classifier_dropout layerdrop neftune_noise_alpha
    router_aux_loss_coef"""
_TASKS = """
    id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params
    summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout"""
_TOKENS = """
    tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    cls_token_id mask_token_id decoder_start_token_id model_max_length"""
_GENERATION = """
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty
    encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
    begin_suppress_tokens exponential_decay_length_penalty"""
_INERT = frozenset(" ".join((_LOADING, _TRAINING, _TASKS, _TOKENS, _GENERATION)).split())
_INERT_PREFIXES = ("unsloth_",)

# Keys that change nothing at this one value.
_NEUTRAL: dict[str, object] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "use_mrope": False,
}


class ConfigReader:
    """config.json's content, with a tally of the keys that were read.

    A key with the value null counts as absent, except to :meth:`optional`.

    Args:
        config: The content of config.json, or of one object in it.
        within: Where that object is, such as "quantization_config."; errors name keys with it.
        inert: Keys that change nothing.
    """

    def __init__(
        self, config: Mapping[str, Any], *, within: str = "", inert: Collection[str] = _INERT
    ) -> None:
        self._config = {name: value for name, value in config.items() if value is not None}
        self._nulls = config.keys() - self._config.keys()
        self._consumed: set[str] = set()
        self._within = within
        self._inert = inert

    def require(self, name: str, kind: type[T], *, at_least: float | None = None) -> T:
        """The value of ``name``.

        Args:
            name: The key.
            kind: bool, int, float (integers are taken too), str, list or dict.
            at_least: The smallest number that makes sense.

        Raises:
            CheckpointError: The key is missing, or its value is of another type or too small.
        """
        self._consumed.add(name)
        if name not in self._config:
            raise CheckpointError(
                f"config.json has no {self._within}{name}.",
                "Take the config.json that belongs to the weights.",
            )
        return typed(f"config.json: {self._within}{name}", self._config[name], kind, at_least)

    def get(self, name: str, kind: type[T], default: T, *, at_least: float | None = None) -> T:
        """The value of ``name``, or ``default`` where it is absent or null.

        Raises:
            CheckpointError: The value is of another type or too small.
        """
        self._consumed.add(name)
        if name not in self._config:
            return default
        return self.require(name, kind, at_least=at_least)

    def honour(self, name: str, allowed: Collection[T], default: T) -> T:
        """The value of ``name``, or ``default``, refused unless it is one that is ``allowed``.

        Raises:
            UnsupportedModelError: It is another value.
        """
        self._consumed.add(name)
        value = self._config.get(name, default)
        for item in allowed:
            if same(value, item):
                return item
        raise UnsupportedModelError(
            f"config.json: {self._within}{name} is {value!r}, which the graph builder does not "
            "know.",
            f"Supported: {', '.join(sorted(map(repr, allowed)))}.",
        )

    def optional(
        self, name: str, kind: type[T], default: T | None, *, at_least: float | None = None
    ) -> T | None:
        """The value of ``name``: ``default`` where it is absent, None where it is null.

        For the keys whose family has a default that null switches off, such as Mistral's
        ``sliding_window``.

        Raises:
            CheckpointError: The value is of another type or too small.
        """
        self._consumed.add(name)
        if name in self._nulls:
            return None
        return self.require(name, kind, at_least=at_least) if name in self._config else default

    def skip(self, *names: str) -> None:
        """Mark keys as read that change nothing in this family."""
        self._consumed.update(names)

    def finish(self, allowed_unknown: Collection[str] = ()) -> None:
        """Refuse every key that was not read and is not known to change nothing.

        Args:
            allowed_unknown: Keys that the user vouches for.

        Raises:
            UnsupportedModelError: Names each such key.
        """
        unknown = {
            f"{self._within}{name}": value
            for name, value in self._config.items()
            if name not in self._consumed
            and name not in self._inert
            and f"{self._within}{name}" not in allowed_unknown
            and not name.startswith(_INERT_PREFIXES)
            and not (name in _NEUTRAL and same(value, _NEUTRAL[name]))
        }
        if unknown:
            shown = ", ".join(f"{name} = {shorten(value)}" for name, value in unknown.items())
            flags = " ".join(f"--ignore-config {name}" for name in unknown)
            raise UnsupportedModelError(
                f"config.json asks for what the graph builder does not know: {shown}.",
                f"Pass {flags} if it does not change the computation.",
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``folder``'s config.json.

    Raises:
        CheckpointError: The file is missing or broken.
        UnsupportedModelError: It describes a multimodal model.
    """
    config = read_json(folder / "config.json")
    for name in MULTIMODAL:
        if config.get(name) is not None:
            raise UnsupportedModelError(
                f"config.json: {name} says that this {config.get('model_type')!r} model is "
                "multimodal.",
                "Export a checkpoint of its text model alone.",
            )
    return config


def typed(label: str, value: Any, kind: type[T], at_least: float | None = None) -> T:
    """``value``, if it is of ``kind`` and no smaller than ``at_least``.

    Raises:
        CheckpointError: It is not; ``label`` names it.
    """
    number: Any = float(value) if kind is float and isinstance(value, int) else value
    # bool is an int to Python but not to JSON, and JSON as Python reads it has NaN and Infinity.
    fits = isinstance(number, kind) and isinstance(value, bool) == (kind is bool)
    if isinstance(number, float):
        fits = fits and math.isfinite(number)
    if not fits or (at_least is not None and number < at_least):
        domain = _DOMAINS[kind] + ("" if at_least is None else f" of at least {at_least:g}")
        raise CheckpointError(
            f"{label} must be {domain}, got {shorten(value)}.",
            "Take the config.json that belongs to the weights.",
        )
    return number  # type: ignore[no-any-return]


def same(value: object, other: object) -> bool:
    """Equality that tells false from 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def shorten(value: object) -> str:
    """How an error message shows a value."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
