"""Plain commands spoilt: tomorrow, until, conditions, negations, two at once, alternatives."""

from __future__ import annotations

from .changing import change_command
from .clock import at_time, clock_time, span
from .labels import labelled, task
from .phrase import Phrase, Rng, chance, fill, weighted, words
from .places import any_room, room_words, target
from .refusals import FOREIGN_VERBS, PLAIN, refuse
from .reminding import alarm_request, reminder_request, timer_request
from .setting import climate_command, set_command
from .shapes import Draft
from .switching import cleaning_command, switch_command
from .tables import lines


def any_command(rng: Rng, held: bool) -> Draft:
    """A plain command or request of any kind, to be spoilt."""
    kind = rng.random()
    if kind < 0.5:
        return switch_command(rng)
    if kind < 0.62:
        return set_command(rng)
    if kind < 0.72:
        return change_command(rng)
    if kind < 0.76:
        return climate_command(rng)
    if kind < 0.8:
        return cleaning_command(rng)
    if kind < 0.86:
        return timer_request(rng, held)
    return alarm_request(rng, held) if kind < 0.92 else reminder_request(rng, held)


def _whole(sample: Draft) -> Phrase:
    text = " ".join(part.text for part in (*sample.before, sample.core, *sample.after))
    return Phrase(text, sample.shape)


_LATER = lines("later")
_UNTIL = lines("until")
_CONDITIONS = lines("conditions")
_NEGATIONS = lines("negations")


_WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_PARTS = ("", "", "", " morning", " afternoon", " evening", " night")
_PERIODS = ("hour", "two hours", "week", "month", "year", "day", "half hour")
_SUBJECTS = lines("subjects")
_PREDICATES = lines("predicates")


def _later(rng: Rng) -> str:
    """A day, a date or a repetition."""
    if chance(rng, 0.5):
        return rng.choice(_LATER)
    day, month = rng.choice(_WEEKDAYS), rng.choice(_MONTHS)
    number = rng.randint(2, 30)
    ordinal = f"{number}{'th' if 3 < number < 21 else rng.choice(('th', 'st', 'nd', 'rd'))}"
    part = rng.choice(_PARTS)
    return rng.choice(
        (
            f"on {day}{part}",
            f"next {day}{part}",
            f"this {day}{part}",
            f"every {day}{part}",
            f"each {day}{part}",
            f"on {day}s",
            f"{day}{part}",
            f"on {month} {number}",
            f"on the {ordinal}",
            f"on the {ordinal} of {month}",
            f"on {month} {ordinal}",
            f"in {month}",
            f"in {number} days",
            f"in {rng.choice(('two', 'three', 'a few', '2', '3'))} {rng.choice(('days', 'weeks'))}",
            f"{number} days from now",
            f"every {number} minutes",
            f"every {rng.choice(_PERIODS)}",
            f"{rng.choice(('two', 'three', number))} times a {rng.choice(('day', 'week'))}",
            f"tomorrow{part}",
            f"every{part or ' day'}",
        )
    )


def _until(rng: Rng) -> str:
    """An end that is no length of time."""
    first, second = clock_time(rng)[0], clock_time(rng)[0]
    if chance(rng, 0.6):
        return rng.choice(_UNTIL).format(t=first, u=second, h=rng.randint(1, 12))
    word = rng.choice(("until", "until", "till"))
    if chance(rng, 0.4):
        return f"{word} {_later(rng).removeprefix('on ')}"
    return f"{word} {rng.choice(_SUBJECTS)} {rng.choice(_PREDICATES)}"


def _condition(rng: Rng) -> str:
    """A condition on anything."""
    if chance(rng, 0.5):
        return rng.choice(_CONDITIONS).format(n=rng.randint(2, 40), d=rng.choice(PLAIN))
    word = rng.choice(
        (
            "if",
            "if",
            "if",
            "when",
            "when",
            "when",
            "once",
            "as soon as",
            "unless",
            "whenever",
            "in case",
            "only if",
            "every time",
            "as long as",
            "while",
            "before",
            "after",
            "even if",
        )
    )
    return f"{word} {rng.choice(_SUBJECTS)} {rng.choice(_PREDICATES)}"


