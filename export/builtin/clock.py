"""Times of day, delays and durations: the rules as functions, and how people say them."""

from __future__ import annotations

from .numerals import SMALL, say_integer, spell
from .phrase import Phrase, Rng, chance, weighted

AM, PM = ("am",), ("pm", "afternoon", "evening", "tonight")


def to_24h(hour: int, minute: int, part: str | None = None) -> str:
    """The contract's rule for a time of day.

    Args:
        hour: As said, 0 to 23; the hour itself for "half past six", 7 for "quarter to eight".
        minute: 0 to 59.
        part: None, "am", "pm", "morning", "afternoon", "evening", "tonight" or "night".

    Returns:
        "HH:MM"; without a part the hour is as said, and 12:xx is the noon hour.
    """
    if hour <= 12 and part is not None:
        hour %= 12
        late = part in PM or (part == "night" and 6 <= hour <= 11)
        if part in ("evening", "tonight") and hour == 0:
            late = False
        hour += 12 * late
    return f"{hour:02d}:{minute:02d}"


_PART_WORDS = {
    "am": ("am", "am", "am", "a.m.", "a m", "a.m"),
    "pm": ("pm", "pm", "pm", "p.m.", "p m", "p.m"),
    "morning": ("in the morning", "in the morning", "in the morning", "this morning"),
    "afternoon": ("in the afternoon", "in the afternoon", "this afternoon"),
    "evening": ("in the evening", "in the evening", "in the evening", "this evening"),
    "tonight": ("tonight",),
    "night": ("at night",),
}
# How far an hour may go with a part of the day before nobody would say it.
_PART_HOURS = {
    "am": range(1, 13),
    "pm": range(1, 13),
    "morning": range(1, 12),
    "afternoon": (12, 1, 2, 3, 4, 5, 6),
    "evening": range(4, 12),
    "tonight": range(5, 12),
    "night": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
}


def clock_time(rng: Rng, *, bare: float = 0.35) -> tuple[str, str]:
    """A time of day.

    Args:
        rng: Where the draw comes from.
        bare: Probability that no part of the day is said.

    Returns:
        (words without "at", "HH:MM").
    """
    style = rng.random()
    if style < 0.05:
        return weighted(
            rng, [(("noon", "12:00"), 4), (("midnight", "00:00"), 4), (("midday", "12:00"), 1)]
        )
    if style < 0.17:
        return _written_24h(rng)
    part = None if chance(rng, bare) else weighted(rng, _PARTS)
    hour = rng.randint(1, 12) if part is None else rng.choice(tuple(_PART_HOURS[part]))
    said, hour, minute = _twelve_hour(rng, hour, part, style)
    suffix = "" if part is None else rng.choice(_PART_WORDS[part])
    glued = part in ("am", "pm") and said[-1].isdigit() and chance(rng, 0.5)
    if glued and suffix[1:2] == " ":
        suffix = suffix.replace(" ", "")
    return f"{said}{'' if glued or not suffix else ' '}{suffix}", to_24h(hour, minute, part)


_PARTS = [
    ("am", 5.0),
    ("pm", 7.0),
    ("morning", 3.0),
    ("afternoon", 1.8),
    ("evening", 2.5),
    ("tonight", 2.2),
    ("night", 2.0),
]


def _written_24h(rng: Rng) -> tuple[str, str]:
    hour, minute = rng.randint(0, 23), rng.choice((0, 0, 15, 30, 45, rng.randint(0, 59)))
    if hour >= 13 and chance(rng, 0.1):
        if minute == 0:
            return f"{hour} o'clock", f"{hour:02d}:00"
        if minute >= 10:
            return f"{spell(hour)} {spell(minute)}", f"{hour:02d}:{minute:02d}"
    head = f"{hour:02d}" if hour == 0 or chance(rng, 0.7) else str(hour)
    return f"{head}:{minute:02d}", f"{hour:02d}:{minute:02d}"


def _twelve_hour(rng: Rng, hour: int, part: str | None, style: float) -> tuple[str, int, int]:
    """(words, hour, minute); the hour may be the one before, for "quarter to"."""
    spoken = chance(rng, 0.35)
    name = spell(hour) if spoken else str(hour)
    if style < 0.42:
        if part not in ("am", "pm") and chance(rng, 0.4):
            name += rng.choice((" o'clock", " o'clock", " oclock", " o clock"))
        return name, hour, 0
    if style < 0.66:
        minute = rng.choice((0, 5, 10, 15, 20, 30, 30, 30, 40, 45, rng.randint(1, 59)))
        if spoken:
            if minute == 0:
                return name, hour, 0
            low = rng.choice(("oh", "o")) + " " + SMALL[minute] if minute < 10 else spell(minute)
            return f"{name} {low}", hour, minute
        dot = "." if chance(rng, 0.06) else ":"
        return f"{name}{dot}{minute:02d}", hour, minute
    if style < 0.82:
        half = rng.choice(("half past", "half past", "half past", "half-past"))
        quarter = rng.choice(("quarter past", "quarter past", "a quarter past"))
        return (f"{half} {name}", hour, 30) if chance(rng, 0.6) else (f"{quarter} {name}", hour, 15)
    return _counted(rng, name, hour, part)


