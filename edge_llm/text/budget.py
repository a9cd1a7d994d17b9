"""What a chat template may cost: everything it does is paid for from one budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from itertools import chain
from typing import Any

from jinja2.utils import Namespace

from edge_llm.errors import ChatTemplateError

__all__ = ["CHARACTERS", "Budget", "check_bits", "weigh"]

# One unit is a few tenths of a microsecond: a node of the template, a value, or so many characters.
CHARACTERS = 16
# Well-known templates take some 5,000 units for twenty messages, so this is enough for any honest
# one, and spent in a fraction of a second. Long conversations bring their own.
BASE = 250_000
PER_INPUT = 64
DEPTH = 100  # of lists in lists; JSON schemas of tools reach about 20
BITS = 16_384  # Python itself writes no integer of more than 4,300 digits


class Budget:
    """Units that a rendering has left.

    Args:
        inputs: What the template is given; a longer conversation may cost more.

    Raises:
        ChatTemplateError: The inputs are nested too deeply.
    """

    __slots__ = ("_left",)

    def __init__(self, inputs: object) -> None:
        self._left = BASE + PER_INPUT * weigh(inputs)

    def spend(self, units: int) -> None:
        """Pay for something before it is done.

        Args:
            units: Its cost.

        Raises:
            ChatTemplateError: More than is left.
        """
        self._left -= units
        if self._left < 0:
            raise ChatTemplateError(
                "The chat template does more work than a conversation of this length can need.",
                "It may be broken, or made to harm: look at the template before you use it.",
            )

    def weigh(self, value: object) -> None:
        """Pay for a value being read as a whole.

        Args:
            value: Any value of a template.

        Raises:
            ChatTemplateError: It costs more than is left, or is nested too deeply.
        """
        kind = type(value)
        if kind is str:
            self.spend(1 + len(value) // CHARACTERS)  # type: ignore[arg-type]
        elif value is None or kind is bool or kind is float:
            self.spend(1)
        elif kind is int:
            check_bits(value.bit_length())  # type: ignore[attr-defined]
            self.spend(1)
        else:
            self.spend(weigh(value, most=self._left))


def weigh(value: object, *, most: int | None = None) -> int:
    """The units that reading a value as a whole costs, parts that occur twice counted twice.

    Args:
        value: Any value of a template.
        most: Counting ends where this is passed.

    Raises:
        ChatTemplateError: Nested more than 100 deep, or an integer of more than 16,384 bits.
    """
    units = 0
    levels: list[Iterator[object]] = [iter((value,))]
    while levels:
        for item in levels[-1]:
            units += 1
            if isinstance(item, (str, bytes)):
                units += len(item) // CHARACTERS
            elif item is None or isinstance(item, float):
                continue
            elif isinstance(item, int):
                check_bits(item.bit_length())
            elif isinstance(item, range):
                units += len(item)
            elif (parts := _parts(item)) is not None:
                if len(levels) > DEPTH:
                    raise ChatTemplateError(
                        f"The chat template or its input nests values more than {DEPTH} deep."
                    )
                levels.append(iter(parts))
                break
            if most is not None and units > most:
                return units
        else:
            levels.pop()
    return units


def check_bits(bits: int) -> None:
    """Refuse an integer that is longer than Python writes.

    Args:
        bits: Its length.

    Raises:
        ChatTemplateError: It is too long.
    """
    if bits > BITS:
        raise ChatTemplateError(f"The chat template makes an integer of more than {BITS} bits.")


def _parts(value: object) -> Iterable[Any] | None:
    """What a container holds; None for any other value."""
    if isinstance(value, (list, tuple)):
        return value
    if type(value) is Namespace:
        attributes: dict[str, Any] = value._Namespace__attrs
        return attributes.values()
    if isinstance(value, Mapping):
        return chain(value.keys(), value.values())
    if isinstance(value, (Sequence, Set, ValuesView)):
        return value
    return None
