"""Calibrated quantization, one layer's graph, weights and statistics at a time.

A layer runs in float32 on what the quantized layers before it give; its projections are quantized
for the inputs that they had; then it runs again, quantized, for the next layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.runtime.device import usable_cores
from edge_llm.runtime.kv_cache import state_capacity
from edge_llm.runtime.session import create_session

from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..graph.decoder import GRAPH_FILE
from ..graph.matrices import checkpoint_names
from ..graph.parts import Part, build_embedding, build_head, build_layer
from ..writer import BundleWriter
from .calibration import Calibration
from .gptq import Feedback, GPTQMatrix, factorize, row_losses
from .shelf import Shelf, ShelvedMatrix
from .storage import FLOAT32, Storage

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["Candidates", "calibrate"]

# Tokens that run at once: their activations are in memory, and each product of them is exact
# enough in float32 to be summed up in float64.
TOKENS_AT_ONCE = 2048

# The least damping of a tied head. In an embedding's row every element counts the same, which is
# what damping stands for; with 0 or 3 a small model of books loses 2 % or 12 % more.
TIED_DAMPING = 0.3

# What the rest of a layer is stored as while one matrix' error is measured: the error of 8 bits is
# a three-hundredth of that of 4, and they are faster than floats.
NEARLY_FLOAT = Storage(8, 32)

# Windows on which those errors are measured.
ERROR_WINDOWS = 8

Moments = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Candidates:
    """One matrix, quantized in several ways.

    Attributes:
        matrices: As many as there are storages, in their order.
        error: By how much the layer's output is wrong with the first of them, all else in 8 bits:
            mean square, as a share of the output's. 1 for a head, and with one storage.
        tensors: What it is made from, by their names in the checkpoint.
    """

    matrices: tuple[ShelvedMatrix, ...]
    error: float
    tensors: tuple[str, ...]


def calibrate(
    spec: DecoderSpec,
    weights: Weights,
    windows: NDArray[np.int64],
    *,
    storages: Sequence[Storage],
    vocabulary: Storage,
    head: Sequence[Storage],
    context: int,
    calibration: Calibration,
    folder: Path,
    minimum: str,
    report: Callable[[str, int, int], None],
) -> dict[str, Candidates]:
    """Quantize every projection and the head by GPTQ; an untied embedding is left out.

    Args:
        spec: The architecture.
        weights: The checkpoint.
        windows: Tokens to calibrate on, int64 [windows, tokens].
        storages: Blocks of 4- or 8-bit integers; the layers behind one are calibrated for what it
            gives in the first of them.
        vocabulary: How the embedding is stored.
        head: As which blocks of integers the head is quantized.
        context: Longest sequence of the bundle.
        calibration: How to quantize.
        folder: Where matrices are kept; what is there already is not computed again.
        minimum: Oldest version of onnxruntime that has the graph's operators.
        report: Called with a phase, the layers done and all.

    Returns:
        The matrices, by the name of their weight in the graph.
    """
    state = _Work(windows, folder, calibration, minimum)
    found: dict[str, Candidates] = {}
    report("calibrating", 0, spec.layers)

    def layer(index: int, storage: Storage, calibrated: Mapping[str, ShelvedMatrix]) -> Part:
        parts = {name: (matrix,) for name, matrix in calibrated.items()}
        return build_layer(spec, weights, index, storage=storage, context=context, calibrated=parts)

    embedding = build_embedding(spec, weights, storage=vocabulary, context=context)
    stream = state.run(embedding, windows)
    for i in range(spec.layers):
        part = layer(i, FLOAT32, {})
        matrices = state.quantize(part, storages, stream, calibration.damping)
        first = {name: some[0] for name, some in matrices.items()}
        errors = dict.fromkeys(matrices, 1.0)
        if len(storages) > 1:
            errors = state.errors(partial(layer, i, NEARLY_FLOAT), first, stream)
        found |= _candidates(part, matrices, errors)
        stream = state.run(layer(i, storages[0], first), stream)
        report("calibrating", i + 1, spec.layers)
    if head:
        damping = max(calibration.damping, TIED_DAMPING) if spec.tied else calibration.damping
        part = build_head(spec, weights)
        matrices = state.quantize(part, head, stream, damping)
        found |= _candidates(part, matrices, dict.fromkeys(matrices, 1.0))
    return found


def _candidates(
    part: Part, matrices: Mapping[str, tuple[ShelvedMatrix, ...]], errors: Mapping[str, float]
) -> dict[str, Candidates]:
    return {
        name: Candidates(some, errors[name], tuple(checkpoint_names(part.projections[name].matrix)))
        for name, some in matrices.items()
    }


@dataclass(frozen=True, slots=True)
class _Work:
    """What stays the same from layer to layer."""

    windows: NDArray[np.int64]
    folder: Path
    calibration: Calibration
    minimum: str

    def quantize(
        self, part: Part, storages: Sequence[Storage], stream: NDArray[np.float32], damping: float
    ) -> dict[str, tuple[ShelvedMatrix, ...]]:
        """Quantize a float32 part's projections, those that are not on the shelves."""
        shelves = [(one, self._shelf(one)) for one in storages]
        missing = [
            (name, storage, shelf)
            for storage, shelf in shelves
            for name, one in part.projections.items()
            if shelf.get(name, one.matrix.shape, storage) is None
        ]
        inputs = {part.projections[name].input for name, _, _ in missing}
        moments = self._moments(part, stream, inputs) if missing else {}
        feedback: dict[tuple[str, int], Feedback] = {}
        for name, storage, shelf in missing:
            one, block = part.projections[name], storage.block
            assert block is not None
            if (one.input, block) not in feedback:
                feedback[one.input, block] = factorize(
                    moments[one.input],
                    block=block,
                    damping=damping,
                    act_order=self.calibration.act_order,
                )
            matrix = GPTQMatrix(one.matrix, storage, feedback[one.input, block])
            second = (moments[one.input] / stream[..., 0].size).astype(np.float32)
            shelf.put(name, matrix, partial(row_losses, one.matrix, second))
        return {
            name: tuple(
                stored
                for storage, shelf in shelves
                if (stored := shelf.get(name, one.matrix.shape, storage))
            )
            for name, one in part.projections.items()
        }

    def _shelf(self, storage: Storage) -> Shelf:
        folder = self.folder / str(storage)
        folder.mkdir(exist_ok=True)
        return Shelf(folder)

    def errors(
        self,
        build: Callable[[Mapping[str, ShelvedMatrix]], Part],
        matrices: Mapping[str, ShelvedMatrix],
        stream: NDArray[np.float32],
    ) -> dict[str, float]:
        """What the layer's output loses by each matrix alone, on a part of the windows."""
        some = stream[:: -(-len(stream) // ERROR_WINDOWS)]
        true = self.run(build({}), some).astype(np.float64)
        energy = np.square(true).sum(axis=-1)
        return {
            name: float(
                (np.square(self.run(build({name: one}), some) - true).sum(-1) / energy).mean()
            )
            for name, one in matrices.items()
        }

    def run(
        self, part: Part, source: NDArray[np.int64] | NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The stream behind a part."""
        with _Session(part, self.minimum) as session:
            steps = (session.step(rows, [part.output])[0] for rows in self._batches(source))
            return np.concatenate(list(steps))

    def _moments(self, part: Part, stream: NDArray[np.float32], inputs: set[str]) -> Moments:
        """``X^T X`` of some inputs of projections, float64 [columns, columns]."""
        names = sorted(inputs)
        sums: Moments = {}
        with _Session(part, self.minimum) as session:
            for rows in self._batches(stream):
                for name, values in zip(names, session.step(rows, names), strict=True):
                    flat = values.reshape(-1, values.shape[-1])
                    product = flat.T @ flat
                    if name in sums:
                        sums[name] += product
                    else:
                        sums[name] = product.astype(np.float64)
        return sums

    def _batches(
        self, source: NDArray[np.int64] | NDArray[np.float32]
    ) -> Iterator[NDArray[np.int64] | NDArray[np.float32]]:
        step = max(1, TOKENS_AT_ONCE // source.shape[1])
        for start in range(0, len(source), step):
            yield source[start : start + step]


class _Session:
    """A part's session, whose files are gone when the block ends."""

    def __init__(self, part: Part, minimum: str) -> None:
        self._part = part
        self._minimum = minimum
        self._folder = tempfile.TemporaryDirectory(prefix="edge-llm-")

    def __enter__(self) -> _Session:
        folder = Path(self._folder.name)
        writer = BundleWriter(folder)
        writer.write_graph(self._part.graph, producer="calibration", on_bytes=lambda size: None)
        self._session: ort.InferenceSession = create_session(
            folder / GRAPH_FILE, threads=usable_cores(), minimum=self._minimum
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self._session
        self._folder.cleanup()

    def step(
        self, rows: NDArray[np.int64] | NDArray[np.float32], outputs: list[str]
    ) -> list[NDArray[np.float32]]:
        """Feed whole sequences, on an empty past."""
        batch, tokens = rows.shape[:2]
        feeds = {
            self._part.input: rows,
            "query_lens": np.full(batch, tokens, np.int32),
            "seqlens_k": np.full(batch, tokens - 1, np.int32),
            "total_sequence_length": np.array(tokens, np.int32),
        }
        for one in self._part.state:
            sizes = {"batch": batch, "capacity": state_capacity(one, tokens)}
            shape = [sizes[size] if isinstance(size, str) else size for size in one.shape]
            feeds[one.input] = np.zeros(shape, np.float32)
        results: list[NDArray[np.float32]] = self._session.run(outputs, feeds)
        return results
