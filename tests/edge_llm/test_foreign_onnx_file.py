"""What is read of an ONNX file is what the onnx package reads, and nothing in it can do harm."""

from __future__ import annotations

import math
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_llm.errors import IntegrityError
from edge_llm.foreign.external_data import check_external_data, inner_path
from edge_llm.foreign.onnx_file import _BITS, DTYPES, OnnxModel, read_onnx
from edge_llm.foreign.protobuf import DEEPEST, MOST_FIELDS

Change = Callable[[onnx.ModelProto], object]
DATA = "weights.bin"


def branch(name: str) -> onnx.GraphProto:
    constant = helper.make_node("Constant", [], [f"{name}_c"], value=np_tensor("", [1.5, 2.5]))
    node = helper.make_node("Add", [f"{name}_c", f"{name}_w"], [f"{name}_y"], name=f"{name}_add")
    output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [2])
    return helper.make_graph([constant, node], name, [], [output], [np_tensor(f"{name}_w", [1, 2])])


def np_tensor(name: str, values: list[float]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.float32), name)


def external(name: str, shape: list[int], **entries: object) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": DATA} | entries).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def small_model() -> onnx.ModelProto:
    """Something of everything: an inner graph, a function, tensors of every kind of storage."""
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", None]),
        helper.make_tensor_value_info("past.0", TensorProto.FLOAT16, ["batch", 2, "past", 16]),
        helper.make_tensor_value_info("given", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("open", TensorProto.BOOL, None),
    ]
    nodes = [
        helper.make_node("If", ["open"], ["y"], then_branch=branch("a"), else_branch=branch("b")),
        helper.make_node(
            "MatMulNBits", ["y", "w", "s"], ["z"], domain="com.microsoft", K=64, N=-3, bits=4
        ),
    ]
    tensors = [
        np_tensor("given", [1, 2]),
        external("far", [4], offset=16, length=16, checksum="0"),
        external("farther", [2, 2], offset=4),
        helper.make_tensor("floats", TensorProto.FLOAT, [3], [1, 2, 3]),
        helper.make_tensor("ints", TensorProto.INT32, [2, 2], [1, -2, 3, 4]),
        helper.make_tensor("halves", TensorProto.FLOAT16, [2], [1, 2]),
        helper.make_tensor("longs", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("doubles", TensorProto.DOUBLE, [], [0.5]),
        helper.make_tensor("fours", TensorProto.INT4, [3], [1, -2, 3]),
        numpy_helper.from_array(np.array(["a", "bc"], object), "texts"),
        numpy_helper.from_array(np.zeros((0, 5), np.uint8), "nothing"),
    ]
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 400])
    graph = helper.make_graph(nodes, "small", inputs, [output], tensors)
    scale = helper.make_node("Constant", [], ["k"], value=np_tensor("", [3]))
    double = helper.make_function("mine", "Triple", ["x"], ["t"], [scale], [])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        graph,
        opset_imports=opsets,
        functions=[double],
        producer_name="somebody",
        producer_version="1.2",
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[[onnx.ModelProto | bytes], Path]:
    """Writes a model and its weights, and gives the model's path."""

    def write(model: onnx.ModelProto | bytes) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        (tmp_path / DATA).write_bytes(bytes(32))
        return path

    return write


Write = Callable[[onnx.ModelProto | bytes], Path]


