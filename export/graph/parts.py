"""The decoder in graphs of its own for each part: the embedding, a layer, what the head reads.

A part computes what it computes inside the whole decoder. The stream enters and leaves each part
as one sum, float32 [batch, tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_llm.manifest import StateTensor

from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..quantize.storage import FLOAT32, Storage
from .blocks import LayerBuilder
from .decoder import (
    declare_lengths,
    declare_state,
    embedding_matrix,
    head_scale,
    record_embedding,
    record_layer,
    rotary_tables,
)
from .linear import Calibrated, constant_name
from .matrices import CheckpointMatrix, Matrix
from .recorder import GraphRecorder

__all__ = ["Part", "Projection", "build_embedding", "build_head", "build_layer"]


@dataclass(frozen=True, slots=True)
class Projection:
    """A weight, and the names of what it multiplies, and of what the product is added to.

    ``added`` is empty where more than a sum is between.
    """

    input: str
    matrix: Matrix
    added: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """A graph, and what goes in and out of it.

    Attributes:
        graph: The graph.
        input: Name of the tokens, int64 [batch, tokens], or of the stream.
        output: Name of the stream behind the part.
        state: Its key and value buffers.
        projections: Its weights, by their names in the graph and in its order. What they multiply
            and are added to is an output too, where the storage is float32.
    """

    graph: GraphRecorder
    input: str
    output: str
    state: tuple[StateTensor, ...]
    projections: Mapping[str, Projection]


def build_embedding(
    spec: DecoderSpec,
    weights: Weights,
    *,
    storage: Storage,
    context: int,
    calibrated: Calibrated,
) -> Part:
    """Record the embedding, positions included; for the arguments see :func:`build_layer`."""
    graph = GraphRecorder(spec.architecture)
    graph.input("input_ids", np.int64, ["batch", "tokens"])
    declare_lengths(graph)
    layers = LayerBuilder(graph, weights, spec, storage, {}, calibrated)
    _, residual, branch = record_embedding(layers, context)
    output = layers.add("/Add", branch, residual) if branch else residual
    graph.output(output, np.float32, ["batch", "tokens", spec.hidden])
    return Part(graph, "input_ids", output, (), {})


def build_layer(
    spec: DecoderSpec,
    weights: Weights,
    index: int,
    *,
    storage: Storage,
    context: int,
    calibrated: Calibrated,
) -> Part:
    """Record one layer.

    Args:
        spec: The architecture.
        weights: The checkpoint.
        index: The layer.
        storage: How its matrices are stored.
        context: Positions of the rotary tables.
        calibrated: Matrices that are quantized already.
    """
    spec = spec.within(context)
    graph = GraphRecorder(spec.architecture)
    source = graph.input("residual", np.float32, ["batch", "tokens", spec.hidden])
    declare_lengths(graph)
    state = declare_state(graph, spec, [index])
    tables = rotary_tables(graph, spec, context)
    layers = LayerBuilder(graph, weights, spec, storage, tables, calibrated)
    branch, residual = record_layer(layers, index, "", source, last=False)
    output = layers.add("/Add", branch, residual)
    graph.output(output, np.float32, ["batch", "tokens", spec.hidden])
    # Of two branches that are added to the stream at once, one makes up for what is wrong with it.
    added = {
        f"/model/layers.{index}/attn/o_proj": "" if spec.names.attention_post_norm else source,
        f"/model/layers.{index}/mlp/down_proj": (
            "" if spec.names.mlp_post_norm or spec.parallel else residual
        ),
    }
    found = {
        constant_name(path): Projection(name, matrix, added.get(path, ""))
        for path, name, matrix in layers.projections
    }
    if storage == FLOAT32:
        widths = {one.input: one.matrix.shape[1] for one in found.values()}
        widths |= {one.added: spec.hidden for one in found.values() if one.added}
        widths.pop(source, None)
        for name, width in widths.items():
            graph.output(name, np.float32, ["batch", "tokens", width])
    return Part(graph, source, output, state, found)


def build_head(spec: DecoderSpec, weights: Weights) -> Part:
    """Record the norm whose result the head multiplies, be the head the embedding or not."""
    graph = GraphRecorder(spec.architecture)
    source = graph.input("residual", np.float32, ["batch", "tokens", spec.hidden])
    declare_lengths(graph)
    layers = LayerBuilder(graph, weights, spec, FLOAT32, {})
    output = layers.norm(spec.names.final_norm, "/model/norm", source, scale=head_scale(spec))
    graph.output(output, np.float32, ["batch", "tokens", spec.hidden])
    if spec.tied:
        projection = {"embed_tokens": Projection(output, embedding_matrix(spec, weights))}
    else:
        head = CheckpointMatrix(weights, f"{spec.names.head}.weight")
        projection = {"lm_head": Projection(output, head)}
    return Part(graph, source, output, (), projection)
