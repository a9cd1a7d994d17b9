"""Calibrated quantization, one layer's graph, weights and statistics at a time.

Two streams of activations go through the model side by side: the float32 model's own, and what the
quantized parts give. A layer's projections are quantized one after the other, each for the inputs
that it has behind all those before it, and takes back a share of what these changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..graph.linear import Calibrated
from ..graph.matrices import checkpoint_names
from ..graph.parts import Part, Projection, build_embedding, build_head, build_layer
from .calibration import Calibration
from .gptq import GPTQMatrix, factorize_each, row_losses
from .inputs import InputSums, solve_correction, sum_inputs
from .session import PartSession
from .shelf import Shelf, ShelvedMatrix
from .storage import FLOAT32, QuantizedMatrix, Storage

__all__ = ["Candidates", "calibrate"]

# The least damping of a tied head. In an embedding's row every element counts the same, which is
# what damping stands for; with 0 or 3 a small model of books loses 2 % or 12 % more.
TIED_DAMPING = 0.3

# What the rest of a layer is stored as while one matrix' error is measured: the error of 8 bits is
# a three-hundredth of that of 4, and they are faster than floats.
NEARLY_FLOAT = Storage(8, 32)

# Windows on which those errors are measured.
ERROR_WINDOWS = 8


@dataclass(frozen=True, slots=True)
class Candidates:
    """One matrix, quantized in one or more ways.

    Attributes:
        matrices: Each of them, by its storage.
        error: By how much the layer's output is wrong with the first of them, all else in 8 bits:
            mean square, as a share of the output's. 1 for a head, and where it was not asked for.
        tensors: What it is made from, by their names in the checkpoint.
    """

    matrices: Mapping[Storage, ShelvedMatrix]
    error: float
    tensors: tuple[str, ...]

    @property
    def first(self) -> ShelvedMatrix:
        """That which the layers behind it are calibrated for."""
        return next(iter(self.matrices.values()))


def calibrate(
    spec: DecoderSpec,
    weights: Weights,
    windows: NDArray[np.int64],
    *,
    ways: Callable[[str], Sequence[Storage]],
    embedding: Sequence[QuantizedMatrix],
    context: int,
    calibration: Calibration,
    folder: Path,
    minimum: str,
    report: Callable[[int, int], None],
    errors: bool = False,
) -> dict[str, Candidates]:
    """Quantize projections and the head by GPTQ.

    Args:
        spec: The architecture.
        weights: The checkpoint.
        windows: Tokens to calibrate on, int64 [windows, tokens].
        ways: As which blocks of 4- or 8-bit integers a matrix is quantized, by its name in the
            graph; all that is behind it is calibrated for what it gives as the first of them. A
            head may be quantized in none.
        embedding: What the layers read, as matrices below one another.
        context: Longest sequence of the bundle.
        calibration: How to quantize.
        folder: Where matrices are kept; what is there already is not computed again.
        minimum: Oldest version of onnxruntime that has the graph's operators.
        report: Called with the layers done and all.
        errors: Whether to measure what each matrix does to its layer's output.

    Returns:
        The matrices, by the name of their weight in the graph.
    """
    work = _Work(folder, ways, calibration, minimum)
    found: dict[str, Candidates] = {}
    report(0, spec.layers)

    def embed(storage: Storage, calibrated: Calibrated) -> NDArray[np.float32]:
        part = build_embedding(
            spec, weights, storage=storage, context=context, calibrated=calibrated
        )
        with PartSession(part, minimum) as session:
            return session.run(windows)

    def layer(index: int, storage: Storage, calibrated: Calibrated) -> Part:
        return build_layer(
            spec, weights, index, storage=storage, context=context, calibrated=calibrated
        )

    stream = embed(NEARLY_FLOAT, {"embed_tokens": embedding})
    exact = embed(FLOAT32, {}) if calibration.correction else None
    for i in range(spec.layers):
        quantized = work.quantize(
            partial(layer, i, FLOAT32), exact, stream, calibration.damping, calibration.correction
        )
        if errors:
            quantized = work.measure(partial(layer, i, NEARLY_FLOAT), quantized, stream)
        found |= quantized
        stream = work.run(layer(i, FLOAT32, _first(quantized)), stream)
        exact = None if exact is None else work.run(layer(i, FLOAT32, {}), exact)
        report(i + 1, spec.layers)
    damping, correction = calibration.damping, calibration.correction
    if spec.tied:
        # What would be true to a head behind wrong layers would be a wrong embedding.
        damping, correction, exact = max(damping, TIED_DAMPING), 0.0, None
    head = build_head(spec, weights)
    return found | work.quantize(lambda done: head, exact, stream, damping, correction)


def _first(candidates: Mapping[str, Candidates]) -> Calibrated:
    return {name: (one.first,) for name, one in candidates.items()}


@dataclass(frozen=True, slots=True)
class _Work:
    """What stays the same from layer to layer."""

    folder: Path
    ways: Callable[[str], Sequence[Storage]]
    calibration: Calibration
    minimum: str

    def quantize(
        self,
        build: Callable[[Calibrated], Part],
        exact: NDArray[np.float32] | None,
        stream: NDArray[np.float32],
        damping: float,
        correction: float,
    ) -> dict[str, Candidates]:
        """Quantize a part's projections, input by input, those that are not on the shelf.

        Args:
            build: Makes the part, in which nothing but what it is given is quantized.
            exact: What it reads in the float32 model; None: nothing is corrected.
            stream: What it reads.
            damping: Of the inputs' moments.
            correction: Share of the correction that is made.
        """
        part = build({})
        found: dict[str, Candidates] = {}
        wanted = {name: one for name, one in part.projections.items() if self.ways(name)}
        if all(self._stored(name, one) for name, one in wanted.items()):
            return {name: self._candidates(name, one) for name, one in wanted.items()}
        for source in dict.fromkeys(one.input for one in wanted.values()):
            group = {name: one for name, one in wanted.items() if one.input == source}
            missing = {name: one for name, one in group.items() if not self._stored(name, one)}
            if missing:
                sums = self._sum(part, build(_first(found)), exact, stream, missing, source)
                self._round(missing, sums, damping, correction)
            found |= {name: self._candidates(name, one) for name, one in group.items()}
        return found

    def _sum(
        self,
        plain: Part,
        quantized: Part,
        exact: NDArray[np.float32] | None,
        stream: NDArray[np.float32],
        missing: Mapping[str, Projection],
        source: str,
    ) -> InputSums:
        """Sums over an input of some projections, as far as they are known to be needed."""
        streams = {one.added for one in missing.values() if one.added}
        until = {source, *streams}
        changed = PartSession(quantized, self.minimum, until=until)
        true = nullcontext() if exact is None else PartSession(plain, self.minimum, until=until)
        with changed as session, true as original:
            return sum_inputs(original, session, exact, stream, source=source, streams=streams)

    def _candidates(self, name: str, one: Projection) -> Candidates:
        return Candidates(self._stored(name, one), 1.0, tuple(checkpoint_names(one.matrix)))

    def _stored(self, name: str, one: Projection) -> dict[Storage, ShelvedMatrix]:
        """The matrix from the shelves; nothing where one of them does not have it."""
        found = {}
        for storage in self.ways(name):
            matrix = self._shelf(storage).get(name, one.matrix.shape, storage)
            if matrix is None:
                return {}
            found[storage] = matrix
        return found

    def _round(
        self,
        projections: Mapping[str, Projection],
        sums: InputSums,
        damping: float,
        correction: float,
    ) -> None:
        """Correct and quantize projections of one input."""
        correct = solve_correction(sums, damping=damping, share=correction)
        moments = (sums.moments / sums.tokens).astype(np.float32)
        feedback = factorize_each(
            sums.moments,
            {storage.block for name in projections for storage in self.ways(name) if storage.block},
            damping=damping,
            act_order=self.calibration.act_order,
        )
        for name, one in projections.items():
            matrix = correct.apply(one.matrix, one.added) if correct else one.matrix
            for storage in self.ways(name):
                assert storage.block is not None
                self._shelf(storage).put(
                    name,
                    GPTQMatrix(matrix, storage, feedback[storage.block], self.calibration.rounds),
                    partial(row_losses, matrix, moments),
                )

    def _shelf(self, storage: Storage) -> Shelf:
        folder = self.folder / str(storage)
        folder.mkdir(exist_ok=True)
        return Shelf(folder)

    def measure(
        self,
        build: Callable[[Calibrated], Part],
        candidates: Mapping[str, Candidates],
        stream: NDArray[np.float32],
    ) -> dict[str, Candidates]:
        """The candidates with what the layer's output loses by each alone, on a few windows."""
        some = stream[:: -(-len(stream) // ERROR_WINDOWS)]
        true = self.run(build({}), some).astype(np.float64)
        energy = np.square(true).sum(axis=-1)
        found = {}
        for name, one in candidates.items():
            wrong = self.run(build(_first({name: one})), some) - true
            error = float((np.square(wrong).sum(axis=-1) / energy).mean())
            found[name] = replace(one, error=error)
        return found

    def run(self, part: Part, source: NDArray[np.float32]) -> NDArray[np.float32]:
        """The stream behind a part."""
        with PartSession(part, self.minimum) as session:
            return session.run(source)
