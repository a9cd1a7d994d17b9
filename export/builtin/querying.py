"""Questions about a device's state."""

from __future__ import annotations

from .answer import Answer
from .phrase import EMPTY, Phrase, Rng, chance, fill, weighted, words
from .places import Target, any_room, room_words, target, where
from .reminding import named_clock
from .shapes import Draft, draft

_STATES: dict[str, tuple[str, ...]] = {
    "light": ("on", "on", "off", "still on", "switched on", "turned off", "turned on"),
    "fan": ("on", "off", "running", "still on", "still running"),
    "heater": ("on", "off", "still on", "running"),
    "ac": ("on", "off", "running", "still on"),
    "thermostat": ("on", "off"),
    "blinds": ("open", "closed", "up", "down", "shut", "still open"),
    "door": ("open", "closed", "locked", "unlocked", "shut", "still open", "still unlocked"),
    "garage": ("open", "closed", "locked", "shut", "still open"),
    "plug": ("on", "off", "switched on", "still on"),
    "tv": ("on", "off", "still on", "paused"),
    "speaker": ("on", "playing", "off", "still playing"),
    "vacuum": ("running", "done", "finished", "charging", "on", "still running", "still cleaning"),
    "coffee_machine": ("on", "off", "ready", "done", "still on"),
    "oven": ("on", "off", "hot", "ready", "still on", "preheated"),
    "camera": ("on", "off", "recording", "working"),
}
_DID = {
    "light": ("turn off", "switch off", "leave on", "turn on"),
    "fan": ("turn off", "leave on", "switch off"),
    "heater": ("turn off", "leave on", "turn down"),
    "ac": ("turn off", "leave on", "switch off"),
    "blinds": ("close", "open", "shut"),
    "door": ("lock", "close", "shut", "leave open", "unlock", "leave unlocked"),
    "garage": ("close", "lock", "shut", "leave open"),
    "plug": ("turn off", "switch off", "leave on"),
    "tv": ("turn off", "leave on", "switch off"),
    "speaker": ("turn off", "leave on"),
    "vacuum": ("start", "stop", "turn off"),
    "coffee_machine": ("turn off", "leave on", "start"),
    "oven": ("turn off", "leave on", "switch off", "preheat"),
    "camera": ("turn on", "turn off"),
    "thermostat": ("turn down", "turn off"),
}
_PAST = {
    "turn": "turned",
    "switch": "switched",
    "leave": "left",
    "close": "closed",
    "open": "opened",
    "shut": "shut",
    "lock": "locked",
    "unlock": "unlocked",
    "start": "started",
    "stop": "stopped",
    "preheat": "preheated",
}
_LEVEL_DEVICES = [
    "tv",
    "light",
    "fan",
    "heater",
    "ac",
    "thermostat",
    "thermostat",
    "blinds",
    "speaker",
    "oven",
]


_WHETHER = (
    "check if",
    "check whether",
    "tell me if",
    "do you know if",
    "any idea if",
    "i want to know if",
    "i'd like to know if",
    "can you tell me if",
    "can you check if",
    "could you check whether",
    "see if",
    "i wonder if",
    "let me know if",
)


def _be(np: Phrase) -> str:
    last = np.text.split()[-1]
    return "are" if last.endswith("s") or last == "they" else "is"


def _placed(item: Target) -> Phrase:
    return fill("{np} {where}", np=item.np, where=item.where)


def state_query(rng: Rng) -> Draft:
    """Such as "is the garage door open", "did I lock the back door"."""
    device = rng.choice(tuple(_STATES))
    if chance(rng, 0.2):
        device = rng.choice(("door", "garage", "light", "oven"))
    item = target(rng, device, room=0.4)
    answer = Answer("query", item.device, item.room)
    kind = rng.random()
    if kind < 0.55:
        state = rng.choice(_STATES[device])
        order = "{np} " + state + " {w}" if chance(rng, 0.5) else "{np} {w} " + state
        ask = _be(item.np)
        if chance(rng, 0.22):
            whether = f"{rng.choice(_WHETHER)} {order.replace('{np}', '{np} ' + ask, 1)}"
            core = fill(whether, np=item.np, w=item.where)
        elif item.room != "all" and item.np.text.endswith("s") and chance(rng, 0.15):
            np = Phrase(f"any {item.np.text.split()[-1]}", "any <device>")
            if item.where.text or item.room is None:
                core = fill(f"are {order}", np=np, w=item.where)
            else:
                core = fill(f"{ask} {order}", np=item.np, w=item.where)
        else:
            core = fill(f"{ask} {order}", np=item.np, w=item.where)
        return draft("query", core, answer, form="question")
    if kind < 0.85:
        verb, _, particle = rng.choice(_DID[device]).partition(" ")
        who = rng.choice(("i", "i", "i", "i", "we", "you"))
        head = f"have {who} {_PAST[verb]}" if chance(rng, 0.3) else f"did {who} {verb}"
        if particle in ("on", "off") and chance(rng, 0.4) and verb != "leave":
            core = fill(f"{head} {particle} {{np}}", np=_placed(item))
        else:
            core = fill(f"{head} {{np}} {particle}", np=_placed(item))
        return draft("query", core, answer, form="question")
    return _status(rng, item, answer)


