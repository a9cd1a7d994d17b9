"""What an ONNX file says of itself, read without the onnx package and without its weights.

The numbers of the fields are those of onnx.proto3:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_llm.errors import IntegrityError
from edge_llm.foreign.protobuf import Message, Reader
from edge_llm.schema import cut

__all__ = ["DTYPES", "External", "Node", "OnnxModel", "Tensor", "Value", "read_onnx"]

_NAMES = """
    undefined float32 uint8 int8 uint16 int16 int32 int64 string bool float16 float64 uint32 uint64
    complex64 complex128 bfloat16 float8e4m3fn float8e4m3fnuz float8e5m2 float8e5m2fnuz uint4 int4
    float4e2m1 float8e8m0 uint2 int2 float6e2m3 float6e3m2"""
DTYPES = dict(enumerate(_NAMES.split()))
"""TensorProto.DataType by number."""

_BITS = {"bool": 8, "complex64": 64, "complex128": 128, "bfloat16": 16, "string": 8} | {
    name: bits
    for bits, names in {
        2: "uint2 int2",
        4: "uint4 int4 float4e2m1",
        6: "float6e2m3 float6e3m2",
        8: "uint8 int8 float8e4m3fn float8e4m3fnuz float8e5m2 float8e5m2fnuz float8e8m0",
        16: "uint16 int16 float16",
        32: "float32 int32 uint32",
        64: "float64 int64 uint64",
    }.items()
    for name in names.split()
}
# Repeated fields of TensorProto that hold values, and the bytes of one (1: of varying width).
_FLOAT, _INT32, _STRING, _INT64, _RAW, _DOUBLE, _UINT64 = 4, 5, 6, 7, 9, 10, 11
_WIDTHS = {_FLOAT: 4, _INT32: 1, _INT64: 1, _DOUBLE: 8, _UINT64: 1}
_MOST_AXES = 64  # tensors of models have five at most; their product must not take for ever
_EXTERNAL = 1  # TensorProto.DataLocation
_KEYS = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True, slots=True)
class External:
    """Where a tensor's bytes lie outside the ONNX file.

    Attributes:
        location: The file, as the ONNX file names it.
        offset: First byte.
        length: Bytes; None reaches to the file's end.
    """

    location: str
    offset: int
    length: int | None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant: an initializer, or the value of a node's attribute.

    Attributes:
        name: Its name; empty in an attribute.
        dtype: See :data:`DTYPES`.
        shape: Its sizes.
        nbytes: Bytes that its values take.
        external: Where they lie, or None where they lie in the ONNX file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    external: External | None


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of the graph.

    Attributes:
        name: Its name.
        dtype: See :data:`DTYPES`.
        shape: Sizes: a number, a name, or "" where nothing is said; None where the rank is open.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        domain: Of the operator; empty for ONNX's own.
        operator: Its name.
        name: The node's.
        inputs: Names of tensors; empty where one is left out.
        outputs: Names of tensors.
        integers: Attributes that are single integers.
        constants: Attributes that are single tensors, such as a Constant's value.
        branches: Outputs of its inner graphs, by attribute, such as those of an If.
    """

    domain: str
    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, int]
    constants: Mapping[str, Tensor]
    branches: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """An ONNX file without its weights.

    Attributes:
        producer: Name and version of what wrote it.
        opsets: Version by domain.
        inputs: The graph's, without those that an initializer stands in for.
        outputs: The graph's.
        nodes: All, those of inner graphs and of functions included.
        tensors: All, those of inner graphs and of attributes included.
    """

    producer: tuple[str, str]
    opsets: Mapping[str, int]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    tensors: tuple[Tensor, ...]


def read_onnx(path: Path) -> OnnxModel:
    """Read an ONNX file; its weights, and those in other files, are not touched.

    Memory and time are bounded by the number of nodes and tensors, not by what the file claims of
    them. Tensors whose claimed size is not that of their bytes in the file are refused; for those
    in other files see :func:`edge_llm.foreign.external_data.check_external_data`.

    Raises:
        IntegrityError: The file is missing, unreadable, or no ONNX file.
    """
    reader = Reader(path.name)
    try:
        with path.open("rb") as file:
            # A map of nothing is refused by the system; nothing is no model either.
            if not path.stat().st_size:
                raise reader.error("it is empty")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise IntegrityError(
            f"{path.name} cannot be read: {error.strerror}.", "Check the folder and its rights."
        ) from error
    return _Parser(reader).model(data)


