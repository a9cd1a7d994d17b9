"""JSON into frozen dataclasses, strictly: a missing, unknown or mistyped key is named."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from edge_llm.errors import ManifestError

__all__ = ["cut", "decode", "load"]

T = TypeVar("T")

_EXPORT_AGAIN = "Export the bundle again."


def load(text: str) -> object:
    """The content of JSON text.

    Raises:
        ValueError: It is no JSON, has a key twice, or a number beyond all bounds.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)


def cut(text: str) -> str:
    """How a message shows what may be of any length."""
    return text if len(text) <= 200 else f"{text[:200]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ in which of two equal keys they take, so none is taken."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return content


def _finite(text: str) -> float:
    """A JSON number; Python would also take NaN, Infinity and 1e999, which are none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def decode(kind: type[T], data: object, where: str) -> T:
    """Build a dataclass from JSON.

    Args:
        kind: The dataclass; its fields' types say what each key holds.
        data: JSON's content.
        where: The key under which it stands; empty at the top.

    Raises:
        ManifestError: A key is missing, unknown or of the wrong type.
    """
    if not isinstance(data, dict):
        raise ManifestError(f"{where} must be an object, got {cut(repr(data))}.", _EXPORT_AGAIN)
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ManifestError(
                f"{prefix}{cut(key)} is a key that this format does not have.",
                "Upgrade edge-llm, or move the key into info.",
            )
    values = {}
    for key, spec in fields.items():
        if key in data:
            values[key] = _value(hints[key], data[key], f"{prefix}{key}")
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            raise ManifestError(f"{prefix}{key} is missing.", _EXPORT_AGAIN)
    return kind(**values)


def _value(hint: Any, value: object, where: str) -> Any:
    """Check one JSON value against a type hint and turn it into the field's own type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast("type[Any]", hint), value, where)
    if origin is types.UnionType:
        fits = [one for one in arguments if _plain(one, value)]
        if fits:
            return value
    elif origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    elif origin is Mapping and isinstance(value, dict):
        return {key: _value(arguments[1], one, f"{where}.{key}") for key, one in value.items()}
    elif origin is None and _plain(hint, value):
        return value
    shown = {tuple: "a list", Mapping: "an object"}.get(origin) or getattr(
        hint, "__name__", str(hint)
    )
    raise ManifestError(f"{where} must be {shown}, got {cut(repr(value))}.", _EXPORT_AGAIN)


def _plain(hint: Any, value: object) -> bool:
    """Whether a JSON scalar is of the type; true and false are no numbers."""
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)
