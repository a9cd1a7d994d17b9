"""Blocks of small integers: the rounding, the packing, and ONNX Runtime's reading of both."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge_llm.runtime.session import create_session
from edge_llm_export.graph.linear import Vocabulary, project
from edge_llm_export.graph.recorder import GraphRecorder
from edge_llm_export.quantize import storage as storage_module
from edge_llm_export.quantize.packing import block_count, blocks_of, pack, unpack
from edge_llm_export.quantize.rtn import dequantize_blocks, quantize_rows
from edge_llm_export.quantize.storage import (
    FLOAT32,
    RoundedMatrix,
    Storage,
    float_rows,
    quantized_tensors,
    transposed,
)
from edge_llm_export.writer import BundleWriter

Floats = NDArray[np.float32]

TINY = float(np.finfo(np.float32).tiny)
STORAGES = [Storage(bits, block) for bits in (4, 8) for block in (32, 64, 128)]
bits_of_a_weight = st.sampled_from([4, 8])
blocks = st.sampled_from([2, 8, 32])


@dataclass(frozen=True)
class Rows:
    """A matrix that is in memory."""

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def read(self, start: int, stop: int) -> Floats:
        assert 0 <= start < stop <= len(self.values)
        return self.values[start:stop].copy()


def random_rows(rows: int, columns: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    scale = rng.choice(np.array([1e-3, 1, 100], np.float32), (rows, 1))
    values: Floats = (rng.standard_normal((rows, columns)) * scale).astype(np.float32)
    return values


def restored(weights: Floats, *, bits: int, block: int) -> Floats:
    """What is left of weights after rounding."""
    integers, scales = quantize_rows(weights, bits=bits, block=block)
    return dequantize_blocks(integers, scales, bits=bits, columns=weights.shape[1])


@given(st.data(), bits_of_a_weight)
def test_unpacking_is_the_inverse_of_packing(data: st.DataObject, bits: int) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 32])))
    integers = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack(integers, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (*shape[:2], shape[2] * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits), integers, strict=True)


def test_the_first_weight_is_in_the_low_nibble() -> None:
    integers = np.array([[[1, 2, 15, 0]]], np.uint8)
    np.testing.assert_array_equal(pack(integers, 4), [[[0x21, 0x0F]]])


@given(st.integers(1, 5), st.integers(1, 100), blocks)
def test_the_last_block_is_filled_up_with_zeros(rows: int, columns: int, block: int) -> None:
    weights = np.arange(1, rows * columns + 1, dtype=np.float32).reshape(rows, columns)
    cut = blocks_of(weights, block)
    assert cut.shape == (rows, block_count(columns, block), block)
    flat = cut.reshape(rows, -1)
    np.testing.assert_array_equal(flat[:, :columns], weights)
    assert not flat[:, columns:].any()
    assert flat.shape[1] - columns < block


ordinary = st.floats(-(2.0**100), 2.0**100, width=32)
extreme = st.floats(allow_nan=False, allow_infinity=False, width=32)
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=ordinary | extreme | st.sampled_from([0.0, -0.0, TINY, -TINY / 4]),
)


@given(matrices, bits_of_a_weight, blocks)
def test_no_weight_is_off_by_more_than_half_a_step(weights: Floats, bits: int, block: int) -> None:
    integers, scales = quantize_rows(weights, bits=bits, block=block)
    assert integers.dtype == np.uint8
    assert scales.dtype == np.float32
    assert integers.shape == (*scales.shape, block)
    assert int(integers.max()) < 2**bits
    assert np.isfinite(scales).all()
    half = 2 ** (bits - 1)
    wide = blocks_of(weights, block).astype(np.float64)
    step = np.abs(scales.astype(np.float64))[..., None]
    left = (integers.astype(np.float64) - half) * scales[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = wide / scales[..., None]
    # Only the side opposite to the largest weight is clipped, and by at most one step.
    clipped = steps > half - 0.5
    bound = np.where(clipped, 1.0, 0.5) * step * (1 + 1e-4)
    # A block too small for a normal scale is stored as zeros.
    bound += np.where(step == 0, half * TINY, 0)
    assert (np.abs(wide - left) <= bound).all()
    np.testing.assert_array_equal(
        dequantize_blocks(integers, scales, bits=bits, columns=weights.shape[1]),
        left.astype(np.float32).reshape(len(weights), -1)[:, : weights.shape[1]],
        strict=True,
    )


@given(matrices, bits_of_a_weight, blocks)
def test_the_largest_weight_of_a_block_is_exact(weights: Floats, bits: int, block: int) -> None:
    wide = blocks_of(weights, block)
    left = blocks_of(restored(weights, bits=bits, block=block), block)
    largest = np.abs(wide).argmax(axis=-1)[..., None]
    before = np.take_along_axis(wide, largest, -1)
    after = np.take_along_axis(left, largest, -1)
    twice = (np.abs(wide) == np.abs(before)).sum(axis=-1, keepdims=True) > 1
    stored = np.abs(before) >= TINY * 2 ** (bits - 1)
    exact = np.where(stored, before, 0)
    np.testing.assert_array_equal(np.where(twice, 0, after), np.where(twice, 0, exact))


@given(matrices, bits_of_a_weight, blocks)
def test_rounding_again_changes_nothing(weights: Floats, bits: int, block: int) -> None:
    once = restored(weights, bits=bits, block=block)
    np.testing.assert_array_equal(restored(once, bits=bits, block=block), once)


@pytest.mark.parametrize("bits", [4, 8])
def test_both_signs_use_all_integers(bits: int) -> None:
    half = 2 ** (bits - 1)
    for sign in (1, -1):
        weights = sign * np.arange(-half + 1, half + 1, dtype=np.float32)[None]
        integers, scales = quantize_rows(weights, bits=bits, block=2 * half)
        assert scales.tolist() == [[-sign]]
        assert sorted(integers.ravel().tolist()) == list(range(2 * half))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-45, TINY / 2])
def test_blocks_of_nothing(bits: int, value: float) -> None:
    integers, scales = quantize_rows(np.full((2, 40), value, np.float32), bits=bits, block=32)
    assert (integers == 2 ** (bits - 1)).all()
    assert not scales.any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [3.4028234e38, -3.4028234e38, 1e9])
def test_one_huge_weight_drowns_its_block_and_no_other(bits: int, value: float) -> None:
    weights = random_rows(3, 96) * np.float32(1e-30)
    weights[1, 40] = value
    left = restored(weights, bits=bits, block=32)
    assert left[1, 40] == np.float32(value)
    rest = np.ones((3, 96), bool)
    rest[1, 32:64] = False
    np.testing.assert_array_equal(
        left[rest], restored(np.where(rest, weights, 0), bits=bits, block=32)[rest]
    )
    assert not np.delete(left[1, 32:64], 8).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_smallest_block_that_is_stored(bits: int) -> None:
    smallest = np.float32(TINY * 2 ** (bits - 1))  # its scale is the smallest normal number
    for value, left in ((smallest, smallest), (smallest * np.float32(0.9), 0)):
        weights = np.zeros((1, 32), np.float32)
        weights[0, 5] = -value
        np.testing.assert_array_equal(restored(weights, bits=bits, block=32)[0, 5], -left)


@pytest.mark.parametrize("storage", [Storage(4, 32), Storage(8, 64)])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
def test_rows_are_quantized_alike_in_chunks_of_any_size(
    storage: Storage, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "CHUNK_WEIGHTS", chunk)
    weights = random_rows(13, 70)
    (packed,), (scales,) = quantized_tensors(RoundedMatrix(Rows(weights), storage))
    assert storage.block is not None
    assert packed.shape == storage.blob_shape(13, 70)
    integers, expected = quantize_rows(weights, bits=storage.bits, block=storage.block)
    np.testing.assert_array_equal(scales, expected, strict=True)
    np.testing.assert_array_equal(packed, pack(integers, storage.bits), strict=True)
    np.testing.assert_array_equal(np.concatenate(list(float_rows(Rows(weights)))), weights)
    np.testing.assert_array_equal(transposed(Rows(weights)), weights.T)


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (3, 3), (64, 4)])
def test_threads_are_few(cores: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have a quota of 2 processors on a machine of 64 that it sees all."""
    pools: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            pools.append(workers)
            super().__init__(workers)

    affinity = {"sched_getaffinity": lambda process: set(range(cores))}
    monkeypatch.setattr(storage_module, "ThreadPoolExecutor", Pool)
    for names in (affinity, {"cpu_count": lambda: cores}):
        monkeypatch.setattr(storage_module, "os", SimpleNamespace(**names))
        quantized_tensors(RoundedMatrix(Rows(random_rows(13, 70)), Storage(4, 32)))
    assert pools == [expected, expected]


