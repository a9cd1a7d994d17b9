"""The whole decoder as a graph that follows the decoder contract, version 1."""

from __future__ import annotations

import numpy as np

from edge_llm.manifest import DecoderGraph, StateTensor

from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..quantize.storage import Storage
from .blocks import LayerBuilder
from .linear import Vocabulary
from .matrices import CheckpointMatrix
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
    graph = GraphRecorder(spec.architecture)
    _declare_inputs(graph)
    state = _declare_state(graph, spec)
    tables = rotary_tables(
        spec.rope, head_dim=spec.head_dim, padded=spec.padded_head_dim, context=context
    )
    for name, table in zip(("rotary_cos", "rotary_sin"), tables, strict=True):
        graph.keep(name, table)

    layers = LayerBuilder(graph, weights, spec, storage)
    names = spec.names
    embedding = Vocabulary(
        graph, "embed_tokens", CheckpointMatrix(weights, f"{names.embedding}.weight"), storage
    )
    residual = embedding.embed("input_ids")
    branch = ""
    for i in range(spec.layers):
        path = f"/model/layers.{i}"
        norm = names.input_norm.format(i=i)
        if i == 0:
            normed = layers.norm(norm, f"{path}/input_layernorm", residual)
        else:
            normed, residual = layers.add_norm(norm, f"{path}/input_layernorm", branch, residual)
        branch = layers.attention(i, normed)
        if i == spec.layers - 1:
            # Behind the last attention only the rows to be scored matter: nothing else of a
            # prompt passes through the last MLP and the head.
            branch = _gather_rows(graph, "/model/branch_rows", branch, spec.hidden)
            residual = _gather_rows(graph, "/model/residual_rows", residual, spec.hidden)
        norm = names.post_attention_norm.format(i=i)
        normed, residual = layers.add_norm(
            norm, f"{path}/post_attention_layernorm", branch, residual
        )
        branch = layers.mlp(i, normed)
    normed, _ = layers.add_norm(names.final_norm, "/model/norm", branch, residual)
    head = embedding
    if not spec.tied:
        head = Vocabulary(
            graph, "lm_head", CheckpointMatrix(weights, f"{names.head}.weight"), storage
        )
    head.logits(normed)
    graph.output("logits", np.float32, ["scored", spec.vocab])
    return graph, DecoderGraph(graph=GRAPH_FILE, layout=LAYOUT, state=state)


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
    for i in range(spec.layers):
        for part in ("key", "value"):
            one = StateTensor(
                input=f"past.{i}.{part}",
                output=f"present.{i}.{part}",
                dtype="float32",
                shape=shape,
                batch_axis=0,
                sequence_axis=2,
                shared=True,
                kind="kv",
            )
            graph.input(one.input, np.float32, shape)
            graph.output(one.output, np.float32, shape)
            state.append(one)
    return tuple(state)


def _gather_rows(graph: GraphRecorder, path: str, source: str, width: int) -> str:
    """Rows ``logits_index`` of ``source`` [batch, tokens, width] as [scored, width]."""
    shape = graph.constant("rows_shape", np.array([-1, width], np.int64))
    flat = graph.op("Reshape", f"{path}/Reshape", [source, shape])
    return graph.op("Gather", f"{path}/Gather", [flat, "logits_index"], axis=0)
