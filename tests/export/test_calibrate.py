"""Calibrated exports, from the text to the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.bundle import Bundle
from edge_llm.errors import ArgumentError
from edge_llm.runtime.kv_cache import state_capacity
from edge_llm.runtime.session import create_session
from edge_llm_export import Calibration, export_model

SMALL = Calibration(samples=4, tokens=64)


def logits(folder: Path, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probabilities of what comes after every token, float64 [windows, tokens, vocab]."""
    bundle = Bundle.open(folder)
    manifest, (rows, tokens) = bundle.manifest, windows.shape
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": windows,
        "query_lens": np.full(rows, tokens, np.int32),
        "seqlens_k": np.full(rows, tokens - 1, np.int32),
        "total_sequence_length": np.array(tokens, np.int32),
        "logits_index": np.arange(rows * tokens),
    }
    for one in manifest.decoder.state:
        _, heads, _, size = one.shape
        assert isinstance(heads, int)
        assert isinstance(size, int)
        shape = rows, heads, state_capacity(one, tokens), size
        feeds[one.input] = np.zeros(shape, np.float32)
    graph = bundle.file(manifest.decoder.graph)
    session = create_session(graph, threads=1, minimum=manifest.min_onnxruntime)
    scores = session.run(["logits"], feeds)[0].astype(np.float64).reshape(rows, tokens, -1)
    scores -= scores.max(axis=-1, keepdims=True)
    normalized: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return normalized


def hashes(folder: Path) -> dict[str, str | None]:
    return {name: entry.sha256 for name, entry in Bundle.open(folder).manifest.files.items()}


def test_a_real_model_loses_less_than_by_rounding_to_nearest(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "stories260k"
    text = (shared / "data" / "tinystories_valid_sample.txt").read_text(encoding="utf-8")
    export_model(source, tmp_path / "fp32", quantize="fp32")
    export_model(source, tmp_path / "rtn", block=64)
    calibration = Calibration(samples=16, tokens=128)
    export_model(source, tmp_path / "gptq", block=64, method="gptq", calibration=calibration)
    with LLM(tmp_path / "fp32") as llm:
        windows = np.array(llm.tokenize(text)[: 16 * 128]).reshape(16, 128)
    true = logits(tmp_path / "fp32", windows)

    def divergence(name: str) -> float:
        return float((np.exp(true) * (true - logits(tmp_path / name, windows))).sum(-1).mean())

    assert divergence("gptq") < 0.9 * divergence("rtn")


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "gemma2": {"head_dim": 32, "sliding_window": 16, "num_hidden_layers": 2},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 400,
    },
    "gpt_neox": {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2},
    "phi3": {"num_hidden_layers": 2, "num_key_value_heads": 8},
    "olmo2": {"num_hidden_layers": 2},  # no norm in front of attention
    "qwen3": {"head_dim": 16, "num_hidden_layers": 2, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_calibrates(family: str, make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", family, **FAMILIES[family])
    manifest = export_model(
        tmp_path / "checkpoint",
        tmp_path / "bundle",
        block=32,
        method="gptq",
        vocabulary="int4",
        calibration=SMALL,
        work_dir=tmp_path / "work",
    )
    assert manifest.quantization.method == "calibrated"
    assert manifest.info["calibration"]["method"] == "gptq"
    kept = {file.name.removesuffix(".scales.npy") for file in tmp_path.rglob("*.scales.npy")}
    a_layer = 4 * manifest.dims.layers
    tied = family in ("gpt2", "qwen3", "gemma2")
    assert len(kept) == a_layer + 1
    assert ("embed_tokens" if tied else "lm_head") in kept


def test_the_same_seed_gives_the_same_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        calibration = Calibration(samples=2, tokens=32, seed=seed)
        export_model(tiny_checkpoint, tmp_path / name, method="gptq", calibration=calibration)
        found.append(hashes(tmp_path / name))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_an_interrupted_calibration_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "calibrating" and done == 2:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"method": "gptq", "calibration": SMALL}
    with pytest.raises(KeyboardInterrupt):
        export_model(
            tiny_checkpoint, tmp_path / "part", work_dir=work, progress=interrupt, **options
        )
    assert not (tmp_path / "part").exists()
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.npy")}
    assert len([file for file in before if file.name.endswith("scales.npy")]) == 8
    export_model(tiny_checkpoint, tmp_path / "resumed", work_dir=work, **options)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    export_model(tiny_checkpoint, tmp_path / "whole", **options)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole")


def test_text_of_a_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40, encoding="utf-8")
    calibration = Calibration(text=text, samples=3, tokens=16)
    manifest = export_model(
        tiny_checkpoint,
        tmp_path / "bundle",
        method="gptq",
        calibration=calibration,
        work_dir=tmp_path / "work",
    )
    assert manifest.info["calibration"]["text"] == "text.txt"
    text.write_text("short", encoding="utf-8")
    with pytest.raises(ArgumentError, match="at least 16 tokens"):
        export_model(tiny_checkpoint, tmp_path / "b", method="gptq", calibration=calibration)
    text.unlink()
    with pytest.raises(ArgumentError, match="readable file"):
        export_model(tiny_checkpoint, tmp_path / "b", method="gptq", calibration=calibration)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"method": "awq"}, "method"),
        ({"method": "gptq", "quantize": "fp32"}, "method"),
        ({"method": "gptq", "via": "optimum"}, "method"),
        ({"quantize": "int4", "calibration": SMALL}, "calibration"),
        ({"quantize": "int4", "work_dir": "work"}, "work_dir"),
        ({"quantize": "auto", "via": "optimum", "work_dir": "work"}, "work_dir"),
        ({"max_kld": 0.1, "via": "optimum"}, "max_kld"),
    ],
)
def test_what_cannot_be_calibrated(
    options: dict[str, Any], name: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=name):
        export_model(tiny_checkpoint, tmp_path / "bundle", **options)


@pytest.mark.parametrize("options", [{"samples": 0}, {"tokens": 1}, {"seed": -1}, {"damping": 0}])
def test_calibrations_outside_their_domain(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Calibration(**options)
