"""The whole decoder as a graph that follows the decoder contract, version 1."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from edge_llm.manifest import DecoderGraph, StateTensor

from ..architectures.rope import RopeConfig
from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..quantize.storage import Storage
from .blocks import LayerBuilder
from .linear import Calibrated, Vocabulary
from .matrices import CheckpointMatrix, Matrix, Scaled
from .positions import embed_positions
from .recorder import GraphRecorder
from .rotary import record_rotary_tables

__all__ = [
    "GRAPH_FILE",
    "LAYOUT",
    "build_decoder",
    "declare_lengths",
    "declare_state",
    "embedding_matrix",
    "head_scale",
    "record_embedding",
    "record_layer",
    "rotary_tables",
]

GRAPH_FILE = "model.onnx"
LAYOUT = "edge_llm.v1"


def build_decoder(
    spec: DecoderSpec,
    weights: Weights,
    *,
    storage: Storage,
    context: int,
    calibrated: Calibrated | None = None,
) -> tuple[GraphRecorder, DecoderGraph]:
    """Record the graph of a decoder.

    Args:
        spec: The architecture.
        weights: The checkpoint, read when the graph is written.
        storage: How the matrices are stored.
        context: Positions of the rotary tables, the longest sequence that the graph can take.
        calibrated: Matrices that are quantized already.

    Returns:
        The graph, and what the manifest says of it.
    """
    spec = spec.within(context)
    graph = GraphRecorder(spec.architecture)
    graph.input("input_ids", np.int64, ["batch", "tokens"])
    declare_lengths(graph)
    graph.input("logits_index", np.int64, ["scored"])
    state = declare_state(graph, spec, range(spec.layers))
    tables = rotary_tables(graph, spec, context)
    layers = LayerBuilder(graph, weights, spec, storage, tables, calibrated or {})
    names = spec.names
    embedding, residual, branch = record_embedding(layers, context)
    for i in range(spec.layers):
        branch, residual = record_layer(layers, i, branch, residual, last=i == spec.layers - 1)
    head = embedding
    if not spec.tied:
        matrix = CheckpointMatrix(weights, f"{names.head}.weight")
        head = Vocabulary(graph, "lm_head", matrix, storage, calibrated=calibrated)
    scale = head_scale(spec)
    normed, _ = layers.enter(names.final_norm, "/model/norm", branch, residual, scale=scale)
    head.logits(normed, softcap=spec.logits_softcap)
    graph.output("logits", np.float32, ["scored", spec.vocab])
    return graph, DecoderGraph(graph=GRAPH_FILE, layout=LAYOUT, state=state)


def record_embedding(layers: LayerBuilder, context: int) -> tuple[Vocabulary, str, str]:
    """Record the embedding: the matrix, the stream, and learned positions to be added to it."""
    graph, weights, spec = layers.graph, layers.weights, layers.spec
    matrix = embedding_matrix(spec, weights)
    embedding = Vocabulary(
        graph, "embed_tokens", matrix, layers.storage, calibrated=layers.calibrated
    )
    residual = embedding.embed("input_ids")
    if not spec.names.positions:
        return embedding, residual, ""
    table = f"{spec.names.positions}.weight"
    return embedding, residual, embed_positions(graph, weights, table, context)


def embedding_matrix(spec: DecoderSpec, weights: Weights) -> Matrix:
    """The embedding as the graph stores it, scaled."""
    matrix = CheckpointMatrix(weights, f"{spec.names.embedding}.weight")
    return matrix if spec.embedding_scale == 1 else Scaled(matrix, spec.embedding_scale)


def head_scale(spec: DecoderSpec) -> float:
    """What the last norm's result is multiplied by, so that the head need not be."""
    scale = spec.logits_scale / (spec.logits_softcap or 1)
    # A tied head is the embedding as it is stored, scaled: the last norm takes that back.
    return scale / spec.embedding_scale if spec.tied else scale


def record_layer(
    layers: LayerBuilder, index: int, branch: str, residual: str, *, last: bool
) -> tuple[str, str]:
    """Record a block; takes and gives a branch's result that is not yet added, and the stream.

    The ``last`` block gives the rows ``logits_index`` only.
    """
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
    if last:
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


def rotary_tables(
    graph: GraphRecorder, spec: DecoderSpec, context: int
) -> dict[RopeConfig, tuple[str, str]]:
    """Names of the cosines and sines of each rotary embedding that a layer has."""
    tables: dict[RopeConfig, tuple[str, str]] = {}
    for rope in dict.fromkeys(layer.rope for layer in spec.attention):
        if rope is None:
            continue
        tables[rope] = record_rotary_tables(
            graph,
            rope,
            head_dim=spec.head_dim,
            padded=spec.padded_head_dim,
            context=context,
            suffix=f"_{len(tables)}" if tables else "",
        )
    return tables


def declare_lengths(graph: GraphRecorder) -> None:
    """Declare the inputs that say how long each row is."""
    graph.input("query_lens", np.int32, ["batch"])
    graph.input("seqlens_k", np.int32, ["batch"])
    graph.input("total_sequence_length", np.int32, [])


def declare_state(
    graph: GraphRecorder, spec: DecoderSpec, layers: Iterable[int]
) -> tuple[StateTensor, ...]:
    """One key and one value buffer per layer: [batch, kv_heads, capacity, head_dim]."""
    shape = ("batch", spec.kv_heads, "capacity", spec.padded_head_dim)
    state = []
    for i in layers:
        attention = spec.attention[i]
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
