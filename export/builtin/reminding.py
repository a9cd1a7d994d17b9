"""Timers, alarms and reminders: setting them, and cancelling them."""

from __future__ import annotations

from .answer import Answer
from .clock import at_time, delay, span
from .labels import fact, labelled, noun_label, said_time_label, task, thing
from .phrase import EMPTY, Phrase, Rng, chance, fill, weighted, words
from .places import any_room, where
from .shapes import Draft, draft

_MAKE = ("set", "set", "set", "set", "start", "start", "create", "make", "add", "put on", "begin")
_NAMED = ("called", "called", "named", "labelled", "labeled")


def _attributive(said: str) -> str:
    """A span before a noun: "12 minutes" -> "12 minute"."""
    for plural in ("hours", "minutes", "seconds", "mins", "secs", "hrs"):
        said = said.replace(plural, plural[:-1])
    return said.removeprefix("an ").removeprefix("a ")


def timer_request(rng: Rng, held: bool) -> Draft:
    """Such as "set a timer for 12 minutes for the pasta", "8 minute egg timer", ..."""
    said, seconds = span(rng)
    length = Phrase(said, "<span>")
    short = Phrase(_attributive(said), "<span>")
    label: str | None = None
    tail = EMPTY
    noun = EMPTY
    if chance(rng, 0.55):
        if chance(rng, 0.38):
            name = thing(rng, held)
            noun, label = labelled(name)
        elif chance(rng, 0.25):
            name = thing(rng, held)
            tail, label = labelled(name)
            tail = fill(rng.choice(_NAMED) + " {t}", t=tail)
        elif chance(rng, 0.12):
            tail, label = labelled(task(rng, held))
            tail = fill("to {t}", t=tail)
        else:
            tail, label = noun_label(rng, held)
            tail = fill("for {t}", t=tail)
    article = weighted(rng, [("a", 8), ("the", 1), ("my", 0.8), ("", 1), ("another", 0.2)])
    verb = words(rng.choice(_MAKE) if chance(rng, 0.8) else rng.choice(("give me", "i need", "")))
    core = _timer_core(rng, verb, Phrase(article, "<a>"), noun, length, short, tail)
    room = None
    after: tuple[Phrase, ...] = ()
    if chance(rng, 0.05):
        room = any_room(rng)
        after = (where(rng, room),)
    form = "verb" if core.mark.startswith(tuple(_MAKE)) else "noun"
    answer = Answer("timer", room=room, duration_s=seconds, label=label)
    return draft("timer", core, answer, form=form, after=after)


def _timer_core(
    rng: Rng,
    verb: Phrase,
    article: Phrase,
    noun: Phrase,
    length: Phrase,
    short: Phrase,
    tail: Phrase,
) -> Phrase:
    template = weighted(
        rng,
        [
            ("{v} {a} {n} timer for {s} {l}", 8),
            ("{v} {a} {n} timer {l} for {s}", 4),
            ("{v} {a} {x} {n} timer {l}", 6),
            ("{v} {a} {n} timer of {s} {l}", 0.7),
            ("{v} {a} {n} timer {l} of {s}", 0.2),
            ("{v} {a} {n} timer to {s} {l}", 0.4),
            ("{v} {a} {n} timer in {s} {l}", 0.3),
            ("{n} timer {s} {l}", 0.7),
            ("{n} timer for {s} {l}", 1),
            ("{v} {a} {n} timer , {s} , {l}", 0.3),
            ("{n} timer : {s} {l}", 0.2),
            ("{x} {n} timer {l}", 0.8),
            ("{v} {s} on the {n} timer {l}", 0.15),
            ("{v} {a} {n} timer {l} , {s}", 0.5),
            ("{n} timer {l} , {s}", 0.2),
            ("{s} {n} timer {l}", 0.3),
        ],
    )
    if template.startswith("{v} {s}"):
        verb = words("put")
    first = (noun.text.strip("\x01") or short.text)[:1]
    if article.text == "a" and "{a} {x}" in template:
        first = short.text[:1] if not short.text.startswith(("8", "11", "18")) else "e"
    led = "{x}" in template or noun.text
    if article.text == "a" and first in ("a", "e", "i", "o", "u") and "{a}" in template and led:
        article = Phrase("an", "<a>")
    if "{v}" in template and not verb.text:
        verb = words("set")
    core = fill(template, v=verb, a=article, n=noun, s=length, x=short, l=tail)
    return Phrase(core.text.replace(" ,", ",").replace(" :", ":").rstrip(","), core.mark)


