from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from benchmarks.engines.newcomer import check_running, longest_gap, newcomer
from benchmarks.engines.together import EdgeBatch, Together, Workload
from benchmarks.throughput import figures, main, show
from edge_llm import LLM
from edge_llm.runtime.own_layout import OwnDecoder


def test_times_of_tokens() -> None:
    one = Together.of([[1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 3.5]])
    assert one.all == 8 / 4
    assert one.decode == 4 / 1.5  # behind 2.0, when both have begun, up to 3.5
    assert one.first == pytest.approx((1.5, 1.95))
    assert one.gaps is not None
    assert one.gaps[0] == 0.75
    with pytest.raises(RuntimeError, match="longer"):
        Together.of([[1.0, 2.0], [2.5, 3.0]])


def test_answers_that_come_whole_have_no_gaps() -> None:
    one = dataclasses.asdict(Together.of([[1.0, 2.0], [1.0, 3.0]], whole=True))
    assert one["gaps"] is None
    assert one["first"] == (1.0, 1.0)
    assert EdgeBatch.whole
    cell = figures({"edge-llm batch": [{"1": one}, {"1": one}]}, "edge-llm batch", "1")
    assert cell["gaps"] is None
    assert cell["first"] == [1.0, 1.0]
    assert show({"edge-llm batch": {"1": cell}}).splitlines()[-1].rstrip().endswith("1000 / 1000")


def test_the_gap_around_a_chunk_counts() -> None:
    streams = [[0.0, 5.0, 5.1, 6.0, 6.1, 9.0], [0.0, 5.05, 5.3, 6.1, 6.2]]
    assert longest_gap(streams, [(5.02, 5.2)]) == pytest.approx(5.05), "the chunk begins in it"
    assert longest_gap(streams[:1], [(5.12, 5.5)]) == pytest.approx(0.9)
    assert longest_gap(streams[:1], [(5.12, 5.5), (5.6, 6.05)]) == pytest.approx(0.9)
    assert longest_gap(streams[:1], [(6.0, 6.1)]) == pytest.approx(0.1), "touching is no overlap"


def test_a_stream_that_fails_or_ends_is_noticed() -> None:
    running, ended, failed = Future[None](), Future[None](), Future[None]()
    ended.set_result(None)
    failed.set_exception(ZeroDivisionError())
    check_running([running])
    with pytest.raises(RuntimeError, match="longer"):
        check_running([running, ended])
    with pytest.raises(ZeroDivisionError):
        check_running([running, failed])


def test_a_newcomer_among_streams(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = OwnDecoder.step_rows

    def slow(self: Any, *args: Any, **options: Any) -> Any:
        time.sleep(0.004)  # so that the streams last
        return step(self, *args, **options)

    monkeypatch.setattr(OwnDecoder, "step_rows", slow)
    load = Workload(
        vocab=200, prompt_tokens=4, max_tokens=150, threads=1, widths=(2,), slots=3, seed=0
    )
    delay = newcomer(tiny_bundle, load, 60)
    assert delay.chunks >= 1
    assert delay.longest >= delay.chunk > 0
    assert delay.prompt >= delay.chunk
    monkeypatch.setattr(LLM, "stream", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        newcomer(tiny_bundle, load, 60)


def test_ratios_are_taken_within_rounds() -> None:
    def run(*speeds: float) -> dict[str, dict[str, object]]:
        return {
            width: {"all": speed, "decode": speed, "first": [1.0, 2.0], "gaps": [3.0, 4.0]}
            for width, speed in zip(("1", "16"), speeds, strict=True)
        }

    runs = {
        "edge-llm": [run(10, 20), run(20, 60), run(10, 40)],
        "llama.cpp": [run(10, 10), run(20, 30), run(1, 10)],
    }
    own, peer = (figures(runs, name, "16") for name in runs)
    assert (own["all"], own["all_gain"]) == (40, 3)
    assert (peer["decode_gain"], peer["decode_ratio"]) == (1.5, 2)
    assert peer["gaps"] == [3.0, 4.0]


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--max-tokens", "120", "--threads", "1", "--work", str(tmp_path)]
    engines = ["edge-llm", "edge-llm batch"]
    rows = ["--rows", "widths", "slots", "--widths", "1", "2"]
    main(["--shapes", "tiny", "--engines", *engines, *rows, *options])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = document["shapes"]["tiny"]
    assert list(measured["engines"]) == engines
    for widths in measured["engines"].values():
        assert list(widths) == ["1", "2"]
        assert all(cell["decode"] > 0 and cell["all"] > 0 for cell in widths.values())
    assert measured["slots"]["slots"] == 2
    assert measured["slots"]["ratio"] > 0


@pytest.mark.parametrize(
    ("engine", "distribution", "packages"),
    [
        ("llama.cpp", "llama-cpp-python", ["llama_cpp", "gguf"]),
        ("onnxruntime-genai", "onnxruntime-genai", ["onnxruntime_genai", "onnx_ir"]),
    ],
)
def test_a_peer(
    engine: str,
    distribution: str,
    packages: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in packages:
        pytest.importorskip(package)
    options = ["--rounds", "1", "--max-tokens", "8", "--threads", "1", "--work", str(tmp_path)]
    rows = ["--rows", "widths", "--widths", "1", "3"]
    main(["--shapes", "tiny", "--engines", engine, *rows, *options])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    cells = document["shapes"]["tiny"]["engines"][engine]
    assert list(cells) == ["1", "3"]
    for cell in cells.values():
        assert cell["all"] > 0 < cell["decode"]
        assert len(cell["gaps"]) == 2
    assert distribution in document["versions"]
