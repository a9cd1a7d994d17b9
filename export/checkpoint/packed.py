"""The tensors of a checkpoint whose linear layers are integers already (GPTQ, AWQ)."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import CheckpointError, UnsupportedModelError

from ..graph.matrices import read_finite
from ..quantize.packing import Blocks, block_count
from ..quantize.repack import awq_integers, fields, gptq_integers
from ..quantize.rtn import dequantize_blocks
from ..quantize.storage import Storage
from .prequantized import Packing
from .weights import Weights, checked_rows

__all__ = [
    "PackedTensor",
    "PackedWeights",
    "is_empty_bias",
    "open_weights",
    "packed_tensor",
]

_PARTS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales")}
_WRONG_CONFIG = "Take the config.json that belongs to the weights, or download both again."


def open_weights(folder: Path, packing: Packing | None, *, dequantize: bool) -> Weights:
    """Open a checkpoint's weights.

    Args:
        folder: The checkpoint.
        packing: What config.json says of integers in it.
        dequantize: Give integers as the floats that they stand for, not as integers.

    Raises:
        CheckpointError: See :meth:`Weights.open`; or the integers are not what ``packing`` says.
        UnsupportedModelError: The integers are packed in a way that is not known.
    """
    with ExitStack() as stack:
        weights = stack.enter_context(Weights.open(folder))
        if packing is not None:
            weights = PackedWeights(weights, packing, dequantize=dequantize)
        elif packed := [name for name in weights.names if name.endswith(".qweight")]:
            raise CheckpointError(
                f"The checkpoint holds integers ({packed[0]!r}), but its config.json has no "
                "quantization_config.",
                "If there is a quantize_config.json or quant_config.json beside it, put its "
                'content there, and "quant_method": "gptq" or "awq".',
            )
        stack.pop_all()
        return weights


class PackedWeights(Weights):
    """Weights that give a layer's integers the name that its floats would have.

    ``X.weight`` [rows, columns] stands for ``X.qweight``, ``X.qzeros``, ``X.scales`` and GPTQ's
    ``X.g_idx``, which are checked when this is made.

    Args:
        weights: The tensors as they are; this takes them over.
        packing: What config.json says of them.
        dequantize: See :func:`open_weights`.

    Raises:
        CheckpointError: They contradict ``packing``, or one another.
        UnsupportedModelError: Columns are in an order that cannot be kept.
    """

    def __init__(self, weights: Weights, packing: Packing, *, dequantize: bool) -> None:
        super().__init__(weights._tensors, weights._files)
        self._dequantize = dequantize
        names = set(super().names)
        modules = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
        if not modules:
            raise CheckpointError(
                f"config.json says that layers are quantized ({packing}), but none is.",
                _WRONG_CONFIG,
            )
        self._layers = _Layers(weights, packing)
        self._packed = {f"{one}.weight": _describe(self._layers, one) for one in sorted(modules)}
        parts = {f"{one}.{part}" for one in modules for part in _PARTS[packing.method]}
        self._names = tuple(sorted(names - parts | self._packed.keys()))

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of the tensor's axes."""
        packed = self._packed.get(name)
        return packed.shape if packed else super().shape(name)

    def dtype(self, name: str) -> str:
        """The stored type as safetensors names it; that of the words for a layer's integers."""
        return "I32" if name in self._packed else super().dtype(name)

    def read(
        self, name: str, start: int | None = None, stop: int | None = None
    ) -> NDArray[np.float32]:
        """Rows [start, stop) as floats; see :meth:`Weights.read`.

        Raises:
            UnsupportedModelError: They are integers, which are not to be dequantized.
        """
        packed = self._packed.get(name)
        if packed is None:
            return super().read(name, start, stop)
        if not self._dequantize:
            raise UnsupportedModelError(
                f"{name!r} is quantized already, and this model's graph needs it in another form, "
                "so that it would have to be rounded again.",
                "Export with fp32, or from the unquantized checkpoint that it was made from.",
            )
        return packed.read(*checked_rows(name, packed.shape[0], start, stop))

    def packed(self, name: str) -> PackedTensor | None:
        """The integers that ``name`` stands for; None where it is floats."""
        return self._packed.get(name)

    def close(self) -> None:
        """Close the files; safe to call again."""
        super().close()
        self._layers.close()


