from __future__ import annotations

import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.engines.own import EdgeEngine
from benchmarks.fidelity import measure_fidelity, request_passages, text_passages
from edge_llm import LLM
from edge_llm.quality import evaluate
from edge_llm_export import export_model
from edge_llm_export.builtin.evaluation import held_out_split
from edge_llm_export.builtin.train import CHECKPOINT
from tests.conftest import TEXT


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "int4"
    export_model(tiny_checkpoint, folder, quantize="int4")
    return folder


def test_figures_are_those_of_edge_llm_eval(tiny_bundle: Path, quantized: Path) -> None:
    with LLM(tiny_bundle) as reference, LLM(quantized) as model:
        expected = evaluate(model, TEXT, reference=reference, window=16, stride=16)
        passages = text_passages(reference, TEXT, window=16, limit=100)
    with (
        EdgeEngine(tiny_bundle, context=32, threads=1) as reference_engine,
        EdgeEngine(quantized, context=32, threads=1) as engine,
    ):
        got = measure_fidelity(engine, reference_engine, passages, vocab=400)
        same = measure_fidelity(reference_engine, reference_engine, passages, vocab=400)
    assert expected.windows == len(passages) > 2
    assert expected.kl_divergence is not None
    for mine, theirs in (
        (got.kl_divergence, expected.kl_divergence),
        (got.top1_agreement, expected.top1_agreement),
        (got.log_perplexity_ratio, expected.log_perplexity_ratio),
    ):
        assert theirs is not None
        assert mine.value == pytest.approx(theirs.value, rel=1e-4)
        assert mine.standard_error == pytest.approx(theirs.standard_error, rel=1e-4)
    assert math.exp(got.loss.value) == pytest.approx(expected.perplexity.value, rel=1e-5)
    assert got.kl_divergence.value > 0
    assert (same.kl_divergence.value, same.top1_agreement.value) == (0, 1)


def test_windows_are_the_first_of_the_text(tiny_llm: LLM) -> None:
    tokens = tiny_llm.tokenize(TEXT, add_bos=False)
    passages = text_passages(tiny_llm, TEXT, window=16, limit=3)
    assert [token for passage in passages for token in passage.tokens] == tokens[:48]
    assert [passage.scored for passage in passages] == [15, 15, 15]  # nothing precedes the first


def test_of_a_request_the_answer_counts() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    samples = held_out_split(20)
    for sample, passage in zip(samples, request_passages(tokenizer, samples), strict=True):
        scored = tokenizer.decode(passage.tokens[-passage.scored :], skip_special_tokens=False)
        assert scored == f"{sample.answer}</s>"
        assert passage.tokens[0] == tokenizer.token_to_id("<s>")
