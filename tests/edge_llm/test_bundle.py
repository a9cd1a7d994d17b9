"""A bundle is opened only when its files are the ones that its manifest lists."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from edge_llm import Bundle
from edge_llm.bundle import sha256_file
from edge_llm.errors import (
    ArgumentError,
    BundleError,
    BundleNotFoundError,
    IntegrityError,
    ManifestError,
    UnsupportedFormatError,
)
from edge_llm.manifest import (
    ChatTemplates,
    DecoderGraph,
    Dims,
    FileEntry,
    Manifest,
    Quantization,
    Source,
    Tokens,
)


def graph(*locations: str) -> bytes:
    """An ONNX file with a tensor of 1 KiB in each of these places."""
    tensors = [TensorProto(name=one, data_type=TensorProto.UINT8, dims=[1024]) for one in locations]
    for tensor, location in zip(tensors, locations, strict=True):
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    content = helper.make_model(helper.make_graph([], "graph", [], [], tensors))
    return bytes(content.SerializeToString())


CONTENTS = {
    "model.onnx": graph("model.onnx.data"),
    "model.onnx.data": bytes(range(256)) * 4096,  # more than one read of the hash
    "tokenizer.json": b"{}",
    "additional_chat_templates/tool.jinja": b"{{ messages }}",
    "empty": b"",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose files hold nothing sensible, which is none of the bundle's business."""
    folder = tmp_path / "bundle"
    entries = {}
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        entries[name] = FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = Manifest(
        format="1.0",
        requires=(),
        min_onnxruntime="1.32",
        name="bundle",
        source=Source(architecture="llama", repo=None, revision=None, license=None),
        dims=Dims(**{field.name: 1 for field in dataclasses.fields(Dims)}),
        decoder=DecoderGraph(graph="model.onnx", layout="edge_llm.v1", state=()),
        quantization=Quantization(method="none", bits=32, block=None, exceptions={}),
        tokens=Tokens(bos=None, eos=(), pad=None, add_bos=False),
        sampling={},
        tokenizer="tokenizer.json",
        chat=ChatTemplates(
            templates={"tool": "additional_chat_templates/tool.jinja"}, special_tokens={}
        ),
        files=entries,
        quality=(),
        producer={},
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


def test_opens(folder: Path) -> None:
    for path in (folder, str(folder), os.fspath(folder) + os.sep):
        bundle = Bundle.open(path)
        assert bundle.path == folder
        assert bundle.manifest.name == "bundle"
        assert bundle.size == sum(map(len, CONTENTS.values()))
        assert bundle.file("tokenizer.json").read_bytes() == b"{}"


def test_verifying_tells_of_every_file_in_turn(folder: Path) -> None:
    hashed: list[str] = []
    assert Bundle.open(folder, verify=True, on_file=hashed.append).path == folder
    assert hashed == list(CONTENTS)
    hashed.clear()
    Bundle.open(folder, on_file=hashed.append)
    assert hashed == []


def test_files_that_the_manifest_does_not_list_are_let_be(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    assert "README.md" not in Bundle.open(folder, verify=True).manifest.files


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match=r"nowhere.*edge-llm export"):
        Bundle.open(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BundleNotFoundError, match=r"model\.gguf"):
        Bundle.open(tmp_path / "model.gguf")


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleNotFoundError, match=r"no manifest\.json.*edge-llm export"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"\x80"]
)
def test_a_manifest_that_is_no_json_in_utf8(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError, match=r"^manifest\.json "):
        Bundle.open(folder)


def test_a_byte_order_mark_in_front_of_a_good_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())
    with pytest.raises(ManifestError, match=r"^manifest\.json .*BOM"):
        Bundle.open(folder)


def test_a_manifest_of_the_future(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": "7.0", "everything": "else"}')
    with pytest.raises(UnsupportedFormatError, match=r"7\.0"):
        Bundle.open(folder)


def test_a_manifest_that_cannot_be_read(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json.*cannot be read"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=f"'{name}' is missing"):
        Bundle.open(folder)
    (folder / name).mkdir()
    with pytest.raises(IntegrityError, match=f"'{name}' is missing"):
        Bundle.open(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_named(folder: Path, change: int) -> None:
    size = len(CONTENTS["model.onnx.data"])
    os.truncate(folder / "model.onnx.data", size + change)
    with pytest.raises(IntegrityError, match=rf"model\.onnx\.data.*{size + change} .*{size}\."):
        Bundle.open(folder)


@pytest.mark.parametrize("name", [name for name in CONTENTS if name != "empty"])
def test_altered_bytes_are_found_where_asked_for(folder: Path, name: str) -> None:
    content = bytearray(CONTENTS[name])
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert Bundle.open(folder).file(name).read_bytes() == content
    with pytest.raises(IntegrityError, match=f"'{name}' is altered"):
        Bundle.open(folder, verify=True)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("README.md", r"needs 'README\.md', which manifest\.json does not list"),
        ("../secret", r"'\.\./secret' is not a relative path"),
        ("/etc/hostname", "'/etc/hostname' is not a relative path"),
        ("empty", "reaches to byte 1024 of 'empty', which has 0"),
    ],
)
def test_a_graph_that_reads_elsewhere_is_refused(folder: Path, location: str, message: str) -> None:
    (folder / "README.md").write_bytes(bytes(2048))
    (folder.parent / "secret").write_bytes(bytes(2048))
    replace_graph(folder, graph("model.onnx.data", location))
    with pytest.raises(IntegrityError, match=message):
        Bundle.open(folder)


def replace_graph(folder: Path, content: bytes, name: str = "model.onnx") -> None:
    """Put another graph in its place, and tell the manifest."""
    (folder / name).write_bytes(content)
    manifest = Manifest.from_json((folder / "manifest.json").read_text(encoding="utf-8"))
    entry = FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = dataclasses.replace(
        manifest,
        files={**manifest.files, name: entry},
        decoder=dataclasses.replace(manifest.decoder, graph=name),
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def test_a_graph_that_is_none_is_refused(folder: Path) -> None:
    replace_graph(folder, b"PK\x03\x04 a zip file")
    with pytest.raises(IntegrityError, match=r"model\.onnx is not an ONNX file"):
        Bundle.open(folder)
    replace_graph(folder, graph(), "model.ort")  # ONNX Runtime's other format, by its name
    with pytest.raises(UnsupportedFormatError, match=r"'model\.ort' is no \.onnx file"):
        Bundle.open(folder)


def test_a_bundle_has_no_variants(folder: Path) -> None:
    assert not Bundle.open(folder).variants
    with pytest.raises(ArgumentError, match="variant must be left out with a bundle"):
        Bundle.open(folder, variant="q4")


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == digest
