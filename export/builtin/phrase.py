"""Phrases: words with the mark that says which part of a sentence shape they fill."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Rng = random.Random

# Copied words stand between these, so that the noise leaves them alone.
KEEP_OPEN, KEEP_CLOSE = "\x01", "\x02"


class Phrase(NamedTuple):
    """Words as said, and their mark: the same with every slot replaced by its name."""

    text: str
    mark: str


EMPTY = Phrase("", "")


def words(text: str) -> Phrase:
    """A phrase whose words are themselves part of the shape."""
    return Phrase(text, text)


def kept(text: str, mark: str) -> Phrase:
    """A phrase whose words must be copied to the letter, so that no typo may enter them."""
    return Phrase(f"{KEEP_OPEN}{text}{KEEP_CLOSE}", mark)


def fill(template: str, **slots: Phrase) -> Phrase:
    """Put phrases into a template, in the text and in the mark; empty ones leave no gap."""
    text = template.format(**{name: phrase.text for name, phrase in slots.items()})
    mark = template.format(**{name: phrase.mark for name, phrase in slots.items()})
    return Phrase(" ".join(text.split()), " ".join(mark.split()))


def join(*phrases: Phrase) -> Phrase:
    """Phrases one after another, empty ones left out."""
    return Phrase(
        " ".join(phrase.text for phrase in phrases if phrase.text),
        " ".join(phrase.mark for phrase in phrases if phrase.mark),
    )


def chance(rng: Rng, probability: float) -> bool:
    """True with this probability."""
    return rng.random() < probability


def weighted(rng: Rng, options: Sequence[tuple[T, float]]) -> T:
    """One of the options, each with its weight."""
    values, weights = zip(*options, strict=True)
    picked: T = rng.choices(values, weights)[0]
    return picked
