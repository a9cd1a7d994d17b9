"""Rotary position embedding, as config.json describes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from edge_llm.errors import ArgumentError, CheckpointError, UnsupportedModelError

from ..config import ConfigReader, same, shorten, typed

__all__ = ["RopeConfig", "read_rope"]

_TRAINED = "original_max_position_embeddings"
_REQUIRED = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _TRAINED}),
    "longrope": frozenset({"short_factor", "long_factor"}),
}
_OPTIONAL = {"longrope": frozenset({"factor", "attention_factor", _TRAINED})}
_FIELDS = {"rope_theta": "theta", "partial_rotary_factor": "fraction"}
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

_DROP_SCALING = (
    "Where the model card says that it is an option for contexts longer than the trained one, "
    "remove {key} from config.json and export with a max_context of at most the trained one."
)
_RIGHT_CONFIG = "Take the config.json that belongs to the weights."
_KEEP_ONE = "Keep the one that the model was trained with."


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, in one dialect.

    Attributes:
        theta: Base of the frequencies.
        fraction: The part of each head that turns: its first ``int(head_dim * fraction)`` entries.
        kind: "default", "linear" (positions divided by ``factor``), "llama3" (slow frequencies
            divided by ``factor``, fast ones kept, those between blended) or "longrope" (every
            frequency divided by a factor of its own).
        factor: How much longer than the trained context the model reaches.
        low_freq_factor: llama3: wavelengths above original_context / this are divided.
        high_freq_factor: llama3: wavelengths below original_context / this are kept.
        original_context: llama3, longrope: the context before it was extended, in tokens; else 0.
        short_factor: longrope: divisors up to the original context, one for each pair that turns.
        long_factor: longrope: divisors beyond it.
        attention_factor: longrope: cosines and sines are multiplied by this.

    Raises:
        ArgumentError: A field is outside its domain.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in _REQUIRED:
            raise ArgumentError("kind", f"one of {', '.join(_REQUIRED)}", self.kind)
        for name in ("theta", "attention_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ArgumentError(name, "a positive number", getattr(self, name))
        if not 0 < self.fraction <= 1:
            raise ArgumentError("fraction", "a number above 0 and at most 1", self.fraction)
        if not 1 <= self.factor < math.inf:
            raise ArgumentError("factor", "a number of at least 1", self.factor)
        if self.kind == "llama3":
            self._check_blend()
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            values = getattr(self, name)
            if not values or not all(0 < value < math.inf for value in values):
                raise ArgumentError(name, "positive numbers", values)
        if self.kind in ("llama3", "longrope") and self.original_context < 2:
            raise ArgumentError(
                "original_context", "an integer of at least 2", self.original_context
            )

    def _check_blend(self) -> None:
        if not self.low_freq_factor > 0:
            raise ArgumentError("low_freq_factor", "a positive number", self.low_freq_factor)
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ArgumentError(
                "high_freq_factor",
                f"greater than low_freq_factor ({self.low_freq_factor})",
                self.high_freq_factor,
            )

    def width(self, head_dim: int) -> int:
        """Entries of a head of ``head_dim`` that turn."""
        return int(head_dim * self.fraction)


def read_rope(
    config: ConfigReader,
    *,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    fraction: float | None = None,
    fraction_key: str = "partial_rotary_factor",
    scaling_key: str = "rope_scaling",
    layer_type: str = "",
    contexts: tuple[int, int] | None = None,
) -> RopeConfig:
    """Rotary embedding, from either dialect.

    transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 ``rope_parameters``;
    a file may hold both where they agree.

    Args:
        config: The file.
        theta: The family's base where the file names none.
        theta_key: Where transformers 4 has the base.
        fraction: The part of a head that turns where the file names none; None in a family that
            knows of no such thing.
        fraction_key: Where transformers 4 has that part.
        scaling_key: Where transformers 4 has the scaling; empty: nowhere.
        layer_type: Which entry of ``rope_parameters`` holds for these layers, in a family where
            that has one for each type.
        contexts: The context and the trained one, in a family that knows longrope.

    Raises:
        CheckpointError: A value is missing, of another type or outside its domain.
        UnsupportedModelError: The kind or a key is unknown, or two values conflict.
    """
    own_theta = config.optional(theta_key, float, None)
    own_fraction = config.optional(fraction_key, float, None) if fraction is not None else None
    plain = _rope(
        theta_key if own_fraction is None else f"{theta_key}, {fraction_key}",
        RopeConfig(),
        theta=theta if own_theta is None else own_theta,
        fraction=(fraction or 1.0) if own_fraction is None else own_fraction,
    )
    dictionaries = {"rope_parameters": _of_layer_type(config, layer_type)}
    if scaling_key:
        dictionaries = {scaling_key: config.get(scaling_key, dict, {})} | dictionaries
    readings = {
        name: _read(name, details, plain, partial=fraction is not None, contexts=contexts)
        for name, details in dictionaries.items()
        if details
    }
    named = {theta_key: own_theta is not None, fraction_key: own_fraction is not None}
    if len(set(readings.values())) > 1 or any(
        (named[theta_key] and rope.theta != plain.theta)
        or (named[fraction_key] and rope.fraction != plain.fraction)
        for rope in readings.values()
    ):
        keys = [name for name, given in named.items() if given] + list(readings)
        raise UnsupportedModelError(
            f"config.json: {' and '.join(keys)} contradict each other.", _KEEP_ONE
        )
    return next(iter(readings.values()), plain)


def _of_layer_type(config: ConfigReader, layer_type: str) -> dict[str, Any]:
    """``rope_parameters``, or that part of it which holds for one type of layers."""
    parameters = config.get("rope_parameters", dict, {})
    if not layer_type or not parameters:
        return parameters
    if parameters.keys() != _LAYER_TYPES:
        raise UnsupportedModelError(
            f"config.json: rope_parameters has the keys {', '.join(sorted(parameters))}; this "
            f"family needs {' and '.join(sorted(_LAYER_TYPES))}.",
            _RIGHT_CONFIG,
        )
    return typed(f"config.json: rope_parameters.{layer_type}", parameters[layer_type], dict)


def _read(
    source: str,
    details: dict[str, Any],
    plain: RopeConfig,
    *,
    partial: bool,
    contexts: tuple[int, int] | None,
) -> RopeConfig:
    """One rotary dictionary; ``source`` is its key in config.json."""
    values = {name: value for name, value in details.items() if value is not None}
    kind = _kind(source, values, longrope=contexts is not None)
    if not partial and same(values.get("partial_rotary_factor"), 1.0):
        del values["partial_rotary_factor"]
    known = _REQUIRED[kind] | _OPTIONAL.get(kind, frozenset()) | {"rope_theta"}
    unknown = sorted(values.keys() - known - ({"partial_rotary_factor"} if partial else set()))
    if unknown:
        raise UnsupportedModelError(
            f"config.json: {source} of rope_type {kind!r} has keys that the graph builder does "
            f"not know: {', '.join(f'{name} = {shorten(values[name])}' for name in unknown)}.",
            "Remove them if they do not change the computation.",
        )
    missing = sorted(_REQUIRED[kind] - values.keys())
    if missing:
        raise CheckpointError(
            f"config.json: {source} of rope_type {kind!r} has no {', '.join(missing)}.",
            _RIGHT_CONFIG,
        )
    label = f"config.json: {source}."
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name == _TRAINED:
            fields["original_context"] = typed(label + name, value, int)
        elif name in ("short_factor", "long_factor"):
            items = typed(label + name, value, list)
            fields[name] = tuple(typed(f"{label}{name}[]", item, float) for item in items)
        else:
            fields[_FIELDS.get(name, name)] = typed(label + name, value, float)
    if kind == "longrope":
        assert contexts is not None
        fields = _longrope(source, fields, *contexts)
    return _rope(source, plain, kind=kind, **fields)


def _kind(source: str, values: dict[str, Any], *, longrope: bool) -> str:
    """Takes the kind out of the values."""
    kinds = [values.pop(name) for name in ("rope_type", "type") if name in values] or ["default"]
    if len(kinds) > 1 and kinds[0] != kinds[1]:
        raise UnsupportedModelError(
            f"config.json: {source} has rope_type {kinds[0]!r} and type {kinds[1]!r}.", _KEEP_ONE
        )
    known = [kind for kind in _REQUIRED if longrope or kind != "longrope"]
    # "su" is what longrope was called before it had a paper.
    kind = "longrope" if longrope and kinds[0] == "su" else kinds[0]
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedModelError(
            f"config.json: {source} asks for rope_type {kind!r}; supported: {', '.join(known)}.",
            _DROP_SCALING.format(key=source),
        )
    return kind


def _longrope(source: str, fields: dict[str, Any], context: int, trained: int) -> dict[str, Any]:
    """Fill in what follows from the two contexts, as transformers' longrope does."""
    trained = fields.setdefault("original_context", trained)
    ratio = context / trained if trained > 0 else 0.0
    if fields.pop("factor", ratio) != ratio:
        raise UnsupportedModelError(
            f"config.json: {source}.factor is not {ratio:g}, which is max_position_embeddings / "
            f"{_TRAINED}.",
            _KEEP_ONE,
        )
    if "attention_factor" not in fields and ratio > 1 and trained > 1:
        fields["attention_factor"] = math.sqrt(1 + math.log(ratio) / math.log(trained))
    return fields


def _rope(source: str, plain: RopeConfig, **fields: Any) -> RopeConfig:
    """``plain`` with other fields; its errors name config.json's key."""
    try:
        return replace(plain, **fields)
    except ArgumentError as error:
        raise CheckpointError(f"config.json: {source}: {error.message}", _RIGHT_CONFIG) from error
