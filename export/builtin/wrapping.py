"""Politeness, fillers, punctuation, case and typos around a draft."""

from __future__ import annotations

import functools

from .phrase import KEEP_CLOSE, KEEP_OPEN, Rng, chance, weighted
from .shapes import Draft
from .tables import lines
from .vocabulary import DEVICE_WORDS, FOREIGN_DEVICES, FOREIGN_ROOMS, ROOM_WORDS, gerund

_FILLERS = lines("fillers")
# Heads that a clause with its verb in the base form follows.
_HEADS = lines("heads")
_GERUND_HEADS = [
    "would you mind",
    "would you mind",
    "would you mind",
    "do you mind",
    "do you mind",
    "mind",
    "how about",
    "would you be so kind as to consider",
    "i'd appreciate you",
    "what about",
    "can i get you to start by",
][:7]
_NOUN_HEADS = lines("noun_heads")
_WISHES = [
    "i want",
    "i'd like",
    "i would like",
    "can we have",
    "could we have",
    "let's have",
    "we want",
    "we'd like",
    "can i have",
    "please have",
    "i need",
    "get",
    "we need",
    "i want to have",
]
_TAILS = lines("tails")
_ASK_HEADS = [
    "can you tell me",
    "could you tell me",
    "do you know",
    "tell me",
    "please tell me",
    "i want to know",
    "i'd like to know",
    "can you check",
    "please check",
    "i wonder",
]


def dress(rng: Rng, draft: Draft) -> str:
    """The request as somebody would say or type it.

    Args:
        rng: Where the draws come from.
        draft: What is asked.

    Returns:
        Text; labels in it are as the answer has them, but for case.
    """
    core = draft.core.text
    before = [part.text for part in draft.before]
    after = [part.text for part in draft.after]
    if draft.kind == "sensor":
        return _sensor_case(rng, core)
    if draft.form == "raw":
        return _typed(rng, core) if chance(rng, 0.5) else core
    head, tail = _manners(rng, draft)
    if draft.form == "verb" and head in _GERUND_HEADS:
        verb, _, rest = core.partition(" ")
        core = f"{gerund(verb)} {rest}".strip()
    text = _assemble(rng, head, core, before, after, tail)
    return _typed(rng, _punctuated(rng, text, draft))


def _manners(rng: Rng, draft: Draft) -> tuple[str, str]:
    """(words before the clause, words after the sentence)."""
    head = tail = ""
    if draft.form == "verb" and chance(rng, 0.45):
        if chance(rng, 0.12) and not draft.core.text.startswith(KEEP_OPEN):
            head = rng.choice(_GERUND_HEADS)
        else:
            head = rng.choice(_HEADS)
    elif draft.form == "wish":
        head = rng.choice(_WISHES)
    elif draft.form == "noun" and chance(rng, 0.5):
        taken = draft.core.text.startswith(("give me", "i need"))
        head = "" if taken else rng.choice(_NOUN_HEADS)
    elif draft.form == "question" and chance(rng, 0.06):
        head = rng.choice(("so", "hey", "tell me", "just checking"))
    if draft.form in ("verb", "noun", "wish") and chance(rng, 0.22):
        tail = rng.choice(_TAILS)
    elif draft.form == "question" and chance(rng, 0.07):
        tail = rng.choice(("please", "right now", "now", "at the moment", "by any chance", "again"))
    if chance(rng, 0.13) and draft.form != "free":
        head = f"{rng.choice(_FILLERS)}{rng.choice(('', ',', ','))} {head}".strip()
        if chance(rng, 0.1):
            head = f"{rng.choice(_FILLERS)} {head}"
    return head, tail


def _assemble(
    rng: Rng, head: str, core: str, before: list[str], after: list[str], tail: str
) -> str:
    comma = "," if chance(rng, 0.4) else ""
    opening = [f"{part}{comma}" for part in before]
    if head and opening and chance(rng, 0.3) and head in _HEADS:
        opening, core = [], f"{core}"
        parts = [*(f"{part}{comma}" for part in before), head, core, *after]
    else:
        parts = [*opening, head, core, *after]
    if after and chance(rng, 0.04):
        parts[-1] = f"um {parts[-1]}" if chance(rng, 0.5) else f", {parts[-1]}"
    if after and chance(rng, 0.03):
        parts.insert(-1, "please")
    if after and chance(rng, 0.04):
        parts[-2] += ","
    if tail:
        parts.append(f", {tail}" if chance(rng, 0.2) else tail)
    return " ".join(part for part in parts if part).replace(" ,", ",")


