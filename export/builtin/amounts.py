"""Amounts: how far something is set, raised or lowered, as said and as answered."""

from __future__ import annotations

from typing import NamedTuple

from .numerals import number_of, say_integer, say_tenths
from .phrase import Phrase, Rng, chance, weighted

PERCENT_DEVICES = frozenset({"light", "blinds", "fan", "speaker"})
CELSIUS_DEVICES = frozenset({"thermostat", "ac", "heater", "oven"})


class Amount(NamedTuple):
    """Words, value and unit; `unit` is None where none is said."""

    said: Phrase
    value: int | float
    unit: str | None


def implied_unit(device: str | None) -> str | None:
    """The unit of a bare number that a device is set to."""
    if device in PERCENT_DEVICES:
        return "percent"
    return "celsius" if device in CELSIUS_DEVICES else None


_FRACTIONS = (
    ("half", 50),
    ("half", 50),
    ("halfway", 50),
    ("half way", 50),
    ("a quarter", 25),
    ("one quarter", 25),
    ("three quarters", 75),
    ("three quarters", 75),
    ("full", 100),
    ("max", 100),
    ("maximum", 100),
    ("the maximum", 100),
    ("the max", 100),
    ("min", 0),
    ("minimum", 0),
    ("the minimum", 0),
)
_NOUN = {
    "light": ("brightness", "power", "intensity"),
    "fan": ("speed", "speed", "power"),
    "speaker": ("volume", "volume"),
    "tv": ("volume", "volume"),
}


def percent(rng: Rng, *, bare: bool = False) -> Amount:
    """A percentage; with `bare` the sign may be left out and then no unit is said."""
    number = weighted(
        rng,
        [
            (10 * rng.randint(0, 10), 4),
            (5 * rng.randint(1, 19), 3),
            (rng.randint(1, 100), 6),
        ],
    )
    if chance(rng, 0.02):
        tenths = 10 * rng.randint(1, 99) + 5
        return Amount(Phrase(f"{say_tenths(rng, tenths)} percent", "<n%>"), tenths / 10, "percent")
    said = say_integer(rng, number)
    if bare and chance(rng, 0.33):
        return Amount(Phrase(said, "<n>"), number, None)
    if said.isdigit():
        text = said + rng.choice(("%", "%", " %", " percent", " percent", " per cent"))
    else:
        text = said + rng.choice((" percent", " percent", " percent", " per cent"))
    return Amount(Phrase(text, "<n%>"), number, "percent")


def fraction(rng: Rng, device: str) -> Amount:
    """Such as "half", "three quarters", "maximum volume", or "low" for a fan; in percent."""
    if device == "fan" and chance(rng, 0.5):
        word, number = rng.choice((("low", 33), ("medium", 66), ("high", 100)))
        tail = weighted(rng, [("", 6), (" speed", 1.5), (" power", 0.3)])
        return Amount(Phrase(word + tail, "<level>"), number, "percent")
    word, number = rng.choice(_FRACTIONS)
    noun = ""
    if word in ("half", "full", "max", "maximum", "minimum") and device in _NOUN:
        noun = " " + rng.choice(_NOUN[device]) if chance(rng, 0.35) else ""
    return Amount(Phrase(word + noun, "<fraction>"), number, "percent")


def degrees(rng: Rng, device: str, *, bare: bool = True) -> Amount:
    """A temperature; the unit is None only for a bare number."""
    low, high = (50, 280) if device == "oven" else (5, 35)
    tenths = 10 * rng.randint(low, high)
    scale = weighted(rng, [("celsius", 8), ("fahrenheit", 2)])
    if scale == "fahrenheit":
        low, high = (200, 500) if device == "oven" else (50, 90)
        tenths = 10 * rng.randint(low, high)
    if device == "oven" and chance(rng, 0.7):
        tenths = round(tenths, -2)
    elif device != "oven" and chance(rng, 0.15):
        tenths += rng.choice((5, 5, 5, rng.randint(1, 9)))
    said = say_tenths(rng, tenths)
    return _scaled(rng, said, number_of(tenths), scale, bare=bare)


def _scaled(rng: Rng, said: str, value: int | float, scale: str, *, bare: bool) -> Amount:
    digits = said[-1].isdigit()
    if scale == "fahrenheit":
        forms = ["degrees fahrenheit", "fahrenheit", "degrees f", "degrees farenheit"]
        if digits:
            forms += ["f", "°f", "f", "°f"]
        return Amount(_glue(rng, said, rng.choice(forms)), value, "fahrenheit")
    form = rng.random()
    if form < 0.3 and bare:
        return Amount(Phrase(said, "<n>"), value, None)
    if form < 0.72:
        unit = rng.choice(("°", "degrees", "degrees")) if digits else "degrees"
        if digits and chance(rng, 0.03):
            unit = "deg"
        return Amount(_glue(rng, said, unit), value, "celsius")
    forms = ["degrees celsius", "celsius", "degrees c", "degrees centigrade"]
    if digits:
        forms += ["c", "°c", "c", "°c"]
    return Amount(_glue(rng, said, rng.choice(forms)), value, "celsius")


def _glue(rng: Rng, said: str, unit: str) -> Phrase:
    gap = "" if unit[0] == "°" or (len(unit) == 1 and chance(rng, 0.6)) else " "
    if unit[0] == "°" and chance(rng, 0.15):
        gap = " "
    return Phrase(said + gap + unit, "<n°>")


def change_of_degrees(rng: Rng) -> Amount:
    """A difference of temperature: "2 degrees", "one degree", "half a degree", "3"."""
    tenths = 10 * rng.choice((1, 1, 2, 2, 3, 4, 5, rng.randint(1, 15)))
    if chance(rng, 0.15):
        tenths = rng.choice((5, 15, 25, 35))
    said = say_tenths(rng, tenths)
    if tenths == 10:
        said = rng.choice(("1", "one", "a"))
        return Amount(Phrase(f"{said} degree", "<n°>"), 1, "celsius")
    if said in ("half a", "a half", "half"):
        return Amount(Phrase("half a degree", "<n°>"), 0.5, "celsius")
    scale = weighted(rng, [("celsius", 12), ("fahrenheit", 1)])
    return _scaled(rng, said, number_of(tenths), scale, bare=True)
