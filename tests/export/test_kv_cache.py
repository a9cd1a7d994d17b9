"""Bundles whose keys and values are 8-bit integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from edge_llm import LLM, Manifest
from edge_llm.bundle import Bundle
from edge_llm.cli.main import main
from edge_llm.errors import ArgumentError, RuntimeFailure, VerificationError
from edge_llm.quality import evaluate
from edge_llm.runtime.kv_cache import KVCache, state_bytes, state_capacity
from edge_llm.runtime.own_layout import OwnDecoder
from edge_llm.runtime.session import create_session
from edge_llm_export import Calibration, export_model
from edge_llm_export.graph.cache import quantize_cache
from edge_llm_export.graph.recorder import GraphRecorder
from edge_llm_export.quantize.kv import MARGIN, channel_peaks, peaks_to_scales

HEADS, KV_HEADS, SIZE, CONTEXT = 4, 2, 16, 64
SMALL = Calibration(samples=4, tokens=64)
TEXT = "We had everything before us, we had nothing before us: it was the winter of despair.\n" * 5


def attention_graph(*, window: int = 0, softcap: float = 0.0, rotary: bool = True) -> Any:
    """One GroupQueryAttention on its packed input, as the exporter records it."""
    graph = GraphRecorder("attention")
    width = (HEADS + 2 * KV_HEADS) * SIZE
    graph.input("packed", np.float32, ["batch", "tokens", width])
    for name in ("query_lens", "seqlens_k"):
        graph.input(name, np.int32, ["batch"])
    graph.input("total_sequence_length", np.int32, [])
    caches = [(f"past.0.{part}", f"present.0.{part}") for part in ("key", "value")]
    shape: list[int | str] = ["batch", KV_HEADS, "capacity", SIZE]
    for past, present in caches:
        graph.input(past, np.float32, shape)
        graph.output(present, np.float32, shape)
    tables = [graph.constant("cos", np.cos(angles())), graph.constant("sin", np.sin(angles()))]
    options: dict[str, Any] = {"local_window_size": window, "sliding_window_cache": 1}
    inputs = ["packed", "", "", *(past for past, _ in caches), "seqlens_k"]
    inputs += ["total_sequence_length", *(tables if rotary else ["", ""]), *[""] * 7, "query_lens"]
    graph.microsoft(
        "GroupQueryAttention",
        "attention",
        inputs,
        outputs=["attended", *(present for _, present in caches)],
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        do_rotary=int(rotary),
        softcap=softcap,
        **(options if window else {}),
    )
    graph.output("attended", np.float32, ["batch", "tokens", HEADS * SIZE])
    return graph.model("none", {}, "0")


def angles() -> NDArray[np.float32]:
    frequencies = 1e4 ** (-np.arange(SIZE // 2) / (SIZE // 2))
    return np.outer(np.arange(CONTEXT), frequencies).astype(np.float32)


def rotate(heads: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keys or queries [tokens, heads, size] at positions 0, 1, ..."""
    one, two = np.split(heads, 2, axis=-1)
    cos, sin = (f(angles()[: len(heads), None]) for f in (np.cos, np.sin))
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def expected(
    packed: NDArray[np.float32],
    scales: dict[str, NDArray[np.float32]],
    *,
    window: int,
    softcap: float,
    rotary: bool,
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.int8]]]:
    """What the operator computes, and what it keeps, in numpy."""
    rows = packed.reshape(len(packed), HEADS + 2 * KV_HEADS, SIZE)
    query, key, value = np.split(rows, [HEADS, HEADS + KV_HEADS], axis=1)
    if rotary:
        query, key = rotate(query), rotate(key)
    held = {}
    for name, values in (("past.0.key", key), ("past.0.value", value)):
        held[name] = np.clip(np.rint(values / scales[name]), -128, 127)
    keys, values = (held[name] * scales[name] for name in held)
    out = np.zeros((len(packed), HEADS, SIZE))
    for t in range(len(packed)):
        first = max(0, t + 1 - window) if window else 0
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            scores = keys[first : t + 1, group].astype(np.float64) @ query[t, head] * SIZE**-0.5
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            shares = np.exp(scores - scores.max())
            out[t, head] = shares / shares.sum() @ values[first : t + 1, group]
    kept = {name: one.astype(np.int8).transpose(1, 0, 2) for name, one in held.items()}
    return out.reshape(len(packed), -1), kept


