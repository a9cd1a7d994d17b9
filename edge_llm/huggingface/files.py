"""JSON files that come with a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_llm.errors import CheckpointError

__all__ = ["MULTIMODAL", "read_json"]

MULTIMODAL = (
    "text_config",
    "vision_config",
    "audio_config",
    "llm_config",
    "language_config",
    "thinker_config",
)
"""Keys of a config.json whose model holds a text model beside an image or audio model."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: The file is missing, unreadable, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}.", "Give the folder of a whole model."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON: {error}.", "Download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} must hold an object, got {type(content).__name__}.", "Download it again."
        )
    return content


def _integer(text: str) -> int:
    """An integer of JSON. transformers writes 10 ** 30 for no limit; floats end at 10 ** 308."""
    if len(text) > 300:
        raise ValueError(f"it has an integer of {len(text)} characters")
    return int(text)
