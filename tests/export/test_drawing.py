"""The text of a calibration: what the model writes, what a file has, and what is scored."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.errors import ArgumentError
from edge_llm.quality import evaluate
from edge_llm.text.tokenizer import Tokenizer
from edge_llm_export import Calibration, export_model
from edge_llm_export.quantize.drawing import Writer
from edge_llm_export.quantize.text import ROWS, calibration_windows

TOKENS = 48
Windows = NDArray[np.int64]


def seeds(*numbers: int) -> list[np.random.SeedSequence]:
    return [np.random.SeedSequence(0, spawn_key=(number,)) for number in numbers]


def nothing(*values: Any) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def writer(tiny_bundle: Path) -> Writer:
    return Writer(tiny_bundle, tokens=TOKENS, rows=ROWS)


def test_a_float32_window_does_not_hang_on_its_neighbours(writer: Writer) -> None:
    together = writer.write(seeds(*range(ROWS)), nothing)
    assert together.shape == (ROWS, TOKENS)
    assert len(np.unique(together, axis=0)) == ROWS
    few = writer.write(seeds(5, 3), nothing)
    assert (few == together[[5, 3]]).all()
    assert (writer.write(seeds(5), nothing) == together[[5]]).all()


def test_every_token_is_drawn_from_the_models_distribution(
    writer: Writer, tiny_bundle: Path
) -> None:
    """Each window again, one token at a time and by the plain definition of a draw."""
    windows = writer.write(seeds(7, 8), nothing)
    with LLM(tiny_bundle) as llm:
        vocab, (eos,) = llm.manifest.dims.vocab, llm.manifest.tokens.eos
        assert llm.manifest.tokens.bos is None
        for seed, window in zip(seeds(7, 8), windows, strict=True):
            stream = np.random.default_rng(seed)
            start = 0
            for i, token in enumerate(window.tolist()):
                if i == start:
                    assert token == stream.integers(vocab)
                else:
                    logits = llm.logits(window[start:i])[0].astype(np.float64)
                    order = np.argsort(-logits, kind="stable")
                    sums = np.cumsum(np.exp(logits[order] - logits.max()))
                    place = int(np.flatnonzero(order == token)[0])
                    u = stream.random() * sums[-1]
                    low = sums[place - 1] if place else 0.0
                    assert low - 1e-3 < u < sums[place] + 1e-3
                if token == eos:
                    start = i + 1


def test_texts_start_from_bos_and_fill_the_window(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "checkpoint", "llama", num_hidden_layers=1)
    config = tmp_path / "checkpoint" / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"bos_token": "<|im_start|>"}
    config.write_text(json.dumps(settings), encoding="utf-8")
    # An output row of zeros gives each <|im_end|> a fair share of the draws.
    model.lm_head.weight.data[:] *= 0.02
    model.save_pretrained(tmp_path / "checkpoint")
    manifest = export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize="fp32")
    bos, (eos,) = manifest.tokens.bos, manifest.tokens.eos
    windows = Writer(tmp_path / "bundle", tokens=200, rows=8).write(seeds(*range(8)), nothing)
    assert (windows[:, 0] == bos).all()
    ends = np.argwhere(windows[:, :-1] == eos)
    assert len(ends)
    assert all(windows[row, column + 1] == bos for row, column in ends)


def tokenizer_of(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(
        checkpoint / "tokenizer.json", bos=None, eos=[1], add_bos=False, vocab=400
    )


@pytest.fixture
def windows_of(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[Windows, Windows]]:
    """``calibration_windows`` of the tiny model, whose drafts it counts in ``drafts``."""

    def draft(folder: Path) -> None:
        drafts.append(folder)
        export_model(tiny_checkpoint, folder, quantize="fp32")

    def windows(calibration: Calibration, **options: Any) -> tuple[Windows, Windows]:
        (tmp_path / "work").mkdir(exist_ok=True)
        defaults: dict[str, Any] = {
            "tokenizer": tokenizer_of(tiny_checkpoint),
            "context": 256,
            "work": tmp_path / "work",
            "draft": draft,
            "scored": None,
            "report": nothing,
        }
        return calibration_windows(calibration, **(defaults | options))

    drafts: list[Path] = []
    windows.drafts = drafts  # type: ignore[attr-defined]
    return windows


def test_drawn_windows_are_kept_and_validation_is_apart(windows_of: Any, tmp_path: Path) -> None:
    calibration = Calibration(samples=ROWS + 3, tokens=32, seed=1)
    used, none = windows_of(calibration)
    assert used.shape == (ROWS + 3, 32)
    assert none.shape == (0, 32)
    again, held = windows_of(calibration, validation=5)
    assert (again == used).all()
    assert held.shape == (5, 32)
    assert len(np.unique(np.concatenate([used, held]), axis=0)) == ROWS + 8
    assert len(windows_of.drafts) == 2  # none for what is there
    windows_of(calibration, validation=5)
    assert len(windows_of.drafts) == 2
    kept = {file.name for file in (tmp_path / "work").iterdir()}
    assert kept == {f"drawn-0-0-{ROWS}.npy", f"drawn-0-{ROWS}-{ROWS + 3}.npy", "drawn-1-0-5.npy"}


def test_windows_of_the_scored_text_are_left_out(windows_of: Any, tiny_checkpoint: Path) -> None:
    calibration = Calibration(samples=6, tokens=120)
    used, _ = windows_of(calibration)
    tokenizer = tokenizer_of(tiny_checkpoint)
    texts = [tokenizer.decode(window) for window in used]
    scored = f"Something else. {texts[2]} {texts[4]}"
    apart, held = windows_of(calibration, scored=scored, validation=2)
    assert apart.shape == used.shape
    assert (apart[:4] == used[[0, 1, 3, 5]]).all()
    assert not any((window == used[[2, 4]]).all(axis=1).any() for window in [*apart, *held])
    # A model that writes nothing else.
    several, _ = windows_of(Calibration(samples=12, tokens=120))
    with pytest.raises(ArgumentError, match="knows it by heart") as caught:
        windows_of(calibration, scored=" ".join(map(tokenizer.decode, several)))
    assert caught.value.argument == "evaluate"


def text_of(seed: int, words: int = 400) -> str:
    choose = random.Random(seed)
    return " ".join("".join(choose.choices("abcdefgh", k=5)) for _ in range(words))


@pytest.mark.parametrize(("samples", "validation"), [(4, 2), (50, 20), (1000, 300), (1, 1000)])
def test_windows_of_a_file(
    samples: int, validation: int, windows_of: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text_of(0), encoding="utf-8")
    stream = np.array(tokenizer_of(tiny_checkpoint).encode(file.read_text()))
    whole = stream[: len(stream) // 16 * 16].reshape(-1, 16)
    calibration = Calibration(text=file, samples=samples, tokens=16)
    used, held = windows_of(calibration, validation=validation)
    assert len(used) + len(held) == min(len(whole), samples + validation)
    assert len(held) == pytest.approx(
        (len(used) + len(held)) * validation / (samples + validation), abs=1
    )
    places = [np.flatnonzero((whole == window).all(axis=1))[0] for window in [*used, *held]]
    assert len(set(places)) == len(places)
    alone, none = windows_of(calibration)
    assert len(alone) == min(len(whole), samples)
    assert len(none) == 0


def test_a_file_that_cannot_be_parted(windows_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    calibration = Calibration(text=file, samples=3, tokens=16)
    file.write_text("abcd " * 6, encoding="utf-8")
    with pytest.raises(ArgumentError, match="at least 32 tokens"):
        windows_of(calibration, validation=1)
    file.write_text("a" * 500, encoding="utf-8")
    with pytest.raises(ArgumentError, match="repeat itself"):
        windows_of(calibration, validation=1)


def test_an_export_refuses_the_text_that_it_is_scored_on(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    seen, scored = tmp_path / "seen.txt", tmp_path / "scored.txt"
    seen.write_text(text_of(1), encoding="utf-8")
    scored.write_text(f"{text_of(2)}\n\n{text_of(1)[900:1000]}", encoding="utf-8")
    options: dict[str, Any] = {
        "method": "gptq",
        "calibration": Calibration(text=seen, samples=2, tokens=16),
        "max_context": 32,
    }
    phases: list[str] = []
    with pytest.raises(ArgumentError, match=r"ends on line 1 .* line 3 of the scored") as caught:
        export_model(
            tiny_checkpoint,
            tmp_path / "bundle",
            evaluate=scored,
            progress=lambda phase, *_: phases.append(phase),
            **options,
        )
    assert caught.value.argument == "calibration"
    assert not phases
    # Afterwards the bundle knows the text by its hash.
    manifest = export_model(tiny_checkpoint, tmp_path / "bundle", **options)
    digest = hashlib.sha256(seen.read_bytes()).hexdigest()
    assert manifest.info["calibration"]["sha256"] == digest
    with LLM(tmp_path / "bundle") as llm:
        with pytest.raises(ArgumentError, match=digest):
            evaluate(llm, seen.read_text(encoding="utf-8"))
        assert evaluate(llm, scored.read_text(encoding="utf-8")).tokens
