"""A folder that processes share: whole entries or none, whoever is killed, and within its limit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_llm import LLM
from edge_llm.caching.folder import (
    ABANDONED,
    CacheFolder,
    default_cache_folder,
    is_readable,
    own_cache_folder,
    write_through,
)
from edge_llm.errors import CacheWarning, PlatformError

# A child that publishes entries of a stated content for ever: each a folder of two files.
WRITER = """
import sys
from pathlib import Path
from edge_llm.caching.folder import CacheFolder

folder, seed = CacheFolder(sys.argv[1], limit=3 << 20), int(sys.argv[2])

def write(stage):
    stage.mkdir()
    for part in "ab":
        with (stage / part).open("wb") as file:
            for _ in range(64):
                file.write(name[-1].encode() * 4096)

print("ready", flush=True)
for i in range(seed, 10**9):
    name = f"entry-{i % 10}"
    folder.publish(name, write)
    if i % 7 == 3:
        folder.remove(name)
"""


def content(text: str) -> Callable[[Path], None]:
    """A writer of one file."""

    def write(stage: Path) -> None:
        stage.write_text(text)

    return write


def listed(folder: Path) -> list[str]:
    """All names in a folder, hidden ones included."""
    return sorted(one.name for one in folder.iterdir())


def start(folder: Path, seed: int) -> subprocess.Popen[bytes]:
    """Start a child that writes, and wait until it does."""
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(seed)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def check_whole(folder: Path) -> int:
    """Every entry is what its name says; gives how many there are."""
    names = [one for one in listed(folder) if one.startswith("entry-")]
    for name in names:
        for part in "ab":
            assert (folder / name / part).read_bytes() == name[-1].encode() * (64 * 4096)
    return len(names)


def test_what_is_published_is_found_by_others(tmp_path: Path) -> None:
    one, other = (CacheFolder(tmp_path / "cache", limit=100) for _ in range(2))
    assert other.find("a") is None
    assert other.names() == []
    path = one.publish("a", content("first"))
    assert path == other.find("a") == tmp_path / "cache" / "a"
    assert path.read_text() == "first"
    assert other.publish("a", content("second")) == path
    assert path.read_text() == "first", "an entry never changes"
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
    other.remove("a")
    assert (one.find("a"), one.names()) == (None, [])
    one.remove("a")  # again, without a word


def test_the_least_recently_found_entries_go(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, limit=30, lasting=("kept-",))
    for name in ("kept-a", "b", "c"):
        folder.publish(name, content("x" * 10))
        time.sleep(0.01)
    assert folder.find("b")
    time.sleep(0.01)
    folder.publish("d", content("x" * 5))
    assert sorted(folder.names()) == ["b", "d", "kept-a"]
    folder.publish("e", content("x" * 20))
    assert sorted(folder.names()) == ["e", "kept-a"]
    folder.publish("f", content("x" * 25))
    assert folder.names() == ["f"], "kept ones go where the others do not suffice"
    assert folder.publish("g", content("x" * 31)) is None
    assert folder.names() == ["f"], "what never fits drives nothing out"
    assert folder.prune(24) == 25
    assert folder.names() == []


def test_what_else_lies_there_is_left_alone(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, limit=30, named="[0-9a-f]{4}")
    (tmp_path / "thesis.txt").write_text("x" * 100)
    (tmp_path / "photos").mkdir()
    (tmp_path / ".stage.old").touch()
    (tmp_path / ".stage.cccc").touch()
    for name in ("aaaa", "bbbb"):
        folder.publish(name, content("x" * 20))
    assert folder.names() == ["bbbb"], "what is not an entry does not count either"
    assert folder.prune(0) == 20
    assert listed(tmp_path) == [".lock", ".stage.old", "photos", "thesis.txt"]


def test_a_relative_path_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = CacheFolder("cache", limit=30)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert folder.publish("a", content("x")) == tmp_path / "cache" / "a"


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, limit=100)

    def fail(stage: Path) -> None:
        stage.mkdir()
        (stage / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.publish("a", fail)
    assert listed(tmp_path) == [".lock"]
    assert folder.publish("a", content("x")), "the lock is free"


def test_nobody_waits_who_does_not_want_to(tmp_path: Path) -> None:
    folder, other = (CacheFolder(tmp_path, limit=100) for _ in range(2))
    found: list[object] = []

    def write(stage: Path) -> None:
        found.append(other.publish("b", content("x"), wait=False))
        stage.write_text("x")

    assert folder.publish("a", write)
    assert found == [None]
    assert other.publish("b", content("x"), wait=False)


def test_a_killed_writer_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    rng = random.Random(1)
    whole = 0
    for round_ in range(8):
        child = start(tmp_path, round_)
        time.sleep(rng.uniform(0, 0.06))
        child.kill()
        child.communicate()
        whole += check_whole(tmp_path)
    assert whole, "no child lived long enough"
    folder = CacheFolder(tmp_path, limit=3 << 20)
    folder.publish("last", content("x"))
    left = set(listed(tmp_path))
    assert left == {".lock", *folder.names()}, "the next writer cleans up"


def test_two_processes_at_once(tmp_path: Path) -> None:
    children = [start(tmp_path, seed) for seed in (0, 5)]
    reader = CacheFolder(tmp_path, limit=3 << 20)
    found = 0
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            for name in reader.names():
                try:
                    text = (tmp_path / name / "b").read_bytes()
                except FileNotFoundError:
                    continue  # removed meanwhile
                assert text == name[-1].encode() * (64 * 4096)
                found += 1
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert found
    check_whole(tmp_path)
    held = sum(one.stat().st_size for one in tmp_path.rglob("*") if one.is_file())
    assert held <= (3 << 20) + 2 * 64 * 4096, "the limit, and one that was being written"


def test_a_folder_that_cannot_be_written_warns_once(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("in the folder's place")
    folder = CacheFolder(place, limit=100)
    with pytest.warns(CacheWarning, match="cannot be used") as caught:
        assert folder.publish("a", content("x")) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert folder.publish("b", content("x")) is None
        folder.remove("a")
        assert (folder.find("a"), folder.names(), folder.prune()) == (None, [], 0)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_full_disk_warns_once_and_what_is_there_is_still_found(tmp_path: Path) -> None:
    code = (
        "import resource, sys, warnings\n"
        "from edge_llm.caching.folder import CacheFolder\n"
        "folder = CacheFolder(sys.argv[1], limit=1 << 20)\n"
        "assert folder.publish('small', lambda stage: stage.write_bytes(bytes(100)) and None)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for name in 'ab':\n"
        "        write = lambda stage: stage.write_bytes(bytes(5000)) and None\n"
        "        assert folder.publish(name, write) is None\n"
        "print([one.category.__name__ for one in caught], folder.names())\n"
        "assert folder.find('small').read_bytes() == bytes(100)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['CacheWarning'] ['small']\n"
    assert listed(tmp_path) == [".lock", "small"]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_through(target, content("old"))

    def fail(stage: Path) -> None:
        stage.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_through(target, fail)
    assert target.read_text() == "old"
    write_through(target, content("new"))
    assert target.read_text() == "new"
    assert listed(tmp_path) == ["file"]


def test_what_a_killed_writer_of_a_file_left_goes(tmp_path: Path) -> None:
    def write(stage: Path) -> None:
        own = stage.with_name(stage.name.replace(".stage", "1.stage"))
        own.write_text("another writer's")
        left.append(own)
        stage.write_text("x")

    left: list[Path] = []
    target, other = tmp_path / "file[1]", tmp_path / "file1"
    write_through(target, write)
    write_through(other, content("x"))
    (own,) = left
    assert listed(tmp_path) == sorted([own.name, "file1", "file[1]"]), "it may still be written"
    long_ago = time.time() - 2 * ABANDONED
    os.utime(own, (long_ago, long_ago))
    write_through(other, content("y"))
    assert own.exists(), "another file's"
    write_through(target, content("y"))
    assert listed(tmp_path) == ["file1", "file[1]"]
    assert target.read_text() == "y"


def test_the_default_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder("prefix") == tmp_path / "edge-llm" / "prefix"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder("prefix") == tmp_path / ".cache" / "edge-llm" / "prefix"


def test_nobody_needs_a_home(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert own_cache_folder("prefix") is None
    with pytest.raises(PlatformError, match="set XDG_CACHE_HOME"):
        default_cache_folder("prefix")
    with LLM(tiny_bundle) as llm:
        assert llm.generate([1, 2], max_tokens=1).tokens
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert own_cache_folder("prefix") is None
    default_cache_folder("prefix").mkdir(parents=True)
    assert own_cache_folder("prefix") == tmp_path / "edge-llm" / "prefix"


def test_a_home_of_somebody_else_is_none(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that runs with another user's HOME may not even look into it."""
    home = tmp_path / "home"
    usual = Path.stat

    def stat(path: Path, **options: bool) -> object:
        if path.is_relative_to(home):
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, **options)

    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setattr(Path, "stat", stat)
    assert not is_readable(home)
    assert CacheFolder(home, limit=1).find("a") is None
    with LLM(tiny_bundle) as llm:
        assert llm.generate([1, 2], max_tokens=1).tokens
