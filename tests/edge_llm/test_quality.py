"""Perplexity, divergence and agreement: against transformers, against numpy, and by their laws."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.builtin import BUNDLE
from edge_llm.cli.main import main
from edge_llm.engine import scoring
from edge_llm.errors import ArgumentError, ContextLengthError, RuntimeFailure
from edge_llm.quality import (
    Estimate,
    estimate_mean,
    evaluate,
    open_for_evaluation,
    read_text_file,
    split_windows,
    token_figures,
)
from edge_llm_export import export_model

Capture = pytest.CaptureFixture[str]

TEXT = (
    "It was the season of Light, it was the season of Darkness, it was the spring of hope, it was "
    "the winter of despair, we had everything before us, we had nothing before us. Größe, 東京.\n"
) * 3


@pytest.fixture(scope="module")
def int4_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny-int4"
    export_model(tiny_checkpoint, folder, quantize="int4")
    return folder


@pytest.fixture
def int4_llm(int4_bundle: Path) -> Iterator[LLM]:
    with LLM(int4_bundle) as llm:
        yield llm


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    return file


def transformers_perplexity(
    checkpoint: Path, tokens: list[int], *, window: int, stride: int, bos: int | None
) -> tuple[float, int]:
    """The loop of Hugging Face's guide, with BOS in front of each window where there is one.

    Gives the perplexity, and how many tokens it is of.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prefix = [] if bos is None else [bos]
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window - len(prefix), len(tokens))
        inputs = torch.tensor([[*prefix, *tokens[begin:end]]])
        labels = inputs.clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        valid = int((labels[:, 1:] != -100).sum())
        total, count, previous = total + float(loss) * valid, count + valid, end
        if end == len(tokens):
            break
    return math.exp(total / count), count


# Against transformers


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (64, 32), (50, 7), (256, 100)])
def test_perplexity_is_that_of_the_guide(
    window: int, stride: int, tiny_checkpoint: Path, tiny_llm: LLM
) -> None:
    tokens = tiny_llm.tokenize(TEXT)
    assert len(tokens) > 256
    expected, count = transformers_perplexity(
        tiny_checkpoint, tokens, window=window, stride=stride, bos=None
    )
    report = evaluate(tiny_llm, TEXT, window=window, stride=stride)
    assert report.tokens == count
    assert (report.window, report.stride, report.bos) == (window, stride, False)
    assert report.perplexity.value == pytest.approx(expected, rel=1e-4)
    assert report.text_sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_a_trained_model_with_bos(shared: Path, tmp_path: Path) -> None:
    checkpoint = shared / "models/stories260k"
    export_model(checkpoint, tmp_path / "fp32", quantize="fp32")
    export_model(checkpoint, tmp_path / "int4", quantize="int4")
    text = (shared / "models/stories260k/expected_greedy.txt").read_text(encoding="utf-8")
    with LLM(tmp_path / "fp32") as exact, LLM(tmp_path / "int4") as rounded:
        assert exact.manifest.tokens.add_bos
        tokens = exact.tokenize(text, add_bos=False)
        expected, count = transformers_perplexity(
            checkpoint, tokens, window=64, stride=32, bos=exact.manifest.tokens.bos
        )
        report = evaluate(rounded, text, reference=exact, window=64, stride=32)
    assert report.bos
    assert report.tokens == count == len(tokens)
    assert report.reference_perplexity is not None
    assert report.reference_perplexity.value == pytest.approx(expected, rel=1e-5)
    assert report.perplexity.value > report.reference_perplexity.value
    assert report.kl_divergence is not None
    assert 0.001 < report.kl_divergence.value < 0.5
    assert report.top1_agreement is not None
    assert 0.8 < report.top1_agreement.value < 1


# With a reference


def test_a_bundle_does_not_differ_from_itself(int4_bundle: Path, int4_llm: LLM) -> None:
    with LLM(int4_bundle) as other:
        report = evaluate(int4_llm, TEXT, reference=other, window=60)
    assert report.kl_divergence == Estimate(value=0, standard_error=0)
    assert report.top1_agreement == Estimate(value=1, standard_error=0)
    assert report.log_perplexity_ratio == Estimate(value=0, standard_error=0)
    assert report.reference_perplexity == report.perplexity


