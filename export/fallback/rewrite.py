"""A traced graph, rewritten so that its matrices are stored in blocks of small integers.

``MatMul`` and ``Gemm`` with a stored matrix become ``MatMulNBits``, and the token embedding's
``Gather`` becomes ``GatherBlockQuantized``. A matrix that several nodes read is stored once, so a
tied head shares the embedding's bytes. All other nodes stay as they are, except that a graph whose
head is found takes an input more: how many of the last tokens are to be scored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ..graph.linear import ACCURACY_LEVEL, BYTE, FLOAT
from ..graph.recorder import GraphRecorder, TensorInfo
from ..quantize.storage import FLOAT32, RoundedMatrix, Storage, quantized_tensors
from .find import Lookup, Matrix, Product, find, scopes
from .initializers import Initializers, StoredMatrix

__all__ = ["Rewritten", "rewrite"]

SCORED = "num_logits_to_keep"
"""The input's name, as in transformers.js' graphs: an int64 scalar of at least 1."""

# Smaller constants stay inside the graph file.
INSIDE_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The graph, and which of the model's matrices stayed float32.

    Attributes:
        graph: The nodes; weights are computed when they are written.
        tables: Lookup tables of something else than the vocabulary, such as learned positions.
        unrecognized: Matrices in a place that :mod:`.find` does not know.
    """

    graph: GraphRecorder
    tables: tuple[str, ...]
    unrecognized: tuple[str, ...]


def rewrite(
    model: onnx.ModelProto, initializers: Initializers, *, storage: Storage, vocab: int
) -> Rewritten:
    """Rewrite a traced graph.

    Args:
        model: The graph in topological order, loaded without its external data; it is used up.
        initializers: Its constants.
        storage: How the matrices are to be stored; float32 leaves them as they are.
        vocab: Rows of a table that holds the vocabulary.
    """
    found = find(model.graph, initializers, vocab)
    stored = found.stored if storage != FLOAT32 else {}
    nodes, live = _live(model.graph, initializers, stored)
    same = initializers.distinct(name for name in initializers if name in live)
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    graph = GraphRecorder(model.graph.name, opset=opset)
    graph.declare(model.graph.input, model.graph.output)
    news = [stored.get(node.output[0]) for node in nodes]
    multiplied = {new.matrix for new in news if isinstance(new, Product)}
    writer = _Writer(graph, initializers, storage, multiplied)
    for name in dict.fromkeys(same.values()):
        writer.keep(name)
    tables = set()
    for node, new in zip(nodes, news, strict=True):
        for one in scopes(node):
            one.input[:] = [same.get(name, name) for name in one.input]
        if found.head in node.output:
            node.input[0] = _last_tokens(graph, node.input[0])
        if isinstance(new, Product):
            writer.product(node, new.matrix, same.get(new.bias, ""))
        elif isinstance(new, Lookup):
            writer.lookup(node, new.matrix)
        else:
            graph.copy(node)
            tables |= set(node.input[:1]) if node.op_type == "Gather" else set()
    wide = [name for name in sorted(same) if initializers.is_weight(name)]
    return Rewritten(
        graph=graph,
        tables=tuple(name for name in wide if same[name] in tables),
        unrecognized=tuple(name for name in wide if same[name] not in tables),
    )


