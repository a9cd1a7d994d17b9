"""Prefixes on the disk: the same answers sooner, and nothing that is trusted wrongly."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from edge_llm import LLM, ArgumentError, Bundle, Completion, ContextLengthError
from edge_llm.builtin import BUNDLE
from edge_llm.caching import prefixes as module
from edge_llm.caching.prefixes import BAKED, PrefixCache
from edge_llm.caching.state_file import SavedState
from edge_llm.cli.main import main
from edge_llm.errors import CacheWarning, SessionError
from edge_llm.results import PrefixBreak
from edge_llm.runtime import device
from edge_llm.runtime.kv_cache import KVCache
from edge_llm.states import default_prefix_cache, open_prefixes, state_owner
from edge_llm_export import Calibration, export_model

WORTH = 8
TOKENS = [int(token) for token in np.random.default_rng(0).integers(2, 300, 200)]
SYSTEM = "You are a lamp. It was the best of lamps, it was the worst of lamps."


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this user's own, which is not there; short prompts are worth keeping."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "WORTH", WORTH)
    return tmp_path / "home"


def answer(llm: LLM, prompt: list[int], **options: Any) -> Completion:
    settings: dict[str, Any] = {"max_tokens": 6, "min_tokens": 6, "temperature": 0, "logprobs": 3}
    return llm.generate(prompt, **(settings | options))


def ask(bundle: Path, prompt: list[int], **options: Any) -> Completion:
    """One answer of a model that is loaded for it and closed behind it."""
    with LLM(bundle, threads=1, **options) as llm:
        return answer(llm, prompt)


def entries(folder: Path) -> list[str]:
    """The names of a folder's entries, baked ones last."""
    names = [one.name for one in folder.glob("[!.]*")] if folder.is_dir() else []
    return sorted(names, key=lambda name: (name.startswith(BAKED), name))


def same(one: Completion, other: Completion) -> bool:
    """Whether two answers are one; a prompt's last tokens alone round otherwise than all of it."""
    assert one.logprobs is not None
    assert other.logprobs is not None
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    return one.tokens == other.tokens and all(abs(a.logprob - b.logprob) < 1e-5 for a, b in pairs)


def test_another_process_need_not_compute_it(tiny_bundle: Path, tmp_path: Path) -> None:
    prompt, cache = TOKENS[:60], tmp_path / "cache"
    plain = ask(tiny_bundle, prompt)
    first = ask(tiny_bundle, prompt, prefix_cache=cache)
    assert first.usage.reused_tokens == 0
    assert len(entries(cache)) == 1
    again = ask(tiny_bundle, prompt, prefix_cache=cache)
    assert (again.usage.reused_tokens, again.usage.reused_from_disk) == (58, 58)
    assert again.usage.prefix_break is None
    longer = ask(tiny_bundle, [*prompt, *TOKENS[100:110]], prefix_cache=cache)
    assert longer.usage.reused_from_disk == 58  # all but the last two tokens are kept
    assert same(plain, first)
    assert same(plain, again)
    assert same(longer, ask(tiny_bundle, [*prompt, *TOKENS[100:110]]))
    assert len(entries(cache)) == 1  # what came behind it was not worth a second one


