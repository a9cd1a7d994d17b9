"""A graph's own inputs, outputs and attention decide its layout, its cache and its context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_llm.errors import UnsupportedFormatError
from edge_llm.foreign.onnx_file import OnnxModel, read_onnx
from edge_llm.foreign.state import CacheSizes, read_context, read_decoder

KINDS = ("key", "value")


def table(name: str, rows: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.zeros((rows, 8), np.float32), name)


def constant(name: str, rows: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=table("", rows))


def branch(name: str, rows: int) -> onnx.GraphProto:
    nodes = [constant(f"{one}_{name}", rows) for one in ("cos", "sin")]
    outputs = [
        helper.make_tensor_value_info(f"{one}_{name}", TensorProto.FLOAT, None)
        for one in ("cos", "sin")
    ]
    return helper.make_graph(nodes, name, [], outputs)


def attention(layer: int, *inputs: str, **settings: Any) -> onnx.NodeProto:
    past, present = ([f"{name}.{layer}.{kind}" for kind in KINDS] for name in ("past", "present"))
    return helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", *past, "seqlens", "total", *inputs],
        [f"a{layer}", *present],
        domain="com.microsoft",
        **settings,
    )


def read(path: Path, nodes: list[onnx.NodeProto], *tensors: onnx.TensorProto) -> OnnxModel:
    """A graph of two layers with these nodes."""
    shape = ["batch", "heads", "past", "width"]
    values = [
        helper.make_tensor_value_info(f"{name}.{layer}.{kind}", TensorProto.FLOAT, shape)
        for name in ("past", "present")
        for layer in (1, 0)  # the order of the file means nothing
        for kind in KINDS
    ]
    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    graph = helper.make_graph(nodes, "g", [tokens, *values[:4]], values[4:], list(tensors))
    (path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    return read_onnx(path / "model.onnx")


NAMES = {f"past.%d.{kind}": f"present.%d.{kind}" for kind in KINDS}
SIZES = CacheSizes(kv_heads=2, head_dim=16)


def test_sizes_that_the_graph_leaves_open_come_from_the_configuration(tmp_path: Path) -> None:
    model = read(tmp_path, [attention(0), attention(1)])
    decoder = read_decoder(model, "model.onnx", SIZES, NAMES)
    assert decoder.layout == "genai.v1"
    assert [one.input for one in decoder.state] == [
        *("past.0.key", "past.0.value", "past.1.key", "past.1.value")
    ]
    assert {one.shape for one in decoder.state} == {("batch", 2, "capacity", 16)}
    with pytest.raises(UnsupportedFormatError, match=r"'past\.0\.key' is float32 \['batch', 'head"):
        read_decoder(model, "model.onnx", CacheSizes(kv_heads=2), NAMES)


@pytest.mark.parametrize(
    "more",
    [
        helper.make_node("Concat", ["past.1.key", "k"], ["longer"], axis=2),
        helper.make_node("Shape", ["past.0.value"], ["size"]),
        attention(0),
    ],
    ids=["concatenation", "a shape", "two readers"],
)
def test_a_cache_that_anything_else_reads_is_not_shared(
    tmp_path: Path, more: onnx.NodeProto
) -> None:
    model = read(tmp_path, [attention(0), attention(1), more])
    decoder = read_decoder(model, "model.onnx", SIZES, NAMES)
    assert decoder.layout == "standard.v1"
    assert not any(one.shared for one in decoder.state)


def test_a_cache_that_is_given_on_by_another_name_is_not_shared(tmp_path: Path) -> None:
    nodes = [attention(0), attention(1)]
    nodes[1].output[1] = "inner"
    nodes.append(helper.make_node("Identity", ["inner"], ["present.1.key"]))
    layout = read_decoder(read(tmp_path, nodes), "model.onnx", SIZES, NAMES).layout
    assert layout == "standard.v1"


def test_windows_are_those_of_the_attention(tmp_path: Path) -> None:
    window = {"local_window_size": 32, "sliding_window_cache": 1}
    nodes = [attention(0, **window), attention(1, local_window_size=32)]
    decoder = read_decoder(read(tmp_path, nodes), "model.onnx", SIZES, NAMES)
    assert [(one.kind, one.window) for one in decoder.state[::2]] == [("window", 32), ("kv", None)]
    nodes.append(helper.make_node("Shape", ["past.1.key"], ["size"]))
    with pytest.raises(UnsupportedFormatError, match=r"window in 'past\.0\.key'"):
        read_decoder(read(tmp_path, nodes), "model.onnx", SIZES, NAMES)


def test_rotary_tables_bound_the_context(tmp_path: Path) -> None:
    plain = [attention(0, "cos", "sin"), attention(1, "cos", "sin")]
    model = read(tmp_path, plain, table("cos", 100), table("sin", 100))
    assert read_context(model, 512) == 100
    assert read_context(model, 64) == 64
    assert read_context(read(tmp_path, [attention(0), attention(1)]), 512) == 512
    switch = helper.make_node(
        "If",
        ["long"],
        ["cos", "sin"],
        then_branch=branch("large", 256),
        else_branch=branch("small", 48),
    )
    assert read_context(read(tmp_path, [switch, *plain]), 256) == 48
