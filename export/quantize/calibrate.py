"""Calibrated quantization, one layer's graph, weights and statistics at a time.

Two streams of activations go through the model side by side: the float32 model's own, and what the
quantized parts give. A layer's projections are quantized one after the other, each for the inputs
that it has behind all those before it, and takes back a share of what these changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..graph.linear import Calibrated
from ..graph.parts import Part, Projection, build_embedding, build_head, build_layer
from .calibration import Calibration
from .gptq import GPTQMatrix, factorize
from .inputs import InputSums, solve_correction, sum_inputs
from .session import PartSession
from .shelf import Shelf, ShelvedMatrix
from .storage import FLOAT32, Storage

__all__ = ["calibrate"]

# The least damping of a tied head. In an embedding's row every element counts the same, which is
# what damping stands for; with 0 or 3 a small model of books loses 2 % or 12 % more.
TIED_DAMPING = 0.3


def calibrate(
    spec: DecoderSpec,
    weights: Weights,
    windows: NDArray[np.int64],
    *,
    storage: Storage,
    context: int,
    calibration: Calibration,
    folder: Path,
    minimum: str,
    report: Callable[[str, int, int], None],
) -> dict[str, ShelvedMatrix]:
    """Quantize every projection and the head by GPTQ; an untied embedding is rounded to nearest.

    Args:
        spec: The architecture.
        weights: The checkpoint.
        windows: Tokens to calibrate on, int64 [windows, tokens].
        storage: Blocks of 4- or 8-bit integers.
        context: Longest sequence of the bundle.
        calibration: How to quantize.
        folder: Where matrices are kept; what is there already is not computed again.
        minimum: Oldest version of onnxruntime that has the graph's operators.
        report: Called with a phase, the layers done and all.

    Returns:
        The matrices, by the name of their weight in the graph.
    """
    work = _Work(Shelf(folder), storage, calibration, minimum)
    found: dict[str, ShelvedMatrix] = {}
    report("calibrating", 0, spec.layers)

    def embed(storage: Storage) -> NDArray[np.float32]:
        part = build_embedding(spec, weights, storage=storage, context=context)
        with PartSession(part, minimum) as session:
            return session.run(windows)

    exact, stream = embed(FLOAT32), embed(storage)
    for i in range(spec.layers):

        def layer(done: Calibrated, index: int = i) -> Part:
            return build_layer(
                spec, weights, index, storage=FLOAT32, context=context, calibrated=done
            )

        found |= work.quantize(layer, exact, stream, calibration.damping, calibration.correction)
        exact, stream = work.run(layer({}), exact), work.run(layer(found), stream)
        report("calibrating", i + 1, spec.layers)
    damping, correction = calibration.damping, calibration.correction
    if spec.tied:
        # What would be true to a head behind wrong layers would be a wrong embedding.
        damping, correction = max(damping, TIED_DAMPING), 0.0
    head = build_head(spec, weights)
    return found | work.quantize(lambda done: head, exact, stream, damping, correction)


@dataclass(frozen=True, slots=True)
class _Work:
    """What stays the same from layer to layer."""

    shelf: Shelf
    storage: Storage
    calibration: Calibration
    minimum: str

    def quantize(
        self,
        build: Callable[[Calibrated], Part],
        exact: NDArray[np.float32],
        stream: NDArray[np.float32],
        damping: float,
        correction: float,
    ) -> dict[str, ShelvedMatrix]:
        """Quantize a part's projections, input by input, those that are not on the shelf.

        Args:
            build: Makes the part, in which nothing but what it is given is quantized.
            exact: What it reads in the float32 model.
            stream: What it reads.
            damping: Of the inputs' moments.
            correction: Share of the correction that is made.
        """
        part = build({})
        found = {
            name: stored
            for name, one in part.projections.items()
            if (stored := self.shelf.get(name, one.matrix.shape, self.storage))
        }
        if len(found) == len(part.projections):
            return found
        with PartSession(part, self.minimum) as plain:
            for source in dict.fromkeys(one.input for one in part.projections.values()):
                group = {n: one for n, one in part.projections.items() if one.input == source}
                missing = {name: one for name, one in group.items() if name not in found}
                if not missing:
                    continue
                streams = {one.added for one in missing.values() if one.added}
                with PartSession(build(found), self.minimum) as quantized:
                    sums = sum_inputs(
                        plain, quantized, exact, stream, source=source, streams=streams
                    )
                found |= self._round(missing, sums, damping, correction)
        return found

    def _round(
        self,
        projections: Mapping[str, Projection],
        sums: InputSums,
        damping: float,
        correction: float,
    ) -> dict[str, ShelvedMatrix]:
        """Correct and quantize projections of one input."""
        act_order, block = self.calibration.act_order, self.storage.block
        assert block is not None
        feedback = factorize(sums.moments, block=block, damping=damping, act_order=act_order)
        correct = solve_correction(sums, damping=damping, share=correction)
        return {
            name: self.shelf.put(
                name, GPTQMatrix(correct.apply(one.matrix, one.added), self.storage, feedback)
            )
            for name, one in projections.items()
        }

    def run(self, part: Part, source: NDArray[np.float32]) -> NDArray[np.float32]:
        """The stream behind a part."""
        with PartSession(part, self.minimum) as session:
            return session.run(source)
