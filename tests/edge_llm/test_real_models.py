"""Trained checkpoints: the text that others get from the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm import LLM
from edge_llm_export import export_model


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundles of a real checkpoint, by quantization."""
    folder = tmp_path_factory.mktemp("stories")
    bundles = {}
    for quantize in ("fp32", "int8", "int4"):
        bundles[quantize] = folder / quantize
        export_model(shared / "models/stories260k", bundles[quantize], quantize=quantize)
    return bundles


@pytest.fixture(scope="module")
def expected(shared: Path) -> str:
    """What llama2.c's own tests expect of 200 greedy tokens after ``<s>``."""
    return (shared / "models/stories260k/expected_greedy.txt").read_text(encoding="utf-8")


def test_float32_gives_the_expected_text(stories: dict[str, Path], expected: str) -> None:
    with LLM(stories["fp32"]) as llm:
        assert llm.generate("", max_tokens=200, temperature=0).text == expected
        assert "".join(c.text for c in llm.stream("", max_tokens=200, temperature=0)) == expected


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_and_a_reused_prefix_give_the_expected_text(
    chunk: int, stories: dict[str, Path], expected: str
) -> None:
    with LLM(stories["fp32"], prefill_chunk=chunk, slots=1) as llm:
        whole = llm.generate("", max_tokens=200, temperature=0)
        assert whole.text == expected
        tokens = [1, *whole.tokens]
        for cut in (170, 100, 20):
            # All but the prompt's last two tokens are in the cache from the request before.
            rest = llm.generate(tokens[:cut], max_tokens=201 - cut, temperature=0)
            assert rest.usage.reused_tokens == cut - 2
            assert list(rest.tokens) == tokens[cut:]
            # Another conversation in between leaves nothing but the first token to reuse.
            llm.generate([1, 300], max_tokens=1)
            rest = llm.generate(tokens[:cut], max_tokens=201 - cut, temperature=0)
            assert rest.usage.reused_tokens == 1
            assert list(rest.tokens) == tokens[cut:]


def test_int8_parts_only_at_a_near_tie(stories: dict[str, Path]) -> None:
    with LLM(stories["fp32"]) as exact, LLM(stories["int8"]) as rounded:
        reference = exact.generate("", max_tokens=200, temperature=0, logprobs=2)
        answer = rounded.generate("", max_tokens=200, temperature=0)
    assert reference.logprobs is not None
    parting = [i for i in range(200) if reference.tokens[i] != answer.tokens[i]]
    if parting:
        (_, best), (other, second) = reference.logprobs[parting[0]].top
        assert answer.tokens[parting[0]] == other
        assert best - second < 0.05  # nats, between the two most likely tokens


def test_int4_is_close_in_likelihood(stories: dict[str, Path], shared: Path) -> None:
    text = (shared / "data/tinystories_valid_sample.txt").read_text(encoding="utf-8")[:900]
    scores = {}
    for name, bundle in stories.items():
        with LLM(bundle) as llm:
            scores[name] = llm.score(text)
    assert scores["fp32"].tokens == scores["int4"].tokens
    assert scores["fp32"].perplexity < scores["int4"].perplexity < scores["fp32"].perplexity * 1.5
    assert scores["int8"].perplexity == pytest.approx(scores["fp32"].perplexity, rel=0.02)


def test_books_in_bfloat16_export_and_answer(shared: Path, tmp_path: Path) -> None:
    manifest = export_model(shared / "models/books7m", tmp_path / "books", block=128)
    assert manifest.dims.parameters == 7_344_384
    text = (shared / "data/books_eval.txt").read_text(encoding="utf-8")[:3000]
    with LLM(tmp_path / "books") as llm:
        score = llm.score(text[:2000])
        assert score.perplexity < 80  # the model's own is about 43 on this text
        answer = llm.generate("It was the", max_tokens=30, temperature=0.8, top_p=0.9, seed=3)
        assert answer.text == llm.detokenize(answer.tokens)
