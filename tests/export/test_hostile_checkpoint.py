"""Checkpoints that are corrupt, do not fit together, or are made to harm: a typed error, soon."""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edge_llm.errors import CheckpointError, EdgeLLMError
from edge_llm_export import export_model
from edge_llm_export.checkpoint.weights import INDEX, SINGLE, Weights

SECRET = "the canary's secret song"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy whose files may be replaced, beside a canary."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "canary").write_text(SECRET)
    return folder


@contextlib.contextmanager
def refused(*errors: type[EdgeLLMError], match: str | None = None) -> Iterator[None]:
    """A typed error, soon, without much memory, that tells nothing of the canary."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(errors or EdgeLLMError, match=match) as caught:
        yield
    assert SECRET not in "".join(map(str, (caught.value, caught.value.__cause__)))
    assert len(str(caught.value)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
    assert time.process_time() - started < 20


def write(path: Path, header: Any, data: bytes = b"", *, size: int | None = None) -> None:
    """A safetensors file without the library's checks; a header that is no text is dumped."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TEN_GB = 10 * 2**30
HEADERS: dict[str, Any] = {
    "10 GB": {"w": entry((TEN_GB // 4,), 0, TEN_GB)},
    "10 GB, small in the file": {"w": entry((TEN_GB // 4,), 0, 8)},
    "beyond 64 bits": {"w": entry((2**32, 2**32), 0, 8)},
    "a product that wraps to 2": {"w": entry((2**33, 2**31 + 1), 0, 8)},
    "huge number": {"w": entry((10**40,), 0, 8)},
    "negative shape": {"w": entry((-2,), 0, 8)},
    "two negative shapes": {"w": entry((-1, -2), 0, 8)},
    "fractional shape": {"w": entry((2.5,), 0, 8)},
    "shape that is no list": {"w": entry("2", 0, 8)},
    "negative offset": {"w": entry((2,), -8, 0)},
    "turned offsets": {"w": entry((2,), 8, 0)},
    "offset behind the file": {"w": entry((2,), 8, 16)},
    "offset beyond all": {"w": entry((2,), 2**64 - 8, 2**64)},
    "overlap": {"v": entry((2,), 0, 8), "w": entry((1,), 4, 8)},
    "the same twice": {"v": entry((2,), 0, 8), "w": entry((2,), 0, 8)},
    "a gap": {"v": entry((1,), 0, 4), "w": entry((1,), 8, 12)},
    "unknown type": {"w": entry(dtype="F31")},
    "type that is no text": {"w": entry(dtype=4)},
    "no offsets": {"w": {"dtype": "F32", "shape": [2]}},
    "three offsets": {"w": {**entry(), "data_offsets": [0, 4, 8]}},
    "entry that is no object": {"w": [1, 2]},
    "metadata that is no text": {"__metadata__": {"a": {"b": 1}}, "w": entry()},
    "a list": [1, 2],
    "nothing": b"",
    "no JSON": b"\x80\x04\x95pickle",
    "no UTF-8": b'{"\xff": 1}',
    "nested": b'{"a":' * 50_000,
    "nested lists": b'{"w": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a name twice": b'{"w": %b, "w": %b}' % ((json.dumps(entry()).encode(),) * 2),
}


@pytest.mark.parametrize("case", sorted(HEADERS))
def test_headers_made_to_harm(case: str, tmp_path: Path) -> None:
    write(tmp_path / SINGLE, HEADERS[case], bytes(8))
    with refused(CheckpointError, match=r"model\.safetensors"):
        Weights.open(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_lengths_of_headers_that_lie(size: int, tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"w": entry()}, bytes(8), size=size)
    with refused(CheckpointError, match=r"model\.safetensors"):
        Weights.open(tmp_path)


def test_tensors_claimed_and_there_but_empty(checkpoint: Path, tmp_path: Path) -> None:
    """A sparse file holds 10 GB without taking a disk; config.json knows of no such tensor."""
    with (checkpoint / SINGLE).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    end = 0
    for name, one in header.items():
        size = (
            TEN_GB
            if name == "model.norm.weight"
            else one["data_offsets"][1] - one["data_offsets"][0]
        )
        one["data_offsets"] = [end, end + size]
        end += size
    header["model.norm.weight"]["shape"] = [TEN_GB // 4]
    write(checkpoint / SINGLE, header)
    with (checkpoint / SINGLE).open("r+b") as file:
        file.truncate(file.seek(0, 2) + end)
    with refused(CheckpointError, match=r"model\.norm\.weight"):
        export_model(checkpoint, tmp_path / "bundle", quantize="int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "checkpoint"]


SHARDS: list[Any] = [
    "", ".", "..", "/", "../canary", "/etc/passwd", "a/../../canary", "sub/m.safetensors",
    "..\\canary.safetensors", "C:m.safetensors", "m.safetensors\0", "config.json", "model.bin",
    "pytorch_model.bin", ".safetensors", "-" * 999 + ".safetensors", 1, None, ["m"], {}, True,
]  # fmt: skip


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: repr(shard)[:30])
def test_an_index_that_names_what_is_no_shard(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "canary")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    with refused(CheckpointError, match=r"index\.json"):
        Weights.open(folder)


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.proof, "executed"))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", SINGLE, "model.pt", "tokenizer.json", "config.json", INDEX]
)
def test_pickles_are_never_loaded(name: str, checkpoint: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    payload = pickle.dumps(Payload(proof))
    pickle.loads(payload)
    assert proof.read_text() == "executed"
    proof.unlink()
    if name not in ("tokenizer.json", "config.json"):
        (checkpoint / SINGLE).unlink()
    (checkpoint / name).write_bytes(payload)
    with refused(CheckpointError):
        export_model(checkpoint, tmp_path / "bundle", quantize="int4")
    assert not proof.exists()


JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
BOMBS = {
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested and whole": b'{"model_type": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "long number": b'{"vocab_size": ' + b"9" * 100_000 + b"}",
    "no UTF-8": b'{"a": "\xff"}',
    "zeros": bytes(1000),
    "a list": b"[]",
    "nothing": b"",
}


@pytest.mark.parametrize("case", sorted(BOMBS))
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_bombs(name: str, case: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / name).write_bytes(BOMBS[case])
    with refused(match=name.removesuffix(".json")):
        export_model(checkpoint, tmp_path / "bundle", quantize="int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "checkpoint"]


SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size"]  # fmt: skip
NUMBERS = [0, -1, 2**31, 2**40, 2**63, 10**400, 1e300, 64.5, "64", [64], True]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(
            name,
            value,
            id=f"{name}-{str(value)[:12]}",
        )
        for name in SIZES
        for value in NUMBERS
    ],
)
def test_sizes_that_the_weights_do_not_have(
    name: str, value: Any, checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {name: value}))
    with refused():
        export_model(checkpoint, tmp_path / "bundle", quantize="fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary", "checkpoint"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(
            name,
            value,
            id=f"{name}-{str(value)[:12]}",
        )
        for name in ("rope_theta", "rms_norm_eps", "rope_scaling", "hidden_act")
        for value in (-1, 10**400, 1e300, "x", [1], True, {"rope_type": "x"})
    ],
)
def test_settings_outside_all_domains(
    name: str, value: Any, checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {name: value}))
    if name in ("rope_theta", "rms_norm_eps") and value == 1e300:
        return  # a number, if an odd one
    with refused():
        export_model(checkpoint, tmp_path / "bundle", quantize="fp32")


