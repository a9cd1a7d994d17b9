"""Tunings: what is kept, when it is used, and that doubt means the defaults."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_llm import LLM, ArgumentError, Bundle
from edge_llm import tune as tune_module
from edge_llm.cli.main import main
from edge_llm.engine.step_costs import WIDTHS
from edge_llm.errors import CacheWarning
from edge_llm.runtime import device
from edge_llm.runtime.session import SPIN_MICROSECONDS, resolve_threads
from edge_llm.tune import choose_affinities, choose_chunk, judge, tune
from edge_llm.tuning import Tuning, find_tuning, save_tuning, tuning_folder

COSTS = {width: 1.0 + width / 10 for width in WIDTHS}
TUNED = Tuning(threads=1, spin=200, prefill_chunk=32, step_costs=COSTS, compiled=False)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this user's own, which is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def saved(bundle: Path, tuning: Tuning = TUNED, cache_dir: Path | None = None) -> Path:
    path = save_tuning(Bundle.open(bundle), tuning, cache_dir=cache_dir)
    assert path is not None
    return path


def found(bundle: Path, cache_dir: Path | None = None) -> Tuning | None:
    return find_tuning(Bundle.open(bundle), cache_dir=cache_dir)


@pytest.mark.parametrize(
    "tuning", [TUNED, Tuning(threads=3, affinities="2;3", spin=0), Tuning(threads=1)]
)
def test_what_is_kept_is_found(tuning: Tuning, tiny_bundle: Path, tmp_path: Path) -> None:
    assert found(tiny_bundle) is None
    saved(tiny_bundle, tuning)
    assert found(tiny_bundle) == tuning
    other = Tuning(threads=2)
    saved(tiny_bundle, other, tmp_path / "cache")
    assert found(tiny_bundle, tmp_path / "cache") == other  # the folder that was named comes first
    assert found(tiny_bundle) == tuning
    assert found(tiny_bundle, tmp_path / "empty") == tuning


def test_a_model_runs_as_tuned(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle) as llm:
        assert llm._model.tuning == Tuning(threads=resolve_threads(None))
    saved(tiny_bundle)
    with LLM(tiny_bundle) as llm:
        assert llm.threads == 1
        assert llm._model.tuning == TUNED
        assert llm._model.drafting.costs.curve == pytest.approx(COSTS)
        assert llm.generate([1, 2, 3], max_tokens=3, min_tokens=3).usage.completion_tokens == 3


def test_what_the_caller_passes_wins(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_llm.runtime.session.usable_cores", lambda **_: 2)
    saved(tiny_bundle)
    with LLM(tiny_bundle, threads=2) as llm:
        assert llm.threads == 2
        assert llm._model.tuning == Tuning(threads=2)
    with LLM(tiny_bundle, threads=1) as llm:
        assert llm._model.tuning == TUNED


def test_other_circumstances_find_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tiny_bundle)
    cpus, quota = device.cpu_allowance()
    for name, value in {
        "cpu_allowance": ((*cpus, 99), quota),
        "cpu_identity": ("another", "processor"),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"edge_llm.tuning.{name}", lambda value=value: value)
            assert found(tiny_bundle) is None
    with monkeypatch.context() as patch:
        patch.setattr("edge_llm.tuning.cpu_allowance", lambda: (cpus, 1.5))
        assert found(tiny_bundle) is None
    other = shutil.copytree(tiny_bundle, tmp_path / "copy")
    assert found(other) == TUNED  # the same files elsewhere
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["model.onnx.data"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert found(other) is None


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: "\0" * 100,
    "a list": lambda text: "[]",
    "a number changed": lambda text: text.replace('"spin": 200', '"spin": 900'),
    "a hash changed": lambda text: text.replace('"sha256": "', '"sha256": "0'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_ignored_with_a_warning(damage: str, tiny_bundle: Path) -> None:
    path = saved(tiny_bundle)
    changed = DAMAGE[damage](path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.warns(CacheWarning, match="tune") as caught, LLM(tiny_bundle) as llm:
        assert llm._model.tuning.spin == SPIN_MICROSECONDS
    assert len(caught) == 1
    saved(tiny_bundle)
    assert found(tiny_bundle) == TUNED


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 0},
        {"threads": True},
        {"threads": "2"},
        {"spin": -1},
        {"prefill_chunk": 0},
        {"affinities": 3},
        {"compiled": 1},
        {"step_costs": {"3": 1.0}},
        {"step_costs": {str(width): -1.0 for width in WIDTHS}},
        {"more": 1},
    ],
)
def test_values_outside_their_domain_are_refused(change: dict[str, object]) -> None:
    values: dict[str, object] = {"threads": 1, "spin": 0, "affinities": None, "prefill_chunk": None}
    values |= {"step_costs": {}, "compiled": True}
    assert Tuning.from_dict(values) == Tuning(threads=1, spin=0)
    with pytest.raises(ValueError, match=r"tuning|domain"):
        Tuning.from_dict(values | change)


def test_a_folder_that_cannot_be_written_is_told_of(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match="cannot be kept"):
        assert save_tuning(Bundle.open(tiny_bundle), TUNED, cache_dir=tmp_path / "file") is None
    assert found(tiny_bundle, tmp_path / "file") is None


def test_nothing_is_measured_that_cannot_be_kept(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("edge_llm.tune.tune", measure)
    (tmp_path / "file").write_text("")
    assert main(["tune", str(tiny_bundle), "--cache-dir", str(tmp_path / "file")]) == 1
    assert "Nothing can be kept in" in capsys.readouterr().err


WRITER = """
import sys, time
from edge_llm import Bundle
from edge_llm.tuning import Tuning, save_tuning
bundle = Bundle.open(sys.argv[1])
tunings = [Tuning(threads=n, affinities="1;" * 5000) for n in (1, 2)]
save_tuning(bundle, tunings[0], cache_dir=sys.argv[2])
print("ready", flush=True)
while True:
    for one in tunings:
        save_tuning(bundle, one, cache_dir=sys.argv[2])
