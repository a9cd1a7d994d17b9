"""Learned positions: a row of a table for each place in the sequence."""

from __future__ import annotations

import numpy as np

from ..checkpoint.weights import Weights
from .matrices import read_finite
from .recorder import GraphRecorder, TensorInfo

__all__ = ["embed_positions"]


def embed_positions(graph: GraphRecorder, weights: Weights, table: str, context: int) -> str:
    """Rows of the table for every token of the step: float32 [batch, tokens, columns].

    A row's new tokens start behind its past, ``seqlens_k + 1 - query_lens``. What lies behind a
    row's real tokens is padding: its positions are bounded by the table and never looked at.

    Args:
        graph: Where to record.
        weights: The checkpoint.
        table: The tensor, float32 [at least context, columns].
        context: Longest sequence, in tokens.
    """
    path = "/model/embed_positions"
    columns = weights.shape(table)[1]
    info = TensorInfo("embed_positions.weight", np.dtype(np.float32), (context, columns))
    graph.defer([info], lambda: [[read_finite(weights, table, 0, context)]])
    # The past is a row's length minus its new tokens, and seqlens_k is the length minus 1: the 1
    # is in these steps.
    steps = graph.constant("position_steps", np.arange(1, context + 1, dtype=np.int32))
    start = graph.constant("position_start", np.zeros(1, np.int64))
    last = graph.constant("position_last", np.array(context - 1, np.int32))
    axis = graph.constant("position_axis", np.ones(1, np.int64))
    tokens = graph.op("Shape", f"{path}/Shape", ["input_ids"], start=1)
    ahead = graph.op("Slice", f"{path}/Slice", [steps, start, tokens])
    past = graph.op("Sub", f"{path}/Sub", ["seqlens_k", "query_lens"])
    rows = graph.op("Unsqueeze", f"{path}/Unsqueeze", [past, axis])
    positions = graph.op("Add", f"{path}/Add", [rows, ahead])
    bounded = graph.op("Min", f"{path}/Min", [positions, last])
    return graph.op("Gather", f"{path}/Gather", [info.name, bounded], axis=0)