@pytest.mark.parametrize(
    "name", ["../../evil", "/evil", "..", "a/b", "a\\b", "\0", "C:x", "", "x" * 5000, "con\n"]
)
def test_names_of_templates_stay_in_the_bundle(name: str, checkpoint: Path, tmp_path: Path) -> None:
    settings_file = checkpoint / "tokenizer_config.json"
    content = json.loads(settings_file.read_text())
    content["chat_template"] = [
        {"name": "default", "template": "x"},
        {"name": name, "template": "evil"},
    ]
    settings_file.write_text(json.dumps(content))
    with contextlib.suppress(EdgeLLMError):
        export_model(checkpoint, tmp_path / "bundle", quantize="fp32")
    assert {path.name for path in tmp_path.iterdir()} <= {"bundle", "canary", "checkpoint"}
    assert not (tmp_path.parent / "evil").exists()
    assert not Path("/evil").exists()
    assert not list(tmp_path.parent.glob("evil*"))


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_of_a_header_is_a_typed_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, folder / SINGLE)
    content = bytearray((folder / SINGLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (folder / SINGLE).write_bytes(content)
    try:
        with Weights.open(folder) as weights:
            for name in weights.names:
                assert weights.read(name).shape == weights.shape(name)
    except CheckpointError:
        pass
