"""Drafts: where they come from, what they cost, and that they change nothing but the speed."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.decoding.sampling import Sampling
from edge_llm.decoding.speculation import CANDIDATES, LONGEST, PASSED_OVER, PromptLookup
from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.engine.drafting import Drafting
from edge_llm.engine.generation import Generation, Request
from edge_llm.engine.scheduler import Engine
from edge_llm.engine.slots import Slots
from edge_llm.engine.step_costs import FIRST_GUESS, MEASURE_AGAIN, WIDTHS, StepCosts
from edge_llm.engine.stepper import ONLY_WIDTH, Stepper
from edge_llm.errors import ArgumentError
from edge_llm.manifest import StateTensor
from edge_llm.results import Chunk, Completion, Usage
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.kv_cache import WINDOW_SLACK, KVCache
from edge_llm.text.tokenizer import Tokenizer

VOCAB = 16
PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was"

tokens = st.integers(0, 2)


def look_up(text: Sequence[int]) -> tuple[int, int]:
    """Where the longest match of the text's end goes on, by trying every place; and its length."""
    ends = [end for end in range(2, len(text)) if text[end - 2 : end] == text[-2:]]
    best = longest = 0
    for end in ends[: -CANDIDATES - 1 : -1]:
        pairs = zip(reversed(text[:end]), reversed(text), strict=False)
        matched = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if min(matched, LONGEST) > longest:
            best, longest = end, min(matched, LONGEST)
    return best, longest


@given(st.lists(tokens, min_size=1, max_size=30), st.lists(tokens, min_size=1, max_size=30))
def test_the_longest_of_the_latest_matches_is_followed(
    prompt: list[int], answer: list[int]
) -> None:
    lookup, text = PromptLookup(prompt), list(prompt)
    source = matched = 0
    for token in answer:
        hit = bool(source) and text[source] == token
        text.append(token)
        if hit:
            source, matched = source + 1, matched + 1
        else:
            missed, run = source, matched
            source, matched = look_up(text)
            if not source and run >= PASSED_OVER:
                source = missed + 1
        lookup.accept(token)
        assert bool(lookup.chance) == bool(source)
        assert not source or lookup.draft(1) == [text[source]]


@given(
    st.lists(tokens, min_size=1, max_size=30),
    st.lists(tokens, min_size=1, max_size=60),
    st.lists(st.sampled_from(WIDTHS), min_size=1),
)
@example([0], [0] * 60, [2, 16, 4])
def test_which_tokens_are_drafted_does_not_hang_on_the_lengths_of_drafts(
    prompt: list[int], answer: list[int], widths: list[int]
) -> None:
    """A token is computed in a step of several if and only if drafting was on in front of it."""
    single = PromptLookup(prompt)
    active = []
    for token in answer:
        active.append(single.active)
        single.accept(token)
    lookup, choices = PromptLookup(prompt), itertools.cycle(widths)
    wide: list[bool] = []
    while len(wide) < len(answer):
        draft = lookup.draft(next(choices) - 1) if lookup.active else []
        for guess in [*draft, None]:
            wide.append(bool(draft))
            token = answer[len(wide) - 1]
            lookup.accept(token)
            if guess != token or len(wide) == len(answer):
                break
    assert wide == active


@given(st.lists(tokens, min_size=1, max_size=30), st.integers(1, 40))
def test_a_draft_is_what_would_be_guessed_token_by_token(prompt: list[int], count: int) -> None:
    lookup = PromptLookup(prompt)
    lookup.accept(prompt[0])
    if not lookup.chance:
        return
    draft, stepwise = lookup.draft(count), copy.deepcopy(lookup)
    for guess in draft:
        assert stepwise.draft(1) == [guess]
        stepwise.accept(guess)
    assert lookup.draft(count) == draft, "drafting changes nothing"


def test_copying_turns_drafts_on_and_noise_does_not() -> None:
    text = np.random.default_rng(0).integers(0, 5000, 400).tolist()
    lookup = PromptLookup(text)
    for i, token in enumerate(text[:200]):
        lookup.accept(token)
        assert lookup.active or i < 20
    assert lookup.draft(16) == text[200:216]
    # One token differs, and the copy goes on behind it: few tokens later drafts are back.
    lookup.accept(4999 - text[200])
    for token in text[201:215]:
        lookup.accept(token)
    assert lookup.active
    assert lookup.draft(4) == text[215:219]
    # Pairs that come again, but are never followed by the same token.
    noise = PromptLookup([1, 2])
    for i in range(3, 600):
        for token in (1, 2, i):
            noise.accept(token)
            assert not noise.active


