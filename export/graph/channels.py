"""Matrix products in 8-bit integers with one scale per row of the matrix.

MatMulNBits computes in integers only where the CPU multiplies bytes into 32-bit sums. The operators
here have kernels without that too (ARM before dotprod, such as the Cortex-A72).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..quantize.storage import channel_tensors
from .matrices import Matrix
from .recorder import GraphRecorder, TensorInfo

__all__ = ["ChannelWeight"]

BYTE = np.dtype(np.int8)
FLOAT = np.dtype(np.float32)


class ChannelWeight:
    """The stored tensors of a matrix [rows, columns], which several nodes may read.

    Args:
        graph: Where to record.
        name: Of the matrix.
        matrix: Its floats.
        table: Store it row by row, so that rows can be gathered; inputs of products then have two
            axes.
    """

    def __init__(self, graph: GraphRecorder, name: str, matrix: Matrix, *, table: bool) -> None:
        self._graph = graph
        self._name = name
        self._table = table
        self._integers, self._scales = f"{name}.weight_q8", f"{name}.weight_scales"
        rows, columns = matrix.shape
        self.rows = rows
        tensors = [
            TensorInfo(self._integers, BYTE, (rows, columns) if table else (columns, rows)),
            TensorInfo(self._scales, FLOAT, (rows,)),
        ]
        graph.defer(tensors, lambda: channel_tensors(matrix, transposed=not table))

    def multiply(
        self, path: str, source: str, bias: NDArray[np.float32] | None = None, output: str = ""
    ) -> str:
        """``source`` [..., columns] times the transposed matrix, plus a bias [rows].

        The operators round the whole input with one scale, so each of its vectors is first divided
        by its largest element: else one token's outlier would leave nothing of the others, and
        what a token gives would hang on those that run beside it.
        """
        graph = self._graph
        sizes = graph.op("Abs", f"{path}/Abs", [source])
        axis = graph.constant("last_axis", np.array([-1], np.int64))
        largest = graph.op("ReduceMax", f"{path}/ReduceMax", [sizes, axis])
        least = graph.constant("least_divisor", np.array(np.finfo(np.float32).tiny, np.float32))
        divisor = graph.op("Max", f"{path}/Max", [largest, least])
        scaled = graph.op("Div", f"{path}/Div", [source, divisor])
        product = self._product(path, scaled)
        if bias is None:
            return self._times(path, product, divisor, output)
        added = graph.constant(f"{self._name}.bias", bias)
        return graph.op(
            "Add",
            f"{path}/Add",
            [self._times(path, product, divisor), added],
            outputs=[output] if output else [],
        )

    def _times(self, path: str, product: str, divisor: str, output: str = "") -> str:
        outputs = [output] if output else []
        return self._graph.op("Mul", f"{path}/Rescale", [product, divisor], outputs=outputs)

    def _product(self, path: str, source: str) -> str:
        graph = self._graph
        if not self._table:
            return graph.microsoft(
                "DynamicQuantizeMatMul",
                f"{path}/DynamicQuantizeMatMul",
                [source, self._integers, self._scales],
            )
        rounded = [f"{path}/rounded", f"{path}/rounded_scale", f"{path}/rounded_zero_point"]
        graph.op("DynamicQuantizeLinear", f"{path}/Quantize", [source], outputs=rounded)
        zeros = np.zeros(self.rows, np.int8)  # as many as scales: the operator insists
        zero_points = graph.keep(f"{self._name}.weight_zero_points", zeros)
        return graph.microsoft(
            "QGemm",
            f"{path}/QGemm",
            [*rounded, self._integers, self._scales, zero_points],
            transB=1,
        )

    def gather(self, path: str, tokens: str) -> str:
        """Rows of ``tokens`` int64 [batch, tokens]: float32 [batch, tokens, columns]."""
        graph = self._graph
        view = graph.view(f"{self._integers}_gather_scales", self._scales, (self.rows, 1))
        integers = graph.op("Gather", f"{path}/Gather", [self._integers, tokens])
        scales = graph.op("Gather", f"{path}/scales/Gather", [view, tokens])
        floats = graph.op("Cast", f"{path}/Cast", [integers], to=1)
        return graph.op("Mul", f"{path}/Mul", [floats, scales])
