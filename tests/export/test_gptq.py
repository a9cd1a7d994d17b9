"""GPTQ against its paper's own procedure, and against rounding to nearest."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError
from edge_llm_export.quantize.gptq import (
    GPTQMatrix,
    factorize,
    factorize_each,
    search_scales,
)
from edge_llm_export.quantize.rtn import dequantize_blocks, quantize_rows
from edge_llm_export.quantize.storage import QuantizedMatrix, RoundedMatrix, Storage

Floats = NDArray[np.float32]

STORAGES = [Storage(bits, block) for bits in (4, 8) for block in (32, 64, 128)]


@dataclass(frozen=True)
class Rows:
    """A matrix that is in memory."""

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def read(self, start: int, stop: int) -> Floats:
        return self.values[start:stop].copy()


def layer(columns: int, rows: int = 24, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """A weight, and correlated inputs of uneven strength: to calibrate on, and to judge by."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) * np.exp(rng.standard_normal(columns))
    inputs = rng.standard_normal((8 * columns, columns)) @ mix
    weight = rng.standard_normal((rows, columns))
    half = len(inputs) // 2
    seen, unseen = (part.astype(np.float32) for part in (inputs[:half], inputs[half:]))
    return weight.astype(np.float32), seen, unseen


def moments(inputs: Floats) -> NDArray[np.float64]:
    wide = inputs.astype(np.float64)
    return wide.T @ wide


def restored(matrix: QuantizedMatrix) -> Floats:
    rows, columns = matrix.shape
    blocks = matrix.blocks(0, rows)
    return dequantize_blocks(
        blocks.integers, blocks.scales, bits=matrix.storage.bits, columns=columns
    )


