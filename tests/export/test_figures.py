"""What the manifest says of a bundle's fidelity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from edge_llm import LLM, Manifest
from edge_llm.cli.main import main
from edge_llm.errors import ArgumentError
from edge_llm.quality import evaluate
from edge_llm_export import export_model

Capture = pytest.CaptureFixture[str]

TEXT = "We had everything before us, we had nothing before us: it was the winter of despair.\n" * 5


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "tale.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_the_manifest_has_what_eval_measures(
    tiny_checkpoint: Path, tiny_bundle: Path, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "bundle"
    argv = ["export", str(tiny_checkpoint), "-o", str(folder), "--quantize", "int4", "--json"]
    assert main([*argv, "--evaluate", str(text_file)]) == 0
    shown = json.loads(capsys.readouterr().out)["manifest"]
    assert shown == json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "tale.txt"]
    with LLM(folder, verify=True) as llm, LLM(tiny_bundle) as original:
        report = evaluate(llm, TEXT, reference=original)
    assert report.reference_perplexity is not None
    assert report.kl_divergence is not None
    assert report.kl_divergence.value > 0
    assert report.top1_agreement is not None
    found = {one.metric: one for one in llm.manifest.quality}
    for metric, own, ideal in (
        ("perplexity", report.perplexity, report.reference_perplexity.value),
        ("kl_divergence", report.kl_divergence, 0.0),
        ("top1_agreement", report.top1_agreement, 1.0),
    ):
        one = found.pop(metric)
        assert one.value == pytest.approx(own.value, rel=1e-9)
        assert one.standard_error == pytest.approx(own.standard_error, rel=1e-9)
        assert one.reference == pytest.approx(ideal, rel=1e-9)
        assert one.data == "tale.txt"
        assert one.sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()
        assert (one.tokens, one.window, one.stride) == (report.tokens, 256, 128)
    assert not found
    assert main(["info", str(folder)]) == 0
    digest = hashlib.sha256(text_file.read_bytes()).hexdigest()[:12]
    told = f"perplexity on tale.txt in windows of 256 tokens, SHA-256 {digest}: "
    assert told in capsys.readouterr().out


def test_a_float32_bundle_is_its_own_original(
    tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    phases: list[str] = []
    manifest = export_model(
        tiny_checkpoint,
        tmp_path / "bundle",
        quantize="fp32",
        evaluate=text_file,
        progress=lambda phase, done, total: phases.append(phase),
    )
    assert [one.value for one in manifest.quality[1:]] == [0, 1]
    assert manifest.quality[0].value == manifest.quality[0].reference
    stored = (tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8")
    assert Manifest.from_json(stored) == manifest
    assert phases[-1] == "evaluating"
    assert not any("original" in phase for phase in phases)


def test_nothing_is_measured_unasked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert export_model(tiny_checkpoint, tmp_path / "bundle", quantize="int4").quality == ()


@pytest.mark.parametrize("content", [b"", b"caf\xe9"])
def test_a_file_that_is_no_text_is_refused_before_any_work(
    content: bytes, tmp_path: Path, text_file: Path
) -> None:
    text_file.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"^evaluate must be a file"):
        export_model(tmp_path / "none", tmp_path / "bundle", evaluate=text_file, quantize="int4")


def test_a_text_without_a_token_to_score_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, text_file: Path
) -> None:
    text_file.write_text("a")
    with pytest.raises(ArgumentError, match=r"^text must be at least 2 tokens long"):
        export_model(tiny_checkpoint, tmp_path / "bundle", evaluate=text_file, quantize="int4")
    assert [path.name for path in tmp_path.iterdir()] == ["tale.txt"]
