"""Requests next to what the contract covers, which it answers with `none` all the same."""

from __future__ import annotations

from .answer import NONE
from .clock import at_time, duration
from .labels import thing
from .phrase import Phrase, Rng, chance, fill, weighted
from .places import any_room, room_words, target, where
from .shapes import Draft
from .tables import lines
from .vocabulary import COLOURS, FOREIGN_DEVICES, FOREIGN_ROOMS

_NONE = NONE.to_json()


def refuse(
    core: Phrase,
    *,
    form: str = "free",
    before: tuple[Phrase, ...] = (),
    after: tuple[Phrase, ...] = (),
) -> Draft:
    """A draft that is answered with `none`."""
    return Draft("none", core, _NONE, form, before, after)


FOREIGN_VERBS = lines("foreign_verbs")


def foreign_device(rng: Rng) -> Draft:
    """Such as "turn on the kettle", "open the window in the kitchen", "lock the zorbel"."""
    word = rng.choice(FOREIGN_DEVICES)
    if chance(rng, 0.25):
        word = thing(rng, False)
    article = weighted(rng, [("the ", 10), ("my ", 1.5), ("", 0.6), ("a ", 0.3)])
    x = Phrase(article + word, "<other>")
    if chance(rng, 0.25):
        x = Phrase(f"{article}{room_words(rng, any_room(rng))} {word}", "<room> <other>")
    number = Phrase(str(rng.randint(1, 100)), "<n>")
    core = fill(rng.choice(FOREIGN_VERBS), x=x, n=number)
    after: list[Phrase] = []
    if chance(rng, 0.35):
        after.append(where(rng, any_room(rng)))
    if chance(rng, 0.2):
        after.append(at_time(rng)[0] if chance(rng, 0.5) else duration(rng)[0])
    form = "question" if core.text.startswith(("is ", "did ")) else "verb"
    return refuse(core, form=form, after=tuple(after))


def foreign_room(rng: Rng) -> Draft:
    """Such as "turn on the pantry light", "open the blinds in the gym"."""
    device = rng.choice(
        (
            "light",
            "light",
            "light",
            "fan",
            "heater",
            "blinds",
            "plug",
            "door",
            "tv",
            "speaker",
            "camera",
            "ac",
        )
    )
    item = target(rng, device, room=0.0, everywhere=0.0)
    place = rng.choice(FOREIGN_ROOMS) if chance(rng, 0.8) else "garage"
    noun = item.np.text.removeprefix("the ").removeprefix("my ").removeprefix("our ")
    if chance(rng, 0.5):
        x = Phrase(f"the {place} {noun}", "<other room> <device>")
    else:
        preposition = rng.choice(("in", "in", "in", "on", "at"))
        x = Phrase(f"{item.np.text} {preposition} the {place}", "<device> in <other room>")
    template = rng.choice(FOREIGN_VERBS[:36])
    core = fill(template, x=x, n=Phrase(str(rng.randint(1, 100)), "<n>"))
    if chance(rng, 0.12):
        core = Phrase(
            rng.choice(
                (
                    "what is the temperature in the {p}",
                    "vacuum the {p}",
                    "how humid is it in the {p}",
                    "heat the {p} to {n} degrees",
                    "cool the {p} to {n}",
                    "clean the {p}",
                )
            ).format(p=place, n=rng.randint(16, 25)),
            "<other room> climate",
        )
    form = "question" if core.text.startswith(("is ", "did ", "what", "how")) else "verb"
    return refuse(core, form=form)


def colour_request(rng: Rng) -> Draft:
    """Such as "set the light to blue", "make the lamp in the kitchen red"."""
    item = target(rng, "light")
    colour = Phrase(rng.choice(COLOURS), "<colour>")
    template = rng.choice(
        (
            "set {x} to {c}",
            "make {x} {c}",
            "turn {x} {c}",
            "change {x} to {c}",
            "switch {x} to {c}",
            "i want {x} {c}",
            "set {x} {c}",
            "change the colour of {x} to {c}",
            "{x} to {c}",
            "set the color of {x} to {c}",
        )
    )
    x = fill("{np} {w}", np=item.np, w=item.where)
    return refuse(fill(template, x=x, c=colour), form="verb")


