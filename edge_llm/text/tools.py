"""Python functions as the JSON schemas that chat templates show to a model."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edge_llm.errors import ArgumentError

__all__ = ["function_schema"]

_TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}
_SECTION = re.compile(r"\n\s*(Args|Returns|Raises):", re.MULTILINE)
_ARGUMENT = re.compile(r"(?:^|\n)\s*(\w+):\s*(.*?)\s*(?=\n\s*\w+:|\Z)", re.DOTALL)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's name, description and arguments, as transformers' `get_json_schema` gives them.

    Args:
        function: Each parameter has a type hint and, in the docstring, a line under `Args:`. That
            line may end in `(choices: ["tea", "coffee"])`.

    Returns:
        `{"type": "function", "function": {"name", "description", "parameters", "return"}}`.

    Raises:
        ArgumentError: A hint or a description is missing, or JSON has no such type.
    """
    description, arguments, returns = _docstring(function)
    try:
        hints = get_type_hints(function)
    except Exception as error:  # a hint is an expression, and may fail in any way
        raise _refused(function, f"its type hints cannot be read: {error}") from error
    properties: dict[str, Any] = {}
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        name = parameter.name
        if parameter.annotation is inspect.Parameter.empty:
            raise _refused(function, f"{name} has no type hint")
        if name not in arguments:
            raise _refused(function, f"the docstring's Args do not describe {name}")
        properties[name] = {**_schema(hints[name], function), **_described(name, arguments[name])}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [one.name for one in parameters if one.default is inspect.Parameter.empty]:
        schema["required"] = required
    shown = {"name": function.__name__, "description": description, "parameters": schema}
    if "return" in hints:
        more = {} if returns is None else {"description": returns}
        shown["return"] = {**_schema(hints["return"], function), **more}
    return {"type": "function", "function": shown}


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str], str | None]:
    """The description, the arguments' descriptions and that of what is returned."""
    doc = (inspect.getdoc(function) or "").strip()
    if not doc:
        raise _refused(function, "it has no docstring")
    description, *rest = _SECTION.split(f"\n{doc}")
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    lines = [line for line in sections.get("Args", "").splitlines() if line.strip()]
    arguments = {
        name: re.sub(r"\s*\n+\s*", " ", text)
        for name, text in _ARGUMENT.findall("\n".join(lines).strip())
    }
    returns = sections.get("Returns")
    return description.strip(), arguments, None if returns is None else returns.strip()


def _described(name: str, text: str) -> dict[str, Any]:
    found = _CHOICES.search(text)
    if found is None:
        return {"description": text}
    try:
        choices = [choice.strip() for choice in json.loads(found[1])]
    except (ValueError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f"the docstring's choices of {name}", "a JSON list of strings", found[1]
        ) from error
    return {"enum": choices, "description": text[: found.start()].strip()}


def _schema(hint: Any, function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is None:
        return dict(_TYPES.get(hint, {"type": "object"}))
    if origin in (Union, types.UnionType):
        return _union(args, function)
    if origin is Literal and all(type(arg) in _TYPES for arg in args):
        names = list(dict.fromkeys(_TYPES[type(arg)]["type"] for arg in args))
        return {"type": names[0] if len(names) == 1 else names, "enum": list(args)}
    if origin is list:
        return {"type": "array", **({"items": _schema(args[0], function)} if args else {})}
    if origin is tuple and len(args) != 1 and ... not in args:
        items = {"prefixItems": [_schema(arg, function) for arg in args]} if args else {}
        return {"type": "array", **items}
    if origin is dict:
        values = {"additionalProperties": _schema(args[1], function)} if args else {}
        return {"type": "object", **values}
    raise _refused(function, f"JSON has no type for {hint}")


def _union(args: tuple[Any, ...], function: Callable[..., Any]) -> dict[str, Any]:
    options = [_schema(arg, function) for arg in args if arg is not type(None)]
    if len(options) == 1:
        schema = options[0]
    elif all(isinstance(option.get("type"), str) for option in options):
        schema = {"type": sorted(option["type"] for option in options)}
    else:
        schema = {"anyOf": options}
    return {**schema, **({"nullable": True} if type(None) in args else {})}


def _refused(function: Callable[..., Any], reason: str) -> ArgumentError:
    return ArgumentError(
        "tools",
        "JSON schemas, or functions with type hints and a docstring in Google's style",
        function,
        f"{getattr(function, '__name__', 'It')} is not: {reason}. Complete it, or write the JSON "
        "schema yourself.",
    )
