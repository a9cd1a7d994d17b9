"""A disk that stands still holds up nobody but who asked for it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_llm import LLM, Completion
from edge_llm.caching import prefixes
from edge_llm.caching.background import Background
from edge_llm.caching.state_file import SavedState
from edge_llm.engine import sessions, slot
from edge_llm.errors import ClosedError
from tests.edge_llm.test_engine import LONG, Call, until, within

PROMPT = list(range(10, 70))
STREAM: dict[str, Any] = {"max_tokens": 40, "min_tokens": 40, "temperature": 0}


class Disk:
    """Stands still, once it is told to, until it may go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def stop(self) -> None:
        self.reached.clear()
        self.open.clear()

    def slow(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.open.wait(LONG)
            return function(*args, **kwargs)

        return wait


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """All that reads or writes a state's content; short prompts are worth keeping."""
    disk = Disk()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prefixes, "WORTH", 8)
    monkeypatch.setattr(slot, "PATIENCE_SECONDS", LONG)
    for module in (prefixes, sessions):
        monkeypatch.setattr(module, "write_state", disk.slow(module.write_state))
    monkeypatch.setattr(SavedState, "verify", disk.slow(SavedState.verify))
    yield disk
    disk.open.set()


def goes_on(llm: LLM, stream: Iterator[Any]) -> None:
    """A stream that has begun comes to its end, and so does one that begins now."""
    assert within(lambda: list(stream))[-1].finish_reason == "length"
    assert within(lambda: llm.generate([5, 6], **STREAM)).finish_reason == "length"


def begun(llm: LLM) -> Iterator[Any]:
    stream = llm.stream([3, 4], **STREAM)
    next(stream)
    return stream


