"""Lazy matrices are the matrices that numpy would have built, in whatever pieces they are read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge_llm.errors import CheckpointError
from edge_llm_export.architectures.rope import RopeConfig
from edge_llm_export.architectures.spec import AttentionSpec, DecoderSpec, NormSpec
from edge_llm_export.checkpoint.weights import SINGLE, Weights
from edge_llm_export.graph.decoder import build_decoder
from edge_llm_export.graph.matrices import (
    CheckpointMatrix,
    MappedColumns,
    MappedRows,
    Matrix,
    Scaled,
    Stacked,
    Transposed,
    head_map,
    read_finite,
)
from edge_llm_export.quantize.storage import FLOAT32, Storage
from edge_llm_export.writer import BundleWriter

Floats = NDArray[np.float32]
Pair = tuple[Matrix, Floats]


@dataclass(frozen=True)
class Rows:
    """A matrix that is in memory, and strict about what is asked of it."""

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def read(self, start: int, stop: int) -> Floats:
        assert 0 <= start <= stop <= len(self.values)
        return self.values[start:stop].copy()


def mapped(values: Floats, index: NDArray[np.int64]) -> Floats:
    """Rows by index, -1 for zeros."""
    return np.stack([values[i] if i >= 0 else np.zeros(values.shape[1], np.float32) for i in index])


@st.composite
def leaves(draw: st.DrawFn, columns: int) -> Pair:
    rows, seed = draw(st.integers(1, 5)), draw(st.integers(0, 9))
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return Rows(values), values


def indices(draw: st.DrawFn, size: int, count: st.SearchStrategy[int]) -> NDArray[np.int64]:
    index = st.integers(-1, size - 1)
    length = draw(count)
    return np.array(draw(st.lists(index, min_size=length, max_size=length)), np.int64)


@st.composite
def pairs(draw: st.DrawFn, columns: int, depth: int = 3) -> Pair:
    """A lazy matrix and the numpy array that it must equal."""
    kinds = ["leaf", "stack", "rows", "columns", "transposed", "scaled"]
    kind = draw(st.sampled_from(kinds)) if depth else "leaf"
    if kind == "leaf":
        return draw(leaves(columns))
    if kind == "stack":
        parts = draw(st.lists(pairs(columns, depth - 1), min_size=1, max_size=3))
        return Stacked([lazy for lazy, _ in parts]), np.concatenate([eager for _, eager in parts])
    if kind == "rows":
        lazy, eager = draw(pairs(columns, depth - 1))
        index = indices(draw, len(eager), st.integers(1, 8))
        return MappedRows(lazy, index), mapped(eager, index)
    if kind == "scaled":
        lazy, eager = draw(pairs(columns, depth - 1))
        return Scaled(lazy, 0.3), eager * np.float32(0.3)
    if kind == "transposed":
        tall = np.random.default_rng(draw(st.integers(0, 9))).standard_normal((columns, 3))
        return Transposed(Rows(tall.astype(np.float32))), tall.astype(np.float32).T
    lazy, eager = draw(pairs(draw(st.integers(1, 4)), depth - 1))
    index = indices(draw, eager.shape[1], st.just(columns))
    return MappedColumns(lazy, index), mapped(eager.T, index).T


@given(st.data(), st.integers(1, 4))
def test_any_cut_gives_the_rows_that_numpy_gives(data: st.DataObject, columns: int) -> None:
    lazy, eager = data.draw(pairs(columns))
    assert lazy.shape == eager.shape
    rows = len(eager)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=5)))
    edges = [0, *cuts, rows]
    pieces = [lazy.read(start, stop) for start, stop in pairwise(edges)]
    assert all(piece.dtype == np.float32 for piece in pieces)
    assert [len(piece) for piece in pieces] == np.diff(edges).tolist()
    np.testing.assert_array_equal(np.concatenate(pieces), eager, strict=True)


def test_padding_is_zero_and_never_left_over() -> None:
    values = np.full((3, 2), np.nan, np.float32)
    nothing = np.array([-1, -1], np.int64)
    assert not MappedRows(Rows(values), nothing).read(0, 2).any()
    assert not MappedColumns(Rows(values), nothing).read(0, 3).any()


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2))
def test_padded_heads_keep_the_pairs_that_turn_together(heads: int, half: int, more: int) -> None:
    head_dim = 2 * half
    padded = -(-head_dim // 16) * 16 + 16 * more
    index = head_map(heads, head_dim, padded)
    assert index.dtype == np.int64
    assert index.shape == (heads * padded,)
    by_head = index.reshape(heads, 2, padded // 2)
    for head in range(heads):
        for i in range(half):
            first, second = by_head[head, :, i]
            assert (first, second) == (head * head_dim + i, head * head_dim + i + half)
    assert (by_head[:, :, half:] == -1).all()
    # Nothing is lost, doubled or moved to another place in the order.
    np.testing.assert_array_equal(index[index >= 0], np.arange(heads * head_dim))


@given(st.integers(1, 3), st.integers(1, 40), st.data())
def test_what_does_not_turn_lies_behind_what_does(
    heads: int, half: int, data: st.DataObject
) -> None:
    turning = data.draw(st.integers(1, half))
    size, start = 2 * half, data.draw(st.integers(0, 5))
    stride = size + data.draw(st.integers(0, 5))
    padded = -(-size // 16) * 16
    index = head_map(heads, size, padded, width=2 * turning, start=start, stride=stride)
    by_head = index.reshape(heads, 2, padded // 2)
    for head in range(heads):
        first = start + head * stride
        pairs = by_head[head, :, :turning]
        np.testing.assert_array_equal(pairs[0], first + np.arange(turning))
        np.testing.assert_array_equal(pairs[1], first + turning + np.arange(turning))
        rest = by_head[head, :, turning:]
        still = np.sort(rest[rest >= 0])
        np.testing.assert_array_equal(still, first + np.arange(2 * turning, size))


def test_heads_that_fit_are_left_alone() -> None:
    np.testing.assert_array_equal(head_map(3, 32, 32), np.arange(96))


SPEC = DecoderSpec(
    architecture="llama",
    hidden=16,
    intermediate=24,
    heads=2,
    kv_heads=1,
    head_dim=8,
    vocab=20,
    context=16,
    attention=(AttentionSpec(rope=RopeConfig()),),
    norm=NormSpec(eps=1e-6),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    tied=False,
)


def write_checkpoint(folder: Path, broken: str = "", value: float = 0.0) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in SPEC.tensor_shapes().items()
    }
    if broken:
        tensors[broken].reshape(-1)[-1] = value
    save_file(tensors, folder / SINGLE)


def export(folder: Path, storage: Storage) -> None:
    with Weights.open(folder) as weights:
        graph, _ = build_decoder(SPEC, weights, storage=storage, context=16)
        BundleWriter(folder / "out").write_graph(graph, producer="0", on_bytes=lambda size: None)


@pytest.mark.parametrize("storage", [FLOAT32, Storage(4, 32), Storage(8, 32)], ids=str)
@pytest.mark.parametrize("name", SPEC.tensor_shapes())
def test_weights_that_are_no_numbers_are_refused_by_name(
    name: str, storage: Storage, tmp_path: Path
) -> None:
    for value in (np.nan, np.inf, -np.inf):
        write_checkpoint(tmp_path, name, value)
        with pytest.raises(CheckpointError, match=f"'{name}'.*infinite or not a number"):
            export(tmp_path, storage)
    write_checkpoint(tmp_path)
    export(tmp_path, storage)


def test_only_the_rows_asked_for_are_judged(tmp_path: Path) -> None:
    save_file({"w": np.array([[1], [np.inf], [3]], np.float32)}, tmp_path / SINGLE)
    with Weights.open(tmp_path) as weights:
        assert read_finite(weights, "w", 2, 3).tolist() == [[3.0]]
        matrix = CheckpointMatrix(weights, "w")
        assert matrix.shape == (3, 1)
        assert matrix.read(0, 1).tolist() == [[1.0]]
        for start, stop in ((0, 2), (1, 2), (0, 3)):
            with pytest.raises(CheckpointError, match="'w'"):
                matrix.read(start, stop)
