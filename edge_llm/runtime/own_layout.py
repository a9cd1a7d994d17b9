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


class OwnDecoder:
    """A :class:`~edge_llm.runtime.decoder.Decoder` on one shared buffer per state tensor.

    Inputs and outputs are bound once and stay bound; a step writes the new tokens and lengths into
    the bound memory. Binding again is needed only when the number of tokens changes, as between
    the chunks of a prompt and the first token of the answer.

    Args:
        session: The graph.
        manifest: The bundle's manifest.
        capacity: Most tokens of the sequence.

    Raises:
        RuntimeFailure: The graph is not what the manifest says.
        ArgumentError: There is no memory for this capacity.
    """

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, *, capacity: int) -> None:
        state = manifest.decoder.state
        self.graph = BoundGraph(session)
        self.graph.check_state(state)
        self.cache = KVCache(state, rows=1, capacity=capacity)
        self.widest = min(capacity, WIDEST_STEP)
        self.verifies = True
        self._vocab = manifest.dims.vocab
        self._tokens = np.zeros((1, 0), np.int64)
        self._query_lens = np.zeros(1, np.int32)
        self._seqlens_k = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._index = np.zeros(0, np.int64)
        self._bound: tuple[int, int] | None = None
        lengths = {
            "query_lens": self._query_lens,
            "seqlens_k": self._seqlens_k,
            "total_sequence_length": self._total,
        }
        for name, array in lengths.items():
            self.graph.check(name, dtypes=("int32",), shape=array.shape or ())
            self.graph.bind(name, array)
        self.graph.check("input_ids", dtypes=("int64",), shape=(None, None))
        self.graph.check("logits_index", dtypes=("int64",), shape=(None,))
        self.graph.check("logits", dtypes=("float32",), shape=(None, self._vocab))
        self._logits = np.zeros((1, self._vocab), np.float32)
        self.graph.check_inputs(
            {"input_ids", "logits_index", *lengths, *(one.input for one in state)}
        )
        for one in state:
            self.graph.bind(one.input, self.cache.buffers[one.input], output=one.output)

    def step(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        count = len(tokens)
        past = int(self.cache.lengths[0])
        assert 0 < count <= self.cache.capacity - past
        assert 0 <= scored <= count
        self._resize(count, scored)
        self._tokens[0] = tokens
        self._query_lens[0] = count
        self._seqlens_k[0] = past + count - 1
        self._total[...] = past + count
        try:
            self.graph.run()
        except BaseException:
            self.cache.abandon(0, count)
            raise
        self.cache.advance(0, count)
        return self._logits[:scored]

    def interrupt(self) -> None:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        self.graph.interrupt()

    def resume(self) -> None:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        self.graph.resume()

    def _resize(self, count: int, scored: int) -> None:
        """Bind inputs and outputs of this size, where the last step had another."""
        if self._bound == (count, scored):
            return
        self._tokens = np.zeros((1, count), np.int64)
        self.graph.bind("input_ids", self._tokens)
        self._index = np.arange(count - scored, count, dtype=np.int64)
        self.graph.bind("logits_index", self._index)
        if scored > len(self._logits):
            self._logits = np.zeros((scored, self._vocab), np.float32)
        self.graph.bind_output("logits", self._logits[:scored])
        self._bound = (count, scored)
