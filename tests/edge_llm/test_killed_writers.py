"""Writers killed before and after each of their calls to the system, one moment after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

# Runs an action in a forked child again and again, which kills itself at the first moment, the
# second and so on, until it comes to its end; `check` looks at what each left.
KILLER = """
import os, signal, sys
from pathlib import Path

CALLS = {
    "open", "write", "flock", "mkdir", "rename", "replace", "unlink", "rmdir", "utime",
    "initialize_session",
}

# What was written outlives its writer; only a system that dies itself would need this.
os.fsync = lambda descriptor: None

def kill_at_each_moment(prepare, action, check):
    moment = 0
    while True:
        moment += 1
        prepare()
        child = os.fork()
        if not child:
            seen = 0
            def count(frame, event, function):
                nonlocal seen
                if event in ("c_call", "c_return") and function.__name__ in CALLS:
                    seen += 1
                    if seen == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.setprofile(count)
            action()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        check()
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            print(moment - 1)
            return
"""


def moments(program: str, *values: object) -> int:
    """At how many moments a program's action was killed."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER + program, *map(str, values)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


FOLDER = """
import shutil
from edge_llm.caching.folder import CacheFolder
path = Path(sys.argv[1])
left = set()

def write(name):
    def write(stage):
        stage.mkdir()
        for part in "ab":
            (stage / part).write_text(name * 1000)
    return write

def prepare():
    shutil.rmtree(path, ignore_errors=True)
    folder = CacheFolder(path, limit=4500)
    folder.publish("x", write("x"))
    folder.publish("y", write("y"))
    (path / ".stage.z").write_text("of one that was killed before")

def action():
    assert CacheFolder(path, limit=4500).publish("z", write("z"))  # for which "x" has to go

def check():
    folder = CacheFolder(path, limit=4500)
    names = folder.names()
    left.add(" ".join(sorted(names)))
    for name in names:
        assert all((path / name / part).read_text() == name * 1000 for part in "ab"), name
    assert folder.publish("z", write("z"))
    assert {one.name for one in path.iterdir()} == {".lock", "y", "z"}
    assert folder.prune(0) == 4000

kill_at_each_moment(prepare, action, check)
assert left == {"x y", "y", "y z"}, left
"""

FILE = """
import numpy as np
from edge_llm.caching.folder import write_through
from edge_llm.caching.state_file import SavedState, write_state
path = Path(sys.argv[1]) / "session"
left = set()

def save(length):
    arrays = {"past.0.key": np.full((2, length, 64), length, np.float32)}
    write_through(path, lambda stage: write_state(stage, "owner", np.arange(length), arrays))

def check():
    saved = SavedState.open(path, "owner")
    saved.verify()
    left.add(len(saved.tokens))
    assert (saved.arrays["past.0.key"] == len(saved.tokens)).all()

kill_at_each_moment(lambda: save(30), lambda: save(40), check)
assert left == {30, 40}, left
"""

TUNING = """
import warnings
from edge_llm import Bundle
from edge_llm.tuning import Tuning, find_tuning, save_tuning
bundle, cache = Bundle.open(sys.argv[1]), sys.argv[2]
old, new = (Tuning(threads=1, spin=spin) for spin in (1, 2))
left = set()
warnings.simplefilter("error")

def check():
    left.add(find_tuning(bundle, cache_dir=cache).spin)

kill_at_each_moment(
    lambda: save_tuning(bundle, old, cache_dir=cache),
    lambda: save_tuning(bundle, new, cache_dir=cache),
    check,
)
assert left == {1, 2}, left
"""

COMPILED = """
from edge_llm import Bundle
from edge_llm.compiled import CompiledModels
from edge_llm.runtime.session import import_onnxruntime
import_onnxruntime()
bundle, models = Bundle.open(sys.argv[1]), CompiledModels(sys.argv[2])
left = set()

def check():
    found = models.find(bundle)
    left.add(found is not None)
    assert found == models.find(bundle, verify=True)

kill_at_each_moment(
    lambda: models.prune(0), lambda: models.compile(bundle, threads=1), check
)
assert left == {False, True}, left
"""


def test_entries_of_a_folder(tmp_path: Path) -> None:
    assert moments(FOLDER, tmp_path / "cache") > 30


def test_a_session(tmp_path: Path) -> None:
    assert moments(FILE, tmp_path) > 8


def test_a_tuning(tiny_bundle: Path, tmp_path: Path) -> None:
    assert moments(TUNING, tiny_bundle, tmp_path) > 8


def test_a_compiled_model(tiny_bundle: Path, tmp_path: Path) -> None:
    assert moments(COMPILED, tiny_bundle, tmp_path / "compiled") > 15
