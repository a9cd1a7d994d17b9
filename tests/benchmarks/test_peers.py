from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import peers
from benchmarks.engines.bandwidth import read_bandwidth, weights_read
from benchmarks.engines.engine import model_bytes
from benchmarks.peers import choose_models, choose_rows, main
from benchmarks.peers_report import GOALS, UNITS, Figures, draw, judge, merge, ratio, show, unit
from edge_llm_export import export_model


def figures() -> Figures:
    return {
        "decode 0": {"edge-llm": [20.0, 300.0, 40.0], "llama.cpp Q4_0": [10.0, 100.0, 10.0]},
        "load": {"edge-llm": [1.0, 3.0, 1.0], "llama.cpp Q4_0": [2.0, 3.0, 4.0]},
        "disk": {"llama.cpp Q4_0": [2e6]},
    }


def test_ratios_are_taken_within_rounds_and_above_1_is_better() -> None:
    assert ratio(figures(), "decode 0", "llama.cpp Q4_0") == 3  # of 2, 3 and 4
    assert ratio(figures(), "load", "llama.cpp Q4_0") == 2  # of 2, 1 and 4: less is better


def test_table() -> None:
    header, decode, load, disk = show(figures()).splitlines()
    assert header.split() == ["edge-llm", "llama.cpp", "Q4_0"]
    assert decode.split() == ["decode", "0", "tok/s", "40.0", "10.0", "(3.00)"]
    assert load.split() == ["load", "s", "1.00", "3.00", "(2.00)"]
    assert disk.split() == ["disk", "MB", "2.0"]  # edge_llm was not measured: no ratio


def test_goals_are_judged_where_they_were_measured() -> None:
    shapes = {
        "smollm2-135m": figures(),
        "llama-3.2-1b": {"bandwidth": {"edge-llm": [0.8, 0.9, 1.0]}},
    }
    reached = [(goal.shape, goal.row, value) for goal, value in judge(shapes)]
    assert reached == [("smollm2-135m", "decode 0", 3.0), ("llama-3.2-1b", "bandwidth", 0.9)]


def test_every_row_has_a_unit_and_every_goal_a_row() -> None:
    assert all(row.split()[0] in UNITS for row in (*peers.ROWS, peers.DISK))
    for goal in GOALS:
        assert unit(goal.row)
        assert goal.own in peers.MODELS


def test_choosing() -> None:
    assert list(choose_models(["*"])) == list(peers.MODELS)
    assert list(choose_models(["llama*", "edge-llm b32"])) == [
        *("llama.cpp Q4_0", "llama.cpp Q4_K_M", "edge-llm b32")
    ]
    with pytest.raises(SystemExit, match=r"got 'ollama'"):
        choose_models(["edge-llm", "ollama"])
    assert list(choose_rows(["decode*", "disk"])) == ["decode 0", "decode 1024", "decode 4096"]
    with pytest.raises(SystemExit, match=r"got 'encode\*'"):
        choose_rows(["encode*"])


def printed(tmp_path: Path, name: str, shapes: dict[str, Figures]) -> Path:
    file = tmp_path / name
    file.write_text(f"a table\n{json.dumps({'benchmark': 'peers', 'shapes': shapes})}\n")
    return file


def test_runs_are_shown_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed(tmp_path, "1", {"tiny": {"load": {"a": [1.0], "b": [2.0]}}})
    again = printed(tmp_path, "2", {"tiny": {"load": {"a": [3.0], "b": [4.0]}}})
    other = printed(tmp_path, "3", {"tiny": {"disk": {"a": [5.0]}}, "1b": {"disk": {"a": [6.0]}}})
    replaced = printed(tmp_path, "4", {"tiny": {"disk": {"a": [7.0], "b": [8.0]}}})
    assert merge([first, again, other, replaced])["shapes"] == {
        "tiny": {"load": {"a": [1.0, 3.0], "b": [2.0, 4.0]}, "disk": {"a": [7.0], "b": [8.0]}},
        "1b": {"disk": {"a": [6.0]}},
    }
    main(["--show", str(first), str(again)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["shapes"]["tiny"]["load"]["a"] == [1.0, 3.0]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw({"tiny": figures(), "other": {"load": {"edge-llm": [1.0]}}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_reading_memory() -> None:
    assert read_bandwidth(2, size=1 << 20) > 1e8


def test_what_a_token_reads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_model(tiny_checkpoint, tmp_path / "bundle", quantize="int4", block=32)
    size = model_bytes(tmp_path / "bundle")
    # All weights but rotary tables: the embedding is the head too.
    assert 0.5 * size < weights_read(tmp_path / "bundle") < size
    save_file({"a": np.zeros(1000, np.float16)}, tmp_path / "model.safetensors")
    assert weights_read(tmp_path) == (tmp_path / "model.safetensors").stat().st_size


def test_of_a_gguf_file_an_embedding_beside_a_head_is_not_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for name, sizes, read in (
        ("tied", {"token_embd": 1000, "output_norm": 10}, 4040),
        ("untied", {"token_embd": 1000, "output_norm": 10, "output": 500}, 2040),
    ):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for tensor, size in sizes.items():
            writer.add_tensor(f"{tensor}.weight", np.zeros(size, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert weights_read(tmp_path / name) == read


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--max-tokens", "4", "--threads", "1", "--work", str(tmp_path)]
    models = ["edge-llm", "edge-llm compiled", "transformers bf16"]
    rows = ["decode 0", "bandwidth", "prefill 128", "load", "TTFT*", "disk"]
    main(["--shapes", "tiny", "--models", *models, "--rows", *rows, *options])
    *shown, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    measured = document["shapes"]["tiny"]
    assert list(measured) == [
        *("prefill 128", "decode 0", "bandwidth", "TTFT fresh process", "TTFT loaded", "load"),
        "disk",
    ]
    for row in measured.values():
        assert list(row) == models
        assert all(len(values) == 1 and values[0] > 0 for values in row.values())
    assert measured["disk"]["edge-llm compiled"] > measured["disk"]["edge-llm"]
    assert measured["TTFT fresh process"]["edge-llm"] > measured["TTFT loaded"]["edge-llm"]
    assert shown[0].startswith("tiny")
