"""``edge-llm batch``: every kind of line, and no line lost or done twice whatever ends a run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_llm import LLM, ArgumentError
from edge_llm.batching import BatchItem
from edge_llm.caching.folder import exclusive
from edge_llm.cli import batch, batch_files
from edge_llm.cli.main import main

Capture = pytest.CaptureFixture[str]

TEXTS = ["It was the best of times", "the age of wisdom, it was", "東京", "a", "epoch of belief"]

# The command in a process of its own, whose every step takes a while.
SLOWLY = """
import sys, time
from edge_llm.cli.main import main
from edge_llm.runtime.own_layout import OwnDecoder
step = OwnDecoder.step_rows
def slow(self, *args, **options):
    time.sleep(0.004)
    return step(self, *args, **options)
OwnDecoder.step_rows = slow
sys.exit(main(sys.argv[1:]))
"""


class Files:
    """A file of requests, and one of answers."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self._bundle = bundle

    def ask(self, *lines: object) -> None:
        """Write requests; text and bytes stand as they are."""
        raw = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        self.input.write_bytes(b"".join(line + b"\n" for line in raw))

    def argv(self, *flags: str) -> list[str]:
        model = ["-m", str(self._bundle), "--slots", "3", "--temperature", "0"]
        return ["batch", str(self.input), str(self.output), *model, *flags]

    def run(self, *flags: str) -> int:
        return main(self.argv(*flags))

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *self.argv(*flags)], stderr=subprocess.PIPE
        )

    def answers(self) -> list[dict[str, Any]]:
        """What was written, line by line."""
        content = self.output.read_bytes()
        assert content == b"" or content.endswith(b"\n")
        return [json.loads(line) for line in content.splitlines()]

    def texts(self) -> dict[int, str]:
        """The answers by their index, of which each is there once."""
        answers = self.answers()
        found = {one["index"]: one["text"] for one in answers}
        assert len(found) == len(answers)
        return found


@pytest.fixture
def files(tmp_path: Path, tiny_bundle: Path) -> Files:
    return Files(tmp_path, tiny_bundle)


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{TEXTS[i % 5]} {i}", "max_tokens": 4 + i % 9} for i in range(count)]


def failure(capsys: Capture) -> str:
    """The last line on stderr."""
    return capsys.readouterr().err.splitlines()[-1]


# Lines