def packed_tensor(weights: Weights, name: str) -> PackedTensor | None:
    """The integers that ``name`` stands for; None where it is floats."""
    return weights.packed(name) if isinstance(weights, PackedWeights) else None


def is_empty_bias(weights: Weights, name: str) -> bool:
    """Whether it is zeros, which old quantizers added to every layer that had no bias."""
    module = name.removesuffix(".bias")
    return bool(packed_tensor(weights, f"{module}.weight")) and not weights.read(name).any()


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A layer's integers, as a matrix of blocks; a ``QuantizedMatrix``.

    Attributes:
        shape: Rows (outputs) and columns (inputs).
        storage: Bits and block, and whether all zero points are the middle one.
        order: GPTQ's act-order: which input each stored column belongs to; None: its own.
    """

    layers: _Layers
    module: str
    shape: tuple[int, int]
    storage: Storage
    order: NDArray[np.int64] | None

    def blocks(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop): the checkpoint's integers, no weight changed."""
        layer, columns, block = self.layers.load(self.module), self.shape[1], self.storage.block
        assert block is not None
        integers = self.layers.integers(layer, start, stop)  # [columns, rows]
        if self.order is not None:
            integers = integers[self.order]
        # A group longer than a block is several blocks that share its scale and zero point.
        blocks = block_count(columns, block)
        group = np.arange(blocks) * block // self.layers.columns_of_group(columns)
        scales = layer.scales[group, start:stop].T
        zero_points = layer.zero_points[group, start:stop].T
        filled = np.empty((stop - start, blocks * block), np.uint8)
        filled[:, :columns] = integers.T
        filled[:, columns:] = zero_points[:, -1:]
        return Blocks(filled.reshape(-1, blocks, block), scales, zero_points)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop): the floats that the integers stand for."""
        one = self.blocks(start, stop)
        stored = dequantize_blocks(
            one.integers,
            one.scales,
            one.zero_points,
            bits=self.storage.bits,
            columns=self.shape[1],
        )
        rows = np.empty_like(stored)
        rows[:, slice(None) if self.order is None else self.order] = stored
        return rows


@dataclass(frozen=True, slots=True)
class _Layer:
    """Words int32 as stored, zero points uint8 and scales float32 [groups, rows]."""

    words: NDArray[np.int32]
    zero_points: NDArray[np.uint8]
    scales: NDArray[np.float32]


class _Layers:
    """Reads layers, and keeps the last one: its matrix is asked for a few rows at a time."""

    def __init__(self, weights: Weights, packing: Packing) -> None:
        self.weights = weights
        self.packing = packing
        self._lock = threading.Lock()
        self._last: tuple[str, _Layer] | None = None

    def load(self, module: str) -> _Layer:
        """The layer's tensors; several threads may ask at once."""
        with self._lock:
            if self._last is None or self._last[0] != module:
                scales = read_finite(self.weights, f"{module}.scales")
                words = self.weights.read_words(f"{module}.qweight")
                self._last = module, _Layer(words, self.zero_points(module), scales)
            return self._last[1]

    def close(self) -> None:
        """Close the files, and forget the last layer."""
        self.weights.close()
        self._last = None

    def integers(self, layer: _Layer, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows [start, stop) of the matrix as uint8 [columns, stop - start]."""
        if self.packing.method == "gptq":
            return gptq_integers(layer.words[:, start:stop], self.packing.bits)
        first = start // 8
        unpacked = awq_integers(layer.words[:, first : -(-stop // 8)])
        return unpacked[:, start - 8 * first : stop - 8 * first]

    def zero_points(self, module: str) -> NDArray[np.uint8]:
        """uint8 [groups, rows]."""
        words, packing = self.weights.read_words(f"{module}.qzeros"), self.packing
        if packing.method == "awq":
            return awq_integers(words)
        stored = fields(words, packing.bits).reshape(len(words), -1)
        if packing.zero_offset and (stored == (1 << packing.bits) - 1).any():
            # AutoGPTQ reads it as 2 ** bits, GPTQModel as 0 with a carry, others as 0 without.
            raise UnsupportedModelError(
                f"{module}.qzeros holds a zero point of 0, which checkpoint_format 'gptq' stores "
                "as -1 and readers understand in different ways.",
                "Export from a checkpoint in the format 'gptq_v2'.",
            )
        return stored + np.uint8(packing.zero_offset)

    def columns_of_group(self, columns: int) -> int:
        """How many columns share a scale."""
        return columns if self.packing.group == -1 else self.packing.group


def _describe(layers: _Layers, module: str) -> PackedTensor:
    """Check a layer's tensors, all but the scales' values and the integers themselves."""
    packing = layers.packing
    rows, columns = _check_shapes(layers, module)
    middle = 1 << (packing.bits - 1)
    symmetric = bool((layers.zero_points(module) == middle).all())
    if packing.symmetric and not symmetric:
        raise CheckpointError(
            f"config.json says that the quantization is symmetric ({packing}), but {module}.qzeros "
            f"has zero points other than {middle}.",
            _WRONG_CONFIG,
        )
    return PackedTensor(
        layers,
        module,
        (rows, columns),
        Storage(packing.bits, packing.block, symmetric),
        _order(layers, module, columns) if packing.method == "gptq" else None,
    )


def _check_shapes(layers: _Layers, module: str) -> tuple[int, int]:
    """Rows and columns of a layer, whose tensors must agree on them."""
    weights, packing = layers.weights, layers.packing
    shapes = {part: weights.shape(f"{module}.{part}") for part in _PARTS[packing.method]}
    if f"{module}.weight" in weights.names:
        raise CheckpointError(
            f"The checkpoint holds both {module}.weight and {module}.qweight.",
            "Download it again, or remove the one that does not belong there.",
        )
    for part in shapes:
        known = ("F16", "BF16", "F32") if part == "scales" else ("I32",)
        if (dtype := weights.dtype(f"{module}.{part}")) not in known:
            raise CheckpointError(
                f"{module}.{part} is stored as {dtype} and must be {' or '.join(known)}.",
                _WRONG_CONFIG,
            )
    per_word = 32 // packing.bits
    rows = shapes["scales"][-1] if shapes["scales"] else 0
    length = shapes["qweight"][0] if shapes["qweight"] else 0
    columns = length * (per_word if packing.method == "gptq" else 1)
    groups = block_count(columns, layers.columns_of_group(columns)) if columns else 0
    expected = {
        "qweight": (length, rows if packing.method == "gptq" else rows // per_word),
        "qzeros": (groups, rows // per_word),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }
    for part, shape in shapes.items():
        if shape != expected[part] or not rows // per_word or rows % per_word or not columns:
            raise CheckpointError(
                f"{module}.{part} has shape {list(shape)}; {packing} asks for "
                f"{list(expected[part])}, and for outputs in multiples of {per_word}.",
                _WRONG_CONFIG,
            )
    return rows, columns


def _order(layers: _Layers, module: str, columns: int) -> NDArray[np.int64] | None:
    """The order in which the columns of a group lie side by side; None if they do already."""
    groups = layers.weights.read_words(f"{module}.g_idx")
    sorted_groups = np.arange(columns) // layers.columns_of_group(columns)
    if np.array_equal(groups, sorted_groups):
        return None
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], sorted_groups):
        raise UnsupportedModelError(
            f"{module}.g_idx (desc_act) does not give every group of columns the "
            f"{layers.columns_of_group(columns)} that quantization_config.group_size says.",
            "Export from a checkpoint that was quantized with desc_act off.",
        )
    return order
