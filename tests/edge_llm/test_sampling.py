from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm.decoding.distribution import draw
from edge_llm.decoding.sampling import Sampler, Sampling, token_logprobs
from edge_llm.errors import ArgumentError, RuntimeFailure

Logits = NDArray[np.float32]
INF = float("inf")
NAN = float("nan")


def plain_draw(
    logits: Logits, u: float, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    """The plain definition in draw's docstring, word for word, on the whole sorted vocabulary."""
    tiny, huge = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    scale = np.float32(min(max(1.0 / temperature, tiny), huge))
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) * scale)
    order = sorted(range(logits.size), key=lambda i: (-logits[i], i))
    total = float(weights.sum(dtype=np.float64))
    if 0 < top_k < len(order):
        order = order[:top_k]
        total = sum(map(float, weights[order]))
    sums = []
    running = 0.0
    for i in order:
        running += float(weights[i])
        sums.append(running)
    kept, mass = len(order), total
    if top_p < 1.0 and (reach := [n for n, x in enumerate(sums, 1) if x >= top_p * total]):
        kept, mass = reach[0], sums[reach[0] - 1]
    if min_p > 0.0 and (light := [n for n in range(kept) if weights[order[n]] < np.float32(min_p)]):
        kept, mass = light[0], sums[light[0] - 1]
    candidates = [n for n in range(kept) if weights[order[n]] > 0]
    return order[next((n for n in candidates if sums[n] > u * mass), candidates[-1])]


def reference_probabilities(logits: Logits, s: Sampling) -> NDArray[np.float64]:
    """What share of draws each token should get, in float64 and by masks over the vocabulary."""
    z = (logits.astype(np.float64) - logits.max()) / s.temperature
    order = np.lexsort((np.arange(z.size), -z))
    p = np.zeros(z.size)
    head = order[: s.top_k] if s.top_k else order
    p[head] = np.exp(z[head])
    p /= p.sum()
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    p[order[before >= s.top_p]] = 0.0
    p[p < s.min_p * p.max()] = 0.0
    p /= p.sum()
    return p


def sampler(s: Sampling, size: int, seed: int = 0, **options: Any) -> Sampler:
    options.setdefault("prompt", ())
    return Sampler(s, vocab_size=size, rng=np.random.default_rng(seed), **options)


logit = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, -INF, -3e38, 3e38, 1e-30]),
    st.floats(-30, 30, width=32),
)
unit = st.one_of(st.sampled_from([0.0, 1.0, 1e-12, 0.5, 0.25, 0.1, 0.9]), st.floats(0, 1))
draws = st.one_of(st.sampled_from([0.0, 0.5, 0.25, 1.0 - 2.0**-53]), st.floats(0, 1 - 2.0**-53))
temperatures = st.sampled_from([1e-300, 1e-30, 1e-3, 0.5, 0.8, 1.0, 3.0, 1e4, 1e38, 1e300])


