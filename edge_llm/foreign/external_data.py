"""Weights that lie beside an ONNX file: inside the folder, and as large as they are said to be."""

from __future__ import annotations

import functools
from pathlib import Path, PurePosixPath

from edge_llm.errors import IntegrityError
from edge_llm.foreign.onnx_file import OnnxModel
from edge_llm.schema import cut

__all__ = ["check_external_data", "check_link", "inner_path"]

_REMEDY = "Download or export the model again."


def check_external_data(model: OnnxModel, graph: Path) -> tuple[str, ...]:
    """Refuse an ONNX file whose weights lie elsewhere, or are not as many as it claims.

    Args:
        model: What was read of it.
        graph: Its path.

    Returns:
        The other files that hold its weights, as paths inside its folder.

    Raises:
        IntegrityError: A file is missing, too short, or outside.
    """

    @functools.cache
    def locate(location: str) -> tuple[str, int]:
        """The path inside the folder, and the file's size."""
        name = inner_path(location, f"{graph.name}: external data")
        file = graph.parent / name
        # As ONNX Runtime has it: a cache of Hugging Face's links graph and data into one folder.
        homes = (graph.parent.resolve(), graph.resolve().parent)
        if not file.is_file():
            raise IntegrityError(f"{graph.name} needs {cut(name)!r}, which is missing.", _REMEDY)
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise IntegrityError(
                f"{graph.name} needs {cut(name)!r}, which is a link to a place outside the folder.",
                "Put the file itself there.",
            )
        return name, file.stat().st_size

    names = set()
    for tensor in model.tensors:
        if tensor.external is None:
            continue
        name, size = locate(tensor.external.location)
        names.add(name)
        offset, length = tensor.external.offset, tensor.external.length
        if length not in (None, tensor.nbytes):
            raise IntegrityError(
                f"{graph.name}: tensor {cut(tensor.name)!r} of shape {list(tensor.shape)} takes "
                f"{tensor.nbytes} bytes, but {length} are stated.",
                _REMEDY,
            )
        if offset + tensor.nbytes > size:
            raise IntegrityError(
                f"{graph.name}: tensor {cut(tensor.name)!r} reaches to byte "
                f"{offset + tensor.nbytes} of {cut(name)!r}, which has {size}.",
                _REMEDY,
            )
    return tuple(sorted(names))


def inner_path(name: str, label: str) -> str:
    """A path that a file of a model states, if it can only lead into the folder.

    Args:
        name: The path.
        label: What the error calls the place that states it.

    Returns:
        The same path in one spelling, with "/" between its parts.

    Raises:
        IntegrityError: It is absolute, leads upwards, or is nothing that a path needs.
    """
    path = PurePosixPath(name)
    odd = any(letter in name for letter in '\\:*?"<>|') or not name.isprintable()
    if not path.parts or path.is_absolute() or ".." in path.parts or odd:
        raise IntegrityError(
            f"{label}: {cut(name)!r} is not a relative path inside the folder.", _REMEDY
        )
    return path.as_posix()


def check_link(file: Path, folder: Path) -> None:
    """Refuse a file that is a link to a place outside its model's folder.

    In a cache of Hugging Face's, a snapshot's files are links into the model's blobs.

    Raises:
        IntegrityError: It is.
        OSError: It cannot be looked at.
    """
    home, place = folder.resolve(), file.resolve()
    if not any(place.is_relative_to(one) for one in (home, home.parent.parent / "blobs")):
        raise IntegrityError(
            f"{cut(file.name)!r} is a link to a place outside the folder.",
            "Put the file itself there.",
        )
