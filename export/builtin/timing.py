"""When a command happens and how long it lasts, and where in the sentence that is said."""

from __future__ import annotations

from typing import NamedTuple

from .answer import Answer
from .clock import at_time, delay, duration
from .phrase import Phrase, Rng, chance, weighted, words


class Timing(NamedTuple):
    """The adverbials of time in a request and what they answer."""

    phrases: tuple[Phrase, ...] = ()
    time: str | None = None
    delay_s: int | None = None
    duration_s: int | None = None

    def answer(
        self,
        action: str,
        device: str | None,
        room: str | None,
        value: int | float | None = None,
        unit: str | None = None,
    ) -> Answer:
        """The whole answer of a device command at this time."""
        return Answer(action, device, room, value, unit, self.time, self.delay_s, self.duration_s)


def timing(rng: Rng, *, plain: float = 0.6) -> Timing:
    """Adverbials of time for a device command.

    Args:
        rng: Where the draw comes from.
        plain: Probability of none at all.

    Returns:
        None, one or two of: a time or a delay, and a duration.
    """
    if chance(rng, plain):
        if chance(rng, 0.05):
            return Timing((words(rng.choice(("tonight", "today", "tonight"))),))
        return Timing()
    kind = weighted(rng, [("time", 4), ("delay", 3), ("duration", 3), ("both", 1.1)])
    if kind == "duration":
        phrase, seconds = duration(rng)
        return Timing((phrase,), duration_s=seconds)
    phrases: tuple[Phrase, ...] = ()
    last: int | None = None
    if kind == "both":
        phrase, last = duration(rng)
        phrases = (phrase,)
    if kind == "time" or (kind == "both" and chance(rng, 0.5)):
        phrase, clock = at_time(rng)
        return Timing(_order(rng, phrases, phrase), time=clock, duration_s=last)
    phrase, seconds = delay(rng)
    return Timing(_order(rng, phrases, phrase), delay_s=seconds, duration_s=last)


def _order(rng: Rng, phrases: tuple[Phrase, ...], phrase: Phrase) -> tuple[Phrase, ...]:
    return (*phrases, phrase) if chance(rng, 0.4) else (phrase, *phrases)


def place(
    rng: Rng, where: Phrase, when: Timing | None, *, front: float = 0.18
) -> tuple[tuple[Phrase, ...], tuple[Phrase, ...]]:
    """Spread the adverbials over the sentence.

    Args:
        rng: Where the draw comes from.
        where: The room adverbial, perhaps empty.
        when: The adverbials of time, or None.
        front: Probability that one is said before the clause.

    Returns:
        (before the clause, after it).
    """
    before: list[Phrase] = []
    after: list[Phrase] = []
    parts = [where] if where.text else []
    parts += when.phrases if when is not None else ()
    if len(parts) > 1 and chance(rng, 0.3):
        rng.shuffle(parts)
    for part in parts:
        (before if chance(rng, front) else after).append(part)
    return tuple(before), tuple(after)
