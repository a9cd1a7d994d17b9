from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engines.together import Together
from benchmarks.throughput import figures, main


def test_times_of_tokens() -> None:
    one = Together.of([[1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 3.5]])
    assert one.all == 8 / 4
    assert one.decode == 4 / 1.5  # behind 2.0, when both have begun, up to 3.5
    assert one.first == pytest.approx((1.5, 1.95))
    assert one.gaps[0] == 0.75
    with pytest.raises(RuntimeError, match="longer"):
        Together.of([[1.0, 2.0], [2.5, 3.0]])


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
