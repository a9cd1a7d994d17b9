"""Matrix products with a stored weight: projections, the embedding and the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import UnsupportedModelError

from ..quantize.storage import (
    CHANNELS,
    FLOAT32,
    QuantizedMatrix,
    Storage,
    float_rows,
    quantized_tensors,
    transposed,
)
from .channels import ChannelWeight
from .matrices import Matrix
from .quantized import quantized_parts
from .recorder import GraphRecorder, TensorInfo

__all__ = ["Calibrated", "Vocabulary", "constant_name", "project"]

Calibrated = Mapping[str, Sequence[QuantizedMatrix]]
"""Matrices that are quantized already, by the name of their weight in the graph: each as one or
more below one another, which may be stored in different ways."""

FLOAT = np.dtype(np.float32)
BYTE = np.dtype(np.uint8)

# Activations are rounded to int8 per block. Without it, 8-bit weights are dequantized as a whole
# at every call (45 times slower).
ACCURACY_LEVEL = 4


def project(
    graph: GraphRecorder,
    path: str,
    source: str,
    matrix: Matrix,
    storage: Storage,
    bias: NDArray[np.float32] | None = None,
    *,
    calibrated: Calibrated | None = None,
) -> str:
    """``source`` [..., columns] times the transposed matrix [rows, columns], plus a bias [rows].

    float32 storage is a plain MatMul, the reference of every other.

    Args:
        graph: Where to record.
        path: The projection's place in the model, such as ``/model/layers.0/attn/o_proj``.
        source: The input's name.
        matrix: The weight as the checkpoint has it.
        storage: How to store it, unless the checkpoint has it as integers, which stay as they are.
        bias: Added to every row of the product.
        calibrated: Matrices that are quantized already, by name; the others are rounded.
    """
    name = constant_name(path)
    if storage == FLOAT32 and name not in (calibrated or {}):
        weight, (rows, columns) = f"{name}.weight", matrix.shape
        graph.defer([TensorInfo(weight, FLOAT, (columns, rows))], lambda: [[transposed(matrix)]])
        product = graph.op("MatMul", f"{path}/MatMul", [source, weight])
        if bias is None:
            return product
        return graph.op("Add", f"{path}/Add", [product, graph.constant(f"{name}.bias", bias)])
    if storage == CHANNELS:
        return ChannelWeight(graph, name, matrix, table=False).multiply(path, source, bias)
    parts = _parts(name, matrix, storage, calibrated)
    paths = _numbered(path, parts, "/")
    stops = np.cumsum([part.shape[0] for part in parts])
    biases = [None] * len(parts) if bias is None else np.split(bias, stops[:-1])
    products = [
        _QuantizedWeight(graph, constant_name(at), part).multiply(at, source, share)
        for at, part, share in zip(paths, parts, biases, strict=True)
    ]
    if len(products) == 1:
        return products[0]
    return graph.op("Concat", f"{path}/Concat", products, axis=-1)


class Vocabulary:
    """A matrix with a row per token: the embedding, the head, or both on one stored tensor."""

    def __init__(
        self,
        graph: GraphRecorder,
        name: str,
        matrix: Matrix,
        storage: Storage,
        *,
        calibrated: Calibrated | None = None,
    ) -> None:
        self._graph = graph
        self._columns = matrix.shape[1]
        self._weight = ""
        self._parts: Sequence[_QuantizedWeight | ChannelWeight] = ()
        if storage == FLOAT32:
            self._weight = f"{name}.weight"
            info = TensorInfo(self._weight, FLOAT, matrix.shape)
            graph.defer([info], lambda: [float_rows(matrix)])
        elif storage == CHANNELS:
            self._parts = [ChannelWeight(graph, name, matrix, table=True)]
        else:
            parts = _parts(name, matrix, storage, calibrated)
            self._parts = [
                _QuantizedWeight(graph, at, part)
                for at, part in zip(_numbered(name, parts, "."), parts, strict=True)
            ]

    def embed(self, tokens: str) -> str:
        """Rows of ``tokens`` int64 [batch, tokens]: float32 [batch, tokens, columns]."""
        graph, path = self._graph, "/model/embed_tokens"
        if self._weight:
            return graph.op("Gather", f"{path}/Gather", [self._weight, tokens])
        first, *others = self._parts
        if not others:
            return first.gather(path, tokens)
        # Each part is asked for every token; of those of another part it gives any row.
        start = first.rows
        found = first.gather(f"{path}/0", self._bounded(f"{path}/0/Min", "Min", tokens, start - 1))
        axis = graph.constant("embedding_axis", np.array([2], np.int64))
        column = graph.op("Unsqueeze", f"{path}/Unsqueeze", [tokens, axis])
        for i, part in enumerate(others, 1):
            at, stop = f"{path}/{i}", start + part.rows
            bounded = self._bounded(f"{at}/Min", "Min", tokens, stop - 1)
            offset = graph.constant(f"embedding_start_{i}", np.array(start, np.int64))
            local = graph.op("Sub", f"{at}/Sub", [bounded, offset])
            rows = part.gather(at, self._bounded(f"{at}/Max", "Max", local, 0))
            before = graph.op("Less", f"{at}/Less", [column, offset])
            found = graph.op("Where", f"{at}/Where", [before, found, rows])
            start = stop
        return found

    def _bounded(self, path: str, op: str, source: str, bound: int) -> str:
        """The least, or the greatest, of each element and a number."""
        limit = self._graph.constant(f"embedding_limit_{bound}", np.array(bound, np.int64))
        return self._graph.op(op, path, [source, limit])

    def logits(self, hidden: str, *, softcap: float = 0.0) -> str:
        """Scores of ``hidden`` float32 [n, columns] against every row: float32 [n, rows].

        Args:
            hidden: The input's name.
            softcap: Bounds the scores s: ``softcap * tanh(s)``; 0: nothing does.
        """
        graph, path = self._graph, "/lm_head"
        output = f"{path}/scores" if softcap else "logits"
        if self._weight:
            # Gemm takes the weight as the embedding has it, so a tied model keeps one copy.
            graph.op("Gemm", f"{path}/Gemm", [hidden, self._weight], outputs=[output], transB=1)
        elif len(self._parts) == 1:
            self._parts[0].multiply(path, hidden, output=output)
        else:
            scores = [part.multiply(f"{path}/{i}", hidden) for i, part in enumerate(self._parts)]
            graph.op("Concat", f"{path}/Concat", scores, outputs=[output], axis=-1)
        if not softcap:
            return output
        cap = graph.constant("logits_softcap", np.array(softcap, np.float32))
        bounded = graph.op("Tanh", f"{path}/Tanh", [output])
        return graph.op("Mul", f"{path}/Mul", [bounded, cap], outputs=["logits"])


class _QuantizedWeight:
    """The stored tensors of a quantized matrix, which several nodes may read."""

    def __init__(self, graph: GraphRecorder, name: str, matrix: QuantizedMatrix) -> None:
        self._graph = graph
        self._name = name
        self._matrix = matrix
        storage, shape = matrix.storage, matrix.shape
        blob = storage.blob_shape(*shape)
        self._integers, self._scales = f"{name}.weight_q{storage.bits}", f"{name}.weight_scales"
        self._zero_points = "" if storage.symmetric else f"{name}.weight_zero_points"
        tensors = [
            TensorInfo(self._integers, BYTE, blob),
            TensorInfo(self._scales, FLOAT, blob[:2]),
        ]
        if self._zero_points:
            packed = storage.zero_points_shape(*shape)
            tensors.append(TensorInfo(self._zero_points, BYTE, packed))
        graph.defer(tensors, lambda: quantized_tensors(matrix))

    @property
    def rows(self) -> int:
        """How many there are."""
        return self._matrix.shape[0]

    def multiply(
        self, path: str, source: str, bias: NDArray[np.float32] | None = None, output: str = ""
    ) -> str:
        """``source`` [..., columns] times the transposed matrix, plus a bias [rows]."""
        graph, name, storage = self._graph, self._name, self._matrix.storage
        rows, columns = self._matrix.shape
        if self._matrix.order is not None:
            order = graph.constant(f"{name}.order", self._matrix.order.astype(np.int32))
            source = graph.op("Gather", f"{path}/Gather", [source, order], axis=-1)
        added = "" if bias is None else graph.constant(f"{name}.bias", bias)
        return graph.microsoft(
            "MatMulNBits",
            f"{path}/MatMulNBits",
            [source, self._integers, self._scales, self._zero_points, "", added],
            outputs=[output] if output else [],
            N=rows,
            K=columns,
            bits=storage.bits,
            block_size=storage.block,
            accuracy_level=ACCURACY_LEVEL,
        )

    def gather(self, path: str, tokens: str) -> str:
        """Rows of ``tokens`` int64 [batch, tokens]: float32 [batch, tokens, columns]."""
        graph, storage, (rows, columns) = self._graph, self._matrix.storage, self._matrix.shape
        if self._matrix.order is not None or not storage.symmetric:
            raise UnsupportedModelError(
                "The embedding is quantized already, which the graph builder does not know.",
                "Export from the unquantized checkpoint that it was made from.",
            )
        # The gather reads the very bytes that MatMulNBits reads, as [rows, blocks, block]; only its
        # scales must have a third axis. A Reshape would be folded into a second copy of them.
        view = f"{self._integers}_gather_scales"
        graph.view(view, self._scales, (*storage.blob_shape(rows, columns)[:2], 1))
        gathered = graph.microsoft(
            "GatherBlockQuantized",
            f"{path}/GatherBlockQuantized",
            [self._integers, tokens, view],
            bits=storage.bits,
            block_size=storage.block,
            gather_axis=0,
            quantize_axis=2,
        )
        shape = graph.constant("embedding_shape", np.array([0, 0, -1], np.int64))
        flat = graph.op("Reshape", f"{path}/Reshape", [gathered, shape])
        assert storage.block is not None
        if columns % storage.block == 0:
            return flat
        bounds = [
            graph.constant(f"embedding_slice_{key}", np.array([value], np.int64))
            for key, value in (("start", 0), ("stop", columns), ("axis", 2))
        ]
        return graph.op("Slice", f"{path}/Slice", [flat, *bounds])


def constant_name(path: str) -> str:
    """What the weight of the projection at ``path`` is called."""
    return path.strip("/").replace("/", ".")


def _parts(
    name: str, matrix: Matrix, storage: Storage, calibrated: Calibrated | None
) -> list[QuantizedMatrix]:
    if calibrated and name in calibrated:
        return list(calibrated[name])
    return quantized_parts(matrix, storage)


def _numbered(name: str, parts: Sequence[object], separator: str) -> list[str]:
    """A name for each part; the only one has the whole's."""
    if len(parts) == 1:
        return [name]
    return [f"{name}{separator}{i}" for i in range(len(parts))]
