"""Samples, their sentence shapes, and the rule that keeps some shapes out of training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from .answer import Answer
from .phrase import Phrase

# Chosen so that the plainest shapes ("turn on <device>") stay on the training side.
_SALT = b"edge-llm builtin 326"
_SHAPES_HELD, _COMBOS_HELD = 7, 5  # percent


@dataclass(frozen=True, slots=True)
class Draft:
    """A request before politeness and noise, in the parts that wrapping may move.

    Attributes:
        kind: What the figures are reported by ("switch", "timer", ...).
        core: The clause; verb first where `form` is "verb".
        answer: What it asks for, as the model must write it.
        form: "verb" (may become a gerund), "noun" ("the lights on"), "question" or "free".
        before: Adverbials said before the clause.
        after: Adverbials said after it.
    """

    kind: str
    core: Phrase
    answer: str
    form: str = "verb"
    before: tuple[Phrase, ...] = ()
    after: tuple[Phrase, ...] = ()
    combo: str = field(default="")

    @property
    def shape(self) -> str:
        """The sentence with every slot replaced by its name; politeness is no part of it."""
        parts = (*self.before, self.core, *self.after)
        return " ".join(part.mark for part in parts if part.mark)


def draft(
    kind: str,
    core: Phrase,
    answer: Answer,
    *,
    form: str = "verb",
    before: tuple[Phrase, ...] = (),
    after: tuple[Phrase, ...] = (),
) -> Draft:
    """A draft with the combination (action, device, room) that its answer makes."""
    combo = ""
    if answer.room is not None:
        combo = f"{answer.action}/{answer.device}/{answer.room}"
    return Draft(kind, core, answer.to_json(), form, before, after, combo)


def _percentile(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=4, key=_SALT).digest()
    return int.from_bytes(digest, "big") / 2**32 * 100


def shape_is_held(shape: str) -> bool:
    """Whether a sentence shape belongs to the held-out split."""
    return _percentile(shape) < _SHAPES_HELD


def combo_is_held(combo: str) -> bool:
    """Whether a combination of action, device and room belongs to the held-out split."""
    return combo != "" and _percentile(combo) < _COMBOS_HELD


def is_held(sample: Draft) -> bool:
    """Whether training must never see a draft: for its shape or for its combination."""
    return shape_is_held(sample.shape) or combo_is_held(sample.combo)
