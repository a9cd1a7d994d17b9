"""One decoder in variants, as graphs with random weights at a real model's shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import Shape
from edge_llm_export.graph.recorder import GraphRecorder

__all__ = ["Builder", "Variant", "parse_variant", "save"]


@dataclass(frozen=True, slots=True)
class Variant:
    """How a decoder is written; the defaults are what the exporter writes.

    Attributes:
        mlp: "split": one product of gate and up, and a Split; "two": two products; "norm": Split,
            and GatedRMSNorm as the gate; "qmoe": QMoE with one expert.
        qkv: "packed" or "three" products.
        rotary: "inside" GroupQueryAttention, or operators "outside".
        norm: "skip": the sum inside the norm; "add": by a node of its own.
        kv: "float32", "int8" (a scale per channel), "int8_tensor" (per tensor), "int4", or
            "float16", as all of attention is then.
        block: Of the products in the layers, like ``bits`` and ``level``.
        bits: Of a weight.
        level: The accuracy level of MatMulNBits.
        head_bits: Of the head, like ``head_block``.
        head_block: See there.
        zero: "no", or a "packed" zero point per block.
        rows: "gather": the rows to score behind the last attention; "late": before the head.
    """

    mlp: str = "split"
    qkv: str = "packed"
    rotary: str = "inside"
    norm: str = "skip"
    kv: str = "float32"
    block: int = 128
    bits: int = 4
    level: int = 4
    head_bits: int = 4
    head_block: int = 128
    zero: str = "no"
    rows: str = "gather"


class Builder:
    """Records one variant."""

    def __init__(self, shape: Shape, variant: Variant, context: int) -> None:
        self.graph = GraphRecorder("benchmark")
        self.shape, self.variant, self.context = shape, variant, context
        self.rng = np.random.default_rng(0)

    def build(self) -> GraphRecorder:
        """The whole decoder."""
        graph, shape = self.graph, self.shape
        graph.input("input_ids", np.int64, ["batch", "tokens"])
        for name in ("query_lens", "seqlens_k"):
            graph.input(name, np.int32, ["batch"])
        graph.input("total_sequence_length", np.int32, [])
        graph.input("logits_index", np.int64, ["scored"])
        half = shape.head_dim // 2
        angles = np.outer(
            np.arange(self.context), shape.theta ** (-np.arange(half, dtype=np.float64) / half)
        )
        dtype = np.float16 if self.variant.kv == "float16" else np.float32
        graph.keep("cos", np.cos(angles).astype(dtype))
        graph.keep("sin", np.sin(angles).astype(dtype))
        table = self.rng.standard_normal((shape.vocab, shape.hidden), dtype=np.float32)
        stream = graph.op("Gather", "embed", [graph.keep("embedding", table), "input_ids"])
        branch = ""
        self.steps()
        for i in range(shape.layers):
            branch, stream = self.layer(i, branch, stream)
        if self.variant.rows == "late":
            branch, stream = self.rows(branch), self.rows(stream)
        normed, _ = self.enter("norm", branch, stream)
        variant = self.variant
        self.product(
            "head",
            normed,
            shape.vocab,
            shape.hidden,
            bits=variant.head_bits,
            block=variant.head_block,
            output="logits",
        )
        graph.output("logits", np.float32, ["scored", shape.vocab])
        return graph

    def steps(self) -> None:
        """What all layers share."""
        graph = self.graph
        if self.variant.mlp == "qmoe":
            flat = graph.op("Reshape", "router/Reshape", ["input_ids", self.integers("col", -1, 1)])
            graph.op("Cast", "router/Cast", [flat], outputs=["router"], to=1)
            last = graph.op(
                "Reshape", "router_last/Reshape", ["logits_index", self.integers("col", -1, 1)]
            )
            graph.op("Cast", "router_last/Cast", [last], outputs=["router_last"], to=1)
        if self.variant.rotary == "outside":
            # One row: positions from seqlens_k + 1 - tokens on.
            count = graph.op("Shape", "positions/Shape", ["input_ids"], start=1, end=2)
            total = graph.op("Cast", "positions/Cast", ["seqlens_k"], to=7)
            one = graph.constant("one", np.array([1], np.int64))
            stop = graph.op("Add", "positions/Add", [total, one])
            start = graph.op("Sub", "positions/Sub", [stop, count])
            scalars = [
                graph.op("Squeeze", f"positions/Squeeze_{name}", [name]) for name in (start, stop)
            ]
            span = graph.op(
                "Range",
                "positions/Range",
                [*scalars, graph.constant("step", np.array(1, np.int64))],
            )
            axis = self.integers("axis0", 0)
            graph.op("Unsqueeze", "positions/Unsqueeze", [span, axis], outputs=["positions"])

    def layer(self, i: int, branch: str, stream: str) -> tuple[str, str]:
        """One block."""
        shape = self.shape
        normed, stream = self.enter(f"l{i}.norm1", branch, stream)
        attended = self.attention(i, normed)
        branch = self.product(f"l{i}.o", attended, shape.hidden, shape.heads * shape.head_dim)
        last = i == shape.layers - 1 and self.variant.rows == "gather"
        if last:
            branch, stream = self.rows(branch), self.rows(stream)
        normed, stream = self.enter(f"l{i}.norm2", branch, stream)
        return self.mlp(f"l{i}", normed, last=last), stream

    def attention(self, i: int, normed: str) -> str:
        """Attention on the cache."""
        graph, shape, variant = self.graph, self.shape, self.variant
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if variant.qkv == "packed" and variant.rotary == "inside":
            inputs = [
                self.product(f"l{i}.qkv", normed, queries + 2 * keys, shape.hidden),
                "",
                "",
            ]
        else:
            inputs = [
                self.product(f"l{i}.{name}", normed, rows, shape.hidden)
                for name, rows in (("q", queries), ("k", keys), ("v", keys))
            ]
        if variant.rotary == "outside":
            inputs[:2] = [
                graph.microsoft(
                    "RotaryEmbedding",
                    f"l{i}.rotary_{name}",
                    [name, "positions", "cos", "sin"],
                    num_heads=heads,
                    rotary_embedding_dim=0,
                )
                for name, heads in zip(inputs[:2], (shape.heads, shape.kv_heads), strict=True)
            ]
        inside = variant.rotary == "inside"
        half = variant.kv == "float16"
        if half:
            inputs = [
                graph.op("Cast", f"l{i}.half_{n}", [one], to=10) if one else ""
                for n, one in enumerate(inputs)
            ]
        dtypes: dict[str, type[np.generic]] = {
            "float32": np.float32,
            "float16": np.float16,
            "int4": np.uint8,
        }
        dtype = dtypes.get(variant.kv, np.int8)
        width = shape.head_dim // (2 if variant.kv == "int4" else 1)
        for part in ("key", "value"):
            declared: list[int | str] = ["batch", shape.kv_heads, "capacity", width]
            graph.input(f"past.{i}.{part}", dtype, declared)
            graph.output(f"present.{i}.{part}", dtype, declared)
        scales, options = self.cache_scales()
        out = graph.microsoft(
            "GroupQueryAttention",
            f"l{i}.gqa",
            [
                *inputs,
                f"past.{i}.key",
                f"past.{i}.value",
                "seqlens_k",
                "total_sequence_length",
                *(["cos", "sin"] if inside else ["", ""]),
                *[""] * 3,
                *scales,
                "",
                "",
                "query_lens",
            ],
            outputs=[f"l{i}.gqa/out", f"present.{i}.key", f"present.{i}.value"],
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=int(inside),
            **options,
        )
        return graph.op("Cast", f"l{i}.float", [out], to=1) if half else out

    def cache_scales(self) -> tuple[list[str], dict[str, Any]]:
        """Inputs and attributes of GroupQueryAttention that say how its cache is quantized."""
        shape, variant = self.shape, self.variant
        if variant.kv in ("float32", "float16"):
            return ["", ""], {}
        size = (1,) if variant.kv == "int8_tensor" else (1, shape.kv_heads, 1, shape.head_dim)
        limit = 7 if variant.kv == "int4" else 127
        scale = self.graph.constant("kv_scale", np.full(size, 4 / limit, np.float32))
        kind = "PER_TENSOR" if variant.kv == "int8_tensor" else "PER_CHANNEL"
        return [scale, scale], {
            "k_quant_type": kind,
            "v_quant_type": kind,
            "kv_cache_bit_width": 4 if variant.kv == "int4" else 8,
        }

    def mlp(self, path: str, normed: str, *, last: bool) -> str:
        """``down(silu(gate(x)) * up(x))``."""
        graph, shape, variant = self.graph, self.shape, self.variant
        hidden, inter = shape.hidden, shape.intermediate
        if variant.mlp == "qmoe":
            return self.qmoe(path, normed, "router_last" if last else "router")
        if variant.mlp == "two":
            gate, up = (
                self.product(f"{path}.{name}", normed, inter, hidden) for name in ("g", "u")
            )
        else:
            both = self.product(f"{path}.gate_up", normed, 2 * inter, hidden)
            gate, up = f"{path}.gate", f"{path}.up"
            graph.op("Split", f"{path}.split", [both], outputs=[gate, up], axis=-1, num_outputs=2)
        if variant.mlp == "norm":
            # A norm whose epsilon swamps the mean square is a constant factor, which gain undoes.
            gain = graph.constant("gain", np.full(inter, 1e10, np.float32))
            active = graph.microsoft(
                "GatedRMSNorm", f"{path}.act", [up, gain, gate], activation="silu", epsilon=1e20
            )
        else:
            curved = graph.microsoft("QuickGelu", f"{path}.act", [gate], alpha=1.0)
            active = graph.op("Mul", f"{path}.mul", [curved, up])
        return self.product(f"{path}.down", active, hidden, inter)

    def qmoe(self, path: str, normed: str, router: str) -> str:
        """The whole MLP as one expert."""
        graph, shape, variant = self.graph, self.shape, self.variant
        hidden, inter = shape.hidden, shape.intermediate
        wide = self.weight(f"{path}.fc1", 2 * inter, hidden, variant.bits, variant.block, flat=True)
        down = self.weight(f"{path}.fc2", hidden, inter, variant.bits, variant.block, flat=True)
        return graph.microsoft(
            "QMoE",
            f"{path}.qmoe",
            [normed, router, *wide, "", *down],
            k=1,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
            expert_weight_bits=variant.bits,
            block_size=variant.block,
            accuracy_level=variant.level,
        )

    def enter(self, name: str, branch: str, stream: str) -> tuple[str, str]:
        """Add a branch and normalize the sum."""
        graph = self.graph
        gain = graph.constant("ones", np.ones(self.shape.hidden, np.float32))
        if branch and self.variant.norm == "skip":
            graph.microsoft(
                "SkipSimplifiedLayerNormalization",
                name,
                [branch, stream, gain],
                outputs=[f"{name}/out", "", "", f"{name}/sum"],
                epsilon=1e-5,
            )
            return f"{name}/out", f"{name}/sum"
        total = graph.op("Add", f"{name}/add", [branch, stream]) if branch else stream
        normed = graph.op(
            "SimplifiedLayerNormalization", name, [total, gain], axis=-1, epsilon=1e-5, stash_type=1
        )
        return normed, total

    def rows(self, source: str) -> str:
        """Rows ``logits_index`` of [batch, tokens, hidden]."""
        shape = self.integers("flat", -1, self.shape.hidden)
        flat = self.graph.op("Reshape", f"{source}/flat", [source, shape])
        return self.graph.op("Gather", f"{source}/rows", [flat, "logits_index"], axis=0)

    def integers(self, name: str, *values: int) -> str:
        """A constant."""
        return self.graph.constant(name, np.array(values, np.int64))

    def product(
        self,
        name: str,
        source: str,
        rows: int,
        columns: int,
        *,
        bits: int | None = None,
        block: int | None = None,
        output: str = "",
    ) -> str:
        """A product with a stored weight."""
        variant = self.variant
        bits, block = bits or variant.bits, block or variant.block
        weight = self.weight(name, rows, columns, bits, block)
        if variant.zero == "packed":
            packed = -(-(-(-columns // block) * bits) // 8)
            weight.append(self.graph.keep(f"{name}.zp", np.full((rows, packed), 0x88, np.uint8)))
        return self.graph.microsoft(
            "MatMulNBits",
            name,
            [source, *weight],
            outputs=[output] if output else [],
            N=rows,
            K=columns,
            bits=bits,
            block_size=block,
            accuracy_level=variant.level,
        )

    def weight(
        self, name: str, rows: int, columns: int, bits: int, block: int, *, flat: bool = False
    ) -> list[str]:
        """Integers and scales; ``flat``: as the only expert of QMoE."""
        blocks = -(-columns // block)
        shape = (1, rows, columns * bits // 8) if flat else (rows, blocks, block * bits // 8)
        integers = self.rng.integers(0, 256, shape, np.uint8)
        scale = np.float32(columns**-0.5 / 2 ** (bits - 2))
        scales = np.full((1, rows, blocks) if flat else (rows, blocks), scale, np.float32)
        return [
            self.graph.keep(f"{name}.q", integers),
            self.graph.keep(f"{name}.scales", scales),
        ]


def save(graph: GraphRecorder, folder: Path) -> Path:
    """Write a graph and its weights."""
    offsets: dict[str, int] = {}
    with (folder / "model.onnx.data").open("wb") as file:
        for group in graph.deferred:
            for info, rows in zip(group.tensors, group.compute(), strict=True):
                file.write(b"\0" * (-file.tell() % 4096))
                offsets[info.name] = file.tell()
                for piece in rows:
                    file.write(piece.tobytes())
    path = folder / "model.onnx"
    path.write_bytes(graph.model("model.onnx.data", offsets, "0").SerializeToString())
    return path


def parse_variant(text: str) -> Variant:
    """``mlp=qmoe,block=64`` as a variant."""
    kinds: dict[str, Any] = {one.name: type(one.default) for one in dataclasses.fields(Variant)}
    options: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, value = pair.split("=")
        options[name] = kinds[name](value)
    return Variant(**options)
