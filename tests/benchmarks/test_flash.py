from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engines.timing import Process, Speed
from benchmarks.flash import describe, main, show, watt_hours


def process(first: float, per_token: float) -> Process:
    speed = Speed(first, per_token)
    return Process(
        speed=speed, load=1.0, fresh=2.0, processor=2.0, anonymous=None, peak=100_000_000
    )


def test_energy() -> None:
    assert watt_hours(3600, 1000) == 1000


def test_prices_are_those_of_the_electricity() -> None:
    rounds = [process(0.05, 0.01), process(0.1, 0.02), process(9.0, 9.0)]
    service = describe(rounds, prompt_tokens=100, size=7, watts=36, price=0.5)
    assert (service.latency, service.per_token, service.memory) == (0.1, 0.02, 1e8)
    assert service.output_speed == 50
    assert service.input_speed == pytest.approx(1000)
    assert service.processor == pytest.approx(40)  # two processors for 20 ms a token
    assert service.energy == pytest.approx(0.2)  # 20 s at 36 W
    assert service.output_price == pytest.approx(0.1)  # 200 Wh
    assert service.input_price == pytest.approx(0.005)


def test_table() -> None:
    fast = describe([process(0.05, 0.01)], prompt_tokens=100, size=1, watts=36, price=0.5)
    slow = describe([process(0.1, 0.04)], prompt_tokens=100, size=4, watts=36, price=0.5)
    rows = [line.split() for line in show({"ours": fast, "theirs": slow}, "EUR").splitlines()]
    assert rows[0] == ["ours", "theirs", "ratio"]
    assert rows[1][-3:] == ["50", "100", "0.50"]
    assert rows[-1][-4:] == ["EUR", "0.0500", "0.2000", "0.25"]


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--max-tokens", "4", "--prompt-tokens", "8", "--threads", "1"]
    main(["--shape", "tiny", "--work", str(tmp_path), "--watts", "5", *options])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["watts"] == 5
    ours, plain = document["services"].values()
    assert ours["output_price"] > 0
    assert ours["disk"] < plain["disk"]


def test_refuses_impossible_prices(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--watts", "0"], ["--price", "-1"]):
        with pytest.raises(SystemExit):
            main(options)
        assert "must be above 0" in capsys.readouterr().err
