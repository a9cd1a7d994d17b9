"""Plain commands without an amount: on, off, open, close, lock, start, stop, pause."""

from __future__ import annotations

from .answer import Answer
from .phrase import EMPTY, Phrase, Rng, chance, fill, weighted, words
from .places import Target, any_room, room_words, target, where, with_where
from .shapes import Draft, draft
from .timing import Timing, place, timing
from .vocabulary import gerund

# (verb, particle): "{verb} {np} {particle}" or "{verb} {particle} {np}".
_ON = (
    ("turn", "on", 6.0),
    ("switch", "on", 4.0),
    ("put", "on", 2.5),
    ("power", "on", 0.5),
    ("flip", "on", 0.3),
    ("flick", "on", 0.3),
    ("activate", "", 0.4),
    ("enable", "", 0.3),
)
_OFF = (
    ("turn", "off", 6.0),
    ("switch", "off", 4.0),
    ("shut", "off", 2.0),
    ("kill", "", 2.0),
    ("power", "off", 0.5),
    ("deactivate", "", 0.4),
    ("disable", "", 0.3),
    ("power", "down", 0.2),
    ("flick", "off", 0.2),
)
_OPEN = (("open", "", 5.0), ("raise", "", 2.0), ("pull", "up", 2.0), ("open", "up", 0.5))
_CLOSE = (
    ("close", "", 5.0),
    ("shut", "", 3.0),
    ("lower", "", 2.0),
    ("pull", "down", 0.6),
    ("close", "up", 0.2),
)
_START = (
    ("run", "", 3.0),
    ("start", "", 4.0),
    ("resume", "", 1.5),
    ("begin", "", 1.2),
    ("start", "up", 0.5),
)
_STOP = (("stop", "", 5.0), ("halt", "", 2.0), ("end", "", 1.5))
_VERBS = {
    "on": _ON,
    "off": _OFF,
    "open": _OPEN,
    "close": _CLOSE,
    "lock": (("lock", "", 1.0),),
    "unlock": (("unlock", "", 1.0),),
    "start": _START,
    "stop": _STOP,
    "pause": (("pause", "", 1.0),),
}
_POWERED = [
    "light",
    "light",
    "light",
    "light",
    "fan",
    "fan",
    "heater",
    "heater",
    "ac",
    "ac",
    "thermostat",
    "plug",
    "plug",
    "tv",
    "tv",
    "speaker",
    "speaker",
    "vacuum",
    "coffee_machine",
    "coffee_machine",
    "oven",
    "oven",
    "camera",
]
_MOVING = ["blinds", "blinds", "blinds", "door", "garage"]
_RUNNING = [
    "vacuum",
    "vacuum",
    "vacuum",
    "speaker",
    "speaker",
    "fan",
    "heater",
    "ac",
    "tv",
    "coffee_machine",
    "oven",
    "camera",
    "thermostat",
]
_DEVICES = {
    "on": _POWERED,
    "off": _POWERED,
    "open": [*_MOVING, *_MOVING, "oven"],
    "close": [*_MOVING, *_MOVING, "oven"],
    "lock": ["door", "door", "door", "garage"],
    "unlock": ["door", "door", "door", "garage"],
    "start": _RUNNING,
    "stop": [*_RUNNING, "blinds"],
    "pause": [
        "vacuum",
        "vacuum",
        "speaker",
        "speaker",
        "tv",
        "tv",
        "oven",
        "camera",
        "coffee_machine",
        "fan",
    ],
}
_ANY = tuple(dict.fromkeys((*_POWERED, *_MOVING)))