def test_a_part_serves_too_and_the_token_is_told_that_broke_it(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    ask(tiny_bundle, TOKENS[:100], prefix_cache=tmp_path)
    ask(tiny_bundle, [*TOKENS[:40], *TOKENS[120:180]], prefix_cache=tmp_path)
    assert len(entries(tmp_path)) == 2
    for common, other in ((70, 250), (41, 251)):
        prompt = [*TOKENS[:common], other, *TOKENS[:20]]
        assert TOKENS[common] != other
        got = ask(tiny_bundle, prompt, prefix_cache=tmp_path)
        assert got.usage.reused_from_disk == common
        assert got.usage.prefix_break == PrefixBreak(
            position=common, cached=TOKENS[common], prompt=other
        )
        assert same(got, ask(tiny_bundle, prompt))
    strange = ask(tiny_bundle, [TOKENS[0] + 1, *TOKENS[1:50]], prefix_cache=tmp_path)
    assert strange.usage.reused_tokens == 0
    assert strange.usage.prefix_break is None


def test_memory_comes_first_and_the_break_is_told_without_a_cache(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle) as llm:
        answer(llm, TOKENS[:50])
        other = (TOKENS[30] + 1) % 300
        usage = answer(llm, [*TOKENS[:30], other, *TOKENS[31:50]]).usage
        assert (usage.reused_tokens, usage.reused_from_disk) == (30, 0)
        assert usage.prefix_break == PrefixBreak(position=30, cached=TOKENS[30], prompt=other)
        assert answer(llm, [*TOKENS[:30], other, *TOKENS[31:50]]).usage.prefix_break is None


def test_what_is_in_memory_is_not_read(tiny_bundle: Path, tmp_path: Path) -> None:
    with LLM(tiny_bundle, prefix_cache=tmp_path, slots=1) as llm:
        llm.bake(TOKENS[:100])
        usage = answer(llm, [*TOKENS[:100], 5, 6, 7]).usage
        assert (usage.reused_tokens, usage.reused_from_disk) == (100, 0)
        answer(llm, TOKENS[150:153])
        usage = answer(llm, [*TOKENS[:100], 5, 6, 7]).usage
        assert (usage.reused_tokens, usage.reused_from_disk) == (100, 100)
        # All but one token of what could be read is there already.
        answer(llm, TOKENS[:99])
        assert answer(llm, [*TOKENS[:100], 5, 6, 7]).usage.reused_from_disk == 0


def test_prompts_are_kept_once(tiny_bundle: Path, tmp_path: Path) -> None:
    with LLM(tiny_bundle, prefix_cache=tmp_path) as llm:
        answer(llm, TOKENS[:WORTH])  # too few
        llm.bake(TOKENS[:20])
    for length in (40, 60, 66, 90):  # a conversation that grows
        ask(tiny_bundle, TOKENS[:length], prefix_cache=tmp_path)
    ask(tiny_bundle, TOKENS[:70], prefix_cache=tmp_path)  # a part of it
    kept, baked = entries(tmp_path)
    assert baked.startswith(BAKED)
    owner = state_owner(Bundle.open(tiny_bundle))
    assert SavedState.open(tmp_path / kept, owner).tokens.tolist() == TOKENS[:88]
    assert SavedState.open(tmp_path / baked, owner).tokens.tolist() == TOKENS[:20]


def test_an_answer_that_is_cancelled_or_edited_meanwhile(tiny_bundle: Path, tmp_path: Path) -> None:
    """The row's beginning changes at once, while it is written or before."""
    with LLM(tiny_bundle, prefix_cache=tmp_path, threads=1) as llm:
        expected = {}
        for start in range(0, 60, 6):
            prompt = TOKENS[start : start + 100]
            expected[start] = answer(llm, prompt)
            chunks = llm.stream(prompt[::-1], max_tokens=20)
            next(chunks)
            chunks.close()  # type: ignore[attr-defined]
    owner = state_owner(Bundle.open(tiny_bundle))
    for name in entries(tmp_path):
        SavedState.open(tmp_path / name, owner).verify()
    for start, one in expected.items():
        assert same(one, ask(tiny_bundle, TOKENS[start : start + 100], prefix_cache=tmp_path))


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "short":
        del content[-1:]
    elif kind == "empty":
        content.clear()
    elif kind == "magic":
        content[0] ^= 1
    elif kind == "header":
        content[200] ^= 1
    elif kind == "last":
        content[-1] ^= 0x80
    elif kind == "zeros":
        content[-4096:] = bytes(4096)
    elif kind == "middle":
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["short", "empty", "magic", "header", "last", "zeros", "middle"])
def test_what_is_damaged_is_computed_again(kind: str, tiny_bundle: Path, tmp_path: Path) -> None:
    prompt = TOKENS[:60]
    plain = ask(tiny_bundle, prompt, prefix_cache=tmp_path)
    (name,) = entries(tmp_path)
    damage(tmp_path / name, kind)
    again = ask(tiny_bundle, prompt, prefix_cache=tmp_path)
    assert again.usage.reused_tokens == 0
    assert same(plain, again)
    assert ask(tiny_bundle, prompt, prefix_cache=tmp_path).usage.reused_from_disk == 58


