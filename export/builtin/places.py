"""Noun phrases for devices and adverbials for rooms."""

from __future__ import annotations

from typing import NamedTuple

from .phrase import EMPTY, Phrase, Rng, chance, fill, weighted
from .vocabulary import DEVICE_WORDS, EVERYWHERE, MASS, OUTDOOR, PLURAL, ROOM_WORDS


class Target(NamedTuple):
    """A device as said, and where the room, if any, is said.

    Attributes:
        np: The noun phrase, the room inside it where it is an attribute ("the kitchen light").
        device: One of the contract's devices.
        room: One of the contract's rooms, or None.
        where: The adverbial for the room ("in the kitchen"); empty where np says it.
    """

    np: Phrase
    device: str
    room: str | None
    where: Phrase


ROOMLESS = frozenset({"garage"})
_ROOMS = tuple(ROOM_WORDS)


def any_room(rng: Rng) -> str:
    """A room that has a name of its own (not `all`)."""
    return rng.choice(_ROOMS)


def room_words(rng: Rng, room: str) -> str:
    """How a person calls a room, without an article."""
    return rng.choice(ROOM_WORDS[room])


def where(rng: Rng, room: str) -> Phrase:
    """An adverbial for a room: "in the kitchen", "on the balcony", "everywhere"."""
    if room == "all":
        return Phrase(rng.choice(EVERYWHERE), "<everywhere>")
    preposition = rng.choice(OUTDOOR.get(room, ("in",)))
    article = weighted(rng, [("the ", 12), ("my ", 1), ("", 1), ("our ", 0.5)])
    return Phrase(f"{preposition} {article}{room_words(rng, room)}", "in <room>")


def device_word(rng: Rng, device: str) -> str:
    """How a person calls a device, without an article."""
    return rng.choice(DEVICE_WORDS[device])


def _article(rng: Rng, word: str) -> str:
    if word in MASS:
        return weighted(rng, [("the ", 9), ("", 2), ("our ", 0.3)])
    if word in PLURAL:
        return weighted(rng, [("the ", 10), ("", 1.5), ("my ", 1), ("our ", 0.4), ("those ", 0.2)])
    return weighted(
        rng, [("the ", 12), ("my ", 1.2), ("", 1), ("our ", 0.4), ("that ", 0.4), ("this ", 0.1)]
    )


def target(rng: Rng, device: str, *, room: float = 0.6, everywhere: float = 0.07) -> Target:
    """A device, perhaps with a room.

    Args:
        rng: Where the draw comes from.
        device: One of the contract's devices.
        room: Probability that a room is said.
        everywhere: Probability of "all the lights" and the like.

    Returns:
        The noun phrase and the adverbial.
    """
    word = device_word(rng, device)
    if device in ROOMLESS:
        room, everywhere = 0.0, 0.0
    if chance(rng, everywhere):
        return _all_of(rng, device, word)
    if not chance(rng, room):
        return Target(Phrase(_article(rng, word) + word, "<device>"), device, None, EMPTY)
    place = any_room(rng)
    if chance(rng, 0.42) and word not in ("front door", "back door", "side door"):
        article = _article(rng, word)
        return Target(_attribute(rng, place, article, word), device, place, EMPTY)
    np = Phrase(_article(rng, word) + word, "<device>")
    if chance(rng, 0.03):
        np = Phrase(f"all {np.text}" if np.text.startswith("the ") else np.text, np.mark)
    return Target(np, device, place, where(rng, place))


def _attribute(rng: Rng, place: str, article: str, word: str) -> Phrase:
    said = room_words(rng, place)
    return Phrase(f"{article}{said} {word}", "<room> <device>")


def _all_of(rng: Rng, device: str, word: str) -> Target:
    """Such as "all the lights", "every light in the kitchen": a room that is said counts."""
    if chance(rng, 0.3):
        np = Phrase(f"the {word}", "<device>")
        return Target(np, device, "all", where(rng, "all"))
    plural = word if word in PLURAL or word in MASS else word + "s"
    single = word[:-1] if word in PLURAL and word.endswith("s") else word
    if device == "tv" and word.endswith("y"):
        plural = word
    np = weighted(
        rng,
        [
            (Phrase(f"all the {plural}", "all the <device>"), 4.0),
            (Phrase(f"all {plural}", "all <device>"), 1.5),
            (Phrase(f"all of the {plural}", "all of the <device>"), 0.7),
            (Phrase(f"every {single}", "every <device>"), 1.6),
            (Phrase(f"every single {single}", "every single <device>"), 0.3),
        ],
    )
    if chance(rng, 0.35):
        place = any_room(rng)
        return Target(np, device, place, where(rng, place))
    if chance(rng, 0.15):
        return Target(np, device, "all", Phrase("in the house", "<everywhere>"))
    return Target(np, device, "all", EMPTY)


def with_where(item: Target, rng: Rng, *, inside: float = 0.5) -> tuple[Phrase, Phrase]:
    """Put the room adverbial into the noun phrase, or leave it to be placed in the sentence.

    Returns:
        (noun phrase, adverbial still to be placed).
    """
    if item.where.text and chance(rng, inside):
        return fill("{np} {where}", np=item.np, where=item.where), EMPTY
    return item.np, item.where
