"""Loading and generating opens no socket and writes nothing outside the folders it was given.

onnxruntime's telemetry lives in its native part, which Python's audit hooks do not see. So the
calls of a child process into libc are watched by a small preloaded library, which also refuses
them, so that this test stays offline; a control run shows that it does see them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <netdb.h>

static void tell(const char *what) {
    FILE *log = fopen(getenv("SHIM_LOG"), "a");
    if (log) { fprintf(log, "%s\n", what); fclose(log); }
}
int socket(int domain, int type, int protocol) {
    static int (*real)(int, int, int);
    if (!real) real = dlsym(RTLD_NEXT, "socket");
    if (domain != AF_UNIX) { tell("socket"); errno = EACCES; return -1; }
    return real(domain, type, protocol);
}
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **result) {
    tell("getaddrinfo");
    return EAI_FAIL;
}
"""

GENERATE = """
import sys
written = []
def audit(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        raise SystemExit(f"audit: {event} {args}")
    if event == "socket.__new__":
        raise SystemExit("audit: a socket was made")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        written.append(args[0])
sys.addaudithook(audit)
from edge_llm import LLM
with LLM(sys.argv[1]) as llm:
    llm.generate([5, 6, 7], max_tokens=5)
    list(llm.stream([5, 6, 7], max_tokens=5, temperature=1.0))
    llm.chat([{"role": "user", "content": "hello"}], max_tokens=3)
    llm.score([5, 6, 7, 8])
assert not written, written
"""

CONTROL = """
import contextlib, pathlib, socket
with contextlib.suppress(PermissionError):
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    raise SystemExit("a socket was made")
with contextlib.suppress(socket.gaierror):
    socket.getaddrinfo("localhost", 80)
    raise SystemExit("a name was looked up")
(pathlib.Path.home() / "traced").write_text("x")
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that reports sockets and name look-ups of the process that preloads it."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs Linux and gcc to trace the native library's system calls")
    folder = tmp_path_factory.mktemp("shim")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def trace(shim: Path, folder: Path, program: str, *arguments: str) -> tuple[str, list[Path]]:
    """Run a program in a new home; what it asked of the network, and what it wrote at home."""
    home, log = folder / "home", folder / "log"
    home.mkdir()
    log.touch()
    environment = {
        name: value
        for name, value in os.environ.items()
        # onnxruntime keeps its telemetry off where CI is set: here it must have its chance.
        if not name.startswith(("XDG_", "ORT_", "HF_")) and name != "CI"
    }
    environment |= {
        "HOME": str(home),
        "TMPDIR": str(home),
        "LD_PRELOAD": str(shim),
        "SHIM_LOG": str(log),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return log.read_text(), list(home.rglob("*"))


def test_the_trace_sees_sockets_and_files(shim: Path, tmp_path: Path) -> None:
    network, files = trace(shim, tmp_path, CONTROL)
    assert network == "socket\ngetaddrinfo\n"
    assert [file.name for file in files] == ["traced"]


def test_load_and_generate_stay_at_home(shim: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny_bundle.rglob("*")}
    network, files = trace(shim, tmp_path, GENERATE, str(tiny_bundle))
    assert network == ""
    assert files == []
    assert {file: file.stat().st_mtime_ns for file in tiny_bundle.rglob("*")} == before


def test_onnxruntime_would_have_phoned_home(shim: Path, tmp_path: Path) -> None:
    """The reason for all this: when this fails, onnxruntime has mended its ways."""
    network, files = trace(shim, tmp_path, "import onnxruntime, time; time.sleep(1)")
    assert files or network