def spoilt(rng: Rng, held: bool) -> Draft:
    """A plain command with a tomorrow, an until, a condition or a negation."""
    sample = any_command(rng, held)
    kind = rng.random()
    if kind < 0.3:
        extra = Phrase(_later(rng), "<later>")
    elif kind < 0.5:
        extra = Phrase(_until(rng), "<until>")
    elif kind < 0.78:
        extra = Phrase(_condition(rng), "<condition>")
    else:
        while sample.form == "noun" or sample.before:
            sample = any_command(rng, held)
        template = rng.choice(_NEGATIONS)
        core = fill(template, c=_whole(sample))
        return refuse(Phrase(core.text, f"<not> {_whole(sample).mark}"))
    if chance(rng, 0.3):
        return refuse(
            sample.core, form=sample.form, before=(extra, *sample.before), after=sample.after
        )
    if chance(rng, 0.25):
        return refuse(
            sample.core, form=sample.form, before=sample.before, after=(extra, *sample.after)
        )
    return refuse(sample.core, form=sample.form, before=sample.before, after=(*sample.after, extra))


_LINKS = [
    ("and", 8),
    (", and", 1),
    ("and then", 2.5),
    (", then", 1),
    ("then", 1),
    ("and also", 1),
    ("but", 0.3),
    ("after that", 0.4),
    (", also", 0.4),
    (".", 0.8),
    (";", 0.2),
    ("or", 0.6),
    ("plus", 0.2),
    ("as well as", 0.2),
]


def double(rng: Rng, held: bool) -> Draft:
    """Two commands, two devices or two rooms in one request."""
    kind = rng.random()
    if kind < 0.55:
        first, second = any_command(rng, held), any_command(rng, held)
        while first.answer.endswith('"}') and '"label"' in first.answer:
            # "remind me to call mum and open the blinds" may be one label.
            first = any_command(rng, held)
        link = words(weighted(rng, _LINKS))
        text = f"{_whole(first).text} {link.text} {_whole(second).text}"
        return refuse(
            Phrase(
                text.replace(" ,", ",").replace(" .", ".").replace(" ;", ";"),
                f"{first.core.mark} <and> {second.core.mark}",
            ),
            form=first.form if not first.before else "free",
        )
    if kind < 0.62:
        return _excepted(rng)
    if kind < 0.7:
        return _either(rng, held)
    one, two = rng.sample(PLAIN[:11], 2)
    a = target(rng, one, room=0.3, everywhere=0.02)
    b = target(rng, two, room=0.3, everywhere=0.02)
    link_text = rng.choice(("and", "and", "and", "and also", "as well as", "plus", "or", ", not"))
    if kind < 0.84:
        x = fill(f"{{a}} {link_text} {{b}} {{w}}", a=a.np, b=b.np, w=a.where)
    else:
        left, right = rng.sample([any_room(rng) for _ in range(6)] + ["kitchen", "garden"], 2)
        if left == right:
            right = "basement" if left != "basement" else "attic"
        p, q = room_words(rng, left), room_words(rng, right)
        noun = a.np.text if a.room is None else "the lights"
        bare = noun.removeprefix("the ").removeprefix("my ")
        text = rng.choice(
            (
                f"{noun} in the {p} and the {q}",
                f"the {p} and {q} {bare}",
                f"{noun} in the {p} and in the {q}",
                f"the {p} and the {q} {bare}",
                f"{noun} in the {p} and {q}",
            )
        )
        x = Phrase(text, "<device> <two rooms>")
    core = fill(rng.choice(FOREIGN_VERBS[:23]), x=x, n=Phrase(str(rng.randint(1, 99)), "<n>"))
    return refuse(core, form="verb")


