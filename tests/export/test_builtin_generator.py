"""The generator: seeded, broad, and divided by a line that training cannot cross."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest

from edge_llm_export.builtin import generator
from edge_llm_export.builtin.answer import ACTIONS, DEVICES, ROOMS, parse
from edge_llm_export.builtin.evaluation import SPLIT_SIZE, held_out_split
from edge_llm_export.builtin.generator import MIXTURE, Sample, samples
from edge_llm_export.builtin.labels import (
    FACTS,
    NAMES,
    TASKS,
    THINGS,
    book_words,
    is_held_word,
)
from edge_llm_export.builtin.phrase import KEEP_CLOSE, KEEP_OPEN, weighted
from edge_llm_export.builtin.sensors import sentence
from edge_llm_export.builtin.shapes import Draft, combo_is_held, is_held, shape_is_held
from edge_llm_export.builtin.vocabulary import DEVICE_WORDS, ROOM_WORDS


@pytest.fixture(scope="module")
def drawn() -> list[Sample]:
    return list(islice(samples(3), 30_000))


@pytest.fixture(scope="module")
def drafts() -> list[Draft]:
    """Drafts before the line is drawn: both sides."""
    rng = random.Random(5)
    shares = [(maker, weights[0]) for maker, weights in MIXTURE]
    return [weighted(rng, shares)(rng, False) for _ in range(10_000)]


def _plain(request: str) -> str:
    return " ".join(request.lower().split())


def test_same_seed_same_samples() -> None:
    first, second = (list(islice(samples(8), 300)) for _ in range(2))
    assert first == second
    assert first != list(islice(samples(9), 300))
    assert list(islice(samples(8, held_out=True), 50)) != first[:50]
    late = Counter(sample.kind for sample in islice(samples(8, stage=2), 5_000))
    early = Counter(sample.kind for sample in islice(samples(8), 5_000))
    assert late["sensor"] > early["sensor"]
    assert late["none"] > early["none"]


def test_every_answer_is_of_the_contract(drawn: list[Sample]) -> None:
    for sample in drawn:
        assert KEEP_OPEN not in sample.request
        assert KEEP_CLOSE not in sample.request
        if sample.kind == "sensor":
            assert sentence(sample.request) == sample.answer
            continue
        answer = parse(sample.answer)
        if answer.label is not None:
            assert answer.label in _plain(sample.request)


def test_every_value_of_every_domain_occurs(drawn: list[Sample]) -> None:
    answers = [parse(s.answer) for s in drawn if s.kind != "sensor"]
    assert {answer.action for answer in answers} == set(ACTIONS)
    assert {answer.device for answer in answers} == {None, *DEVICES}
    assert {answer.room for answer in answers} == {None, *ROOMS}
    assert {answer.unit for answer in answers} == {None, "percent", "celsius", "fahrenheit"}
    kinds = Counter(sample.kind for sample in drawn)
    assert min(kinds.values()) > 500


def test_every_synonym_occurs_with_its_meaning(drawn: list[Sample]) -> None:
    by_device = dict.fromkeys(DEVICE_WORDS, "")
    by_room = dict.fromkeys(ROOM_WORDS, "")
    for sample in drawn:
        if sample.kind == "sensor":
            continue
        answer = parse(sample.answer)
        if answer.device in by_device:
            by_device[answer.device] += "\n" + sample.request.lower()
        if answer.room in by_room:
            by_room[answer.room] += "\n" + sample.request.lower()
    missing = {
        word for d, words in DEVICE_WORDS.items() for word in words if word not in by_device[d]
    }
    missing |= {w for r, words in ROOM_WORDS.items() for w in words if w not in by_room[r]}
    assert not missing


def test_the_training_side_never_yields_a_held_shape(drawn: list[Sample]) -> None:
    for sample in drawn:
        assert not shape_is_held(sample.shape)
        assert not combo_is_held(sample.combo)


def test_the_line_is_drawn_for_every_shape(drafts: list[Draft]) -> None:
    """Force each shape and combination the grammar makes: one side or the other, never both."""
    parts = {(draft.shape, draft.combo): draft for draft in drafts}
    assert len(parts) > 4_000
    held = [draft for draft in parts.values() if is_held(draft)]
    assert 0.04 < len(held) / len(parts) < 0.2
    for draft in parts.values():

        def make(rng: random.Random, held: bool, draft: Draft = draft) -> Draft:
            return draft

        trained = generator._drawn(random.Random(0), make, False)
        tested = generator._drawn(random.Random(0), make, True)
        assert (trained is None) == is_held(draft)
        assert (tested is None) != is_held(draft)


def test_no_text_on_both_sides(drawn: list[Sample]) -> None:
    split = held_out_split()
    texts = {_plain(sample.request) for sample in split}
    assert len(split) == len(texts) == SPLIT_SIZE
    assert not texts & {_plain(sample.request) for sample in drawn}
    assert not {sample.shape for sample in split if shape_is_held(sample.shape)} & {
        sample.shape for sample in drawn
    }
    assert not {sample.combo for sample in split if combo_is_held(sample.combo)} & {
        sample.combo for sample in drawn
    }
    assert held_out_split(50) == split[:50]
    kinds = Counter(sample.kind for sample in split)
    assert set(kinds) == {sample.kind for sample in drawn}
    assert min(kinds.values()) >= 50


def test_held_words_label_nothing_in_training(drawn: list[Sample]) -> None:
    held = {word for word in book_words() if is_held_word(word) and len(word) > 5}
    assert len(held) > 200
    fixed = {word for entry in (*FACTS, *NAMES, *TASKS, *THINGS) for word in entry.split()}
    for sample in drawn:
        if sample.kind in ("timer", "alarm", "reminder", "cancel"):
            label = parse(sample.answer).label or ""
            assert not set(label.split()) & (held - fixed), sample


def test_shapes_are_many(drafts: list[Draft]) -> None:
    assert len({draft.shape for draft in drafts}) > 2_500
    assert len({draft.combo for draft in drafts}) > 800
