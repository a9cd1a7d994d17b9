"""Chunks of a prompt keep to the time budget on machines of every speed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from edge_llm.engine.chunking import BUDGET_SECONDS, LEAST_WORK, TARGET_SECONDS, ChunkPlanner

Machine = Callable[[int, int], float]
# The shortest chunk is 2 tokens, 3 where it asks again, and the last token must not stand alone.
SHORTEST = 4

prompts = st.integers(1, 20_000)
widths = st.integers(2, 1024)
seconds = st.floats(1e-5, 10.0)


def planner(*, fixed: int | None = None, widest: int = 512, single: float = 0.01) -> ChunkPlanner:
    return ChunkPlanner(fixed=fixed, widest=widest, single_token=single)


def feed(chunks: ChunkPlanner, prompt: int, machine: Machine) -> list[tuple[int, float]]:
    """The chunks of a prompt and what each of them took."""
    fed: list[tuple[int, float]] = []
    done = 0
    while done < prompt:
        tokens = chunks.next(prompt - done)
        assert tokens >= 1
        took = machine(tokens, done)
        chunks.observe(tokens, took)
        fed.append((tokens, took))
        done += tokens
    assert done == prompt
    return fed


def linear(rate: float, *, share: float = 1.0, deeper: float = 0.0) -> Machine:
    """A machine whose step of n tokens at a depth takes ``1 + share * (n - 1)`` lone ones' time.

    Args:
        rate: Tokens per second, in long chunks at the start of the context.
        share: What a further token costs, relative to a lone one.
        deeper: By how much a token costs more per 1,000 tokens in front of it.
    """

    def machine(tokens: int, depth: int) -> float:
        lone = 1 / (rate * share)
        return lone * (1 + share * (tokens - 1)) * (1 + deeper * depth / 1000)

    return machine


def needed(tokens: int, machine: Machine, *, slack: float = 2.0) -> bool:
    """Whether a chunk must be this long for a step's own cost to be a small part of it.

    Or so long for whole tokens: asking again rounds up, and a last token is not left alone.
    """
    each = machine(2, 0) - machine(1, 0)
    fixed = machine(1, 0) - each
    whole = machine(max(1, tokens - 2), 0) <= BUDGET_SECONDS
    return tokens <= SHORTEST or whole or tokens * each <= LEAST_WORK * fixed * slack


@given(prompts, widths, seconds, st.lists(seconds, min_size=1, max_size=20))
def test_laws_hold_whatever_the_chunks_take(
    prompt: int, widest: int, single: float, times: list[float]
) -> None:
    chunks = planner(widest=widest, single=single)
    fed = feed(chunks, prompt, lambda tokens, depth: times[depth % len(times)])
    sizes = [tokens for tokens, _ in fed]
    assert sum(sizes) == prompt
    assert max(sizes) <= widest
    assert sizes[-1] > 1 or prompt == 1


@given(prompts, widths, st.integers(1, 64))
def test_fixed_chunks_stay_as_they_are(prompt: int, widest: int, fixed: int) -> None:
    sizes = [n for n, _ in feed(planner(fixed=fixed, widest=widest), prompt, linear(1.0))]
    assert sizes == [fixed] * (prompt // fixed) + [prompt % fixed] * (prompt % fixed > 0)


@given(st.integers(1, 10))
def test_a_context_of_one_token_is_never_exceeded(remaining: int) -> None:
    assert planner(widest=1).next(remaining) == 1


@pytest.mark.parametrize("rate", [5.0, 33.0, 100.0, 541.0, 2000.0, 5000.0])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.55, 1.0])
@pytest.mark.parametrize("deeper", [0.0, 0.2])
@pytest.mark.parametrize("prompt", [105, 1322, 4096])
def test_budget_is_kept_after_the_first_chunk(
    rate: float, share: float, deeper: float, prompt: int
) -> None:
    machine = linear(rate, share=share, deeper=deeper)
    fed = feed(planner(single=machine(1, 0)), prompt, machine)
    for tokens, took in fed[1:]:
        # Where a step's own cost is much of the budget, longer chunks are the lesser evil.
        # Tokens that get dearer with depth can look like a step's own cost for one chunk.
        assert took <= BUDGET_SECONDS * (2 if deeper else 1) or needed(tokens, machine, slack=4.0)


@given(rate=st.floats(5, 5000), share=st.floats(0.05, 0.3), prompt=st.integers(2, 4096))
@example(rate=1000.0, share=0.3, prompt=4096)
def test_budget_is_kept_by_the_first_chunk_where_the_guess_holds(
    rate: float, share: float, prompt: int
) -> None:
    machine = linear(rate, share=share)
    tokens, took = feed(planner(single=machine(1, 0)), prompt, machine)[0]
    assert took <= TARGET_SECONDS * 1.01 or needed(tokens, machine) or tokens == prompt
    assert took <= BUDGET_SECONDS or needed(tokens, machine)


@given(rate=st.floats(100, 3000), share=st.floats(0.05, 1.0))
def test_settles_at_the_target(rate: float, share: float) -> None:
    machine = linear(rate, share=share)
    fed = feed(planner(single=machine(1, 0)), 8192, machine)
    tokens, took = fed[-3]  # the last ones take what is left
    # Now and then a longer chunk asks again what a step costs; a chunk is whole tokens.
    assert took <= BUDGET_SECONDS or needed(tokens, machine)
    assert took >= TARGET_SECONDS * 0.85 - machine(2, 0) or tokens == 512


@given(st.integers(16, 512), st.floats(1.5, 100.0))
def test_a_slow_moment_shrinks_at_once(widest: int, slower: float) -> None:
    chunks = planner(widest=widest, single=1e-4)
    before = chunks.next(10_000)
    chunks.observe(before, TARGET_SECONDS * slower)
    after = chunks.next(10_000)
    assert after <= max(2, before / slower)
    assert after >= min(2, before)


@given(st.integers(2, 100), st.floats(BUDGET_SECONDS, 100.0))
def test_a_short_chunk_that_was_too_slow_is_heard(tokens: int, took: float) -> None:
    chunks = planner(single=1e-5)
    assert chunks.next(10_000) == 512
    chunks.observe(tokens, took)
    assert chunks.next(10_000) <= max(2, tokens)


def test_a_short_chunk_that_was_fast_is_not() -> None:
    # The last few tokens of a prompt: nearly all of their time is the step's own cost.
    chunks = planner(single=1e-5)
    chunks.observe(3, 0.01)
    assert chunks.next(10_000) == 512


@given(st.floats(1e-6, TARGET_SECONDS / 64), st.integers(4, 256))
def test_growth_is_at_most_doubling(took: float, slow: int) -> None:
    chunks = planner(widest=100_000, single=1e-4)
    first = chunks.next(10**6)
    chunks.observe(first, TARGET_SECONDS * slow)
    before = chunks.next(10**6)
    assume(before < first)
    for _ in range(3):
        chunks.observe(before, took)
        after = chunks.next(10**6)
        assert before < after <= 2 * before
        before = after


def test_recovers_from_the_worst_moment_within_a_few_chunks() -> None:
    machine = linear(1000.0, share=0.2)
    chunks = planner(single=machine(1, 0))
    chunks.observe(chunks.next(10_000), 1000.0)
    assert chunks.next(10_000) == 2
    for _ in range(8):
        tokens = chunks.next(10_000)
        chunks.observe(tokens, machine(tokens, 0))
    assert machine(chunks.next(10_000), 0) > TARGET_SECONDS / 2


def test_a_clock_that_stands_still_changes_nothing() -> None:
    chunks = planner()
    before = chunks.next(10_000)
    chunks.observe(before, 0.0)
    assert chunks.next(10_000) == before


@pytest.mark.parametrize("fixed", [0.0, 0.005, 0.05, 0.14, 0.3])
@pytest.mark.parametrize("each", [0.0005, 0.0035, 0.01, 0.05])
@pytest.mark.parametrize("before", [0.007, 0.03])  # a machine may have become busy since
def test_a_prompt_takes_at_most_half_as_long_again_as_it_must(
    fixed: float, each: float, before: float
) -> None:
    """Whatever a step costs besides its tokens, and whatever it cost when the model was loaded."""
    chunks = planner(single=before)
    fed = feed(chunks, 8192, lambda tokens, depth: fixed + each * tokens)
    best = sum(fixed + each * 512 for _ in range(8192 // 512))
    # The chunks before the planner knows better come on top.
    learning = sum(took for _, took in fed[:16])
    assert sum(took for _, took in fed) <= 1.6 * best + learning


def test_one_slow_moment_makes_no_long_chunk() -> None:
    planner = ChunkPlanner(fixed=None, widest=512, single_token=0.005)

    def cost(tokens: int) -> float:
        return 0.005 + 0.0009 * tokens

    for turn in range(40):
        chunk = planner.next(64 if turn % 5 == 2 else 10_000)  # a short prompt now and then
        assert cost(chunk) < 1.2 * BUDGET_SECONDS
        planner.observe(chunk, cost(chunk) + (0.12 if turn % 5 == 2 else 0.0))