def _status(rng: Rng, item: Target, answer: Answer) -> Draft:
    template = rng.choice(
        (
            "what's the status of {np}",
            "what is the status of {np}",
            "what is the state of {np}",
            "what is {np} doing",
            "status of {np}",
            "check {np}",
            "check on {np}",
            "how long is left on {np}",
            "how much time is left on {np}",
            "is {np} okay",
            "is {np} on or off",
            "check the status of {np}",
            "what's {np} doing right now",
            "did {np} finish",
            "has {np} finished",
            "show me the status of {np}",
            "is {np} on",
        )
    )
    return draft("query", fill(template, np=_placed(item)), answer, form="question")


def level_query(rng: Rng) -> Draft:
    """Such as "what is the thermostat set to", "how bright is the lamp", "what's the volume"."""
    device = rng.choice(_LEVEL_DEVICES)
    item = target(rng, device, room=0.4, everywhere=0.0)
    templates = [
        "what {be} {np} set to",
        "what {be} {np} set at",
        "what did i set {np} to",
        "what {be} {np} at",
        "what temperature {be} {np} set to",
    ]
    if device not in ("heater", "ac", "thermostat", "oven"):
        templates.pop()
    if device == "tv":
        templates = []
    extra = {
        "light": ["how bright {be} {np}", "what is the brightness of {np}"],
        "fan": ["how fast {be} {np}", "what speed {be} {np} on", "what is the fan speed"],
        "speaker": ["how loud {be} {np}", "what is the volume", "what's the volume of {np}"],
        "tv": ["how loud {be} {np}", "what's the volume of {np}"],
        "oven": ["how hot {be} {np}", "what temperature {be} {np}", "what is the oven temperature"],
        "blinds": ["how far open {be} {np}"],
    }
    template = rng.choice((*templates, *extra.get(device, [])))
    room = item.room if "{np}" in template else None
    core = fill(template, np=_placed(item), be=words(_be(item.np)))
    return draft("query", core, Answer("query", device, room), form="question")


_CLIMATE = {
    "temperature": (
        "what is the temperature",
        "what's the temperature",
        "what temperature is it",
        "how warm is it",
        "how hot is it",
        "how cold is it",
        "tell me the temperature",
        "what is the current temperature",
        "what's the temperature like",
        "what's the temp",
        "what's the room temperature",
        "how many degrees is it",
        "check the temperature",
        "give me the temperature",
        "temperature",
        "show me the temperature",
        "what does the thermometer say",
        "is it warm",
        "is it cold",
        "read me the temperature",
    ),
    "humidity": (
        "what is the humidity",
        "what's the humidity",
        "how humid is it",
        "tell me the humidity",
        "what is the humidity level",
        "is it humid",
        "check the humidity",
        "how high is the humidity",
        "what's the current humidity",
        "humidity",
        "what is the air humidity",
        "how damp is it",
        "what's the humidity like",
        "show me the humidity",
    ),
}


