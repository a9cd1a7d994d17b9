"""Bundles that are corrupt, do not fit together, or are made to harm: a typed error, soon."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers

from edge_llm import LLM
from edge_llm.bundle import Bundle
from edge_llm.errors import (
    ArgumentError,
    EdgeLLMError,
    IntegrityError,
    ManifestError,
    RuntimeFailure,
)
from edge_llm.text.tokenizer import LARGEST_FILE, Tokenizer

SECRET = "the canary's secret song"
MESSAGES = [{"role": "user", "content": "Hello"}]


class Hostile:
    """A copy of a bundle in which files and the manifest can be changed, sizes and hashes too."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        shutil.copytree(bundle, folder)
        self.path = folder

    @property
    def manifest(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return content

    def put(self, name: str, content: bytes) -> None:
        """Writes a file as an attacker would: the manifest agrees with it."""
        (self.path / name).write_bytes(content)
        manifest = self.manifest
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"size": len(content), "sha256": digest}
        self.put_manifest(manifest)

    def put_manifest(self, manifest: dict[str, Any]) -> None:
        (self.path / "manifest.json").write_text(json.dumps(manifest))

    def set(self, *keys: str | int, value: Any) -> None:
        """Changes one value of the manifest."""
        manifest = self.manifest
        inner: Any = manifest
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        self.put_manifest(manifest)

    def cut(self, name: str, keep: float) -> None:
        content = (self.path / name).read_bytes()
        self.put(name, content[: int(len(content) * keep)])


@pytest.fixture
def hostile(tiny_bundle: Path, tmp_path: Path) -> Hostile:
    return Hostile(tiny_bundle, tmp_path / "bundle")