def test_another_model_runtime_or_processor_finds_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, cache = Bundle.open(tiny_bundle), tmp_path / "cache"
    owners = {state_owner(bundle)}
    ask(tiny_bundle, TOKENS[:60], prefix_cache=cache)

    def altered(**changes: str) -> Bundle:
        folder = tmp_path / f"altered{len(owners)}"
        shutil.copytree(tiny_bundle, folder)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in changes.items():
            manifest["files"][name.replace("__", ".")]["sha256"] = digest
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return Bundle.open(folder)

    for name in ("model__onnx", "model__onnx__data", "tokenizer__json"):
        other = altered(**{name: "0" * 64})
        owners.add(state_owner(other))
        assert ask(other.path, TOKENS[:60], prefix_cache=cache).usage.reused_tokens == 0
    assert len(owners) == 4
    assert len(entries(cache)) == 4
    (tmp_path / "cpuinfo").write_text("flags: avx2\n", encoding="ascii")
    monkeypatch.setattr(device, "PROC", tmp_path)
    owners.add(state_owner(bundle))
    monkeypatch.setattr("onnxruntime.__version__", "1.99")
    owners.add(state_owner(bundle))
    assert len(owners) == 6


def test_a_file_under_anothers_name_is_not_used(tiny_bundle: Path, tmp_path: Path) -> None:
    """Names are not trusted: not the owner's, and not the tokens'."""
    with LLM(tiny_bundle, prefix_cache=tmp_path) as llm:
        one, other = llm.bake(TOKENS[:50]), llm.bake(TOKENS[80:130])
    content = one.read_bytes()
    other.write_bytes(content)
    assert ask(tiny_bundle, TOKENS[80:140], prefix_cache=tmp_path).usage.reused_tokens == 0
    renamed = one.with_name(one.name.replace(state_owner(Bundle.open(tiny_bundle)), "0" * 32))
    one.rename(renamed)
    other.unlink()
    strange = PrefixCache(tmp_path, owner="0" * 32)
    found = strange.look_up(KVCache((), rows=1, capacity=200), np.array(TOKENS), beyond=0)
    assert (len(found.closest), found.length) == (0, 0)