def _counted(rng: Rng, name: str, hour: int, part: str | None) -> tuple[str, int, int]:
    """Such as "twenty five past six", "quarter to eight"."""
    count = rng.choice((5, 10, 20, 25, rng.choice((5, 10, 20, rng.randint(1, 29)))))
    number = spell(count) if chance(rng, 0.6) else str(count)
    if count % 5 or chance(rng, 0.2):
        number += " minutes" if count > 1 else " minute"
    if chance(rng, 0.5):
        return f"{number} past {name}", hour, count
    if chance(rng, 0.5):
        number, count = rng.choice(("quarter", "quarter", "a quarter")), 15
    if (hour == 12 and part in ("am", "pm", "afternoon")) or (hour == 6 and part == "night"):
        # "ten to twelve pm" may mean either half of the day: nobody can know.
        return f"{number} past {name}", hour, count
    before = hour - 1 if hour > 1 else 12
    return f"{number} to {name}", before, 60 - count


def at_time(rng: Rng, mark: str = "<time>") -> tuple[Phrase, str]:
    """A time with its preposition, "HH:MM"."""
    said, answer = clock_time(rng)
    if said.endswith(" tonight") and chance(rng, 0.4):
        return Phrase(f"tonight at {said.removesuffix(' tonight')}", f"tonight at {mark}"), answer
    if said.endswith((" this evening", " this morning", " this afternoon")) and chance(rng, 0.4):
        head, part, of_day = said.rsplit(" ", 2)
        return Phrase(f"{part} {of_day} at {head}", f"this part at {mark}"), answer
    if chance(rng, 0.06):
        return Phrase(f"today at {said}", f"today at {mark}"), answer
    if said.endswith((" pm", " am", " p.m.", "pm")) and chance(rng, 0.06):
        late = answer >= "17:00"
        day = rng.choice(("today", "tonight")) if late else "today"
        form = rng.choice(("at {t} {d}", "{d} at {t}"))
        return Phrase(form.format(t=said, d=day), form.format(t=mark, d=day)), answer
    if chance(rng, 0.08):
        form = rng.choice(
            (
                "@ {}",
                "at around {}",
                "at exactly {}",
                "at about {}",
                "at {} sharp",
                "starting at {}",
            )
        )
        return Phrase(form.format(said), form.format(mark)), answer
    return Phrase(f"at {said}", f"at {mark}"), answer


_SECOND = ("seconds", "seconds", "seconds", "secs", "sec", "s")
_MINUTE = ("minutes", "minutes", "minutes", "minutes", "min", "mins", "m")
_HOUR = ("hours", "hours", "hours", "h", "hrs", "hr")
_FIXED = (
    ("half an hour", 1800),
    ("half an hour", 1800),
    ("half an hour", 1800),
    ("half hour", 1800),
    ("a half hour", 1800),
    ("an hour", 3600),
    ("an hour", 3600),
    ("one hour", 3600),
    ("1 hour", 3600),
    ("an hour and a half", 5400),
    ("an hour and a half", 5400),
    ("one and a half hours", 5400),
    ("a quarter of an hour", 900),
    ("quarter of an hour", 900),
    ("three quarters of an hour", 2700),
    ("an hour and a quarter", 4500),
    ("a minute", 60),
    ("one minute", 60),
    ("1 minute", 60),
    ("a minute and a half", 90),
    ("half a minute", 30),
    ("a couple of minutes", 120),
    ("a couple of hours", 7200),
    ("one and a half minutes", 90),
    ("1 and a half hours", 5400),
    ("two and a half minutes", 150),
    ("1 min", 60),
    ("1h", 3600),
    ("1 hr", 3600),
    ("a second", 1),
    ("one second", 1),
    ("a dozen minutes", 720),
)


