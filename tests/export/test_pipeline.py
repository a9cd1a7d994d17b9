"""What an export reads, and what it refuses before it writes a weight."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from edge_llm.errors import CheckpointError
from edge_llm_export import building, export_model, pipeline
from edge_llm_export.checkpoint.hub import Checkpoint
from edge_llm_export.checkpoint.weights import Weights


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy whose files may be replaced."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def refuse_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("there was work")

    monkeypatch.setattr(building, "build_decoder", work)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.usefixtures("refuse_work")
@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_control_tokens_outside_the_vocabulary_are_refused_before_any_work(
    name: str, file: str, checkpoint: Path, tmp_path: Path
) -> None:
    if file == "config.json":
        (checkpoint / "generation_config.json").unlink()
    edit(checkpoint / file, **{name: 400})
    message = f"{name} is 400, but the model's vocabulary has 400 rows. Repair it in generation_"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        export_model(checkpoint, tmp_path / "bundle", quantize="int4")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("refuse_work")
@pytest.mark.parametrize(
    ("name", "value"), [("num_attention_heads", 0), ("rms_norm_eps", -1), ("vocab_size", 399.5)]
)
def test_values_that_make_no_model_are_refused_before_any_work(
    name: str, value: float, checkpoint: Path, tmp_path: Path
) -> None:
    edit(checkpoint / "config.json", **{name: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {name} must be .*, got {value}\."):
        export_model(checkpoint, tmp_path / "bundle", quantize="int4")
    assert not (tmp_path / "bundle").exists()


def test_the_token_goes_to_the_hub(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, str | None]] = []

    def resolve(source: str, *, revision: str | None, token: str | None) -> Checkpoint:
        asked.append((source, revision, token))
        return Checkpoint(tiny_checkpoint, source, "0" * 40, "mit")

    monkeypatch.setattr(pipeline, "resolve", resolve)
    manifest = export_model(
        "owner/name", tmp_path / "bundle", revision="main", token="hf_secret", quantize="int4"
    )
    assert asked == [("owner/name", "main", "hf_secret")]
    assert (manifest.name, manifest.source.repo) == ("name", "owner/name")
    assert (manifest.source.revision, manifest.source.license) == ("0" * 40, "mit")
    assert not any(b"hf_secret" in file.read_bytes() for file in (tmp_path / "bundle").iterdir())


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json"])
def test_a_checkpoint_that_breaks_during_the_export_is_blamed_itself(
    broken: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails when it is read is no disk that is full."""
    original = Weights.open

    def opened(folder: Path) -> Weights:
        weights = original(folder)
        if broken == "tokenizer.json":
            (folder / broken).unlink()
            (folder / broken).mkdir()
        else:
            # Reading a folder fails as a broken disk does: with an OSError that names no file.
            directory = os.open(folder, os.O_RDONLY)
            os.dup2(directory, next(iter(weights._tensors.values())).file.fileno())
            os.close(directory)
        return weights

    monkeypatch.setattr(Weights, "open", opened)
    with pytest.raises(CheckpointError, match=rf"{re.escape(broken)} cannot be read: "):
        export_model(checkpoint, tmp_path / "bundle", quantize="int4")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob(".bundle*"))