def test_what_goes_wrong_in_one_chunk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Rows):
        def read(self, start: int, stop: int) -> Floats:
            if start == 7:
                raise OSError("the disk is gone")
            return super().read(start, stop)

    monkeypatch.setattr(storage_module, "CHUNK_WEIGHTS", 1)
    with pytest.raises(OSError, match="the disk is gone"):
        quantized_tensors(RoundedMatrix(Broken(random_rows(13, 70)), Storage(4, 32)))


def run(
    folder: Path, record: Callable[[GraphRecorder], None], feeds: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Write a small graph with its weights as an export does, and let ONNX Runtime compute it."""
    graph = GraphRecorder("test")
    record(graph)
    BundleWriter(folder).write_graph(graph, producer="0", on_bytes=lambda size: None)
    session = create_session(folder / "model.onnx", threads=1, minimum="1.32")
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def exact_activations(rows: int, columns: int, block: int | None) -> Floats:
    """Integers up to 127 that reach it in every block: rounding them to int8 loses nothing."""
    rng = np.random.default_rng(1)
    values = rng.integers(-127, 128, (rows, columns)).astype(np.float32)
    values[:, :: block or columns] = 127
    return values


@pytest.mark.parametrize("storage", [FLOAT32, *STORAGES], ids=str)
@pytest.mark.parametrize("columns", [128, 100, 300])
@pytest.mark.parametrize("tokens", [1, 5])
def test_onnxruntime_multiplies_by_what_we_stored(
    storage: Storage, columns: int, tokens: int, tmp_path: Path
) -> None:
    weights = random_rows(48, columns, seed=columns)
    bias = random_rows(1, 48, seed=2)[0]
    source = exact_activations(tokens, columns, storage.block)

    def record(graph: GraphRecorder) -> None:
        graph.input("x", np.float32, ["tokens", columns])
        for name, added in (("plain", None), ("biased", bias)):
            output = project(graph, f"/model/{name}", "x", Rows(weights), storage, added)
            graph.op("Identity", f"/{name}", [output], outputs=[name])
            graph.output(name, np.float32, ["tokens", 48])

    results = run(tmp_path, record, {"x": source})
    left = weights
    if storage.block is not None:
        left = restored(weights, bits=storage.bits, block=storage.block)
        assert not np.array_equal(left, weights)
    expected = source.astype(np.float64) @ left.T.astype(np.float64)
    # float32 sums of some hundred products
    bound = 2e-6 * (np.abs(source).astype(np.float64) @ np.abs(left).T)
    assert (np.abs(results["plain"] - expected) <= bound).all()
    assert (np.abs(results["biased"] - expected - bias) <= bound + 1e-6 * np.abs(bias)).all()


@pytest.mark.parametrize("storage", [FLOAT32, *STORAGES], ids=str)
@pytest.mark.parametrize("columns", [128, 100, 300])
def test_onnxruntime_gathers_what_we_stored(storage: Storage, columns: int, tmp_path: Path) -> None:
    weights = random_rows(50, columns, seed=columns)
    tokens = np.array([[0, 49, 7], [7, 7, 1]], np.int64)
    source = exact_activations(2, columns, storage.block)

    def record(graph: GraphRecorder) -> None:
        graph.input("tokens", np.int64, ["batch", "tokens"])
        graph.input("x", np.float32, ["n", columns])
        vocabulary = Vocabulary(graph, "embed_tokens", Rows(weights), storage)
        embedded = vocabulary.embed("tokens")
        graph.op("Identity", "/embedded", [embedded], outputs=["embedded"])
        graph.output("embedded", np.float32, ["batch", "tokens", columns])
        vocabulary.logits("x")
        graph.output("logits", np.float32, ["n", 50])

    results = run(tmp_path, record, {"tokens": tokens, "x": source})
    left = weights
    if storage.block is not None:
        left = restored(weights, bits=storage.bits, block=storage.block)
    np.testing.assert_array_equal(results["embedded"], left[tokens], strict=True)
    # The head reads the same bytes, and they are stored once.
    expected = source.astype(np.float64) @ left.T.astype(np.float64)
    bound = 2e-6 * (np.abs(source).astype(np.float64) @ np.abs(left).T)
    assert (np.abs(results["logits"] - expected) <= bound).all()
    stored = (tmp_path / "model.onnx.data").stat().st_size
    blob, padded = storage.bits * 50 * columns // 8, 0
    if storage.block is not None:
        padded = block_count(columns, storage.block)
        blob = 50 * padded * storage.block * storage.bits // 8
    assert blob + 50 * 4 * padded <= stored < blob + 50 * 4 * padded + 64


def test_rows_of_a_vocabulary_may_be_stored_in_different_ways(tmp_path: Path) -> None:
    columns, stops = 64, [8, 20, 50]
    weights, tokens = random_rows(50, columns), np.array([[0, 7, 8, 49], [19, 20, 8, 3]])
    source = exact_activations(3, columns, 32)
    storages = [Storage(8, 32), Storage(4, 64), Storage(4, 32)]
    rows = np.split(weights, stops[:-1])
    parts = [RoundedMatrix(Rows(part), one) for part, one in zip(rows, storages, strict=True)]

    def record(graph: GraphRecorder) -> None:
        graph.input("tokens", np.int64, ["batch", "tokens"])
        graph.input("x", np.float32, ["n", columns])
        vocabulary = Vocabulary(
            graph, "embed_tokens", Rows(weights), Storage(4, 32), calibrated={"embed_tokens": parts}
        )
        embedded = vocabulary.embed("tokens")
        graph.op("Identity", "/embedded", [embedded], outputs=["embedded"])
        graph.output("embedded", np.float32, ["batch", "tokens", columns])
        vocabulary.logits("x")
        graph.output("logits", np.float32, ["n", 50])

    results = run(tmp_path, record, {"tokens": tokens, "x": source})
    left = np.concatenate(
        [
            restored(part, bits=one.bits, block=one.block or 0)
            for part, one in zip(rows, storages, strict=True)
        ]
    )
    np.testing.assert_array_equal(results["embedded"], left[tokens], strict=True)
    expected = source.astype(np.float64) @ left.T.astype(np.float64)
    bound = 2e-6 * (np.abs(source).astype(np.float64) @ np.abs(left).T)
    assert (np.abs(results["logits"] - expected) <= bound).all()
