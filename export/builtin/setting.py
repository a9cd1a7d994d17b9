"""Commands with an amount: set."""

from __future__ import annotations

from .amounts import (
    PERCENT_DEVICES,
    Amount,
    degrees,
    fraction,
    implied_unit,
    percent,
)
from .phrase import EMPTY, Phrase, Rng, chance, fill, weighted, words
from .places import Target, any_room, room_words, target, where, with_where
from .shapes import Draft, draft
from .timing import place, timing

_SETTABLE = [
    "light",
    "light",
    "light",
    "light",
    "fan",
    "fan",
    "fan",
    "blinds",
    "blinds",
    "blinds",
    "speaker",
    "speaker",
    "thermostat",
    "thermostat",
    "heater",
    "heater",
    "ac",
    "ac",
    "oven",
    "tv",
]
# What the thing that is set may be called instead of the device.
ASPECT = {
    "light": ("brightness", "brightness", "light level"),
    "fan": ("speed", "fan speed"),
    "speaker": ("volume", "volume", "volume", "sound"),
    "tv": ("volume",),
    "oven": ("temperature",),
    "ac": ("temperature",),
    "heater": ("temperature",),
    "thermostat": ("temperature",),
}
_SET: tuple[tuple[str, float], ...] = (
    ("set {np} to {n}", 10),
    ("put {np} to {n}", 1),
    ("put {np} at {n}", 0.8),
    ("set {np} at {n}", 1.2),
    ("change {np} to {n}", 1.2),
    ("adjust {np} to {n}", 1.2),
    ("turn {np} to {n}", 2),
    ("turn {np} up to {n}", 1.2),
    ("turn {np} down to {n}", 1.4),
    ("turn up {np} to {n}", 0.7),
    ("turn down {np} to {n}", 0.7),
    ("bring {np} to {n}", 0.5),
    ("bring {np} down to {n}", 0.4),
    ("bring {np} up to {n}", 0.4),
    ("make {np} {n}", 1),
    ("increase {np} to {n}", 0.8),
    ("raise {np} to {n}", 0.8),
    ("reduce {np} to {n}", 0.7),
    ("decrease {np} to {n}", 0.5),
    ("lower {np} to {n}", 0.9),
    ("drop {np} to {n}", 0.4),
    ("keep {np} at {n}", 0.4),
    ("get {np} to {n}", 0.3),
    ("switch {np} to {n}", 0.5),
    ("crank {np} up to {n}", 0.15),
    ("move {np} to {n}", 0.15),
    ("set {np} {n}", 0.4),
    ("have {np} at {n}", 0.2),
)
_SET_LIGHT = (("dim {np} to {n}", 2), ("brighten {np} to {n}", 1), ("dim {np} down to {n}", 0.3))
_SET_BLINDS = (
    ("open {np} to {n}", 2),
    ("open {np} {n}", 3),
    ("raise {np} {n}", 0.8),
    ("pull up {np} {n}", 0.5),
    ("pull {np} up to {n}", 0.6),
    ("open {np} by {n}", 0.8),
    ("close {np} to {n}", 0.6),
    ("pull {np} down to {n}", 0.5),
)
_SET_NOUN = (("{np} to {n}", 4), ("{np} at {n}", 3), ("{np} {n}", 1), ("{np} to be {n}", 0.3))


def set_command(rng: Rng) -> Draft:
    """Such as "set the lamp in the lounge to thirty percent", "dim the lights to half", ..."""
    device = rng.choice(_SETTABLE)
    item = target(rng, device)
    if chance(rng, 0.22) and device in ASPECT:
        item = with_aspect(rng, item)
    amount = amount_for(rng, device)
    rows = _SET
    if device == "light":
        rows = (*_SET, *_SET_LIGHT)
    elif device == "blinds":
        rows = (*_SET[:10], *_SET_BLINDS, *_SET_BLINDS)
    template, form = weighted(rng, [(row[0], row[1]) for row in rows]), "verb"
    if device == "oven" and chance(rng, 0.3):
        template = rng.choice(("preheat {np} to {n}", "heat {np} to {n}", "preheat {np} at {n}"))
        template = template.replace("heat {np} at", "heat {np} to")
    elif chance(rng, 0.1):
        template, form = weighted(rng, list(_SET_NOUN)), "noun"
    if device == "blinds" and amount.unit is None and not template.endswith("to {n}"):
        amount = percent(rng)
    if amount.said.mark == "<level>" and chance(rng, 0.35):
        # "put the fan on medium" is no "put on": the level says that it is set.
        template, form = (
            rng.choice(("put {np} on {n}", "set {np} on {n}", "have {np} on {n}")),
            "verb",
        )
    if amount.said.text in ("halfway", "half way"):
        template = template.replace(" to {n}", " {n}") if chance(rng, 0.5) else template
    np, loose = with_where(item, rng, inside=0.75)
    core = fill(template, np=np, n=amount.said)
    return finished(rng, "set", core, item, amount, loose, form=form)


def finished(
    rng: Rng,
    action: str,
    core: Phrase,
    item: Target,
    amount: Amount,
    loose: Phrase,
    *,
    form: str = "verb",
) -> Draft:
    """A clause with an amount, its adverbials placed and its unit settled."""
    when = timing(rng, plain=0.68)
    before, after = place(rng, loose, when)
    unit = amount.unit or (implied_unit(item.device) if action == "set" else None)
    answer = when.answer(action, item.device, item.room, amount.value, unit)
    kind = "set" if action == "set" else "change"
    return draft(kind, core, answer, form=form, before=before, after=after)


def amount_for(rng: Rng, device: str) -> Amount:
    """An amount that a device can be set to."""
    if device in PERCENT_DEVICES or device == "tv":
        return fraction(rng, device) if chance(rng, 0.26) else percent(rng, bare=True)
    if device in ("heater", "ac") and chance(rng, 0.1):
        return fraction(rng, device) if chance(rng, 0.5) else percent(rng)
    return degrees(rng, device)


def with_aspect(rng: Rng, item: Target) -> Target:
    """Such as "the brightness of the lamp", "the lamp brightness", or the aspect alone."""
    noun = rng.choice(ASPECT[item.device])
    kind = rng.random()
    the = "the " if chance(rng, 0.85) else ""
    alone = item.device in ("light", "speaker", "thermostat") and noun != "sound"
    if alone and kind < 0.5 and (item.room is None or item.np.mark == "<device>"):
        return item._replace(np=Phrase(f"{the}{noun}", f"the {noun}"))
    if "fan" in noun:
        noun = "speed"
    if kind < 0.75 or item.room == "all":
        return item._replace(np=fill(f"the {noun} of {{np}}", np=item.np))
    return item._replace(np=fill(f"{{np}} {noun}", np=item.np))


_CLIMATE = [
    ("make it {n}", 3),
    ("set it to {n}", 1),
    ("set the temperature to {n}", 4),
    ("set temperature to {n}", 0.7),
    ("set temp to {n}", 0.2),
    ("set the temp to {n}", 0.2),
    ("change the temperature to {n}", 0.7),
    ("put the temperature at {n}", 0.4),
    ("keep the temperature at {n}", 0.4),
    ("turn the temperature up to {n}", 0.5),
    ("turn the temperature down to {n}", 0.5),
    ("lower the temperature to {n}", 0.5),
    ("raise the temperature to {n}", 0.5),
    ("bring the temperature to {n}", 0.3),
]
_ROOM_CLIMATE = [
    ("heat {np} to {n}", 5),
    ("cool {np} to {n}", 5),
    ("heat {np} up to {n}", 1),
    ("cool {np} down to {n}", 1),
    ("warm {np} to {n}", 1),
    ("warm {np} up to {n}", 0.6),
    ("make {np} {n}", 2),
    ("set {np} to {n}", 2),
    ("set {np} temperature to {n}", 1.5),
    ("get {np} to {n}", 0.4),
    ("bring {np} to {n}", 0.4),
    ("keep {np} at {n}", 0.5),
]


