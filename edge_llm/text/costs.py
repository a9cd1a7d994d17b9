"""What operators, methods and filters of Jinja cost beyond reading their arguments.

Each function here gives units of :mod:`edge_llm.text.budget`. An argument of a wrong type costs
nothing: Python refuses it when the work is done.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from edge_llm.errors import ChatTemplateError
from edge_llm.text.budget import CHARACTERS, check_bits, weigh

__all__ = ["brace_format", "call", "filtering", "is_join", "operator", "shallow"]

_SLOW = 64  # characters that a unit pays for where work grows with the product of two lengths
_REFUSED = frozenset({"encode", "translate", "to_bytes", "from_bytes", "fromkeys"})

# They read text as text, and pay by its characters; all others may see a list of characters.
_TEXT = """
    attr capitalize center e escape filesizeformat float forceescape format indent int lower
    replace reverse round safe string striptags tojson trim truncate upper wordwrap"""
_TEXT_FILTERS = frozenset(_TEXT.split())


def shallow(value: object) -> int:
    """Copying a value without its parts."""
    if isinstance(value, (str, bytes)):
        return 1 + len(value) // CHARACTERS
    return 1 + (len(value) if isinstance(value, (list, tuple)) else 0)


def operator(name: str, left: Any, right: Any) -> int:
    """A binary operator."""
    if name == "%" and isinstance(left, (str, bytes)):
        return _percent_format(left, right)
    if name == "*":
        if isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() + right.bit_length() - 1)
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
                width = CHARACTERS if isinstance(sequence, (str, bytes)) else 1
                return len(sequence) * max(times, 0) // width
    if name == "**" and isinstance(left, int) and isinstance(right, int):
        check_bits((left.bit_length() if abs(left) > 1 else 1) * abs(right) if right else 1)
    return 0


def is_join(function: object) -> bool:
    """Whether a function is a string's `join`."""
    owner = getattr(function, "__self__", None)
    return isinstance(owner, (str, bytes)) and getattr(function, "__name__", "") == "join"


def call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """A function or method, by its owner's type and its name.

    Raises:
        ChatTemplateError: A method that no chat template needs and that has no bound.
    """
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    if isinstance(owner, (str, bytes)):
        if name not in _REFUSED:
            cost = _METHODS.get(name)
            return 1 + len(owner) // CHARACTERS + (cost(owner, *args, **kwargs) if cost else 0)
    elif isinstance(owner, Mapping) and name in ("get", "items", "keys", "values"):
        return 1
    elif name not in _REFUSED or not isinstance(owner, (int, type)):
        return weigh(owner) if isinstance(owner, (list, tuple, Mapping)) else 1
    raise ChatTemplateError(f"Chat templates may not call the method {name!r}.")


def filtering(name: str, value: Any, /, *args: Any, **kwargs: Any) -> int:
    """A filter on a value."""
    cost = _FILTERS.get(name)
    units = cost(value, *args, **kwargs) if cost else 0
    if isinstance(value, (str, bytes)) and name not in _TEXT_FILTERS:
        units += len(value)
    return units