def test_one_model_may_be_both(tiny_llm: LLM) -> None:
    """Its cache serves two askers in turn; the figures do not hang on that."""
    alone = evaluate(tiny_llm, TEXT, window=60)
    both = evaluate(tiny_llm, TEXT, reference=tiny_llm, window=60)
    assert both.perplexity.value == pytest.approx(alone.perplexity.value, rel=1e-6)
    assert both.kl_divergence is not None
    assert both.kl_divergence.value == 0


def test_figures_are_those_of_whole_windows(tiny_llm: LLM, int4_llm: LLM) -> None:
    """Windows and pieces of them give what each window's logits at once give."""
    report = evaluate(int4_llm, TEXT, reference=tiny_llm, window=40, stride=25, max_tokens=100)
    tokens = tiny_llm.tokenize(TEXT)[:100]
    passages = []
    for begin, end, first in ((0, 40, 1), (25, 65, 40), (50, 90, 65), (75, 100, 90)):
        part = tokens[begin:end]
        own, true = (
            llm.logits(part[:-1], last=len(part) - 1)[first - begin - 1 :].astype(np.float64)
            for llm in (int4_llm, tiny_llm)
        )
        p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (true, own))
        rows, targets = np.arange(end - first), tokens[first:end]
        passages.append(
            np.stack(
                [
                    -np.log(q[rows, targets]),
                    -np.log(p[rows, targets]),
                    (p * np.log(p / q)).sum(axis=1),
                    p.argmax(axis=1) == q.argmax(axis=1),
                ]
            )
        )
    loss, reference_loss, divergence, agreement = np.concatenate(passages, axis=1).mean(axis=1)
    assert (report.tokens, report.windows) == (99, 4)
    assert report.perplexity.value == pytest.approx(math.exp(loss), rel=1e-2)  # int4 rounds so
    assert report.reference_perplexity is not None
    assert report.reference_perplexity.value == pytest.approx(math.exp(reference_loss), rel=1e-5)
    assert report.log_perplexity_ratio is not None
    assert report.log_perplexity_ratio.value == pytest.approx(
        math.log(report.perplexity.value / report.reference_perplexity.value), abs=1e-9
    )
    assert report.kl_divergence is not None
    assert report.kl_divergence.value == pytest.approx(divergence, rel=2e-2)
    assert report.top1_agreement is not None
    assert report.top1_agreement.value == pytest.approx(agreement, abs=0.021)
    assert report.kl_divergence.standard_error is not None
    assert report.kl_divergence.standard_error > 0


def test_repeats_and_other_requests_change_nothing(tiny_llm: LLM, int4_llm: LLM) -> None:
    first = evaluate(int4_llm, TEXT, reference=tiny_llm, window=60, max_tokens=120)
    int4_llm.generate(TEXT[:30], max_tokens=4)
    again = evaluate(int4_llm, TEXT, reference=tiny_llm, window=60, max_tokens=120)
    assert dataclasses.asdict(first) == dataclasses.asdict(again)


def test_logits_are_asked_for_in_pieces_of_bounded_size(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(tiny_llm, TEXT, window=100)
    assert scoring.scored_width(400) == 128
    assert scoring.scored_width(1 << 18) * (1 << 18) * 4 <= scoring.LOGITS_BYTES
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * 400 * 9)
    asked: list[tuple[int, int]] = []
    logits = tiny_llm.logits

    def watch(tokens: NDArray[np.int64], *, last: int, continued: int) -> NDArray[np.float32]:
        asked.append((last, continued))
        return logits(tokens, last=last, continued=continued)

    monkeypatch.setattr(tiny_llm, "logits", watch)
    pieces = evaluate(tiny_llm, TEXT, window=100)
    assert pieces.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-5)
    assert 1 < max(last for last, _ in asked) <= 9
    assert sum(last for last, _ in asked) == pieces.tokens
    assert sum(continued == 0 for _, continued in asked) == pieces.windows