def _either(rng: Rng, held: bool) -> Draft:
    """Alternatives: "at 5 or 6", "turn the fan on or off", "to 20 or 30 percent"."""
    item = target(rng, rng.choice(PLAIN[:11]), room=0.4)
    np = fill("{np} {w}", np=item.np, w=item.where)
    (first, _), (second, _) = at_time(rng), at_time(rng)
    a, b = span(rng)[0], span(rng)[0]
    body, _ = labelled(task(rng, held))
    template = rng.choice(
        (
            "turn {np} on or off",
            "open or close {np}",
            "turn on or off {np}",
            "lock or unlock {np}",
            "start or stop {np}",
            "set {np} to {n} or {m} percent",
            "set {np} to {n} or {m}",
            "turn on {np} {t} or {u}",
            "switch {np} off {t} or {u}",
            "turn on {np} for {a} or {b}",
            "turn off {np} in {a} or {b}",
            "set a timer for {a} or maybe {b}",
            "set a timer for {a}, no, {b}",
            "wake me {t} or {u}",
            "set an alarm {t} and {u}",
            "remind me {t} or {u} to {l}",
            "remind me to {l} in {a} or {b}",
            "turn {np} up or down",
        )
    )
    core = fill(
        template,
        np=np,
        t=first,
        u=Phrase(second.text.removeprefix("at "), second.mark),
        a=Phrase(a, "<span>"),
        b=Phrase(b, "<span>"),
        n=Phrase(str(rng.randint(1, 100)), "<n>"),
        m=Phrase(str(rng.randint(1, 100)), "<n>"),
        l=body,
    )
    return refuse(core, form="verb")


def _excepted(rng: Rng) -> Draft:
    """Such as "turn off all the lights except the kitchen", "open everything but the garage"."""
    item = target(rng, rng.choice(PLAIN[:11]), room=0.2, everywhere=0.7)
    but = rng.choice(("except", "except for", "but not", "apart from", "not", "other than", "but"))
    place = room_words(rng, any_room(rng))
    out = rng.choice(
        (f"the {place}", f"in the {place}", f"the {place} one", f"the {rng.choice(PLAIN)}")
    )
    np = item.np if chance(rng, 0.8) else words("everything")
    x = fill(f"{{np}} {but} {{o}}", np=np, o=Phrase(out, "<out>"))
    core = fill(rng.choice(FOREIGN_VERBS[:23]), x=x, n=Phrase(str(rng.randint(1, 99)), "<n>"))
    return refuse(core, form="verb")


def clock_misuse(rng: Rng, held: bool) -> Draft:
    """Timers and reminders for tomorrow, for every day, or two at once."""
    kind = rng.random()
    if kind < 0.45:
        body, _ = labelled(task(rng, held))
        later = Phrase(_later(rng), "<later>")
        template = rng.choice(
            (
                "remind me {l} to {b}",
                "remind me to {b} {l}",
                "set a reminder for {l} to {b}",
                "{l} remind me to {b}",
                "remind me {l} at {n} to {b}",
                "remind me to {b} {l} at {n}",
            )
        )
        if "for {l}" in template:
            later = Phrase(later.text.removeprefix("on "), later.mark)
        n = Phrase(clock_time(rng)[0], "<time>")
        return refuse(fill(template, b=body, l=later, n=n), form="verb")
    if kind < 0.8:
        t = Phrase(clock_time(rng)[0], "<time>")
        later = Phrase(_later(rng), "<later>")
        template = rng.choice(
            (
                "wake me up at {t} {l}",
                "wake me {l} at {t}",
                "set an alarm for {t} {l}",
                "{l} wake me at {t}",
                "set an alarm {l} at {t}",
                "alarm {l} {t}",
                "set an alarm for {l} at {t}",
                "wake me up {l}",
                "set an alarm for {l}",
            )
        )
        if "for {l}" in template:
            later = Phrase(later.text.removeprefix("on "), later.mark)
        return refuse(fill(template, t=t, l=later), form="verb")
    a, b = span(rng)[0], span(rng)[0]
    template = rng.choice(
        (
            "set a timer for {a} and another for {b}",
            "set two timers, {a} and {b}",
            "set a {a} timer and a {b} timer",
            "set a timer for {a} or {b}",
            "set alarms for {n} and {m}",
            "wake me at {n} and at {m}",
        )
    )
    first, second = clock_time(rng)[0], clock_time(rng)[0]
    text = template.format(a=a, b=b, n=first, m=second)
    return refuse(Phrase(text, f"two {template}"), form="verb")