def paper(
    weight: Floats,
    hessian: NDArray[np.float64],
    scales: Floats,
    storage: Storage,
    *,
    damping: float,
) -> tuple[NDArray[np.uint8], Floats]:
    """arXiv 2210.17323, algorithm 1, column by column, with these scales.

    Gives the integers, and the scales that it would have searched at the start of each block.
    """
    block, half = storage.block, 1 << (storage.bits - 1)
    assert block is not None
    columns = len(hessian)
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diag(hessian)) * np.eye(columns))
    upper = np.linalg.cholesky(inverse).T
    left = weight.astype(np.float64)
    integers = np.zeros(weight.shape, np.uint8)
    searched = np.zeros_like(scales)
    for j in range(columns):
        if j % block == 0:
            ahead = left[:, j : j + block].T.astype(np.float32)
            loss = (1 / np.diag(upper)[j : j + block] ** 2).astype(np.float32)
            searched[:, j // block] = search_scales(ahead, loss, bits=storage.bits)
        scale = scales[:, j // block]
        integer = np.clip(np.rint(left[:, j] / scale), -half, half - 1)
        integers[:, j] = integer + half
        error = (left[:, j] - integer * scale) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
    return integers, searched


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_integers_are_those_of_the_papers_procedure(storage: Storage) -> None:
    weight, inputs, _ = layer(256)
    assert storage.block is not None
    feedback = factorize(moments(inputs), block=storage.block, damping=0.01)
    blocks = GPTQMatrix(Rows(weight), storage, feedback, rounds=0).blocks(0, len(weight))
    integers, searched = paper(weight, moments(inputs), blocks.scales, storage, damping=0.01)
    np.testing.assert_array_equal(blocks.integers.reshape(integers.shape), integers)
    np.testing.assert_allclose(blocks.scales, searched, rtol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@given(seed=st.integers(0, 2**32 - 1), columns=st.sampled_from([96, 128, 150]))
@settings(max_examples=4)
def test_unseen_inputs_lose_less_than_by_rounding_to_nearest(
    storage: Storage, act_order: bool, seed: int, columns: int
) -> None:
    weight, inputs, unseen = layer(columns, seed=seed)
    assert storage.block is not None
    feedback = factorize(moments(inputs), block=storage.block, act_order=act_order)

    def lost(matrix: QuantizedMatrix) -> float:
        return float(np.square(unseen @ (restored(matrix) - weight).T).sum())

    source = Rows(weight)
    assert lost(GPTQMatrix(source, storage, feedback)) < 0.8 * lost(RoundedMatrix(source, storage))


@given(seed=st.integers(0, 2**32 - 1), block=st.sampled_from([32, 64]))
@settings(max_examples=20)
def test_no_round_of_descent_loses_more(seed: int, block: int) -> None:
    weight, inputs, _ = layer(128, rows=6, seed=seed)
    weight[0, :block] = 0
    feedback = factorize(moments(inputs), block=block)
    found = []
    for rounds in range(4):
        matrix = GPTQMatrix(Rows(weight), Storage(4, block), feedback, rounds=rounds)
        errors = (restored(matrix) - weight).astype(np.float64)
        found.append(np.einsum("ij,jk,ik->i", errors, feedback.moments, errors))
    for before, after in itertools.pairwise(found):
        assert (after <= before * (1 + 1e-5)).all()
    assert found[-1].sum() < 0.99 * found[0].sum()


def test_descent_ends_where_no_integer_and_no_scale_is_better_alone() -> None:
    weight, inputs, _ = layer(64, rows=4)
    feedback = factorize(moments(inputs), block=32)
    matrix = GPTQMatrix(Rows(weight), Storage(4, 32), feedback, rounds=40)
    blocks = matrix.blocks(0, 4)

    def lost(integers: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float64]:
        errors = weight - (integers * scales[..., None]).reshape(weight.shape)
        least: NDArray[np.float64] = np.einsum("ij,jk,ik->i", errors, feedback.moments, errors)
        return least

    integers, scales = blocks.integers - 8.0, blocks.scales.astype(np.float64)
    least = lost(integers, scales)
    for step in (-1, 1):
        for b, k in itertools.product(range(2), range(32)):
            other = integers.copy()
            other[:, b, k] = np.clip(other[:, b, k] + step, -8, 7)
            assert (lost(other, scales) >= least * (1 - 1e-6)).all()
        for b in range(2):
            wider = scales.copy()
            wider[:, b] *= 1 + step * 1e-3
            assert (lost(integers, wider) >= least * (1 - 1e-6)).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_rows_may_be_read_apart(act_order: bool) -> None:
    weight, inputs, _ = layer(100)
    feedback = factorize(moments(inputs), block=32, act_order=act_order)
    matrix = GPTQMatrix(Rows(weight), Storage(4, 32), feedback)
    whole, part = matrix.blocks(0, 24), matrix.blocks(7, 12)
    np.testing.assert_array_equal(part.integers, whole.integers[7:12])
    np.testing.assert_allclose(part.scales, whole.scales[7:12], rtol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [96, 256, 300])
def test_blocks_of_several_lengths_share_what_they_can(columns: int, act_order: bool) -> None:
    _, inputs, _ = layer(columns)
    found = factorize_each(moments(inputs), {32, 64, 128}, act_order=act_order)
    assert set(found) == {32, 64, 128}
    for block, one in found.items():
        own = factorize(moments(inputs), block=block, act_order=act_order)
        assert one.block == block
        np.testing.assert_array_equal(one.order, own.order)
        np.testing.assert_array_equal(one.moments, own.moments)
        np.testing.assert_allclose(one.upper, own.upper, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(one.loss, own.loss, rtol=1e-9)


def test_inputs_that_say_nothing_leave_rounding_to_the_nearest() -> None:
    weight, _, _ = layer(128)
    for quiet in (np.zeros((128, 128)), np.eye(128)):
        feedback = factorize(quiet, block=32)
        matrix = GPTQMatrix(Rows(weight), Storage(4, 32), feedback)
        scales = matrix.blocks(0, len(weight)).scales[..., None]
        blocks = weight.reshape(len(weight), 4, 32)
        nearest = np.clip(np.rint(blocks / scales), -8, 7) * scales
        np.testing.assert_allclose(restored(matrix).reshape(nearest.shape), nearest, rtol=1e-5)


@pytest.mark.parametrize("act_order", [False, True])
def test_columns_without_input_and_rows_of_zeros(act_order: bool) -> None:
    weight, inputs, _ = layer(100)
    weight[3] = 0
    weight[4, :64] = 0
    inputs[:, [0, 17, 99]] = 0
    feedback = factorize(moments(inputs), block=32, act_order=act_order)
    result = restored(GPTQMatrix(Rows(weight), Storage(8, 32), feedback))
    assert not result[3].any()
    assert not result[4, :64].any()
    dead = [0, 17, 99]
    np.testing.assert_allclose(result[:, dead], weight[:, dead], atol=0.1)


def test_strong_inputs_first() -> None:
    strength = np.array([*range(32), *range(64, 96), *range(32, 64)], np.float64) + 1
    order = factorize(np.diag(strength), block=32, act_order=True).order
    assert order.tolist() == [*range(63, 31, -1), *range(95, 63, -1), *range(31, -1, -1)]


def test_a_searched_scale_loses_less_than_that_of_the_largest_weight() -> None:
    weight, _, _ = layer(128, rows=64)
    loss = np.exp(np.random.default_rng(1).standard_normal(128))
    _, scales = quantize_rows(weight, bits=4, block=128)
    full = scales[:, 0]

    def lost(scale: Floats) -> NDArray[np.float64]:
        integers = np.clip(np.rint(weight.T / scale), -8, 7)
        total: NDArray[np.float64] = loss @ np.square(weight.T - integers * scale)
        return total

    found = search_scales(weight.T, loss, bits=4)
    assert (lost(found) <= lost(full)).all()
    assert lost(found).mean() < 0.9 * lost(full).mean()


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.5, float("nan")])
def test_dampings_outside_their_domain(damping: float) -> None:
    with pytest.raises(ArgumentError, match="damping"):
        factorize(np.eye(32), block=32, damping=damping)
