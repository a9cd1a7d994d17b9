"""onnxruntime is imported with its telemetry off, and what it refuses becomes a typed error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from edge_llm.errors import (
    ArgumentError,
    PlatformError,
    RuntimeFailure,
    UnsupportedFormatError,
)
from edge_llm.runtime import session
from edge_llm.runtime.session import create_session, import_onnxruntime, resolve_threads

# An import hook that tells what the environment says when onnxruntime is looked for.
SPY = """
import os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("telemetry off:", os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Spy())
"""


def fresh(
    code: str, *, home: Path, telemetry: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, with the telemetry variable set as told or not at all."""
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home)}
    if telemetry is not None:
        environment["ORT_DISABLE_TELEMETRY"] = telemetry
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_telemetry_is_off_before_the_import(tmp_path: Path) -> None:
    code = SPY + "from edge_llm.runtime.session import import_onnxruntime as f; assert f() is f()"
    done = fresh(code, home=tmp_path)
    assert done.stdout == "telemetry off: 1\n"
    assert "TelemetryWarning" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "onnxruntime's telemetry writes to the home directory"


def test_an_earlier_import_is_warned_about(tmp_path: Path) -> None:
    # A stand-in, for the real one would send something.
    code = (
        "import sys, types; sys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"
        "from edge_llm.runtime.session import import_onnxruntime\n"
        "import_onnxruntime(); import_onnxruntime()"
    )
    for telemetry in (None, "", "0"):
        done = fresh(code, home=tmp_path, telemetry=telemetry)
        assert done.stderr.count("TelemetryWarning: onnxruntime was imported before") == 1
        assert "set ORT_DISABLE_TELEMETRY=1 before Python starts" in done.stderr
    assert "TelemetryWarning" not in fresh(code, home=tmp_path, telemetry="1").stderr


def test_onnxruntime_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PlatformError, match="pip install 'onnxruntime>="):
        import_onnxruntime.__wrapped__()


def test_threads_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "usable_cores", lambda physical=True: 4)
    assert resolve_threads(None) == 4
    assert [resolve_threads(threads) for threads in (1, 2, 4)] == [1, 2, 4]


@pytest.mark.parametrize("threads", [0, -1, 5, 1.0, "2", True, [1], float("nan")])
def test_other_threads_are_refused(threads: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "usable_cores", lambda physical=True: 4)
    with pytest.raises(ArgumentError, match="threads must be an integer from 1 to 4") as caught:
        resolve_threads(threads)  # type: ignore[arg-type]
    assert caught.value.value is threads


@pytest.mark.parametrize(
    ("installed", "minimum", "fits"),
    [
        ("1.32.0", "1.32", True),
        ("1.32.1", "1.32", True),
        ("1.100.0", "1.32", True),
        ("2.0.0", "1.32", True),
        ("2", "1.32", True),
        ("1.33rc1", "1.33", True),
        ("1.32.0.dev20260101", "1.32", True),
        ("1.31.9", "1.32", False),
        ("1.4.0", "1.32", False),
        ("1.4rc99", "1.32", False),
        ("1", "1.32", False),
        ("0.99", "1.32", False),
        ("1.32.0", "2.0", False),
    ],
)
def test_versions(
    installed: str, minimum: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_onnxruntime(), "__version__", installed)
    # The file does not exist: only a version that fits comes as far as that.
    with pytest.raises(RuntimeFailure if fits else PlatformError) as caught:
        create_session(tmp_path / "none.onnx", threads=1, minimum=minimum)
    if not fits:
        assert f"needs onnxruntime {minimum}; {installed} is installed" in str(caught.value)
        assert f"pip install 'onnxruntime>={minimum}'" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08\x0a", bytes(1000)])
def test_a_broken_graph_is_a_failure_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(content)
    with pytest.raises(RuntimeFailure, match=r"refuses model\.onnx") as caught:
        create_session(model, threads=1, minimum="1.32")
    assert "--verify" in caught.value.remedy
    assert caught.value.__cause__ is not None


def test_a_graph_cut_short_is_a_failure(tiny_bundle: Path, tmp_path: Path) -> None:
    content = (tiny_bundle / "model.onnx").read_bytes()
    for name, size, data in (("half", len(content) // 2, True), ("alone", len(content), False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.onnx").write_bytes(content[:size])
        if data:
            (folder / "model.onnx.data").symlink_to(tiny_bundle / "model.onnx.data")
        with pytest.raises(RuntimeFailure):
            create_session(folder / "model.onnx", threads=1, minimum="1.32")


FORK = """
import os, sys, time
from pathlib import Path
from edge_llm.runtime.session import create_session
session = create_session(Path(sys.argv[1]), threads=2, minimum="1.32")
pid = os.fork()
if pid == 0:
    sys.exit(42)  # frees whatever is left, as multiprocessing's children do not
for _ in range(600):
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        break
    time.sleep(0.05)
else:
    os.kill(pid, 9)
    sys.exit("the child never ended")
assert os.waitstatus_to_exitcode(status) == 42
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_a_forked_child_ends_though_it_lacks_the_threads(tiny_bundle: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    done = subprocess.run(
        [*command, str(tiny_bundle / "model.onnx")], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_session_computes_on_the_threads_it_was_given(tiny_bundle: Path) -> None:
    one = create_session(tiny_bundle / "model.onnx", threads=1, minimum="1.32")
    options = one.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert one.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("operator", "domain", "inputs", "shown"),
    [
        ("WarpSpeed", "", 1, "WarpSpeed"),
        ("WarpSpeed", "org.starship", 1, "org.starship:WarpSpeed"),
        ("WarpSpeed", "com.microsoft", 1, "com.microsoft:WarpSpeed"),
        ("GroupNorm", "com.microsoft", 3, "GroupNorm"),  # known, but not on CPUs
    ],
)
def test_an_operator_that_is_not_there_is_named(
    operator: str, domain: str, inputs: int, shown: str, tmp_path: Path
) -> None:
    node = helper.make_node(operator, ["x"] * inputs, ["y"], domain=domain)
    if operator == "GroupNorm":
        node.attribute.extend([helper.make_attribute(one, 1) for one in ("groups", "activation")])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    opsets = [helper.make_opsetid(one, 1) for one in {"com.microsoft", domain or "com.microsoft"}]
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), *opsets])
    model.ir_version = 10
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        UnsupportedFormatError, match=rf"needs the operator {shown}, which"
    ) as caught:
        create_session(tmp_path / "model.onnx", threads=1, minimum="1.32")
    assert caught.value.remedy