def costs(curve: dict[int, float], *, noise: Callable[[int], float] = lambda i: 1.0) -> StepCosts:
    """What is learnt of a machine."""
    learnt = StepCosts(single=1.0)
    for i in range(40):
        for width in (1, *WIDTHS):
            learnt.observe(width, 1e-3 * curve.get(width, 1.0) * noise(i))
    return learnt


LINEAR = {width: float(width) for width in WIDTHS}
CHEAP = {2: 1.2, 4: 1.5, 8: 1.8, 16: 2.5}
STEEP = {2: 1.1, 4: 1.9, 8: 2.2, 16: 9.0}


def test_the_curve_is_learnt_from_the_steps() -> None:
    assert StepCosts(single=1.0).curve == FIRST_GUESS
    assert StepCosts(single=1.0, curve={8: 9.0}).curve == FIRST_GUESS | {8: 9.0}
    assert costs(STEEP).curve == pytest.approx(STEEP)
    # Other programs make most steps much longer.
    busy = costs(STEEP, noise=lambda i: 1.0 if i % 3 == 0 else 1.0 + i)
    assert busy.curve == pytest.approx(STEEP)
    learnt = costs(STEEP)
    learnt.observe(3, 1e9)  # an odd remainder tells nothing
    assert learnt.curve == pytest.approx(STEEP)


def test_drafts_are_as_long_as_pays() -> None:
    assert [costs(CHEAP).best([(0.99, most)]) for most in (1, 2, 3, 7, 8, 15, 100)] == [
        *(1, 2, 2, 4, 8, 8, 16)
    ]
    assert costs(STEEP).best([(0.99, 100)]) == 8
    assert costs(STEEP).best([(0.3, 100)]) == 2
    assert costs(CHEAP).pays
    assert costs(STEEP).pays


def test_a_machine_on_which_drafts_never_pay_is_asked_again_later() -> None:
    learnt = costs(LINEAR)
    assert not learnt.pays
    for _ in range(MEASURE_AGAIN):
        learnt.observe(1, 1e-3)
    assert learnt.pays


class KnownCosts(StepCosts):
    """The first guess for ever: the clock says nothing of a model that is none."""

    def observe(self, width: int, seconds: float) -> None:
        pass


class MarkovDecoder:
    """Logits hang on the last token alone; knows what its cache holds.

    Args:
        table: float32 [vocab, vocab], the logits behind each token.
        skew: Added to them, times the step's width: what kernels that disagree would do.
    """

    verifies = True
    widest = 64

    def __init__(self, table: NDArray[np.float32], *, skew: float = 0.0) -> None:
        self.cache = KVCache((), rows=1, capacity=256)
        self.held = np.zeros(256, np.int64)
        self.widths: list[int] = []
        self._table = table
        self._skew = np.float32(skew)

    def step_rows(
        self, tokens: Sequence[Sequence[int]], *, scored: Sequence[int], first: int = 0
    ) -> NDArray[np.float32]:
        (fed,), (last,) = tokens, scored
        length = int(self.cache.lengths[0])
        self.held[length : length + len(fed)] = fed
        self.cache.advance(0, len(fed))
        self.widths.append(len(fed))
        logits = self._table[list(fed)[len(fed) - last :]]
        logits[:, 0] += self._skew * len(fed)
        return logits

    def interrupt(self) -> None:
        pass

    def resume(self) -> None:
        pass


