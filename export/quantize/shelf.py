"""Quantized matrices on disk, so that a calibration can go on where it was interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .packing import Blocks, unpack
from .storage import QuantizedMatrix, Storage, quantized_tensors

__all__ = ["Shelf", "ShelvedMatrix", "save_array"]


@dataclass(frozen=True, slots=True)
class ShelvedMatrix:
    """A symmetric matrix whose packed integers are memory-mapped; a ``QuantizedMatrix``.

    ``losses`` has what each row's product with the inputs that it was calibrated for loses: the
    mean square, float32 [rows].
    """

    shape: tuple[int, int]
    storage: Storage
    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    losses: NDArray[np.float32]
    order: None = None

    def blocks(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop)."""
        scales = self.scales[start:stop]
        bits = self.storage.bits
        middle = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        return Blocks(unpack(self.packed[start:stop], bits), scales, middle)


@dataclass(frozen=True, slots=True)
class Shelf:
    """Keeps quantized matrices in a folder, three files each; one that is there is whole."""

    folder: Path

    def get(self, name: str, shape: tuple[int, int], storage: Storage) -> ShelvedMatrix | None:
        """The matrix, or None where it is not there."""
        files = self._files(name)
        if not files[-1].exists():
            return None
        return ShelvedMatrix(shape, storage, *(np.load(file, mmap_mode="r") for file in files))

    def put(
        self,
        name: str,
        matrix: QuantizedMatrix,
        measure: Callable[[QuantizedMatrix], NDArray[np.float32]],
    ) -> ShelvedMatrix:
        """Compute the matrix and what its rows lose, and keep both."""
        (packed,), (scales,) = quantized_tensors(matrix)
        losses = np.zeros(matrix.shape[0], np.float32)
        found = ShelvedMatrix(matrix.shape, matrix.storage, packed, scales, losses)
        losses[:] = measure(found)
        # The losses come last: they say that the others are there too.
        for file, array in zip(self._files(name), (packed, scales, losses), strict=True):
            save_array(file, array)
        stored = self.get(name, matrix.shape, matrix.storage)
        assert stored is not None
        return stored

    def _files(self, name: str) -> list[Path]:
        return [self.folder / f"{name}.{part}.npy" for part in ("integers", "scales", "losses")]


def save_array(file: Path, array: NDArray[Any]) -> None:
    """Write a file that is there as a whole or not at all."""
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