def switch_command(rng: Rng) -> Draft:
    """Such as "turn on the kitchen light", "could you have the blinds closed at noon", ..."""
    action = weighted(
        rng,
        [
            ("on", 7),
            ("off", 7),
            ("open", 3),
            ("close", 3),
            ("lock", 1.6),
            ("unlock", 1.3),
            ("start", 3.4),
            ("stop", 2.4),
            ("pause", 1.6),
        ],
    )
    device = rng.choice(_DEVICES[action]) if chance(rng, 0.94) else rng.choice(_ANY)
    item = target(rng, device, room=0.3 if device == "door" else 0.6)
    when = timing(rng)
    if action in ("on", "off", "open", "close", "lock", "unlock") and chance(rng, 0.14):
        return _state(rng, action, item, when)
    verb, particle, _ = weighted(rng, [(row, row[2]) for row in _VERBS[action]])
    if action == "start" and device in ("speaker", "tv") and chance(rng, 0.6):
        verb, particle = "play", ""
        if "music" in item.np.text and chance(rng, 0.5):
            item = item._replace(np=Phrase(item.np.text.replace("the ", "some "), item.np.mark))
    if chance(rng, 0.05) and verb in ("run", "start", "stop", "turn", "switch", "close", "open"):
        core, loose = _let(rng, verb, particle, item)
    else:
        core, loose = _clause(rng, verb, particle, item)
    answer = when.answer(action, item.device, item.room)
    before, after = place(rng, loose, when)
    return draft("switch", core, answer, before=before, after=after)


def _clause(rng: Rng, verb: str, particle: str, item: Target) -> tuple[Phrase, Phrase]:
    """The clause, and the room adverbial where it is still to be placed."""
    if not particle:
        np, loose = with_where(item, rng)
        return fill(f"{verb} {{np}}", np=np), loose
    if chance(rng, 0.5):
        np, loose = with_where(item, rng, inside=0.4)
        return fill(f"{verb} {{np}} {particle}", np=np), loose
    np, loose = with_where(item, rng)
    return fill(f"{verb} {particle} {{np}}", np=np), loose


def _let(rng: Rng, verb: str, particle: str, item: Target) -> tuple[Phrase, Phrase]:
    """Such as "let the vacuum run", "the lamp in the hall, turn it off": the device said first."""
    np, loose = with_where(item, rng, inside=0.6)
    if chance(rng, 0.5):
        pronoun = "it" if not item.np.text.endswith("s") else "them"
        return fill(f"{{np}}, {verb} {pronoun} {particle}", np=np), loose
    make = rng.choice(("have", "let", "make"))
    return fill(f"{make} {{np}} {verb} {particle}", np=np), loose


_STATES = {
    "on": ("on",),
    "off": ("off",),
    "open": ("open",),
    "close": ("closed", "shut"),
    "lock": ("locked",),
    "unlock": ("unlocked",),
}


def _state(rng: Rng, action: str, item: Target, when: Timing) -> Draft:
    """Such as "the lights on", as in "kitchen lights on" or "can we have the lights on"."""
    np, loose = with_where(item, rng, inside=0.4)
    state = rng.choice(_STATES[action])
    if action == "off" and item.device == "light" and chance(rng, 0.1):
        state = "out"
    core = fill(f"{{np}} {state}", np=np)
    before, after = place(rng, loose, when)
    answer = when.answer(action, item.device, item.room)
    return draft("switch", core, answer, form="noun", before=before, after=after)


def everything_command(rng: Rng) -> Draft:
    """Such as "turn everything off": action, room all (or the room said), no device."""
    action = weighted(rng, [("off", 5), ("on", 2)])
    verb, particle, _ = weighted(
        rng, [(row, row[2]) for row in _VERBS[action] if row[0] not in ("flip", "put", "shut")]
    )
    thing = words(rng.choice(("everything", "everything", "everything", "all devices")))
    loose, room = EMPTY, "all"
    if chance(rng, 0.3):
        room = any_room(rng)
        loose = where(rng, room)
    elif chance(rng, 0.15):
        loose = where(rng, "all")
    if chance(rng, 0.12):
        core, form = fill("{np} " + action, np=thing), "noun"
    else:
        template = f"{verb} {{np}} {particle}" if chance(rng, 0.6) else f"{verb} {particle} {{np}}"
        core, form = fill(template, np=thing), "verb"
    when = timing(rng, plain=0.8)
    before, after = place(rng, loose, when)
    answer = when.answer(action, None, room)
    return draft("switch", core, answer, form=form, before=before, after=after)


