"""Steps of graphs that other exporters made: an attention mask, and logits of all tokens.

transformers' names are the common ground of optimum, transformers.js and onnxruntime-genai; the
layouts "standard.v1" and "genai.v1" differ only in how the state is handed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.manifest import Manifest
from edge_llm.runtime.binding import BoundGraph
from edge_llm.runtime.decoder import WIDEST_STEP
from edge_llm.runtime.growing_cache import GrowingCache
from edge_llm.runtime.kv_cache import KVCache

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["MaskedDecoder"]

# Such a graph gives logits of all tokens of a step: 311 MB of them for 512 tokens and a vocabulary
# of 152,000. This bounds the buffer by shorter chunks, of 110 tokens there: a matrix product of so
# many rows is about as fast per row as a longer one.
LOGITS_BYTES = 64 << 20

INTEGERS = ("int64", "int32")


class MaskedDecoder:
    """A :class:`~edge_llm.runtime.decoder.Decoder` whose graph takes ``attention_mask``.

    A step binds the front of a mask that is allocated once, as long as the sequence. All else is
    bound again only when the number of tokens changes.

    Args:
        session: The graph.
        manifest: The bundle's manifest.
        cache: The state.
        extra_inputs: Inputs that the caller binds.

    Raises:
        RuntimeFailure: The graph is not what the manifest and the layout say.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        cache: KVCache | GrowingCache,
        *,
        extra_inputs: Sequence[str] = (),
    ) -> None:
        state, vocab = manifest.decoder.state, manifest.dims.vocab
        self.graph = graph = BoundGraph(session)
        graph.check_state(state)
        self.cache = cache
        self._token_type = graph.check("input_ids", dtypes=INTEGERS, shape=(None, None))
        mask_type = graph.check("attention_mask", dtypes=INTEGERS, shape=(None, None))
        self._mask = np.ones((1, cache.capacity), mask_type)
        self._positioned = "position_ids" in graph.inputs
        if self._positioned:
            graph.check("position_ids", dtypes=("int64",), shape=(None, None))
        # How many of the last tokens to score, where the graph can be told.
        self._wanted: NDArray[np.int64] | None = None
        for name in {"num_logits_to_keep", "logits_to_keep"} & graph.inputs:
            shape = (1,) * len(graph.shape(name))  # a scalar, or a list of one
            graph.check(name, dtypes=("int64",), shape=shape)
            self._wanted = np.ones(shape, np.int64)
            graph.bind(name, self._wanted)
        graph.check_inputs(
            {
                *("input_ids", "attention_mask", "position_ids"),
                *("num_logits_to_keep", "logits_to_keep", *extra_inputs),
                *(one.input for one in state),
            }
        )
        dtype = graph.check("logits", dtypes=("float32", "float16"), shape=(None, None, vocab))
        self._last_only = graph.shape("logits")[1] == 1
        self.rows = 1
        self.widest = min(cache.capacity, WIDEST_STEP)
        if self._wanted is None and not self._last_only:
            self.widest = max(1, min(self.widest, LOGITS_BYTES // (4 * vocab)))
        self._logits = np.zeros((1, vocab), dtype)
        self._converted = np.zeros((0, vocab), np.float32)
        self._bound = (0, 0)
        # Whether several tokens can be fed behind others.
        self._together = True

    def step(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        count = len(tokens)
        past = int(self.cache.lengths[0])
        assert 0 < count <= self.cache.capacity - past
        assert 0 <= scored <= count
        apart = (past > 0 and not self._together) or (scored > 1 and self._last_only)
        if count > 1 and apart:
            return self._step_in_parts(np.asarray(tokens), past, scored)
        return self._feed(tokens, past, scored)

    def step_rows(
        self,
        tokens: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        scored: Sequence[int],
        first: int = 0,
    ) -> NDArray[np.float32]:
        """See :class:`~edge_llm.runtime.decoder.Decoder`; there is one row."""
        assert (len(tokens), first) == (1, 0)
        return self.step(tokens[0], scored=scored[0])

    @property
    def verifies(self) -> bool:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        return self._together and not self._last_only

    def interrupt(self) -> None:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        self.graph.interrupt()

    def resume(self) -> None:
        """See :class:`~edge_llm.runtime.decoder.Decoder`."""
        self.graph.resume()

    def _step_in_parts(
        self, tokens: NDArray[np.int64], past: int, scored: int
    ) -> NDArray[np.float32]:
        """Feed as many tokens at once as the graph takes and scores, and the others one by one."""
        unscored = len(tokens) - scored
        head = max(1, unscored) if self._together or not past else 1
        ends = [head, *range(head + 1, len(tokens) + 1)]
        rows = np.empty((scored, self._logits.shape[1]), np.float32)
        start = 0
        try:
            for end in ends:
                wanted = int(end > unscored)
                logits = self._feed(tokens[start:end], past + start, wanted)
                if wanted:
                    rows[end - 1 - unscored] = logits[0]
                start = end
        except BaseException:
            if self.cache.lengths[0]:  # which a window that moved on has emptied
                self.cache.truncate(0, past)
            raise
        return rows

    def _feed(
        self, tokens: Sequence[int] | NDArray[np.int64], past: int, scored: int
    ) -> NDArray[np.float32]:
        """Run the graph once."""
        count = len(tokens)
        rows = self._resize(count, scored)
        self._tokens[0] = tokens
        if self._positioned:
            np.add(self._offsets, past, out=self._positions)
        self.graph.bind("attention_mask", self._mask[:, : past + count])
        self._bind_state(past, past + count)
        try:
            self.graph.run()
        except BaseException:
            self.cache.abandon(0, count)
            raise
        self.cache.advance(0, count)
        logits = self._logits[rows - scored : rows]
        if logits.dtype == np.float32:
            return logits
        if scored > len(self._converted):
            self._converted = np.zeros((scored, logits.shape[1]), np.float32)
        self._converted[:scored] = logits
        return self._converted[:scored]

    def _bind_state(self, past: int, total: int) -> None:
        """Bind the state for a step from ``past`` tokens to ``total``."""

    def _resize(self, count: int, scored: int) -> int:
        """Bind what depends on the number of tokens; gives the rows of logits that will come."""
        rows = 1 if self._last_only else count
        if self._wanted is not None:
            rows = max(1, scored)  # to the graph, 0 means all
        if self._bound == (count, rows):
            return rows
        self._tokens = np.zeros((1, count), self._token_type)
        self.graph.bind("input_ids", self._tokens)
        if self._positioned:
            self._offsets = np.arange(count)[None]
            self._positions = np.zeros((1, count), np.int64)
            self.graph.bind("position_ids", self._positions)
        if self._wanted is not None:
            self._wanted[...] = rows
        if rows > len(self._logits):
            self._logits = np.zeros((rows, self._logits.shape[1]), self._logits.dtype)
        self.graph.bind_output("logits", self._logits[None, :rows])
        self._bound = (count, rows)
        return rows
