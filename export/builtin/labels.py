"""Labels: what a timer, an alarm or a reminder is for, from words of every kind."""

from __future__ import annotations

import functools
import hashlib

from .answer import label_of
from .clock import clock_time
from .phrase import Phrase, Rng, chance, kept, weighted
from .tables import lines

NAMES = lines("names")
THINGS = lines("things")
TASKS = lines("tasks")
FACTS = lines("facts")
_ONSETS = [
    "b",
    "bl",
    "br",
    "c",
    "ch",
    "cl",
    "cr",
    "d",
    "dr",
    "f",
    "fl",
    "fr",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "kn",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "ph",
    "pl",
    "pr",
    "qu",
    "r",
    "s",
    "sc",
    "sh",
    "sk",
    "sl",
    "sm",
    "sn",
    "sp",
    "st",
    "str",
    "sw",
    "t",
    "th",
    "tr",
    "tw",
    "v",
    "w",
    "wh",
    "x",
    "y",
    "z",
]
_NUCLEI = [
    "a",
    "a",
    "e",
    "e",
    "i",
    "i",
    "o",
    "o",
    "u",
    "u",
    "ai",
    "ea",
    "ee",
    "oo",
    "ou",
    "ie",
    "ia",
    "y",
    "au",
    "oi",
]
_CODAS = [
    "",
    "",
    "",
    *[
        "b",
        "ck",
        "d",
        "f",
        "g",
        "l",
        "ll",
        "lt",
        "m",
        "mp",
        "n",
        "nd",
        "ng",
        "nk",
        "nt",
        "p",
        "r",
        "rd",
        "rk",
        "rn",
        "rt",
        "s",
        "sh",
        "sk",
        "ss",
        "st",
        "t",
        "th",
        "x",
        "z",
    ],
]
_ACCENTED = lines("accented")


@functools.cache
def book_words() -> tuple[str, ...]:
    """Words of two public-domain novels, in alphabetical order, less those that mean something."""
    return tuple(word for word in lines("book_words") if word not in _MEANINGFUL)


_MEANINGFUL = frozenset(
    [
        "please",
        "until",
        "till",
        "unless",
        "tomorrow",
        "yesterday",
        "today",
        "tonight",
        "every",
        "everything",
        "everywhere",
        "if",
        "when",
        "once",
        "whenever",
        "after",
        "before",
        "noon",
        "midnight",
        "morning",
        "afternoon",
        "evening",
        "night",
        "now",
        "hour",
        "hours",
        "minute",
        "minutes",
        "second",
        "seconds",
        "half",
        "quarter",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fifteen",
        "twenty",
        "thirty",
        "forty",
        "fifty",
        "hundred",
        "day",
        "days",
        "week",
        "monday",
        "tuesday",
        "wednesday",
        "thursday",
        "friday",
        "saturday",
        "sunday",
        "not",
        "never",
        "all",
        "from",
        "timer",
        "alarm",
        "reminder",
        "light",
        "lights",
        "lamp",
        "lamps",
        "door",
        "doors",
        "heat",
        "garden",
        "kitchen",
        "office",
        "study",
        "hall",
        "yard",
        "cellar",
        "lounge",
        "corridor",
        "nursery",
        "bedroom",
        "music",
        "robot",
        "socket",
        "curtains",
        "shutters",
        "shades",
        "blinds",
        "fan",
        "and",
        "then",
        "don",
    ]
)


def is_held_word(word: str) -> bool:
    """Whether a word may stand in labels of the held-out split only (one in ten)."""
    return hashlib.blake2b(word.encode(), digest_size=1).digest()[0] < 26


@functools.cache
def _side(held_out: bool) -> tuple[str, ...]:
    return tuple(word for word in book_words() if is_held_word(word) == held_out)


def pseudo_word(rng: Rng) -> str:
    """A pronounceable word of no language."""
    syllables = weighted(rng, [(1, 2), (2, 5), (3, 3)])
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables)
    )[:14]


def any_word(rng: Rng, held_out: bool) -> str:
    """A word for a label: out of a book, made up, accented, or with digits."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(_side(held_out))
    if kind < 0.92:
        for _ in range(100):
            word = pseudo_word(rng)
            if is_held_word(word) == held_out:
                return word
    if kind < 0.96:
        return rng.choice(_ACCENTED)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return rng.choice(letters) + str(rng.randint(1, 99)) + rng.choice(("", rng.choice(letters)))


def thing(rng: Rng, held_out: bool) -> str:
    """A noun phrase without its article: "pasta", "zorbel training"."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(THINGS)
    count = weighted(rng, [(1, 6), (2, 5), (3, 1)])
    new = [any_word(rng, held_out) for _ in range(count)]
    if kind < 0.55:
        new[-1] = rng.choice(THINGS)
    return " ".join(new)


def task(rng: Rng, held_out: bool) -> str:
    """A verb phrase: "call mum", "flip the zorbels"."""
    if chance(rng, 0.12):
        return " ".join(any_word(rng, held_out) for _ in range(rng.randint(2, 5)))
    return _compose(rng, rng.choice(TASKS), held_out)


def fact(rng: Rng, held_out: bool) -> str:
    """A clause, as after "remind me that"."""
    return _compose(rng, rng.choice(FACTS), held_out)


def _compose(rng: Rng, template: str, held_out: bool) -> str:
    parts = template.split(" ")
    for index, part in enumerate(parts):
        if "{n}" in part:
            new = any_word(rng, held_out) if chance(rng, 0.4) else rng.choice(NAMES)
            parts[index] = part.replace("{n}", new)
        elif "{t}" in part:
            parts[index] = part.replace("{t}", thing(rng, held_out))
        elif "{d}" in part:
            parts[index] = part.replace("{d}", str(rng.randint(2, 30)))
        elif part not in _JOINTS and chance(rng, 0.12):
            parts[index] = any_word(rng, held_out)
    return " ".join(parts)


_JOINTS = frozenset(
    [
        "the",
        "a",
        "an",
        "my",
        "to",
        "for",
        "in",
        "on",
        "at",
        "of",
        "and",
        "from",
        "with",
        "about",
        "some",
        "up",
        "out",
        "off",
        "is",
    ]
)


def labelled(text: str, mark: str = "<label>") -> tuple[Phrase, str]:
    """Words that are copied, and the label that stands for them."""
    return kept(text, mark), label_of(text)


def noun_label(rng: Rng, held_out: bool) -> tuple[Phrase, str]:
    """A noun phrase with or without an article, and its label."""
    article = weighted(rng, [("", 5), ("the ", 5), ("my ", 2.5), ("a ", 0.7), ("our ", 0.3)])
    return labelled(article + thing(rng, held_out))


def said_time_label(rng: Rng) -> tuple[Phrase, str]:
    """A time before a noun ("my 7 am alarm"), and "HH:MM"."""
    said, answer = clock_time(rng, bare=0.3)
    for tail in (" in the", " at night", " tonight", " this "):
        if tail in said:
            return said_time_label(rng)
    return Phrase(said, "<time>"), answer
