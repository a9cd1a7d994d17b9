"""Safetensors are read row by row, exactly, and broken checkpoints are named."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_llm.errors import ArgumentError, CheckpointError, ClosedError
from edge_llm_export.checkpoint.weights import INDEX, SINGLE, Weights, read_index

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
Tensors = Mapping[str, NDArray[Any]]


def write_shards(folder: Path, shards: Mapping[str, Tensors]) -> None:
    """Shards and the index that belongs to them."""
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard)
    write_index(folder, {name: shard for shard in shards for name in shards[shard]})


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    first = {"a": np.arange(6, dtype=np.float32).reshape(3, 2)}
    second = {"b": np.ones(4, np.float16), "c": np.full((2, 1), 2.0, ml_dtypes.bfloat16)}
    write_shards(tmp_path, {"m-1-of-2.safetensors": first, "m-2-of-2.safetensors": second})
    return tmp_path


@pytest.mark.parametrize("dtype", FLOATS)
def test_reads_any_rows_exactly(tmp_path: Path, dtype: str) -> None:
    # Three chunks and a bit, at an offset that is not a multiple of the element's size.
    values = np.random.default_rng(0).standard_normal((1000, 800)).astype(FLOATS[dtype])
    save_file(
        {"flags": np.array([True]), "w": values, "z": np.zeros(3, np.int8)}, tmp_path / SINGLE
    )
    with Weights.open(tmp_path) as weights:
        assert (weights.shape("w"), weights.dtype("w")) == ((1000, 800), dtype)
        for start, stop in ((None, None), (0, 1), (17, 900), (None, 5), (998, None), (4, 4)):
            rows = weights.read("w", start, stop)
            assert rows.dtype == np.float32
            assert rows.flags.writeable
            np.testing.assert_array_equal(rows, values[start:stop].astype(np.float32), strict=True)


@pytest.mark.parametrize(("dtype", "bits"), [("F16", 16), ("BF16", 16)])
def test_every_half_precision_value_is_converted_exactly(
    tmp_path: Path, dtype: str, bits: int
) -> None:
    patterns = np.arange(2**bits, dtype=np.uint16)
    save_file({"w": patterns.view(FLOATS[dtype])}, tmp_path / SINGLE)
    with Weights.open(tmp_path) as weights:
        read = weights.read("w")
    if dtype == "BF16":
        wide = (patterns.astype(np.uint32) << 16).view(np.float32)
    else:
        wide = np.array([_half(int(pattern)) for pattern in patterns], np.float32)
    numbers = ~np.isnan(wide)
    np.testing.assert_array_equal(read[numbers].view(np.uint32), wide[numbers].view(np.uint32))
    assert np.isnan(read[~numbers]).all()


def _half(pattern: int) -> float:
    """IEEE 754 binary16, from its definition."""
    sign, exponent, fraction = -1.0 if pattern >> 15 else 1.0, pattern >> 10 & 31, pattern & 1023
    if exponent == 31:
        return sign * float("inf") if fraction == 0 else float("nan")
    if exponent == 0:
        return sign * fraction * 2.0**-24
    return sign * (1024 + fraction) * 2.0 ** (exponent - 25)


@given(rows=st.integers(0, 40), columns=st.integers(0, 5), data=st.data())
def test_slices_are_those_of_numpy(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("slices")
    values = np.arange(rows * columns, dtype=ml_dtypes.bfloat16).reshape(rows, columns)
    save_file({"w": values}, folder / SINGLE)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    with Weights.open(folder) as weights:
        np.testing.assert_array_equal(
            weights.read("w", start, stop), values[start:stop].astype(np.float32), strict=True
        )


def test_a_scalar_and_an_empty_tensor(tmp_path: Path) -> None:
    save_file(
        {"s": np.array(2.5, np.float16), "e": np.zeros((0, 3), np.float32)}, tmp_path / SINGLE
    )
    with Weights.open(tmp_path) as weights:
        assert weights.read("s").shape == ()
        assert float(weights.read("s")) == 2.5
        assert weights.read("e").shape == (0, 3)
        with pytest.raises(ArgumentError, match="start, stop must be 0 <= start <= stop <= 0"):
            weights.read("s", 0, 1)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 1), (4, None), (None, -1)])
def test_rows_outside_the_tensor_are_refused(
    two_shards: Path, start: int | None, stop: int | None
) -> None:
    with Weights.open(two_shards) as weights, pytest.raises(ArgumentError) as caught:
        weights.read("a", start, stop)
    assert caught.value.value == (start, stop)


def test_reading_needs_memory_for_the_rows_only(tmp_path: Path) -> None:
    save_file({"w": np.ones((64, 1 << 17), ml_dtypes.bfloat16)}, tmp_path / SINGLE)  # 16 MiB
    with Weights.open(tmp_path) as weights:
        tracemalloc.start()
        try:
            rows = weights.read("w", 3, 7)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert rows.nbytes == 2 << 20
        assert peak < rows.nbytes + (1 << 20)


def test_the_file_is_not_mapped(two_shards: Path) -> None:
    with Weights.open(two_shards) as weights:
        weights.read("a")
        assert str(two_shards) not in Path("/proc/self/maps").read_text()


def test_shards_are_one_checkpoint(two_shards: Path) -> None:
    with Weights.open(two_shards) as weights:
        assert weights.names == ("a", "b", "c")
        assert weights.read("a", 1, 2).tolist() == [[2.0, 3.0]]
        assert weights.read("b").tolist() == [1.0] * 4
        assert weights.read("c").tolist() == [[2.0], [2.0]]


def test_tensors_that_the_index_forgot_are_there(two_shards: Path) -> None:
    write_index(two_shards, {"a": "m-1-of-2.safetensors", "b": "m-2-of-2.safetensors"})
    with Weights.open(two_shards) as weights:
        assert weights.names == ("a", "b", "c")


def test_a_single_file_wins_over_an_index_as_in_transformers(two_shards: Path) -> None:
    save_file({"d": np.zeros(1, np.float32)}, two_shards / SINGLE)
    with Weights.open(two_shards) as weights:
        assert weights.names == ("d",)


def test_threads_share_a_file(tmp_path: Path) -> None:
    values = np.arange(400_000, dtype=np.float32).reshape(400, 1000)
    save_file({"w": values}, tmp_path / SINGLE)
    wrong: list[int] = []
    with Weights.open(tmp_path) as weights:

        def read(first: int) -> None:
            for start in range(first, 400, 4):
                if not np.array_equal(weights.read("w", start, start + 1)[0], values[start]):
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_closed_weights_say_so(two_shards: Path) -> None:
    with Weights.open(two_shards) as weights:
        pass
    weights.close()
    with pytest.raises(ClosedError, match="'a' was read after close"):
        weights.read("a")


def test_an_unknown_tensor_is_named(two_shards: Path) -> None:
    with Weights.open(two_shards) as weights:
        for ask in (weights.read, weights.shape, weights.dtype):
            with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
                ask("lm_head.weight")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float64, "F64"), (np.int8, "I8"), (np.uint8, "U8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")],
)
def test_other_types_open_but_are_refused_when_read(tmp_path: Path, dtype: Any, name: str) -> None:
    write_raw(tmp_path / SINGLE, name, np.zeros(2, dtype).tobytes())
    with Weights.open(tmp_path) as weights:
        assert weights.dtype("w") == name
        with pytest.raises(CheckpointError, match=f"'w' is stored as {name}; known are F32, F16"):
            weights.read("w")


def test_words_are_read_as_they_are(tmp_path: Path) -> None:
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (700, 500)).astype(np.int32)
    save_file({"x": words, "none": words[:0], "floats": words.view(np.float32)}, tmp_path / SINGLE)
    with Weights.open(tmp_path) as weights:
        np.testing.assert_array_equal(weights.read_words("x"), words, strict=True)
        assert weights.read_words("none").shape == (0, 500)
        with pytest.raises(CheckpointError, match="'floats' is stored as F32 and must be I32"):
            weights.read_words("floats")
        with pytest.raises(CheckpointError, match="'x' is stored as I32; known are F32, F16"):
            weights.read("x")
        with pytest.raises(CheckpointError, match="no tensor 'y'"):
            weights.read_words("y")
        with (tmp_path / SINGLE).open("r+b") as file:
            file.truncate((tmp_path / SINGLE).stat().st_size - 4)
        with pytest.raises(CheckpointError, match="cut short"):
            weights.read_words("x")
    with pytest.raises(ClosedError, match="'x' was read after close"):
        weights.read_words("x")


def write_raw(path: Path, dtype: str, data: bytes, *, size: int | None = None) -> None:
    """A file of two elements, named w, written without the library."""
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, len(data) if size is None else size]}
    header = json.dumps({"w": entry, "__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    write_raw(tmp_path / SINGLE, "F32", bytes(8))
    with Weights.open(tmp_path) as weights:
        assert weights.names == ("w",)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole .*Download"):
        Weights.open(tmp_path)


@pytest.mark.parametrize(("size", "data"), [(4, bytes(4)), (16, bytes(16)), (8, bytes(16))])
def test_a_header_that_contradicts_the_file_is_refused(
    tmp_path: Path, size: int, data: bytes
) -> None:
    write_raw(tmp_path / SINGLE, "F32", data, size=size)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Weights.open(tmp_path)


def test_a_file_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE, "F32", bytes(8))
    with Weights.open(tmp_path) as weights:
        with (tmp_path / SINGLE).open("r+b") as file:
            file.truncate((tmp_path / SINGLE).stat().st_size - 4)
        with pytest.raises(CheckpointError, match="cut short"):
            weights.read("w")


def test_a_file_that_cannot_be_read_any_more_is_named(two_shards: Path) -> None:
    with Weights.open(two_shards) as weights:
        # Reading a folder fails as a broken disk does: with an OSError that names no file.
        folder = os.open(two_shards, os.O_RDONLY)
        os.dup2(folder, weights._tensors["a"].file.fileno())
        os.close(folder)
        with pytest.raises(CheckpointError, match=r"m-1-of-2\.safetensors cannot be read: "):
            weights.read("a")
        assert weights.read("b").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(CheckpointError, match=rf"{name}.*refuses pickles.*safe_serialization=True"):
        Weights.open(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*index\.json\."):
        Weights.open(tmp_path)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"only consolidated\.safetensors"):
        Weights.open(tmp_path)


def test_a_missing_shard_is_named(two_shards: Path) -> None:
    (two_shards / "m-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks m-2-of-2\.safetensors"):
        Weights.open(two_shards)


def test_a_tensor_missing_in_its_shard_is_named(two_shards: Path) -> None:
    shards = read_index(two_shards)
    assert shards is not None
    for name, shard in (("d", "m-1-of-2.safetensors"), ("b", "m-1-of-2.safetensors")):
        write_index(two_shards, shards | {name: shard})
        with pytest.raises(CheckpointError, match=rf"{name!r} is in m-1-of-2\.safetensors, which"):
            Weights.open(two_shards)


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensor = {"a": np.zeros(1, np.float32)}
    write_shards(tmp_path, {"m-1.safetensors": tensor, "m-2.safetensors": tensor})
    write_index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    with pytest.raises(CheckpointError, match="both hold 'a'"):
        Weights.open(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": "../x.safetensors"}, {"a": 1}])
def test_a_broken_index_is_named(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json (has|names)"):
        Weights.open(tmp_path)


def test_a_failed_open_leaves_no_file_open(two_shards: Path) -> None:
    (two_shards / "m-2-of-2.safetensors").write_bytes(b"")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError):
        Weights.open(two_shards)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("model", ["stories260k", "books7m"])
def test_real_checkpoints_equal_torchs_reading(shared: Path, model: str) -> None:
    torch = pytest.importorskip("torch")
    loaded = pytest.importorskip("safetensors.torch").load_file(shared / "models" / model / SINGLE)
    with Weights.open(shared / "models" / model) as weights:
        assert set(weights.names) == set(loaded)
        for name, tensor in loaded.items():
            assert weights.shape(name) == tuple(tensor.shape)
            expected = tensor.to(torch.float32).numpy()
            np.testing.assert_array_equal(weights.read(name), expected, strict=True)
