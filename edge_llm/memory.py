"""How much memory a model will take, told before it is loaded.

The terms are what a process has resident that loads one model and does nothing else. Each is
measured by ``benchmarks/memory.py`` beside its prediction.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_llm.errors import ArgumentError, MemoryLimitError
from edge_llm.foreign.onnx_file import Node, OnnxModel, Tensor, read_onnx
from edge_llm.runtime.decoder import WIDEST_STEP
from edge_llm.runtime.kv_cache import state_bytes

if TYPE_CHECKING:
    from edge_llm.bundle import Bundle
    from edge_llm.manifest import Dims

__all__ = ["MemoryEstimate", "MemoryModel", "estimate_memory", "fitting_context", "parse_bytes"]

# Which input of which operator ONNX Runtime packs for the processor's kernels.
_PACKED_INPUT = {
    "MatMulNBits": 1,
    "MatMul": 1,
    "Gemm": 1,
    "MatMulInteger": 1,
    "DynamicQuantizeMatMul": 1,
}
# Beside its bits, MatMulNBits packs a float32 scale and a float32 sum of each block.
_BLOCK_BYTES = 8

# Measured, see benchmarks/memory.py: ONNX Runtime's session without weights and its nodes, ...
SESSION_BYTES = 1_300_000
NODE_BYTES = 12_300
# ... the interpreter, numpy, edge_llm and onnxruntime, code and data, and what the tokenizers
# library holds of a token.
PYTHON_BYTES = 73_000_000
TOKEN_BYTES = 268
# A step's activations, in float32 numbers a token: so many times the widest matrix's output (of the
# gate and up projections; then its halves, their product), and so many times the widths of a
# layer's other values. What ONNX Runtime's arena wastes is in it.
WIDEST_TIMES = 3.5
OTHERS_TIMES = 3.9

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes resident in a process that runs one model and nothing else.

    Attributes:
        weights_file: Pages of mapped weight files, which the system may drop and read again.
        weights_anonymous: Weights that ONNX Runtime packs into memory when it loads the model, and
            its graph.
        kv: The key/value cache, when the context of every slot is full. (While a session or prefix
            is written, a copy of what it has there comes on top.)
        scratch: Activations of the widest step of a prompt (512 tokens, or ``prefill_chunk``, or
            what was tuned) and a row of logits of each slot. Slower machines take narrower steps.
            (Scoring texts takes up to 16 MB of logits more.)
        runtime: Python, its libraries (their code too), and the tokenizer.
    """

    weights_file: int
    weights_anonymous: int
    kv: int
    scratch: int
    runtime: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())


class MemoryModel:
    """What a bundle takes by context and slots; its graph is read once for all of them.

    Args:
        bundle: The model.
        prefill_chunk: Tokens of a prompt to feed at once; by default the most.

    Raises:
        IntegrityError: The graph cannot be read.
    """

    def __init__(self, bundle: Bundle, *, prefill_chunk: int | None = None) -> None:
        self._manifest = bundle.manifest
        graph = read_onnx(bundle.file(bundle.manifest.decoder.graph))
        self._mapped, inline, self._packed = _weights(graph)
        self._anonymous = inline + SESSION_BYTES + NODE_BYTES * len(graph.nodes)
        self._activations = _activations(graph, bundle.manifest.dims)
        self._widest = prefill_chunk or WIDEST_STEP

    def estimate(
        self, context: int, *, slots: int = 1, compiled: Path | None = None
    ) -> MemoryEstimate:
        """Predict.

        Args:
            context: Tokens that the cache is made for.
            slots: Sequences that are answered at once.
            compiled: Its compiled graph, where it is loaded by that: the sum is the same.
        """
        state, vocab = self._manifest.decoder.state, self._manifest.dims.vocab
        step = min(context, self._widest)
        return MemoryEstimate(
            weights_file=self._mapped + (self._packed if compiled else 0),
            weights_anonymous=self._anonymous + (0 if compiled else self._packed),
            kv=state_bytes(state, rows=slots, capacity=context),
            scratch=4 * (step * self._activations + slots * vocab),
            runtime=PYTHON_BYTES + TOKEN_BYTES * vocab,
        )