def climate_command(rng: Rng) -> Draft:
    """The thermostat without its name: "make it 21 degrees", "heat the office to 19"."""
    amount = degrees(rng, "thermostat")
    kind, room, loose = rng.random(), None, EMPTY
    if kind < 0.08:
        return _wished_climate(rng)
    if kind < 0.45:
        template = weighted(rng, _CLIMATE)
        if chance(rng, 0.55):
            room = any_room(rng) if chance(rng, 0.9) else "all"
            loose = where(rng, room)
        core = fill(template, n=amount.said)
        if loose.text and "temperature" in template and chance(rng, 0.4):
            core = fill(
                template.replace("temperature", "temperature {where}"), n=amount.said, where=loose
            )
            loose = EMPTY
    else:
        template = weighted(rng, _ROOM_CLIMATE)
        room = any_room(rng) if chance(rng, 0.9) or "temperature" in template else "all"
        said = "the whole house" if room == "all" else f"the {room_words(rng, room)}"
        np = Phrase(said, "<room>")
        if amount.unit is None and template.startswith(("make", "set {np} to", "get", "keep")):
            amount = degrees(rng, "thermostat", bare=False)
        core = fill(template, np=np, n=amount.said)
    item = Target(EMPTY, "thermostat", room, EMPTY)
    return finished(rng, "set", core, item, amount, loose)


def _wished_climate(rng: Rng) -> Draft:
    """Such as "I want it 21 degrees in the study", "20 degrees in the attic"."""
    amount = degrees(rng, "thermostat", bare=False)
    room = any_room(rng) if chance(rng, 0.75) else None
    loose = EMPTY if room is None else where(rng, room)
    template = rng.choice(
        (
            "it {n}",
            "it to be {n}",
            "temperature to {n}",
            "temperature at {n}",
            "the temperature at {n}",
            "{n}",
            "the {r} at {n}",
            "the {r} to be {n}",
            "the {r} {n}",
            "{r} to {n}",
        )
    )
    said = EMPTY
    if "{r}" in template:
        room = room or any_room(rng)
        said, loose = Phrase(room_words(rng, room), "<room>"), EMPTY
    elif template == "{n}" and room is None:
        template = "it {n}"
    core = fill(template, n=amount.said, r=said)
    form = "wish" if template.startswith(("it", "the")) else "noun"
    item = Target(EMPTY, "thermostat", room, EMPTY)
    return finished(rng, "set", core, item, amount, loose, form=form)


def garage_halfway(rng: Rng) -> Draft:
    """Such as "open the garage halfway": opening by an amount is setting."""
    item = target(rng, rng.choice(("garage", "door")), room=0.0, everywhere=0.0)
    amount = percent(rng)
    if chance(rng, 0.6):
        amount = Amount(Phrase("halfway", "<fraction>"), 50, "percent")
    core = fill("open {np} {n}", np=item.np, n=amount.said)
    return finished(rng, "set", core, item, amount, EMPTY)


def preheat_command(rng: Rng) -> Draft:
    """Such as "preheat to 200 degrees", "preheat the oven"."""
    when = timing(rng, plain=0.7)
    if chance(rng, 0.3):
        core = words(rng.choice(("preheat the oven", "preheat my oven", "preheat oven")))
        before, after = place(rng, EMPTY, when)
        return draft("set", core, when.answer("set", "oven", None), before=before, after=after)
    amount = degrees(rng, "oven")
    template = rng.choice(("preheat to {n}", "preheat the oven to {n}", "preheat oven to {n}"))
    item = Target(EMPTY, "oven", None, EMPTY)
    return finished(rng, "set", fill(template, n=amount.said), item, amount, EMPTY)
