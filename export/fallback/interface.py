"""The inputs and outputs of a traced graph, compared with the standard layout."""

from __future__ import annotations

import re

import onnx
from onnx import TensorProto

from edge_llm.errors import UnsupportedModelError
from edge_llm.manifest import StateTensor

__all__ = ["LAYOUT", "read_state"]

LAYOUT = "standard.v1"

_TOKENS = {"input_ids", "attention_mask", "position_ids"}
_STATE = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_REMEDY = "The model cannot be exported; please report its model_type."


def read_state(graph: onnx.GraphProto) -> tuple[StateTensor, ...]:
    """The state of a graph in the standard layout, in the order of the layers.

    Raises:
        UnsupportedModelError: An input or an output is not one of the standard layout's: tokens,
            and one key and one value a layer, float32 [batch, kv_heads, past, head_dim].
    """
    outputs = {value.name: value for value in graph.output}
    rest = outputs.keys() - {"logits"}
    state: dict[tuple[int, str], StateTensor] = {}
    for value in graph.input:
        if value.name in _TOKENS:
            continue
        match = _STATE.fullmatch(value.name)
        if match is None:
            raise UnsupportedModelError(
                f"The traced graph asks for {value.name!r}, which a decoder of text does not have.",
                _REMEDY,
            )
        layer, part = int(match[1]), match[2]
        output = f"present.{layer}.{part}"
        heads, width = _sizes(value)
        if output not in outputs or _sizes(outputs[output]) != (heads, width):
            raise UnsupportedModelError(
                f"The traced graph has no output {output!r} of the shape of {value.name!r}.",
                _REMEDY,
            )
        rest -= {output}
        state[layer, part] = StateTensor(
            input=value.name,
            output=output,
            dtype="float32",
            shape=("batch", heads, "capacity", width),
            batch_axis=0,
            sequence_axis=2,
            shared=False,
            kind="kv",
        )
    if rest or not state or "logits" not in outputs:
        raise UnsupportedModelError(
            f"The traced graph has the outputs {', '.join(sorted(outputs))}; logits and a key and "
            "a value a layer are what can be run.",
            _REMEDY,
        )
    return tuple(state[key] for key in sorted(state))


def _sizes(value: onnx.ValueInfoProto) -> tuple[int, int]:
    """Heads and head size of a state tensor."""
    tensor = value.type.tensor_type
    sizes = [axis.dim_value or axis.dim_param for axis in tensor.shape.dim]
    kinds = [type(size) for size in sizes]
    if kinds != [str, int, str, int] or tensor.elem_type != TensorProto.FLOAT:
        raise UnsupportedModelError(
            f"The state {value.name!r} is {TensorProto.DataType.Name(tensor.elem_type)} {sizes}; "
            "FLOAT [batch, kv_heads, past, head_dim] is what can be run.",
            _REMEDY,
        )
    return sizes[1], sizes[3]
