"""Finding the products with stored matrices in a traced graph, and the token embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from .initializers import Initializers

__all__ = ["Found", "Lookup", "Matrix", "Product", "find", "scopes"]

# Operators that treat the scores of a token one by one.
_POINTWISE = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")


@dataclass(frozen=True, slots=True)
class Matrix:
    """An initializer that holds a weight [rows, columns], or its transpose."""

    name: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class Product:
    """``source`` [..., columns] times the transposed weight, plus a bias [rows] where there is one.

    Attributes:
        matrix: The weight.
        source: A name.
        bias: A constant's name, or "".
    """

    matrix: Matrix
    source: str
    bias: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What is read besides the weight."""
        return (self.source, self.bias) if self.bias else (self.source,)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Rows ``indices`` of a weight."""

    matrix: Matrix
    indices: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """What is read besides the weight."""
        return (self.indices,)


@dataclass(frozen=True, slots=True)
class Found:
    """What :func:`find` finds.

    Attributes:
        stored: What the graph computes with stored matrices, by the name of the result.
        head: The result of the head's product, whose tokens do not depend on one another from
            there on; "" where the logits are made in another way.
    """

    stored: dict[str, Product | Lookup]
    head: str


def find(graph: onnx.GraphProto, initializers: Initializers, vocab: int) -> Found:
    """Find what a graph computes with stored float32 matrices.

    Args:
        graph: The graph, in topological order.
        initializers: Its constants.
        vocab: Rows of a table that holds the vocabulary; other tables are left alone.
    """
    finder = _Finder(graph, initializers)
    stored = {node.output[0]: new for node in graph.node if (new := finder.visit(node, vocab))}
    return Found(stored, finder.head())


def scopes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """The node and all nodes of the graphs inside it, which may read outer names."""
    yield node
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from scopes(inner)


class _Finder:
    """Questions about a graph's nodes."""

    def __init__(self, graph: onnx.GraphProto, initializers: Initializers) -> None:
        self._initializers = initializers
        self._makers = {name: node for node in graph.node for name in node.output}

    def visit(self, node: onnx.NodeProto, vocab: int) -> Product | Lookup | None:
        """What a node computes with a stored matrix."""
        settings = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type == "MatMul":
            return self._product(*node.input, rows_first=False)
        if node.op_type == "Gemm":
            # Other factors or a transposed source make another product, which models do not use.
            usual = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0
            if usual and not settings.get("transA"):
                return self._gemm(node, rows_first=bool(settings.get("transB")))
        if node.op_type == "Gather" and not settings.get("axis"):
            table = self._origin(node.input[0])
            rows = self._initializers.shape(table.name)[:1] if self._is_matrix(table.name) else ()
            if rows == (vocab,) and not table.transposed:
                return Lookup(table, node.input[1])
        return None

    def head(self) -> str:
        """See :class:`Found`."""
        name = "logits"
        while (maker := self._makers.get(name)) is not None:
            if maker.op_type == "MatMul":
                return name if self._is_matrix(self._origin(maker.input[1]).name) else ""
            varying = [one for one in maker.input if not self._is_shared(one)]
            if maker.op_type not in _POINTWISE or len(varying) != 1:
                break
            name = varying[0]
        return ""

    def _product(self, source: str, weight: str, *, rows_first: bool) -> Product | None:
        matrix = self._origin(weight)
        if not self._is_matrix(matrix.name):
            return None
        return Product(Matrix(matrix.name, matrix.transposed == rows_first), source)

    def _gemm(self, node: onnx.NodeProto, *, rows_first: bool) -> Product | None:
        product = self._product(node.input[0], node.input[1], rows_first=rows_first)
        if product is None or len(node.input) < 3:
            return product
        bias = self._bias(node.input[2], product.matrix)
        return replace(product, bias=bias) if bias else None

    def _bias(self, name: str, matrix: Matrix) -> str:
        """The constant behind ``name`` if it holds a number per row of the weight, or ""."""
        origin = self._origin(name).name
        rows = self._initializers.shape(matrix.name)[1 if matrix.transposed else 0]
        if origin in self._initializers and self._initializers.is_float(origin):
            return origin if self._initializers.shape(origin) == (rows,) else ""
        return ""

    def _origin(self, name: str) -> Matrix:
        """What ``name`` is made of, behind nodes that copy it or swap its two axes."""
        transposed = False
        while (maker := self._makers.get(name)) is not None:
            if maker.op_type == "Transpose":
                axes = [list(one.ints) for one in maker.attribute]
                if axes not in ([[1, 0]], []):
                    break
                transposed = not transposed
            elif maker.op_type != "Identity":
                break
            name = maker.input[0]
        return Matrix(name, transposed)

    def _is_shared(self, name: str) -> bool:
        """Whether it is a constant that is the same for every token: one number, or a vector."""
        origin = self._origin(name).name
        return origin in self._initializers and len(self._initializers.shape(origin)) < 2

    def _is_matrix(self, name: str) -> bool:
        known = self._initializers
        return name in known and known.is_float(name) and len(known.shape(name)) == 2
