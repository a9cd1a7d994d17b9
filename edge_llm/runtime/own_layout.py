"""Steps of a graph that follows the decoder contract, version 1 (layout "edge_llm.v1")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.manifest import Manifest
from edge_llm.runtime.binding import BoundGraph
from edge_llm.runtime.decoder import WIDEST_STEP
from edge_llm.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["OwnDecoder"]

_INPUTS = ("input_ids", "query_lens", "seqlens_k", "total_sequence_length", "logits_index")


class OwnDecoder:
    """A :class:`~edge_llm.runtime.decoder.Decoder` on one shared buffer per state tensor.

    Inputs and outputs are bound once and stay bound; a step writes the new tokens and lengths into
    the bound memory. Binding again is needed only when the number of rows or tokens changes, as
    between the chunks of a prompt and the first token of the answer.

    Args:
        session: The graph.
        manifest: The bundle's manifest.
        capacity: Most tokens of a row.
        rows: Sequences that are held at once; :meth:`step` knows only the first.

    Raises:
        RuntimeFailure: The graph is not what the manifest says.
        ArgumentError: There is no memory for this capacity.
    """

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, *, capacity: int, rows: int = 1
    ) -> None:
        self._state = state = manifest.decoder.state
        self.graph = BoundGraph(session)
        self.graph.check_state(state)
        self.cache = KVCache(state, rows=rows, capacity=capacity)
        self.widest = min(capacity, WIDEST_STEP)
        self._vocab = manifest.dims.vocab
        self._tokens = np.zeros((0, 0), np.int64)
        self._query_lens = np.zeros(rows, np.int32)
        self._seqlens_k = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._index = np.zeros(0, np.int64)
        self._logits = np.zeros((rows, self._vocab), np.float32)
        self._bound = (0, 0, -1)
        for name in ("query_lens", "seqlens_k"):
            self.graph.check(name, dtypes=("int32",), shape=(rows,))
        self.graph.check("total_sequence_length", dtypes=("int32",), shape=())
        self.graph.check("input_ids", dtypes=("int64",), shape=(None, None))
        self.graph.check("logits_index", dtypes=("int64",), shape=(None,))
        self.graph.check("logits", dtypes=("float32",), shape=(None, self._vocab))
        self.graph.check_inputs({*_INPUTS, *(one.input for one in state)})
        self.graph.bind("total_sequence_length", self._total)

    def step(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        return self.step_rows([tokens], scored=[scored])

    def step_rows(
        self, tokens: Sequence[Sequence[int] | NDArray[np.int64]], *, scored: Sequence[int]
    ) -> NDArray[np.float32]:
        """Append tokens to the first rows, to each its own, and give logits of their last ones.

        Args:
            tokens: New tokens of row 0, 1 and so on, of any lengths; a row that gets none is idle
                and stays as it is, and so do those behind the last. At least one gets some. They
                are padded to the longest, for which each row must have room.
            scored: Of each row, how many of its last new tokens to score.

        Returns:
            float32 [sum(scored), vocab], row after row: a view of a buffer that the next step
            overwrites.

        Raises:
            Interrupted: :meth:`interrupt` was called.
            RuntimeFailure: ONNX Runtime failed.
        """
        counts = [len(row) for row in tokens]
        batch, width = len(counts), max(counts)
        lengths = self.cache.lengths[:batch]
        assert 0 < width <= self.cache.capacity - int(lengths.max())
        self._resize(batch, width, sum(scored))
        done = 0
        for i, (row, count, last) in enumerate(zip(tokens, counts, scored, strict=True)):
            assert 0 <= last <= count
            self._tokens[i, :count] = row
            end = i * width + count
            self._index[done : done + last] = range(end - last, end)
            done += last
        self._query_lens[:batch] = counts
        totals = lengths + self._query_lens[:batch]
        # An idle row may be empty, but the operator takes no -1: it reads one token and drops it.
        np.maximum(totals - 1, 0, out=self._seqlens_k[:batch])
        self._total[...] = totals.max()
        try:
            self.graph.run()
        except BaseException:
            for i, count in enumerate(counts):
                self.cache.abandon(i, count)
            raise
        for i, count in enumerate(counts):
            self.cache.advance(i, count)
        return self._logits[:done]

    def interrupt(self) -> None:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        self.graph.interrupt()

    def resume(self) -> None:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        self.graph.resume()

    def _resize(self, batch: int, width: int, scored: int) -> None:
        """Bind inputs and outputs of this size, where the last step had another."""
        if self._bound == (batch, width, scored):
            return
        if batch != self._bound[0]:
            self.graph.bind("query_lens", self._query_lens[:batch])
            self.graph.bind("seqlens_k", self._seqlens_k[:batch])
            for one in self._state:
                rows = self.cache.buffers[one.input][:batch]
                self.graph.bind(one.input, rows, output=one.output)
        if (batch, width) != self._bound[:2]:
            self._tokens = np.zeros((batch, width), np.int64)
            self.graph.bind("input_ids", self._tokens)
        if scored != self._bound[2]:
            self._index = np.zeros(scored, np.int64)
            self.graph.bind("logits_index", self._index)
            if scored > len(self._logits):
                self._logits = np.zeros((scored, self._vocab), np.float32)
            self.graph.bind_output("logits", self._logits[:scored])
        self._bound = (batch, width, scored)
