"""Commands with a direction: increase, decrease, with or without an amount."""

from __future__ import annotations

from .amounts import CELSIUS_DEVICES, Amount, change_of_degrees, percent
from .phrase import EMPTY, Phrase, Rng, chance, fill, weighted, words
from .places import Target, any_room, room_words, target, where, with_where
from .setting import ASPECT, amount_for, finished, with_aspect
from .shapes import Draft, draft
from .timing import place, timing

_UP = (
    ("turn up {np}", 3),
    ("turn {np} up", 4),
    ("increase {np}", 1.2),
    ("bring {np} up", 0.3),
    ("crank up {np}", 0.3),
    ("crank {np} up", 0.2),
    ("boost {np}", 0.2),
)
_DOWN = (
    ("turn down {np}", 3),
    ("turn {np} down", 4),
    ("decrease {np}", 1),
    ("reduce {np}", 1),
    ("bring {np} down", 0.3),
)
# What a blind does by an amount; without one, to raise and to lower are to open and to close.
_BY = {"increase": "raise {np} by {n}", "decrease": "lower {np} by {n}"}
_LEVELS = [
    "light",
    "light",
    "light",
    "fan",
    "fan",
    "heater",
    "heater",
    "heater",
    "ac",
    "ac",
    "thermostat",
    "thermostat",
    "speaker",
    "speaker",
    "speaker",
    "tv",
]
_A_BIT = ("a bit", "a bit", "a little", "a little bit", "slightly", "a touch", "a notch", "some")


def change_command(rng: Rng) -> Draft:
    """Such as "turn the heating up by 2 degrees", "dim the lights a bit", "volume down", ..."""
    device = rng.choice(_LEVELS)
    action = rng.choice(("increase", "decrease"))
    if chance(rng, 0.03):
        item = target(rng, "blinds")
        np, loose = with_where(item, rng, inside=0.6)
        amount = percent(rng, bare=True)
        core = fill(_BY[action], np=np, n=amount.said)
        return finished(rng, action, core, item, amount, loose)
    item = target(rng, device)
    bare_aspect = False
    if chance(rng, 0.3) and device in ASPECT:
        item = with_aspect(rng, item)
        bare_aspect = item.np.mark.startswith("the ") and "<" not in item.np.mark
    rows = list(_UP if action == "increase" else _DOWN)
    if device == "light":
        rows += [("brighten {np}" if action == "increase" else "dim {np}", 9.0)]
        rows += [("brighten up {np}" if action == "increase" else "dim down {np}", 0.5)]
    if bare_aspect:
        rows += [("raise {np}" if action == "increase" else "lower {np}", 3.0)]
    if device == "fan":
        rows += [("speed up {np}" if action == "increase" else "slow down {np}", 1.5)]
    template, form = weighted(rng, rows), "verb"
    if chance(rng, 0.08):
        template, form = "{np} up" if action == "increase" else "{np} down", "noun"
        if bare_aspect and chance(rng, 0.7):
            item = item._replace(np=words(item.np.text.removeprefix("the ")))
    np, loose = with_where(item, rng, inside=0.6)
    return _graded(rng, action, fill(template, np=np), item, loose, form=form)


def _graded(
    rng: Rng, action: str, core: Phrase, item: Target, loose: Phrase, *, form: str = "verb"
) -> Draft:
    """Add how much: nothing, "a bit", or "by N"."""
    none = Amount(EMPTY, 0, None)
    kind = rng.random()
    if kind < 0.42:
        return _unquantified(rng, action, core, item, loose, form)
    if kind < 0.6:
        core = fill("{core} {bit}", core=core, bit=words(rng.choice(_A_BIT)))
        return _unquantified(rng, action, core, item, loose, form)
    amount = none
    if item.device in CELSIUS_DEVICES:
        amount = change_of_degrees(rng)
    elif chance(rng, 0.12):
        said, value = rng.choice((("half", 50), ("a quarter", 25)))
        amount = Amount(Phrase(said, "<fraction>"), value, "percent")
    else:
        amount = percent(rng, bare=True)
    bare = amount.said.mark in ("<n>", "<fraction>")
    by = "by " if bare or chance(rng, 0.8) else ""
    core = fill(f"{{core}} {by}{{n}}", core=core, n=amount.said)
    return finished(rng, action, core, item, amount, loose, form=form)


