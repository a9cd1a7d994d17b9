"""Runs of GPTQ through a model, each for another storage of its matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..graph.matrices import Matrix
from .alternatives import vocabularies
from .calibrate import Candidates, calibrate
from .calibration import Calibration
from .mixing import CHOICES, Mix, Option
from .selection import Selection
from .storage import QuantizedMatrix, RoundedMatrix, RowRange, Storage
from .work import matrices_folder

__all__ = ["CalibrationRuns"]

SEARCH_ROUNDS, SEARCH_STEP = 1, 2
"""Of coordinate descent on matrices that are tried, and of how many windows they see one."""


@dataclass(frozen=True, slots=True)
class CalibrationRuns:
    """Runs of GPTQ through a model.

    Attributes:
        spec: The architecture.
        weights: The checkpoint.
        windows: Tokens to calibrate on, int64 [windows, tokens].
        calibration: How to quantize.
        context: Longest sequence of the bundle.
        work: The work folder.
        minimum: Oldest version of onnxruntime that has the graph's operators.
        report: Called with a phase, the layers done and all.
    """

    spec: DecoderSpec
    weights: Weights
    windows: NDArray[np.int64]
    calibration: Calibration
    context: int
    work: Path
    minimum: str
    report: Callable[[str, int, int], None]

    @property
    def vocabularies(self) -> dict[str, Matrix]:
        """The embedding and the head."""
        return vocabularies(self.spec, self.weights)

    def one_storage(self, storage: Storage, vocabulary: Storage) -> Selection:
        """All matrices in one storage; a vocabulary in another one is not calibrated."""
        rounded = () if vocabulary == storage else self.vocabularies.keys()
        found = self._run(
            "calibrating",
            lambda name: () if name in rounded else (storage,),
            self._rounded(vocabulary),
            decided=(storage, vocabulary),
        )
        return Selection(storage, {name: (one.first,) for name, one in found.items()})

    def all_choices(self) -> dict[str, Candidates]:
        """Every matrix in each storage that a mix may choose, a vocabulary in those of 4 bits.

        Nothing that is wrong with one matrix is corrected by another, so that any may be mixed.
        """
        narrow, wide = CHOICES[:-1], CHOICES[-1]
        names = self.vocabularies
        return self._run(
            "trying storages",
            lambda name: narrow if name in names else CHOICES,
            self._rounded(wide),
            windows=self.windows[::SEARCH_STEP],
            decided=CHOICES,
            # Enough to choose by; what is chosen is calibrated again.
            calibration=replace(self.calibration, correction=0.0, rounds=SEARCH_ROUNDS),
            errors=True,
        )

    def of_mix(self, mix: Mix) -> dict[str, tuple[QuantizedMatrix, ...]]:
        """The matrices of a mix, each calibrated for what those in front of it give."""
        storages = {
            name: tuple(dict.fromkeys(part.storage for part in option.matrices))
            for name, option in mix.items()
        }
        found = self._run(
            "calibrating",
            storages.__getitem__,
            mix["embed_tokens"].matrices,
            decided=[(name, [(p.storage, p.shape) for p in mix[name].matrices]) for name in mix],
        )
        return {
            name: _alike(option, found[name]) if name in found else option.matrices
            for name, option in mix.items()
        }

    def _rounded(self, storage: Storage) -> tuple[QuantizedMatrix]:
        return (RoundedMatrix(self.vocabularies["embed_tokens"], storage),)

    def _run(
        self,
        phase: str,
        ways: Callable[[str], Sequence[Storage]],
        embedding: Sequence[QuantizedMatrix],
        *,
        decided: object,
        windows: NDArray[np.int64] | None = None,
        calibration: Calibration | None = None,
        errors: bool = False,
    ) -> dict[str, Candidates]:
        """One run, see :func:`~.calibrate.calibrate`; ``decided`` is what decides the first two."""
        calibration = calibration or self.calibration
        windows = self.windows if windows is None else windows
        return calibrate(
            self.spec,
            self.weights,
            windows,
            ways=ways,
            embedding=embedding,
            context=self.context,
            calibration=calibration,
            folder=matrices_folder(
                self.work, windows, decided, calibration.correction, calibration.rounds
            ),
            minimum=self.minimum,
            report=partial(self.report, phase),
            errors=errors,
        )


def _alike(option: Option, found: Candidates) -> tuple[QuantizedMatrix, ...]:
    """The same rows in the same storages as an option's."""
    if len(option.matrices) == 1:
        return (found.first,)
    parts: list[QuantizedMatrix] = []
    start = 0
    for one in option.matrices:
        stop = start + one.shape[0]
        parts.append(RowRange(found.matrices[one.storage], start, stop))
        start = stop
    return tuple(parts)
