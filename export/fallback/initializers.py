"""The constants of an ONNX graph, mapped from the file where they lie outside it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Initializers", "StoredMatrix"]


class Initializers:
    """Initializers and ``Constant`` nodes by name: whoever reads a graph need not tell them apart.

    Args:
        graph: The graph, loaded without its external data.
        folder: Where the external data lie.
    """

    def __init__(self, graph: onnx.GraphProto, folder: Path) -> None:
        self._folder = folder
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._parameters = frozenset(self._tensors)
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._tensors[node.output[0]] = node.attribute[0].t

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self._tensors[name].dims)

    def is_float(self, name: str) -> bool:
        """Whether the elements are float32."""
        return bool(self._tensors[name].data_type == TensorProto.FLOAT)

    def is_weight(self, name: str) -> bool:
        """Whether it is a float32 matrix of the model, and not computed by the tracing."""
        wide = sum(size > 1 for size in self.shape(name)) > 1
        return name in self._parameters and self.is_float(name) and wide

    def array(self, name: str) -> NDArray[Any]:
        """The elements: a map of the file, or a copy where they lie inside the graph."""
        tensor = self._tensors[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        offset, count = int(where.get("offset", 0)), math.prod(tensor.dims)
        flat = np.memmap(self._folder / where["location"], dtype, "r", offset, count)
        return flat.reshape(tuple(tensor.dims))

    def distinct(self, names: Iterable[str]) -> dict[str, str]:
        """Each name's representative: the first of those whose type, shape and bytes are equal."""
        firsts: dict[tuple[object, ...], str] = {}
        found = {}
        for name in names:
            array = self.array(name)
            content = hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
            found[name] = firsts.setdefault((array.dtype.str, array.shape, content), name)
        return found


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A linear layer's weight, whichever way round the graph stores it.

    Attributes:
        array: float32 [rows, columns], or [columns, rows] where ``transposed``.
        transposed: Whether the graph stores it column by column.
    """

    array: NDArray[np.float32]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        first, second = self.array.shape
        return (second, first) if self.transposed else (first, second)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop)."""
        rows = self.array[:, start:stop].T if self.transposed else self.array[start:stop]
        return np.ascontiguousarray(rows)
