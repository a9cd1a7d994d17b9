"""Steps of a graph that onnxruntime-genai's builder made (layout "genai.v1")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_llm.manifest import Manifest
from edge_llm.runtime.kv_cache import KVCache
from edge_llm.runtime.masked_layout import MaskedDecoder

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["GenaiDecoder"]


class GenaiDecoder(MaskedDecoder):
    """A :class:`MaskedDecoder` on one shared buffer per state tensor, updated in place.

    The graph takes each row's length from the mask, so the buffers stay bound for ever.

    Args:
        session: The graph.
        manifest: The folder's manifest.
        capacity: Most tokens of the sequence.

    Raises:
        RuntimeFailure: The graph is not what the manifest says.
        ArgumentError: There is no memory for this capacity.
    """

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, *, capacity: int) -> None:
        state = manifest.decoder.state
        cache = KVCache(state, rows=1, capacity=capacity)
        super().__init__(session, manifest, cache)
        for one in state:
            self.graph.bind(one.input, cache.buffers[one.input], output=one.output)
