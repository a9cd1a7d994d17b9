"""Where a calibration keeps its results: a temporary folder, or one that outlives interruptions."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ExportError

from .calibration import Calibration

__all__ = ["describe_calibration", "matrices_folder", "work_folder"]


@contextmanager
def work_folder(
    work_dir: Path | None, checkpoint: Path, calibration: Calibration, *, context: int
) -> Iterator[Path]:
    """A folder for the text of a calibration, and for what depends on it.

    Args:
        work_dir: Where it stays, named after all that decides what is in it; None: it is removed.
        checkpoint: The folder of the checkpoint, all of whose files are hashed.
        calibration: What to calibrate on.
        context: Longest sequence of the bundle.

    Raises:
        ExportError: The folder cannot be made.
    """
    if work_dir is None:
        with tempfile.TemporaryDirectory(prefix="edge-llm-") as name:
            yield Path(name)
        return
    described = describe_calibration(calibration)
    key = hashlib.sha256(json.dumps([described, context, version("edge-llm")]).encode())
    for file in sorted(checkpoint.glob("*.safetensors")) + sorted(checkpoint.glob("*.json")):
        key.update(file.name.encode() + _digest(file))
    folder = work_dir / key.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"The work folder {str(folder)!r} cannot be made: {error.strerror}.",
            "Pass another work_dir (--work-dir).",
        ) from error
    yield folder


def matrices_folder(work: Path, windows: NDArray[np.int64], *decided: object) -> Path:
    """The folder inside a work folder for matrices that are calibrated on the same activations.

    Args:
        work: The work folder.
        windows: int64 [windows, tokens]; which ones are drawn hangs on what is to be scored.
        decided: What else decides the activations and the matrices, such as storages; told apart by
            its ``repr``.
    """
    key = hashlib.sha256(windows.tobytes() + repr(decided).encode()).hexdigest()[:16]
    folder = work / f"matrices-{key}"
    folder.mkdir(exist_ok=True)
    return folder


def describe_calibration(calibration: Calibration) -> dict[str, object]:
    """What a manifest says of it; a text is told by its hash."""
    text = calibration.text
    if text is None:
        return {"method": "gptq", **asdict(calibration), "text": "drawn from the model"}
    described = {"method": "gptq", **asdict(calibration), "text": Path(text).name}
    del described["seed"]
    return described | {"sha256": _digest(Path(text)).hex()}


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
