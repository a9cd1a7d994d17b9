"""Requests far outside the contract: chat, knowledge, arithmetic, code, other tongues, noise."""

from __future__ import annotations

import functools

from .labels import any_word, book_words, pseudo_word, thing
from .phrase import Phrase, Rng, chance, weighted
from .refusals import refuse
from .shapes import Draft
from .tables import lines


@functools.cache
def book_sentences() -> tuple[str, ...]:
    """Short sentences of two public-domain novels."""
    return lines("book_sentences")


_QUESTIONS = lines("questions")
_CHAT = lines("chat")
_PLACES = lines("places")
_FOREIGN = lines("foreign_tongues")
_TONGUES = lines("tongues")
_HOSTILE = lines("hostile")
_CODE = lines("code")
_MATHS = lines("maths")


def chatter(rng: Rng) -> Draft:
    """One request of a kind that has nothing to do with a home."""
    kind = weighted(
        rng,
        [
            ("question", 6),
            ("chat", 4),
            ("foreign", 1.2),
            ("tongue", 1.4),
            ("hostile", 1.4),
            ("code", 1),
            ("maths", 1.2),
            ("book", 4),
            ("words", 2.2),
            ("noise", 2.0),
            ("empty", 0.15),
            ("long", 0.12),
        ],
    )
    tables = {
        "question": _QUESTIONS,
        "chat": _CHAT,
        "foreign": _FOREIGN,
        "hostile": _HOSTILE,
        "code": _CODE,
        "maths": _MATHS,
    }
    if kind in tables:
        table = tables[kind]
        template = rng.choice(table)
        form = "question" if kind == "question" else "raw"
        return refuse(Phrase(_filled(rng, template), f"{kind} {template}"), form=form)
    if kind == "tongue":
        return refuse(Phrase(_tongue(rng), "<tongue>"), form="raw")
    if kind == "book":
        sentence = rng.choice(book_sentences())
        return refuse(Phrase(sentence, f"book {sentence}"), form="raw")
    return refuse(Phrase(_noise(rng, kind), f"<{kind}>"), form="raw")


def _tongue(rng: Rng) -> str:
    """A request in another language: one choice of every part of a row."""
    parts = rng.choice(_TONGUES).split(" | ")
    return " ".join(" ".join(rng.choice(part.split("/")) for part in parts).split())


_SPOILS = lines("spoils")


def _filled(rng: Rng, template: str) -> str:
    def topic() -> str:
        return thing(rng, False) if chance(rng, 0.6) else any_word(rng, False)

    command = rng.choice(_SPOILS).replace("{n}", str(rng.randint(2, 30)))
    place, other = rng.sample(_PLACES, 2)
    return template.format(
        x=topic(),
        y=topic(),
        p=place,
        q=other,
        c=command,
        n=rng.choice((rng.randint(1, 20), rng.randint(1, 2030))),
        m=rng.randint(1, 999),
    )


def _noise(rng: Rng, kind: str) -> str:
    if kind == "empty":
        return rng.choice(("", " ", ".", "?", "!", "...", "-", "??"))
    if kind == "long":
        text = " ".join(rng.choice(book_sentences()) for _ in range(rng.randint(4, 14)))
        return text if chance(rng, 0.6) else f"{text} {rng.choice(_SPOILS)}"
    if kind == "words":
        count = rng.randint(1, 14)
        return " ".join(
            rng.choice(book_words()) if chance(rng, 0.75) else pseudo_word(rng)
            for _ in range(count)
        )
    style = rng.random()
    length = rng.randint(1, 40) if chance(rng, 0.7) else int(20 * 22 ** rng.random())
    if style < 0.35:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(length))
    if style < 0.5:
        return "".join(
            rng.choice("0123456789!@#$%^&*()_+-=[]{};:<>,./?\\|~` ") for _ in range(length)
        )
    if style < 0.62:
        return rng.choice("asdfjklqwertyhgz!?.123") * length
    if style < 0.75:
        return "".join(
            rng.choice("😀🔥💡🏠👍❤️🤖🎉äöüßéèçñøåæœжщяйбд漢字日本中文한국어عربيहिन्दี" + " ")
            for _ in range(length)
        )
    if style < 0.85:
        return (
            rng.choice(("ha", "la", "na", "blah ", "no ", "test ", "a ", "the ")) * length
        ).strip()
    return "".join(chr(rng.randint(33, 126)) for _ in range(length))