def brace_format(form: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """`str.format`: each field may be all of the arguments, as wide as its specification says."""
    fields = width = 0
    for _, field, spec, _ in string.Formatter().parse(form):
        if field is not None:
            fields += 1
            width += _numbers(spec or "")
            if "{" in (spec or ""):
                width += _widths((args, kwargs))
    return fields * weigh((args, kwargs)) + width // CHARACTERS


def _percent_format(form: str | bytes, values: Any) -> int:
    text = form if isinstance(form, str) else form.decode("latin-1")
    width = _numbers(text) + text.count("*") * _widths(values)
    return text.count("%") * weigh(values) + width // CHARACTERS


def _numbers(text: str) -> int:
    """The sum of the numbers in a text, in which a width may hide."""
    return sum(int(digits[-18:]) for digits in re.findall(r"\d+", text))


def _widths(values: Any) -> int:
    """The sum of the integers among values, any of which may be a width."""
    if isinstance(values, int):
        return abs(values)
    if isinstance(values, Mapping):
        return sum(map(_widths, values.values()))
    return sum(map(_widths, values)) if isinstance(values, (list, tuple)) else 0


def _wide(text: Any, width: Any = 80, fill: Any = " ") -> int:
    return width // CHARACTERS if isinstance(width, int) else 0


def _expanded(text: Any, tabsize: Any = 8) -> int:
    return _count(text, "\t") * tabsize // CHARACTERS if isinstance(tabsize, int) else 0


def _replaced(text: Any, old: Any, new: Any, count: Any = -1) -> int:
    return _count(text, old) * len(_text(new)) // CHARACTERS


def _stripped(text: Any, chars: Any = None) -> int:
    return len(_text(text)) * len(_text(chars or "")) // _SLOW


def _split(text: Any, sep: Any = None, maxsplit: Any = -1) -> int:
    return _count(text, sep) if sep else len(text)


def _split_backwards(text: Any, sep: Any = None, maxsplit: Any = -1) -> int:
    return _split(text, sep) + _found_backwards(text, sep or "")


def _found_backwards(text: Any, sub: Any, *_: Any) -> int:
    return len(text) * len(_text(sub)) // _SLOW


def _joined(separator: Any, values: Any) -> int:
    return len(values) * len(separator) // CHARACTERS


def _quadratic(text: Any, *args: Any, **kwargs: Any) -> int:
    more = sum(len(_text(one)) for one in (*args, *kwargs.values()))
    return len(_text(text)) * (len(_text(text)) + more) // 1024


def _joined_by(values: Any, d: Any = "", attribute: Any = None) -> int:
    count = len(values) if isinstance(values, (str, list, tuple, Mapping)) else weigh(values)
    return count * len(_text(d)) // CHARACTERS


def _indented(text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    wide = width if isinstance(width, int) else len(_text(width))
    return len(_text(text)) * (1 + max(wide, 0) // CHARACTERS)


def _formatted(form: Any, /, *args: Any, **kwargs: Any) -> int:
    return _percent_format(_text(form), kwargs or args)


def _rounded(value: Any, precision: Any = 0, method: Any = None) -> int:
    if isinstance(precision, int):
        check_bits(abs(precision) * 4)
    return 0


def _summed(iterable: Any, attribute: Any = None, start: Any = 0) -> int:
    # Lists are added one to another, each time anew.
    return 0 if isinstance(start, (int, float)) else int(weigh(iterable) ** 2)


def _batched(value: Any, linecount: Any, fill_with: Any = None) -> int:
    return linecount if isinstance(linecount, int) else 0


def _json(
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> int:
    indentation = indent if isinstance(indent, int) else len(_text(indent or ""))
    return weigh(value) * (1 + max(indentation, 0) + len(_text(separators)) // CHARACTERS)


def _printed(value: Any, *_: Any, **__: Any) -> int:
    return weigh(value) * 100


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _count(text: Any, sub: Any) -> int:
    return _text(text).count(_text(sub))


_METHODS: Mapping[str, Callable[..., int]] = {
    "center": _wide,
    "expandtabs": _expanded,
    "join": _joined,
    "ljust": _wide,
    "lstrip": _stripped,
    "replace": _replaced,
    "rfind": _found_backwards,
    "rindex": _found_backwards,
    "rjust": _wide,
    "rpartition": _found_backwards,
    "rsplit": _split_backwards,
    "rstrip": _stripped,
    "split": _split,
    "splitlines": lambda text, *_, **__: len(text),
    "strip": _stripped,
    "striptags": _quadratic,
    "zfill": _wide,
}
_FILTERS: Mapping[str, Callable[..., int]] = {
    "batch": _batched,
    "center": _wide,
    "format": _formatted,
    "indent": _indented,
    "join": _joined_by,
    "pprint": _printed,
    "replace": _replaced,
    "round": _rounded,
    "striptags": _quadratic,
    "sum": _summed,
    "tojson": _json,
    "trim": _stripped,
    "wordwrap": _quadratic,
}
