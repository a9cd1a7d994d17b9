"""Compiled models: the same numbers, mapped weights, and nothing that is trusted wrongly."""

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
from typing import Any

import numpy as np
import pytest

from edge_llm import LLM, ArgumentError, Bundle
from edge_llm.cli.main import main
from edge_llm.compiled import GRAPH, LIST, CompiledModels, compiled_folder, find_compiled
from edge_llm.errors import CacheWarning, IntegrityError, RuntimeFailure
from edge_llm.runtime import device
from edge_llm.runtime.session import open_session
from edge_llm.tuning import Tuning, save_tuning
from edge_llm_export import export_model

PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, 300, 24)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this user's own, which is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def logits(bundle: Path, **options: Any) -> np.ndarray:
    with LLM(bundle, threads=1, **options) as llm:
        whole = llm.logits(PROMPT, last=len(PROMPT)).copy()
        steps = [llm.logits([*PROMPT[:n]], last=1, continued=n - 1).copy() for n in (5, 6, 7)]
    return np.concatenate([whole, *steps])


VARIANTS: dict[str, dict[str, Any]] = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2"},
    "gpt2": {"model_type": "gpt2"},
}


@pytest.mark.parametrize("quantize", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_numbers_come_out(
    variant: str, quantize: str, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "checkpoint", **VARIANTS[variant])
    bundle = tmp_path / "bundle"
    export_model(tmp_path / "checkpoint", bundle, quantize=quantize)
    plain = logits(bundle)
    compiled = logits(bundle, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(plain, compiled)
    (entry,) = (tmp_path / "cache" / "compiled").glob("[!.]*")
    assert b"prepacked_0" in (entry / GRAPH).read_bytes()


def test_packed_weights_are_mapped_rather_than_made(tiny_bundle: Path, tmp_path: Path) -> None:
    with LLM(tiny_bundle, cache_dir=tmp_path) as llm:
        (entry,) = (tmp_path / "compiled").glob("[!.]*")
        mapped, plain = device.mapped_memory(entry), device.mapped_memory(tiny_bundle)
        assert mapped is not None
        assert mapped > 0.8 * (tiny_bundle / "model.onnx.data").stat().st_size
        assert plain == 0
        assert llm.memory.weights_file >= 0.8 * mapped


@pytest.mark.parametrize("wrong", [{"context": 10**9}, {"slots": 0}, {"memory_limit": "1MB"}])
def test_nothing_is_compiled_for_what_cannot_be_loaded(
    wrong: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError):
        LLM(tiny_bundle, cache_dir=tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_loading_writes_only_where_it_was_told_to(tiny_bundle: Path, home: Path) -> None:
    beside = compiled_folder(beside=tiny_bundle)
    LLM(tiny_bundle).close()
    assert not home.exists()
    assert not beside.exists()


@pytest.mark.parametrize("place", ["home", "beside", "cache_dir"])
def test_what_was_compiled_is_found(
    place: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    options = {"home": [], "beside": ["--beside"], "cache_dir": ["--cache-dir", str(tmp_path)]}
    assert main(["compile", str(bundle), "--json", *options[place]]) == 0
    document = json.loads(capsys.readouterr().out)
    folder = Path(document["path"])
    assert document["size"] == sum(one.stat().st_size for one in folder.iterdir())
    before = (folder / GRAPH).stat().st_mtime_ns
    with LLM(bundle, cache_dir=tmp_path if place == "cache_dir" else None):
        assert device.mapped_memory(folder)
        assert not device.mapped_memory(bundle)
    assert main(["compile", str(bundle), *options[place]]) == 0
    assert f"Compiled into {folder}" in capsys.readouterr().out
    assert (folder / GRAPH).stat().st_mtime_ns == before  # it was done already
    assert main(["info", str(bundle), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["memory"]["compiled"]
    assert told == (None if place == "cache_dir" else str(folder))
    assert main(["compile", str(bundle), "--prune", *options[place]]) == 0
    assert "Freed 0.0" not in capsys.readouterr().out
    assert not folder.exists()


def test_other_weights_and_other_processors_are_other_models(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = CompiledModels(tmp_path / "cache")
    bundle = Bundle.open(tiny_bundle)
    first = models.compile(bundle, threads=1)
    assert first == models.find(bundle)
    altered = tmp_path / "altered"
    shutil.copytree(tiny_bundle, altered)
    stored = json.loads((altered / "manifest.json").read_text(encoding="utf-8"))
    stored["files"]["model.onnx.data"]["sha256"] = "0" * 64
    (altered / "manifest.json").write_text(json.dumps(stored), encoding="utf-8")
    assert models.find(Bundle.open(altered)) is None
    with pytest.raises(IntegrityError, match="altered"):  # nothing is kept of it under that name
        models.compile(Bundle.open(altered), threads=1)
    cpuinfo = "processor: 0\nvendor_id: Other\nflags: fpu avx2\n"
    (tmp_path / "cpuinfo").write_text(cpuinfo, encoding="ascii")
    monkeypatch.setattr(device, "PROC", tmp_path)
    assert models.find(bundle) is None
    second = models.compile(bundle, threads=1)
    assert second is not None
    assert second != first
    (tmp_path / "cpuinfo").write_text(cpuinfo.replace("avx2", "avx2 avx512f"), encoding="ascii")
    assert models.find(bundle) is None


@pytest.mark.parametrize("damage", ["short", "gone", "list", "no list", "wrong list"])
def test_what_is_damaged_is_made_anew(damage: str, tiny_bundle: Path, tmp_path: Path) -> None:
    plain = logits(tiny_bundle)
    models, bundle = CompiledModels(tmp_path / "compiled"), Bundle.open(tiny_bundle)
    graph = models.compile(bundle, threads=1)
    assert graph is not None
    data, listed = graph.with_name("model.onnx.data"), graph.with_name(LIST)
    if damage == "short":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "gone":
        data.unlink()
    elif damage == "no list":
        listed.unlink()
    else:
        listed.write_text('{"model.onnx"' if damage == "list" else "[1]", encoding="utf-8")
    assert models.find(bundle) is None
    np.testing.assert_array_equal(logits(tiny_bundle, cache_dir=tmp_path), plain)
    assert models.find(bundle, verify=True) == graph


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_verifying_compares_hashes_and_makes_anew(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, bundle = CompiledModels(tmp_path / "compiled"), Bundle.open(tiny_bundle)
    graph = models.compile(bundle, threads=1)
    assert graph is not None
    weights = graph.with_name("model.onnx.data")
    for remedy in (
        lambda: LLM(tiny_bundle, cache_dir=tmp_path, verify=True).close(),
        lambda: main(["compile", str(tiny_bundle), "--cache-dir", str(tmp_path)]),
    ):
        flip(weights)
        assert models.find(bundle) == graph
        assert models.find(bundle, verify=True) is None
        remedy()
        assert models.find(bundle, verify=True) == graph


def test_who_may_read_a_bundle_may_read_what_lies_beside_it(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    for mode in (0o755, 0o700):
        bundle.chmod(mode)
        assert main(["compile", str(bundle), "--beside"]) == 0
        beside = compiled_folder(beside=bundle)
        assert beside.stat().st_mode & 0o777 == mode
        shutil.rmtree(beside)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other rights")
def test_what_a_stranger_put_beside_a_bundle_is_not_trusted(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    beside = compiled_folder(beside=bundle.path)
    graph = CompiledModels(beside).compile(bundle, threads=1)
    owners = {beside: 1001, bundle.path: 1000}
    monkeypatch.setattr(os, "geteuid", lambda: 1002)
    monkeypatch.setattr("edge_llm.compiled._owner", owners.__getitem__)
    assert find_compiled(bundle, cache_dir=None) is None
    for trusted in (0, 1000, 1002):
        owners[beside] = trusted
        assert find_compiled(bundle, cache_dir=None) == graph


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other rights")
def test_a_strangers_link_beside_a_bundle_is_not_trusted(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    public = tmp_path / "public"  # the system's, and anybody may write into it, as /tmp
    graph = CompiledModels(public).compile(bundle, threads=1)
    assert graph is not None
    beside = compiled_folder(beside=bundle.path)
    beside.symlink_to(public)
    owners = {beside: 1001, public: 0, bundle.path: 1000}
    monkeypatch.setattr(os, "geteuid", lambda: 1002)
    monkeypatch.setattr("edge_llm.compiled._owner", owners.__getitem__)
    assert find_compiled(bundle, cache_dir=None) is None
    owners[beside] = 1000
    assert find_compiled(bundle, cache_dir=None) == beside / graph.relative_to(public)
    owners[public] = 1001
    assert find_compiled(bundle, cache_dir=None) is None


def test_what_is_compiled_in_a_folder_is_told_of(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = CompiledModels(tmp_path / "compiled").compile(Bundle.open(tiny_bundle), threads=1)
    assert graph is not None

    def told() -> object:
        capsys.readouterr()
        assert main(["info", str(tiny_bundle), "--json", "--cache-dir", str(tmp_path)]) == 0
        return json.loads(capsys.readouterr().out)["memory"]["compiled"]

    assert told() == str(graph.parent)
    # Not what a tuning has found to be slower.
    save_tuning(Bundle.open(tiny_bundle), Tuning(threads=1, compiled=False), cache_dir=tmp_path)
    assert told() is None


def test_a_model_that_goes_meanwhile_is_not_missed(tiny_bundle: Path, tmp_path: Path) -> None:
    graph = tiny_bundle / "model.onnx"
    with pytest.warns(CacheWarning, match="the bundle itself is; `edge-llm compile`"):
        session = open_session(graph, compiled=tmp_path / GRAPH, threads=1, minimum="1.32")
    assert session.get_inputs()


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    plain = logits(tiny_bundle)
    (tmp_path / "file").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same = logits(tiny_bundle, cache_dir=tmp_path / "file")
    np.testing.assert_array_equal(same, plain)
    assert [one.category for one in caught] == [CacheWarning]


FULL = """
import resource, signal, sys, warnings
from edge_llm import LLM
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with LLM(sys.argv[1], cache_dir=sys.argv[2], threads=1) as llm:
        assert llm.generate([1, 2], max_tokens=2).tokens
print([one.category.__name__ for one in caught])
"""


@pytest.mark.parametrize("size", [1000, 40_000, 400_000])
def test_a_full_disk_costs_one_warning(size: int, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tiny_bundle), str(tmp_path / "cache"), str(size)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "['CacheWarning']\n", done.stderr
    assert [one.name for one in (tmp_path / "cache" / "compiled").iterdir()] == [".lock"]


def test_a_disk_that_others_filled_meanwhile_is_called_full(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([1 << 40, 1000])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(left)))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeFailure("ONNX Runtime refuses: six lines of its own source", "")

    monkeypatch.setattr("edge_llm.compiled.create_session", fail)
    models = CompiledModels(tmp_path)
    with pytest.warns(CacheWarning, match=r"cannot be used: No space left on device\."):
        assert models.compile(Bundle.open(tiny_bundle), threads=1) is None


def test_a_limit_that_is_too_low_keeps_nothing(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (tiny_bundle / "model.onnx.data").stat().st_size
    for limit in (1000, int(1.3 * size)):  # told before and after it is made
        flags = ["--cache-dir", str(tmp_path), "--limit", str(limit)]
        with pytest.warns(CacheWarning, match=f"limit of {limit:,} bytes"):
            assert main(["compile", str(tiny_bundle), *flags]) == 1
        assert "Nothing was compiled into" in capsys.readouterr().err
    assert main(["compile", "--cache-dir", str(tmp_path)]) == 1
    assert "bundle must be the folder of a bundle" in capsys.readouterr().err


# A child that compiles and removes for ever, and reads what it finds.
WORKER = """
import sys
from pathlib import Path
import numpy as np
from edge_llm import LLM, Bundle
from edge_llm.compiled import CompiledModels
bundle, folder, rounds = Bundle.open(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
models = CompiledModels(folder / "compiled")
models.compile(bundle, threads=1)
print("ready", flush=True)
with LLM(sys.argv[1], threads=1) as llm:
    plain = llm.logits(range(24), last=24).copy()
for _ in range(rounds):
    models.prune(0)
    with LLM(sys.argv[1], cache_dir=folder, threads=1) as llm:
        np.testing.assert_array_equal(llm.logits(range(24), last=24), plain)
"""


def worker(bundle: Path, folder: Path, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", WORKER, str(bundle), str(folder), str(rounds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_writer_that_is_killed_leaves_nothing_that_is_trusted_wrongly(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle, plain = Bundle.open(tiny_bundle), logits(tiny_bundle)
    models, rng = CompiledModels(tmp_path / "compiled"), random.Random(0)
    for _ in range(8):
        child = worker(tiny_bundle, tmp_path, 10**9)
        time.sleep(rng.uniform(0, 0.3))
        child.kill()
        child.communicate()
        graph = models.find(bundle)
        assert graph is None or models.find(bundle, verify=True) == graph
    np.testing.assert_array_equal(logits(tiny_bundle, cache_dir=tmp_path), plain)
    (entry,) = (tmp_path / "compiled").glob("[!.]*")
    assert not list((tmp_path / "compiled").glob(".stage*"))  # what the killed ones left
    assert models.find(bundle, verify=True) == entry / GRAPH


def test_processes_at_once_do_not_disturb_each_other(tiny_bundle: Path, tmp_path: Path) -> None:
    children = [worker(tiny_bundle, tmp_path, 5) for _ in range(2)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors


def test_other_programs_folders_are_not_compiled(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    foreign = Bundle(bundle.path, bundle.manifest, foreign=True)
    with pytest.raises(ArgumentError, match="hashes, which other folders do not state"):
        CompiledModels(tmp_path).compile(foreign, threads=1)