@pytest.mark.parametrize("quantize", ["fp32", "int4"])
def test_int8_caches(quantize: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    small = Calibration(samples=2, tokens=32)
    export_model(tiny_checkpoint, bundle, quantize=quantize, kv_cache="int8", calibration=small)
    cache = tmp_path / "cache"
    first = ask(bundle, TOKENS[:60], prefix_cache=cache, prefill_chunk=64)
    again = ask(bundle, TOKENS[:60], prefix_cache=cache, prefill_chunk=64)
    assert again.usage.reused_from_disk == 58
    assert again.tokens == first.tokens
    (name,) = entries(cache)
    saved = SavedState.open(cache / name, state_owner(Bundle.open(bundle)))
    assert {str(array.dtype) for array in saved.arrays.values()} == {"int8"}


@pytest.mark.parametrize("length", [150, 560, 600])
def test_windows(length: int, make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Before the windows' buffers are full, behind that, and where an answer moves them on."""
    settings = {"head_dim": 16, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16}
    make_checkpoint(
        tmp_path / "checkpoint",
        "gemma3_text",
        sliding_window=64,
        max_position_embeddings=1024,
        **settings,
    )
    bundle, cache = tmp_path / "bundle", tmp_path / "cache"
    export_model(tmp_path / "checkpoint", bundle, quantize="fp32")
    prompt = [int(one) for one in np.random.default_rng(1).integers(2, 300, length)]

    def long(llm: LLM, prompt: list[int]) -> Completion:
        return answer(llm, prompt, max_tokens=40, min_tokens=40)

    with LLM(bundle, prefix_cache=cache, slots=1) as llm:
        first = long(llm, prompt)
    with LLM(bundle, prefix_cache=cache, slots=1) as llm:
        again = long(llm, prompt)
        assert again.usage.reused_from_disk == length - 2
        assert again.tokens == first.tokens
        assert long(llm, TOKENS[:3]).usage.reused_tokens == 0
        # Far back, where windows have dropped what they would need.
        part = [*prompt[: length - 60], *TOKENS[:20]]
        parted = long(llm, part)
        assert parted.usage.reused_from_disk == (length - 60 if length != 600 else 0)
    with LLM(bundle) as llm:
        assert long(llm, part).tokens == parted.tokens


def test_the_limit_holds_and_baked_prefixes_go_last(tiny_bundle: Path, tmp_path: Path) -> None:
    with LLM(tiny_bundle, prefix_cache=tmp_path) as llm:
        size = llm.bake(TOKENS[:60]).stat().st_size
    limit = int(3.5 * size)
    for start in range(10, 100, 15):
        ask(
            tiny_bundle,
            TOKENS[start : start + 60],
            prefix_cache=tmp_path,
            prefix_cache_limit=limit,
        )
        assert sum(one.stat().st_size for one in tmp_path.iterdir()) <= limit
    assert [name.startswith(BAKED) for name in entries(tmp_path)] == [False, False, True]
    usage = ask(tiny_bundle, TOKENS[85:145], prefix_cache=tmp_path).usage
    assert usage.reused_from_disk == 58  # the last one
    assert ask(tiny_bundle, TOKENS[25:85], prefix_cache=tmp_path).usage.reused_tokens == 0
    with (
        LLM(tiny_bundle, prefix_cache=tmp_path / "small", prefix_cache_limit="1KB") as llm,
        pytest.raises(SessionError, match="Nothing was baked"),
    ):
        llm.bake(TOKENS[:60])


def test_what_is_larger_than_the_limit_is_not_even_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(module, "write_state", lambda path, *others: written.append(path))
    ask(tiny_bundle, TOKENS[:60], prefix_cache=tmp_path, prefix_cache_limit="1KB")
    assert not written
    assert not entries(tmp_path)


def test_a_folder_that_cannot_be_written_costs_one_warning(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LLM(tiny_bundle, prefix_cache=tmp_path / "file") as llm:
            for start in range(3):
                got = answer(llm, TOKENS[start : start + 60])
                llm.stream(TOKENS[:3], max_tokens=1)
    assert [one.category for one in caught] == [CacheWarning]
    assert same(got, ask(tiny_bundle, TOKENS[2:62]))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="rights do not bind this user"
)
def test_a_folder_without_rights_is_still_read(tiny_bundle: Path, tmp_path: Path) -> None:
    ask(tiny_bundle, TOKENS[:60], prefix_cache=tmp_path)
    tmp_path.chmod(0o500)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with LLM(tiny_bundle, prefix_cache=tmp_path) as llm:
                assert answer(llm, TOKENS[:60]).usage.reused_from_disk == 58
                answer(llm, TOKENS[100:160])
        assert [one.category for one in caught] == [CacheWarning]
    finally:
        tmp_path.chmod(0o700)


def test_a_system_without_a_thread_left_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = PrefixCache(tmp_path / "cache", owner="ab" * 16)
    cache = KVCache((), rows=1, capacity=600)
    cache.advance(0, 400)
    offer = prefixes.offer(cache, 0, np.arange(400), computed=400)
    assert offer is not None

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    offer.write()
    monkeypatch.undo()
    waiting = threading.Thread(target=offer.release, daemon=True)
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.mark.parametrize("where", ["offers.Snapshot.of", "prefixes.write_state"])
def test_memory_that_is_short_keeps_nothing_and_harms_nobody(
    where: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise MemoryError("no room")

    monkeypatch.setattr(f"edge_llm.caching.{where}", fail)
    with LLM(tiny_bundle, threads=1, prefix_cache=tmp_path) as llm:
        answer(llm, TOKENS[:60])
        answer(llm, TOKENS[60:])
    assert not entries(tmp_path)


def test_a_full_disk_costs_one_warning(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tiny_bundle, TOKENS[:60], prefix_cache=tmp_path)

    def full(path: Path, *others: object) -> None:
        path.write_bytes(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_state", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LLM(tiny_bundle, prefix_cache=tmp_path, threads=1) as llm:
            for start in range(80, 100, 5):
                answer(llm, TOKENS[start : start + 60])
            assert answer(llm, TOKENS[:60]).usage.reused_from_disk == 58  # still read
            with pytest.raises(SessionError, match="free some disk space"):
                llm.bake(TOKENS[:30])
    assert [one.category for one in caught] == [CacheWarning]
    assert "No space left" in str(caught[0].message)
    assert len(list(tmp_path.glob("*"))) == 2  # the lock and the first entry: nothing half-written


# A child that keeps, bakes and reads prompts for ever, beside others.
WORKER = """
import random, sys
from pathlib import Path
from edge_llm import LLM
from edge_llm.caching import prefixes
prefixes.WORTH = 8
rng, rounds = random.Random(int(sys.argv[3])), int(sys.argv[4])
tokens = [random.Random(0).randrange(2, 300) for _ in range(400)]
plain = LLM(sys.argv[1], threads=1)
llm = LLM(sys.argv[1], threads=1, prefix_cache=sys.argv[2], prefix_cache_limit="1.5MB")
print("ready", flush=True)
for _ in range(rounds):
    start, length = rng.randrange(10), rng.randrange(60, 200)
    prompt = tokens[20 * start:][:length]
    if rng.random() < 0.1:
        llm.bake(prompt)
    got, expected = (one.generate(prompt, max_tokens=3, logprobs=1) for one in (llm, plain))
    assert got.tokens == expected.tokens, (prompt, got, expected)
    for one, other in zip(got.logprobs, expected.logprobs):
        assert abs(one.logprob - other.logprob) < 1e-5, (prompt, got, expected)
    plain.generate([1, 2], max_tokens=1)
llm.close()
"""


def worker(bundle: Path, folder: Path, seed: int, rounds: int) -> subprocess.Popen[str]:
    values = map(str, (bundle, folder, seed, rounds))
    command = [sys.executable, "-W", "error", "-c", WORKER, *values]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n", child.stderr and child.stderr.read()
    return child


def check_all(bundle: Path, folder: Path) -> int:
    """Every entry is whole; gives how many there are."""
    owner = state_owner(Bundle.open(bundle))
    names = entries(folder)
    for name in names:
        SavedState.open(folder / name, owner).verify()
    return len(names)


def test_a_writer_that_is_killed_leaves_nothing_that_is_trusted_wrongly(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    rng, found = random.Random(0), 0
    for seed in range(12):
        child = worker(tiny_bundle, tmp_path, seed, 10**9)
        time.sleep(rng.uniform(0, 0.25))
        child.kill()
        _, errors = child.communicate()
        assert not errors
        found += check_all(tiny_bundle, tmp_path)
    assert found
    child = worker(tiny_bundle, tmp_path, 99, 20)  # reads what they left, and compares
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert not list(tmp_path.glob(".stage*"))


def test_processes_at_once_do_not_disturb_each_other(tiny_bundle: Path, tmp_path: Path) -> None:
    children = [worker(tiny_bundle, tmp_path, seed, 25) for seed in range(2)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    assert check_all(tiny_bundle, tmp_path)


# Baking


def test_baking_by_command(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a folder it goes where every run looks, and nothing else is ever written there."""
    system = tmp_path / "system.txt"
    system.write_text(SYSTEM + "\n", encoding="utf-8")
    assert main(["bake", str(tiny_bundle), "--system", str(system), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    entry = Path(document["path"])
    assert entry.parent == default_prefix_cache()
    assert document["size"] == entry.stat().st_size
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "On!"}]
    with LLM(tiny_bundle) as llm:
        prompt = llm.apply_chat_template(messages)
        prefix = llm.chat_prefix(messages[:1])
        assert prompt[: len(prefix)] == prefix
        assert llm.detokenize(prefix, skip_special=False).endswith("<|im_start|>user\n")
        usage = llm.chat(messages, max_tokens=2).usage
        assert usage.reused_tokens == usage.reused_from_disk == len(prefix) == document["tokens"]
        with pytest.raises(ArgumentError, match="prefix_cache must be a folder to bake into"):
            llm.bake(prefix)
    assert entries(entry.parent) == [entry.name]
    run = ["run", "-m", str(tiny_bundle), "--system", SYSTEM, "--json", "--max-tokens", "2", "On!"]
    assert main(run) == 0
    usage = json.loads(capsys.readouterr().out)["usage"]
    assert usage["reused_from_disk"] == len(prefix)
    assert usage["prefix_break"] is None
    assert main(["bake", str(tiny_bundle), "--system", str(system)]) == 0
    assert f"Baked {len(prefix)} tokens into {entry} (" in capsys.readouterr().out
    assert entries(entry.parent) == [entry.name]
    assert main(["bake", "--prune"]) == 0
    assert "Freed 0.0" not in capsys.readouterr().out
    assert entries(entry.parent) == []


def test_pruning_takes_nothing_that_is_somebody_elses(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with LLM(tiny_bundle, prefix_cache=tmp_path) as llm:
        entry = llm.bake(TOKENS[:20])
    assert main(["bake", "--prune", "--prefix-cache", str(tmp_path)]) == 0
    assert not entry.exists()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_process_may_go_to_work_elsewhere(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with LLM("bundle", prefix_cache="cache", memory_limit="1GB") as llm:
        monkeypatch.chdir("elsewhere")
        assert llm.bake(TOKENS[:20]).parent == tmp_path / "cache"
        assert llm.memory.total
    with LLM(tmp_path / "bundle") as llm:
        monkeypatch.chdir(tmp_path)
        assert llm.memory.total


def test_baking_text_into_a_folder(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times,", encoding="utf-8")
    cache = str(tmp_path / "cache")
    flags = ["--prefix-cache", cache]
    assert main(["bake", str(tiny_bundle), "--prefix", str(text), *flags]) == 0
    assert "Baked" in capsys.readouterr().out
    run = ["run", "-m", str(tiny_bundle), "--raw", "--stats", "--max-tokens", "2", *flags]
    assert main([*run, text.read_text(encoding="utf-8") + " it was"]) == 0
    assert "reused, from the prefix cache)" in capsys.readouterr().err
    for wrong, message in (
        (["--system", str(text), "--template", "none"], "no chat template 'none'"),
        (["--prefix", str(text), "--limit", "1KB"], "raise --limit"),
        (["--prefix", str(text), "--context", "4"], "tokens too many"),
    ):
        other = ["--prefix-cache", str(tmp_path / "other")]
        assert main(["bake", str(tiny_bundle), *wrong, *other]) == 1
        assert message in capsys.readouterr().err
    assert main(["bake", str(tmp_path / "no bundle"), "--prefix", str(text)]) == 1
    assert "no folder" in capsys.readouterr().err
    # Before the model is even looked for.
    flags = ["--prefix", str(text), "--prefix-cache", str(text)]
    assert main(["bake", str(tmp_path / "no bundle"), *flags]) == 1
    assert f"Nothing was baked into '{text}'" in capsys.readouterr().err
    assert main(["bake", "--prefix", str(text)]) == 1
    assert "bundle must be the folder of a bundle" in capsys.readouterr().err
    assert main(["bake", str(tiny_bundle)]) == 2


def test_baking_again_puts_right_what_is_damaged(tiny_bundle: Path, tmp_path: Path) -> None:
    for kind in ("last", "header"):
        with LLM(tiny_bundle, prefix_cache=tmp_path) as llm:
            entry = llm.bake(TOKENS[:60])
            whole = entry.read_bytes()
            damage(entry, kind)
        with LLM(tiny_bundle, prefix_cache=tmp_path) as llm:
            assert llm.bake(TOKENS[:60]) == entry
        assert entry.read_bytes() == whole


def test_what_may_be_baked(tiny_bundle: Path, tmp_path: Path) -> None:
    with LLM(tiny_bundle, prefix_cache=tmp_path, context=50) as llm:
        seen: list[tuple[int, int]] = []
        llm.bake(TOKENS[:50], on_prompt=lambda done, total: seen.append((done, total)))
        assert seen[0] == (0, 50)
        assert llm.bake([5]).exists()
        with pytest.raises(ContextLengthError):
            llm.bake(TOKENS[:51])
        with pytest.raises(ArgumentError, match="prefix must be"):
            llm.bake([])
        # A longer context's entry serves a shorter one as far as it goes.
        assert answer(llm, TOKENS[:40], max_tokens=6).usage.reused_tokens == 38


# Sessions


def test_a_session_goes_on_elsewhere(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "session"
    messages = [{"role": "user", "content": "It was the best of times?"}]
    options: dict[str, Any] = {"max_tokens": 20, "min_tokens": 20, "temperature": 0}
    with LLM(tiny_bundle, slots=1) as llm:
        first = llm.chat(messages, **options)
        saved = llm.save_session(path)
        assert saved == first.usage.prompt_tokens + 19  # the last token was never fed
        messages += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And the worst?"},
        ]
        here = llm.chat(messages, **options)
    with LLM(tiny_bundle, slots=1) as llm:
        assert llm.load_session(path) == saved
        there = llm.chat(messages, **options)
        assert there.usage == here.usage
        assert there.text == here.text
        # Back in the same process, after something else.
        llm.generate(TOKENS[:30], max_tokens=3)
        assert llm.load_session(path) == saved
        assert llm.save_session(path) == saved
        assert llm.chat(messages, **options).usage == here.usage
    tokens = [*TOKENS[:30]]
    with LLM(tiny_bundle) as llm:
        tokens += answer(llm, tokens).tokens
        llm.save_session(path)
        exact = answer(llm, [*tokens, 5, 6])
    with LLM(tiny_bundle) as llm:
        llm.load_session(path)
        again = answer(llm, [*tokens, 5, 6])
        assert again.usage.reused_tokens == len(tokens) - 1  # nothing is computed twice
        assert same(again, exact)


def test_sessions_that_cannot_be_gone_on_from(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "session"
    with LLM(tiny_bundle) as llm:
        with pytest.raises(SessionError, match="no session to save"):
            llm.save_session(path)
        answer(llm, TOKENS[:60])
        length = llm.save_session(path)
        whole = path.read_bytes()
        with pytest.raises(OSError, match="No such file"):
            llm.save_session(tmp_path / "nowhere" / "session")
        with pytest.raises(OSError, match="No such file"):
            llm.load_session(tmp_path / "nowhere")
        for kind in ("short", "header", "last", "magic", "empty"):
            path.write_bytes(whole)
            damage(path, kind)
            with pytest.raises(SessionError, match="no session to go on from"):
                llm.load_session(path)
        # Nothing has changed.
        assert answer(llm, TOKENS[:60]).usage.reused_tokens == 58
    path.write_bytes(whole)
    with LLM(tiny_bundle, context=length - 1, slots=2) as llm:
        answer(llm, TOKENS[:10])
        held = llm.save_session(tmp_path / "held")
        with pytest.raises(SessionError, match="was saved with another context"):
            llm.load_session(path)
        assert llm.save_session(tmp_path / "again") == held
    with (
        LLM(BUNDLE) as llm,
        pytest.raises(SessionError, match="written for another model"),
    ):
        llm.load_session(path)


def test_other_programs_folders_have_no_hashes(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    foreign = Bundle(bundle.path, bundle.manifest, foreign=True)
    with pytest.raises(ArgumentError, match="which other folders do not state"):
        open_prefixes(foreign, tmp_path)
    assert open_prefixes(foreign, None) is None
    assert open_prefixes(bundle, None) is None  # nothing was baked