def _moment(rng: Rng, *, none: float = 0.0) -> tuple[Phrase, str | None, int | None]:
    """A time or a delay: (adverbial, "HH:MM", seconds)."""
    if chance(rng, none):
        day = rng.choice(("", "", "", "", "today", "tonight", "tonight", "this evening"))
        return words(day), None, None
    if chance(rng, 0.62):
        phrase, clock = at_time(rng)
        return phrase, clock, None
    phrase, seconds = delay(rng)
    return phrase, None, seconds


def _purpose(rng: Rng, held: bool) -> tuple[Phrase, str | None]:
    """What an alarm is for, said at its end: (words, label), often nothing."""
    if not chance(rng, 0.36):
        return EMPTY, None
    kind = rng.random()
    if kind < 0.25:
        tail, label = labelled(task(rng, held))
        return fill("to {t}", t=tail), label
    if kind < 0.5:
        tail, label = labelled(thing(rng, held))
        return fill(rng.choice(_NAMED) + " {t}", t=tail), label
    tail, label = noun_label(rng, held)
    return fill("for {t}", t=tail), label


def _waking(rng: Rng, phrase: Phrase, tail: Phrase, answer: Answer) -> Draft:
    verb = rng.choice(("wake me", "wake me up", "wake me up", "get me up", "wake us", "wake us up"))
    if chance(rng, 0.7) or not tail.text:
        core = fill(f"{verb} {{t}} {{l}}", t=phrase, l=tail)
    else:
        core = fill(f"{verb} {{l}} {{t}}", t=phrase, l=tail)
    if chance(rng, 0.12):
        core = fill(f"{verb} {{l}}", l=tail)
        return draft("alarm", core, answer, before=(phrase,))
    return draft("alarm", core, answer)


def alarm_request(rng: Rng, held: bool) -> Draft:
    """Such as "wake me at 7", "set an alarm for half past six called gym", ..."""
    phrase, clock, seconds = _moment(rng)
    tail, label = _purpose(rng, held)
    answer = Answer("alarm", time=clock, delay_s=seconds, label=label)
    if chance(rng, 0.36):
        return _waking(rng, phrase, tail, answer)
    verb = words(weighted(rng, [("set", 8), ("create", 1), ("add", 1), ("make", 0.7), ("", 1)]))
    article = Phrase(weighted(rng, [("an", 7), ("my", 1.5), ("the", 0.8), ("", 1)]), "<a>")
    noun = EMPTY
    if label is None and chance(rng, 0.22):
        noun, label = labelled(thing(rng, held))
        answer = Answer("alarm", time=clock, delay_s=seconds, label=label)
        article = Phrase(article.text.replace("an", "a"), article.mark)
    if clock is not None and phrase.text.startswith("at ") and chance(rng, 0.75):
        phrase = Phrase(phrase.text.replace("at ", "for ", 1), phrase.mark.replace("at ", "for "))
    elif seconds is not None and phrase.text.endswith("from now") and chance(rng, 0.6):
        phrase = fill("for {p}", p=phrase)
    elif seconds is not None and phrase.text.startswith("in ") and chance(rng, 0.04):
        phrase = Phrase(f"for {phrase.text[3:]}", phrase.mark.replace("in ", "for "))
    if clock is not None and phrase.text.startswith(("at ", "for ")) and chance(rng, 0.06):
        phrase = Phrase(phrase.text.split(" ", 1)[1], phrase.mark.split(" ", 1)[1])
    template = weighted(rng, [("{v} {a} {n} alarm {t} {l}", 7), ("{v} {a} {n} alarm {l} {t}", 3)])
    if clock is not None and noun.text == "" and chance(rng, 0.16):
        said, clock = said_time_label(rng)
        answer = Answer("alarm", time=clock, label=label)
        template, phrase = "{v} {a} {t} alarm {l}", said
        article = Phrase(article.text.replace("an", "a"), article.mark)
    core = fill(template, v=verb, a=article, n=noun, t=phrase, l=tail)
    return draft("alarm", core, answer, form="verb" if verb.text else "noun")