def test_every_kind_of_line(files: Files, tiny_llm: LLM, capsys: Capture) -> None:
    messages = [{"role": "user", "content": "best of times"}]
    files.ask(
        {"prompt": "a", "id": "text"},
        {"prompt": tiny_llm.tokenize("epoch"), "id": {"any": ["JSON"]}},
        {"messages": messages, "max_tokens": 3},
        b"  ",
        {"prompt": "it was", "id": None},
        {"prompt": "a", "temperature": 0.9, "seed": 7, "stop": ["e"], "logit_bias": {"65": -3}},
        {"prompt": "東京", "logprobs": 2},
    )
    assert files.run("--max-tokens", "6") == 0
    answers = {one["index"]: one for one in files.answers()}
    assert sorted(answers) == [0, 1, 2, 4, 5, 6]
    assert [answers[i].get("id") for i in (0, 1, 2, 4)] == ["text", {"any": ["JSON"]}, None, None]
    assert "id" in answers[4]
    assert "id" not in answers[2]
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    expected = {
        0: tiny_llm.generate("a", **greedy),
        1: tiny_llm.generate("epoch", **greedy),
        2: tiny_llm.chat(messages, temperature=0, max_tokens=3),
        4: tiny_llm.generate("it was", **greedy),
        5: tiny_llm.generate(
            "a", max_tokens=6, temperature=0.9, seed=7, stop=["e"], logit_bias={65: -3}
        ),
        6: tiny_llm.generate("東京", logprobs=2, **greedy),
    }
    for index, completion in expected.items():
        assert answers[index]["text"] == completion.text
        assert answers[index]["finish_reason"] == completion.finish_reason
        usage = answers[index]["usage"]
        assert usage["completion_tokens"] == completion.usage.completion_tokens
        assert usage["prompt_tokens"] == completion.usage.prompt_tokens
        assert len(answers[index]["hash"]) == 16
    assert [one["token"] for one in answers[6]["logprobs"]] == list(expected[6].tokens)
    assert "6 answered · 0 failed" in failure(capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{bad", 'Line 2 must be a JSON object with a "prompt" or with "messages"'),
        (b"[1]", "Line 2 must be a JSON object"),
        (b"\xff\xfe", "Line 2 must be a JSON object"),
        (b"[" * 100_000, "Line 2 must be a JSON object"),
        (b"9" * 5_000, "Line 2 must be a JSON object"),
        ({"id": 3}, "Line 2 must be a JSON object"),
        ({"prompt": "a", "messages": [{}]}, "Line 2 must be a JSON object"),
        ({"prompt": 5}, "prompt must be text, or a list of tokens"),
        ({"prompt": [{"role": "user"}]}, "prompt must be text, or a list of tokens"),
        ({"prompt": ["a", 1]}, "prompt must be text, or a sequence"),
        ({"prompt": [10**30]}, "prompt must be text, or a sequence"),
        (b'{"prompt": "\\ud800"}', "lone surrogates"),
        ({"messages": []}, "messages must be a list of at least one object"),
        ({"messages": ["a"]}, "messages must be a list of objects"),
        ({"messages": [{"role": 5}]}, "must be a string, got 5"),
        ({"messages": [{"role": "user", "content": "a"}], "template": [1]}, "no chat template"),
        ({"prompt": "a", "temperature": "hot"}, "temperature must be"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature must be"),
        ({"prompt": "a", "max_tokens": 10_000}, "tokens too many"),
        ({"prompt": "a", "temprature": 1}, "there is no such option"),
        ({"prompt": "a", "logits_hook": "f"}, "a line cannot say it"),
        ({"prompt": "a", "logit_bias": {"b": 1}}, "logit_bias must be"),
    ],
)
def test_an_error_is_its_lines_own(
    line: object, message: str, files: Files, capsys: Capture
) -> None:
    files.ask({"prompt": "a"}, line, {"prompt": "b"})
    assert files.run("--max-tokens", "3", "--ordered") == 1
    first, wrong, last = files.answers()
    assert "text" in first
    assert "text" in last
    assert wrong["index"] == 1
    assert wrong["error"]["type"].endswith("Error")
    assert message in wrong["error"]["message"]
    assert "2 answered · 1 failed" in failure(capsys)


def test_a_line_that_is_too_long_is_not_read_into_memory(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_files, "MOST_BYTES", 64)
    long = {"prompt": "a" * 500}
    files.ask({"prompt": "a"}, long, {"prompt": "b"}, {"prompt": "c" * 50})
    with files.input.open("rb") as source:
        lines = list(batch_files.read_lines(source))
    assert [line.text is None for line in lines] == [False, True, False, True]
    assert len({line.digest for line in lines}) == 4
    assert files.run("--max-tokens", "2", "--ordered") == 1
    assert [one["index"] for one in files.answers()] == [0, 1, 2, 3]
    assert "Line 2 must be of at most 64 bytes" in files.answers()[1]["error"]["message"]


def test_items_of_a_batch_have_options_of_their_own(tiny_llm: LLM) -> None:
    error = ArgumentError("Line 1", "better", "bad")
    items: list[Any] = ["a", BatchItem("a", {"max_tokens": 2}), BatchItem(error), BatchItem([65])]
    results = list(tiny_llm.batch(items, errors="return", max_tokens=5, temperature=0))
    lengths = [one.completion and one.completion.usage.completion_tokens for one in results]
    assert lengths == [5, 2, None, 5]
    assert results[2].error is error
    with pytest.raises(ArgumentError, match="Line 1 must be better"):
        list(tiny_llm.batch(items))


# Order, stdin, speed


def test_answers_come_in_order_where_that_is_asked_for(files: Files) -> None:
    lines = prompts(24)
    lines[0] |= {"max_tokens": 200, "min_tokens": 200}
    files.ask(*lines)
    assert files.run() == 0
    free, texts = [one["index"] for one in files.answers()], files.texts()
    assert free[0] != 0
    assert sorted(free) == list(range(24))
    files.output.unlink()
    assert files.run("--ordered") == 0
    assert [one["index"] for one in files.answers()] == list(range(24))
    assert files.texts() == texts


def test_order_cannot_come_from_disorder(files: Files, capsys: Capture) -> None:
    files.ask(*prompts(6))
    assert files.run("--ordered") == 0
    lines = files.output.read_bytes().splitlines(keepends=True)
    files.output.write_bytes(b"".join([lines[0], lines[2]]))
    assert files.run("--ordered") == 1
    assert "are in no order. Drop --ordered" in failure(capsys)
    files.output.write_bytes(b"".join(lines[:2]))
    assert files.run("--ordered") == 0
    assert files.output.read_bytes().splitlines(keepends=True)[:2] == lines[:2]
    assert [one["index"] for one in files.answers()] == list(range(6))
    assert files.run("--ordered", "--retry-errors") == 2


def test_requests_from_stdin(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    files.ask(*prompts(5))
    argv = files.argv()
    argv[1] = "-"
    for count in (5, 7):  # there is more of it at the second time
        files.ask(*prompts(count))
        with files.input.open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert main(argv) == 0
        assert sorted(files.texts()) == list(range(count))
    assert "2 answered · 0 failed · 5 done before" in failure(capsys)
    files.ask({"prompt": "another"})
    with files.input.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert main(argv) == 1
    assert "Line 1 of - is not what" in failure(capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes, and no SIGINT")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("end", ["close", "interrupt"])
def test_an_answer_comes_before_the_next_request(files: Files, named: bool, end: str) -> None:
    argv = files.argv("--max-tokens", "3")
    argv[1] = str(files.input) if named else "-"
    if named:
        os.mkfifo(files.input)
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_llm.cli.main", *argv],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    with process, files.input.open("wb") if named else process.stdin as pipe:
        for i in range(4):
            pipe.write(json.dumps({"prompt": TEXTS[i]}).encode() + b"\n")
            pipe.flush()
            until(lambda done=i + 1: size(files.output) and len(files.answers()) == done)
        if end == "close":
            pipe.close()
        else:  # while a thread waits for the next line
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == (0 if end == "close" else 130)
        said = process.stderr.read().decode()
    assert said.startswith("interrupted; " if end == "interrupt" else "4 answered")
    assert len(said.splitlines()) == 1
    assert sorted(files.texts()) == list(range(4))


def until(met: Any) -> None:
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_progress_at_a_terminal(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(batch, "REDRAW_SECONDS", 0)
    files.ask(*prompts(6), {"prompt": 5})
    assert files.run() == 1
    written = terminal.getvalue()
    assert "\r" in written
    assert "7 of 7 · 1 failed · " in written
    assert " left" in written
    assert written.splitlines()[-1].startswith("6 answered · 1 failed · ")


# Going on


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_kills_lose_nothing_and_repeat_nothing(files: Files) -> None:
    files.ask(*prompts(50))
    assert files.run() == 0
    undisturbed = files.texts()
    files.output.unlink()
    chance = random.Random(4)
    kills = 0
    while kill_at_random(files, chance):
        kills += 1
        assert kills < 60
        if chance.random() < 0.5 and size(files.output):  # as if the kill had torn a line
            with files.output.open("r+b") as output:
                output.truncate(size(files.output) - chance.randrange(1, 60))
    assert kills >= 3
    assert files.texts() == undisturbed


def kill_at_random(files: Files, chance: random.Random) -> bool:
    """Run the command and kill it at some moment; False where it has come to its end."""
    kept = size(files.output)
    with files.start() as process:
        if chance.random() < 0.8:  # else, most likely, before it writes anything
            until(lambda: process.poll() is not None or size(files.output) > kept)
        time.sleep(chance.random() * 0.15)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode != 0


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_what_is_torn_is_cut_off_and_done_again(files: Files, capsys: Capture) -> None:
    files.ask(*prompts(4))
    assert files.run("--ordered") == 0
    whole = files.output.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1])
    for end in (start + 1, start + 9, start + 30, len(whole) - 1):
        files.output.write_bytes(whole[:end])
        assert files.run() == 0
        assert "1 answered · 0 failed · 3 done before" in failure(capsys)
        assert files.output.read_bytes() == whole
    modified = files.output.stat().st_mtime_ns
    assert files.run() == 0
    assert "0 answered · 0 failed · 4 done before" in failure(capsys)
    assert files.output.stat().st_mtime_ns == modified


@pytest.mark.parametrize(
    "content",
    [
        b"Dear diary",
        b"Dear diary,\n",
        b"{}\n",
        b'{"index": 0}\n',
        b'{"index": -1, "hash": "0123456789abcdef", "text": ""}\n',
        b'{"index": true, "hash": "0123456789abcdef", "text": ""}\n',
        b'{"index": 0, "hash": "xyz", "text": ""}\n',
        b'{"index": 0, "hash": 5, "text": ""}\n',
        b'{"index": 0, "hash": "0123456789abcdef"}\n',
        b'{"index": 0, "hash": "0123456789abcdef", "text": ""}\n' * 2,
        b'{"index": 0, "hash": "0123456789abcdef", "text": ""}\nmore',
        b"\x00" * 40,
    ],
)
def test_another_programs_file_is_left_alone(content: bytes, files: Files, capsys: Capture) -> None:
    files.ask({"prompt": "a"})
    files.output.write_bytes(content)
    for flags in ([], ["--retry-errors"]):
        assert files.run(*flags) == 1
        message = failure(capsys)
        assert "out.jsonl was not written by `edge-llm batch`: " in message
        assert "Name another file" in message
        assert files.output.read_bytes() == content


def test_requests_that_changed_are_refused(files: Files, capsys: Capture) -> None:
    files.ask(*prompts(4))
    assert files.run() == 0
    answers = files.output.read_bytes()
    changed = prompts(5)
    changed[2]["prompt"] = "other"
    files.ask(*changed)
    assert files.run() == 1
    message = failure(capsys)
    assert f"Line 3 of {files.input} is not what {files.output.resolve()} has answers" in message
    assert "Name the requests that it was begun with, or another file" in message
    files.ask(*prompts(3))
    assert files.run() == 1
    assert f"{files.input} has fewer lines than what" in failure(capsys)
    assert files.output.read_bytes() == answers


def test_errors_can_be_done_again(files: Files, capsys: Capture) -> None:
    lines = [*prompts(3), {"prompt": "a", "max_tokens": 200, "id": 7}, *prompts(3)]
    files.ask(*lines)
    assert files.run("--context", "100", "--ordered") == 1
    assert files.answers()[3]["error"]["type"] == "ContextLengthError"
    before = files.output.read_bytes().splitlines()
    assert files.run() == 1  # the same command alone does not ask again
    assert "7 done before, 1 of them failed" in failure(capsys)
    assert files.output.read_bytes().splitlines() == before
    assert files.run("--retry-errors") == 0
    assert sorted(files.texts()) == list(range(7))
    after = files.output.read_bytes().splitlines()
    assert after[:6] == before[:3] + before[4:]
    assert files.answers()[-1]["id"] == 7
    assert [one.name for one in files.output.parent.iterdir() if "stage" in one.name] == []


def test_two_processes_do_not_write_one_file(files: Files, capsys: Capture) -> None:
    files.ask(*prompts(3))
    with exclusive(files.output.parent / ".out.jsonl.lock", wait=False) as held:
        assert held
        assert files.run() == 1
        assert "Another process writes" in failure(capsys)
        assert not files.output.exists()
    assert files.run() == 0


@contextlib.contextmanager
def started(files: Files, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    process = files.start(*flags)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    with process:
        yield process
    watchdog.cancel()


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent otherwise there")
def test_an_interrupt_keeps_what_is_done(files: Files, capsys: Capture) -> None:
    files.ask(*prompts(60))
    with started(files) as process:
        until(lambda: size(files.output) > 0)
        assert files.run() == 1  # the other process has the lock
        assert "Another process writes" in failure(capsys)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read().startswith(b"interrupted; the same command goes on. ")
    assert process.returncode == 130
    kept = files.texts()
    assert 0 < len(kept) < 60
    assert files.run() == 0
    assert sorted(files.texts()) == list(range(60))
    assert kept.items() <= files.texts().items()


# Refusals


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_files_that_will_not_do(files: Files, capsys: Capture) -> None:
    assert files.run() == 1
    assert "in.jsonl: No such file" in failure(capsys)
    files.ask({"prompt": "a"})
    for output, message in (
        (str(files.input), "IN and OUT are one file."),
        ("/dev/full", "/dev/full is no file."),
        (str(files.input.parent), "is no file."),
        (str(files.input.parent / "none" / "out"), "There is no folder"),
    ):
        argv = files.argv()
        argv[2] = output
        assert main(argv) == 1
        assert message in failure(capsys)
    assert files.input.read_bytes() == b'{"prompt": "a"}\n'


def test_a_full_disk_is_named(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = batch_files.Answers(files.output)

    class Full:
        def write(self, line: memoryview) -> int:
            if len(line) > 10:
                return 10
            raise OSError(28, "No space left on device")

    answers._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left") as raised:
        answers.add({"index": 0, "text": "abcdef"})
    assert raised.value.filename == str(files.output)


def test_slots_and_queue_limit_reach_the_model(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    files.ask(*prompts(9))
    assert files.run("--queue-limit", "1") == 0
    assert files.run("--queue-limit", "0") == 0  # nothing is left to do, so nothing is loaded
    files.output.unlink()
    assert files.run("--queue-limit", "0") == 1
    assert "--queue-limit must be an integer of at least 1, got 0." in failure(capsys)
    assert not files.output.exists()