PLAIN = [
    "light",
    "fan",
    "heater",
    "ac",
    "door",
    "garage",
    "tv",
    "speaker",
    "vacuum",
    "oven",
    "camera",
    "window",
    "kettle",
    "alarm",
]


_STATEMENTS = lines("statements")
_ABOUT = lines("about")
_PAST = [
    "turned on",
    "turned off",
    "switched on",
    "switched off",
    "opened",
    "closed",
    "locked",
    "unlocked",
    "started",
    "stopped",
    "paused",
    "cleaned",
    "bought",
    "sold",
    "fixed",
    "broke",
    "moved",
    "left on",
    "dimmed",
    "unplugged",
    "painted",
    "forgot",
]
_WHO = [
    "i",
    "i",
    "i",
    "we",
    "he",
    "she",
    "they",
    "mum",
    "dad",
    "my wife",
    "my husband",
    "somebody",
    "someone",
    "the kids",
    "sarah",
    "tom",
]
_WHEN = [
    "",
    "already",
    "yesterday",
    "last night",
    "an hour ago",
    "this morning",
    "before",
    "again",
    "myself",
    "earlier",
    "by mistake",
    "just now",
    "for you",
    "a minute ago",
    "two hours ago",
]


def report(rng: Rng) -> Draft:
    """Such as "I switched off the oven already": what has happened is no command."""
    item = target(rng, rng.choice(PLAIN[:11]), room=0.4)
    np = fill("{np} {w}", np=item.np, w=item.where)
    verb = rng.choice(_PAST)
    who = rng.choice(_WHO)
    if chance(rng, 0.4):
        who += {"i": " have", "we": " have", "they": " have"}.get(who, " has")
    already = rng.choice(("", "", "", " already", " just"))
    core = fill(f"{who}{already} {verb} {{np}} {rng.choice(_WHEN)}", np=np)
    return refuse(Phrase(core.text, f"report {verb} {item.np.mark}"), form="free")


_HALVES = lines("halves")


def near_miss(rng: Rng) -> Draft:
    """Statements and questions around devices, and halves of commands."""
    table, mark = weighted(
        rng,
        [((_STATEMENTS, "statement"), 5), ((_ABOUT, "about"), 6), ((_HALVES, "half"), 1.2)],
    )
    index = rng.randrange(len(table))
    device = rng.choice(PLAIN)
    if chance(rng, 0.2):
        device = rng.choice(
            ("thermostat", "lamp", "lights", "radiator", "blinds", "hoover", "timer")
        )
    text = table[index].format(
        d=device,
        r=room_words(rng, any_room(rng)),
        n=rng.choice((rng.randint(1, 40), rng.randint(1, 200))),
        m=rng.randint(1, 500),
    )
    form = "question" if mark == "about" else "free"
    return refuse(Phrase(text, f"{mark} {table[index]}"), form=form)


_MUSIC = lines("errands")
_GENRES = [
    "jazz",
    "rock",
    "classical music",
    "pop",
    "hip hop",
    "country",
    "metal",
    "blues",
    "my favourite song",
    "reggae",
    "opera",
    "techno",
]


def other_errand(rng: Rng) -> Draft:
    """Known verbs on things that no device of the contract does."""
    index = rng.randrange(len(_MUSIC))
    if chance(rng, 0.25):
        index = rng.randrange(30)
    text = _MUSIC[index].format(
        x=thing(rng, False),
        y=rng.choice(("sarah", "the beatles", "mum", "queen", "tom", "adele", "mozart", "dad")),
        g=rng.choice(_GENRES),
        r=room_words(rng, any_room(rng)),
        n=rng.randint(2, 99),
    )
    return refuse(Phrase(text, f"errand {_MUSIC[index]}"), form="verb")