def estimate_memory(
    bundle: Bundle,
    *,
    context: int,
    compiled: Path | None = None,
    prefill_chunk: int | None = None,
    slots: int = 1,
) -> MemoryEstimate:
    """What a model will take, see :class:`MemoryModel`.

    Args:
        bundle: As there, like ``prefill_chunk`` and the error.
        context: As for its method, like ``compiled`` and ``slots``.
        compiled: See there.
        prefill_chunk: See there.
        slots: See there.
    """
    model = MemoryModel(bundle, prefill_chunk=prefill_chunk)
    return model.estimate(context, slots=slots, compiled=compiled)


def fitting_context(
    estimate: Callable[[int], MemoryEstimate], *, longest: int, shortest: int, limit: int
) -> int:
    """The largest context that is estimated to fit within a limit.

    Args:
        estimate: What the model takes with a context of so many tokens.
        longest: Most tokens to consider.
        shortest: Fewest tokens that will do.
        limit: Bytes.

    Raises:
        MemoryLimitError: Not even the shortest fits.
    """
    if estimate(longest).total <= limit:
        return longest
    least = estimate(shortest)
    if least.total > limit:
        raise MemoryLimitError(limit, shortest, asdict(least))
    while longest - shortest > 1:  # of these two the shorter fits, and the longer does not
        middle = (shortest + longest) // 2
        if estimate(middle).total <= limit:
            shortest = middle
        else:
            longest = middle
    return shortest


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes, as such or as text with a unit: "512MB" is 512 million, "512MiB" 2**29.

    Args:
        name: The argument's name, for the error.
        value: What was given.

    Raises:
        ArgumentError: It is neither, or not positive.
    """
    size = 0.0
    if isinstance(value, str):
        told = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B|)\s*", value.upper())
        if told and told[2] in _UNITS:
            size = float(told[1]) * _UNITS[told[2]]
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size < 1:
        raise ArgumentError(name, 'a number of bytes, or text such as "512MB" or "1.5GiB"', value)
    return int(size)


def _weights(graph: OnnxModel) -> tuple[int, int, int]:
    """Bytes of a graph's tensors: mapped as they are, in the graph's own file, and packed."""
    users: dict[str, list[tuple[Node, int]]] = defaultdict(list)
    for node in graph.nodes:
        for index, name in enumerate(node.inputs):
            users[name].append((node, index))
    mapped = inline = packed = 0
    for tensor in graph.tensors:
        packing = [
            node for node, i in users[tensor.name] if _PACKED_INPUT.get(node.operator, -1) == i
        ]
        packed += sum(_packed_bytes(tensor, node) for node in packing)
        if len(packing) < len(users[tensor.name]) or not packing:
            if tensor.external is None:
                inline += tensor.nbytes
            else:
                mapped += tensor.nbytes
    return mapped, inline, packed


def _packed_bytes(tensor: Tensor, node: Node) -> int:
    blocks = math.prod(tensor.shape[:2]) if node.operator == "MatMulNBits" else 0
    return tensor.nbytes + _BLOCK_BYTES * blocks


def _activations(graph: OnnxModel, dims: Dims) -> int:
    """Numbers of a token that a step holds at once."""
    shapes = {tensor.name: tensor.shape for tensor in graph.tensors}
    hidden = dims.hidden or 0
    widest = hidden
    for node in graph.nodes:
        shape = shapes.get(node.inputs[1], ()) if len(node.inputs) > 1 else ()
        width = 0
        if node.operator == "MatMulNBits":
            width = node.integers["N"]
        elif node.operator in _PACKED_INPUT and len(shape) == 2:
            width = shape[0 if node.integers.get("transB") else 1]
        if width != dims.vocab:  # the head's is one row, and bound
            widest = max(widest, width)
    attention = ((dims.heads or dims.kv_heads) + 2 * dims.kv_heads) * dims.head_dim
    return int(WIDEST_TIMES * widest + OTHERS_TIMES * (hidden + attention))
