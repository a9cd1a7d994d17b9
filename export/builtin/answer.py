"""The answer to a request: a frozen record, and the one line of JSON that stands for it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields

from edge_llm.errors import ArgumentError

ACTIONS = (
    "on",
    "off",
    "set",
    "increase",
    "decrease",
    "open",
    "close",
    "lock",
    "unlock",
    "start",
    "stop",
    "pause",
    "query",
    "timer",
    "alarm",
    "reminder",
    "cancel",
    "none",
)
DEVICES = (
    "light",
    "fan",
    "heater",
    "ac",
    "thermostat",
    "blinds",
    "door",
    "garage",
    "plug",
    "tv",
    "speaker",
    "vacuum",
    "coffee_machine",
    "oven",
    "camera",
    "temperature",
    "humidity",
    "timer",
    "alarm",
    "reminder",
)
ROOMS = (
    "living_room",
    "kitchen",
    "bedroom",
    "bathroom",
    "hallway",
    "office",
    "garden",
    "kids_room",
    "dining_room",
    "basement",
    "attic",
    "balcony",
    "all",
)
UNITS = ("percent", "celsius", "fahrenheit")

CLOCK = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d")
_LABEL_LEAD = re.compile(r"^(?:(?:to|for|that|about|a|an|the)\s+)+")


def _refuse(argument: str, domain: str, value: object) -> ArgumentError:
    return ArgumentError(argument, domain, value, "answer in the shape of the built-in contract")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request asks for; a field is None where the request does not state it.

    Attributes:
        action: One of ACTIONS.
        device: One of DEVICES.
        room: One of ROOMS.
        value: The number as said.
        unit: One of UNITS.
        time: When it is to happen, "HH:MM" on the 24-hour clock.
        delay_s: Seconds from now until it happens.
        duration_s: Seconds that it lasts.
        label: What a timer, alarm or reminder is for, lower case.

    Raises:
        ArgumentError: A field is outside its domain.
    """

    action: str
    device: str | None = None
    room: str | None = None
    value: int | float | None = None
    unit: str | None = None
    time: str | None = None
    delay_s: int | None = None
    duration_s: int | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        for name, domain in (
            ("action", ACTIONS),
            ("device", (None, *DEVICES)),
            ("room", (None, *ROOMS)),
            ("unit", (None, *UNITS)),
        ):
            if getattr(self, name) not in domain:
                raise _refuse(name, f"one of {domain}", getattr(self, name))
        if self.value is not None and type(self.value) not in (int, float):
            raise _refuse("value", "a number", self.value)
        if type(self.value) is float and self.value.is_integer():
            raise _refuse("value", "an integer has no decimal point", self.value)
        if self.time is not None and not (
            isinstance(self.time, str) and CLOCK.fullmatch(self.time)
        ):
            raise _refuse("time", '"HH:MM", 24-hour', self.time)
        for name in ("delay_s", "duration_s"):
            seconds = getattr(self, name)
            if seconds is not None and (type(seconds) is not int or seconds < 0):
                raise _refuse(name, "a whole number of seconds", seconds)
        if self.label is not None and (
            not isinstance(self.label, str) or not self.label or self.label != self.label.lower()
        ):
            raise _refuse("label", "lower-case text", self.label)

    def to_json(self) -> str:
        """One line of minified JSON, keys in the order of the fields, absent keys left out."""
        pairs = {f.name: getattr(self, f.name) for f in fields(self)}
        stated = {key: value for key, value in pairs.items() if value is not None}
        return json.dumps(stated, ensure_ascii=False, separators=(",", ":"))


NONE = Answer("none")


def parse(line: str) -> Answer:
    """Read one line of JSON back, strictly.

    Args:
        line: What the model answered to a request that is no sensor message.

    Returns:
        The answer it stands for.

    Raises:
        ArgumentError: It is no JSON object of the contract's shape, or not its minified form.
    """
    try:
        pairs = json.loads(line)
    except ValueError:
        raise _refuse("line", "one line of JSON", line) from None
    names = {f.name for f in fields(Answer)}
    if not isinstance(pairs, dict) or "action" not in pairs or not pairs.keys() <= names:
        raise _refuse("line", f"an object with action and keys of {sorted(names)}", line)
    answer = Answer(**pairs)
    if answer.to_json() != line:
        raise _refuse("line", f"minified, keys in order: {answer.to_json()}", line)
    return answer


def label_of(words: str) -> str:
    """The label that stands for a person's words: lower case, no leading to, for, the, ...

    Args:
        words: What followed "remind me", "timer for" and the like, without please.

    Returns:
        The label.
    """
    return _LABEL_LEAD.sub("", " ".join(words.lower().split()))
