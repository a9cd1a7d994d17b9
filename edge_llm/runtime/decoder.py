"""Steps of a decoder whose graph follows the decoder contract, version 1, on bound buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import RuntimeFailure
from edge_llm.manifest import Manifest
from edge_llm.runtime.kv_cache import KVCache
from edge_llm.runtime.session import import_onnxruntime, onnxruntime_errors

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["Decoder", "Interrupted"]


_CHECK = "Check the files with `edge-llm info --verify`, or export the bundle again."


class Interrupted(Exception):  # noqa: N818 - no error: somebody asked for it
    """A step was ended by :meth:`Decoder.interrupt`; the cache is as it was before the step."""


class Decoder:
    """Feeds tokens to the graph and gives logits, in buffers that are allocated once.

    Inputs and outputs are bound once and stay bound; a step writes the new tokens and lengths into
    the bound memory. Binding again is needed only when the number of tokens changes, as between
    the chunks of a prompt and the first token of the answer.

    Args:
        session: The graph.
        manifest: The bundle's manifest.
        cache: The state that the graph reads and writes.
    """

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, cache: KVCache) -> None:
        self._ort = import_onnxruntime()
        self._session = session
        self._options = self._ort.RunOptions()
        self._binding = session.io_binding()
        self._vocab = manifest.dims.vocab
        self.cache = cache
        self._tokens = np.zeros((1, 0), np.int64)
        self._query_lens = np.zeros(1, np.int32)
        self._seqlens_k = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._index = np.zeros(0, np.int64)
        self._logits = np.zeros((1, self._vocab), np.float32)
        self._bound: tuple[int, int] | None = None
        # OrtValues only point at numpy's memory, so both are kept alive here.
        self._values: dict[str, Any] = {}
        for name, array in (
            ("query_lens", self._query_lens),
            ("seqlens_k", self._seqlens_k),
            ("total_sequence_length", self._total),
        ):
            self._bind(name, array)
        for state in manifest.decoder.state:
            try:
                self._bind(state.input, cache.buffers[state.input], output=state.output)
            except onnxruntime_errors() as error:
                raise RuntimeFailure(
                    f"The graph has no state {state.input!r} like the manifest's: {error}", _CHECK
                ) from error

    def step(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        """Append tokens to the sequence and give the logits of the last ``scored`` of them.

        Args:
            tokens: New tokens, at least one; they must fit into the cache.
            scored: Rows of logits to compute, from 0 to the number of tokens.

        Returns:
            float32 [scored, vocab]: a view of a buffer that the next step overwrites.

        Raises:
            Interrupted: :meth:`interrupt` was called.
            RuntimeFailure: ONNX Runtime failed.
        """
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
            self._session.run_with_iobinding(self._binding, self._options)
        except onnxruntime_errors() as error:
            if self._options.terminate:
                raise Interrupted from None
            raise RuntimeFailure(f"ONNX Runtime failed in a step: {error}", _CHECK) from error
        self.cache.lengths[0] = past + count
        return self._logits[:scored]

    def interrupt(self) -> None:
        """End the running step between two of its operators, and every later one; any thread."""
        self._options.terminate = True

    def resume(self) -> None:
        """Allow steps again."""
        self._options.terminate = False

    def _resize(self, count: int, scored: int) -> None:
        """Bind inputs and outputs of this size, where the last step had another."""
        if self._bound == (count, scored):
            return
        self._tokens = np.zeros((1, count), np.int64)
        self._bind("input_ids", self._tokens)
        self._index = np.arange(count - scored, count, dtype=np.int64)
        self._bind("logits_index", self._index)
        if scored > len(self._logits):
            self._logits = np.zeros((scored, self._vocab), np.float32)
        self._bind_output("logits", self._logits[:scored])
        self._bound = (count, scored)

    def _bind(self, name: str, array: NDArray[Any], *, output: str = "") -> None:
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        self._values[name] = value
        self._binding.bind_ortvalue_input(name, value)
        if output:
            self._binding.bind_ortvalue_output(output, value)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        self._values[name] = value
        self._binding.bind_ortvalue_output(name, value)