def climate_query(rng: Rng) -> Draft:
    """Such as "what is the temperature in the attic", "how humid is it"."""
    device = weighted(rng, [("temperature", 6), ("humidity", 4)])
    room, loose = None, EMPTY
    if chance(rng, 0.62):
        room = any_room(rng) if chance(rng, 0.96) else "all"
        loose = where(rng, room)
    elif chance(rng, 0.15):
        loose = Phrase(rng.choice(("in here", "inside", "right now", "at the moment")), "")
    answer = Answer("query", device, room)
    if room not in (None, "all") and chance(rng, 0.3):
        place = Phrase(room_words(rng, room or ""), "<room>")
        template = rng.choice(
            (
                f"what's the {{r}} {device}",
                f"what is the {{r}} {device}",
                f"what's the {device} of the {{r}}",
                f"{{r}} {device}",
                f"tell me the {{r}} {device}",
                "how warm is the {r}" if device == "temperature" else "how humid is the {r}",
                "how hot is the {r}" if device == "temperature" else "how damp is the {r}",
                "how cold is the {r}" if device == "temperature" else "how humid is the {r}",
            )
        )
        return draft("query", fill(template, r=place), answer, form="question")
    template = rng.choice(_CLIMATE[device])
    if template in ("temperature", "humidity") and not loose.text:
        template = f"what is the {template}"
    core = fill("{c} {w}", c=words(template), w=loose)
    if room is not None and chance(rng, 0.1):
        return draft("query", words(template), answer, form="question", before=(loose,))
    return draft("query", core, answer, form="question")


_ASKED = {
    "timer": (
        "how long is left on {np}",
        "how much time is left on {np}",
        "how long is left on {np}",
        "how long does {np} have left",
        "how much longer on {np}",
        "how many minutes are left on {np}",
        "what's left on {np}",
        "is {np} done",
        "is {np} still running",
        "check {np}",
        "when does {np} end",
        "when will {np} go off",
        "how much time does {np} have",
        "is {np} running",
        "did i set {np}",
        "what's the status of {np}",
        "time left on {np}",
        "how long until {np} goes off",
        "how long left on {np}",
        "how much time left on {np}",
        "what is left on {np}",
        "how is {np} doing",
    ),
    "alarm": (
        "when is {np}",
        "what time is {np}",
        "is {np} set",
        "is {np} on",
        "did i set {np}",
        "when does {np} go off",
        "what time is {np} set for",
        "check {np}",
        "is {np} still on",
        "do i have {np}",
        "when will {np} ring",
        "have i set {np}",
        "is {np} active",
    ),
    "reminder": (
        "when is {np}",
        "what time is {np}",
        "is {np} set",
        "did i set {np}",
        "check {np}",
        "what is {np}",
        "have i set {np}",
        "do i have {np}",
    ),
}


def clock_query(rng: Rng, held: bool) -> Draft:
    """Such as "how long is left on the pasta timer", "is my 7 am alarm on", "when is my alarm"."""
    device = weighted(rng, [("timer", 5), ("alarm", 3), ("reminder", 2)])
    np, answer = named_clock(rng, device, "query", held)
    if chance(rng, 0.12):
        article = "an " if device == "alarm" else "a "
        np = Phrase(article + np.text.removeprefix("the ").removeprefix("my "), np.mark)
        template = rng.choice(
            ("is there {np}", "do i have {np}", "did i set {np}", "is there {np} set")
        )
        return draft("query", fill(template, np=np), answer, form="question")
    if chance(rng, 0.1):
        plural = device + "s"
        template = rng.choice(
            (
                "what are my {p}",
                "list my {p}",
                "do i have any {p}",
                "show my {p}",
                "show me my {p}",
                "are there any {p} set",
                f"when is my next {device}",
                f"what's my next {device}",
            )
        )
        core = fill(template, p=words(plural))
        return draft("query", core, Answer("query", device), form="question")
    return draft("query", fill(rng.choice(_ASKED[device]), np=np), answer, form="question")


_BARE = (
    "is it open",
    "is it closed",
    "is it on",
    "is it off",
    "is it locked",
    "is it still on",
    "is it running",
    "are they on",
    "are they open",
    "did i lock it",
    "did i turn it off",
    "did i close it",
    "did i leave it on",
    "have i locked it",
    "is it done",
    "how long is left",
    "how much time is left",
    "did i leave it open",
    "is it unlocked",
)


def bare_query(rng: Rng) -> Draft:
    """Such as "is it open", "did I lock it", "how long is left": query, no device is stated."""
    if chance(rng, 0.15):
        said = rng.choice(("is everything off", "is everything on", "did i turn everything off"))
        return draft("query", words(said), Answer("query", room="all"), form="question")
    return draft("query", words(rng.choice(_BARE)), Answer("query"), form="question")
