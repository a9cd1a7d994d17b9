from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.decoding.penalties import (
    TokenCounts,
    apply_count_penalties,
    apply_repetition_penalty,
)

token_lists = st.lists(st.integers(0, 300), max_size=200)


@given(start=token_lists, more=token_lists)
def test_counts(start: list[int], more: list[int]) -> None:
    counts = TokenCounts(start)
    for token in more:
        counts.add(token)
    got = dict(zip(counts.tokens.tolist(), counts.counts.tolist(), strict=True))
    assert got == Counter(start + more)
    assert len(got) == counts.tokens.size


@pytest.mark.parametrize("penalty", [1.3, 0.7, 1.0000001, 1000.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(500) * 10).astype(np.float32)
    logits[:3] = [0.0, -0.0, -np.inf]
    tokens = [0, 1, 2, *rng.integers(0, 500, 200).tolist()]
    theirs = processors.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([tokens]), torch.from_numpy(logits.copy())[None]
    )[0].numpy()
    apply_repetition_penalty(logits, TokenCounts(tokens).tokens, penalty)
    np.testing.assert_array_equal(logits, theirs)


def test_presence_counts_once_and_frequency_each_time() -> None:
    logits = np.array([5, 5, 5, -5], np.float32)
    counts = TokenCounts([1, 3, 3, 3])
    apply_count_penalties(logits, counts.tokens, counts.counts, presence=0.5, frequency=0.25)
    np.testing.assert_array_equal(logits, np.array([5, 4.25, 5, -6.25], np.float32))


def test_nothing_seen_changes_nothing() -> None:
    logits = np.array([1, -1], np.float32)
    counts = TokenCounts()
    apply_repetition_penalty(logits, counts.tokens, 2.0)
    apply_count_penalties(logits, counts.tokens, counts.counts, presence=1.0, frequency=1.0)
    np.testing.assert_array_equal(logits, [1, -1])