def reminder_request(rng: Rng, held: bool) -> Draft:
    """Such as "remind me to call mum at 5 pm", "in an hour remind me about the meeting", ..."""
    phrase, clock, seconds = _moment(rng, none=0.13)
    kind = rng.random()
    if kind < 0.03 and phrase.text:
        head = rng.choice(("remind me", "set a reminder", "add a reminder", "give me a reminder"))
        answer = Answer("reminder", time=clock, delay_s=seconds)
        return draft("reminder", fill(f"{head} {{t}}", t=phrase), answer)
    if kind < 0.68:
        body, label = labelled(task(rng, held))
        body = fill("to {b}", b=body)
    elif kind < 0.87:
        body, label = noun_label(rng, held)
        body = fill(weighted(rng, [("about {b}", 8), ("of {b}", 1)]), b=body)
    else:
        body, label = labelled(fact(rng, held))
        body = fill("that {b}" if chance(rng, 0.8) else "{b}", b=body)
    answer = Answer("reminder", time=clock, delay_s=seconds, label=label)
    head = rng.choice(("remind me", "remind me", "remind me", "remind us"))
    if chance(rng, 0.24):
        return _noun_reminder(rng, phrase, body, answer)
    order = rng.random()
    if order < 0.5 or not phrase.text:
        core = fill(f"{head} {{b}} {{t}}", b=body, t=phrase)
    elif order < 0.8:
        core = fill(f"{head} {{t}} {{b}}", b=body, t=phrase)
    else:
        return draft("reminder", fill(f"{head} {{b}}", b=body), answer, before=(phrase,))
    return draft("reminder", core, answer)


def _noun_reminder(rng: Rng, phrase: Phrase, body: Phrase, answer: Answer) -> Draft:
    """Such as "set a reminder for 5 pm to call mum", "reminder: call mum in an hour"."""
    if body.mark.startswith("of"):
        body = Phrase(f"about {body.text[3:]}", f"about {body.mark[3:]}")
    verb = weighted(
        rng,
        [
            ("set a", 7),
            ("create a", 2),
            ("add a", 2),
            ("make a", 1.2),
            ("set", 0.3),
            ("give me a", 0.5),
            ("i need a", 0.5),
            ("new", 0.5),
            ("", 1.0),
        ],
    )
    if answer.time is not None and phrase.text.startswith("at ") and chance(rng, 0.55):
        phrase = Phrase(phrase.text.replace("at ", "for ", 1), phrase.mark.replace("at ", "for "))
    if phrase.text.endswith("from now") and chance(rng, 0.5):
        phrase = fill("for {p}", p=phrase)
    if body.mark.startswith("about") and chance(rng, 0.3):
        body = Phrase(f"for {body.text[6:]}", f"for {body.mark[6:]}")
    colon = 0.5 if verb in ("", "new") else 0.08
    if chance(rng, colon) and body.mark.startswith(("to", "about")):
        core_text = body.text.split(" ", 1)[1]
        template = rng.choice(("reminder: {b} {t}", "reminder: {b} {t}", "reminder {t}: {b}"))
        core = fill(f"{verb} {template}", b=Phrase(core_text, "<label>"), t=phrase)
        return draft(
            "reminder", Phrase(core.text.replace(" :", ":"), core.mark), answer, form="noun"
        )
    template = "{b} {t}" if chance(rng, 0.5) else "{t} {b}"
    core = fill(f"{verb} reminder {template}", b=body, t=phrase)
    form = "verb" if verb.startswith(("set", "create", "add", "make")) else "noun"
    return draft("reminder", core, answer, form=form)


_CANCEL = (
    ("cancel", 6.0),
    ("delete", 4.0),
    ("remove", 3.0),
    ("stop", 3.0),
    ("clear", 0.7),
    ("end", 0.8),
    ("halt", 0.4),
    ("get rid of", 0.3),
)


