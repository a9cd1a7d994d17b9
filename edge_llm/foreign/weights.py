"""How a foreign graph stores its weight matrices, as far as its operators tell."""

from __future__ import annotations

import math
from collections import Counter

from edge_llm.foreign.onnx_file import Node, OnnxModel, Tensor
from edge_llm.manifest import Quantization, TensorQuantization

__all__ = ["count_parameters", "read_quantization"]

# By operator: which input holds the matrix. What else such a node takes is no parameter.
_BLOCKED = {"MatMulNBits": 1, "GatherBlockQuantized": 0, "MatMulBnb4": 1}
_INTEGER = {"MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1}
_INTEGER |= {"DequantizeLinear": 0}
_TABLES = {"GroupQueryAttention", "RotaryEmbedding"}
_FLOATS = ("float32", "float16", "bfloat16", "float64")


def read_quantization(model: OnnxModel) -> Quantization:
    """The form that most weights are stored in, and the tensors of another quantized form."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    forms: dict[str, TensorQuantization] = {}
    sizes: Counter[TensorQuantization] = Counter()
    for node in model.nodes:
        if (tensor := _matrix(node, tensors)) and tensor.name not in forms:
            forms[tensor.name] = form = _form(node)
            sizes[form] += _elements(node, tensor)
    if not sizes:
        half = any(tensor.dtype == "float16" and len(tensor.shape) == 2 for tensor in model.tensors)
        bits = 16 if half else 32
        return Quantization(method="none", bits=bits, block=None, exceptions={})
    ((most, _),) = sizes.most_common(1)
    return Quantization(
        method="foreign",
        bits=most.bits,
        block=most.block,
        exceptions={name: form for name, form in forms.items() if form != most},
    )


def count_parameters(model: OnnxModel) -> int:
    """Weights of the model, each tensor once; scales and rotary tables are none."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    counted: dict[str, int] = {}
    helpers: set[str] = set()
    for node in model.nodes:
        if tensor := _matrix(node, tensors):
            counted[tensor.name] = _elements(node, tensor)
            helpers.update(name for name in node.inputs if name != tensor.name)
        elif node.operator in _TABLES:
            helpers.update(node.inputs)
    for name, tensor in tensors.items():
        if tensor.dtype in _FLOATS and tensor.shape and name not in helpers:
            counted.setdefault(name, math.prod(tensor.shape))
    return max(1, sum(counted.values()))


def _matrix(node: Node, tensors: dict[str, Tensor]) -> Tensor | None:
    place = (_BLOCKED | _INTEGER).get(node.operator)
    if place is None or place >= len(node.inputs):
        return None
    return tensors.get(node.inputs[place])


def _form(node: Node) -> TensorQuantization:
    if node.operator in _BLOCKED:
        return TensorQuantization(
            bits=node.integers.get("bits", 4), block=node.integers.get("block_size")
        )
    return TensorQuantization(bits=8, block=node.integers.get("block_size"))


def _elements(node: Node, tensor: Tensor) -> int:
    if "K" in node.integers and "N" in node.integers:
        return node.integers["K"] * node.integers["N"]
    per_byte = 8 // node.integers.get("bits", 4) if node.operator in _BLOCKED else 1
    return math.prod(tensor.shape) * (per_byte if tensor.dtype == "uint8" else 1)