def test_everything_is_read(write: Write) -> None:
    path = write(small_model())
    model = read_onnx(path)
    assert model.producer == ("somebody", "1.2")
    assert model.opsets == {"": 21, "com.microsoft": 1}
    assert [(one.name, one.dtype, one.shape) for one in model.inputs] == [
        ("input_ids", "int64", ("batch", "")),
        ("past.0", "float16", ("batch", 2, "past", 16)),
        ("open", "bool", None),
    ]
    assert [(one.name, one.shape) for one in model.outputs] == [("z", ("batch", 400))]
    operators = [node.operator for node in model.nodes]
    assert operators == ["Constant", "Constant", "Add", "Constant", "Add", "If", "MatMulNBits"]
    last = model.nodes[-1]
    assert (last.domain, last.inputs, last.outputs) == ("com.microsoft", ("y", "w", "s"), ("z",))
    assert last.integers == {"K": 64, "N": -3, "bits": 4}
    switch = next(node for node in model.nodes if node.operator == "If")
    assert switch.branches == {"then_branch": ("a_y",), "else_branch": ("b_y",)}
    assert [one.constants["value"].shape for one in model.nodes if one.operator == "Constant"] == [
        *((1,), (2,), (2,))
    ]
    named = {tensor.name: tensor for tensor in model.tensors}
    assert {"a_w", "b_w", "", "given"} <= named.keys()
    assert sum(tensor.name == "" for tensor in model.tensors) == 3
    far = named["far"].external
    assert far is not None
    assert (far.location, far.offset, far.length) == (DATA, 16, 16)
    assert (named["fours"].dtype, named["fours"].shape, named["fours"].nbytes) == ("int4", (3,), 2)
    assert named["nothing"].nbytes == 0
    assert check_external_data(model, path) == (DATA,)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def test_a_real_graph_is_read_as_onnx_reads_it(tiny_bundle: Path) -> None:
    path = tiny_bundle / "model.onnx"
    ours, theirs = read_onnx(path), onnx.load(path, load_external_data=False)
    nodes = [node for graph in graphs(theirs.graph) for node in graph.node]
    assert [(n.operator, n.domain, n.name, n.inputs, n.outputs) for n in ours.nodes] == [
        (n.op_type, n.domain, n.name, tuple(n.input), tuple(n.output)) for n in nodes
    ]
    for node, other in zip(ours.nodes, nodes, strict=True):
        assert node.integers == {
            one.name: one.i for one in other.attribute if one.type == onnx.AttributeProto.INT
        }
    stored = {one.name: tuple(one.dims) for one in theirs.graph.initializer}
    assert {one.name: one.shape for one in ours.tensors if one.name} == stored
    assert [one.name for one in ours.inputs] == [one.name for one in theirs.graph.input]
    assert check_external_data(ours, path) == ("model.onnx.data",)