class _Parser:
    """Collects the nodes and tensors of a file from all graphs in it."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._nodes: list[Node] = []
        self._tensors: list[Tensor] = []

    def model(self, data: memoryview) -> OnnxModel:
        model = self._reader.message(data)
        graph = model.message(7)
        if graph is None:
            raise self._reader.error("it has no graph")
        for function in model.messages(25):
            self._read_attributes(function, 11)
            self._read_nodes(function, 7)
        stored = {tensor.name for tensor in self._graph(graph)}
        inputs = tuple(map(_value, graph.messages(11)))
        return OnnxModel(
            producer=(model.text(2), model.text(3)),
            opsets={opset.text(1): opset.integer(2) for opset in model.messages(8)},
            inputs=tuple(one for one in inputs if one.name not in stored),
            outputs=tuple(map(_value, graph.messages(12))),
            nodes=tuple(self._nodes),
            tensors=tuple(self._tensors),
        )

    def _graph(self, graph: Message) -> list[Tensor]:
        """Collect a graph; gives its own initializers."""
        if 15 in graph:
            raise self._reader.error("it has sparse initializers, which are not supported")
        stored = list(map(_tensor, graph.messages(5)))
        self._tensors += stored
        self._read_nodes(graph, 1)
        return stored

    def _read_nodes(self, message: Message, number: int) -> None:
        for node in message.messages(number):
            integers, constants, branches = self._read_attributes(node, 5)
            self._nodes.append(
                Node(
                    domain=node.text(7),
                    operator=node.text(4),
                    name=node.text(3),
                    inputs=tuple(node.texts(1)),
                    outputs=tuple(node.texts(2)),
                    integers=integers,
                    constants=constants,
                    branches=branches,
                )
            )

    def _read_attributes(
        self, message: Message, number: int
    ) -> tuple[dict[str, int], dict[str, Tensor], dict[str, tuple[str, ...]]]:
        """Collect what lies in attributes; gives what a node has of them, see :class:`Node`."""
        integers: dict[str, int] = {}
        constants: dict[str, Tensor] = {}
        branches: dict[str, tuple[str, ...]] = {}
        for attribute in message.messages(number):
            if 22 in attribute or 23 in attribute:
                raise self._reader.error("it has sparse tensors, which are not supported")
            name = attribute.text(1)
            for tensor in map(_tensor, attribute.messages(5, most=1)):
                constants[name] = tensor
                self._tensors.append(tensor)
            self._tensors += map(_tensor, attribute.messages(10))
            for graph in (6, 11):
                for inner in attribute.messages(graph):
                    self._graph(inner)
                    branches[name] = tuple(one.text(1) for one in inner.messages(12))
            if 3 in attribute:
                integers[name] = attribute.integer(3)
        return integers, constants, branches


def _value(message: Message) -> Value:
    name = message.text(1)
    kind = message.message(2)
    tensor = kind.message(1) if kind else None
    if tensor is None:
        raise message.error(f"{cut(name)!r} is no tensor")
    shape = tensor.message(2)
    sizes = None if shape is None else tuple(map(_size, shape.messages(1)))
    return Value(name, _dtype(tensor, 1, name), sizes)


def _size(dimension: Message) -> int | str:
    return dimension.integer(1) if 1 in dimension else dimension.text(2)


def _dtype(message: Message, number: int, name: str) -> str:
    stated = message.integer(number)
    if not stated or stated not in DTYPES:
        raise message.error(f"{cut(name)!r} has the unknown element type {stated}")
    return DTYPES[stated]


def _tensor(message: Message) -> Tensor:
    name = message.text(8)
    dtype = _dtype(message, 2, name)
    shape = tuple(message.integers(1))
    if 3 in message or len(shape) > _MOST_AXES or any(size < 0 for size in shape):
        raise message.error(
            f"tensor {cut(name)!r} has segments, more than {_MOST_AXES} axes or sizes below 0"
        )
    elements = math.prod(shape)
    nbytes = (elements * _BITS[dtype] + 7) // 8
    external = _external(message, name) if message.integer(14) == _EXTERNAL else None
    if external is None:
        _check_inline(message, name, dtype, elements, nbytes)
    elif any(number in message for number in (*_WIDTHS, _STRING, _RAW)) or dtype == "string":
        raise message.error(f"tensor {cut(name)!r} lies both inside and outside the file")
    return Tensor(name, dtype, shape, nbytes, external)


def _check_inline(message: Message, name: str, dtype: str, elements: int, nbytes: int) -> None:
    """Compare a tensor's claimed size with the bytes that are there."""
    raw = message.size(_RAW)
    if raw is not None:
        fits = raw == nbytes
    elif dtype == "string":
        fits = message.count(_STRING) == elements
    else:
        # A value may be a varint of one byte, which may hold several values of a few bits.
        room = sum(message.room(number, width) for number, width in _WIDTHS.items())
        fits = elements <= room * max(1, 8 // _BITS[dtype])
    if not fits:
        raise message.error(
            f"tensor {cut(name)!r} claims {elements} values, but the file has others"
        )


def _external(message: Message, name: str) -> External:
    entries = [(entry.text(1), entry.text(2)) for entry in message.messages(13)]
    values = dict(entries)
    # Keys that are not here make ONNX Runtime look elsewhere; of two equal ones it takes either.
    if len(values) < len(entries) or not {"location"} <= values.keys() <= _KEYS:
        raise message.error(
            f"tensor {cut(name)!r} has external data of unknown form {sorted(values)}"
        )
    return External(
        values["location"],
        _bytes(values.get("offset", "0"), message, name),
        _bytes(values["length"], message, name) if "length" in values else None,
    )


def _bytes(text: str, message: Message, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise message.error(f"tensor {cut(name)!r} has external data at {text!r}")
    return int(text)
