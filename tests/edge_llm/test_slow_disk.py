"""A disk that stands still holds up nobody but who asked for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge_llm import LLM
from edge_llm.caching import prefixes
from edge_llm.caching.state_file import SavedState
from edge_llm.engine import sessions
from tests.edge_llm.test_engine import LONG, Call, within

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
    for module in (prefixes, sessions):
        monkeypatch.setattr(module, "write_state", disk.slow(module.write_state))  # type: ignore[attr-defined]
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
