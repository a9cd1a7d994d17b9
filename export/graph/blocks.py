"""The parts of a decoder: norms, attention and the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..architectures.rope import RopeConfig
from ..architectures.spec import DecoderSpec, NormSpec, QKNormSpec
from ..checkpoint.packed import packed_tensor
from ..checkpoint.weights import Weights
from ..quantize.storage import Storage
from .linear import Calibrated, project
from .matrices import (
    CheckpointMatrix,
    MappedColumns,
    MappedRows,
    Matrix,
    Stacked,
    Transposed,
    head_map,
    read_finite,
)
from .recorder import GraphRecorder

__all__ = ["LayerBuilder"]


@dataclass(frozen=True, slots=True)
class LayerBuilder:
    """Records one block of the decoder after the other.

    Where a norm follows, the residual stream is not added by a node of its own: a Skip norm adds a
    branch's result to it and normalizes the sum.

    Attributes:
        graph: Where to record.
        weights: The checkpoint.
        spec: The architecture.
        storage: How matrices are stored.
        tables: Names of the cosines and sines of each rotary embedding.
        calibrated: Matrices that are quantized already.
        projections: What was recorded: the place, the input's name, and the weight.
    """

    graph: GraphRecorder
    weights: Weights
    spec: DecoderSpec
    storage: Storage
    tables: Mapping[RopeConfig, tuple[str, str]]
    calibrated: Calibrated = field(default_factory=dict)
    projections: list[tuple[str, str, Matrix]] = field(default_factory=list)

    def norm(self, name: str, path: str, source: str, *, scale: float = 1.0) -> str:
        """The norm of ``source``, times ``scale``."""
        constants = self._gain_and_bias(name, self.spec.norm, scale)
        return self._normalize(path, self.spec.norm, self.spec.norm.eps, [source, *constants])

    def enter(
        self, name: str | None, path: str, branch: str, residual: str, *, scale: float = 1.0
    ) -> tuple[str, str]:
        """Add a branch's result to the stream, and normalize the sum.

        Args:
            name: The norm; None: there is none.
            path: Its place in the model.
            branch: The result to be added; empty: nothing is.
            residual: The stream.
            scale: What the normalized sum is multiplied by.

        Returns:
            What the next part reads, and the stream.
        """
        if name is None or not branch:
            total = self.add(f"{path}/Add", branch, residual) if branch else residual
            return (self.norm(name, path, total, scale=scale) if name else total), total
        norm = self.spec.norm
        operator = f"Skip{_OPERATORS[norm.kind]}"
        node = f"{path}/{operator}"
        total = f"{node}/output_3"
        normed = self.graph.microsoft(
            operator,
            node,
            [branch, residual, *self._gain_and_bias(name, norm, scale)],
            outputs=[f"{node}/output_0", "", "", total],
            epsilon=norm.eps,
        )
        return normed, total

    def add(self, name: str, one: str, other: str) -> str:
        """The sum of two results of one shape."""
        return self.graph.op("Add", name, [one, other])

    def attention(self, layer: int, source: str) -> str:
        """Grouped-query attention on the cache; without the residual."""
        spec, names = self.spec, self.spec.names
        path = f"/model/layers.{layer}/attn"
        maps = self._head_maps(layer)
        parts = list(zip(names.qkv, maps, strict=True))
        packed = self._project(
            f"{path}/qkv_proj",
            source,
            Stacked([self._rows(name, layer, index) for name, index in parts]),
            np.concatenate([self._bias(name, layer)[index] * (index >= 0) for name, index in parts])
            if spec.qkv_bias
            else None,
        )
        inputs = (packed, "", "")
        if spec.qk_norm:
            inputs = self._normed_heads(layer, path, packed, spec.qk_norm)
        attended = self._group_query_attention(layer, path, inputs)
        output = self._matrix(names.attention_output, layer)
        if spec.head_dim != spec.padded_head_dim:
            columns = head_map(spec.heads, spec.head_dim, spec.padded_head_dim)
            output = MappedColumns(output, columns)
        return self._project(
            f"{path}/o_proj",
            attended,
            output,
            self._bias(names.attention_output, layer) if spec.output_bias else None,
        )

    def mlp(self, layer: int, source: str) -> str:
        """``down(act(gate(x)) * up(x))`` (arXiv 2002.05202), or ``down(act(up(x)))``.

        Without the residual.
        """
        spec, names = self.spec, self.spec.names
        path = f"/model/layers.{layer}/mlp"
        # One product and a Split take 2 to 5 % less of a decode step than two products.
        wide = self._project(
            f"{path}/{'gate_up_proj' if spec.gated else 'up_proj'}",
            source,
            Stacked([self._matrix(name, layer) for name in names.gate_up]),
            np.concatenate([self._bias(name, layer) for name in names.gate_up])
            if spec.mlp_bias
            else None,
        )
        if spec.gated:
            gate, up = self._split(f"{path}/Split", wide, "gate_up", [spec.intermediate] * 2)
            active = self.graph.op("Mul", f"{path}/Mul", [self._activation(path, gate), up])
        else:
            active = self._activation(path, wide)
        return self._project(
            f"{path}/down_proj",
            active,
            self._matrix(names.down, layer),
            self._bias(names.down, layer) if spec.mlp_bias else None,
        )

    def _project(
        self, path: str, source: str, matrix: Matrix, bias: NDArray[np.float32] | None
    ) -> str:
        self.projections.append((path, source, matrix))
        return project(
            self.graph, path, source, matrix, self.storage, bias, calibrated=self.calibrated
        )

    def _activation(self, path: str, source: str) -> str:
        operator = {"silu": "QuickGelu", "gelu": "Gelu", "gelu_tanh": "FastGelu"}[
            self.spec.activation
        ]
        # QuickGelu with alpha 1 is SiLU.
        options = {"alpha": 1.0} if operator == "QuickGelu" else {}
        return self.graph.microsoft(operator, f"{path}/act_fn/{operator}", [source], **options)

    def _head_maps(self, layer: int) -> list[NDArray[np.int64]]:
        """Where the graph's rows of queries, keys and values are in each of ``names.qkv``."""
        spec, size = self.spec, self.spec.head_dim
        widths = [self._turning(layer)] * 2 + [size]
        heads = [spec.heads, spec.kv_heads, spec.kv_heads]
        fused = len(spec.names.qkv) == 1
        if spec.qkv_by_head:
            starts, stride = [0, size, 2 * size], 3 * size
        else:
            starts = [0, spec.heads * size, (spec.heads + spec.kv_heads) * size]
            starts, stride = starts if fused else [0, 0, 0], size
        maps = [
            head_map(count, size, spec.padded_head_dim, width=width, start=start, stride=stride)
            for count, width, start in zip(heads, widths, starts, strict=True)
        ]
        return [np.concatenate(maps)] if fused else maps

    def _normed_heads(
        self, layer: int, path: str, packed: str, qk_norm: QKNormSpec
    ) -> tuple[str, str, str]:
        """Queries, keys and values apart, the first two normalized."""
        spec, padded = self.spec, self.spec.padded_head_dim
        # Entries that only pad a head count in its mean; gain and epsilon make up for it.
        share = spec.head_dim / padded
        eps = qk_norm.norm.eps * share

        def normalize(name: str, place: str, source: str, heads: int) -> str:
            gain = self._head_gains(name, layer, heads, qk_norm) * np.float32(share**0.5)
            constant = self.graph.constant(f"layers.{layer}.attn.{place}.weight", gain)
            at = f"{path}/{place}"
            if qk_norm.over == "projection":
                return self._normalize(at, qk_norm.norm, eps, [source, constant])
            apart = self._reshape(f"{at}/Heads", source, [0, 0, heads, padded])
            normed = self._normalize(at, qk_norm.norm, eps, [apart, constant])
            return self._reshape(f"{at}/Flat", normed, [0, 0, heads * padded])

        sizes = [heads * padded for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        query, key, value = self._split(f"{path}/Split", packed, "qkv", sizes)
        return (
            normalize(spec.names.query_norm, "q_norm", query, spec.heads),
            normalize(spec.names.key_norm, "k_norm", key, spec.kv_heads),
            value,
        )

    def _head_gains(
        self, name: str, layer: int, heads: int, qk_norm: QKNormSpec
    ) -> NDArray[np.float32]:
        """The gain in the graph's order: of one head, [heads, head_dim], or of the projection."""
        spec, size = self.spec, self.spec.head_dim
        each = qk_norm.over == "each_head"
        stored = [
            self._vector(f"{name.format(i=layer, h=h)}.weight") for h in range(heads if each else 1)
        ]
        gain = np.concatenate(stored).reshape(-1, size) + np.float32(qk_norm.norm.gain_offset)
        index = head_map(1, size, spec.padded_head_dim, width=self._turning(layer))
        wide = np.where(index >= 0, gain[:, index], np.float32(0))
        return wide if each else wide.reshape(-1)

    def _turning(self, layer: int) -> int:
        """Entries of a head that turn in this layer; of no use where none do."""
        rope = self.spec.attention[layer].rope
        return rope.width(self.spec.head_dim) if rope else self.spec.head_dim

    def _group_query_attention(self, layer: int, path: str, heads: tuple[str, str, str]) -> str:
        spec = self.spec.attention[layer]
        node = f"{path}/GroupQueryAttention"
        past = [f"past.{layer}.key", f"past.{layer}.value"]
        tables = self.tables[spec.rope] if spec.rope else ("", "")
        # Optional inputs (position_ids to k_norm_weight) stay out; query_lens is the 17th.
        inputs = [*heads, *past, "seqlens_k", "total_sequence_length", *tables]
        # The buffer of a window holds little more than the window: the operator drops the rest.
        options = (
            {"local_window_size": spec.window, "sliding_window_cache": 1} if spec.window else {}
        )
        return self.graph.microsoft(
            "GroupQueryAttention",
            node,
            [*inputs, *[""] * (16 - len(inputs)), "query_lens"],
            outputs=[f"{node}/output_0", f"present.{layer}.key", f"present.{layer}.value"],
            num_heads=self.spec.heads,
            kv_num_heads=self.spec.kv_heads,
            scale=self.spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            softcap=spec.softcap,
            do_rotary=int(spec.rope is not None),
            rotary_interleaved=0,
            **options,
        )

    def _normalize(self, path: str, norm: NormSpec, eps: float, inputs: list[str]) -> str:
        operator = _OPERATORS[norm.kind]
        node = f"{path}/{operator}"
        return self.graph.op(operator, node, inputs, axis=-1, epsilon=eps, stash_type=1)

    def _reshape(self, node: str, source: str, shape: list[int]) -> str:
        name = f"shape_{'_'.join(map(str, shape))}"
        return self.graph.op(
            "Reshape", node, [source, self.graph.constant(name, np.array(shape, np.int64))]
        )

    def _split(self, node: str, source: str, name: str, sizes: list[int]) -> list[str]:
        constant = self.graph.constant(f"{name}_sizes", np.array(sizes, np.int64))
        outputs = [f"{node}/output_{i}" for i in range(len(sizes))]
        self.graph.op("Split", node, [source, constant], outputs=outputs, axis=-1)
        return outputs

    def _matrix(self, name: str, layer: int) -> Matrix:
        """A projection's weight; every read of one goes through here."""
        matrix = CheckpointMatrix(self.weights, f"{name.format(i=layer)}.weight")
        # Quantizers pack a layer by its outputs, however its floats were stored.
        stored = self.spec.transposed and packed_tensor(self.weights, matrix.name) is None
        return Transposed(matrix) if stored else matrix

    def _rows(self, name: str, layer: int, index: NDArray[np.int64]) -> Matrix:
        matrix = self._matrix(name, layer)
        if np.array_equal(index, np.arange(matrix.shape[0])):
            return matrix
        return MappedRows(matrix, index)

    def _bias(self, name: str, layer: int) -> NDArray[np.float32]:
        return self._vector(f"{name.format(i=layer)}.bias")

    def _gain_and_bias(self, name: str, norm: NormSpec, scale: float) -> list[str]:
        """Constants of a norm, its gain and the bias that it may have, times ``scale``."""
        gain = (self._vector(f"{name}.weight") + np.float32(norm.gain_offset)) * np.float32(scale)
        constants = [self.graph.constant(f"{name}.weight", gain)]
        if norm.bias:
            bias = self._vector(f"{name}.bias") * np.float32(scale)
            constants.append(self.graph.constant(f"{name}.bias", bias))
        return constants

    def _vector(self, name: str) -> NDArray[np.float32]:
        return read_finite(self.weights, name)


_OPERATORS = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}
