"""Quantized matrices on disk, so that a calibration can go on where it was interrupted."""

from __future__ import annotations

import os
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
    """A symmetric matrix whose packed integers are memory-mapped; a ``QuantizedMatrix``."""

    shape: tuple[int, int]
    storage: Storage
    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    order: None = None

    def blocks(self, start: int, stop: int) -> Blocks:
        """Rows [start, stop)."""
        scales = self.scales[start:stop]
        bits = self.storage.bits
        middle = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        return Blocks(unpack(self.packed[start:stop], bits), scales, middle)


@dataclass(frozen=True, slots=True)
class Shelf:
    """Keeps quantized matrices in a folder, two files each; one that is there is whole."""

    folder: Path

    def get(self, name: str, shape: tuple[int, int], storage: Storage) -> ShelvedMatrix | None:
        """The matrix, or None where it is not there."""
        integers, scales = self._files(name)
        if not scales.exists():
            return None
        return ShelvedMatrix(
            shape, storage, np.load(integers, mmap_mode="r"), np.load(scales, mmap_mode="r")
        )

    def put(self, name: str, matrix: QuantizedMatrix) -> ShelvedMatrix:
        """Compute the matrix and keep it."""
        tensors = quantized_tensors(matrix)
        # The scales come last: they say that the integers are there too.
        for file, (array,) in zip(self._files(name), tensors, strict=True):
            save_array(file, array)
        stored = self.get(name, matrix.shape, matrix.storage)
        assert stored is not None
        return stored

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.integers.npy", self.folder / f"{name}.scales.npy"


def save_array(file: Path, array: NDArray[Any]) -> None:
    """Write a file that is there as a whole or not at all."""
    part = file.with_suffix(".part")
    with part.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
