"""Writing a bundle's graph and weights."""

from __future__ import annotations

from collections.abc import Callable

from edge_llm.writer import FolderWriter

from .graph.decoder import GRAPH_FILE
from .graph.recorder import GraphRecorder

__all__ = ["BundleWriter"]

DATA_FILE = f"{GRAPH_FILE}.data"

# Memory maps start at multiples of the allocation granularity, 64 KiB on Windows; small tensors
# share a map's start, so they need no more than a cache line's alignment.
ALIGNMENT = 64


class BundleWriter(FolderWriter):
    """Writes the files of one bundle into a folder and remembers their sizes and hashes."""

    def write_graph(
        self, graph: GraphRecorder, *, producer: str, on_bytes: Callable[[int], None]
    ) -> None:
        """Compute the weights one after the other, write them, then the graph that points there.

        Args:
            graph: The recorded graph.
            producer: Version to record in the graph.
            on_bytes: Called with the number of bytes just written.
        """
        offsets: dict[str, int] = {}
        with self.create(DATA_FILE) as stream:
            for group in graph.deferred:
                for info, rows in zip(group.tensors, group.compute(), strict=True):
                    stream.write(b"\0" * (-stream.position % ALIGNMENT))
                    offsets[info.name] = stream.position
                    for array in rows:
                        assert array.dtype == info.dtype, info.name
                        stream.write(array.data.cast("B"))
                        on_bytes(array.nbytes)
                    assert stream.position - offsets[info.name] == info.size, info.name
        model = graph.model(DATA_FILE, offsets, producer)
        self.write(GRAPH_FILE, model.SerializeToString(deterministic=True))