def _punctuated(rng: Rng, text: str, draft: Draft) -> str:
    asked = draft.form == "question" or text.startswith(
        ("can ", "could ", "would ", "will ", "do ")
    )
    if asked:
        end = weighted(rng, [("", 5), ("?", 6), (".", 0.4), ("??", 0.1)])
    else:
        end = weighted(rng, [("", 7), (".", 3.5), ("!", 0.7), ("...", 0.1), (" .", 0.05)])
    if end and text.endswith((".", "?", "!")):
        end = ""
    if text.endswith(KEEP_CLOSE) or draft.kind != "none" or chance(rng, 0.6):
        text += end
    return text


def _typed(rng: Rng, text: str) -> str:
    """Apostrophes, typos and case, everywhere but in what must be copied."""
    drop = chance(rng, 0.25)
    if chance(rng, 0.012) and KEEP_OPEN not in text:
        text = text.replace(" the ", " teh ", 1)
    elif chance(rng, 0.03):
        text = text.replace(" the ", " ") if KEEP_OPEN not in text else text
    curly = chance(rng, 0.05)
    typos = weighted(rng, [(0, 8.2), (1, 1.6), (2, 0.35)])
    pieces: list[str] = []
    for index, chunk in enumerate(text.replace(KEEP_CLOSE, KEEP_OPEN).split(KEEP_OPEN)):
        if index % 2 == 0:
            if drop:
                chunk = chunk.replace("'", "")
            if index == 0 and chance(rng, 0.025):
                chunk = _hesitating(rng, chunk)
            # A slip behind a label would read as part of it.
            while index == 0 and typos and chance(rng, 0.85):
                chunk = _mistyped(rng, chunk)
                typos -= 1
        pieces.append(chunk.replace("'", "’") if curly and index % 2 == 0 else chunk)
    return _cased(rng, "".join(pieces))


_HESITATIONS = ("um", "uh", "like", "er", "uhm", "you know")


def _hesitating(rng: Rng, text: str) -> str:
    """A filler or a doubled word somewhere inside."""
    parts = text.split(" ")
    at = rng.randrange(len(parts))
    if at == 0 or not parts[at].isalpha():
        return text
    extra = parts[at] if chance(rng, 0.25) else rng.choice(_HESITATIONS)
    return " ".join((*parts[:at], extra, *parts[at:]))


def _cased(rng: Rng, text: str) -> str:
    style = weighted(rng, [("as is", 5), ("sentence", 4), ("upper", 0.4), ("title", 0.4)])
    if style == "sentence":
        return text[:1].upper() + text[1:].replace(" i ", " I ").replace(" i'", " I'")
    if style == "title":
        return " ".join(word[:1].upper() + word[1:] for word in text.split(" "))
    return text.upper() if style == "upper" else text


def _sensor_case(rng: Rng, text: str) -> str:
    if chance(rng, 0.04):
        return text.upper()
    return "S" + text[1:] if chance(rng, 0.06) else text


@functools.cache
def _lexicon() -> frozenset[str]:
    """Words that a typo must not turn into, for they mean something else."""
    tables = (*DEVICE_WORDS.values(), *ROOM_WORDS.values(), FOREIGN_DEVICES, FOREIGN_ROOMS)
    known = {word for table in tables for entry in table for word in entry.split()}
    from .labels import book_words

    return frozenset(known.union(book_words()))


_EXACT = frozenset(
    [
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "thirty",
        "forty",
        "fifty",
        "sixty",
        "seventy",
        "eighty",
        "ninety",
        "lock",
        "unlock",
        "increase",
        "decrease",
        "sensor",
        "until",
        "till",
        "don't",
        "dont",
        "didn't",
    ]
)


def _mistyped(rng: Rng, text: str) -> str:
    parts = text.split(" ")
    able = [
        index
        for index, word in enumerate(parts)
        if len(word) >= 5 and word.isalpha() and word.isascii() and word not in _EXACT
    ]
    if not able:
        return text
    index = rng.choice(able)
    for _ in range(4):
        wrong = _one_slip(rng, parts[index])
        if wrong not in _lexicon() and wrong != parts[index]:
            parts[index] = wrong
            break
    return " ".join(parts)


def _one_slip(rng: Rng, word: str) -> str:
    """A letter dropped, doubled, or swapped with the next."""
    kind = weighted(rng, [("drop", 3), ("swap", 3), ("double", 2)])
    at = rng.randrange(1, len(word) - (kind == "swap"))
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    if kind == "swap":
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at] + word[at:]
