"""A traced graph's matrices become blocks of integers, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_llm.runtime.session import create_session
from edge_llm_export.fallback.initializers import Initializers
from edge_llm_export.fallback.rewrite import Rewritten, rewrite
from edge_llm_export.quantize.packing import pack
from edge_llm_export.quantize.rtn import dequantize_blocks, quantize_rows
from edge_llm_export.quantize.storage import FLOAT32, Storage
from edge_llm_export.writer import DATA_FILE, BundleWriter

INT4 = Storage(4, 32)
INT8 = Storage(8, 32)
VOCAB = 50
TOKENS = np.array([[3, 49, 0]])

Arrays = dict[str, NDArray[Any]]


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(len(shape) * 100 + shape[0]).standard_normal(shape, np.float32)


def node(kind: str, inputs: Sequence[str], output: str, **settings: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"/{output}", **settings)


def constant(name: str, value: NDArray[Any]) -> onnx.NodeProto:
    return node("Constant", [], name, value=numpy_helper.from_array(value))


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    weights: Arrays,
    *,
    inputs: Sequence[tuple[str, int, Sequence[Any]]] = (("x", TensorProto.FLOAT, ("n", 64)),),
    outputs: Sequence[str] = ("y",),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "traced",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def rewritten(model: onnx.ModelProto, folder: Path, storage: Storage = INT4) -> Rewritten:
    return rewrite(model, Initializers(model.graph, folder), storage=storage, vocab=VOCAB)


def write(new: Rewritten, folder: Path) -> onnx.ModelProto:
    BundleWriter(folder).write_graph(new.graph, producer="0", on_bytes=lambda size: None)
    return onnx.load(folder / "model.onnx", load_external_data=False)


def run(folder: Path, **feeds: NDArray[Any]) -> list[NDArray[Any]]:
    session = create_session(folder / "model.onnx", threads=1, minimum="1.32")
    results: list[NDArray[Any]] = session.run(None, feeds)
    return results


def rounded(weights: NDArray[np.float32], storage: Storage) -> NDArray[np.float32]:
    """The weights [rows, columns] after rounding."""
    assert storage.block is not None
    integers, scales = quantize_rows(weights, bits=storage.bits, block=storage.block)
    return dequantize_blocks(integers, scales, bits=storage.bits, columns=weights.shape[1])


def close(got: NDArray[Any], expected: NDArray[Any], tolerance: float = 0.02) -> bool:
    """MatMulNBits rounds activations to int8 per block: a hundredth of the range."""
    return bool(np.abs(got - expected).max() <= tolerance * max(np.ptp(expected), 1e-3))


def kinds(model: onnx.ModelProto) -> list[str]:
    return [one.op_type for one in model.graph.node]


FORMS = {
    "MatMul": ([node("MatMul", ["x", "w"], "y")], True),
    "MatMul of a transpose": (
        [node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")],
        False,
    ),
    "MatMul of a copy of a transpose": (
        [
            node("Identity", ["w"], "i"),
            node("Transpose", ["i"], "t"),
            node("MatMul", ["x", "t"], "y"),
        ],
        False,
    ),
    "Gemm": ([node("Gemm", ["x", "w"], "y")], True),
    "Gemm, transB": ([node("Gemm", ["x", "w"], "y", transB=1)], False),
    "Gemm of a transpose, transB": (
        [node("Transpose", ["w"], "t", perm=[1, 0]), node("Gemm", ["x", "t"], "y", transB=1)],
        True,
    ),
}


@pytest.mark.parametrize("storage", [INT4, INT8, Storage(4, 128)])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_stored_as_the_builder_stores_it(
    form: str, storage: Storage, tmp_path: Path
) -> None:
    nodes, columns_first = FORMS[form]
    weights = noise(40, 64)
    stored = np.ascontiguousarray(weights.T) if columns_first else weights
    new = rewritten(graph_of(nodes, {"w": stored}), tmp_path, storage)
    model = write(new, tmp_path)
    assert kinds(model) == ["MatMulNBits"]
    assert new.tables == new.unrecognized == ()
    assert storage.block is not None
    integers, scales = quantize_rows(weights, bits=storage.bits, block=storage.block)
    content = Initializers(model.graph, tmp_path)
    name = "w.T" if columns_first else "w"
    assert np.array_equal(content.array(f"{name}_q{storage.bits}"), pack(integers, storage.bits))
    assert np.array_equal(content.array(f"{name}_scales"), scales)
    x = noise(5, 64)
    assert close(run(tmp_path, x=x)[0], x @ rounded(weights, storage).T)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 150),
    columns_first=st.booleans(),
    storage=st.sampled_from([INT4, INT8, Storage(8, 64)]),
    biased=st.booleans(),
    external=st.booleans(),
)
def test_any_shape(
    rows: int,
    columns: int,
    columns_first: bool,
    storage: Storage,
    biased: bool,
    external: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("graph")
    weights, bias, x = noise(rows, columns), noise(rows), noise(4, columns)
    arrays: Arrays = {"w": np.ascontiguousarray(weights.T) if columns_first else weights}
    inputs = ["x", "w"]
    if biased:
        arrays["b"] = bias
        inputs.append("b")
    model = graph_of(
        [node("Gemm", inputs, "y", transB=int(not columns_first))],
        arrays,
        inputs=[("x", TensorProto.FLOAT, ("n", columns))],
    )
    if external:
        onnx.save(
            model, folder / "in.onnx", save_as_external_data=True, location="in", size_threshold=0
        )
        model = onnx.load(folder / "in.onnx", load_external_data=False)
    assert kinds(write(rewritten(model, folder, storage), folder)) == ["MatMulNBits"]
    expected = x @ rounded(weights, storage).T + (bias if biased else 0)
    # A single product has no range: the sizes of its terms stand in for it.
    scale = np.abs(x).max() * np.abs(weights).sum(axis=1).max()
    assert np.abs(run(folder, x=x)[0] - expected).max() <= 0.01 * scale


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}, {"bias": (5, 40)}]
)
def test_other_products_stay_and_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    weights, x = noise(64, 40), noise(5, 64)
    bias = noise(*settings.pop("bias", (40,)))
    given = np.ascontiguousarray(x.T) if "transA" in settings else x
    shape = ("n" if size == 5 else size for size in given.shape)
    model = graph_of(
        [node("Gemm", ["x", "w", "b"], "y", **settings)],
        {"w": weights, "b": bias},
        inputs=[("x", TensorProto.FLOAT, list(shape))],
    )
    new = rewritten(model, tmp_path)
    assert kinds(write(new, tmp_path)) == ["Gemm"]
    assert set(new.unrecognized) - {"b"} == {"w"}
    expected = settings.get("alpha", 1.0) * (x @ weights) + settings.get("beta", 1.0) * bias
    assert close(run(tmp_path, x=given)[0], expected, 1e-5)


def test_experts_in_one_tensor_stay_and_are_named(tmp_path: Path) -> None:
    weights = noise(3, 64, 40)
    model = graph_of([node("MatMul", ["x", "experts"], "y")], {"experts": weights})
    new = rewritten(model, tmp_path)
    assert (new.tables, new.unrecognized) == ((), ("experts",))
    assert kinds(write(new, tmp_path)) == ["MatMul"]


@pytest.mark.parametrize("columns", [64, 48])
@pytest.mark.parametrize("storage", [INT4, INT8])
def test_a_tied_head_and_the_embedding_share_their_bytes(
    columns: int, storage: Storage, tmp_path: Path
) -> None:
    weights = noise(VOCAB, columns)
    nodes = [
        node("Gather", ["w", "ids"], "e"),
        node("Transpose", ["w"], "t", perm=[1, 0]),
        node("MatMul", ["e", "t"], "y"),
    ]
    inputs = [("ids", TensorProto.INT64, ("b", "n"))]
    model = graph_of(nodes, {"w": weights}, inputs=inputs, outputs=["y", "e"])
    new = rewritten(model, tmp_path, storage)
    wanted = ["GatherBlockQuantized", "MatMulNBits"] + ["Slice"] * bool(columns % 32)
    assert sorted(kinds(write(new, tmp_path))) == sorted(wanted)
    stored = VOCAB * -(-columns // 32) * (32 * storage.bits // 8 + 4)
    assert (tmp_path / DATA_FILE).stat().st_size <= stored + 64
    logits, rows = run(tmp_path, ids=TOKENS)
    table = rounded(weights, storage)
    assert np.array_equal(rows, table[TOKENS])
    assert close(logits, table[TOKENS] @ table.T)


def test_a_table_of_positions_stays_exact(tmp_path: Path) -> None:
    words, places = noise(VOCAB, 64), noise(30, 64)
    nodes = [
        node("Gather", ["words", "ids"], "e"),
        node("Gather", ["places", "ids"], "p"),
    ]
    inputs = [("ids", TensorProto.INT64, ("n",))]
    arrays = {"words": words, "places": places}
    model = graph_of(nodes, arrays, inputs=inputs, outputs=["e", "p"])
    new = rewritten(model, tmp_path)
    assert (new.tables, new.unrecognized) == (("places",), ())
    assert kinds(write(new, tmp_path)) == ["GatherBlockQuantized", "Gather"]
    ids = np.array([2, 29])
    embedded, placed = run(tmp_path, ids=ids)
    assert np.array_equal(embedded, rounded(words, INT4)[ids])
    assert np.array_equal(placed, places[ids])


def test_equal_constants_are_stored_once(tmp_path: Path) -> None:
    mask = np.tri(64, 64, dtype=bool)
    nodes: list[onnx.NodeProto] = []
    source = "x"
    for i in range(4):
        nodes += [
            constant(f"mask{i}", mask),
            constant(f"low{i}", np.array(-1.0 - i // 2, np.float32)),
            node("Where", [f"mask{i}", source, f"low{i}"], f"m{i}"),
        ]
        source = f"m{i}"
    nodes.append(node("Identity", [source], "y"))
    inputs = [("x", TensorProto.FLOAT, (64, 64))]
    model = write(rewritten(graph_of(nodes, {}, inputs=inputs), tmp_path), tmp_path)
    assert kinds(model) == ["Where"] * 4 + ["Identity"]
    shapes = sorted(tuple(one.dims) for one in model.graph.initializer)
    assert shapes == [(), (), (64, 64)]  # two numbers, one mask
    x = noise(64, 64)
    assert np.array_equal(run(tmp_path, x=x)[0], np.where(mask, x, np.float32(-2)))


def test_graphs_inside_nodes_keep_what_they_read(tmp_path: Path) -> None:
    weights = noise(64, 64)
    same = np.full((64, 64), 0.5, np.float32)
    inner = [
        helper.make_graph([node(kind, [name, "w"], f"o{i}")], f"branch{i}", [], [out])
        for i, (kind, name) in enumerate((("MatMul", "x"), ("Add", "half2")))
        for out in [helper.make_tensor_value_info(f"o{i}", TensorProto.FLOAT, None)]
    ]
    nodes = [
        constant("half1", same),
        constant("half2", same),
        node("Mul", ["x", "half1"], "h"),
        node("MatMul", ["h", "w"], "p"),
        node("If", ["which"], "r", then_branch=inner[0], else_branch=inner[1]),
        node("Add", ["p", "r"], "y"),
    ]
    inputs = [("x", TensorProto.FLOAT, (64, 64)), ("which", TensorProto.BOOL, ())]
    new = rewritten(graph_of(nodes, {"w": weights}, inputs=inputs), tmp_path)
    write(new, tmp_path)
    assert new.unrecognized == ("w",)  # stored twice: inside the branches it stays float32
    x = noise(64, 64)
    product = (x * 0.5) @ rounded(np.ascontiguousarray(weights.T), INT4).T
    for which, other in ((True, x @ weights), (False, same + weights)):
        assert close(run(tmp_path, x=x, which=np.array(which))[0], product + other)


def test_float32_leaves_every_node(tmp_path: Path) -> None:
    weights, x = noise(40, 64), noise(5, 64)
    nodes = [node("Transpose", ["w"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")]
    new = rewritten(graph_of(nodes, {"w": weights}), tmp_path, FLOAT32)
    assert kinds(write(new, tmp_path)) == ["Transpose", "MatMul"]
    assert close(run(tmp_path, x=x)[0], x @ weights.T, 1e-5)


def test_what_no_output_needs_goes(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "unused"], "u"), node("MatMul", ["x", "w"], "y")]
    model = graph_of(nodes, {"w": noise(64, 40), "unused": noise(64, 30)})
    written = write(rewritten(model, tmp_path), tmp_path)
    assert kinds(written) == ["MatMulNBits"]
    assert not [one.name for one in written.graph.initializer if "unused" in one.name]


@pytest.mark.parametrize("storage", [FLOAT32, INT4])
def test_the_head_scores_as_many_of_the_last_tokens_as_are_wanted(
    storage: Storage, tmp_path: Path
) -> None:
    weights, bias = noise(VOCAB, 64), noise(VOCAB)
    nodes = [
        node("Gather", ["w", "ids"], "e"),
        node("Transpose", ["w"], "t", perm=[1, 0]),
        node("MatMul", ["e", "t"], "p"),
        node("Add", ["bias", "p"], "s"),
        node("Mul", ["s", "half"], "h"),
        node("Tanh", ["h"], "logits"),
    ]
    arrays = {"w": weights, "bias": bias, "half": np.array(0.5, np.float32)}
    inputs = [("ids", TensorProto.INT64, ("b", "n"))]
    model = graph_of(nodes, arrays, inputs=inputs, outputs=["logits", "e"])
    write(rewritten(model, tmp_path, storage), tmp_path)
    table = weights if storage == FLOAT32 else rounded(weights, storage)
    expected = np.tanh((table[TOKENS] @ table.T + bias) * 0.5)
    for wanted in (1, 2, 3, 100):
        logits, states = run(tmp_path, ids=TOKENS, num_logits_to_keep=np.array(wanted))
        assert np.array_equal(states, table[TOKENS])
        assert logits.shape == expected[:, -wanted:].shape
        assert close(logits, expected[:, -wanted:])


@pytest.mark.parametrize("how", ["a Gemm", "a sum over tokens", "a factor per token"])
def test_logits_that_are_made_in_another_way_are_all_given(how: str, tmp_path: Path) -> None:
    weights, x = noise(64, VOCAB), noise(3, 64)
    nodes = {
        "a Gemm": [node("Gemm", ["x", "w"], "logits")],
        "a sum over tokens": [
            node("MatMul", ["x", "w"], "p"),
            node("CumSum", ["p", "axis"], "logits"),
        ],
        "a factor per token": [
            node("MatMul", ["x", "w"], "p"),
            node("Mul", ["p", "factors"], "logits"),
        ],
    }[how]
    arrays: Arrays = {"w": weights, "axis": np.array(0), "factors": noise(3, 1)}
    model = write(rewritten(graph_of(nodes, arrays, outputs=["logits"]), tmp_path), tmp_path)
    assert [one.name for one in model.graph.input] == ["x"]
    assert run(tmp_path, x=x)[0].shape == (3, VOCAB)
