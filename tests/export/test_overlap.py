"""Calibration text and scored text: what counts as an overlap."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import ArgumentError
from edge_llm_export.evaluate.overlap import PASSAGE, ScoredText, check_disjoint


def letters(count: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghij", k=count))


def shared_passage(calibration: str, scored: str) -> str | None:
    return ScoredText(scored).passage(calibration)


def test_a_shared_passage_is_named() -> None:
    passage = letters(PASSAGE, 0)
    with pytest.raises(ArgumentError, match=passage) as caught:
        check_disjoint(letters(500, 1) + passage, letters(300, 2) + passage + letters(9, 3))
    assert caught.value.argument == "calibration"


def test_the_lines_are_named_on_which_it_ends() -> None:
    passage = " ".join(letters(9, seed) for seed in range(7))
    left = "one\ntwo\n" + passage.replace(" ", "\n") + "\nend\n"
    right = letters(300, 2) + "\n\n" + passage.upper() + "\nend"
    with pytest.raises(ArgumentError, match=r"line 9 of the calibration.* line 3 of the scored"):
        check_disjoint(left, right)


def test_different_texts_pass() -> None:
    check_disjoint(letters(5000, 1), letters(5000, 2))
    check_disjoint("", letters(100, 1))
    check_disjoint(letters(100, 1), "")


def test_case_white_space_and_punctuation_hide_nothing() -> None:
    words = [letters(6, seed) for seed in range(12)]
    assert shared_passage("\n".join(words), " -- ".join(words).upper()) is not None


def test_rulers_are_no_passage() -> None:
    assert shared_passage("a\n" + "-" * 200 + "\nb", "c\n" + "-" * 200 + "\nd") is None


def test_a_short_text_counts_whole() -> None:
    assert shared_passage("turn on the light", "please, turn on the light now") == (
        "turn on the light"
    )
    assert shared_passage("turn on the light", letters(200, 1)) is None


@given(
    st.text("ab", min_size=PASSAGE, max_size=PASSAGE + 30),
    st.text("ab", min_size=PASSAGE, max_size=PASSAGE + 30),
    st.integers(0, PASSAGE + 8),
)
def test_agrees_with_the_plain_definition(left: str, right: str, common: int) -> None:
    right = right[: len(right) // 2] + left[:common] + right[len(right) // 2 :]
    passages = [right[start : start + PASSAGE] for start in range(len(right) - PASSAGE + 1)]
    assert shared_passage(left, right) == next((one for one in passages if one in left), None)