def cancel_request(rng: Rng, held: bool) -> Draft:
    """Such as "cancel the pasta timer", "delete my 7 am alarm"."""
    device = weighted(rng, [("timer", 5), ("alarm", 5), ("reminder", 4)])
    verb = weighted(rng, list(_CANCEL))
    action = "cancel"
    if chance(rng, 0.12):
        verb, action = rng.choice(
            (("pause", "pause"), ("resume", "start"), ("turn off", "off"), ("switch off", "off"))
        )
        device = "timer" if action != "off" else "alarm"
    np, answer = named_clock(rng, device, action, held)
    core = fill(f"{verb} {{np}}", np=np)
    return draft("cancel", core, answer)


def named_clock(rng: Rng, device: str, action: str, held: bool) -> tuple[Phrase, Answer]:
    """A timer, alarm or reminder that exists, with the label or time that singles it out."""
    said = weighted(rng, [("the", 7), ("my", 7), ("", 0.7), ("that", 0.3), ("our", 0.3)])
    article = Phrase(said, "<a>")
    kind = rng.random()
    noun = words(device)
    if kind < 0.24:
        return fill("{a} {d}", a=article, d=noun), Answer(action, device)
    if kind < 0.5 and device != "reminder":
        body, label = labelled(thing(rng, held))
        return fill("{a} {b} {d}", a=article, b=body, d=noun), Answer(action, device, label=label)
    if device == "timer":
        if kind < 0.75:
            said, seconds = span(rng)
            short = Phrase(_attributive(said), "<span>")
            np = fill("{a} {s} {d}", a=article, s=short, d=noun)
            return np, Answer(action, device, duration_s=seconds)
        body, label = noun_label(rng, held)
        return fill("{a} {d} for {b}", a=article, d=noun, b=body), Answer(
            action, device, label=label
        )
    if device == "alarm" or kind < 0.42:
        if chance(rng, 0.6):
            time, clock = said_time_label(rng)
            return fill("{a} {t} {d}", a=article, t=time, d=noun), Answer(
                action, device, time=clock
            )
        phrase, clock = at_time(rng)
        link = rng.choice(("at ", "for ", "set for "))
        phrase = Phrase(phrase.text.replace("at ", link, 1), phrase.mark)
        return fill("{a} {d} {t}", a=article, d=noun, t=phrase), Answer(action, device, time=clock)
    if kind < 0.75:
        body, label = labelled(task(rng, held))
        return fill("{a} {d} to {b}", a=article, d=noun, b=body), Answer(
            action, device, label=label
        )
    body, label = noun_label(rng, held)
    if chance(rng, 0.3):
        body, label = labelled(thing(rng, held))
        return fill("{a} {b} {d}", a=article, b=body, d=noun), Answer(action, device, label=label)
    link = rng.choice(("about", "about", "for"))
    return fill(f"{{a}} {{d}} {link} {{b}}", a=article, d=noun, b=body), Answer(
        action, device, label=label
    )


def bare_request(rng: Rng) -> Draft:
    """Such as "set a timer", "set an alarm", "timer": the action alone."""
    device = rng.choice(("timer", "timer", "alarm", "reminder"))
    article = "an" if device == "alarm" else "a"
    if chance(rng, 0.3):
        plural = f"{device}s"
        said = rng.choice(
            (f"all {plural}", f"all my {plural}", f"all the {plural}", f"my {plural}")
        )
        verb = rng.choice(("cancel", "delete", "stop", "remove", "clear"))
        return draft("cancel", words(f"{verb} {said}"), Answer("cancel", device))
    if device == "timer" and chance(rng, 0.3):
        phrase, clock = at_time(rng)
        phrase = Phrase(phrase.text.replace("at ", "for ", 1), phrase.mark)
        return draft("timer", fill("set a timer {t}", t=phrase), Answer("timer", time=clock))
    verb = rng.choice(("set", "start", "make", "add", "create"))
    return draft(device, words(f"{verb} {article} {device}"), Answer(device))
