"""Matrix products with a stored weight: projections, the embedding and the head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..quantize.storage import Storage, float_rows, quantized_tensors, transposed
from .matrices import Matrix
from .recorder import GraphRecorder, TensorInfo

__all__ = ["Vocabulary", "project"]

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
) -> str:
    """``source`` [..., columns] times the transposed matrix [rows, columns], plus a bias [rows].

    float32 storage is a plain MatMul, the reference of every other.

    Args:
        graph: Where to record.
        path: The projection's place in the model, such as ``/model/layers.0/attn/o_proj``.
        source: The input's name.
        matrix: The weight as the checkpoint has it.
        storage: How to store it.
        bias: Added to every row of the product.
    """
    name = path.strip("/").replace("/", ".")
    rows, columns = matrix.shape
    bias_name = graph.constant(f"{name}.bias", bias) if bias is not None else ""
    if storage.block is None:
        weight = f"{name}.weight"
        graph.defer([TensorInfo(weight, FLOAT, (columns, rows))], lambda: [[transposed(matrix)]])
        product = graph.op("MatMul", f"{path}/MatMul", [source, weight])
        return graph.op("Add", f"{path}/Add", [product, bias_name]) if bias_name else product
    blocks, scales = _defer_blocks(graph, name, matrix, storage)
    return _matmul_nbits(
        graph, f"{path}/MatMulNBits", [source, blocks, scales, "", "", bias_name], matrix, storage
    )


class Vocabulary:
    """A matrix with a row per token: the embedding, the head, or both on one stored tensor."""

    def __init__(self, graph: GraphRecorder, name: str, matrix: Matrix, storage: Storage) -> None:
        self._graph = graph
        self._name = name
        self._matrix = matrix
        self._storage = storage
        if storage.block is None:
            self._weight = f"{name}.weight"
            info = TensorInfo(self._weight, FLOAT, matrix.shape)
            graph.defer([info], lambda: [float_rows(matrix)])
        else:
            self._weight, self._scales = _defer_blocks(graph, name, matrix, storage)

    def embed(self, tokens: str) -> str:
        """Rows of ``tokens`` int64 [batch, tokens]: float32 [batch, tokens, columns]."""
        graph, path = self._graph, "/model/embed_tokens"
        if self._storage.block is None:
            return graph.op("Gather", f"{path}/Gather", [self._weight, tokens])
        # The gather reads the very bytes that MatMulNBits reads, as [rows, blocks, block]; only its
        # scales must have a third axis. A Reshape would be folded into a second copy of them.
        view = f"{self._weight}_gather_scales"
        graph.view(view, self._scales, (*self._storage.blob_shape(*self._matrix.shape)[:2], 1))
        gathered = graph.microsoft(
            "GatherBlockQuantized",
            f"{path}/GatherBlockQuantized",
            [self._weight, tokens, view],
            bits=self._storage.bits,
            block_size=self._storage.block,
            gather_axis=0,
            quantize_axis=2,
        )
        shape = graph.constant("embedding_shape", np.array([0, 0, -1], np.int64))
        flat = graph.op("Reshape", f"{path}/Reshape", [gathered, shape])
        columns = self._matrix.shape[1]
        if columns % self._storage.block == 0:
            return flat
        bounds = [
            graph.constant(f"embedding_slice_{key}", np.array([value], np.int64))
            for key, value in (("start", 0), ("stop", columns), ("axis", 2))
        ]
        return graph.op("Slice", f"{path}/Slice", [flat, *bounds])

    def logits(self, hidden: str, *, softcap: float = 0.0) -> str:
        """Scores of ``hidden`` float32 [n, columns] against every row: float32 [n, rows].

        Args:
            hidden: The input's name.
            softcap: Bounds the scores s: ``softcap * tanh(s)``; 0: nothing does.
        """
        graph, path = self._graph, "/lm_head"
        output = f"{path}/scores" if softcap else "logits"
        if self._storage.block is None:
            # Gemm takes the weight as the embedding has it, so a tied model keeps one copy.
            graph.op("Gemm", f"{path}/Gemm", [hidden, self._weight], outputs=[output], transB=1)
        else:
            _matmul_nbits(
                graph,
                f"{path}/MatMulNBits",
                [hidden, self._weight, self._scales],
                self._matrix,
                self._storage,
                output=output,
            )
        if not softcap:
            return output
        cap = graph.constant("logits_softcap", np.array(softcap, np.float32))
        bounded = graph.op("Tanh", f"{path}/Tanh", [output])
        return graph.op("Mul", f"{path}/Mul", [bounded, cap], outputs=["logits"])


def _defer_blocks(
    graph: GraphRecorder, name: str, matrix: Matrix, storage: Storage
) -> tuple[str, str]:
    """Promise the packed blocks and their scales; gives both names."""
    blocks, scales = f"{name}.weight_q{storage.bits}", f"{name}.weight_scales"
    blob = storage.blob_shape(*matrix.shape)
    graph.defer(
        [TensorInfo(blocks, BYTE, blob), TensorInfo(scales, FLOAT, blob[:2])],
        lambda: quantized_tensors(matrix, storage),
    )
    return blocks, scales


def _matmul_nbits(
    graph: GraphRecorder,
    name: str,
    inputs: list[str],
    matrix: Matrix,
    storage: Storage,
    output: str = "",
) -> str:
    rows, columns = matrix.shape
    return graph.microsoft(
        "MatMulNBits",
        name,
        inputs,
        outputs=[output] if output else [],
        N=rows,
        K=columns,
        bits=storage.bits,
        block_size=storage.block,
        accuracy_level=ACCURACY_LEVEL,
    )