def span(rng: Rng, *, short: float = 0.2) -> tuple[str, int]:
    """A length of time.

    Args:
        rng: Where the draw comes from.
        short: Probability of seconds.

    Returns:
        (words, seconds).
    """
    if chance(rng, 0.17):
        return rng.choice(_FIXED)
    if chance(rng, short):
        count = rng.choice((5, 10, 15, 20, 30, 40, 45, 60, 90, rng.randint(2, 120)))
        return _unit(rng, say_integer(rng, count), _SECOND), count
    if chance(rng, 0.58):
        count = rng.choice((2, 3, 5, 10, 15, 20, 25, 30, 40, 45, *(rng.randint(2, 120),) * 11))
        return _unit(rng, say_integer(rng, count), _MINUTE), count * 60
    if chance(rng, 0.45):
        count = rng.choice((2, 3, 4, 5, 6, 8, 10, 12, rng.randint(2, 24)))
        return _unit(rng, say_integer(rng, count), _HOUR), count * 3600
    return _compound(rng)


def _unit(rng: Rng, number: str, units: tuple[str, ...]) -> str:
    unit = rng.choice(units)
    if len(unit) == 1 and not number.isdigit():
        unit = units[0]
    glued = number[-1].isdigit() and (len(unit) == 1 or (len(unit) < 5 and chance(rng, 0.4)))
    return number + ("" if glued else " ") + unit


def _compound(rng: Rng) -> tuple[str, int]:
    kind = rng.random()
    spoken = 1.0 if chance(rng, 0.4) else 0.0
    if kind < 0.25:
        whole, (name, size) = rng.randint(1, 9), rng.choice((("hours", 3600), ("minutes", 60)))
        head = say_integer(rng, whole, spoken=0.5)
        if chance(rng, 0.35):
            single = name if whole > 1 else name[:-1]
            head = head if whole > 1 else rng.choice(("one", "1", "an" if size > 60 else "a"))
            return f"{head} {single} and a half", whole * size + size // 2
        return f"{head} and a half {name}", whole * size + size // 2
    if kind < 0.42:
        whole = rng.randint(0, 6)
        part, size = rng.choice(((5, 3600), (5, 3600), (5, 60), (25, 3600), (75, 3600)))
        said = f"{whole}.{part}" if not spoken else f"{spell(whole)} point {_decimals(part)}"
        seconds = whole * size + size * part // (10 if part < 10 else 100)
        return _unit(rng, said, ("hours", "h") if size > 60 else ("minutes", "min")), seconds
    long = kind < 0.8
    large = rng.choice((1, 1, 2, 3, rng.randint(1, 12))) if long else rng.randint(1, 30)
    small = rng.choice((5, 10, 15, 20, 30, 45, rng.randint(1, 59)))
    names = (
        (("hour", "hr", "h"), ("minute", "min", "m"))
        if long
        else (
            ("minute", "min", "m"),
            ("second", "sec", "s"),
        )
    )
    size = 60 if long else 1
    return _two_units(rng, large, small, names, spoken), (large * 60 + small) * size


def _decimals(part: int) -> str:
    return " ".join(SMALL[int(digit)] for digit in str(part))


def _two_units(
    rng: Rng, large: int, small: int, names: tuple[tuple[str, ...], ...], spoken: float
) -> str:
    (long_name, long_abbr, long_letter), (short_name, short_abbr, short_letter) = names
    if not spoken and chance(rng, 0.3):
        if chance(rng, 0.5):
            gap = rng.choice(("", " "))
            tail = short_letter if chance(rng, 0.6) else short_abbr
            return f"{large}{long_letter}{gap}{small}{tail}"
        return f"{large} {long_abbr} {small} {short_abbr}"
    article = "an" if long_name == "hour" else "a"
    first = say_integer(rng, large, spoken=spoken)
    if large == 1 and chance(rng, 0.5):
        first = article
    head = f"{first} {long_name}{'s' if large > 1 else ''}"
    tail = f"{say_integer(rng, small, spoken=spoken)} {short_name}{'s' if small > 1 else ''}"
    return f"{head}{rng.choice((' and ', ' and ', ' '))}{tail}"


def delay(rng: Rng) -> tuple[Phrase, int]:
    """A delay with its preposition ("in ten minutes", "an hour from now"), seconds."""
    said, seconds = span(rng)
    template = weighted(
        rng,
        [
            ("in {0}", 8),
            ("{0} from now", 1.5),
            ("after {0}", 0.8),
            ("in {0} time", 0.1),
            ("starting in {0}", 0.25),
            ("in about {0}", 0.15),
            ("in exactly {0}", 0.1),
        ],
    )
    return Phrase(template.format(said), template.format("<delay>")), seconds


def duration(rng: Rng) -> tuple[Phrase, int]:
    """A duration with its preposition ("for an hour"), seconds."""
    said, seconds = span(rng)
    template = weighted(
        rng,
        [
            ("for {0}", 9),
            ("for the next {0}", 1),
            ("for about {0}", 0.15),
            ("for exactly {0}", 0.1),
        ],
    )
    return Phrase(template.format(said), template.format("<duration>")), seconds