def run(
    decoder: MarkovDecoder, tokenizer: Tokenizer, prompt: Sequence[int], **changes: Any
) -> Iterator[object]:
    """Answer a prompt and give what is put."""
    drafting = changes.pop("drafting", None) or Drafting(
        KnownCosts(single=1.0), possible=True, vocab=VOCAB
    )
    options: dict[str, Any] = {
        "prompt": np.array(prompt, np.int64),
        "max_tokens": 40,
        "min_tokens": 0,
        "sampling": Sampling(),
        "seed": 1,
        "stops": (),
        "ending": frozenset(),
        "lookup": True,
        "reuse": True,
        "logprobs": None,
        "hook": None,
        "cancel": None,
        "timeout": None,
        "priority": 0,
        "progress": False,
        "stream": False,
    }
    job = Generation(
        Request(**options | changes), tokenizer, vocab=VOCAB, drafting=drafting, load_seconds=0.0
    )
    planner = ChunkPlanner(fixed=64, widest=64, single_token=0.01)
    model = cast("Decoder", decoder)
    slots = Slots(model.cache, 1)
    slots.all[0].clear()
    engine = Engine(model, Stepper(model, planner, drafting), slots, queue_limit=1)
    parts = list(engine.execute(job))
    engine.close()
    assert slots.all[0].held.tolist() == decoder.held[: slots.all[0].length].tolist()
    return filter(None, map(job.chunk, parts))


def answer(*args: Any, **changes: Any) -> tuple[tuple[int, ...], Usage]:
    (chunk,) = run(*args, **changes)
    assert isinstance(chunk, Chunk)
    assert chunk.usage is not None
    return chunk.tokens, chunk.usage


@pytest.fixture
def tokenizer(small_tokenizer: Callable[[str], Tokenizer]) -> Tokenizer:
    return small_tokenizer("byte_level")


def cycle() -> NDArray[np.float32]:
    """Each token is followed by the next one, surely."""
    return np.roll(np.eye(VOCAB, dtype=np.float32), 1, axis=1) * 20


def test_copied_tokens_come_several_a_step(tokenizer: Tokenizer) -> None:
    decoder = MarkovDecoder(cycle())
    prompt = [*range(VOCAB)] * 2
    got, usage = answer(decoder, tokenizer, prompt, max_tokens=200)
    assert got == tuple(i % VOCAB for i in range(200))
    assert usage.accepted_tokens > 120
    assert usage.accepted_tokens <= usage.drafted_tokens
    # Each step gave one token, and one more for each draft that came true.
    steps = len(decoder.widths) - 1 - 2  # without the prompt, and the trial of two widths
    assert 1 + steps + usage.accepted_tokens == 200
    # The last token was chosen, but never fed.
    assert decoder.cache.lengths[0] == len(prompt) + 199


def test_a_stream_gives_them_as_they_come(tokenizer: Tokenizer) -> None:
    prompt = [*range(VOCAB)] * 2
    whole, usage = answer(MarkovDecoder(cycle()), tokenizer, prompt, max_tokens=100)
    chunks = list(run(MarkovDecoder(cycle()), tokenizer, prompt, max_tokens=100, stream=True))
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    streamed = cast("list[Chunk]", chunks)
    assert tuple(t for chunk in streamed for t in chunk.tokens) == whole
    assert max(len(chunk.tokens) for chunk in streamed) > 1
    assert streamed[-1].usage == usage


def test_an_answer_ends_inside_a_draft(tokenizer: Tokenizer) -> None:
    prompt = [*range(VOCAB)] * 3
    drafting = Drafting(KnownCosts(single=1.0), possible=True, vocab=VOCAB)
    decoder = MarkovDecoder(cycle())
    for length in (30, 31, 32, 33, 34, 35, 36):
        got, usage = answer(decoder, tokenizer, prompt, max_tokens=length, drafting=drafting)
        assert len(got) == usage.completion_tokens == length
        assert decoder.cache.lengths[0] == len(prompt) + length - 1
    got, usage = answer(decoder, tokenizer, prompt, ending=frozenset({5}), min_tokens=20)
    # min_tokens forbids 5 where it is surest, so the cycle breaks, and still ends at a 5.
    assert 20 < len(got) < 40
    assert got.index(5) == len(got) - 1


