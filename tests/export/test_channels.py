"""int8 with a scale per row: the rounding, the products of ONNX Runtime, and whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.errors import ArgumentError
from edge_llm.runtime.kernels import NO_DOT_PRODUCT
from edge_llm.runtime.session import create_session
from edge_llm_export import export_model
from edge_llm_export.checkpoint.prequantized import Packing
from edge_llm_export.choices import TARGETS
from edge_llm_export.graph.linear import Vocabulary, project
from edge_llm_export.graph.recorder import GraphRecorder
from edge_llm_export.quantize.choice import Request, choose_recipe
from edge_llm_export.quantize.rtn import quantize_channels
from edge_llm_export.quantize.storage import CHANNELS, FLOAT32, Storage, channel_tensors
from edge_llm_export.writer import BundleWriter

Floats = NDArray[np.float32]
MakeCheckpoint = Callable[..., Any]

TINY = float(np.finfo(np.float32).tiny)


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


def random_rows(rows: int, columns: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    scale = rng.choice(np.array([1e-3, 1, 100], np.float32), (rows, 1))
    values: Floats = (rng.standard_normal((rows, columns)) * scale).astype(np.float32)
    return values


ordinary = st.floats(-(2.0**100), 2.0**100, width=32)
extreme = st.floats(allow_nan=False, allow_infinity=False, width=32)
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=ordinary | extreme | st.sampled_from([0.0, -0.0, TINY, -TINY / 4]),
)


@given(matrices)
def test_no_weight_is_off_by_more_than_half_a_step(weights: Floats) -> None:
    integers, scales = quantize_channels(weights)
    assert integers.dtype == np.int8
    assert np.abs(integers.astype(int)).max() <= 127  # twice -128 * -128 overflows ARM's kernel
    steps = scales[:, None].astype(np.float64)
    error = np.abs(weights - integers * steps)
    # Where a scale's inverse would overflow, all is zero.
    assert (error <= np.where(steps > 0, steps * 0.5001, 128 * TINY)).all()


@pytest.mark.parametrize("shape", [(1, 3), (700, 513), (3, 300_000)])
def test_chunks_change_nothing(shape: tuple[int, int]) -> None:
    weights = random_rows(*shape)
    integers, scales = quantize_channels(weights)
    for transposed in (False, True):
        (stored,), (scale,) = channel_tensors(Rows(weights), transposed=transposed)
        assert stored.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(stored.T if transposed else stored, integers, strict=True)
        np.testing.assert_array_equal(scale, scales, strict=True)


def run(graph: GraphRecorder, folder: Path, **feeds: NDArray[Any]) -> list[Floats]:
    folder.mkdir()
    BundleWriter(folder).write_graph(graph, producer="test", on_bytes=lambda size: None)
    session = create_session(folder / "model.onnx", threads=1, minimum="1.32")
    results: list[Floats] = session.run(None, feeds)
    return results


def emulated(inputs: Floats, weights: Floats) -> Floats:
    """What the operators are to compute, of inputs [n, columns] and weights [rows, columns]."""
    integers, scales = quantize_channels(weights)
    divisor = np.maximum(np.abs(inputs).max(axis=1, keepdims=True), np.float32(TINY))
    scaled = inputs / divisor
    low, high = min(0.0, float(scaled.min())), max(0.0, float(scaled.max()))
    step = np.float32((high - low) / 255 or 1)
    zero = np.rint(-low / step)
    rounded = np.clip(np.rint(scaled / step) + zero, 0, 255) - zero
    product: Floats = (rounded @ integers.T.astype(np.float64) * step * scales * divisor).astype(
        np.float32
    )
    return product


@pytest.mark.parametrize("table", [False, True])
def test_onnxruntime_multiplies_as_numpy_does(table: bool, tmp_path: Path) -> None:
    weights, bias = random_rows(37, 48), random_rows(1, 37)[0]
    inputs = random_rows(5, 48, seed=1)
    inputs[3] = 0
    graph = GraphRecorder("test")
    if table:
        source = graph.input("x", np.float32, ["n", 48])
        Vocabulary(graph, "head", Rows(weights), CHANNELS).logits(source)
        graph.output("logits", np.float32, ["n", 37])
        (got,) = run(graph, tmp_path / "graph", x=inputs)
        expected = emulated(inputs, weights)
    else:
        source = graph.input("x", np.float32, ["batch", "n", 48])
        product = project(graph, "/projection", source, Rows(weights), CHANNELS, bias)
        graph.output(product, np.float32, ["batch", "n", 37])
        got = run(graph, tmp_path / "graph", x=inputs[None])[0][0]
        expected = emulated(inputs, weights) + bias
    # A tie of rounding may fall otherwise: one step of an input, times a weight.
    size = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(got - expected) <= 1e-2 * size + 1e-6).all()
    assert np.median(np.abs(got - expected) / (size + 1e-6)) < 1e-5


def test_one_tokens_outlier_costs_the_others_nothing(tmp_path: Path) -> None:
    """Some models have an input a thousand times as large at the first token as at the others."""
    weights, inputs = random_rows(64, 128), random_rows(6, 128, seed=2) / 100
    inputs[0, 5] = 1e5
    graph = GraphRecorder("test")
    source = graph.input("x", np.float32, ["batch", "n", 128])
    product = project(graph, "/projection", source, Rows(weights), CHANNELS)
    graph.output(product, np.float32, ["batch", "n", 64])
    got = run(graph, tmp_path / "graph", x=inputs[None])[0][0]
    exact = inputs @ weights.T
    error = np.linalg.norm(got - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < 0.02


def test_embedding_and_head_share_one_tensor(tmp_path: Path) -> None:
    weights = random_rows(50, 48)
    graph = GraphRecorder("test")
    tokens = graph.input("tokens", np.int64, ["batch", "n"])
    source = graph.input("x", np.float32, ["n", 48])
    table = Vocabulary(graph, "embed_tokens", Rows(weights), CHANNELS)
    graph.output(table.embed(tokens), np.float32, ["batch", "n", 48])
    table.logits(source)
    graph.output("logits", np.float32, ["n", 50])
    wanted = np.array([[3, 0], [49, 3]])
    got, _ = run(graph, tmp_path / "graph", tokens=wanted, x=random_rows(2, 48))
    integers, scales = quantize_channels(weights)
    np.testing.assert_array_equal(got, (integers * scales[:, None])[wanted])
    assert (tmp_path / "graph/model.onnx.data").stat().st_size < weights.nbytes / 2


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},  # an embedding and a head, and biases
    "gemma2": {"head_dim": 16},  # a softcap, and a scaled embedding
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_for_cpus_without_dot_products(
    family: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "checkpoint", family, **FAMILIES[family])
    export_model(tmp_path / "checkpoint", tmp_path / "fp32", quantize="fp32")
    manifest = export_model(tmp_path / "checkpoint", tmp_path / "int8", target=NO_DOT_PRODUCT)
    assert manifest.target == NO_DOT_PRODUCT
    assert (manifest.quantization.bits, manifest.quantization.block) == (8, None)
    nodes = onnx.load(tmp_path / "int8/model.onnx", load_external_data=False).graph.node
    products = {node.op_type for node in nodes} & {"MatMulNBits", "MatMul", "Gemm"}
    assert not products
    tokens = list(np.random.default_rng(0).integers(2, 400, 40))
    with LLM(tmp_path / "fp32") as reference, LLM(tmp_path / "int8") as llm:
        exact, got = reference.logits(tokens), llm.logits(tokens)
    error = np.abs(got - exact).max() / (exact.max() - exact.min())
    assert error < 0.06, error


def test_int4_for_cpus_without_dot_products_saves_memory(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    manifest = export_model(tiny_checkpoint, folder, target=NO_DOT_PRODUCT, quantize="int4")
    assert (manifest.target, manifest.quantization.bits, manifest.quantization.block) == (
        NO_DOT_PRODUCT,
        4,
        32,
    )


def test_the_other_targets_take_the_default_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in (None, "x86", "arm64"):
        folder = tmp_path / str(name)
        manifest = export_model(tiny_checkpoint, folder, target=name, quantize="int4")
        assert manifest.target == name
    graphs = {(tmp_path / str(name) / "model.onnx").read_bytes() for name in (None, "x86", "arm64")}
    assert len(graphs) == 1


FOUR = Packing(method="gptq", bits=4, group=32, symmetric=True)
EIGHT = Packing(method="gptq", bits=8, group=32, symmetric=True)


def storage(
    quantize: str | None, block: int | None, packing: Packing | None, target: str | None
) -> Storage:
    request = Request(quantize=quantize, block=block, target=target)
    return choose_recipe(request, packing, layered=True).storage


@pytest.mark.parametrize("target", [None, *TARGETS])
def test_storages_by_target(target: str | None) -> None:
    slow = target == NO_DOT_PRODUCT
    assert storage("fp32", None, None, target) == FLOAT32
    assert storage("int4", 64, None, target) == Storage(4, 64)
    assert storage("int8", None, None, target) == (CHANNELS if slow else Storage(8, 32))
    assert storage(None, None, None, target) == (CHANNELS if slow else Storage(4, 128))
    assert storage(None, None, FOUR, target) == Storage(4, 32)


def test_what_a_target_cannot_have_is_refused() -> None:
    with pytest.raises(ArgumentError, match="target must be one of x86, arm64, arm64-nodotprod"):
        Request(target="riscv")
    with pytest.raises(ArgumentError, match="block must be left out with int8 for arm64-nodotprod"):
        Request(block=32, target=NO_DOT_PRODUCT)
    with pytest.raises(ArgumentError, match="unquantized checkpoint"):
        storage(None, None, EIGHT, NO_DOT_PRODUCT)


def test_calibrating_rows_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match="method must be left out with int8 for arm64-nodotprod"
    ):
        export_model(tiny_checkpoint, tmp_path / "bundle", target=NO_DOT_PRODUCT, method="gptq")


def test_optimums_graphs_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="target must be left out where optimum"):
        export_model(tiny_checkpoint, tmp_path / "bundle", target=NO_DOT_PRODUCT, via="optimum")