def music_command(rng: Rng) -> Draft:
    """Such as "play some music on the terrace", "put some music on": the speaker."""
    verb = weighted(rng, [("play", 7), ("start", 1.5), ("resume", 1), ("put on", 1.5)])
    noun = weighted(
        rng,
        [("some music", 5), ("music", 5), ("the music", 2), ("the radio", 3), ("the stereo", 1)],
    )
    core = Phrase(f"{verb} {noun}", f"{verb} <device>")
    loose, room = EMPTY, None
    if chance(rng, 0.7):
        room = any_room(rng) if chance(rng, 0.93) else "all"
        loose = where(rng, room)
    when = timing(rng)
    before, after = place(rng, loose, when)
    answer = when.answer("on" if verb == "put on" else "start", "speaker", room)
    return draft("switch", core, answer, before=before, after=after)


def cleaning_command(rng: Rng) -> Draft:
    """Such as "vacuum the kitchen", "clean the whole house for an hour": vacuum, start."""
    verb = weighted(rng, [("clean", 4), ("vacuum", 5), ("hoover", 1.5), ("sweep", 0.15)])
    if chance(rng, 0.1):
        room, np = "all", words(rng.choice(("the whole house", "everywhere", "all the rooms")))
        np = Phrase(np.text, "<everywhere>")
    else:
        room = any_room(rng)
        article = weighted(rng, [("the ", 10), ("my ", 1), ("", 0.5)])
        np = Phrase(article + room_words(rng, room), "<room>")
    form = rng.random()
    robot = Phrase(
        rng.choice(("the robot", "the vacuum", "the hoover", "the robot vacuum")), "<robot>"
    )
    if form < 0.12:
        verb = f"{rng.choice(('start', 'begin'))} {gerund(verb)}"
        core = fill(f"{verb} {{np}}", np=np)
    elif form < 0.22:
        make = rng.choice(("have {r}", "let {r}", "get {r} to", "make {r}"))
        core = fill(f"{make} {verb} {{np}}", r=robot, np=np)
    else:
        core = fill(f"{verb} {{np}}", np=np)
    when = timing(rng, plain=0.5)
    before, after = place(rng, EMPTY, when)
    answer = when.answer("start", "vacuum", room)
    return draft("switch", core, answer, before=before, after=after)


_PRONOUN = {
    "on": ("turn it on", "switch it on", "turn them on", "switch them on", "put it on"),
    "off": ("turn it off", "switch it off", "shut it off", "turn them off", "kill it"),
    "open": ("open it", "open them", "pull it up"),
    "close": ("close it", "shut it", "close them"),
    "lock": ("lock it",),
    "unlock": ("unlock it",),
    "start": ("start it", "resume", "start"),
    "stop": ("stop it", "stop", "stop that"),
    "pause": ("pause it", "pause"),
    "increase": ("turn it up", "turn it up a bit"),
    "decrease": ("turn it down", "turn it down a bit"),
    "cancel": ("cancel it", "cancel", "cancel that"),
}


def pronoun_command(rng: Rng) -> Draft:
    """Such as "turn it off": the action alone, for no device is stated."""
    action = rng.choice(tuple(_PRONOUN))
    core = words(rng.choice(_PRONOUN[action]))
    when = timing(rng, plain=0.7)
    loose, room = EMPTY, None
    if chance(rng, 0.2):
        room = any_room(rng)
        loose = where(rng, room)
    before, after = place(rng, loose, when)
    return draft("switch", core, when.answer(action, None, room), before=before, after=after)


def silence_command(rng: Rng) -> Draft:
    """Such as "mute", "mute the kitchen speaker": set to 0 percent."""
    answer = Answer("set", "speaker", None, 0, "percent")
    if chance(rng, 0.35):
        return draft("set", words(rng.choice(("mute", "mute it", "mute the sound"))), answer)
    device = weighted(rng, [("speaker", 5), ("tv", 1.5)])
    item = target(rng, device, room=0.5)
    np, loose = with_where(item, rng)
    before, after = place(rng, loose, None)
    core = fill("mute {np}", np=np)
    answer = Answer("set", device, item.room, 0, "percent")
    return draft("set", core, answer, before=before, after=after)
