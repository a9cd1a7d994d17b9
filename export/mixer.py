"""Mixed precision by measurement: mixes are written as bundles and compared with the original."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .evaluate.divergence import Reference
from .graph.matrices import checkpoint_names
from .quantize.alternatives import alternatives, token_weights
from .quantize.budget import Budget, Found, Trial, find_mix
from .quantize.calibrate import Candidates
from .quantize.mixing import CHOICES, Mix
from .quantize.runs import CalibrationRuns
from .quantize.selection import Selection, Write
from .quantize.storage import FLOAT32, QuantizedMatrix, Storage

__all__ = ["Mixer"]

# Bytes of the last manifest that those of the trials lack: what was tried, and the quality.
RESERVE = 8192

# How many mixes are measured as a rule, for the progress bar.
EXPECTED_TRIALS = 4


@dataclass(frozen=True, slots=True)
class Mixer:
    """Finds the mix that meets a budget.

    Attributes:
        runs: Quantizes.
        budget: The limit.
        write: Writes a bundle with some matrices into an empty folder.
        scratch: An empty folder on a disk with room for bundles.
        report: Called with a phase, the work done and the whole work.
    """

    runs: CalibrationRuns
    budget: Budget
    write: Write
    scratch: Path
    report: Callable[[str, int, int], None]

    def find(self, windows: NDArray[np.int64]) -> Selection:
        """The mix that meets the budget on some windows, on none of which it is calibrated.

        Args:
            windows: int64 [windows, tokens].

        Raises:
            ArgumentError: There is none.
        """
        candidates = self.runs.all_choices()
        reference = self._reference(windows)
        vocabularies = self.runs.vocabularies
        frequencies = token_weights(self.runs.windows, self.runs.spec.vocab)
        options = alternatives(candidates, vocabularies, frequencies)
        tried = 0

        def measure(mix: Mix) -> Trial:
            nonlocal tried
            tried += 1
            self.report("measuring mixes", tried, max(tried, EXPECTED_TRIALS))
            return self._measure(reference, mix, candidates)

        def finish(mix: Mix) -> Mix:
            matrices = self.runs.of_mix(mix)
            return {name: replace(one, matrices=matrices[name]) for name, one in mix.items()}

        layers = [name for name in options if name not in vocabularies]
        found = find_mix(
            options,
            [layers, *([name] for name in vocabularies)],
            self.budget,
            weights=self._elements(candidates),
            measure=measure,
            finish=finish,
            reserve=RESERVE,
        )
        return self._selection(found, candidates)

    def _reference(self, windows: NDArray[np.int64]) -> Reference:
        folder = self.scratch / "original"
        self.report("original", 0, 1)
        self._write(Selection(FLOAT32), folder)
        reference = Reference.of(folder, windows, self.scratch / "logits.npy")
        shutil.rmtree(folder)
        self.report("original", 1, 1)
        return reference

    def _measure(self, reference: Reference, mix: Mix, candidates: dict[str, Candidates]) -> Trial:
        folder = self.scratch / "trial"
        self._write(self._selected(mix, candidates), folder)
        distance = reference.distance(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
        weights = sum(one.size for one in mix.values())
        return Trial(size=size, weights=weights, **asdict(distance))

    def _write(self, selection: Selection, folder: Path) -> None:
        folder.mkdir()
        self.write(selection, folder)

    def _selection(self, found: Found, candidates: dict[str, Candidates]) -> Selection:
        trial = found.trials[-1]
        limit, value = self.budget.limit
        info = {
            "budget": {limit: value},
            "bits_per_weight": trial.weights * 8 / self._elements(candidates),
            "measured": asdict(trial),
            "tried": [asdict(one) for one in found.trials[:-1]],
        }
        return replace(self._selected(found.mix, candidates), info={"mix": info})

    def _selected(self, mix: Mix, candidates: dict[str, Candidates]) -> Selection:
        vocabularies = self.runs.vocabularies
        others: dict[str, Storage] = {}
        for name, option in mix.items():
            tensors: Sequence[str] = (
                checkpoint_names(vocabularies[name])
                if name in vocabularies
                else candidates[name].tensors
            )
            others |= dict(_exceptions(tensors, option.matrices))
        matrices = {name: option.matrices for name, option in mix.items()}
        return Selection(CHOICES[0], matrices, others, windows=self.runs.windows)

    def _elements(self, candidates: dict[str, Candidates]) -> int:
        """Weights of all matrices."""
        shapes = {name: one.first.shape for name, one in candidates.items()}
        shapes |= {name: one.shape for name, one in self.runs.vocabularies.items()}
        return sum(map(prod, shapes.values()))


def _exceptions(
    tensors: Sequence[str], matrices: Sequence[QuantizedMatrix]
) -> Iterator[tuple[str, Storage]]:
    """Names of tensors, or of rows of them, that are not stored as most are."""
    start = 0
    for one in matrices:
        stop = start + one.shape[0]
        rows = f"[{start}:{stop}]" if len(matrices) > 1 else ""
        if one.storage != CHOICES[0]:
            yield from ((f"{tensor}{rows}", one.storage) for tensor in tensors)
        start = stop