"""


def test_writers_killed_at_any_moment_leave_a_whole_file(tiny_bundle: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    bundle = Bundle.open(tiny_bundle)
    find_tuning(bundle, cache_dir=tmp_path)  # imports what takes long
    for _ in range(6):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, tiny_bundle, tmp_path], stdout=subprocess.PIPE
            )
            for _ in range(2)  # at once, into the same place
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        for writer in writers:
            writer.kill()
            writer.communicate()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one = find_tuning(bundle, cache_dir=tmp_path)
        assert one in [Tuning(threads=n, affinities="1;" * 5000) for n in (1, 2)]


def test_tuning_measures_and_keeps_what_a_model_then_uses(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", str(tiny_bundle), "--cache-dir", str(tmp_path), "--rounds", "1"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["path"]).parent == tuning_folder(tmp_path)
    kept = found(tiny_bundle, tmp_path)
    assert kept is not None
    assert kept.threads == document["tuning"]["threads"]
    assert set(kept.step_costs) in (set(), set(WIDTHS))
    with LLM(tiny_bundle, cache_dir=tmp_path, context=64) as llm:
        # The compiled form is another question.
        assert llm._model.tuning == kept
    assert main(["info", str(tiny_bundle), "--cache-dir", str(tmp_path)]) == 0
    assert "spinning" in capsys.readouterr().out
    assert main(["info", str(tiny_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tuning"] is None
    assert main(arguments) == 0
    assert "Kept in" in capsys.readouterr().out


def test_the_default_stays_unless_another_way_wins_clearly() -> None:
    assert judge("x", [1.05, 1.04], 0.9).taken
    assert not judge("x", [1.02, 1.2], 1.0).taken  # one opening may have been lucky
    assert not judge("x", [1.05, 1.04], 0.6).taken
    assert not judge("x", [0.9, 0.9], 0.0).taken


def test_faster_ways_are_taken_by_turns(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Twice as fast with 3 threads, and half as fast with any other spinning than the default.
    def pretend(bundle: object, tuning: Tuning, compiled: object) -> Tuning:
        return tuning

    def seconds(tuning: Tuning) -> float:
        slow = 1.0 if tuning.spin == SPIN_MICROSECONDS else 2.0
        return slow / (2 if tuning.threads == 3 else 1)

    monkeypatch.setattr(tune_module, "_open", pretend)
    monkeypatch.setattr(tune_module, "_answer", seconds)
    monkeypatch.setattr(tune_module, "_thread_counts", lambda default: [1, 3, 4])
    monkeypatch.setattr(tune_module, "_best_chunk", lambda decoder, rounds: 64)
    monkeypatch.setattr(tune_module, "_step_costs", lambda decoder, rounds: COSTS)
    monkeypatch.setattr(Tuning, "verifies", True, raising=False)
    tuning, trials = tune(Bundle.open(tiny_bundle), rounds=2)
    assert tuning == Tuning(threads=3, prefill_chunk=64, step_costs=COSTS)
    assert [one.name for one in trials if one.taken] == ["3 threads"]


@pytest.mark.parametrize(
    ("seconds", "chunk"),
    [
        ({16: 0.016, 32: 0.020, 64: 0.040, 128: 0.080}, 32),
        ({16: 0.016, 32: 0.030, 64: 0.050}, None),  # longer is better to the end
        ({16: 0.05, 32: 0.1, 64: 0.9}, 16),
        ({16: 0.5}, None),  # none can be waited for: chunks go by time alone
    ],
)
def test_choice_of_chunks(seconds: dict[int, float], chunk: int | None) -> None:
    assert choose_chunk(seconds) == chunk


@pytest.mark.parametrize(
    ("speeds", "siblings", "threads", "cpus"),
    [
        ([4, 4, 4, 4], ["0", "1", "2", "3"], 2, None),  # alike: the system's choice
        ([1, 1, 4, 4], ["0", "1", "2", "3"], 2, "4"),
        ([1, 1, 4, 4], ["0", "1", "2", "3"], 3, None),  # a little core would be among them
        ([4, 4, 4, 4, 1, 1], ["0-1", "0-1", "2-3", "2-3", "4", "5"], 2, "3"),
        ([4, 4, 4, 4, 4, 4, 1], ["0,3", "1,4", "2,5", "0,3", "1,4", "2,5", "6"], 3, "2;3"),
    ],
)
def test_threads_are_bound_to_cores_of_their_own(
    speeds: list[int],
    siblings: list[str],
    threads: int,
    cpus: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cpu, (speed, group) in enumerate(zip(speeds, siblings, strict=True)):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / "cpu_capacity").write_text(f"{speed}\n")
        (folder / "topology/thread_siblings_list").write_text(f"{group}\n")
    monkeypatch.setattr(device, "SYS", tmp_path)
    monkeypatch.setattr(device, "PROC", tmp_path)
    allowed = set(range(len(speeds)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    assert choose_affinities(threads) == cpus


@pytest.mark.parametrize(("others", "told"), [(None, False), (0.05, False), (0.4, True)])
def test_other_programs_are_told_of(
    others: float | None,
    told: bool,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("edge_llm.tune.tune", lambda bundle, **options: (TUNED, []))
    clock, cpu = iter([0.0, 100.0]), iter([7.0, None if others is None else 7.0 + 200 * others])
    monkeypatch.setattr("edge_llm.cli.tune.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("edge_llm.cli.tune.others_cpu_seconds", lambda: next(cpu))
    monkeypatch.setattr("edge_llm.cli.tune.usable_cores", lambda physical: 2)
    assert main(["tune", str(tiny_bundle), "--cache-dir", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["others"] == (None if others is None else pytest.approx(others))
    assert ("other programs" in captured.err) == told


def test_foreign_folders_and_bad_arguments_are_refused(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(tiny_bundle)
    object.__setattr__(bundle, "foreign", True)
    assert find_tuning(bundle, cache_dir=None) is None
    with pytest.raises(ArgumentError, match="bundle"):
        tune(bundle)
    with pytest.raises(ArgumentError, match="bundle"):
        save_tuning(bundle, TUNED, cache_dir=None)
    assert main(["tune", str(tiny_bundle), "--rounds", "0"]) == 1
    assert "--rounds" in capsys.readouterr().err
    assert main(["tune", str(tiny_bundle), "--threads", str(4 * (os.cpu_count() or 1))]) == 1