def test_progress(tiny_llm: LLM) -> None:
    told: list[tuple[int, int]] = []
    report = evaluate(tiny_llm, TEXT, window=60, progress=lambda *one: told.append(one))
    assert len(told) == report.windows
    assert told[-1] == (report.tokens, report.tokens)
    assert told == sorted(told)


# Logits


def test_logits_agree_with_scores_however_they_are_asked_for(tiny_llm: LLM) -> None:
    tokens = tiny_llm.tokenize(TEXT)[:200]
    whole = tiny_llm.logits(tokens, last=200)
    assert whole.dtype == np.float32
    assert whole.shape == (200, 400)
    scores = scoring.log_probabilities(whole[:-1], np.array(tokens[1:]))
    np.testing.assert_allclose(scores, tiny_llm.score(tokens).logprobs, atol=1e-5)
    for cut in (90, 150, 200):
        part = tiny_llm.logits(tokens[:cut], last=30, continued=cut - 30)
        np.testing.assert_allclose(part, whole[cut - 30 : cut], atol=1e-4)
    tiny_llm.generate(tokens[:170], max_tokens=1)  # the cache holds more than the call before fed
    part = tiny_llm.logits(tokens[:160], last=10, continued=150)
    np.testing.assert_allclose(part, whole[150:160], atol=1e-4)


def test_logits_refuse_what_is_outside_the_domain(tiny_llm: LLM) -> None:
    with pytest.raises(ContextLengthError):
        tiny_llm.logits([5] * 257)
    with pytest.raises(ArgumentError, match="last"):
        tiny_llm.logits([5, 6], last=3)
    with pytest.raises(ArgumentError, match="continued"):
        tiny_llm.logits([5, 6], last=1, continued=2)
    with pytest.raises(ArgumentError, match="tokens"):
        tiny_llm.logits([400])


# The formulas


def test_figures_by_the_definitions() -> None:
    p = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    q = np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    own, true = (np.log(x).astype(np.float32) + 3 for x in (q, p))
    got = token_figures(own, true, np.array([0, 2]))
    divergence = [
        0.5 * math.log(2) + 0.25 * math.log(0.5),
        0.8 * math.log(4 / 3) - 0.2 * math.log(2),
    ]
    expected = np.stack(
        [
            -np.log([0.25, 0.6]),
            -np.log([0.5, 0.8]),
            divergence,
            [0, 1],
            np.log([0.5 / 0.25, 0.8 / 0.6]),
        ],
        axis=1,
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_array_equal(token_figures(own, None, np.array([0, 2])), got[:, :1])


def test_tiny_divergences_are_not_lost_in_rounding() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(1, 50_000)).astype(np.float32) * 4
    own = true + rng.normal(size=true.shape).astype(np.float32) * 1e-3
    p, q = (np.exp(x.astype(np.longdouble)) for x in (true, own))
    p, q = p / p.sum(), q / q.sum()
    expected = float((p * np.log(p / q)).sum())
    assert token_figures(own, true, np.array([0]))[0, 2] == pytest.approx(expected, rel=1e-6)


samples = st.lists(st.floats(-10, 10), min_size=2, max_size=30)


@given(samples)
def test_errors_of_single_tokens_are_those_of_llama_cpp(values: list[float]) -> None:
    array = np.array(values)
    got = estimate_mean(array, np.ones(len(values), np.int64))
    assert got.value == pytest.approx(array.mean(), abs=1e-9)
    assert got.standard_error == pytest.approx(array.std(ddof=1) / math.sqrt(len(values)), abs=1e-9)


def test_errors_over_passages_of_correlated_tokens() -> None:
    """Passages whose tokens are all alike: the error is that of the passages, not of the tokens."""
    values = np.array([1.0, 2.0, 4.0])
    one = estimate_mean(values, np.ones(3, np.int64))
    ten = estimate_mean(values * 10, np.full(3, 10))
    assert (ten.value, ten.standard_error) == pytest.approx((one.value, one.standard_error))
    uneven = estimate_mean(np.array([3.0, 8.0]), np.array([1, 4]))
    assert uneven.value == pytest.approx(2.2)
    assert uneven.standard_error == pytest.approx(math.sqrt(2 * (0.8**2 + 0.8**2)) / 5)
    assert estimate_mean(values[:1], np.ones(1, np.int64)).standard_error is None


