"""Parts of a decoder, run on whole sequences."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from edge_llm.runtime.device import usable_cores
from edge_llm.runtime.kv_cache import state_capacity
from edge_llm.runtime.session import create_session

from ..graph.decoder import GRAPH_FILE
from ..graph.parts import Part
from ..writer import BundleWriter

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["PartSession", "batches"]

# Tokens that run at once: their activations are in memory, and each product of them is exact
# enough in float32 to be summed up in float64.
TOKENS_AT_ONCE = 2048

Rows = NDArray[np.int64] | NDArray[np.float32]
"""What a part reads: tokens [windows, tokens], or the stream [windows, tokens, hidden]."""


def batches(source: Rows) -> Iterator[Rows]:
    """Some windows at a time."""
    step = max(1, TOKENS_AT_ONCE // source.shape[1])
    for start in range(0, len(source), step):
        yield source[start : start + step]


class PartSession:
    """A part's session, whose files are gone when the block ends.

    Args:
        part: The part.
        minimum: Oldest version of onnxruntime that has its operators.
        until: Names of what will be asked for, where that is not all: what they do not take is left
            out.
    """

    def __init__(self, part: Part, minimum: str, *, until: Collection[str] = ()) -> None:
        self._part = part
        outputs = set(until) - {part.input}
        self._graph = part.graph.until(outputs) if outputs else part.graph
        self._minimum = minimum
        self._folder = tempfile.TemporaryDirectory(prefix="edge-llm-")

    def __enter__(self) -> Self:
        folder = Path(self._folder.name)
        writer = BundleWriter(folder)
        writer.write_graph(self._graph, producer="calibration", on_bytes=lambda size: None)
        self._session: ort.InferenceSession = create_session(
            folder / GRAPH_FILE, threads=usable_cores(), minimum=self._minimum
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self._session
        self._folder.cleanup()

    def run(self, source: Rows) -> NDArray[np.float32]:
        """The stream behind the part, float32 [windows, tokens, hidden]."""
        output = self._part.output
        return np.concatenate([self.step(rows, [output])[output] for rows in batches(source)])

    def step(self, rows: Rows, names: list[str]) -> dict[str, NDArray[np.float32]]:
        """Feed whole sequences, on an empty past; what is read may be asked for too."""
        batch, tokens = rows.shape[:2]
        feeds: dict[str, NDArray[Any]] = {
            self._part.input: rows,
            "query_lens": np.full(batch, tokens, np.int32),
            "seqlens_k": np.full(batch, tokens - 1, np.int32),
            "total_sequence_length": np.array(tokens, np.int32),
        }
        for one in self._part.state:
            sizes = {"batch": batch, "capacity": state_capacity(one, tokens)}
            shape = [sizes[size] if isinstance(size, str) else size for size in one.shape]
            feeds[one.input] = np.zeros(shape, np.float32)
        outputs = [name for name in names if name != self._part.input]
        results: dict[str, Any] = {self._part.input: rows}
        if not outputs:  # which would ask ONNX Runtime for all
            return results
        found = self._session.run(outputs, feeds)
        return results | dict(zip(outputs, found, strict=True))
