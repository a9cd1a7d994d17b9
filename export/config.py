"""config.json, read so that nothing in it is ignored unless it is known to change nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_llm.errors import ArgumentError, CheckpointError, UnsupportedModelError
from edge_llm.huggingface.files import MULTIMODAL, read_json

__all__ = ["ConfigReader", "RopeConfig", "read_config"]

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
# transformers is to load it, training, other heads and tasks, and what read_tokenizer reads.
_LOADING = """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    _flash_attn_2_enabled _from_model_config architectures model_type auto_map
    transformers_version transformers.js_config torch_dtype dtype attn_implementation
    is_llama_config use_bfloat16 tf_legacy_loss torchscript pretraining_tp
    gradient_checkpointing use_cache return_dict use_return_dict output_attentions
    output_hidden_states output_router_logits keys_to_ignore_at_inference num_logits_to_keep
    logits_to_keep is_decoder chunk_size_feed_forward tie_encoder_decoder"""
_TRAINING = """
    initializer_range initializer_factor attention_dropout hidden_dropout residual_dropout
    embedding_dropout activation_dropout dropout hidden_dropout_prob attention_probs_dropout_prob
    attn_pdrop embd_pdrop resid_pdrop classifier_dropout layerdrop neftune_noise_alpha
    router_aux_loss_coef"""
_TASKS = "id2label label2id num_labels problem_type finetuning_task task_specific_params"
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
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "use_mrope": False,
}

_ROPE_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}
_DROP_SCALING = (
    "Where the model card says that it is an option for contexts longer than the trained one, "
    "remove {key} from config.json and export with a max_context of at most the trained one."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, in one dialect.

    Attributes:
        theta: Base of the frequencies.
        kind: "default", "linear" (positions divided by ``factor``) or "llama3" (slow frequencies
            divided by ``factor``, fast ones kept, those between blended).
        factor: How much longer than the trained context the model reaches.
        low_freq_factor: llama3: wavelengths above original_context / this are divided.
        high_freq_factor: llama3: wavelengths below original_context / this are kept.
        original_context: llama3: the context before it was extended, in tokens; else 0.

    Raises:
        ArgumentError: A field is outside its domain.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _ROPE_KEYS:
            raise ArgumentError("kind", f"one of {', '.join(_ROPE_KEYS)}", self.kind)
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise ArgumentError("theta", "a positive number", self.theta)
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ArgumentError("factor", "a number of at least 1", self.factor)
        if self.kind != "llama3":
            return
        if not self.low_freq_factor > 0:
            raise ArgumentError("low_freq_factor", "a positive number", self.low_freq_factor)
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ArgumentError(
                "high_freq_factor",
                f"greater than low_freq_factor ({self.low_freq_factor})",
                self.high_freq_factor,
            )
        if self.original_context < 1:
            raise ArgumentError(
                "original_context", "an integer of at least 1", self.original_context
            )


class ConfigReader:
    """config.json's content, with a tally of the keys that were read.

    A key with the value null counts as absent, as it does in transformers.

    Args:
        config: The content of config.json.

    Raises:
        UnsupportedModelError: The weights are quantized already.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = {name: value for name, value in config.items() if value is not None}
        self._consumed: set[str] = set()
        for name in ("quantization_config", "compression_config"):
            if name in self._config:
                details = self._config[name]
                method = details.get("quant_method") if isinstance(details, dict) else None
                raise UnsupportedModelError(
                    f"config.json: {name} says that the weights are quantized already "
                    f"({method or 'quant_method not given'}).",
                    "Export from the unquantized checkpoint that it was made from.",
                )

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
                f"config.json has no {name}.", "Take the config.json that belongs to the weights."
            )
        return _typed(f"config.json: {name}", self._config[name], kind, at_least)

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
            if _same(value, item):
                return item
        raise UnsupportedModelError(
            f"config.json: {name} is {value!r}, which the graph builder does not know.",
            f"Supported: {', '.join(sorted(map(repr, allowed)))}.",
        )

    def rope(self, default_theta: float = 10000.0) -> RopeConfig:
        """Rotary embedding, from either dialect.

        transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5
        ``rope_parameters``; a file may hold both where they agree.

        Args:
            default_theta: The family's base where the file names none.

        Raises:
            CheckpointError: A value is missing, of another type or outside its domain.
            UnsupportedModelError: The kind or a key is unknown, or two values conflict.
        """
        theta = self.get("rope_theta", float, default_theta)
        plain = _rope("rope_theta", theta=theta)
        readings = {"rope_theta": plain} if "rope_theta" in self._config else {}
        scaled = {
            name: _read_rope(name, details, theta)
            for name in ("rope_scaling", "rope_parameters")
            if (details := self.get(name, dict, {}))
        }
        readings |= scaled
        if len(set(scaled.values())) > 1 or len({rope.theta for rope in readings.values()}) > 1:
            raise UnsupportedModelError(
                f"config.json: {' and '.join(readings)} contradict each other.",
                "Keep the one that the model was trained with.",
            )
        return next(iter(scaled.values()), plain)

    def finish(self, allowed_unknown: Collection[str] = ()) -> None:
        """Refuse every key that was not read and is not known to change nothing.

        Args:
            allowed_unknown: Keys that the user vouches for.

        Raises:
            UnsupportedModelError: Names each such key.
        """
        unknown = {
            name: value
            for name, value in self._config.items()
            if name not in self._consumed
            and name not in _INERT
            and name not in allowed_unknown
            and not name.startswith(_INERT_PREFIXES)
            and not (name in _NEUTRAL and _same(value, _NEUTRAL[name]))
        }
        if unknown:
            shown = ", ".join(f"{name} = {_shorten(value)}" for name, value in unknown.items())
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