def test_errors_tell_how_far_means_scatter() -> None:
    """Over many texts the mean's scatter is what the error of each says."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        counts = rng.integers(5, 15, 40)
        sums = counts * rng.normal(size=40) + rng.normal(size=40) * np.sqrt(counts)
        found.append(estimate_mean(sums, counts))
    scatter = np.std([one.value for one in found])
    errors = [one.standard_error for one in found if one.standard_error is not None]
    assert np.mean(errors) == pytest.approx(scatter, rel=0.1)


@given(
    st.integers(0, 300),
    st.integers(1, 60),
    st.floats(0, 1),
    st.booleans(),
)
def test_windows_score_every_token_once(
    tokens: int, length: int, share: float, context_free: bool
) -> None:
    stride = max(1, round(share * length))
    found = split_windows(tokens, length=length, stride=stride, context_free=context_free)
    scored = [token for one in found for token in range(one.scored, one.end)]
    assert scored == sorted(set(scored))
    missing = sorted(set(range(tokens)) - set(scored))
    if context_free:
        assert not missing
    elif stride == length:
        assert missing == list(range(0, tokens, stride))
    else:
        assert missing == [0][:tokens]
    for one in found:
        assert one.begin % stride == 0
        assert one.end - one.begin <= length
        assert one.scored < one.end
        if one.begin:
            assert one.scored - one.begin >= length - stride
        assert one.scored - one.begin >= (not context_free)


# Refusals


def test_texts_that_cannot_be_scored(tiny_llm: LLM, tmp_path: Path) -> None:
    for text in ("", "a"):
        with pytest.raises(ArgumentError, match=r"^text must be at least 2 tokens long"):
            evaluate(tiny_llm, text)
    with pytest.raises(ArgumentError, match=r"^text must be at least 2 tokens long"):
        evaluate(tiny_llm, TEXT, max_tokens=1)
    file = tmp_path / "file"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ArgumentError, match=r"^text must be a file of UTF-8 text"):
        read_text_file(file)
    file.write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"^evaluate must be a file that is not empty"):
        read_text_file(file, "evaluate")


@pytest.mark.parametrize(
    ("name", "value"),
    [("window", 1), ("window", 257), ("stride", 0), ("stride", 51), ("max_tokens", 0)],
)
def test_arguments_outside_their_domain(name: str, value: int, tiny_llm: LLM) -> None:
    options: dict[str, Any] = {"window": 50} | {name: value}
    with pytest.raises(ArgumentError, match=f"^{name} must be"):
        evaluate(tiny_llm, TEXT, **options)


def test_the_shorter_context_bounds_the_window(tiny_llm: LLM, tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, context=40) as short:
        with pytest.raises(ArgumentError, match=r"^window must be an integer from 2 to 40, got 41"):
            evaluate(tiny_llm, TEXT, reference=short, window=41)
        assert evaluate(tiny_llm, TEXT, reference=short).window == 40
    with pytest.raises(ArgumentError, match=r"^window must be an integer from 2 to 256, got 257"):
        open_for_evaluation(tiny_bundle, window=257)
    with open_for_evaluation(tiny_bundle, window=30) as small:
        assert small.context == 30


def edited(bundle: Path, folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of a bundle with one file changed."""
    shutil.copytree(bundle, folder)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    return folder