@given(
    values=st.lists(logit, min_size=1, max_size=40).filter(lambda v: max(v) > -INF),
    u=draws,
    temperature=temperatures,
    top_k=st.integers(0, 45),
    top_p=unit,
    min_p=unit,
)
def test_draw_equals_the_plain_definition(
    values: list[float], u: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array(values, np.float32)
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    chosen = draw(logits, u, **options)
    assert chosen == plain_draw(logits, u, **options)
    assert logits[chosen] > -INF


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(["peaked", "flat", "equal", "steps", "sparse"]),
    u=draws,
    top_k=st.sampled_from([0, 0, 1, 50, 1500, 3000]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.001]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.9]),
)
@example(seed=0, shape="equal", u=0.999, top_k=0, top_p=0.7, min_p=0.0)
@example(seed=0, shape="flat", u=0.999999, top_k=0, top_p=1.0, min_p=0.0)
def test_draw_equals_the_plain_definition_where_the_head_has_to_grow(
    seed: int, shape: str, u: float, top_k: int, top_p: float, min_p: float
) -> None:
    rng = np.random.default_rng(seed)
    size = 2500  # larger than two of the heads, and no multiple of the groups
    logits: Logits = {
        "peaked": rng.standard_normal(size) * 8,
        "flat": rng.standard_normal(size) * 0.01,
        "equal": np.zeros(size),
        "steps": rng.integers(0, 4, size).astype(float),
        "sparse": np.where(rng.random(size) < 0.99, -INF, rng.standard_normal(size)),
    }[shape].astype(np.float32)
    options: dict[str, Any] = {"temperature": 0.9, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    assert draw(logits, u, **options) == plain_draw(logits, u, **options)


def test_draw_equals_the_plain_definition_beyond_every_head() -> None:
    rng = np.random.default_rng(5)
    logits = rng.standard_normal(40_000).round(3).astype(np.float32)  # with many ties
    logits[:50] = -0.0
    logits[50:60] = -INF
    assert len(set(logits.tolist())) < 20_000
    for u in (0.1, 0.4, 0.8, 0.9999):
        for top_p in (1.0, 0.3, 0.99):
            options: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": top_p, "min_p": 0.0}
            assert draw(logits, u, **options) == plain_draw(logits, u, **options)


def test_both_zeros_are_equal() -> None:
    logits = np.where(np.arange(5000) % 2, 0.0, -0.0).astype(np.float32)
    for token in (0, 1, 2, 2500, 4998, 4999):
        assert draw(logits, (token + 0.5) / 5000, temperature=1.0) == token


@pytest.mark.parametrize(
    "s",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=1.3, top_k=9, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(s: Sampling) -> None:
    logits = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    expected = reference_probabilities(logits, s)
    chooser = sampler(s, 12, seed=2)
    n = 20_000
    counts = np.bincount([chooser.sample(logits) for _ in range(n)], minlength=12)
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi2 = (((counts - n * expected)[kept]) ** 2 / (n * expected[kept])).sum()
    freedom = kept.sum() - 1
    # Mean + 4 standard deviations of chi-squared; the seed makes the outcome fixed.
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", range(8))
def test_distribution_is_that_of_transformers(seed: int) -> None:
    # transformers 4.57 orders temperature, top-k, top-p, min-p as here; releases that put min-p
    # elsewhere (and llama.cpp, which has the temperature last) give another distribution.
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(60) * 3).astype(np.float32)  # distinct, so ties play no part
    s = Sampling(
        temperature=float(rng.uniform(0.5, 2)),
        top_k=int(rng.integers(1, 70)),
        top_p=float(rng.uniform(0.3, 1)),
        min_p=float(rng.uniform(0, 0.3)),
    )
    scores = torch.from_numpy(logits.copy())[None]
    for warper in (
        warpers.TemperatureLogitsWarper(s.temperature),
        warpers.TopKLogitsWarper(s.top_k),
        warpers.TopPLogitsWarper(s.top_p),
        warpers.MinPLogitsWarper(s.min_p),
    ):
        scores = warper(None, scores)
    theirs = scores.softmax(-1)[0].numpy()
    np.testing.assert_allclose(reference_probabilities(logits, s), theirs, atol=1e-6)
    # The inverse of the running sum: draw takes each token on an interval of its probability.
    order = np.argsort(-theirs, kind="stable")
    sums = np.cumsum(theirs[order].astype(np.float64))
    options: dict[str, Any] = {
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_p": s.min_p,
    }
    for i in np.flatnonzero(theirs[order] > 1e-4):
        middle = sums[i] - theirs[order[i]] / 2
        assert draw(logits, float(middle), **options) == order[i]


def test_same_seed_same_tokens() -> None:
    rows = np.random.default_rng(3).standard_normal((50, 300)).astype(np.float32)
    s = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1)

    def run(seed: int) -> list[int]:
        chooser = sampler(s, 300, seed)
        tokens = []
        for row in rows:
            tokens.append(chooser.sample(row))
            chooser.accept(tokens[-1])
        return tokens

    assert run(7) == run(7) != run(8)


def test_greedy_takes_the_first_of_the_largest_and_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    chooser = Sampler(Sampling(top_k=1, top_p=0.1), vocab_size=4, prompt=(), rng=rng)
    assert chooser.sample(np.array([0, 2, 1, 2], np.float32)) == 1
    assert rng.bit_generator.state == state


