"""A pass over a written graph: its float32 key and value caches become 8-bit integers.

GroupQueryAttention keeps the keys, rotated, and the values as ``round(x / scale)``, from -128 to
127, with one scale per head and channel; what it attends to is ``integer * scale``, the step's own
keys and values included. Everything else of the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["quantize_cache"]

# Places of past_key, past_value, k_scale and v_scale among the operator's inputs.
_PAST = (3, 4)
_SCALES = (12, 13)


def quantize_cache(model: onnx.ModelProto, scales: Mapping[str, NDArray[np.float32]]) -> None:
    """Change a graph in place.

    Before: ``past.{i}.key`` and its like are float32, and GroupQueryAttention has no scales.
    After: they and the outputs that share their buffers are int8, and it has them as constants.

    Args:
        model: The graph.
        scales: By the name of each cache's input, float32 [kv_heads, head_dim], above 0.
    """
    graph = model.graph
    caches = set(scales)
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        for past, place in zip(_PAST, _SCALES, strict=True):
            name = node.input[past]
            node.input[place] = f"{name}.scale"
            scale = scales[name][None, :, None]  # [1, kv_heads, 1, head_dim]
            graph.initializer.append(numpy_helper.from_array(scale, node.input[place]))
        caches.update(node.output[1:3])
        for key, value in (
            ("k_quant_type", "PER_CHANNEL"),
            ("v_quant_type", "PER_CHANNEL"),
            ("kv_cache_bit_width", 8),
        ):
            node.attribute.append(helper.make_attribute(key, value))
    for declared in (*graph.input, *graph.output):
        if declared.name in caches:
            declared.type.tensor_type.elem_type = TensorProto.INT8