def _read_rope(source: str, details: dict[str, Any], theta: float) -> RopeConfig:
    """One rotary dictionary; ``source`` is its key in config.json."""
    values = {name: value for name, value in details.items() if value is not None}
    kinds = [values.pop(name) for name in ("rope_type", "type") if name in values] or ["default"]
    kind = kinds[0]
    if len(kinds) > 1 and kinds[0] != kinds[1]:
        raise UnsupportedModelError(
            f"config.json: {source} has rope_type {kinds[0]!r} and type {kinds[1]!r}.",
            "Keep the one that the model was trained with.",
        )
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UnsupportedModelError(
            f"config.json: {source} asks for rope_type {kind!r}; supported: "
            f"{', '.join(_ROPE_KEYS)}.",
            _DROP_SCALING.format(key=source),
        )
    if _same(values.get("partial_rotary_factor"), 1.0):
        del values["partial_rotary_factor"]
    unknown = sorted(values.keys() - _ROPE_KEYS[kind] - {"rope_theta"})
    if unknown:
        raise UnsupportedModelError(
            f"config.json: {source} of rope_type {kind!r} has keys that the graph builder does "
            f"not know: {', '.join(f'{name} = {_shorten(values[name])}' for name in unknown)}.",
            "Remove them if they do not change the computation.",
        )
    missing = sorted(_ROPE_KEYS[kind] - values.keys())
    if missing:
        raise CheckpointError(
            f"config.json: {source} of rope_type {kind!r} has no {', '.join(missing)}.",
            "Take the config.json that belongs to the weights.",
        )
    label = f"config.json: {source}."
    context = values.pop("original_max_position_embeddings", 0)
    numbers = {name: _typed(label + name, value, float) for name, value in values.items()}
    return _rope(
        source,
        kind=kind,
        theta=numbers.pop("rope_theta", theta),
        original_context=_typed(label + "original_max_position_embeddings", context, int),
        **numbers,
    )


def _rope(source: str, **fields: Any) -> RopeConfig:
    """A ``RopeConfig`` whose errors name config.json's key."""
    try:
        return RopeConfig(**fields)
    except ArgumentError as error:
        raise CheckpointError(
            f"config.json: {source}: {error.message}",
            "Take the config.json that belongs to the weights.",
        ) from error


def _typed(label: str, value: Any, kind: type[T], at_least: float | None = None) -> T:
    """``value``, if it is of ``kind`` and no smaller than ``at_least``."""
    number: Any = float(value) if kind is float and isinstance(value, int) else value
    # bool is an int to Python but not to JSON, and JSON as Python reads it has NaN and Infinity.
    fits = isinstance(number, kind) and isinstance(value, bool) == (kind is bool)
    if isinstance(number, float):
        fits = fits and math.isfinite(number)
    if not fits or (at_least is not None and number < at_least):
        domain = _DOMAINS[kind] + ("" if at_least is None else f" of at least {at_least:g}")
        raise CheckpointError(
            f"{label} must be {domain}, got {_shorten(value)}.",
            "Take the config.json that belongs to the weights.",
        )
    return number  # type: ignore[no-any-return]


def _same(value: object, other: object) -> bool:
    """Equality that tells false from 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
