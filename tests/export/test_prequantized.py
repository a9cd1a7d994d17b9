"""Checkpoints that GPTQ or AWQ quantized: no integer, scale or zero point of theirs is changed.

The writer and the dequantizer here follow the formats' definitions and share no code with the
reader: AutoGPTQ's ``qlinear_cuda.py`` (``pack`` and ``forward``), AutoAWQ's ``gemm.py``
(``from_linear``) and ``packing_utils.py`` (``dequantize_gemm``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from edge_llm import LLM
from edge_llm.bundle import Bundle
from edge_llm.errors import (
    ArgumentError,
    CheckpointError,
    ClosedError,
    EdgeLLMError,
    UnsupportedModelError,
)
from edge_llm.manifest import TensorQuantization
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import create_session
from edge_llm_export import export_model
from edge_llm_export.checkpoint.packed import (
    PackedTensor,
    PackedWeights,
    open_weights,
    packed_tensor,
)
from edge_llm_export.checkpoint.prequantized import Packing, read_packing
from edge_llm_export.graph.linear import project
from edge_llm_export.graph.matrices import (
    CheckpointMatrix,
    MappedColumns,
    MappedRows,
    Matrix,
    Stacked,
    head_map,
)
from edge_llm_export.graph.recorder import GraphRecorder
from edge_llm_export.quantize.rtn import dequantize_blocks, quantize_rows
from edge_llm_export.quantize.storage import Storage, quantized_tensors
from edge_llm_export.writer import BundleWriter

Floats = NDArray[np.float32]
Tensors = dict[str, NDArray[Any]]

# Activations are rounded to int8 per block: 1 to 3 % of the logits' range in these tiny models.
ROUNDING = 0.05

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Format:
    """How a test's checkpoint is quantized."""

    method: str = "gptq"
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    version: str = "gptq"
    act_order: bool = False

    def config(self) -> dict[str, Any]:
        common = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            return common | {"version": "gemm", "zero_point": not self.symmetric}
        return common | {
            "sym": self.symmetric,
            "desc_act": self.act_order,
            "checkpoint_format": self.version,
        }

    def packing(self) -> Packing:
        packing = read_packing({"quantization_config": self.config()})
        assert packing is not None
        return packing


@dataclass(frozen=True)
class Layer:
    """One quantized linear layer: ``weight[o, i] = (q[i, o] - zero[g[i], o]) * scale[g[i], o]``."""

    form: Format
    q: NDArray[np.int64]
    zero: NDArray[np.int64]
    scale: NDArray[np.float16]
    g: NDArray[np.int64]

    @classmethod
    def random(
        cls, form: Format, rows: int, columns: int, seed: Any, order: Any = 0, spread: int = 256
    ) -> Layer:
        """Integers about zero points that are at most ``spread`` off the middle.

        ``order`` seeds the order of the columns, which layers with one input share.
        """
        rng, middle = np.random.default_rng(seed), 2 ** (form.bits - 1)
        group = columns if form.group == -1 else form.group
        g = np.arange(columns) // group
        if form.act_order:
            np.random.default_rng(order).shuffle(g)
        groups = int(g.max()) + 1
        # Format 1 stores zero - 1, so that it has no zero point of 0.
        lowest = int(form.method == "gptq" and form.version == "gptq")
        highest = 2**form.bits - 1
        zero = rng.integers(
            max(lowest, middle - spread),
            min(highest, middle + spread),
            (groups, rows),
            endpoint=True,
        )
        zero = np.full_like(zero, middle) if form.symmetric else zero
        q = np.rint(zero[g] + rng.normal(0, middle / 2, (columns, rows))).astype(np.int64)
        return cls(
            form,
            np.clip(q, 0, highest),
            zero,
            (rng.uniform(0.5, 1, (groups, rows)) * 0.3 / middle).astype(np.float16),
            g,
        )

    @property
    def weight(self) -> Floats:
        """The floats that the layer stands for, [rows, columns]."""
        signed = (self.q - self.zero[self.g]).astype(np.float32)
        weight: Floats = (signed * self.scale[self.g].astype(np.float32)).T
        return weight

    def tensors(self, name: str) -> Tensors:
        """The checkpoint's tensors."""
        bits = self.form.bits
        if self.form.method == "awq":
            qweight = words(self.q, 4, AWQ_ORDER)
            qzeros = words(self.zero, 4, AWQ_ORDER)
        else:
            offset = 1 if self.form.version == "gptq" else 0
            qweight = words(self.q.T, bits).T
            qzeros = words(self.zero - offset, bits)
        tensors: Tensors = {"qweight": qweight, "qzeros": qzeros, "scales": self.scale}
        if self.form.method == "gptq":
            tensors["g_idx"] = self.g.astype(np.int32)
        return {f"{name}.{part}": np.ascontiguousarray(one) for part, one in tensors.items()}


