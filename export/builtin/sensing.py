"""Sensor messages, readable and not."""

from __future__ import annotations

from .phrase import Phrase, Rng, chance, weighted
from .places import room_words
from .sensors import PLACES, UNREADABLE, sentence
from .shapes import Draft
from .vocabulary import FOREIGN_ROOMS


def _number(rng: Rng, kind: str) -> str:
    low, high = (0, 100) if kind == "humidity" else (-20, 45)
    if kind == "temperature" and chance(rng, 0.15):
        low, high = 0, 400
    whole = rng.randint(low, high)
    decimals = weighted(rng, [(0, 8), (1, 4), (2, 0.4)])
    return (
        f"{whole}." + "".join(rng.choice("0123456789") for _ in range(decimals))
        if decimals
        else str(whole)
    )


def _near(rng: Rng, number: str, kind: str) -> str:
    """A bound: equal, close by, or anywhere."""
    pick = rng.random()
    if pick < 0.12:
        return number
    if pick < 0.2:
        return number.split(".")[0] if "." in number else f"{number}.0"
    if pick < 0.6:
        near = float(number) + rng.choice((-0.5, 0.5, -1, 1, -2, 2, -5, 5, -0.1, 0.1, 10, -10))
        if kind == "humidity":
            near = min(max(near, 0), 100)
        return f"{near:.1f}" if chance(rng, 0.4) else str(round(near))
    return _number(rng, kind)


def _since(rng: Rng) -> str:
    return f" since={rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def sensor_message(rng: Rng) -> Draft:
    """A sensor message of the grammar, or one that is not readable."""
    if chance(rng, 0.2):
        return _unreadable(rng)
    place = rng.choice(PLACES)
    kind = weighted(rng, [("temperature", 5), ("humidity", 4), ("water", 1.5), ("motion", 1.8)])
    parts = [f"sensor: {place}"]
    bound = ""
    if kind in ("water", "motion"):
        bound = rng.choice(("yes", "no"))
        parts.append(f"{kind}={bound}")
    else:
        unit = "%" if kind == "humidity" else weighted(rng, [("C", 7), ("F", 3)])
        if chance(rng, 0.06):
            unit = ""
        number = _number(rng, kind)
        parts.append(f"{kind}={number}{unit}")
        bound = weighted(rng, [("limit", 5), ("min", 4), ("", 3)])
        if bound:
            parts.append(f"{bound}={_near(rng, number, kind)}{unit}")
    text = " ".join(parts)
    said = ""
    if chance(rng, 0.45 if kind == "motion" else 0.12):
        text, said = text + _since(rng), " since"
    mark = f"sensor: <place> {kind} {bound}{said}"
    answer = sentence(text)
    return Draft(
        "sensor", Phrase(text, mark), answer, "free", combo=f"sensor/{kind}{bound}/{place}"
    )


_CHATTER = (
    "hello",
    "what is the temperature",
    "turn on the light",
    "temperature",
    "everything is fine",
    "no reading",
    "error",
    "offline",
    "ping",
    "the kitchen is warm",
    "battery low",
    "is the door open",
    "test",
    "status",
    "null",
    "kitchen is 20 degrees",
)
_OTHER_KINDS = [
    "pressure",
    "smoke",
    "co2",
    "light",
    "noise",
    "battery",
    "door",
    "window",
    "wind",
    "rain",
    "ph",
    "dust",
    "gas",
    "power",
    "voltage",
    "speed",
    "brightness",
    "temp",
    "hum",
    "moisture",
    "vibration",
    "sound",
    "weight",
    "oxygen",
    "status",
    "lux",
    "current",
    "level",
]


def _unreadable(rng: Rng) -> Draft:
    place, kind = rng.choice(PLACES), rng.choice(("temperature", "humidity", "water", "motion"))
    number = _number(rng, "temperature")
    unit = {"temperature": "C", "humidity": "%"}.get(kind, "")
    value = f"{number}{unit}" if unit else rng.choice(("yes", "no"))
    text, mark = rng.choice(
        (
            (f"sensor: {rng.choice(_CHATTER)}", "chatter"),
            ("sensor:", "nothing"),
            (f"sensor: {place}", "place only"),
            (f"sensor: {place} {kind}", "no value"),
            (f"sensor: {place} {kind}=", "empty value"),
            (f"sensor: {kind}={value}", "no place"),
            (f"sensor: {place} {rng.choice(_OTHER_KINDS)}={value}", "other kind"),
            (f"sensor: {place} {rng.choice(_OTHER_KINDS)}={number}", "other kind"),
            (
                f"sensor: {rng.choice(FOREIGN_ROOMS).replace(' ', '_')} {kind}={value}",
                "other place",
            ),
            (f"sensor: {place} {kind} {value}", "no equals sign"),
            (f"sensor: {place} {kind}: {value}", "colon"),
            (f"sensor: {place} {kind}={rng.choice(('hot', 'high', 'maybe', 'n/a', 'ok'))}", "word"),
            (f"sensor: {place} temperature=yes", "temperature yes"),
            (f"sensor: {place} water={number}", "water number"),
            (f"sensor: {place} motion={number}%", "motion number"),
            (f"sensor: {place} {kind}={value} limit=", "empty limit"),
            (f"sensor: {place} {kind}={value} limit", "limit alone"),
            (f"sensor: {place} {kind}={value} max={value}", "max"),
            (f"sensor: {place} {kind}={value} since=25:{rng.randint(0, 59)}", "bad since"),
            (f"sensor: {place} {kind}={value} since=noon", "bad since"),
            (
                f"sensor: {place} temperature={number}C limit={_number(rng, 'temperature')}F",
                "units",
            ),
            (f"sensor: {place} humidity={number}C", "humidity in C"),
            (f"sensor: {place} temperature={number}K", "kelvin"),
            (f"sensor: {place} water=yes limit=30%", "water limit"),
            (f"sensor: {place} {kind}={value} {kind}={value}", "twice"),
            (f"sensor: {room_words(rng, place)} reading", "reading"),
            (f"sensor: {place} and {rng.choice(PLACES)} {kind}={value}", "two places"),
            (f"sensor: {place} temperature={number.replace('.', ',')},5C", "comma"),
            (f"sensor: the {place} {kind}={value}", "article"),
            (f"sensor: {place} {kind}={value} please", "please"),
        )
    )
    answer = sentence(text)
    if answer != UNREADABLE:
        mark = f"readable {mark}"
    return Draft("sensor", Phrase(text, f"sensor: unreadable {mark}"), answer, "free")
