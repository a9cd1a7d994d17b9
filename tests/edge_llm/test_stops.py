from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.decoding.stops import StopMatcher
from edge_llm.errors import ArgumentError


def plain(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The plain definition: the first character that completes a stop string, then the longest."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    pieces=st.lists(st.text("ab\n", max_size=6), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
)
def test_result_is_that_of_the_plain_definition_however_the_text_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    text, matched = plain("".join(pieces), stops)
    matcher = StopMatcher(stops)
    shown = ""
    for n, piece in enumerate(pieces, start=1):
        shown += matcher.decode(piece)
        so_far = "".join(pieces[:n])
        if matcher.matched is None:
            # No more is held back than the longest proper prefix of a stop string.
            held = so_far.removeprefix(shown)
            assert shown + held == so_far
            longest = max(
                (k for s in stops for k in range(len(s)) if so_far.endswith(s[:k])), default=0
            )
            assert len(held) == longest
    assert (shown + matcher.flush(), matcher.matched) == (text, matched)


def test_a_stop_string_across_pieces_is_neither_leaked_nor_lost() -> None:
    matcher = StopMatcher(["</end>"])
    assert [matcher.decode(p) for p in ("one <", "/e", "n", "x </en", "d> two")] == [
        "one ",
        "",
        "",
        "</enx ",
        "",
    ]
    assert matcher.matched == "</end>"
    assert (matcher.decode("more"), matcher.flush()) == ("", "")


def test_the_longest_of_those_complete_at_once() -> None:
    matcher = StopMatcher(["b", "ab", "abc"])
    assert matcher.decode("xabc") == "x"
    assert matcher.matched == "ab"


def test_without_stops_all_passes() -> None:
    matcher = StopMatcher()
    assert (matcher.decode("a"), matcher.flush(), matcher.matched) == ("a", "", None)


@pytest.mark.parametrize("stops", [["a", ""], "ab", [1], [b"a"]])
def test_other_stops_are_refused(stops: Any) -> None:
    with pytest.raises(ArgumentError, match="stop"):
        StopMatcher(stops)