def test_models_of_different_tokenizers_are_refused(
    tiny_llm: LLM, tiny_bundle: Path, tmp_path: Path
) -> None:
    vocab = json.loads((tiny_bundle / "tokenizer.json").read_text(encoding="utf-8"))["model"][
        "vocab"
    ]
    i, t = f'"i": {vocab["i"]}', f'"t": {vocab["t"]}'
    swapped = tmp_path / "swapped"
    shutil.copytree(tiny_bundle, swapped)
    source = (swapped / "tokenizer.json").read_text(encoding="utf-8")
    assert i in source
    source = source.replace(i, f'"i": {vocab["t"]}', 1).replace(t, f'"t": {vocab["i"]}', 1)
    (swapped / "tokenizer.json").write_text(source, encoding="utf-8")
    with_bos = edited(tiny_bundle, tmp_path / "bos", "manifest.json", '"bos": null', '"bos": 0')
    edited_again = with_bos / "manifest.json"
    edited_again.write_text(
        edited_again.read_text(encoding="utf-8").replace('"add_bos": false', '"add_bos": true'),
        encoding="utf-8",
    )
    for folder in (swapped, with_bos, BUNDLE):
        with (
            LLM(folder) as other,
            pytest.raises(ArgumentError, match=r"^reference must be a model"),
        ):
            evaluate(tiny_llm, TEXT, reference=other)


def test_a_broken_model_is_no_measurement(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.full((1, 400), np.nan, np.float32)
    monkeypatch.setattr(tiny_llm, "logits", lambda tokens, last, continued: nothing.repeat(last, 0))
    with pytest.raises(RuntimeFailure, match="nothing can be measured"):
        evaluate(tiny_llm, TEXT)


# The command


def test_command(tiny_bundle: Path, int4_bundle: Path, text_file: Path, capsys: Capture) -> None:
    argv = ["eval", str(int4_bundle), "--text", str(text_file), "--reference", str(tiny_bundle)]
    assert main([*argv, "--window", "64", "--stride", "48", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no progress
    document = json.loads(out)
    paths = {"model": int4_bundle, "reference": tiny_bundle, "text": text_file}
    assert document.pop("paths") == {name: str(path) for name, path in paths.items()}
    with LLM(int4_bundle) as llm, LLM(tiny_bundle) as reference:
        report = evaluate(llm, TEXT, reference=reference, window=64, stride=48)
    assert document == dataclasses.asdict(report)
    assert main([*argv, "--window", "64", "--stride", "48"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{int4_bundle} against {tiny_bundle} on {text_file} (SHA-256 ")
    assert f"{report.tokens} tokens in {report.windows} windows of 64, stride 48\n" in shown
    for words in ("perplexity", "KL divergence (nats per token)", "top-1 agreement", " ± "):
        assert words in shown
    assert main(["eval", str(tiny_bundle), "--text", str(text_file), "--max-tokens", "9"]) == 0
    shown = capsys.readouterr().out
    assert "8 tokens in 1 window of 256" in shown
    assert "KL divergence" not in shown


def test_a_checkpoint_as_reference(
    tiny_checkpoint: Path, tiny_bundle: Path, text_file: Path, capsys: Capture
) -> None:
    argv = ["eval", str(tiny_bundle), "--text", str(text_file), "--json"]
    assert main([*argv, "--reference", str(tiny_checkpoint)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["reference"] == tiny_checkpoint.name
    assert document["kl_divergence"]["value"] == 0
    assert document["top1_agreement"] == {"value": 1.0, "standard_error": 0.0}


def test_the_builtin_model(text_file: Path, capsys: Capture) -> None:
    argv = ["eval", "--text", str(text_file), "--json", "--max-tokens", "40"]
    assert main([*argv, "--reference", str(BUNDLE)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["perplexity"]["value"] > 1
    assert document["kl_divergence"]["value"] == 0


def test_what_the_command_refuses(
    tiny_bundle: Path, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    def refusal(*argv: object) -> str:
        assert main(["eval", str(tiny_bundle), *map(str, argv)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    text = ("--text", text_file)
    assert "--window must be an integer from 2 to 256, got 999." in refusal(*text, "--window", 999)
    assert "--stride must be an integer from 1 to 256, got 999." in refusal(*text, "--stride", 999)
    assert "No such file" in refusal("--text", tmp_path / "none")
    assert "no folder" in refusal(*text, "--reference", tmp_path / "none")
    assert "is not a bundle" in refusal(*text, "--reference", tmp_path)
    file = tmp_path / "latin"
    file.write_bytes(b"caf\xe9")
    assert "--text must be a file of UTF-8 text" in refusal("--text", file)
    assert main(["eval", str(tiny_bundle)]) == 2