def _live(
    graph: onnx.GraphProto, initializers: Initializers, found: Mapping[str, Product | Lookup]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that the outputs still need, in order, and every name that they read."""
    live = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if live.isdisjoint(node.output) or node.output[0] in initializers:
            continue
        nodes.append(node)
        new = found.get(node.output[0])
        live.update(new.inputs if new else (name for one in scopes(node) for name in one.input))
    return nodes[::-1], live


def _last_tokens(graph: GraphRecorder, states: str) -> str:
    """Of the states [batch, tokens, hidden], those of the last tokens that are to be scored."""
    wanted = graph.input(SCORED, np.int64, [])
    path = "/lm_head/last_tokens"
    first, axis, end = (
        graph.constant(f"{path}/{name}", np.array([value], np.int64))
        for name, value in (("first", 0), ("axis", 1), ("end", np.iinfo(np.int64).max))
    )
    count = graph.op("Unsqueeze", f"{path}/Unsqueeze", [wanted, first])
    start = graph.op("Neg", f"{path}/Neg", [count])
    return graph.op("Slice", f"{path}/Slice", [states, start, end, axis])


class _Writer:
    """Records nodes and weights; ``multiplied`` are the matrices that products read."""

    def __init__(
        self,
        graph: GraphRecorder,
        initializers: Initializers,
        storage: Storage,
        multiplied: Collection[Matrix],
    ) -> None:
        self._graph = graph
        self._multiplied = multiplied
        self._initializers = initializers
        self._storage = storage
        self._stored: dict[Matrix, tuple[str, str]] = {}

    def keep(self, name: str) -> None:
        """Keep a constant as it is."""
        array = self._initializers.array(name)
        if array.nbytes <= INSIDE_BYTES:
            self._graph.constant(name, array)
        else:
            info = TensorInfo(name, array.dtype, array.shape)
            self._graph.defer([info], lambda: [[self._initializers.array(name)]])

    def product(self, node: onnx.NodeProto, matrix: Matrix, bias: str) -> None:
        """Record a product in the place of ``node``."""
        blocks, scales = self._blocks(matrix)
        rows, columns = self._shape(matrix)
        self._graph.microsoft(
            "MatMulNBits",
            f"{node.name}/MatMulNBits",
            [node.input[0], blocks, scales, "", "", bias],
            outputs=node.output,
            N=rows,
            K=columns,
            bits=self._storage.bits,
            block_size=self._storage.block,
            accuracy_level=ACCURACY_LEVEL,
        )

    def lookup(self, node: onnx.NodeProto, matrix: Matrix) -> None:
        """Record a lookup in the place of ``node``."""
        blocks, scales = self._blocks(matrix)
        rows, columns = self._shape(matrix)
        assert self._storage.block is not None
        if matrix in self._multiplied:
            # The very bytes that MatMulNBits reads, as rows that are not cut into blocks.
            blob = self._storage.blob_shape(rows, columns)
            blocks = self._graph.view(f"{blocks}_rows", blocks, (rows, blob[1] * blob[2]))
        padded = columns % self._storage.block
        path = f"{node.name}/GatherBlockQuantized"
        gathered = self._graph.microsoft(
            "GatherBlockQuantized",
            path,
            [blocks, node.input[1], scales],
            outputs=[] if padded else node.output,
            bits=self._storage.bits,
            block_size=self._storage.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if padded:
            bounds = [
                self._graph.constant(f"{path}/slice_{key}", np.array([value], np.int64))
                for key, value in (("start", 0), ("stop", columns), ("axis", -1))
            ]
            self._graph.op("Slice", f"{path}/Slice", [gathered, *bounds], outputs=node.output)

    def _shape(self, matrix: Matrix) -> tuple[int, int]:
        first, second = self._initializers.shape(matrix.name)
        return (second, first) if matrix.transposed else (first, second)

    def _blocks(self, matrix: Matrix) -> tuple[str, str]:
        """Promise the packed blocks and their scales, once; gives both names."""
        if matrix in self._stored:
            return self._stored[matrix]
        name = f"{matrix.name}.T" if matrix.transposed else matrix.name
        blocks, scales = f"{name}_q{self._storage.bits}", f"{name}_scales"
        blob = self._storage.blob_shape(*self._shape(matrix))
        shape = blob if matrix in self._multiplied else (blob[0], blob[1] * blob[2])

        def compute() -> list[list[NDArray[Any]]]:
            stored = StoredMatrix(self._initializers.array(matrix.name), matrix.transposed)
            return quantized_tensors(RoundedMatrix(stored, self._storage))

        self._graph.defer(
            [TensorInfo(blocks, BYTE, shape), TensorInfo(scales, FLOAT, blob[:2])], compute
        )
        self._stored[matrix] = blocks, scales
        return blocks, scales
