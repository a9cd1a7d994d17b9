from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.engines.engine import model_bytes, open_engine
from benchmarks.engines.making import ModelFolder, recipe
from benchmarks.engines.timing import Speed, Workload, ratio, time_by_turns
from benchmarks.fidelity import Fidelity, Passage
from benchmarks.quality import ROWS, Result, check_conversions, choose_rows, draw, main, show_table
from edge_llm.quality import Estimate
from tests.conftest import TEXT, MakeCheckpoint


def result(engine: str, *, divergence: float, seconds: list[float], exact: int | None) -> Result:
    half = Estimate(value=0.5, standard_error=None)
    return Result(
        recipe=recipe(engine, ""),
        size=1_500_000,
        bits_per_weight=4.25,
        fidelity=Fidelity(
            loss=Estimate(value=0.0, standard_error=0.25),
            kl_divergence=Estimate(value=divergence, standard_error=0.001),
            top1_agreement=half,
            log_perplexity_ratio=half,
        ),
        exact=None if exact is None else (exact, 8),
        speeds=[Speed(1.0, one) for one in seconds],
    )


def test_table() -> None:
    rows = {
        "ours": result("edge-llm", divergence=0.01, seconds=[0.01, 0.02], exact=6),
        "llama.cpp Q4_0": result("llama.cpp", divergence=0.02, seconds=[0.02, 0.03], exact=None),
    }
    header, ours, theirs = show_table(rows).splitlines()
    assert "x llama.cpp Q4_0" in header
    figures = "4.25 1.50 0.01000 0.00100 50.00 1.000 0.250 67 1.75 75.00"
    assert ours.split() == ["ours", *figures.split()]
    assert theirs.split()[-2:] == ["40", "1.00"]  # no request was put to a peer


def test_ratios_are_taken_within_rounds() -> None:
    slow, slower = [Speed(0, 2.0), Speed(0, 200.0)], [Speed(0, 4.0), Speed(0, 400.0)]
    assert ratio(slow, slower) == 2
    assert ratio(slower, slow) == 0.5


def test_choosing_rows() -> None:
    assert list(choose_rows(["*"], [])) == list(ROWS)
    chosen = choose_rows(["fp32", "llama.cpp Q4*"], ["--quantize int4 --block 128"])
    assert list(chosen) == ["fp32", "llama.cpp Q4_0", "llama.cpp Q4_K_M", *list(chosen)[-1:]]
    assert chosen["--quantize int4 --block 128"].arguments == (
        "--quantize",
        "int4",
        "--block",
        "128",
    )
    with pytest.raises(SystemExit, match="got 'q4"):
        choose_rows(["fp32", "q4*"], [])


def test_another_model_than_the_reference_is_no_conversion(
    tiny_bundle: Path, make_llama: MakeCheckpoint, tmp_path: Path
) -> None:
    make_llama(tmp_path, seed=1, tie_word_embeddings=True)
    load = Workload(vocab=400, prompt_tokens=2, max_tokens=2, threads=1)
    passages = [Passage(tuple(range(20)), 19)]
    with (
        open_engine("edge-llm", tiny_bundle, context=32, threads=1) as reference,
        pytest.raises(SystemExit, match=r"transformers in float32 is .* nats per token"),
    ):
        check_conversions({"transformers": tmp_path}, reference, passages, load)


def test_engines_answer_alike(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    prompt = [5, 9, 300, 17]
    with open_engine("edge-llm", tiny_bundle, context=32, threads=1) as own:
        first, again = (own.answer(prompt, max_tokens=8) for _ in range(2))
        single = own.answer(prompt, max_tokens=1)
    with open_engine("transformers", tiny_checkpoint, context=32, threads=1) as reference:
        assert reference.answer(prompt, max_tokens=8).tokens == first.tokens == again.tokens
        assert reference.answer(prompt, max_tokens=1).per_token == single.per_token == 0
    assert first.first_token > 0 < first.per_token


def test_models_are_timed_in_processes_of_their_own(tiny_bundle: Path) -> None:
    load = Workload(vocab=400, prompt_tokens=4, max_tokens=3, threads=1)
    told: list[str] = []
    models = {"a": ("edge-llm", tiny_bundle), "b": ("edge-llm", tiny_bundle)}
    speeds = time_by_turns(models, load, rounds=2, progress=told.append)
    assert told == [
        f"round {i} of 2: {name}" for i, name in ((1, "a"), (1, "b"), (2, "b"), (2, "a"))
    ]
    assert all(speed.per_token > 0 for own in speeds.values() for speed in own)
    assert [len(own) for own in speeds.values()] == [2, 2]


def test_the_program(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "models"
    text.write_text(TEXT)
    options = ["--rounds", "0", "--window", "16", "--folder", str(folder)]
    main([str(tiny_checkpoint), str(text), "--rows", "fp32", "int4 b32 rtn", *options])
    *shown, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert len(shown) == 3
    assert list(rows) == ["fp32", "int4 b32 rtn"]
    divergences = [row["fidelity"]["kl_divergence"]["value"] for row in rows.values()]
    assert divergences[0] == 0 < divergences[1]
    assert rows["fp32"]["bits_per_weight"] > 32 > 8 > rows["int4 b32 rtn"]["bits_per_weight"] > 5
    assert json.loads(last)["checks"].keys() == {"transformers"}
    assert len(list(folder.iterdir())) == 2

    path = folder / "edge-llm_--quantize_fp32"
    made = path.stat().st_mtime_ns
    assert ModelFolder(tiny_checkpoint, folder).make(ROWS["fp32"]) == path
    assert path.stat().st_mtime_ns == made  # what is there is taken
    assert (
        model_bytes(path)
        == rows["fp32"]["size"]
        == sum((path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    )


def test_checkpoint_and_text_go_together(tiny_checkpoint: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tiny_checkpoint)])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = {
        "fp32": result("edge-llm", divergence=0.0, seconds=[0.05], exact=None),
        "ours": result("edge-llm", divergence=0.01, seconds=[0.01], exact=None),
        "theirs": result("llama.cpp", divergence=0.02, seconds=[0.02], exact=None),
    }
    rows["fp32"] = dataclasses.replace(rows["fp32"], recipe=ROWS["fp32"])
    draw(rows, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<!--  ours -->" in drawn
    assert "<!--  theirs -->" in drawn
    assert "fp32" not in drawn  # at 0, which no logarithmic axis has