def test_streams_go_on_while_a_session_is_saved_and_loaded(
    disk: Disk, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    with LLM(tiny_bundle, slots=3) as llm:
        llm.generate(PROMPT, **STREAM)
        disk.stop()
        saving = Call(partial(llm.save_session, path))
        assert disk.reached.wait(LONG)
        goes_on(llm, begun(llm))
        assert not path.exists()
        disk.open.set()
        count = saving.result()
        assert path.exists()
    with LLM(tiny_bundle, slots=3) as llm:
        disk.stop()
        loading = Call(partial(llm.load_session, path))
        assert disk.reached.wait(LONG)
        goes_on(llm, begun(llm))
        disk.open.set()
        assert loading.result() == count
        # What was saved is the conversation as it was, whatever its row held afterwards.
        assert llm.generate(PROMPT, **STREAM).usage.reused_tokens == len(PROMPT) - 2


def test_a_session_is_written_though_the_model_is_closed_meanwhile(
    disk: Disk, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    with LLM(tiny_bundle) as llm:
        llm.generate(PROMPT, **STREAM)
        disk.stop()
        saving = Call(partial(llm.save_session, path))
        assert disk.reached.wait(LONG)
        within(llm.close)
    disk.open.set()
    count = saving.result()
    with LLM(tiny_bundle) as llm:
        assert llm.load_session(path) == count


def test_two_sessions_at_one_place_are_not_mixed(
    disk: Disk, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    with LLM(tiny_bundle, slots=1) as llm:
        llm.generate(PROMPT, **STREAM)
        disk.stop()
        saving = [Call(partial(llm.save_session, path)) for _ in range(2)]
        assert disk.reached.wait(LONG)
        disk.open.set()
        (count,) = {call.result() for call in saving}
        assert llm.load_session(path) == count
    assert list(tmp_path.glob("*session*")) == [path]


def test_streams_go_on_while_prefixes_are_written(
    disk: Disk, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    with LLM(tiny_bundle, slots=3, prefix_cache=folder) as llm:
        disk.stop()
        baking = Call(partial(llm.bake, PROMPT))
        assert disk.reached.wait(LONG)
        goes_on(llm, begun(llm))
        disk.open.set()
        entry = baking.result()
        assert isinstance(entry, Path)
        assert entry.exists()
        disk.stop()
        llm.generate(PROMPT[::-1], **STREAM)  # is kept
        assert disk.reached.wait(LONG)
        for _ in range(3):  # also in the row that held it
            goes_on(llm, begun(llm))
        disk.open.set()
    assert len(list(folder.glob("[!.]*"))) == 2


@pytest.fixture
def baked(disk: Disk, tiny_bundle: Path, tmp_path: Path) -> Path:
    """A folder with a prefix in it; the disk stands still when it is to be read."""
    folder = tmp_path / "baked"
    with LLM(tiny_bundle, prefix_cache=folder) as llm:
        llm.bake(PROMPT)
    disk.stop()
    return folder


def test_streams_go_on_while_a_prefix_is_read(disk: Disk, tiny_bundle: Path, baked: Path) -> None:
    with LLM(tiny_bundle) as llm:
        plain = llm.generate([*PROMPT, 5, 6], **STREAM)
    with LLM(tiny_bundle, slots=3, prefix_cache=baked) as llm:
        stream = begun(llm)
        asking = Call(lambda: llm.generate([*PROMPT, 5, 6], **STREAM))
        assert disk.reached.wait(LONG)
        goes_on(llm, stream)
        # One that begins alike waits for what is being read; then it is in memory.
        alike = Call(lambda: llm.generate([*PROMPT, 7, 8], **STREAM))
        until(lambda: llm.stats().waiting == 1)
        goes_on(llm, begun(llm))
        assert llm.stats().running == 1
        disk.open.set()
        answer, other = asking.result(), alike.result()
        assert isinstance(answer, Completion)
        assert isinstance(other, Completion)
        assert (answer.tokens, answer.usage.reused_from_disk) == (plain.tokens, len(PROMPT))
        assert (other.usage.reused_tokens, other.usage.reused_from_disk) == (len(PROMPT), 0)


def test_what_memory_holds_is_not_looked_for_on_the_disk(
    disk: Disk, tiny_bundle: Path, baked: Path
) -> None:
    with LLM(tiny_bundle, slots=1, prefix_cache=baked) as llm:
        disk.open.set()
        assert llm.generate(PROMPT, **STREAM).usage.reused_from_disk == len(PROMPT) - 2
        disk.stop()
        assert within(lambda: llm.generate(PROMPT, **STREAM)).usage.reused_from_disk == 0


@pytest.mark.parametrize("how", ["cancel", "timeout", "close"])
def test_who_waits_for_the_disk_can_be_ended(
    how: str, disk: Disk, tiny_bundle: Path, baked: Path
) -> None:
    with LLM(tiny_bundle, slots=1, prefix_cache=baked) as llm:
        cancel = threading.Event()
        timeout = 0.2 if how == "timeout" else None
        stream = llm.stream([*PROMPT, 5, 6], cancel=cancel, timeout=timeout)
        asking = Call(lambda: list(stream))
        assert disk.reached.wait(LONG)
        if how == "close":
            within(llm.close)
            with pytest.raises(ClosedError):
                asking.result()
            return
        if how == "cancel":
            cancel.set()
        # Its row is free for the next one.
        assert within(lambda: llm.generate([5, 6], **STREAM)).finish_reason == "length"
        chunks = asking.result()
        assert isinstance(chunks, list)
        assert chunks[-1].finish_reason == ("cancelled" if how == "cancel" else "timeout")
        assert chunks[-1].usage.reused_tokens == 0
        # What was asked for is read once the disk answers, and harms nobody.
        disk.open.set()
        again = llm.generate([*PROMPT, 5, 6], **STREAM)
        assert again.usage.reused_from_disk == len(PROMPT)


def test_one_whose_caller_does_not_look_ends_too(
    disk: Disk, tiny_bundle: Path, baked: Path
) -> None:
    with LLM(tiny_bundle, slots=1, prefix_cache=baked) as llm:
        prompt = np.array([*PROMPT, 5, 6], np.int64)
        llm._model.engine.submit(llm._model.generation(prompt, {"timeout": 0.2}, stream=True))
        assert disk.reached.wait(LONG)
        assert within(lambda: llm.generate([5, 6], **STREAM)).finish_reason == "length"


@pytest.mark.parametrize("error", [OSError("input/output error"), MemoryError("no room")])
def test_what_cannot_be_read_is_computed(
    error: Exception, disk: Disk, tiny_bundle: Path, baked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(saved: SavedState) -> None:
        raise error

    disk.open.set()
    monkeypatch.setattr(SavedState, "verify", fail)
    with LLM(tiny_bundle) as llm:
        plain = llm.generate([*PROMPT, 5, 6], **STREAM)
    with LLM(tiny_bundle, slots=2, prefix_cache=baked) as llm:
        answer = within(lambda: llm.generate([*PROMPT, 5, 6], **STREAM))
    assert (answer.tokens, answer.usage.reused_tokens) == (plain.tokens, 0)


def test_a_disk_that_does_not_answer_is_waited_for_once_and_not_for_ever(
    disk: Disk, tiny_bundle: Path, baked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, other = [*PROMPT, 5, 6], [*PROMPT[::-1], 5, 6]
    with LLM(tiny_bundle) as llm:
        plain = llm.generate(asked, **STREAM)
    monkeypatch.setattr(slot, "PATIENCE_SECONDS", 0.1)
    with LLM(tiny_bundle, slots=1, prefix_cache=baked) as llm:
        answer = within(lambda: llm.generate(asked, **STREAM))
        assert disk.reached.is_set()
        assert (answer.tokens, answer.usage.reused_tokens) == (plain.tokens, 0)
        # Nor is it asked for another prompt before it has answered.
        assert llm._model.prefixes is not None
        reading = llm._model.prefixes._reading
        until(lambda: reading.busy_seconds > 0.1)
        assert within(lambda: llm.generate(other, **STREAM)).usage.reused_tokens == 0
        assert not reading._work
        disk.open.set()
        until(lambda: not reading.busy_seconds)
        monkeypatch.setattr(slot, "PATIENCE_SECONDS", LONG)
        assert llm.generate(asked, **STREAM).usage.reused_from_disk == len(PROMPT)


def test_a_system_without_a_thread_left_computes(
    tiny_bundle: Path, baked: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("edge_llm-prefixes"):
            raise RuntimeError("can't start new thread")
        start(thread)

    disk.open.set()
    with LLM(tiny_bundle, prefix_cache=baked) as llm:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert within(lambda: llm.generate([*PROMPT, 5, 6], **STREAM)).usage.reused_tokens == 0
        monkeypatch.undo()
        other = [*PROMPT[:40], *range(100, 140)]
        assert within(lambda: llm.generate(other, **STREAM)).usage.reused_tokens == 40


# Tells which threads touch the files of a folder.
AUDIT = """
import sys, threading
from edge_llm import LLM
from edge_llm.caching import prefixes

prefixes.WORTH = 8
bundle, folder = sys.argv[1:]
touching = {}

def note(event, args):
    if event.startswith(("open", "os.")) and args and folder in str(args[0]):
        touching.setdefault(threading.current_thread().name, set()).add(event)

sys.addaudithook(note)
prompt = list(range(10, 70))
for _ in range(2):
    with LLM(bundle, slots=2, prefix_cache=folder, threads=1) as llm:
        llm.bake(prompt[:40])
        llm.generate([5, 6], max_tokens=1)
        llm.generate(prompt, max_tokens=2)
        llm.generate(prompt[::-1], max_tokens=2)
        llm.save_session(folder + "/session")
        llm.load_session(folder + "/session")
print(*sorted(touching), sep=",")
"""


def test_the_engines_thread_touches_no_file(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", AUDIT, str(tiny_bundle), str(tmp_path / "own")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    threads = "MainThread,edge_llm-prefixes,edge_llm-prefixes-reading\n"
    assert (done.stderr, done.stdout) == ("", threads)


def test_background_work_is_done_in_order_and_what_was_cancelled_is_not() -> None:
    gate, background = threading.Event(), Background("test")
    done: list[int] = []
    first = background.submit(lambda: gate.wait(LONG))
    others = [background.submit(partial(done.append, i)) for i in range(3)]
    failing = background.submit(lambda: divmod(1, 0))
    last = background.submit(threading.get_ident)
    assert others[1].cancel()
    until(lambda: background.busy_seconds)
    gate.set()
    with pytest.raises(ZeroDivisionError):
        failing.result(LONG)
    assert (first.result(LONG), done) == (True, [0, 2])
    assert last.result(LONG) != threading.get_ident()
    until(lambda: all(thread.name != "test" for thread in threading.enumerate()))
    assert background.busy_seconds == 0
    assert background.submit(lambda: 5).result(LONG) == 5