def _unquantified(
    rng: Rng, action: str, core: Phrase, item: Target, loose: Phrase, form: str
) -> Draft:
    when = timing(rng, plain=0.75)
    before, after = place(rng, loose, when)
    answer = when.answer(action, item.device, item.room)
    return draft("change", core, answer, form=form, before=before, after=after)


# (word, device, action) of "make it ..."; the room may be what is made so.
_DEGREES = (
    ("warmer", "thermostat", "increase"),
    ("warmer", "thermostat", "increase"),
    ("hotter", "thermostat", "increase"),
    ("cooler", "thermostat", "decrease"),
    ("cooler", "thermostat", "decrease"),
    ("colder", "thermostat", "decrease"),
    ("brighter", "light", "increase"),
    ("brighter", "light", "increase"),
    ("darker", "light", "decrease"),
    ("dimmer", "light", "decrease"),
    ("louder", "speaker", "increase"),
    ("louder", "speaker", "increase"),
    ("quieter", "speaker", "decrease"),
    ("softer", "speaker", "decrease"),
)
_OF_DEVICE = {
    "thermostat": ("warmer", "cooler"),
    "light": ("brighter", "dimmer"),
    "speaker": ("louder", "quieter"),
    "tv": ("louder", "quieter"),
    "fan": ("faster", "slower"),
    "heater": ("warmer", "cooler"),
    "ac": ("warmer", "cooler"),
    "oven": ("hotter", "cooler"),
}


def comparative_command(rng: Rng) -> Draft:
    """Such as "make it warmer in here", "make the kitchen a bit brighter"."""
    grade = words(weighted(rng, [("", 5), ("a bit ", 2), ("a little ", 1.4), ("slightly ", 0.7)]))
    if chance(rng, 0.4):
        device = rng.choice(tuple(_OF_DEVICE))
        index = rng.randint(0, 1)
        item = target(rng, device, room=0.45)
        np, loose = with_where(item, rng, inside=0.7)
        core = fill(f"make {{np}} {{g}} {_OF_DEVICE[device][index]}", np=np, g=grade)
        return _unquantified(rng, ("increase", "decrease")[index], core, item, loose, "verb")
    word, device, action = rng.choice(_DEGREES)
    room, loose, np = None, EMPTY, words("it")
    kind = rng.random()
    if kind < 0.3:
        room = any_room(rng)
        loose = where(rng, room)
    elif kind < 0.5 and device != "speaker":
        room = any_room(rng)
        np = Phrase(f"the {room_words(rng, room)}", "<room>")
    elif kind < 0.6:
        loose = words("in here")
    item = Target(EMPTY, device, room, EMPTY)
    if device == "thermostat" and chance(rng, 0.2):
        amount = change_of_degrees(rng)
        if amount.unit is not None:
            core = fill(f"make {{np}} {{n}} {word}", np=np, n=amount.said)
            return finished(rng, action, core, item, amount, loose)
    if chance(rng, 0.06) and np.text == "it":
        core, form = fill(f"{{g}} {word}", g=grade), "noun"
    elif chance(rng, 0.1):
        core, form = fill(f"{{np}} {{g}} {word}", np=np, g=grade), "wish"
    else:
        core, form = fill(f"make {{np}} {{g}} {word}", np=np, g=grade), "verb"
    return _unquantified(rng, action, core, item, loose, form)


def dimming_room_command(rng: Rng) -> Draft:
    """Such as "dim the kitchen to 20", "brighten the study", "warm up the attic"."""
    room = any_room(rng)
    np = Phrase(f"the {room_words(rng, room)}", "<room>")
    action = rng.choice(("increase", "decrease"))
    if chance(rng, 0.3):
        verb = {"increase": ("warm up", "heat up"), "decrease": ("cool down", "cool")}[action]
        core = fill(f"{rng.choice(verb)} {{np}}", np=np)
        item = Target(EMPTY, "thermostat", room, EMPTY)
        return _unquantified(rng, action, core, item, EMPTY, "verb")
    core = fill("brighten {np}" if action == "increase" else "dim {np}", np=np)
    item = Target(EMPTY, "light", room, EMPTY)
    if chance(rng, 0.4):
        amount = amount_for(rng, "light")
        return finished(rng, "set", fill("{c} to {n}", c=core, n=amount.said), item, amount, EMPTY)
    return _graded(rng, action, core, item, EMPTY)