def test_a_sampled_token_costs_one_draw() -> None:
    rng, twin = np.random.default_rng(4), np.random.default_rng(4)
    chooser = Sampler(Sampling(temperature=1, top_k=3), vocab_size=9, prompt=(), rng=rng)
    for _ in range(5):
        chooser.sample(np.arange(9, dtype=np.float32))
        twin.random()
    assert rng.bit_generator.state == twin.bit_generator.state


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 0.8]))
def test_the_order_of_everything_before_the_temperature(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    size = 30
    given_logits = rng.standard_normal(size).astype(np.float32)
    s = Sampling(
        temperature=temperature,
        repetition_penalty=1.7,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={3: 2.5, 7: -1.0},
    )
    prompt, answer = [1, 3, 3, 9], [9, 7, 7, 20]
    seen: list[Sequence[int]] = []

    def hook(tokens: Sequence[int], logits: Logits) -> Logits:
        seen.append(tokens)
        logits += np.float32(0.5)
        logits[11] = 50.0
        return logits

    chooser = sampler(s, size, seed, prompt=prompt, hook=hook)
    for token in answer:
        chooser.accept(token)
    frozen = given_logits.copy()
    frozen.flags.writeable = False
    token = chooser.sample(frozen, forbidden=(11,))

    z = given_logits + np.float32(0.5)
    z[11] = 50.0
    z[3] += 2.5
    z[7] -= 1.0
    for t in set(prompt + answer):
        z[t] = z[t] * 1.7 if z[t] < 0 else z[t] / 1.7
    for t in set(answer):
        z[t] -= 0.4 + 0.3 * answer.count(t)
    z[11] = -INF
    if temperature == 0:
        assert token == z.argmax()
    else:
        u = np.random.default_rng(seed).random()
        assert token == draw(z.astype(np.float32), u, temperature=temperature)
    assert seen == [tuple(prompt + answer)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_hook_may_return_its_own_array(dtype: type) -> None:
    mine: NDArray[Any] = np.zeros(5, dtype)
    mine[3] = 1
    mine.flags.writeable = False
    chooser = sampler(Sampling(logit_bias={2: 3.0}), 5, hook=lambda _, __: mine)
    assert chooser.sample(np.zeros(5, np.float32)) == 2


@pytest.mark.parametrize(
    "result", [None, [0.0] * 5, np.zeros(4), np.zeros((1, 5)), np.zeros(5, np.int64)], ids=repr
)
def test_a_hooks_unusable_result_is_an_error(result: Any) -> None:
    chooser = sampler(Sampling(), 5, hook=lambda _, __: result)
    with pytest.raises(ArgumentError, match="hook's result"):
        chooser.sample(np.zeros(5, np.float32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0, NAN, 1], [-INF, -INF, -INF], [0, INF, 1]])
def test_logits_that_are_no_numbers_are_the_models_failure(
    bad: list[float], temperature: float
) -> None:
    logits = np.array(bad, np.float32)
    with pytest.raises(RuntimeFailure, match="maximum"):
        sampler(Sampling(temperature=temperature), 3).sample(logits)
    with pytest.raises(RuntimeFailure):
        sampler(Sampling(temperature=temperature, logit_bias={0: 1.0}), 3).sample(logits)
    with pytest.raises(RuntimeFailure):
        token_logprobs(logits, 0, 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_left_is_the_callers_error(temperature: float) -> None:
    logits = np.zeros(3, np.float32)
    with pytest.raises(ArgumentError, match="left to choose"):
        sampler(Sampling(temperature=temperature), 3).sample(logits, forbidden=[0, 1, 2])
    chooser = sampler(Sampling(temperature=temperature), 3, hook=lambda _, z: z * np.float32(NAN))
    with pytest.raises(ArgumentError, match="left to choose"):
        chooser.sample(logits)


@pytest.mark.parametrize(
    "logits", [np.zeros(4, np.float32), np.zeros((1, 3), np.float32), np.zeros(3)]
)
def test_logits_of_another_form_are_refused(logits: Any) -> None:
    with pytest.raises(ArgumentError, match="logits"):
        sampler(Sampling(), 3).sample(logits)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    zeros = np.zeros(3, np.float32)
    with pytest.raises(ArgumentError, match="logit_bias"):
        sampler(Sampling(logit_bias={3: 1.0}), 3)
    with pytest.raises(ArgumentError, match="prompt"):
        sampler(Sampling(), 3, prompt=[0, 5])
    with pytest.raises(ArgumentError, match="forbidden"):
        sampler(Sampling(), 3).sample(zeros, forbidden=[-1])
    with pytest.raises(ArgumentError, match="token"):
        sampler(Sampling(), 3).accept(3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", NAN),
        ("temperature", INF),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", True),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", NAN),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", INF),
        ("presence_penalty", NAN),
        ("frequency_penalty", -INF),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: NAN}),
        ("logit_bias", {1: True}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {True: 1.0}),
    ],
)
def test_values_outside_their_domain_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=name):
        Sampling(**{name: value})
    with pytest.raises(ArgumentError, match=name):
        dataclasses.replace(Sampling(), **{name: value})


def test_sampling_from_a_dict_and_merged() -> None:
    s = Sampling.from_dict({"temperature": 1, "top_k": np.int64(5), "logit_bias": {"7": 2}})
    assert s == Sampling(temperature=1.0, top_k=5, logit_bias={7: 2.0})
    assert Sampling.from_dict(dataclasses.asdict(s)) == s
    assert s.merged(temperature=None, top_k=0) == Sampling(temperature=1.0, logit_bias={7: 2.0})
    assert hash(s) == hash(s.merged())
    for call in (Sampling.from_dict, lambda d: Sampling().merged(**d)):
        with pytest.raises(ArgumentError, match="topk"):
            call({"topk": 3})


@given(values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30), n=st.integers(0, 30))
def test_logprobs_are_the_log_softmax(values: list[float], n: int) -> None:
    logits = np.array(values, np.float32)
    n = min(n, logits.size)
    z = logits.astype(np.float64)
    expected = z - z.max() - math.log(np.exp(z - z.max()).sum())
    result = token_logprobs(logits, logits.size - 1, n)
    assert result.token == logits.size - 1
    assert result.logprob == pytest.approx(expected[-1], abs=1e-5)
    order = sorted(range(logits.size), key=lambda i: (-logits[i], i))[:n]
    assert [token for token, _ in result.top] == order
    assert [p for _, p in result.top] == pytest.approx(expected[order].tolist(), abs=1e-5)


def test_logprobs_of_the_impossible_and_bad_arguments() -> None:
    logits = np.array([0, -INF], np.float32)
    assert token_logprobs(logits, 1, 0).logprob == -INF
    with pytest.raises(ArgumentError, match="token"):
        token_logprobs(logits, 2, 0)
    for n in (-1, 3):
        with pytest.raises(ArgumentError, match="logprobs"):
            token_logprobs(logits, 0, n)