def test_cancelled_inside_a_draft(tokenizer: Tokenizer) -> None:
    cancel, prompt = threading.Event(), [*range(VOCAB)] * 3

    def hook(so_far: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(so_far) == len(prompt) + 37:
            cancel.set()
        return logits

    decoder = MarkovDecoder(cycle())
    (chunk,) = run(decoder, tokenizer, prompt, max_tokens=100, hook=hook, cancel=cancel)
    assert isinstance(chunk, Chunk)
    assert chunk.finish_reason == "cancelled"
    assert chunk.tokens == tuple(i % VOCAB for i in range(38))
    assert decoder.cache.lengths[0] == len(prompt) + 37


def test_no_drafts_where_they_are_not_wanted_or_not_possible(tokenizer: Tokenizer) -> None:
    prompt = [*range(VOCAB)] * 2
    impossible = Drafting(KnownCosts(single=1.0), possible=False, vocab=VOCAB)
    useless = Drafting(costs(LINEAR), possible=True, vocab=VOCAB)
    ways: list[dict[str, Any]] = [
        {"lookup": False},
        {"drafting": impossible},
        {"drafting": useless},
    ]
    for way in ways:
        decoder = MarkovDecoder(cycle())
        got, usage = answer(decoder, tokenizer, prompt, max_tokens=100, **way)
        assert got == tuple(i % VOCAB for i in range(100))
        assert usage.drafted_tokens == usage.accepted_tokens == 0
        assert set(decoder.widths[1:]) == {1}


def test_widths_that_round_otherwise_are_not_mixed(tokenizer: Tokenizer) -> None:
    prompt = [*range(VOCAB)] * 2
    drafting = Drafting(KnownCosts(single=1.0), possible=True, vocab=VOCAB)
    decoder = MarkovDecoder(cycle(), skew=1e-5)
    _, usage = answer(decoder, tokenizer, prompt, max_tokens=100, drafting=drafting)
    assert usage.accepted_tokens > 50
    assert drafting.costs.widths == (ONLY_WIDTH,)
    decoder.widths.clear()
    answer(decoder, tokenizer, prompt, max_tokens=100, drafting=drafting)
    assert set(decoder.widths[1:]) == {1, ONLY_WIDTH}


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.9), Sampling(temperature=1, top_k=3)])
def test_sampled_answers_keep_the_distribution(sampling: Sampling, tokenizer: Tokenizer) -> None:
    """Pearson's chi-squared test of the tokens at drafted places against the model's own."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((VOCAB, VOCAB)).astype(np.float32)
    table[range(5), [1, 2, 3, 4, 0]] = 4.2
    logits = table.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        logits[logits < np.sort(logits)[:, -sampling.top_k, None]] = -np.inf
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    followed = np.zeros((VOCAB, VOCAB))
    drafted = accepted = 0
    for seed in range(300):
        got, usage = answer(
            MarkovDecoder(table),
            tokenizer,
            [0, 1, 2, 3, 4] * 8,
            max_tokens=12,
            sampling=sampling,
            seed=seed,
        )
        np.add.at(followed, (got[:-1], got[1:]), 1)
        drafted += usage.drafted_tokens
        accepted += usage.accepted_tokens
    assert accepted > 200, "drafts were taken"
    assert drafted > accepted + 200, "and refused"
    for row, chance in zip(followed[:5], chances[:5], strict=True):
        expected = chance * row.sum()
        seen = expected >= 5
        statistic = float(((row - expected)[seen] ** 2 / expected[seen]).sum())
        freedom = int(seen.sum()) - 1
        # Mean and spread of a chi-squared variable; four spreads are far out.
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)
        assert row[chance == 0].sum() == 0


def both(llm: LLM, prompt: Any, **options: Any) -> Completion:
    """An answer with drafts, which is the answer without."""
    plain = llm.generate(prompt, speculation="off", **options)
    fast = llm.generate(prompt, **options)
    assert (fast.tokens, fast.text, fast.finish_reason) == (
        *(plain.tokens, plain.text, plain.finish_reason),
    )
    assert plain.usage.drafted_tokens == 0
    for ours, theirs in zip(fast.logprobs or (), plain.logprobs or (), strict=True):
        assert ours.token == theirs.token
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    streamed = list(llm.stream(prompt, **options))
    assert tuple(t for chunk in streamed for t in chunk.tokens) == plain.tokens
    assert "".join(chunk.text for chunk in streamed) == plain.text
    return fast


def replay(target: Sequence[int], prompt: Sequence[int], strength: float) -> Any:
    """A hook that makes a recorded text likely, whatever was answered so far."""

    def hook(so_far: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[target[(len(so_far) - len(prompt)) % len(target)]] += strength
        return logits

    return hook


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "logprobs": {"temperature": 0, "logprobs": 3},
    "sampled": {"temperature": 1.0, "seed": 3},
    "everything": {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.05,
        "frequency_penalty": 0.02,
        "logit_bias": {70: 1.0},
        "seed": 5,
    },
    "stop": {"temperature": 0, "stop": ["age of wisdom", "never"], "min_tokens": 10},
    "stop token": {"temperature": 0, "stop_tokens": [83], "min_tokens": 15},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_float32_answers_are_the_same_to_the_letter(name: str, tiny_llm: LLM) -> None:
    prompt = tiny_llm.tokenize(PROMPT)
    options = {"max_tokens": 80} | OPTIONS[name]
    own = both(tiny_llm, prompt, **options)
    assert own.usage.drafted_tokens >= own.usage.accepted_tokens
    copied = both(tiny_llm, prompt, logits_hook=replay(prompt, prompt, 60.0), **options)
    if name in ("greedy", "logprobs"):
        assert copied.usage.accepted_tokens > 30
    edited = [*prompt[:20], 5, *prompt[23:]]
    both(tiny_llm, prompt, logits_hook=replay(edited, prompt, 15.0), **options)


def test_what_the_cache_holds_behind_a_drafted_answer_is_right(tiny_llm: LLM) -> None:
    prompt = tiny_llm.tokenize(PROMPT)
    hook = replay(prompt, prompt, 60.0)
    for length in (40, 41, 42, 43):
        first = tiny_llm.generate(prompt, max_tokens=length, temperature=0, logits_hook=hook)
        assert first.usage.accepted_tokens
        longer = [*prompt, *first.tokens, 9, 10]
        second = tiny_llm.generate(longer, max_tokens=10, temperature=0, logprobs=0)
        assert second.usage.reused_tokens == len(prompt) + length - 1
        fresh = tiny_llm.generate(
            longer, max_tokens=10, temperature=0, logprobs=0, reuse_prefix=False
        )
        assert fresh.usage.reused_tokens == 0
        assert fresh.tokens == second.tokens


def test_a_context_can_be_filled_to_the_last_token(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, context=120) as llm:
        prompt = llm.tokenize(PROMPT)
        filled = both(
            *(llm, prompt), temperature=0, min_tokens=1, logits_hook=replay(prompt, prompt, 60.0)
        )
        assert filled.usage.total_tokens == 120
        assert filled.usage.accepted_tokens


def test_windows_that_move_on(make_checkpoint: Any, tmp_path: Path) -> None:
    """A window's buffer is compacted in the middle of the answer, and no draft reaches over it."""
    from edge_llm_export import export_model

    sizes = {"max_position_embeddings": 1024, "sliding_window": 16, "num_hidden_layers": 2}
    make_checkpoint(tmp_path / "checkpoint", "mistral", **sizes)
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize="fp32")
    with LLM(tmp_path / "bundle", context=1024, threads=1) as llm:
        assert any(one.kind == "window" for one in llm.manifest.decoder.state)
        prompt = (llm.tokenize(PROMPT) * 20)[: 16 + WINDOW_SLACK - 40]
        hook = replay(prompt, prompt, 60.0)
        crossed = both(llm, prompt, max_tokens=100, temperature=0, logits_hook=hook)
        assert crossed.usage.accepted_tokens > 40


@given(
    st.lists(st.sampled_from([4, 8, 100]), max_size=2),
    st.integers(1, 1500),
    st.integers(1, 1500),
)
@example([8], 520, 1)
@example([8, 100], 519, 1)
def test_room_is_what_can_be_taken_back(windows: list[int], length: int, count: int) -> None:
    state = [
        StateTensor(
            input=f"past.{i}",
            output=f"present.{i}",
            dtype="int8",
            shape=("batch", 1, "capacity", 1),
            batch_axis=0,
            sequence_axis=2,
            shared=True,
            kind="window",
            window=window,
        )
        for i, window in enumerate(windows)
    ]
    cache = KVCache(state, rows=1, capacity=2000)
    cache.advance(0, length)
    room = cache.room(0)
    assert 0 <= room <= 2000 - length
    count = min(count, 2000 - length)
    if count:
        cache.advance(0, count)
        assert cache.truncate(0, length) == (length if count <= room else 0)


def test_only_the_two_words_are_known(tiny_llm: LLM) -> None:
    for wrong in ("on", None, True):
        with pytest.raises(ArgumentError, match="'lookup' or 'off'"):
            tiny_llm.generate(PROMPT, speculation=cast("Any", wrong))
