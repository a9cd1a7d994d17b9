"""What a graph's matrices are, once it is decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..graph.linear import Calibrated
from .storage import Storage

__all__ = ["Selection", "Write"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a graph's matrices are.

    Attributes:
        storage: Of what is not named.
        matrices: By the name of the weight in the graph.
        others: What is stored in another way than ``storage``, by its name in the checkpoint.
        info: What the manifest says of how it was found.
        windows: The text that it was calibrated on, int64 [windows, tokens], if any.
    """

    storage: Storage
    matrices: Calibrated = field(default_factory=dict)
    others: Mapping[str, Storage] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    windows: NDArray[np.int64] | None = None


Write = Callable[[Selection, Path], None]
"""Writes a bundle into an empty folder."""
