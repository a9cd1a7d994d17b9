"""Which kind of foreign folder this is."""

from __future__ import annotations

from pathlib import Path

from edge_llm.errors import ArgumentError
from edge_llm.foreign import genai, transformers_js
from edge_llm.foreign.external_data import check_link
from edge_llm.foreign.found import Found

__all__ = ["KINDS", "find_model"]

KINDS = (
    f"{genai.CONFIG} (onnxruntime-genai) and no {transformers_js.CONFIG} with onnx/model*.onnx "
    "(transformers.js) or model*.onnx (optimum)"
)
"""What was looked for where there is none, for an error that says so."""


def find_model(folder: Path, variant: str | None) -> Found | None:
    """What a foreign folder's configuration says, or None where it is none.

    Args:
        folder: The folder.
        variant: Which of its graphs; by default the fastest on a CPU.

    Raises:
        ArgumentError: There is no such variant.
        CheckpointError: A configuration's file is broken.
        IntegrityError: A file that may be read is a link to a place outside.
        UnsupportedFormatError: The model is none that this runtime runs.
    """
    _check_links(folder)
    if (folder / genai.CONFIG).is_file():
        if variant is not None:
            raise ArgumentError(
                "variant", "left out with an onnxruntime-genai folder: it has one graph", variant
            )
        return genai.read_genai(folder)
    if (folder / transformers_js.CONFIG).is_file() and transformers_js.find_graphs(folder):
        return transformers_js.read_transformers_js(folder, variant)
    return None


def _check_links(folder: Path) -> None:
    """Refuse links out of the folder among all that may be read."""
    for inner in (folder, folder / "onnx", folder / "additional_chat_templates"):
        for file in sorted(inner.glob("*")):
            if file.is_symlink() or inner.is_symlink():
                check_link(file, folder)