@contextlib.contextmanager
def refused(*errors: type[EdgeLLMError], match: str | None = None) -> Iterator[None]:
    """A typed error, soon, without much memory, that tells nothing of the canary."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(errors or EdgeLLMError, match=match) as caught:
        yield
    assert SECRET not in "".join(map(str, (caught.value, caught.value.__cause__)))
    assert len(str(caught.value)) < 5000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
    assert time.process_time() - started < 20


def use(folder: Path, **options: Any) -> None:
    """Load a bundle and answer, so that every file is used."""
    with LLM(folder, **options) as llm:
        llm.chat(MESSAGES, max_tokens=2)


def test_an_unharmed_copy_answers(hostile: Hostile) -> None:
    hostile.set("info", value={"note": "changed"})
    use(hostile.path, verify=True)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "tokenizer.json", "manifest.json"]
)
def test_files_cut_short(name: str, keep: float, hostile: Hostile) -> None:
    whole = (hostile.path / name).read_bytes()
    (hostile.path / name).write_bytes(whole[: int(len(whole) * keep)])
    with refused(ManifestError if name == "manifest.json" else IntegrityError):
        use(hostile.path)
    if name != "manifest.json":  # and where the manifest agrees
        hostile.put(name, whole[: int(len(whole) * keep)])
        with refused(IntegrityError, RuntimeFailure):
            use(hostile.path)


def test_weights_of_another_model(hostile: Hostile) -> None:
    """Of another size they are never used, of another content not where hashes are compared."""
    data = (hostile.path / "model.onnx.data").read_bytes()
    (hostile.path / "model.onnx.data").write_bytes(data[::-1])
    with refused(IntegrityError, match=r"model\.onnx\.data.*altered"):
        use(hostile.path, verify=True)
    hostile.put("model.onnx.data", data[: len(data) // 3])
    with refused(IntegrityError, RuntimeFailure):
        use(hostile.path)


def with_external(folder: Path, location: str, offset: str = "0", length: str = "") -> bytes:
    """The bundle's graph, its weights elsewhere."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
            elif entry.key == "offset":
                entry.value = offset
            elif entry.key == "length" and length:
                entry.value = length
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.parametrize(
    "location", ["../canary", "OUTSIDE", "sub/../../canary", "./../canary", "", "\0", "missing"]
)
def test_weights_outside_the_folder(location: str, hostile: Hostile, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_bytes((hostile.path / "model.onnx.data").read_bytes())  # which would fit
    (hostile.path / "sub").mkdir()
    where = str(canary) if location == "OUTSIDE" else location
    hostile.put("model.onnx", with_external(hostile.path, where))
    with refused(EdgeLLMError):
        use(hostile.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "canary"]


@pytest.mark.parametrize("offset", ["-1", str(2**62), "x"])
@pytest.mark.parametrize("length", ["", "-5", str(10 * 2**30)])
def test_weights_beyond_their_file(offset: str, length: str, hostile: Hostile) -> None:
    graph = with_external(hostile.path, "model.onnx.data", offset, length)
    hostile.put("model.onnx", graph)
    with refused(EdgeLLMError):
        use(hostile.path)


PATHS = [
    "", ".", "..", "/", "../canary", "/etc/passwd", "a/../../canary", "a\\..\\..\\canary",
    "C:/canary", "C:canary", "//host/share/canary", "file:///etc/passwd", "sub/..",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", ["graph", "tokenizer", "template"])
def test_files_outside_the_folder(where: str, path: str, hostile: Hostile, tmp_path: Path) -> None:
    (tmp_path / "canary").write_text(SECRET)
    manifest = hostile.manifest
    old = {
        "graph": manifest["decoder"]["graph"],
        "tokenizer": manifest["tokenizer"],
        "template": manifest["chat"]["templates"]["default"],
    }[where]
    manifest["files"][path] = manifest["files"].pop(old)
    if where == "graph":
        manifest["decoder"]["graph"] = path
    elif where == "tokenizer":
        manifest["tokenizer"] = path
    else:
        manifest["chat"]["templates"]["default"] = path
    hostile.put_manifest(manifest)
    with refused(ManifestError, match="relative path inside"):
        use(hostile.path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bundle", "canary"]


@pytest.mark.parametrize(
    "path",
    [
        "a\0b",
        "\udc80",
        pytest.param("x" * 5000, id="long name"),
        pytest.param("a/" * 3000 + "b", id="long path"),
    ],
)
def test_names_that_no_file_can_have(path: str, hostile: Hostile) -> None:
    hostile.set("files", value={**hostile.manifest["files"], path: {"size": 1, "sha256": "0"}})
    with refused(EdgeLLMError):
        use(hostile.path)


def test_a_folder_or_a_pipe_in_a_files_place(hostile: Hostile) -> None:
    (hostile.path / "tokenizer.json").unlink()
    (hostile.path / "tokenizer.json").mkdir()
    with refused(IntegrityError, match=r"tokenizer\.json"):
        use(hostile.path)
    (hostile.path / "tokenizer.json").rmdir()
    os.mkfifo(hostile.path / "tokenizer.json")
    with refused(IntegrityError, match=r"tokenizer\.json"):
        use(hostile.path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json"])
def test_links_out_of_the_folder(name: str, hostile: Hostile, tmp_path: Path) -> None:
    (tmp_path / "canary").write_bytes((hostile.path / name).read_bytes())
    (hostile.path / name).unlink()
    (hostile.path / name).symlink_to("../canary")
    with refused(IntegrityError, match="outside"):
        use(hostile.path)


def test_links_as_in_the_hubs_cache(tiny_bundle: Path, tmp_path: Path) -> None:
    """There, a snapshot's files are links to files that are named by their hashes."""
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in tiny_bundle.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    use(snapshot)


HUGE_NUMBERS = [2**40, 2**60, 2**63, 2**64 + 1, -1, -(2**63), 10**400, 1e308, -0.5]


@pytest.mark.parametrize("value", HUGE_NUMBERS, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize(
    "keys",
    [
        ("dims", "context"),
        ("dims", "layers"),
        ("decoder", "state", 0, "shape", 1),
        ("decoder", "state", 0, "shape", 3),
        ("tokens", "eos", 0),
        ("tokens", "pad"),
        ("files", "tokenizer.json", "size"),
    ],
    ids=lambda keys: ".".join(map(str, keys)),
)
def test_numbers_beyond_all_bounds(keys: tuple[Any, ...], value: Any, hostile: Hostile) -> None:
    hostile.set(*keys, value=value)
    if keys[0] == "dims" and isinstance(value, int) and value > 0:
        # Merely claimed: the context at load is at most 4,096, unless somebody asks for more.
        use(hostile.path)
        if keys[1] == "context":
            with refused(ArgumentError, match="context"):
                use(hostile.path, context=value)
        return
    with refused(ManifestError, IntegrityError, RuntimeFailure, ArgumentError):
        use(hostile.path)


@pytest.mark.parametrize(
    "vocab",
    [300, 500, 2**31, 2**40, 2**60],
)
def test_logits_of_another_width(vocab: int, hostile: Hostile) -> None:
    hostile.set("dims", "vocab", value=vocab)
    with refused(EdgeLLMError):
        use(hostile.path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": "1.0", "info": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"format": "1.0", "dims": {"layers": ' + "9" * 100_000 + "}}",
        '{"format": "1.0", "x": 1e' + "9" * 100_000 + "}",
        '{"format": "1.0", "format": "1.0"}',
        '{"format": "' + "1" * 100_000 + '.0"}',
        '{"format": "1.0", "name": "\\ud800"}',
        "\0" * 1000,
    ],
    ids=range(9),
)
def test_json_bombs_in_the_manifest(text: str, hostile: Hostile) -> None:
    (hostile.path / "manifest.json").write_text(text, encoding="utf-8")
    with refused(EdgeLLMError):
        Bundle.open(hostile.path)


def test_a_manifest_beyond_all_bounds_is_not_read(hostile: Hostile) -> None:
    with (hostile.path / "manifest.json").open("r+b") as file:
        file.truncate(8 << 30)  # a hole takes no room on the disk
    with refused(ManifestError, match="at most 16777216 bytes"):
        Bundle.open(hostile.path)


def vocabulary(**pieces: int) -> dict[str, Any]:
    library = Library(models.WordLevel({"a": 0}, unk_token="a"))
    spec: dict[str, Any] = json.loads(library.to_str())
    spec["model"]["vocab"] = {"a": 0, **pieces}
    return spec


def added(index: Any, content: str = "<x>") -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": content, **flags}


def charsmap(text: bytes) -> dict[str, Any]:
    raw = (1024).to_bytes(4, "little") + bytes(1024) + b"a\0" + text + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


TOKENIZERS: dict[str, Any] = {
    "no JSON": "{",
    "nested": "[" * 100_000,
    "nested within": json.dumps({**vocabulary(), "normalizer": "["}).replace('"["', "[" * 9999),
    "another model's": vocabulary(b=400),
    "huge id": vocabulary(b=2**32 - 1),
    "id beyond all": vocabulary(b=2**64),
    "negative id": vocabulary(b=-1),
    "huge added id": {**vocabulary(), "added_tokens": [added(2**70)]},
    "negative added id": {**vocabulary(), "added_tokens": [added(-1)]},
    "a bomb": {**vocabulary(), "normalizer": {
        "type": "Sequence", "normalizers": [replace("a", "aa")] * 40}},
    "a bomb within": {**vocabulary(), "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": [replace("a", "aa")] * 20}] * 2}},
    "a large bomb": {**vocabulary(), "normalizer": replace("a", "a" * 1_000_000)},
    "a bomb in front": {**vocabulary(), "normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "a bomb in the map": {**vocabulary(), "normalizer": charsmap(b"x" * 100_000)},
    "a bomb behind": {**vocabulary(), "decoder": {
        "type": "Sequence", "decoders": [replace("a", "aa")] * 40}},
    "a broken pattern": {**vocabulary(), "pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(TOKENIZERS))
def test_tokenizers_made_to_harm(case: str, hostile: Hostile) -> None:
    spec = TOKENIZERS[case]
    hostile.put("tokenizer.json", (spec if isinstance(spec, str) else json.dumps(spec)).encode())
    with refused(IntegrityError, match=r"tokenizer\.json"):
        use(hostile.path)


def test_growth_that_real_tokenizers_have_is_read() -> None:
    library = Library(models.WordLevel({"a": 0}, unk_token="a"))
    library.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    Tokenizer(str(library.to_str()), bos=None, eos=(), add_bos=False, vocab=1)
    spec = {**vocabulary(), "normalizer": charsmap(b"x" * 60)}
    Tokenizer(json.dumps(spec), bos=None, eos=(), add_bos=False)


def test_more_added_tokens_than_the_model_knows_are_read() -> None:
    """Gemma 3's tokenizer has one for images, beyond the rows of its text model."""
    spec = json.dumps({**vocabulary(), "added_tokens": [added(1, "<image>")]})
    tokenizer = Tokenizer(spec, bos=None, eos=(), add_bos=False, vocab=1)
    assert tokenizer.encode("<image>") == [1]
    with refused(IntegrityError, match="a vocabulary of 2 tokens, but the model knows 1"):
        Tokenizer(json.dumps(vocabulary(b=1)), bos=None, eos=(), add_bos=False, vocab=1)


def test_a_pattern_without_end_is_a_typed_error() -> None:
    """The library's Rust panics there; its traceback goes to stderr and cannot be kept back."""
    code = (
        "import sys\nfrom edge_llm.errors import IntegrityError\n"
        "from edge_llm.text.tokenizer import Tokenizer\n"
        "t = Tokenizer(sys.argv[1], bos=None, eos=(), add_bos=False)\n"
        "assert t.encode('a b') == [0, 0]\n"
        "try:\n    t.encode('a' * 40)\nexcept IntegrityError as error:\n    print(error)\n"
    )
    library = Library(models.WordLevel({"a": 0}, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    spec = json.loads(library.to_str())
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {
                "type": "Split",
                "pattern": {"Regex": "(a+)+b"},
                "behavior": "Isolated",
                "invert": False,
            },
        ],
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(spec)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "tokenizer.json cannot be used on this" in done.stdout


def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)  # a sparse file
    with refused(IntegrityError, match="at most"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", bos=None, eos=(), add_bos=False)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"{% for %}",
        b"{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
        b"{% include '../canary' %}",
        b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        b"{{ 'a' * 10**10 }}",
        b"x" * 100_000,
    ],
)
def test_chat_templates_made_to_harm(content: bytes, hostile: Hostile, tmp_path: Path) -> None:
    (tmp_path / "canary").write_text(SECRET)
    hostile.put("chat_template.jinja", content)
    with refused(EdgeLLMError):
        use(hostile.path)


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_of_a_tokenizer_is_a_typed_error(
    data: st.DataObject, tokenizer_source: Callable[[str], str]
) -> None:
    source = tokenizer_source(data.draw(st.sampled_from(["byte_level", "unigram", "word_piece"])))
    at = data.draw(st.integers(0, len(source)))
    length = data.draw(st.sampled_from([0, 1, 5, len(source)]))
    put = data.draw(st.sampled_from(["", "0", "-1", '"', "[", "}", "null", "99999999999999999999"]))
    try:
        tokenizer = Tokenizer(
            source[:at] + put + source[at + length :], bos=None, eos=(), add_bos=False
        )
        tokenizer.decode(tokenizer.encode("hello the world")[:5])
    except IntegrityError:
        pass
