"""Leaving Python with a live model, and forking with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LEAVE = {
    "idle": "llm.generate([5], max_tokens=2)",
    "unused": "",
    "in the middle of a stream": "stream = llm.stream([5], min_tokens=200); next(stream)",
    "while another thread is served": (
        "import threading, time\n"
        "def work():\n"
        "    try:\n"
        "        while True: llm.generate([5], min_tokens=250)\n"
        "    except ClosedError: pass\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.1)"
    ),
    "by an exception": "next(llm.stream([5], min_tokens=200)); raise SystemExit(0)",
}


def run(program: str, bundle: Path) -> subprocess.CompletedProcess[str]:
    start = (
        "import sys\nfrom edge_llm import LLM\nfrom edge_llm.errors import ClosedError\n"
        "llm = LLM(sys.argv[1])\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", start + program, str(bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("how", LEAVE)
def test_python_ends_cleanly_with_a_live_model(how: str, tiny_bundle: Path) -> None:
    result = run(LEAVE[how], tiny_bundle)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_hook_that_does_not_return_does_not_keep_python(tiny_bundle: Path) -> None:
    program = """
import threading
from edge_llm.engine import thread
thread.CLOSE_SECONDS = 0.1
entered = threading.Event()
def hang(so_far, logits):
    entered.set()
    threading.Event().wait()
def work():
    try:
        llm.generate([5], logits_hook=hang)
    except ClosedError:
        print("told")
worker = threading.Thread(target=work, daemon=True)
worker.start()
entered.wait()
llm.close()
worker.join()
"""
    result = run(program, tiny_bundle)
    assert (result.returncode, result.stdout) == (0, "told\n")
    assert result.stderr == "the model was closed, but logits_hook has not returned\n"


@pytest.mark.skipif(not hasattr(sys.modules["os"], "fork"), reason="needs fork()")
def test_a_forked_child_is_told_what_to_do(tiny_bundle: Path) -> None:
    program = """
import os
from edge_llm.errors import ForkError
llm.generate([5], max_tokens=2)
child = os.fork()
if child == 0:
    try:
        llm.generate([5], max_tokens=2)
    except ForkError as error:
        assert "spawn" in str(error)
        llm.close()
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert llm.generate([5], max_tokens=2).tokens
"""
    result = run(program, tiny_bundle)
    assert (result.returncode, result.stderr) == (0, "")
