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

__all__ = ["most_rows", "open_decoder"]

_ONE_ROW: dict[str, Callable[..., Decoder]] = {
    "standard.v1": StandardDecoder,
    "genai.v1": GenaiDecoder,
}


def most_rows(manifest: Manifest, limit: int) -> int:
    """Sequences that a graph's layout can hold at once, up to a limit."""
    return limit if manifest.decoder.layout == "edge_llm.v1" else 1


def open_decoder(
    session: ort.InferenceSession, manifest: Manifest, *, capacity: int, rows: int = 1
) -> Decoder:
    """Make the decoder of a graph.

    Args:
        session: The graph.
        manifest: The bundle's manifest, which names the layout and lists the state.
        capacity: Most tokens of a sequence.
        rows: Sequences to hold at once, at most :func:`most_rows`.

    Raises:
        RuntimeFailure: The graph is not what the manifest says.
        ArgumentError: There is no memory for this capacity.
    """
    if manifest.decoder.layout == "edge_llm.v1":
        return OwnDecoder(session, manifest, capacity=capacity, rows=rows)
    assert rows == 1
    return _ONE_ROW[manifest.decoder.layout](session, manifest, capacity=capacity)