@pytest.mark.parametrize(
    ("window", "softcap", "rotary"),
    [(0, 0.0, True), (0, 0.0, False), (0, 5.0, True), (16, 0.0, True), (16, 5.0, True)],
)
@pytest.mark.parametrize("steps", [[40], [16, 1, 1, 22], [1] * 40], ids=["whole", "chunks", "ones"])
def test_the_operator_computes_what_numpy_does(
    window: int, softcap: float, rotary: bool, steps: list[int], tmp_path: Path
) -> None:
    # Nothing here is refused by ONNX Runtime: windows, soft caps and layers without positions.
    rng = np.random.default_rng(0)
    packed = rng.standard_normal((sum(steps), (HEADS + 2 * KV_HEADS) * SIZE)).astype(np.float32)
    scales = {
        # Some values lie beyond 127 steps, so that the bounds count.
        f"past.0.{part}": rng.uniform(0.01, 0.03, (KV_HEADS, SIZE)).astype(np.float32)
        for part in ("key", "value")
    }
    model = attention_graph(window=window, softcap=softcap, rotary=rotary)
    quantize_cache(model, scales)
    onnx.checker.check_model(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    session = create_session(path, threads=1, minimum="1.32")
    past = {
        name: np.zeros((1, KV_HEADS, window + 8 if window else 48, SIZE), np.int8)
        for name in scales
    }
    found, length = [], 0
    for count in steps:
        length += count
        attended, *presents = session.run(
            ["attended", "present.0.key", "present.0.value"],
            {
                "packed": packed[None, length - count : length],
                "query_lens": np.array([count], np.int32),
                "seqlens_k": np.array([length - 1], np.int32),
                "total_sequence_length": np.array(length, np.int32),
                **past,
            },
        )
        found.append(attended[0])
        past = dict(zip(past, presents, strict=True))
    computed, kept = expected(packed, scales, window=window, softcap=softcap, rotary=rotary)
    assert np.abs(np.concatenate(found) - computed).max() < 2e-6
    if not window:
        for name, values in kept.items():
            assert np.abs(past[name][0, :, :length].astype(int) - values).max() <= (
                name == "past.0.key"
            )
            assert np.mean(past[name][0, :, :length] == values) > 0.999


@given(st.integers(0, 2**32 - 1), st.integers(0, CONTEXT - 1))
def test_a_keys_peak_holds_at_every_position(seed: int, position: int) -> None:
    rng = np.random.default_rng(seed)
    key = rng.standard_normal((1, KV_HEADS, SIZE)).astype(np.float32)
    peaks = channel_peaks(key.transpose(1, 0, 2), np.ones(SIZE // 2, bool))
    later = rotate(np.repeat(key, CONTEXT, axis=0))[position]
    assert (np.abs(later) <= peaks * 1.0001).all()
    # A value does not turn, nor do a key's channels outside a partial rotary embedding.
    assert np.array_equal(channel_peaks(key.transpose(1, 0, 2), None), np.abs(key[0]))
    half = np.arange(SIZE // 2) < SIZE // 4
    some = channel_peaks(key.transpose(1, 0, 2), half)
    still = ~np.tile(half, 2)
    assert np.array_equal(some[:, still], np.abs(key[0])[:, still])
    assert np.array_equal(some[:, ~still], peaks[:, ~still])


def test_scales_of_channels_that_sleep_and_of_numbers_that_are_none() -> None:
    peaks = {"a": np.array([[12.7, 0.0]], np.float32), "b": np.zeros((1, 2), np.float32)}
    scales = peaks_to_scales(peaks)
    assert scales["a"] == pytest.approx(np.array([[0.1, 0.0001]]) * MARGIN)
    assert (scales["b"] > 0).all()
    for bad in (np.inf, np.nan):
        with pytest.raises(VerificationError, match="'a' holds"):
            peaks_to_scales({"a": np.array([[1.0, bad]], np.float32)})


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint with both caches, its weights float32."""
    folder = tmp_path_factory.mktemp("caches")
    for kind in ("fp32", "int8"):
        calibration = SMALL if kind == "int8" else None
        export_model(
            tiny_checkpoint, folder / kind, quantize="fp32", kv_cache=kind, calibration=calibration
        )
    return {kind: folder / kind for kind in ("fp32", "int8")}


def decoder(folder: Path, capacity: int) -> OwnDecoder:
    bundle = Bundle.open(folder)
    session = create_session(bundle.file("model.onnx"), threads=1, minimum="1.32")
    return OwnDecoder(session, bundle.manifest, capacity=capacity)


def test_only_the_graph_file_differs_and_the_cache_is_a_quarter(bundles: dict[str, Path]) -> None:
    plain, small = (Bundle.open(bundles[kind], verify=True).manifest for kind in ("fp32", "int8"))
    assert small.files["model.onnx.data"] == plain.files["model.onnx.data"]
    assert small.files["model.onnx"] != plain.files["model.onnx"]
    assert {one.dtype for one in small.decoder.state} == {"int8"}
    assert Manifest.from_json(small.to_json()) == small
    assert small.info["kv_cache_calibration"] == {
        "text": "drawn from the model",
        "samples": 4,
        "tokens": 64,
        "seed": 0,
    }
    assert "calibration" not in small.info
    sizes = [state_bytes(m.decoder.state, rows=1, capacity=100) for m in (plain, small)]
    assert sizes[0] == 4 * sizes[1]
    cache = KVCache(small.decoder.state, rows=2, capacity=100)
    assert sum(buffer.nbytes for buffer in cache.buffers.values()) == 2 * sizes[1]


def test_logits_stay_near_the_float32_cache(bundles: dict[str, Path]) -> None:
    tokens = np.random.default_rng(1).integers(0, 300, 120)
    plain, small = (decoder(bundles[kind], 256).step(tokens, scored=120) for kind in bundles)
    assert 0 < np.abs(plain - small).max() < 0.05 * np.ptp(plain)
    keys = decoder(bundles["int8"], 256)
    keys.step(tokens, scored=1)
    held = keys.cache.buffers["past.0.key"][0, :, :120]
    # Random tokens reach far into the range and never out of it.
    assert 60 < np.abs(held.astype(int)).max() <= 127


def test_chunks_rollback_and_a_second_try_give_the_same(bundles: dict[str, Path]) -> None:
    tokens = np.random.default_rng(2).integers(0, 300, 60)
    whole = decoder(bundles["int8"], 256).step(tokens, scored=1).copy()
    one = decoder(bundles["int8"], 256)
    for start in range(0, 60, 7):
        last = one.step(tokens[start : start + 7], scored=1).copy()
    assert np.abs(last - whole).max() < 1e-3 * np.ptp(whole)
    one.step(np.arange(30), scored=0)
    assert one.cache.truncate(0, 41) == 41
    again = one.step(tokens[41:], scored=1)
    assert np.abs(again - whole).max() < 1e-3 * np.ptp(whole)


def test_rows_of_a_ragged_batch_get_their_own_answers(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["int8"])
    session = create_session(bundle.file("model.onnx"), threads=1, minimum="1.32")
    lengths = [9, 1, 14]
    rows = [np.random.default_rng(i).integers(0, 300, n + 2) for i, n in enumerate(lengths)]
    state = bundle.manifest.decoder.state
    cache = KVCache(state, rows=3, capacity=32).buffers

    def step(parts: list[NDArray[np.int64]], past: list[int]) -> NDArray[np.float32]:
        width = max(map(len, parts))
        total = [length + len(part) for length, part in zip(past, parts, strict=True)]
        feeds = {
            "input_ids": np.stack([np.pad(part, (0, width - len(part))) for part in parts]),
            "query_lens": np.array([len(part) for part in parts], np.int32),
            "seqlens_k": np.array(total, np.int32) - 1,
            "total_sequence_length": np.array(max(total), np.int32),
            "logits_index": np.array(
                [i * width + len(p) - 1 for i, p in enumerate(parts) if len(p)]
            ),
        }
        logits, *presents = session.run(["logits", *(one.output for one in state)], feeds | cache)
        cache.update(zip(cache, presents, strict=True))
        found: NDArray[np.float32] = logits
        return found

    step([row[:n] for row, n in zip(rows, lengths, strict=True)], [0, 0, 0])
    # The second row idles; the others go on by two tokens and by one.
    found = step([rows[0][9:11], rows[1][:0], rows[2][14:15]], lengths)
    for logits, row, length in zip(found, (rows[0], rows[2]), (11, 15), strict=True):
        alone = decoder(bundles["int8"], 32).step(row[:length], scored=1)[0]
        assert np.abs(logits - alone).max() < 1e-3 * np.ptp(alone)
    found = step([rows[0][:0], rows[1][1:3], rows[2][:0]], [11, 1, 15])
    alone = decoder(bundles["int8"], 32).step(rows[1][:3], scored=1)[0]
    assert np.abs(found[0] - alone).max() < 1e-3 * np.ptp(alone)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 10},
    "gemma2": {"head_dim": 32, "sliding_window": 16, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 400},
    "gpt_neox": {"num_attention_heads": 4, "num_hidden_layers": 2},
    "qwen3": {"head_dim": 16, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_attention(family: str, make_checkpoint: Any, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", family, **FAMILIES[family])
    tokens = np.random.default_rng(3).integers(0, 300, 100)
    scores = {}
    for kind in ("fp32", "int8"):
        calibration = SMALL if kind == "int8" else None
        manifest = export_model(
            tmp_path / "checkpoint",
            tmp_path / kind,
            quantize="fp32",
            kv_cache=kind,
            calibration=calibration,
        )
        scores[kind] = decoder(tmp_path / kind, 128).step(tokens, scored=50)
    windows = [one for one in manifest.decoder.state if one.window]
    assert bool(windows) == (family == "gemma2")
    assert all(state_capacity(one, 128) >= 16 for one in windows)
    error = np.abs(scores["fp32"] - scores["int8"]).max() / np.ptp(scores["fp32"])
    assert 0 < error < 0.05


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_manifest_tells_what_the_cache_loses(
    method: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "tale.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = ["--method", method, "--samples", "2", "--kv-cache", "int8"]
    argv = ["export", str(tiny_checkpoint), "-o", str(tmp_path / "bundle"), *options]
    assert main([*argv, "--evaluate", str(text), "--json"]) == 0
    found = {
        one["metric"]: one for one in json.loads(capsys.readouterr().out)["manifest"]["quality"]
    }
    assert len(found) == 6
    # The cache alone loses less than it and the 4-bit weights do together.
    own, all_of_it = found["kv_cache_kl_divergence"], found["kl_divergence"]
    assert 0 < own["value"] < 0.5 * all_of_it["value"]
    assert found["kv_cache_perplexity"]["value"] == found["perplexity"]["value"]
    assert found["kv_cache_perplexity"]["reference"] != found["perplexity"]["reference"]
    calibration = Calibration(samples=2) if method == "gptq" else None
    export_model(tiny_checkpoint, tmp_path / "twin", method=method, calibration=calibration)
    with LLM(tmp_path / "bundle") as llm, LLM(tmp_path / "twin") as twin:
        report = evaluate(llm, TEXT, reference=twin)
    assert report.kl_divergence is not None
    assert own["value"] == pytest.approx(report.kl_divergence.value, rel=1e-6)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bundle", "tale.txt", "twin"]
    assert main(["info", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert "keys and values  int8" in shown
    assert "kv_cache_kl_divergence on tale.txt" in shown
    assert "(float32 cache: 0)" in shown


def test_float32_weights_are_measured_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "tale.txt"
    text.write_text(TEXT, encoding="utf-8")
    manifest = export_model(
        tiny_checkpoint,
        tmp_path / "bundle",
        quantize="fp32",
        kv_cache="int8",
        calibration=SMALL,
        evaluate=text,
    )
    values = {one.metric: one.value for one in manifest.quality}
    assert values["kv_cache_kl_divergence"] == values["kl_divergence"] > 0


def test_text_of_a_file_and_a_folder_that_keeps_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40, encoding="utf-8")
    manifest = export_model(
        tiny_checkpoint,
        tmp_path / "bundle",
        quantize="int4",
        kv_cache="int8",
        calibration=Calibration(text=text, samples=3, tokens=16),
        work_dir=tmp_path / "work",
    )
    assert manifest.info["kv_cache_calibration"]["text"] == "text.txt"
    assert manifest.info["kv_cache_calibration"]["samples"] == 3


def test_calibration_text_is_not_the_scored_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"^calibration must be text of which"):
        export_model(
            tiny_checkpoint,
            tmp_path / "bundle",
            kv_cache="int8",
            calibration=Calibration(text=text),
            evaluate=text,
        )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kv_cache": "int4"}, "kv_cache"),
        ({"kv_cache": "int8", "via": "optimum"}, "kv_cache"),
        ({"quantize": "int4", "kv_cache": "fp32", "calibration": SMALL}, "calibration"),
        ({"quantize": "int4", "kv_cache": "fp32", "work_dir": "work"}, "work_dir"),
    ],
)
def test_what_is_refused(
    options: dict[str, Any], name: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} must be"):
        export_model(tiny_checkpoint, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def run(graph: Path, manifest: Manifest) -> None:
    session = create_session(graph, threads=1, minimum="1.32")
    OwnDecoder(session, manifest, capacity=32).step(np.arange(3), scored=1)


def test_a_graph_whose_cache_the_runtime_refuses_is_a_typed_error(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    model = onnx.load(bundles["int8"] / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "kv_cache_bit_width":
                attribute.i = 4
    (tmp_path / "model.onnx.data").hardlink_to(bundles["int8"] / "model.onnx.data")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    manifest = Bundle.open(bundles["int8"]).manifest
    with pytest.raises(RuntimeFailure, match=r"ONNX Runtime failed in a step: .*past_key"):
        run(tmp_path / "model.onnx", manifest)


def test_a_manifest_that_disagrees_with_its_graph_is_refused(bundles: dict[str, Path]) -> None:
    manifest = Bundle.open(bundles["fp32"]).manifest
    session = create_session(bundles["int8"] / "model.onnx", threads=1, minimum="1.32")
    with pytest.raises(RuntimeFailure, match=r"past.0.key.* is int8 .*ask for float32"):
        OwnDecoder(session, manifest, capacity=32)


def test_the_pass_touches_nothing_but_the_caches() -> None:
    before, after = attention_graph(), attention_graph()
    scales = {f"past.0.{part}": np.ones((KV_HEADS, SIZE), np.float32) for part in ("key", "value")}
    quantize_cache(after, scales)
    types = {
        one.name: one.type.tensor_type.elem_type
        for one in (*after.graph.input, *after.graph.output)
    }
    changed = {name for name, kind in types.items() if kind == TensorProto.INT8}
    assert changed == {"past.0.key", "past.0.value", "present.0.key", "present.0.value"}
    (old,), (new,) = before.graph.node, after.graph.node
    assert [one for one in new.input if not one.endswith(".scale")] == [
        one for i, one in enumerate(old.input) if i not in (12, 13)
    ]
    assert {one.name for one in new.attribute} - {one.name for one in old.attribute} == {
        "k_quant_type",
        "v_quant_type",
        "kv_cache_bit_width",
    }
