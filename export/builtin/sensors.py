"""Sensor messages: the sentence that the contract gives for one, as a pure function."""

from __future__ import annotations

import re
from decimal import Decimal

from .answer import CLOCK, ROOMS

UNREADABLE = "Unreadable sensor message."
PLACES = tuple(room for room in ROOMS if room != "all")
UNITS_OF = {"temperature": ("C", "F"), "humidity": ("%",)}
_SIGN = {"": "", "C": " °C", "F": " °F", "%": " %"}

_MESSAGE = re.compile(
    rf"sensor:\s*(?P<place>{'|'.join(PLACES)})\s+(?P<kind>temperature|humidity|water|motion)="
    r"(?P<value>[^\s=]+)(?:\s+(?P<bound>limit|min)=(?P<edge>[^\s=]+))?"
    rf"(?:\s+since=(?P<since>{CLOCK.pattern}))?",
    re.IGNORECASE,
)
_READING = re.compile(r"(?P<number>-?\d+(?:\.\d+)?)(?P<unit>[CF%]?)", re.IGNORECASE)


def is_sensor(request: str) -> bool:
    """Whether a request asks for a sensor sentence (it starts with `sensor:`)."""
    return request.strip().lower().startswith("sensor:")


def sentence(request: str) -> str:
    """Say a sensor message as one sentence.

    Args:
        request: The whole request, beginning with `sensor:`.

    Returns:
        The sentence, or UNREADABLE where the message is outside the contract's grammar.
    """
    match = _MESSAGE.fullmatch(request.strip())
    if match is None:
        return UNREADABLE
    place = match["place"].lower().replace("_", " ")
    kind = match["kind"].lower()
    since = f" since {match['since']}" if match["since"] else ""
    if kind in UNITS_OF:
        body = _measured(place, kind, match["value"], match["bound"], match["edge"])
    else:
        body = _detected(place, kind, match["value"].lower(), match["bound"])
    return UNREADABLE if body is None else f"{body}{since}."


def _detected(place: str, kind: str, value: str, bound: str | None) -> str | None:
    if value not in ("yes", "no") or bound is not None:
        return None
    if value == "no":
        return f"No {kind} in the {place}"
    return f"Water detected in the {place}" if kind == "water" else f"Motion in the {place}"


def _measured(place: str, kind: str, value: str, bound: str | None, edge: str | None) -> str | None:
    reading = _READING.fullmatch(value)
    if reading is None or reading["unit"].upper() not in ("", *UNITS_OF[kind]):
        return None
    body = f"{place.capitalize()} {kind} is {_say(reading)}"
    if bound is None:
        return body
    limit = _READING.fullmatch(edge or "")
    if limit is None or limit["unit"].upper() != reading["unit"].upper():
        return None
    number, against = Decimal(reading["number"]), Decimal(limit["number"])
    if bound.lower() == "limit":
        return f"{body}, {'above' if number > against else 'within'} the {_say(limit)} limit"
    return f"{body}, {'below' if number < against else 'above'} the {_say(limit)} minimum"


def _say(reading: re.Match[str]) -> str:
    return reading["number"] + _SIGN[reading["unit"].upper()]
