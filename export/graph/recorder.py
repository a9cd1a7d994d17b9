"""Recording an ONNX graph: named nodes, and weights that are computed only when written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["DeferredTensors", "GraphRecorder", "TensorInfo"]

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"

Rows = Iterable[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, element type and shape of a weight that lives in the external data file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class DeferredTensors:
    """Weights that one computation yields together, such as blocks and their scales.

    ``compute`` gives, for each of ``tensors``, its rows in order as one or more arrays, so that a
    matrix need not be in memory as a whole. It is called once, when the weights are written.
    """

    tensors: tuple[TensorInfo, ...]
    compute: Callable[[], Sequence[Rows]]


class GraphRecorder:
    """Collects nodes, inputs, outputs and weights, and turns them into an ONNX model."""

    def __init__(self, name: str, *, opset: int = OPSET) -> None:
        self._name = name
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._small: dict[str, onnx.TensorProto] = {}
        self._views: dict[str, tuple[str, TensorInfo]] = {}
        self.deferred: list[DeferredTensors] = []

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        """Declare a graph input; strings in ``shape`` are symbolic sizes."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        self._outputs.append(_value_info(name, dtype, shape))

    def declare(
        self, inputs: Iterable[onnx.ValueInfoProto], outputs: Iterable[onnx.ValueInfoProto]
    ) -> None:
        """Take over the inputs and outputs of another graph."""
        self._inputs += inputs
        self._outputs += outputs

    def copy(self, node: onnx.NodeProto) -> None:
        """Take over a node of another graph."""
        self._nodes.append(node)

    def op(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Record a node and give its first output's name.

        Args:
            op_type: The operator.
            name: The node's name, such as ``/model/layers.0/attn/o_proj/MatMul``.
            inputs: Names; an empty string leaves an optional input out.
            outputs: Names, where the default ``{name}/output_0`` alone will not do.
            domain: Operator set.
            attributes: Attributes of the node.
        """
        trimmed = list(inputs)
        while trimmed and not trimmed[-1]:
            trimmed.pop()
        names = list(outputs) or [f"{name}/output_0"]
        self._nodes.append(
            helper.make_node(op_type, trimmed, names, name=name, domain=domain, **attributes)
        )
        return names[0]

    def microsoft(self, op_type: str, name: str, inputs: Sequence[str], **rest: Any) -> str:
        """Record a node of ONNX Runtime's own operator set."""
        return self.op(op_type, name, inputs, domain=MICROSOFT, **rest)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Keep a small array inside the graph file; the same name is kept once."""
        tensor = numpy_helper.from_array(np.asarray(value, order="C"), name)
        assert self._small.setdefault(name, tensor) == tensor, name
        return name

    def defer(self, tensors: Sequence[TensorInfo], compute: Callable[[], Sequence[Rows]]) -> None:
        """Promise weights of the external data file."""
        self.deferred.append(DeferredTensors(tuple(tensors), compute))

    def keep(self, name: str, value: NDArray[Any]) -> str:
        """Keep a large array in the external data file."""
        self.defer([TensorInfo(name, value.dtype, value.shape)], lambda: [[value]])
        return name

    def view(self, name: str, of: str, shape: Sequence[int]) -> str:
        """Give a deferred tensor's bytes a second name and shape; they are stored once.

        Both names point at the same place of the external data file, which is memory-mapped, so a
        view costs neither disk nor memory.
        """
        dtype = next(info.dtype for info in self._deferred_infos() if info.name == of)
        self._views[name] = (of, TensorInfo(name, dtype, tuple(shape)))
        return name

    def until(self, outputs: Collection[str]) -> GraphRecorder:
        """What some of the outputs take, and all inputs. ONNX Runtime runs every node there is."""
        part = GraphRecorder(self._name, opset=self._opset)
        wanted = set(outputs)
        part._inputs = self._inputs
        part._outputs = [one for one in self._outputs if one.name in wanted]
        for node in reversed(self._nodes):
            if not wanted.isdisjoint(node.output):
                part._nodes.insert(0, node)
                wanted.update(node.input)
        part._small = {name: one for name, one in self._small.items() if name in wanted}
        part._views = {name: one for name, one in self._views.items() if name in wanted}
        wanted.update(of for of, _ in part._views.values())
        part.deferred = [
            group for group in self.deferred if any(info.name in wanted for info in group.tensors)
        ]
        return part

    def model(self, data_file: str, offsets: dict[str, int], producer: str) -> onnx.ModelProto:
        """The finished model, its weights pointing into ``data_file``.

        Args:
            data_file: Name of the external data file beside the model.
            offsets: Where each deferred tensor starts in it, in bytes.
            producer: Version of the producer.
        """
        external = [
            _external(info, data_file, offsets[info.name]) for info in self._deferred_infos()
        ]
        external += [_external(info, data_file, offsets[of]) for of, info in self._views.values()]
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            self._outputs,
            initializer=[*self._small.values(), *external],
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self._opset), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION,
            producer_name="edge_llm_export",
            producer_version=producer,
        )

    def _deferred_infos(self) -> Iterator[TensorInfo]:
        for group in self.deferred:
            yield from group.tensors


def _value_info(
    name: str, dtype: type[np.generic], shape: Sequence[int | str]
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape)
    )


def _external(info: TensorInfo, data_file: str, offset: int) -> onnx.TensorProto:
    tensor = TensorProto()
    tensor.name = info.name
    tensor.data_type = helper.np_dtype_to_tensor_dtype(info.dtype)
    tensor.dims.extend(info.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data_file), ("offset", offset), ("length", info.size)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor
