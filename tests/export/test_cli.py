"""``edge-llm export``: what it writes, says and refuses."""

from __future__ import annotations

import ast
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_llm import LLM
from edge_llm.cli.main import main
from edge_llm_export import pipeline

Capture = pytest.CaptureFixture[str]


def test_help_does_not_wait_for_the_export_stack() -> None:
    code = """
import sys
from edge_llm.cli.main import main
assert main(["export", "--help"]) == 0
print(sorted({name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, modules = done.stdout.splitlines()
    loaded = set(ast.literal_eval(modules))
    assert "edge_llm_export" in loaded
    assert not loaded & {"numpy", "onnx", "onnxruntime", "safetensors", "huggingface_hub", "tqdm"}
    shown = " ".join(" ".join(text).split())
    for choice in ("{auto,fp32,int8,int4}", "4.8 on the average", "{32,64,128}", "(default: 32)"):
        assert choice in shown
    assert "but at most 8192" in shown


def test_export(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "a bundle"
    argv = ["export", str(tiny_checkpoint), "-o", str(folder), "--quantize", "int8"]
    assert main([*argv, "--block", "64", "--max-context", "100"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no bar
    assert out.startswith(f"Wrote {folder} (0.")
    assert f"edge-llm run -m '{folder}'" in out
    with LLM(folder) as llm:
        quantization = llm.manifest.quantization
        assert (quantization.bits, quantization.block) == (8, 64)
        assert llm.manifest.dims.context == 100
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith("edge-llm: --output must be a folder that does not")
    assert main([*argv, "--overwrite", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(folder)
    assert document["manifest"] == json.loads((folder / "manifest.json").read_text())
    assert document["manifest"]["quantization"]["block"] == 32
    stored = sum(file.stat().st_size for file in folder.iterdir() if file.name != "manifest.json")
    assert document["size"] == stored


def test_keys_to_ignore(tiny_checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in tiny_checkpoint.iterdir():
        (checkpoint / file.name).symlink_to(file)
    config = json.loads((tiny_checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").write_text(json.dumps(config | {"new_idea": 1, "other": True}))
    argv = [
        "export",
        str(checkpoint),
        "-o",
        str(tmp_path / "bundle"),
        "--quantize",
        "int4",
        "--ignore-config",
        "other",
    ]
    assert main(argv) == 1
    assert "new_idea" in capsys.readouterr().err
    assert main([*argv, "--ignore-config", "new_idea"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-context", "0"], "--max-context must be an integer of at least 2, got 0."),
        (["--revision", "main"], "--revision must be"),
        (["--quantize", "fp32", "--block", "32"], "--block must be left out with fp32"),
    ],
)
def test_values_outside_their_domain(
    flags: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = [
        "export",
        str(tiny_checkpoint),
        "-o",
        str(tmp_path / "bundle"),
        "--quantize",
        "int4",
        *flags,
    ]
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith(f"edge-llm: {message}")
    assert list(tmp_path.iterdir()) == []


def test_the_current_folder_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(tmp_path / "none"), "-o", "."]) == 1
    err = capsys.readouterr().err
    assert err.startswith("edge-llm: --output must be a folder that can be replaced as a whole")
    assert err.endswith("got '.'. Name a folder inside it.\n")


def test_missing_source(tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(tmp_path / "none"), "-o", str(tmp_path / "bundle")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("edge-llm: ")
    assert err.count("\n") == 1


def test_interrupt_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupt(folder: Path, **_: object) -> None:
        assert (folder / "manifest.json").is_file()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pipeline, "run_once", interrupt)
    assert (
        main(["export", str(tiny_checkpoint), "-o", str(tmp_path / "bundle"), "--quantize", "int4"])
        == 130
    )
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module", ["onnx", "safetensors", "huggingface_hub", "tqdm", "ml_dtypes", "threadpoolctl"]
)
def test_missing_dependency_names_the_extra(module: str, tmp_path: Path) -> None:
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from edge_llm.cli.main import main
sys.exit(main(["export", "owner/name", "-o", sys.argv[2]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, module, str(tmp_path / "bundle")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"edge-llm: edge-llm export cannot import {module}")
    assert done.stderr.endswith("`pip install 'edge-llm[export]'`.\n")
    assert done.stderr.count("\n") == 1


def test_bar_at_a_terminal(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    assert (
        main(["export", str(tiny_checkpoint), "-o", str(tmp_path / "bundle"), "--quantize", "int4"])
        == 0
    )
    for phase in ("reading", "writing", "verifying"):
        assert f"\r{phase}: " in stream.getvalue()
    assert capsys.readouterr().out.startswith("Wrote ")
