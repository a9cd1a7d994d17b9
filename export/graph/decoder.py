"""The whole decoder as a graph that follows the decoder contract, version 1."""

from __future__ import annotations

import numpy as np

from edge_llm.manifest import DecoderGraph, StateTensor

from ..architectures.rope import RopeConfig
from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..quantize.storage import Storage
from .blocks import LayerBuilder
from .linear import Vocabulary
from .matrices import CheckpointMatrix, Matrix, Scaled
from .positions import embed_positions
from .recorder import GraphRecorder
from .rotary import rotary_tables

__all__ = ["GRAPH_FILE", "LAYOUT", "build_decoder"]

GRAPH_FILE = "model.onnx"
LAYOUT = "edge_llm.v1"


def build_decoder(
    spec: DecoderSpec, weights: Weights, *, storage: Storage, context: int
) -> tuple[GraphRecorder, DecoderGraph]:
    """Record the graph of a decoder.

    Args:
        spec: The architecture.
        weights: The checkpoint, read when the graph is written.
        storage: How the matrices are stored.
        context: Positions of the rotary tables, the longest sequence that the graph can take.

    Returns:
        The graph, and what the manifest says of it.
    """
    spec = spec.within(context)
    graph = GraphRecorder(spec.architecture)
    _declare_inputs(graph)
    state = _declare_state(graph, spec)
    layers = LayerBuilder(graph, weights, spec, storage, _keep_rotary_tables(graph, spec, context))
    names = spec.names
    matrix: Matrix = CheckpointMatrix(weights, f"{names.embedding}.weight")
    if spec.embedding_scale != 1:
        matrix = Scaled(matrix, spec.embedding_scale)
    embedding = Vocabulary(graph, "embed_tokens", matrix, storage)
    residual = embedding.embed("input_ids")
    branch = ""
    if names.positions:
        branch = embed_positions(graph, weights, f"{names.positions}.weight", context)
    for i in range(spec.layers):
        branch, residual = _record_layer(layers, i, branch, residual)
    head = embedding
    scale = spec.logits_scale / (spec.logits_softcap or 1)
    if spec.tied:
        # The head is the embedding as it is stored, scaled: the last norm takes that back.
        scale /= spec.embedding_scale
    else:
        head = Vocabulary(
            graph, "lm_head", CheckpointMatrix(weights, f"{names.head}.weight"), storage
        )
    normed, _ = layers.enter(names.final_norm, "/model/norm", branch, residual, scale=scale)
    head.logits(normed, softcap=spec.logits_softcap)
    graph.output("logits", np.float32, ["scored", spec.vocab])
    return graph, DecoderGraph(graph=GRAPH_FILE, layout=LAYOUT, state=state)


def _record_layer(layers: LayerBuilder, index: int, branch: str, residual: str) -> tuple[str, str]:
    """Record a block; takes and gives a branch's result that is not yet added, and the stream."""
    graph, spec = layers.graph, layers.spec
    names, path = spec.names, f"/model/layers.{index}"

    def named(name: str | None) -> str | None:
        return name and name.format(i=index)

    def leave(name: str | None, place: str, source: str) -> str:
        norm = named(name)
        return layers.norm(norm, f"{path}/{place}", source) if norm else source

    normed, residual = layers.enter(
        named(names.attention_norm), f"{path}/attention_norm", branch, residual
    )
    branch = layers.attention(index, normed)
    if index == spec.layers - 1:
        # Behind the last attention only the rows to be scored matter: nothing else of a prompt
        # passes through the last MLP and the head.
        branch = _gather_rows(graph, "/model/branch_rows", branch, spec.hidden)
        residual = _gather_rows(graph, "/model/residual_rows", residual, spec.hidden)
        if spec.parallel and not names.mlp_norm:
            normed = _gather_rows(graph, "/model/normed_rows", normed, spec.hidden)
    branch = leave(names.attention_post_norm, "attention_post_norm", branch)
    if spec.parallel:
        normed = leave(names.mlp_norm, "mlp_norm", residual) if names.mlp_norm else normed
        branch = layers.add(f"{path}/Add", branch, layers.mlp(index, normed))
        return branch, residual
    normed, residual = layers.enter(named(names.mlp_norm), f"{path}/mlp_norm", branch, residual)
    return leave(names.mlp_post_norm, "mlp_post_norm", layers.mlp(index, normed)), residual


def _keep_rotary_tables(
    graph: GraphRecorder, spec: DecoderSpec, context: int
) -> dict[RopeConfig, tuple[str, str]]:
    """Names of the cosines and sines of each rotary embedding that a layer has."""
    tables: dict[RopeConfig, tuple[str, str]] = {}
    for rope in dict.fromkeys(layer.rope for layer in spec.attention):
        if rope is None:
            continue
        number = f"_{len(tables)}" if tables else ""
        names = (f"rotary_cos{number}", f"rotary_sin{number}")
        arrays = rotary_tables(
            rope, head_dim=spec.head_dim, padded=spec.padded_head_dim, context=context
        )
        for name, array in zip(names, arrays, strict=True):
            graph.keep(name, array)
        tables[rope] = names
    return tables


def _declare_inputs(graph: GraphRecorder) -> None:
    graph.input("input_ids", np.int64, ["batch", "tokens"])
    graph.input("query_lens", np.int32, ["batch"])
    graph.input("seqlens_k", np.int32, ["batch"])
    graph.input("total_sequence_length", np.int32, [])
    graph.input("logits_index", np.int64, ["scored"])


def _declare_state(graph: GraphRecorder, spec: DecoderSpec) -> tuple[StateTensor, ...]:
    """One key and one value buffer per layer: [batch, kv_heads, capacity, head_dim]."""
    shape = ("batch", spec.kv_heads, "capacity", spec.padded_head_dim)
    state = []
    for i, attention in enumerate(spec.attention):
        # The buffers of windows have a capacity of their own.
        length = f"capacity_{attention.window}" if attention.window else "capacity"
        declared = ("batch", spec.kv_heads, length, spec.padded_head_dim)
        for part in ("key", "value"):
            one = StateTensor(
                input=f"past.{i}.{part}",
                output=f"present.{i}.{part}",
                dtype="float32",
                shape=shape,
                batch_axis=0,
                sequence_axis=2,
                shared=True,
                kind="window" if attention.window else "kv",
                window=attention.window,
            )
            graph.input(one.input, np.float32, declared)
            graph.output(one.output, np.float32, declared)
            state.append(one)
    return tuple(state)


def _gather_rows(graph: GraphRecorder, path: str, source: str, width: int) -> str:
    """Rows ``logits_index`` of ``source`` [batch, tokens, width] as [scored, width]."""
    shape = graph.constant("rows_shape", np.array([-1, width], np.int64))
    flat = graph.op("Reshape", f"{path}/Reshape", [source, shape])
    return graph.op("Gather", f"{path}/Gather", [flat, "logits_index"], axis=0)
