"""Which decoder runs which layout of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edge_llm.manifest import Manifest
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.genai_layout import GenaiDecoder
from edge_llm.runtime.own_layout import OwnDecoder
from edge_llm.runtime.standard_layout import StandardDecoder

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["open_decoder"]

_DECODERS: dict[str, Callable[..., Decoder]] = {
    "edge_llm.v1": OwnDecoder,
    "standard.v1": StandardDecoder,
    "genai.v1": GenaiDecoder,
}


def open_decoder(session: ort.InferenceSession, manifest: Manifest, *, capacity: int) -> Decoder:
    """Make the decoder of a graph, with a cache of one sequence.

    Args:
        session: The graph.
        manifest: The bundle's manifest, which names the layout and lists the state.
        capacity: Most tokens of the sequence.

    Raises:
        RuntimeFailure: The graph is not what the manifest says.
        ArgumentError: There is no memory for this capacity.
    """
    return _DECODERS[manifest.decoder.layout](session, manifest, capacity=capacity)