def words(
    fields: NDArray[np.int64], bits: int, order: tuple[int, ...] | None = None
) -> NDArray[np.int32]:
    """Fields [n, m] as words [n, m * bits / 32], the first of ``order`` in the lowest bits."""
    per = 32 // bits
    packed = np.zeros((fields.shape[0], fields.shape[1] // per), np.uint64)
    for word in range(packed.shape[1]):
        for k, field in enumerate(order or range(per)):
            packed[:, word] |= fields[:, word * per + field].astype(np.uint64) << np.uint64(
                bits * k
            )
    return packed.astype(np.uint32).view(np.int32)


def dequantized(
    packed: NDArray[np.uint8],
    scales: Floats,
    zero_points: NDArray[np.uint8] | None,
    *,
    bits: int,
    columns: int,
) -> Floats:
    """What MatMulNBits makes of its inputs, by the operator's definition."""
    rows, blocks, size = packed.shape
    per = 8 // bits
    mask = 2**bits - 1

    def field(values: NDArray[np.uint8], i: int) -> NDArray[np.float32]:
        one: Floats = ((values[..., i // per] >> (i % per * bits)) & mask).astype(np.float32)
        return one

    out = np.empty((rows, blocks, size * per), np.float32)
    for b in range(blocks):
        zero = np.float32(2 ** (bits - 1)) if zero_points is None else field(zero_points, b)
        for i in range(size * per):
            out[:, b, i] = (field(packed[:, b], i) - zero) * scales[:, b]
    flat = out.reshape(rows, -1)
    assert not flat[:, columns:].any(), "what fills the last block up stands for zeros"
    return flat[:, :columns]


def stored(matrix: PackedTensor) -> Floats:
    """The floats that a layer's tensors in the graph stand for, in the checkpoint's columns."""
    tensors = [rows[0] for rows in quantized_tensors(matrix)]
    assert len(tensors) == (2 if matrix.storage.symmetric else 3)
    zero_points = None if matrix.storage.symmetric else tensors[2]
    columns = matrix.shape[1]
    left = dequantized(
        tensors[0], tensors[1], zero_points, bits=matrix.storage.bits, columns=columns
    )
    out = np.empty_like(left)
    out[:, np.arange(columns) if matrix.order is None else matrix.order] = left
    return out


def open_layers(folder: Path, form: Format, layers: dict[str, Layer]) -> PackedWeights:
    tensors: Tensors = {}
    for name, layer in layers.items():
        tensors |= layer.tensors(name)
    save_file(tensors, folder / "model.safetensors")
    weights = open_weights(folder, form.packing(), dequantize=True)
    assert isinstance(weights, PackedWeights)
    return weights


@st.composite
def formats(draw: st.DrawFn) -> Format:
    group = draw(st.sampled_from([-1, 16, 32, 48, 64, 128, 256]))
    symmetric = draw(st.booleans())
    if draw(st.booleans()):
        return Format("awq", 4, group, symmetric)
    return Format(
        "gptq",
        draw(st.sampled_from([4, 8])),
        group,
        symmetric,
        draw(st.sampled_from(["gptq", "gptq_v2"])),
        draw(st.booleans()),
    )


@given(
    form=formats(),
    rows=st.integers(1, 3),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_every_weight_is_what_the_checkpoint_says(
    form: Format,
    rows: int,
    columns: int,
    seed: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    layer = Layer.random(form, rows * 8, columns * 8, seed, order=seed)
    with open_layers(tmp_path_factory.mktemp("layer"), form, {"x": layer}) as weights:
        assert weights.names == ("x.weight",)
        assert weights.shape("x.weight") == layer.weight.shape
        matrix = weights.packed("x.weight")
        assert matrix is not None
        assert matrix.storage.symmetric == bool((layer.zero == 2 ** (form.bits - 1)).all())
        np.testing.assert_array_equal(stored(matrix), layer.weight, strict=True)
        start = data.draw(st.integers(0, rows * 8 - 1))
        stop = data.draw(st.integers(start + 1, rows * 8))
        read = weights.read("x.weight", start, stop)
        np.testing.assert_array_equal(read, layer.weight[start:stop], strict=True)


def run(folder: Path, matrix: Matrix, x: Floats, bias: Floats | None) -> Floats:
    """``project`` as ONNX Runtime computes it."""
    graph = GraphRecorder("test")
    graph.input("x", np.float32, ["tokens", x.shape[1]])
    output = project(graph, "/model/layer", "x", matrix, Storage(4, 32), bias)
    graph.op("Identity", "/y", [output], outputs=["y"])
    graph.output("y", np.float32, ["tokens", matrix.shape[0]])
    BundleWriter(folder).write_graph(graph, producer="0", on_bytes=lambda size: None)
    session = create_session(folder / "model.onnx", threads=1, minimum="1.32")
    product: Floats = session.run(["y"], {"x": x})[0]
    return product


PADDED = head_map(4, 8, 16)
KINDS: dict[str, Callable[[dict[str, Matrix]], Matrix]] = {
    "one": lambda m: m["a"],
    "stacked": lambda m: Stacked([m["a"], m["b"]]),
    "padded rows": lambda m: Stacked([MappedRows(m["a"], PADDED), m["b"]]),
    "padded columns": lambda m: MappedColumns(m["a"], head_map(24, 8, 16)),
    "rows of a stack": lambda m: MappedRows(Stacked([m["a"], m["b"]]), np.arange(20, 50)),
    "another order": lambda m: Stacked([m["a"], m["b"], m["c"]]),
    "floats between": lambda m: Stacked([m["a"], m["float"], m["b"]]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form",
    [
        Format(group=128),
        Format(symmetric=False, group=64),
        Format(bits=8, symmetric=False, act_order=True),
        Format(group=-1, act_order=True),
        Format(group=48, symmetric=False, version="gptq_v2", act_order=True),
        Format("awq", symmetric=False, group=16),
    ],
    ids=str,
)
def test_onnxruntime_multiplies_by_the_checkpoints_weights(
    form: Format, kind: str, tmp_path: Path
) -> None:
    layers = {
        "a": Layer.random(form, 32, 192, 1),
        "b": Layer.random(form, 40, 192, 2),
        "c": Layer.random(form, 8, 192, 3, order=1),
    }
    with open_layers(tmp_path, form, layers) as weights:
        sources: dict[str, Matrix] = {
            name: CheckpointMatrix(weights, f"{name}.weight") for name in layers
        }
        sources["float"] = floats = ZerosAndOnes(16, 192)
        matrix = KINDS[kind](sources)
        references = {name: Given(layer.weight) for name, layer in layers.items()}
        plain = KINDS[kind]({**references, "float": floats})
        expected = plain.read(0, plain.shape[0]).astype(np.float64)
        np.testing.assert_array_equal(matrix.read(0, matrix.shape[0]), expected)
        # One magnitude throughout, in whatever order: rounding it to int8 loses nothing.
        x = np.random.default_rng(4).choice(np.array([-127, 127], np.float32), (3, matrix.shape[1]))
        bias = np.arange(matrix.shape[0], dtype=np.float32)
        got = run(tmp_path, matrix, x, bias)
    bound = 2e-6 * (np.abs(x).astype(np.float64) @ np.abs(expected).T + bias)
    assert (np.abs(got - (x @ expected.T + bias)) <= bound).all()


@dataclass(frozen=True)
class Given:
    """A float matrix in memory."""

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def read(self, start: int, stop: int) -> Floats:
        return self.values[start:stop]


class ZerosAndOnes(Given):
    """Floats that 4 bits store exactly, minus ones."""

    def __init__(self, rows: int, columns: int) -> None:
        rng = np.random.default_rng(5)
        super().__init__(rng.choice(np.array([-1, 0], np.float32), (rows, columns)))


def test_what_cannot_be_stored_together_is_refused(tmp_path: Path) -> None:
    form = Format()
    with open_layers(tmp_path, form, {"a": Layer.random(form, 32, 64, 1)}) as weights:
        mixed = Stacked([CheckpointMatrix(weights, "a.weight"), ZerosAndOnes(8, 64)])
        with pytest.raises(UnsupportedModelError, match="quantized in part only"):
            project(
                GraphRecorder("test"),
                "/x",
                "x",
                MappedRows(mixed, np.arange(40)),
                Storage(4, 32),
            )


def test_layers_are_read_like_floats(tmp_path: Path) -> None:
    form = Format()
    layer = Layer.random(form, 8, 32, 1)
    with open_layers(tmp_path, form, {"a": layer}) as weights:
        assert weights.read("a.weight", 3, 3).shape == (0, 32)
        np.testing.assert_array_equal(weights.read("a.weight", 6), layer.weight[6:])
        with pytest.raises(ArgumentError, match=r"stop <= 8 \(rows of 'a\.weight'\)"):
            weights.read("a.weight", 0, 9)
        with pytest.raises(CheckpointError, match=r"no tensor 'b\.weight'"):
            weights.read("b.weight")
    with pytest.raises(ClosedError, match=r"read after close"):
        weights.read("a.weight")


def test_integers_are_never_rounded_again(tmp_path: Path) -> None:
    """A graph that would need them in another form gets an error, not other weights."""
    form = Format()
    save_file(Layer.random(form, 8, 32, 1).tensors("a"), tmp_path / "model.safetensors")
    with (
        open_weights(tmp_path, form.packing(), dequantize=False) as weights,
        pytest.raises(UnsupportedModelError, match=r"'a\.weight' is quantized already"),
    ):
        weights.read("a.weight")


MODELS: dict[str, tuple[Format, dict[str, Any]]] = {
    "gptq": (Format(group=128), {}),
    "gptq, zero points": (Format(group=64, symmetric=False), {"num_key_value_heads": 2}),
    "gptq, act-order": (Format(act_order=True), {"attention_bias": True, "mlp_bias": True}),
    "gptq, 8 bits, a scale per row": (
        Format(bits=8, group=-1, symmetric=False, version="gptq_v2"),
        {"tie_word_embeddings": True},
    ),
    "gptq, padded heads": (
        Format(group=32, symmetric=False, act_order=True),
        {"hidden_size": 64, "head_dim": 8, "attention_bias": True},
    ),
    "awq": (Format("awq", group=64, symmetric=False), {}),
    "awq, symmetric, padded heads": (Format("awq"), {"hidden_size": 64, "head_dim": 8}),
}


def quantize_checkpoint(
    folder: Path,
    form: Format,
    *,
    head: bool = False,
    floats: tuple[str, ...] = (),
    transposed: bool = False,
) -> dict[str, Layer]:
    """Put random integers in the place of a checkpoint's layers; gives them by tensor name."""
    tensors = load_file(folder / "model.safetensors")
    quantized = [
        name
        for name in sorted(tensors)
        if re.search(r"(layers|h)\.\d+\.", name) and tensors[name].ndim == 2
    ]
    layers: dict[str, Layer] = {}
    for name in [*quantized, *["lm_head.weight"] * head]:
        module = name.removesuffix(".weight")
        if module in floats:
            continue
        rows, columns = tensors.pop(name).shape[:: -1 if transposed else 1]
        order = input_of(module)
        layers[name] = Layer.random(form, rows, columns, len(layers), order, spread=2)
        tensors |= layers[name].tensors(module)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = form.config()
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def input_of(module: str) -> list[int]:
    """A seed that layers with the same input share: q, k and v, and gate and up."""
    block, _, name = module.rpartition(".")
    return [*block.encode(), {"o_proj": 1, "down_proj": 2}.get(name, 0)]


def make(
    make_llama: Callable[..., Any], folder: Path, form: Format, config: dict[str, Any], **how: Any
) -> tuple[Any, dict[str, Layer]]:
    """A quantized checkpoint, and transformers' model with the floats that it stands for."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    model = make_llama(folder, **(sizes | config))
    layers = quantize_checkpoint(folder, form, **how)
    fill(model, layers)
    return model, layers


def fill(model: Any, layers: dict[str, Layer], *, transposed: bool = False) -> None:
    """Put the floats that layers stand for in a model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in layers:
                weight = layers[name].weight
                parameter.copy_(torch.from_numpy((weight.T if transposed else weight).copy()))


def round_floats(model: Any, layers: dict[str, Layer], form: Format) -> None:
    """Round the matrices that a checkpoint has as floats as every export does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name not in layers and "wpe" not in name:
                rounded = quantize_rows(parameter.numpy(), bits=form.bits, block=32)
                left = dequantize_blocks(*rounded, bits=form.bits, columns=parameter.shape[1])
                parameter.copy_(torch.from_numpy(left))


PROMPT = np.random.default_rng(1).integers(2, 400, 40)


def logits(folder: Path) -> Floats:
    bundle = Bundle.open(folder, verify=True)
    manifest = bundle.manifest
    session = create_session(
        bundle.file(manifest.decoder.graph), threads=1, minimum=manifest.min_onnxruntime
    )
    decoder = open_decoder(session, manifest, capacity=64)
    return decoder.step(PROMPT, scored=len(PROMPT)).copy()


def reference(model: Any) -> Floats:
    with torch.no_grad():
        result: Floats = model(torch.tensor(PROMPT[None])).logits[0].numpy()
    return result


def relative_error(got: Floats, expected: Floats) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


def graph_weights(folder: Path) -> dict[str, tuple[Floats, NDArray[np.int64] | None]]:
    """Every MatMulNBits's weight by the node's name, and the order of its columns."""
    model = onnx.load(folder / "model.onnx")
    constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    orders = {
        node.output[0]: constants[node.input[1]].astype(np.int64)
        for node in model.graph.node
        if node.op_type == "Gather" and node.input[1].endswith(".order")
    }
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        values = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        zero_points = constants[node.input[3]] if len(node.input) > 3 and node.input[3] else None
        found[node.name] = (
            dequantized(
                constants[node.input[1]],
                constants[node.input[2]],
                zero_points,
                bits=values["bits"],
                columns=values["K"],
            ),
            orders.get(node.input[0]),
        )
    return found


@pytest.mark.parametrize("variant", MODELS)
def test_a_quantized_model_keeps_its_weights(
    variant: str, make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    form, config = MODELS[variant]
    model, layers = make(make_llama, tmp_path / "checkpoint", form, config)
    export_model(tmp_path / "checkpoint", tmp_path / "fp32", quantize="fp32")
    assert relative_error(logits(tmp_path / "fp32"), reference(model)) < 1e-4

    manifest = export_model(tmp_path / "checkpoint", tmp_path / "bundle")
    assert manifest == Bundle.open(tmp_path / "bundle", verify=True).manifest
    quantization = manifest.quantization
    block = 128 if form.group == -1 else form.group
    assert (quantization.method, quantization.bits) == (form.method, form.bits)
    assert quantization.block == block
    rest = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (
        not model.config.tie_word_embeddings
    )
    assert quantization.exceptions == (
        {} if block == 32 else dict.fromkeys(rest, TensorQuantization(bits=form.bits, block=32))
    )

    round_floats(model, layers, form)
    assert relative_error(logits(tmp_path / "bundle"), reference(model)) < ROUNDING
    check_graph(tmp_path / "bundle", layers, model.config)
    with LLM(tmp_path / "bundle") as llm:
        assert len(llm.generate(PROMPT.tolist(), max_tokens=8, min_tokens=8).tokens) == 8


def check_graph(folder: Path, layers: dict[str, Layer], config: Any) -> None:
    """Compare every layer's weight in the graph with the checkpoint's, bit by bit."""
    padded = -(-config.head_dim // 16) * 16
    queries = head_map(config.num_attention_heads, config.head_dim, padded)
    keys = head_map(config.num_key_value_heads, config.head_dim, padded)
    maps = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    stacks = {
        "self_attn/qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn/o_proj": ["self_attn.o_proj"],
        "mlp/gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp/down_proj": ["mlp.down_proj"],
    }
    found = graph_weights(folder)
    for i in range(config.num_hidden_layers):
        for path, names in stacks.items():
            node = f"/model/layers.{i}/{path.replace('self_attn', 'attn')}/MatMulNBits"
            weight, order = found.pop(node)
            expected = []
            for name in names:
                one = layers[f"model.layers.{i}.{name}.weight"].weight
                index = maps.get(name.rpartition(".")[2])
                expected.append(one if index is None else one[index] * (index >= 0)[:, None])
            wide = np.concatenate(expected)
            if path.endswith("o_proj"):
                wide = wide[:, queries] * (queries >= 0)
            np.testing.assert_array_equal(wide if order is None else wide[:, order], weight)
    assert found.keys() == {"/lm_head/MatMulNBits"}


# Fused matrices, heads whose rows are interleaved or turned in part, and layers stored transposed.
FAMILIES: dict[str, tuple[Format, dict[str, Any]]] = {
    "phi3": (Format(symmetric=False, act_order=True), {"intermediate_size": 96}),
    "gpt_neox": (Format("awq", symmetric=False), {"intermediate_size": 96, "hidden_size": 128}),
    "gpt2": (Format(group=64, symmetric=False), {"n_embd": 64, "n_head": 8}),
    "qwen3": (Format(group=64, act_order=True), {"intermediate_size": 96, "head_dim": 24}),
    "gemma2": (Format(bits=8), {"intermediate_size": 96, "head_dim": 16}),
    "granite": (Format("awq", group=-1), {"intermediate_size": 96, "residual_multiplier": 0.3}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_layer_is_kept(
    family: str, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    form, config = FAMILIES[family]
    folder = tmp_path / "checkpoint"
    model = make_checkpoint(folder, family, num_hidden_layers=2, **config)
    layers = quantize_checkpoint(folder, form, transposed=family == "gpt2")
    fill(model, layers, transposed=family == "gpt2")
    assert len(layers) == 2 * {"phi3": 4, "gpt_neox": 4, "gpt2": 4}.get(family, 7)
    export_model(folder, tmp_path / "fp32", quantize="fp32")
    assert relative_error(logits(tmp_path / "fp32"), reference(model)) < 1e-4
    manifest = export_model(folder, tmp_path / "bundle")
    tables = {name for name, one in manifest.quantization.exceptions.items() if one.bits == 32}
    assert tables == ({"transformer.wpe.weight"} if family == "gpt2" else set())
    # Whatever the rows' and the columns' order is, and however many are zeros.
    expected = sorted_weights(one.weight for one in layers.values())
    found = graph_weights(tmp_path / "bundle").items()
    got = sorted_weights(one for name, (one, _) in found if not name.startswith("/lm_head"))
    np.testing.assert_array_equal(got, expected)
    round_floats(model, layers, form)
    assert relative_error(logits(tmp_path / "bundle"), reference(model)) < ROUNDING


def sorted_weights(matrices: Iterable[Floats]) -> Floats:
    """All weights but zeros."""
    flat: Floats = np.concatenate([one.ravel() for one in matrices])
    return np.sort(flat[flat != 0])


def test_a_quantized_head_and_layers_left_as_floats(
    make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    form = Format(group=64, symmetric=False, act_order=True)
    floats = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    model, layers = make(make_llama, tmp_path / "checkpoint", form, {}, head=True, floats=floats)
    assert "lm_head.weight" in layers
    export_model(tmp_path / "checkpoint", tmp_path / "fp32", quantize="fp32")
    assert relative_error(logits(tmp_path / "fp32"), reference(model)) < 1e-4

    manifest = export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize="int4", block=64)
    assert manifest.quantization.exceptions == {}
    manifest = export_model(tmp_path / "checkpoint", tmp_path / "bundle", overwrite=True)
    assert set(manifest.quantization.exceptions) == {
        "model.embed_tokens.weight",
        *(f"{name}.weight" for name in floats),
    }
    found = graph_weights(tmp_path / "bundle")
    weight, order = found["/lm_head/MatMulNBits"]
    np.testing.assert_array_equal(weight, layers["lm_head.weight"].weight[:, order])
    # The keys are floats between the integers of queries and values, so there are three products.
    for i, name in ((0, "q_proj"), (2, "v_proj")):
        weight, order = found[f"/model/layers.0/attn/qkv_proj/{i}/MatMulNBits"]
        expected = layers[f"model.layers.0.self_attn.{name}.weight"].weight
        np.testing.assert_array_equal(weight, expected[:, order])
    round_floats(model, layers, form)
    assert relative_error(logits(tmp_path / "bundle"), reference(model)) < ROUNDING


@pytest.mark.parametrize(
    "form",
    [Format(), Format(group=64, symmetric=False), Format("awq", symmetric=False)],
    ids=str,
)
def test_onnxruntime_genais_builder_makes_the_same_bytes(
    form: Format, make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """A peer that reads the same checkpoint. (It leaves act-order to an input of MatMulNBits.)"""
    peer = pytest.importorskip("onnxruntime_genai.models.loaders.quant_model").QuantModel
    make(make_llama, tmp_path, form, {"num_hidden_layers": 1})
    model = peer.from_pretrained(
        form.method,
        input_path=str(tmp_path),
        quant_attrs={"config": form.config(), "use_g_idx": False},
        q_size=128,
        kv_size=64,
        intermediate_size=192,
        num_layers=1,
    )
    with open_weights(tmp_path, form.packing(), dequantize=False) as weights:
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            matrix = packed_tensor(weights, f"model.layers.0.{name}.weight")
            theirs = model.layers[0]
            for part in name.split("."):
                theirs = getattr(theirs, part)
            assert matrix is not None
            parts = ("qweight", "scales", "qzeros")
            for part, rows in zip(parts, quantized_tensors(matrix), strict=False):
                expected = getattr(theirs, part).numpy().astype(rows[0].dtype)
                np.testing.assert_array_equal(rows[0].ravel(), expected.ravel())


@pytest.fixture(scope="module")
def quantized_llama(
    make_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    make(make_llama, folder, Format(), {"hidden_size": 64, "num_hidden_layers": 1})
    return folder


@pytest.fixture
def checkpoint(quantized_llama: Path, tmp_path: Path) -> Path:
    """A copy whose files may be replaced."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in quantized_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, r"quantize must be int4 or fp32, got 'int8'\. The checkpoint is "),
        ({"block": 128}, r"block must be 32 or left out, got 128\. .*\(gptq, 4 bits, groups of 32"),
    ],
)
def test_options_that_contradict_the_checkpoint(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        export_model(checkpoint, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def test_biases_of_zeros_that_old_quantizers_wrote_are_left_out(
    checkpoint: Path, tmp_path: Path
) -> None:
    plain = export_model(checkpoint, tmp_path / "plain")
    name = "model.layers.0.mlp.up_proj.bias"
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {name: np.zeros(192, np.float16)}, checkpoint / "model.safetensors")
    assert export_model(checkpoint, tmp_path / "zeros").files == plain.files
    save_file(tensors | {name: np.ones(192, np.float16)}, checkpoint / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"does not have, such as 'model\.layers\.0\.mlp\.up_proj"
    ):
        export_model(checkpoint, tmp_path / "ones")


Q = "model.layers.0.self_attn.q_proj"
I32 = np.int32
DAMAGES: dict[str, tuple[Callable[[Tensors], Any], type[EdgeLLMError], str]] = {
    "no g_idx": (lambda t: t.pop(f"{Q}.g_idx"), CheckpointError, f"no tensor '{Q}.g_idx'"),
    "no qzeros": (lambda t: t.pop(f"{Q}.qzeros"), CheckpointError, f"no tensor '{Q}.qzeros'"),
    "no scales": (lambda t: t.pop(f"{Q}.scales"), CheckpointError, f"no tensor '{Q}.scales'"),
    "no qweight": (lambda t: t.pop(f"{Q}.qweight"), CheckpointError, f"no tensor '{Q}.weight'"),
    "a flat qweight": (
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].ravel()}),
        CheckpointError,
        r"q_proj.qweight has shape \[512\]; gptq, 4 bits, groups of 32 asks for \[512, 64\]",
    ),
    "a scalar": (
        lambda t: t.update({f"{Q}.scales": np.zeros((), np.float16)}),
        CheckpointError,
        r"q_proj.qweight has shape \[8, 64\]; .* asks for \[8, 0\]",
    ),
    "no rows": (
        lambda t: t.update(
            {f"{Q}.{part}": t[f"{Q}.{part}"][:, :0] for part in ("qweight", "scales", "qzeros")}
        ),
        CheckpointError,
        r"q_proj.qweight has shape \[8, 0\]",
    ),
    "no columns": (
        lambda t: t.update(
            {
                f"{Q}.{part}": t[f"{Q}.{part}"][:0]
                for part in ("qweight", "scales", "qzeros", "g_idx")
            }
        ),
        CheckpointError,
        r"q_proj.qweight has shape \[0, 64\]",
    ),
    "rows that fill no word": (
        lambda t: t.update(
            {f"{Q}.{part}": t[f"{Q}.{part}"][:, :60] for part in ("qweight", "scales")}
        ),
        CheckpointError,
        r"outputs in multiples of 8",
    ),
    "another model's layer": (
        lambda t: t.update(
            {f"{Q}.{part}": t[f"{Q}.{part}"][:, :32] for part in ("qweight", "scales")}
            | {f"{Q}.qzeros": t[f"{Q}.qzeros"][:, :4]}
        ),
        CheckpointError,
        r"'model.layers.0.self_attn.q_proj.weight' has shape \[32, 64\]; config.json asks for",
    ),
    "a group too few": (
        lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:1]}),
        CheckpointError,
        r"q_proj.scales has shape \[1, 64\]; .* asks for \[2, 64\]",
    ),
    "zero points of too few groups": (
        lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:1]}),
        CheckpointError,
        r"q_proj.qzeros has shape \[1, 8\]; .* asks for \[2, 8\]",
    ),
    "a short g_idx": (
        lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"][:-1]}),
        CheckpointError,
        r"q_proj.g_idx has shape \[63\]; .* asks for \[64\]",
    ),
    "words as floats": (
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].view(np.float32)}),
        CheckpointError,
        "q_proj.qweight is stored as F32 and must be I32",
    ),
    "scales as integers": (
        lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].astype(I32)}),
        CheckpointError,
        "q_proj.scales is stored as I32 and must be F16 or BF16 or F32",
    ),
    "floats beside integers": (
        lambda t: t.update({f"{Q}.weight": np.zeros((64, 64), np.float32)}),
        CheckpointError,
        "holds both model.layers.0.self_attn.q_proj.weight and",
    ),
    "other zero points": (
        lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"] - 1}),
        CheckpointError,
        "says that the quantization is symmetric .*q_proj.qzeros has zero points other than 8",
    ),
    "a zero point of -1": (
        lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"] | I32(15)}),
        UnsupportedModelError,
        "q_proj.qzeros holds a zero point of 0, .*gptq_v2",
    ),
    "groups of unequal size": (
        lambda t: t.update({f"{Q}.g_idx": np.zeros(64, I32)}),
        UnsupportedModelError,
        r"q_proj.g_idx \(desc_act\) does not give every group of columns the 32",
    ),
    "groups that are not there": (
        lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"] + I32(1)}),
        UnsupportedModelError,
        r"q_proj.g_idx \(desc_act\)",
    ),
    "nothing quantized": (
        lambda t: [t.pop(name) for name in list(t) if name.endswith(".qweight")],
        CheckpointError,
        r"says that layers are quantized \(gptq, 4 bits, groups of 32\), but none is",
    ),
    "a scale that is not a number": (
        lambda t: t.update({f"{Q}.scales": np.full_like(t[f"{Q}.scales"], np.nan)}),
        CheckpointError,
        "q_proj.scales' holds weights that are infinite or not a number",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_layers_are_refused(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    change, kind, message = DAMAGES[damage]
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(
        {name: np.asarray(one, order="C") for name, one in tensors.items()},
        checkpoint / "model.safetensors",
    )
    written: list[str] = []
    with pytest.raises(kind, match=message):
        export_model(
            checkpoint,
            tmp_path / "bundle",
            progress=lambda phase, done, total: written.append(phase),
        )
    assert written == ["reading"] or damage == "a scale that is not a number"
    assert not (tmp_path / "bundle").exists()


def edit_config(checkpoint: Path, **changes: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_integers_that_config_json_does_not_mention(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"\.qweight'\), but its config.json has no quantiz"):
        export_model(checkpoint, tmp_path / "bundle")


def test_a_quantized_head_that_is_said_to_be_the_embedding(
    checkpoint: Path, tmp_path: Path
) -> None:
    edit_config(checkpoint, tie_word_embeddings=True)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["lm_head.weight"]
    head = Layer.random(Format(), 400, 64, 1).tensors("lm_head")
    save_file(tensors | head, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"head is the embedding, but 'lm_head\.weight' is"):
        export_model(checkpoint, tmp_path / "bundle")


REAL: dict[str, tuple[dict[str, Any], Packing]] = {
    "AutoGPTQ": (
        {
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.01,
            "desc_act": False,
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
        },
        Packing(method="gptq", bits=4, group=128, symmetric=True, zero_offset=1),
    ),
    "GPTQModel": (
        {
            "bits": 8,
            "dynamic": {"-:.*k_proj.*": {}},
            "group_size": -1,
            "desc_act": True,
            "sym": False,
            "lm_head": True,
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "format": "gptq_v2",
            "pack_dtype": "int32",
            "meta": {"quantizer": ["gptqmodel:5.7.0"], "act_group_aware": True},
        },
        Packing(method="gptq", bits=8, group=-1, symmetric=False),
    ),
    "AutoRound": (
        {
            "act_bits": 16,
            "act_data_type": "int",
            "act_dynamic": True,
            "act_group_size": 128,
            "act_sym": True,
            "amp": True,
            "autoround_version": "0.5.1",
            "batch_size": 8,
            "bits": 4,
            "damp_percent": 0.01,
            "data_type": "int",
            "desc_act": False,
            "enable_minmax_tuning": True,
            "enable_norm_bias_tuning": False,
            "enable_quanted_input": True,
            "gradient_accumulate_steps": 1,
            "group_size": 128,
            "iters": 1000,
            "low_gpu_mem_usage": True,
            "lr": 0.001,
            "minmax_lr": 0.001,
            "nsamples": 512,
            "quant_method": "gptq",
            "scale_dtype": "torch.float16",
            "seqlen": 2048,
            "super_bits": None,
            "super_group_size": None,
            "sym": True,
            "to_quant_block_names": None,
            "true_sequential": False,
        },
        Packing(method="gptq", bits=4, group=128, symmetric=True, zero_offset=1),
    ),
    "AutoAWQ": (
        {
            "bits": 4,
            "group_size": 64,
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
        Packing(method="awq", bits=4, group=64, symmetric=False),
    ),
}


@pytest.mark.parametrize("writer", REAL)
def test_configurations_as_quantizers_write_them(writer: str) -> None:
    config, expected = REAL[writer]
    assert read_packing({"quantization_config": config}) == expected


@pytest.mark.parametrize("name", ["GPTQConfig", "AwqConfig"])
def test_every_key_of_transformers_is_known(name: str) -> None:
    """What it has by default changes nothing."""
    import transformers

    config = getattr(transformers, name)(bits=4, group_size=32).to_dict()
    assert read_packing({"quantization_config": json.loads(json.dumps(config))}) is not None


def test_floats_are_no_packing() -> None:
    assert read_packing({"quantization_config": None, "model_type": "llama"}) is None


@pytest.mark.parametrize(
    ("group", "block"), [(-1, 128), (16, 16), (32, 32), (96, 32), (128, 128), (256, 128)]
)
def test_no_groups_end_cuts_a_block(group: int, block: int) -> None:
    assert Format(group=group).packing().block == block


METHODS = """
    bitsandbytes compressed-tensors fp8 fbgemm_fp8 hqq quanto torchao mxfp4 eetq aqlm spqr vptq
    higgs bitnet auto-round intel/auto-round marlin gguf FP8 modelopt qqq"""


@pytest.mark.parametrize("method", METHODS.split())
@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_other_methods_are_refused_by_name(method: str, name: str) -> None:
    pattern = rf"{name} .*\(quant_method: {method.lower()}\).*Export from the unquantized"
    with pytest.raises(UnsupportedModelError, match=pattern):
        read_packing({name: {"quant_method": method, "bits": 4, "group_size": 128}})


@pytest.mark.parametrize(
    ("details", "method"),
    [
        ("odd", "not given"),
        ({"bits": 4}, "not given"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": ["gptq"]}, r"\['gptq'\]"),
    ],
)
def test_methods_without_a_name_are_refused(details: object, method: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"\(quant_method: {method}\)"):
        read_packing({"quantization_config": details})


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("gptq", {"bits": 3}, "quantization_config.bits is 3,.*Supported: 4, 8"),
        ("gptq", {"bits": 2}, "quantization_config.bits is 2"),
        ("awq", {"bits": 8}, "quantization_config.bits is 8,.*Supported: 4"),
        ("gptq", {"group_size": 8}, "quantization_config.group_size is 8,.*multiples of 16"),
        ("awq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"group_size": -2}, "group_size is -2"),
        ("gptq", {"group_size": 100}, "group_size is 100"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'.*'gptq_v2'"),
        ("gptq", {"format": "gptq_v2"}, "quantization_config.format is 'gptq_v2'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format is True"),
        ("gptq", {"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ("gptq", {"act_bits": 8}, "act_bits is 8"),
        ("gptq", {"data_type": "fp4"}, "data_type is 'fp4'"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, r"dynamic .*'\+:\.\*'"),
        ("gptq", {"adapter": {"rank": 64}}, "quantization_config.adapter = "),
        ("gptq", {"rotation": "hadamard"}, "quantization_config.rotation = 'hadamard'"),
        ("gptq", {"extra_config": {}}, r"--ignore-config quantization_config\.extra_config"),
        ("awq", {"version": "gemv"}, "quantization_config.version is 'gemv'"),
        ("awq", {"version": "exllama"}, "quantization_config.version is 'exllama'"),
        ("awq", {"version": "marlin"}, "quantization_config.version is 'marlin'"),
        ("awq", {"backend": "llm-awq"}, "quantization_config.backend is 'llm-awq'"),
        ("awq", {"foo": 1}, r"asks for .*quantization_config.foo = 1"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(
    method: str, changes: dict[str, Any], message: str
) -> None:
    details = Format(method).config() | changes
    with pytest.raises(UnsupportedModelError, match=message):
        read_packing({"quantization_config": details})


@pytest.mark.parametrize("missing", ["bits", "group_size"])
def test_keys_that_must_be_there(missing: str) -> None:
    details = Format().config()
    del details[missing]
    with pytest.raises(CheckpointError, match=f"no quantization_config.{missing}"):
        read_packing({"quantization_config": details})


def test_keys_that_the_user_vouches_for_pass() -> None:
    details = Format().config() | {"foo": 1}
    key = "quantization_config.foo"
    assert read_packing({"quantization_config": details}, ignore=[key]) == Format().packing()
