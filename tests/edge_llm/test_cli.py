"""The commands: what they write, how they end, and what they refuse."""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from unittest.mock import Mock

import pytest

from edge_llm import LLM, Chunk, __version__
from edge_llm.cli import run
from edge_llm.cli.chat import Chat
from edge_llm.cli.command import Command
from edge_llm.cli.layout import Progress, table
from edge_llm.cli.main import main
from edge_llm.errors import ArgumentError, ContextLengthError, RuntimeFailure

Capture = pytest.CaptureFixture[str]
Feed = Callable[[bytes], None]

# Starts the command in a process whose every step takes a while, so that it can be interrupted.
SLOWLY = """
import sys, time
from edge_llm.cli.main import main
from edge_llm.runtime.own_layout import OwnDecoder
step_rows = OwnDecoder.step_rows
def slow(self, *args, **options):
    time.sleep(0.05)
    return step_rows(self, *args, **options)
OwnDecoder.step_rows = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Feed:
    """Puts bytes on stdin."""

    def put(content: bytes) -> None:
        stream = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)

    return put


@pytest.fixture(scope="session")
def base_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle without its chat template."""
    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["chat"]["templates"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def command(*argv: object) -> list[str]:
    """The command as a process of its own."""
    return [sys.executable, "-m", "edge_llm.cli.main", *map(str, argv)]


def failure(capsys: Capture, *argv: str) -> str:
    """The one line that a failing command writes."""
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edge-llm: ")
    assert err.count("\n") == 1
    return err


# The command itself


def test_help_names_every_command(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("run", "chat", "info", "bench", "eval", "export"):
        assert f"\n    {command} " in out


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edge-llm {__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["export", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys; from edge_llm.cli.main import main; main(sys.argv[1:]); "
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "edge_llm_export" in loaded
    heavy = {"numpy", "onnxruntime", "onnx", "tokenizers", "jinja2", "tqdm", "huggingface_hub"}
    assert not heavy & loaded


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice"),
        (["info"], "FOLDER"),
        (["import", "x"], "-o/--output"),
        (["run", "-m", "x", "hello", "--max-token", "3"], "unrecognized arguments: --max-token"),
        (["run", "-m", "x", "hello", "--temperature", "hot"], "invalid float value"),
        (["run", "-m", "x", "hello", "--raw", "--chat"], "not allowed with"),
        (["run", "-m", "x", "hello", "--raw", "--system", "y"], "drop --raw"),
        (["run", "-m", "x", "hello", "--logprobs", "1"], "--logprobs needs --json"),
        (["export", "x"], "-o/--output"),
        (["export", "x", "-o", "y", "--block", "48"], "invalid choice: 48"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: Capture) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: edge-llm")
    assert message in err


@pytest.mark.parametrize("argv", [["run", "hello", "-m"], ["chat", "-m"], ["info"]])
def test_missing_bundle(argv: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert "There is no folder" in failure(capsys, *argv, str(tmp_path / "none"))
    assert "is not a bundle" in failure(capsys, *argv, str(tmp_path))


def test_altered_bundle(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(tiny_bundle, folder)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    for argv in (["info"], ["run", "hello", "--max-tokens", "1", "-m"]):
        assert "'model.onnx.data' is altered" in failure(capsys, *argv, str(folder), "--verify")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "3"], "--top-p must be a number from 0 to 1, got 3.0."),
        (["--max-tokens", "0"], "--max-tokens must be an integer of at least 1, got 0."),
        (["--max-tokens", "500"], "tokens too many"),
        (["--context", "9999"], "--context must be an integer from 2 to 256, got 9999."),
        (["--threads", "0"], "--threads must be"),
        (["--template", "none"], "has no chat template 'none'. It has: default."),
    ],
)
def test_values_outside_their_domain(
    flags: list[str], message: str, tiny_bundle: Path, capsys: Capture
) -> None:
    assert message in failure(capsys, "run", "-m", str(tiny_bundle), "hello", *flags)


def test_only_what_was_given_is_called_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(arguments: object) -> int:
        raise ArgumentError("top_k", "an integer of at least 0", -1)

    monkeypatch.setattr(run, "COMMAND", Command("run", "", run.COMMAND.configure, refuse))
    assert failure(capsys, "run").startswith("edge-llm: top_k must be")
    assert failure(capsys, "run", "--top-k", "-1").startswith("edge-llm: --top-k must be")


def test_unreadable_file_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def refuse(arguments: object) -> int:
        raise PermissionError(13, "Permission denied", "model.onnx")

    monkeypatch.setattr(run, "COMMAND", Command("run", "", lambda parser: None, refuse))
    assert failure(capsys, "run") == "edge-llm: model.onnx: Permission denied\n"


def test_what_is_nobodys_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(arguments: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(run, "COMMAND", Command("run", "", lambda parser: None, crash))
    with pytest.raises(ZeroDivisionError):
        main(["run"])


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(arguments: object) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(run, "COMMAND", Command("run", "", lambda parser: None, interrupt))
    assert main(["run"]) == 130
    assert capsys.readouterr() == ("", "")


def test_verbose_logs_to_stderr_before_and_behind_the_command(
    tiny_bundle: Path, capsys: Capture
) -> None:
    rest = ["-m", str(tiny_bundle), "hello", "--max-tokens", "1"]
    for argv in (["-v", "run", *rest], ["run", *rest, "--verbose"]):
        assert main(argv) == 0
        assert "edge_llm DEBUG opening" in capsys.readouterr().err
    assert main(["run", *rest]) == 0
    assert "DEBUG" not in capsys.readouterr().err
    assert logging.getLogger("edge_llm").level == logging.NOTSET


@pytest.mark.parametrize("argv", [["info"], ["run", "hello", "-m"]])
def test_closed_pipe_ends_quietly(argv: list[str], tiny_bundle: Path) -> None:
    process = subprocess.Popen(
        command(*argv, tiny_bundle),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stream:
        assert stream.read() == b""
    assert process.wait(timeout=60) == 141


posix = pytest.mark.skipif(sys.platform == "win32", reason="sh redirects otherwise there")


def redirected(
    redirection: str, *argv: object, unbuffered: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command, started by a shell with a redirection."""
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
    return subprocess.run(
        [*shell, *command(*argv)],
        env={**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@posix
@pytest.mark.parametrize("argv", [["chat", "-m"], ["run", "-m"], ["run", "-", "-m"]])
def test_closed_stdin(argv: list[str], tiny_bundle: Path) -> None:
    done = redirected("<&-", *argv, tiny_bundle)
    assert done.stderr.startswith("edge-llm: stdin is closed. ")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


@posix
def test_closed_stdin_that_is_not_needed(tiny_bundle: Path) -> None:
    done = redirected("<&-", "run", "hello", "--max-tokens", 1, "-m", tiny_bundle)
    assert (done.returncode, done.stderr) == (0, "(cut off: --max-tokens)\n")


@posix
@pytest.mark.parametrize("argv", [["chat", "-m"], ["run", "hello", "-m"], ["info"]])
def test_closed_stdout(argv: list[str], tiny_bundle: Path) -> None:
    done = redirected(">&-", *argv, tiny_bundle)
    assert (done.returncode, done.stderr) == (1, "edge-llm: stdout is closed.\n")


@posix
def test_closed_stderr_leaves_stdout_clean(tiny_bundle: Path, tmp_path: Path) -> None:
    argv = ["run", "hello", "--max-tokens", 1, "--stats", "-m", tiny_bundle]
    assert redirected("2>&-", *argv).stdout == redirected("2>/dev/null", *argv).stdout
    done = redirected("2>&-", "info", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")


@full
@pytest.mark.parametrize(
    "argv",
    [
        ["info", "--help"],  # printed by argparse
        ["info"],
        ["info", "--json"],
        ["run", "hello", "-m"],
        ["run", "hello", "--json", "--logprobs", "50", "-m"],  # more than a buffer
    ],
)
def test_full_stdout(argv: list[str], tiny_bundle: Path) -> None:
    done = redirected(">/dev/full", *argv, tiny_bundle)
    expected = (1, "edge-llm: stdout: No space left on device\n")
    assert (done.returncode, done.stderr) == expected
    if "--help" not in argv:
        done = redirected(">/dev/full", *argv, tiny_bundle, unbuffered=True)
        assert (done.returncode, done.stderr) == expected


@full
@pytest.mark.parametrize("unbuffered", [False, True])
def test_full_stdout_does_not_hide_another_error(unbuffered: bool, tmp_path: Path) -> None:
    done = redirected(">/dev/full", "info", tmp_path, unbuffered=unbuffered)
    assert done.returncode == 1
    assert "is not a bundle" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_not_taken_for_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "COMMAND", Command("run", "", lambda parser: None, refuse))
    with pytest.raises(OSError, match="No space left"):
        main(["run"])


# Commands of other packages


class Entry:
    """An entry point, as importlib.metadata gives them."""

    def __init__(self, name: str, value: Command | Exception) -> None:
        self.name = name
        self._value = value

    def load(self) -> Command:
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


def use_entry_points(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: entries)


def test_installed_entry_points_name_commands() -> None:
    entries = importlib.metadata.entry_points(group="edge_llm.commands")
    assert "export" in entries.names
    for entry in entries:
        command = entry.load()
        assert isinstance(command, Command)
        assert command.name == entry.name


def test_another_package_brings_a_command(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--times", type=int)

    def run_it(arguments: Any) -> int:
        print("dance " * arguments.times)
        return 7

    use_entry_points(monkeypatch, Entry("dance", Command("dance", "dances", configure, run_it)))
    assert main(["dance", "--times", "2"]) == 7
    assert capsys.readouterr().out == "dance dance \n"


@pytest.mark.parametrize("entries", [(), (Entry("export", ImportError("no edge_llm_export")),)])
def test_export_without_its_package_names_the_remedy(
    entries: tuple[Entry, ...], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    use_entry_points(monkeypatch, *entries)
    message = failure(capsys, "export", "somewhere", "-o", "there", "--block", "32")
    assert "pip install 'edge-llm[export]'" in message


def test_a_broken_command_leaves_the_others_alone(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    use_entry_points(monkeypatch, Entry("dance", AttributeError("no COMMAND")))
    assert main(["info", str(tiny_bundle)]) == 0
    capsys.readouterr()
    assert "`edge-llm dance` cannot run: no COMMAND." in failure(capsys, "dance")


# run


def test_run_uses_the_chat_template(tiny_bundle: Path, tiny_llm: LLM, capsys: Capture) -> None:
    messages = [{"role": "user", "content": "hello"}]
    expected = tiny_llm.chat(messages, max_tokens=12).text
    assert main(["run", "-m", str(tiny_bundle), "hello", "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out == expected.removesuffix("\n") + "\n"
    assert err == "(cut off: --max-tokens)\n"
    assert main(["run", "-m", str(tiny_bundle), "hello", "--max-tokens", "12", "--chat"]) == 0
    assert capsys.readouterr().out == expected.removesuffix("\n") + "\n"


def test_run_system_message(tiny_bundle: Path, tiny_llm: LLM, capsys: Capture) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    argv = ["run", "-m", str(tiny_bundle), "hello", "--system", "Be brief.", "--json"]
    assert main([*argv, "--max-tokens", "4"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["usage"]["prompt_tokens"] == len(tiny_llm.apply_chat_template(messages))


@pytest.mark.parametrize(("source", "argument"), [("argument", ["a b"]), ("dash", ["-"]), ("", [])])
def test_run_takes_the_prompt_raw(
    source: str,
    argument: list[str],
    tiny_bundle: Path,
    tiny_llm: LLM,
    feed: Feed,
    capsys: Capture,
) -> None:
    feed(b"never read" if source == "argument" else b"a b\n")
    argv = ["run", "-m", str(tiny_bundle), *argument, "--raw", "--json", "--max-tokens", "8"]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    expected = tiny_llm.generate("a b", max_tokens=8)
    assert document["text"] == expected.text
    assert document["tokens"] == list(expected.tokens)
    assert document["usage"]["prompt_tokens"] == len(tiny_llm.tokenize("a b"))


def test_run_json(tiny_bundle: Path, capsys: Capture) -> None:
    argv = ["run", "-m", str(tiny_bundle), "hello", "--json", "--max-tokens", "3"]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"text", "tokens", "finish_reason", "usage", "timings"}
    assert document["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == len(document["tokens"]) == 3
    assert main([*argv, "--logprobs", "2"]) == 0
    logprobs = json.loads(capsys.readouterr().out)["logprobs"]
    assert [entry["token"] for entry in logprobs] == document["tokens"]
    assert all(entry["top"][0] == [entry["token"], entry["logprob"]] for entry in logprobs)


def test_run_flags_reach_the_model(tiny_bundle: Path, tiny_llm: LLM, capsys: Capture) -> None:
    options: dict[str, Any] = {
        "max_tokens": 20,
        "min_tokens": 2,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.1,
        "seed": 11,
        "timeout": 60,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["run", "-m", str(tiny_bundle), "one", "--raw", "--json", *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] == list(tiny_llm.generate("one", **options).tokens)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "3"], "(cut off: --max-tokens)\n"),
        (["--context", "40", "--min-tokens", "2"], "(cut off: the context is full)\n"),
        (["--timeout", "1e-9"], "(stopped: the time was up)\n"),
    ],
)
def test_run_says_why_an_answer_is_short(
    flags: list[str], message: str, tiny_bundle: Path, capsys: Capture
) -> None:
    argv = ["run", "-m", str(tiny_bundle), "hello", "--raw", *flags]
    assert main(argv) == 0
    assert capsys.readouterr().err == message
    assert main([*argv, "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_run_stops_before_a_text(tiny_bundle: Path, tiny_llm: LLM, capsys: Capture) -> None:
    text = tiny_llm.generate("It was the", max_tokens=30).text
    stop = text[5]
    argv = ["run", "-m", str(tiny_bundle), "It was the", "--raw", "--max-tokens", "30"]
    assert main([*argv, "--stop", "\x00", "--stop", stop]) == 0
    assert capsys.readouterr() == (text[: text.index(stop)] + "\n", "")


def test_run_stats_go_to_stderr(tiny_bundle: Path, capsys: Capture) -> None:
    assert main(["run", "-m", str(tiny_bundle), "hello", "--stats", "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "answer 5 tokens (length)" in err
    assert "tok/s" in err


def test_run_continues_a_base_model(base_bundle: Path, tiny_llm: LLM, capsys: Capture) -> None:
    assert main(["run", "-m", str(base_bundle), "a b", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == tiny_llm.generate("a b", max_tokens=8).text + "\n"
    message = failure(capsys, "run", "-m", str(base_bundle), "hello", "--chat")
    assert "`edge-llm run --raw`" in message


def test_run_without_a_prompt_at_a_terminal(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["run", "-m", str(tiny_bundle)]) == 2
    assert "no prompt given" in capsys.readouterr().err


def test_run_refuses_bytes_that_are_no_text(tiny_bundle: Path, feed: Feed, capsys: Capture) -> None:
    feed(b"caf\xe9")
    assert "stdin is not text in UTF-8" in failure(capsys, "run", "-m", str(tiny_bundle))
    assert "PROMPT is not text" in failure(capsys, "run", "-m", str(tiny_bundle), "caf\udce9")


def test_answer_in_an_encoding_that_lacks_its_characters(tiny_bundle: Path) -> None:
    done = subprocess.run(
        command("run", "-m", tiny_bundle, "hello", "--max-tokens", 5),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode("ascii").endswith("\n")
    assert done.stderr == b"(cut off: --max-tokens)\n"


# chat


def test_chat_from_a_pipe(tiny_bundle: Path, tiny_llm: LLM, feed: Feed, capsys: Capture) -> None:
    first = [{"role": "user", "content": "one"}]
    one = tiny_llm.chat(first, max_tokens=6).text
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "two"}]
    two = tiny_llm.chat(second, max_tokens=6).text
    feed(b"one\n\n/stats\n  two  \n/reset\none\n/dance\n/help\n/exit\nnever\n")
    assert main(["chat", "-m", str(tiny_bundle), "--max-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(text.removesuffix("\n") + "\n" for text in (one, two, one))
    assert "answer 6 tokens (length)" in err
    assert "1 turns" in err
    assert "(cut off: --max-tokens)" in err
    assert "There is no command /dance." in err
    assert "/reset" in err


def test_chat_ends_with_its_input(tiny_bundle: Path, feed: Feed, capsys: Capture) -> None:
    feed(b"one")
    assert main(["chat", "-m", str(tiny_bundle), "--max-tokens", "3", "--system", "Be."]) == 0
    assert capsys.readouterr().out


def test_chat_needs_a_template(base_bundle: Path, feed: Feed, capsys: Capture) -> None:
    feed(b"one\n")
    message = failure(capsys, "chat", "-m", str(base_bundle))
    assert "base model" in message
    assert "`edge-llm run --raw`" in message


def test_chat_in_a_pipe_ends_at_an_error(tiny_bundle: Path, feed: Feed, capsys: Capture) -> None:
    feed(b"word " * 300 + b"\nnever answered\n")
    assert "tokens too many" in failure(capsys, "chat", "-m", str(tiny_bundle))


@pytest.fixture
def small_llm(tiny_bundle: Path) -> Iterator[LLM]:
    with LLM(tiny_bundle, context=120) as llm:
        yield llm


def test_chat_forgets_the_oldest_turns(small_llm: LLM, capsys: Capture) -> None:
    chat = Chat(small_llm, system="Be.", template="default", options={"max_tokens": 4})
    prompts = []
    for turn in range(12):
        chat.answer(f"turn {turn}")
        assert chat.history[-2] == {"role": "user", "content": f"turn {turn}"}
        assert [message["role"] for message in chat.history[:2]] == ["user", "assistant"]
        assert chat._last is not None
        assert chat._last.usage is not None
        prompts.append(chat._last.usage.prompt_tokens)
    assert max(prompts) <= 116
    # A turn that forgets makes room for several: the sawtooth falls seldom, and to about half.
    falls = [after for before, after in itertools.pairwise(prompts) if after < before]
    assert 1 <= len(falls) <= 5
    assert max(falls) <= 60
    assert len(chat.history) < 24
    err = capsys.readouterr().err
    assert err.count("forgot the oldest") == len(falls)


def test_a_refused_message_costs_nothing(small_llm: LLM, capsys: Capture) -> None:
    chat = Chat(small_llm, system=None, template="default", options={"max_tokens": 4})
    chat.answer("one")
    chat.answer("two")
    before = [*chat.history]
    assert len(before) == 4
    with pytest.raises(ContextLengthError) as refused:
        chat.answer("word " * 200)
    alone = [{"role": "user", "content": "word " * 200}]
    assert refused.value.prompt_tokens == len(small_llm.apply_chat_template(alone))
    assert chat.history == before
    assert "forgot" not in capsys.readouterr().err
    chat.handle("/stats")
    assert "2 turns" in capsys.readouterr().err
    chat.answer("three")
    assert chat.history[:5] == [*before, {"role": "user", "content": "three"}]


def test_a_message_that_fills_the_context_alone_is_answered(small_llm: LLM) -> None:
    chat = Chat(small_llm, system=None, template="default", options={"max_tokens": 4})
    chat.answer("one")
    text, longer = "", "x"
    while len(small_llm.apply_chat_template([{"role": "user", "content": longer}])) <= 116:
        text, longer = longer, longer + "x"
    chat.answer(text)
    assert [message["content"] for message in chat.history[:-1]] == [text]
    with pytest.raises(ContextLengthError):
        chat.answer(longer)
    assert [message["content"] for message in chat.history[:-1]] == [text]


def test_forgetting_does_not_encode_the_conversation_for_every_turn(
    small_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(small_llm, system=None, template="default", options={"max_tokens": 4})
    turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    chat.history = turn * 500
    encode = small_llm.apply_chat_template
    spy = Mock(side_effect=encode)
    monkeypatch.setattr(small_llm, "apply_chat_template", spy)
    chat.answer("one")
    assert spy.call_count <= 12  # one for all, at most 10 to bisect, one to answer
    kept = len(chat.history)
    tokens = [len(encode([*(turn * n), turn[0]])) for n in (kept // 2 - 1, kept // 2)]
    assert kept > 2
    assert tokens[0] <= 58 < tokens[1]


def test_stats_after_a_failed_answer_are_those_of_the_last_whole_one(
    small_llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(messages: object, **options: object) -> Iterator[Chunk]:
        yield Chunk(text="half", tokens=(5,))
        raise RuntimeFailure("The step failed.")

    chat = Chat(small_llm, system=None, template="default", options={"max_tokens": 4})
    answer = small_llm.stream_chat
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(small_llm, "stream_chat", answer)
            chat.answer("one")
        monkeypatch.setattr(small_llm, "stream_chat", fail)
        with pytest.raises(RuntimeFailure):
            chat.answer("two")
        capsys.readouterr()
        chat.handle("/stats")
        expected = "answer 4 tokens (length)" if whole else "There is no answer yet."
        assert expected in capsys.readouterr().err


def test_chat_says_why_an_answer_is_short(small_llm: LLM, capsys: Capture) -> None:
    chat = Chat(small_llm, system=None, template="default", options={"min_tokens": 1})
    chat.answer("one")
    assert "(cut off: the context is full)" in capsys.readouterr().err
    chat = Chat(small_llm, system=None, template="default", options={"timeout": 1e-9})
    chat.answer("one")
    assert "(stopped: the time was up)" in capsys.readouterr().err


def until(stream: IO[bytes], mark: bytes) -> bytes:
    """What comes up to a mark, or up to the end."""
    found = b""
    while mark not in found and (piece := stream.read(1)):
        found += piece
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent otherwise there")
def test_interrupt_stops_the_answer_and_not_the_chat(tiny_bundle: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "chat", "-m", tiny_bundle, "--min-tokens", "100"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdin as stdin, process.stdout as stdout, process.stderr as stderr:
        for _ in range(2):
            stdin.write(b"one\n")
            assert stdout.read(1)  # an answer has begun
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert until(stderr, b"(stopped)\n") == b"(stopped)\n"
            assert time.monotonic() - started < 2  # all of it would take 5 s
            assert until(stdout, b"\n").endswith(b"\n")
        stdin.write(b"/stats\n")
        stats = until(stderr, b"turns\n")
        assert b"(cancelled)" in stats
        assert b"2 turns" in stats
        stdin.close()
        assert process.wait(timeout=30) == 0
    watchdog.cancel()


class Terminal:
    """The slowed command at a pseudo-terminal."""

    def __init__(self, *argv: str) -> None:
        import pty

        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        # Ctrl-C itself would need a session of its own, whose end takes some kernels for ever.
        self.process.send_signal(signal.SIGINT)

    def until(self, mark: str) -> str:
        found = b""
        while mark.encode() not in found:
            assert select.select([self._master], [], [], 30)[0], found
            found += os.read(self._master, 1)
        return found.decode(errors="replace")

    def end(self) -> int:
        status = self.process.wait(timeout=30)
        os.close(self._master)
        return status


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize(("ending", "status"), [("Ctrl-C", 130), ("\x04", 0), ("/exit\r", 0)])
def test_chat_at_a_terminal(ending: str, status: int, tiny_bundle: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny_bundle), "--min-tokens", "200")
    assert "/help lists the commands" in terminal.until("> ")
    terminal.type("one\r")
    terminal.until("one\r\n")
    time.sleep(0.03)  # the answer has begun, and is not at its end
    terminal.interrupt()
    terminal.until("(stopped)")
    terminal.until("> ")
    if ending == "Ctrl-C":
        for mark in ("Ctrl-C again", None):
            # readline misses a signal that comes between its prompt and its waiting.
            time.sleep(0.5)
            terminal.interrupt()
            if mark:
                terminal.until(mark)
                terminal.until("> ")
    else:
        terminal.type(ending)
    assert terminal.end() == status


# info


def test_info_in_words(tiny_bundle: Path, capsys: Capture) -> None:
    assert main(["info", str(tiny_bundle), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in (
        "llama, 3 layers of width 64 (MLP 172)",
        "none: float32",
        "chat templates   default",
        "not measured",
        "model.onnx.data",
        "(verified)",
        "256 tokens",
        "a prediction",
        "This machine",
    ):
        assert text in out


def test_info_json(tiny_bundle: Path, capsys: Capture) -> None:
    assert main(["info", str(tiny_bundle), "--json", "--context", "64", "256"]) == 0
    document = json.loads(capsys.readouterr().out)
    stored = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))
    assert document["manifest"] == stored
    assert document["verified"] is False
    assert document["size"] == sum(entry["size"] for entry in stored["files"].values())
    # 3 layers of keys and values, 4 heads, 8 numbers padded to 16, float32
    caches = {context: one["kv"] for context, one in document["memory"]["contexts"].items()}
    assert caches == {"64": 98304, "256": 393216}
    assert document["memory"]["compiled"] is None
    assert document["memory"]["cache_per_token"] == 98304 / 64
    assert document["memory"]["cache_windows"] == 0
    data = (tiny_bundle / "model.onnx.data").stat().st_size
    whole = document["memory"]["contexts"]["256"]
    assert 0 < whole["weights_file"] < data
    assert whole["total"] == sum(size for name, size in whole.items() if name != "total")
    assert document["machine"]["cores"] >= 1


def test_info_shows_the_usual_contexts_that_fit(tiny_bundle: Path, capsys: Capture) -> None:
    assert main(["info", str(tiny_bundle), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["memory"]["contexts"]) == ["256"]
    message = failure(capsys, "info", str(tiny_bundle), "--context", "257")
    assert "--context must be from 1 to 256 (what was exported), got 257." in message


def test_info_tells_what_was_measured(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "measured"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["quality"] = [{"metric": "KLD", "data": "books", "reference": 0.0, "value": 0.006}]
    manifest["quantization"] = {"method": "rtn", "bits": 4, "block": 32, "exceptions": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "KLD on books: 0.006 (float32: 0)" in out
    manifest["quality"][0] |= {"standard_error": 0.00035, "window": 256, "stride": 128}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "KLD on books in windows of 256 tokens: 0.006 ± 0.00035 (float32: 0)" in out
    assert "4 bits, a scale per 32 weights, rtn" in out


def test_info_tells_windows_from_what_grows(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "sliding"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["dims"]["context"] = 8192
    for one in manifest["decoder"]["state"][2:]:  # two of the three layers
        one |= {"kind": "window", "window": 100}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main(["info", str(folder), "--json", "--context", "256", "4096", "8192"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    token = 2 * 4 * 16 * 4  # of one layer: keys and values, 4 heads, 16 numbers, float32
    fixed = 2 * token * (100 + 512)
    assert memory["cache_per_token"] == token
    assert memory["cache_windows"] == fixed
    whole = {"256": 3 * 256 * token, "4096": 4096 * token + fixed, "8192": 8192 * token + fixed}
    assert {context: one["kv"] for context, one in memory["contexts"].items()} == whole
    assert main(["info", str(folder)]) == 0
    text = "512 bytes a token of the context, and up to 0.6 MB for windows, however long it is"
    assert text in capsys.readouterr().out


def test_info_does_not_load_onnxruntime(tiny_bundle: Path) -> None:
    code = (
        "import sys; from edge_llm.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "assert 'onnxruntime' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "info", str(tiny_bundle)], check=True)


# bench


def test_bench(tiny_bundle: Path, capsys: Capture) -> None:
    argv = ["bench", "-m", str(tiny_bundle), "--max-tokens", "8", "--repeats", "1"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    for text in ("prompt of 128 tokens", "prompt of 248 tokens", "decode 8 tokens", "onnxruntime"):
        assert text in out
    assert "tok/s" in out
    assert main([*argv, "--prompt-tokens", "16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["prompt_tokens"] for one in document["prompt"]] == [16]
    assert document["decode"]["prompt_tokens"] == 16
    assert document["repeats"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "1"], "--max-tokens must be an integer of at least 2"),
        (["--repeats", "0"], "--repeats must be"),
        (["--prompt-tokens", "0"], "--prompt-tokens must be"),
        (["--prompt-tokens", "256"], "tokens too many"),
    ],
)
def test_bench_refuses(flags: list[str], message: str, tiny_bundle: Path, capsys: Capture) -> None:
    assert message in failure(capsys, "bench", "-m", str(tiny_bundle), *flags)


# layout


def test_table_aligns() -> None:
    assert table([("a", 1, "x"), ("bcd", 22, "yy")], indent=" ") == " a     1   x\n bcd  22  yy"


def test_progress_writes_over_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress()
    progress.show("reading")
    progress.show("done")
    progress.show("")
    assert stream.getvalue() == "\rreading\rdone   \r    \r"


def test_warnings_are_a_line_without_code(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "edge_llm.cli.main", "compile", str(tiny_bundle)]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=False,
    )
    first, second = done.stderr.splitlines()
    assert first.startswith("edge-llm: warning: The cache folder")
    assert second.startswith("edge-llm: Nothing was compiled")
    assert done.returncode == 1


@pytest.mark.parametrize("command", ["compile", "tune", "run"])
def test_an_empty_path_is_no_folder(
    command: str, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = ["-m", str(tiny_bundle), "Hello"] if command == "run" else [str(tiny_bundle)]
    assert main([command, *bundle, "--cache-dir", ""]) == 1
    assert "--cache-dir must be the path of a folder" in capsys.readouterr().err
