"""Numbers as people say and write them."""

from __future__ import annotations

from .phrase import Rng, chance, weighted

SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["", "", *["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]]
_MISSPELT = {"forty": "fourty", "ninety": "ninty"}


def spell(number: int, *, hyphen: bool = False, article: bool = False, link: bool = True) -> str:
    """A whole number in words.

    Args:
        number: From 0 to 999.
        hyphen: "twenty-one" instead of "twenty one".
        article: "a hundred" instead of "one hundred".
        link: "a hundred and ten" instead of "a hundred ten".

    Returns:
        The words.
    """
    if number < 20:
        return SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (("-" if hyphen else " ") + SMALL[ones] if ones else "")
    hundreds, rest = divmod(number, 100)
    head = ("a" if article and hundreds == 1 else SMALL[hundreds]) + " hundred"
    if not rest:
        return head
    return f"{head}{' and ' if link else ' '}{spell(rest, hyphen=hyphen)}"


def say_integer(rng: Rng, number: int, *, spoken: float = 0.4) -> str:
    """A whole number in digits, or with probability `spoken` in words."""
    if number > 999 or not chance(rng, spoken):
        return str(number)
    said = spell(number, hyphen=chance(rng, 0.3), article=chance(rng, 0.7), link=chance(rng, 0.75))
    if 110 <= number < 200 and chance(rng, 0.1):
        said = "one " + spell(number - 100)
    if chance(rng, 0.02):
        for right, wrong in _MISSPELT.items():
            said = said.replace(right, wrong)
    return said


def say_tenths(rng: Rng, tenths: int, *, spoken: float = 0.4) -> str:
    """A number of tenths: 215 as "21.5", "twenty one point five" or "twenty one and a half"."""
    whole, part = divmod(tenths, 10)
    if not part:
        return say_integer(rng, whole, spoken=spoken)
    if not chance(rng, spoken):
        return f"{whole}.{part}"
    if part == 5 and chance(rng, 0.6):
        if whole == 0:
            return weighted(rng, [("half a", 3), ("a half", 1), ("half", 1)])
        return f"{say_integer(rng, whole, spoken=0.7)} and a half"
    return f"{say_integer(rng, whole, spoken=1.0)} point {SMALL[part]}"


def number_of(tenths: int) -> int | float:
    """Tenths as the number that the answer carries: an integer has no decimal point."""
    return tenths // 10 if tenths % 10 == 0 else tenths / 10
