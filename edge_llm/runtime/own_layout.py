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
        rows: Sequences that are held at once.

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
        self.rows = rows
        self.widest = min(capacity, WIDEST_STEP)
        self.verifies = True
        self._vocab = manifest.dims.vocab
        self._tokens = np.zeros((0, 0), np.int64)
        self._query_lens = np.zeros(rows, np.int32)
        self._seqlens_k = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._index = np.zeros(0, np.int64)
        self._bound: tuple[list[int], list[int], int] = ([], [], 0)
        for name in ("query_lens", "seqlens_k"):
            self.graph.check(name, dtypes=("int32",), shape=(rows,))
        self.graph.check("total_sequence_length", dtypes=("int32",), shape=())
        self.graph.check("input_ids", dtypes=("int64",), shape=(None, None))
        self.graph.check("logits_index", dtypes=("int64",), shape=(None,))
        self.graph.check("logits", dtypes=("float32",), shape=(None, self._vocab))
        self._logits = np.zeros((rows, self._vocab), np.float32)
        self.graph.check_inputs({*_INPUTS, *(one.input for one in state)})
        self.graph.bind("total_sequence_length", self._total)

    def step(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        return self.step_rows([tokens], scored=[scored])

    def step_rows(
        self,
        tokens: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        scored: Sequence[int],
        first: int = 0,
    ) -> NDArray[np.float32]:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        counts = [len(row) for row in tokens]
        width, longest = max(counts), 0
        self._resize(counts, list(scored), first)
        lengths = self.cache.lengths[first : first + len(counts)].tolist()
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            if count:
                assert width <= self.cache.capacity - length
                self._tokens[i, :count] = tokens[i]
            # The operator takes no -1, and a row that is full has no room for the others' width: so
            # it is told that an idle row has one token, which it reads for naught.
            self._seqlens_k[i] = length + count - 1 if count else 0
            longest = max(longest, length + count if count else 1)
        self._total[...] = longest
        try:
            self.graph.run()
        except BaseException:
            for i, count in enumerate(counts):
                if count:
                    self.cache.abandon(first + i, count)
            raise
        for i, count in enumerate(counts):
            self.cache.advance(first + i, count)
        return self._logits[: len(self._index)]

    def interrupt(self) -> None:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        self.graph.interrupt()

    def resume(self) -> None:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        self.graph.resume()

    def _resize(self, counts: list[int], scored: list[int], first: int) -> None:
        """Bind inputs and outputs for so many tokens a row, where the last step had others."""
        if self._bound == (counts, scored, first):
            return
        batch, width = len(counts), max(counts)
        assert width > 0
        if (batch, first) != (len(self._bound[0]), self._bound[2]):
            self.graph.bind("query_lens", self._query_lens[:batch])
            self.graph.bind("seqlens_k", self._seqlens_k[:batch])
            for one in self._state:
                rows = self.cache.buffers[one.input][first : first + batch]
                self.graph.bind(one.input, rows, output=one.output)
        self._query_lens[:batch] = counts
        self._tokens = np.zeros((batch, width), np.int64)
        self.graph.bind("input_ids", self._tokens)
        places: list[int] = []
        for i, (count, last) in enumerate(zip(counts, scored, strict=True)):
            assert 0 <= last <= count
            places += range(i * width + count - last, i * width + count)
        self._index = np.array(places, np.int64)
        self.graph.bind("logits_index", self._index)
        if len(self._index) > len(self._logits):
            self._logits = np.zeros((len(self._index), self._vocab), np.float32)
        self.graph.bind_output("logits", self._logits[: len(self._index)])
        self._bound = (counts, scored, first)