def test_element_types_are_those_of_onnx() -> None:
    theirs = {number: name.lower() for name, number in TensorProto.DataType.items()}
    theirs |= {1: "float32", 11: "float64"}
    assert {number: DTYPES[number] for number in theirs} == theirs
    assert _BITS.keys() == set(DTYPES.values()) - {"undefined"}
    for number in set(theirs) - {0, TensorProto.STRING}:
        raw = bytes(24 * _BITS[DTYPES[number]] // 8)
        tensor = TensorProto(data_type=number, dims=[24], raw_data=raw)
        assert numpy_helper.to_array(tensor).shape == (24,)


def first(model: onnx.ModelProto) -> onnx.TensorProto:
    tensor: onnx.TensorProto = model.graph.initializer[0]
    return tensor


def entry(key: str, value: str, *, tensor: int = 1) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for one in model.graph.initializer[tensor].external_data:
            if one.key == key:
                one.value = value
                return
        model.graph.initializer[tensor].external_data.add(key=key, value=value)

    return change


def dims(tensor: int, *sizes: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        del model.graph.initializer[tensor].dims[:]
        model.graph.initializer[tensor].dims.extend(sizes)

    return change


def nested(model: onnx.ModelProto) -> None:
    graph = branch("leaf")
    for _ in range(DEEPEST):
        node = helper.make_node("If", ["open"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "outer", [], [])
    model.graph.node[0].attribute[0].g.CopyFrom(graph)


def inner_escape(model: onnx.ModelProto) -> None:
    inside = model.graph.node[0].attribute[0].g.initializer[0]
    inside.CopyFrom(external("hidden", [2], location="../secret"))


def constant_escape(model: onnx.ModelProto) -> None:
    constant = helper.make_node("Constant", [], ["k"], value=external("", [2], location="/secret"))
    model.functions[0].node[0].CopyFrom(constant)


BROKEN: dict[str, tuple[Change, str]] = {
    "10 GB in the file": (dims(3, 2_500_000_000), "'floats' claims 2500000000 values"),
    "too many axes": (dims(0, *[2**62] * 10_000), "more than 64 axes"),
    "10 GB of raw data": (dims(0, 50_000, 50_000), "'given' claims 2500000000 values"),
    "10 GB of 4 bits": (dims(8, 20_000_000_000), "'fours' claims"),
    "10 GB of strings": (dims(9, 2_000_000_000), "'texts' claims"),
    "10 GB of nothing": (lambda m: first(m).ClearField("raw_data"), "'given' claims 2 values"),
    "10 GB beside the file": (dims(2, 50_000, 50_000), "'farther' reaches to byte 10000000004"),
    "a product of 2**126": (dims(2, 2**63 - 1, 2**63 - 1), "'farther' reaches to byte"),
    "a size below 0": (dims(1, -4), "sizes below 0"),
    "another length": (entry("length", "12"), "takes 16 bytes, but 12 are stated"),
    "an offset too far": (entry("offset", "17"), "'far' reaches to byte 33 of 'weights.bin'"),
    "an offset below 0": (entry("offset", "-16"), "external data at '-16'"),
    "an offset of a page": (entry("offset", "9" * 5000), "external data at '999"),
    "no location": (lambda m: m.graph.initializer[1].external_data.pop(0), "unknown form"),
    "an unknown key": (entry("basepath", "/etc"), "unknown form"),
    "a key twice": (
        lambda m: m.graph.initializer[1].external_data.add(key="location", value=DATA),
        "unknown form",
    ),
    "upwards": (entry("location", "../weights.bin"), "'../weights.bin' is not a relative path"),
    "absolute": (entry("location", "/etc/passwd"), "'/etc/passwd' is not a relative path"),
    "of a drive": (entry("location", "C:weights.bin"), "is not a relative path"),
    "with a backslash": (entry("location", "..\\weights.bin"), "is not a relative path"),
    "in memory": (entry("location", "*/_ORT_MEM_ADDR_/*"), "is not a relative path"),
    "with a zero byte": (entry("location", "weights\0.bin"), "is not a relative path"),
    "empty": (entry("location", ""), "is not a relative path"),
    "missing": (entry("location", "other.bin"), "needs 'other.bin', which is missing"),
    "upwards in an inner graph": (inner_escape, "'../secret' is not a relative path"),
    "absolute in a function": (constant_escape, "'/secret' is not a relative path"),
    "inside and outside": (
        lambda m: setattr(m.graph.initializer[1], "raw_data", bytes(16)),
        "both inside and outside",
    ),
    "strings outside": (
        lambda m: setattr(m.graph.initializer[1], "data_type", TensorProto.STRING),
        "both inside and outside",
    ),
    "an element type of the future": (lambda m: setattr(first(m), "data_type", 99), "type 99"),
    "no element type": (lambda m: first(m).ClearField("data_type"), "type 0"),
    "segments": (lambda m: setattr(first(m).segment, "begin", 1), "segments"),
    "a sparse tensor": (
        lambda m: m.graph.sparse_initializer.add(dims=[100_000, 100_000]),
        "sparse",
    ),
    "a sparse attribute": (
        lambda m: m.graph.node[1].attribute.add(name="s").sparse_tensor.dims.append(9),
        "sparse",
    ),
    "graphs without end": (nested, f"deeper than {DEEPEST}"),
    "no graph": (lambda m: m.ClearField("graph"), "no graph"),
    "a sequence": (
        lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.Clear(),
        "'input_ids' is no tensor",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_could_do_harm_is_refused_before_anything_is_read(name: str, write: Write) -> None:
    change, message = BROKEN[name]
    model = small_model()
    change(model)
    path = write(model)
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError) as caught:
            check_external_data(read_onnx(path), path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert message in caught.value.message
    assert len(str(caught.value)) < 6000
    assert caught.value.remedy


def varint(value: int) -> bytes:
    """A number as the wire has it."""
    groups = [value >> shift & 0x7F for shift in range(0, max(7, value.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


GRAPH = small_model().graph.SerializeToString()
WHOLE = b"\x3a" + varint(len(GRAPH)) + GRAPH


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"no ONNX file at all", "is not an ONNX file"),
        (b"ORTM" * 100, "is not an ONNX file"),
        (b"\x3a\xff\xff\xff\xff\x0f", "reaches beyond its end"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "reaches beyond its end"),
        (b"\x3a" + b"\xff" * 20, "more than 64 bits"),
        (b"\x08\x80", "in the middle of a number"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x02\x00", "field number 0"),
        (b"\x38\x01", "field 7 is of another type"),
        (b"\x12\x02\xff\xfe" + WHOLE, "field 2 is not UTF-8"),
        # A second graph: protobuf's own readers would merge the two.
        (WHOLE + WHOLE, "field 7 is there twice"),
        (b"\x08\x0a" * (MOST_FIELDS + 1), "more than 1000000 fields"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bytes_that_are_no_message(content: bytes, message: str, write: Write) -> None:
    started = time.process_time()
    with pytest.raises(IntegrityError, match=message):
        read_onnx(write(content))
    assert time.process_time() - started < 20


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"none\.onnx cannot be read: No such file"):
        read_onnx(tmp_path / "none.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(IntegrityError, match=r"folder\.onnx cannot be read: Is a directory"):
        read_onnx(tmp_path / "folder.onnx")


def read_whatever(path: Path) -> OnnxModel | None:
    """The model, or None where it is refused as it must be."""
    try:
        model = read_onnx(path)
        check_external_data(model, path)
    except IntegrityError:
        return None
    return model


SMALL = small_model().SerializeToString()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / DATA).write_bytes(bytes(32))
    return folder / "model.onnx"


def test_no_truncation_is_taken_for_the_whole(place: Path) -> None:
    whole = (len(read_onnx_bytes(place, SMALL).nodes), len(read_onnx_bytes(place, SMALL).tensors))
    for size in range(0, len(SMALL), 5):
        place.write_bytes(SMALL[:size])
        model = read_whatever(place)
        # Fields behind the graph are optional: without them it is a whole, other model.
        assert (
            model is None
            or size > len(GRAPH)
            or whole
            != (
                len(model.nodes),
                len(model.tensors),
            )
        )


def read_onnx_bytes(place: Path, content: bytes) -> OnnxModel:
    place.write_bytes(content)
    return read_onnx(place)


@settings(max_examples=200)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(SMALL) - 1), st.integers(1, 255)), min_size=1, max_size=4
    )
)
@example(flips=[(0, 255)])
def test_flipped_bytes_are_read_or_refused(place: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(SMALL)
    for position, mask in flips:
        content[position] ^= mask
    place.write_bytes(content)
    model = read_whatever(place)
    if model is not None:
        claimed = sum(tensor.nbytes for tensor in model.tensors)
        assert claimed <= 16 * (len(SMALL) + 32), "what is read claims no more than there is"


@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    read_whatever(place)


LETTERS = st.text(st.sampled_from("ab./\\:*\0é "), max_size=12)


@given(name=LETTERS)
def test_a_path_leads_into_the_folder_or_is_refused(name: str) -> None:
    try:
        path = inner_path(name, "a test")
    except IntegrityError:
        return
    folder = Path("/some/folder")
    assert Path(os.path.normpath(folder / path)).is_relative_to(folder)
    assert Path(os.path.normpath(folder / name)) == folder / path


def cache(folder: Path, names: dict[str, Path]) -> Path:
    """A snapshot in a cache as huggingface_hub makes it: links into a folder of blobs."""
    snapshot, blobs = folder / "snapshots" / "abc" / "onnx", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, (name, path) in enumerate(names.items()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / name).symlink_to(Path("..", "..", "..", "blobs", str(number)))
    return snapshot


def test_links_of_a_cache_are_followed_and_others_are_not(write: Write, tmp_path: Path) -> None:
    path = write(small_model())
    names = {"model.onnx": path, DATA: tmp_path / DATA}
    snapshot = cache(tmp_path / "cache", names)
    graph = snapshot / "model.onnx"
    assert check_external_data(read_onnx(graph), graph) == (DATA,)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.onnx").write_bytes(path.read_bytes())
    (alone / DATA).symlink_to(tmp_path / DATA)
    with pytest.raises(IntegrityError, match="link to a place outside the folder"):
        check_external_data(read_onnx(alone / "model.onnx"), alone / "model.onnx")


def test_a_shape_says_how_many_bytes_there_are(write: Write) -> None:
    for tensor in read_onnx(write(small_model())).tensors:
        assert tensor.nbytes == math.ceil(math.prod(tensor.shape) * _BITS[tensor.dtype] / 8)
