"""What to calibrate on, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError
from edge_llm.text.tokenizer import Tokenizer

from .gptq import DEFAULT_DAMPING, DEFAULT_ROUNDS

__all__ = ["Calibration", "read_windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What to calibrate on, and how.

    Attributes:
        text: A file in UTF-8; None: text that the model itself writes at temperature 1.
        samples: Windows of text; of a file, spread evenly over it, as many as it has at most.
        tokens: Tokens of a window; at most the exported context.
        seed: Of the text that the model writes: same seed, same text.
        damping: What is added to the diagonal of the inputs' second moments, as a share of its
            mean.
        correction: How much of what the quantized matrices in front of a matrix changed is taken
            back by it, 0 to 1.
        act_order: Round columns with strong inputs first (they stay where they are stored).
        rounds: How often scales and integers are refined by coordinate descent behind GPTQ's pass.
    """

    text: str | os.PathLike[str] | None = None
    samples: int = 64
    tokens: int = 256
    seed: int = 0
    damping: float = DEFAULT_DAMPING
    correction: float = 0.5
    act_order: bool = True
    rounds: int = DEFAULT_ROUNDS

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("tokens", 2), ("seed", 0), ("rounds", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(name, f"an integer of at least {least}", value)
        if not 0 < self.damping <= 1:
            raise ArgumentError("damping", "above 0 and at most 1", self.damping)
        if not 0 <= self.correction <= 1:
            raise ArgumentError("correction", "from 0 to 1", self.correction)

    def read_text(self) -> str | None:
        """The file's text; None where the model writes it.

        Raises:
            ArgumentError: The file cannot be read.
        """
        if self.text is None:
            return None
        path = Path(self.text)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ArgumentError("text", f"a readable file in UTF-8 ({error})", str(path)) from error


def read_windows(
    tokenizer: Tokenizer, calibration: Calibration, *, context: int, validation: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows of the file's text, spread evenly over it, and others between them to validate on.

    Args:
        tokenizer: The model's tokenizer.
        calibration: What to calibrate on.
        context: Most tokens of a window.
        validation: Windows to validate on; where the file is too short for all that are asked for,
            both kinds have their share of those that it has.

    Returns:
        int64 [windows, tokens] both, BOS in front where a prompt starts with it; they do not
        overlap, and no window of one kind is equal to one of the other.

    Raises:
        ArgumentError: The file cannot be read, or is too short or too repetitive.
    """
    text = calibration.read_text()
    assert text is not None
    first = tokenizer.encode("")
    width = min(calibration.tokens, context) - len(first)
    stream = np.array(tokenizer.encode(text, add_bos=False), np.int64)
    whole = len(stream) // width
    needed = width * (2 if validation else 1)
    if len(stream) < needed:
        raise ArgumentError(
            "text",
            f"a file of at least {needed} tokens",
            f"{calibration.text} ({len(stream)} tokens)",
        )
    asked = calibration.samples + validation
    chosen = np.unique(np.linspace(0, whole - 1, asked).round().astype(np.int64))
    windows = stream[: whole * width].reshape(whole, width)[chosen]
    windows = np.insert(windows, np.zeros(len(first), np.int64), first, axis=1)
    apart = np.zeros(len(windows), np.bool_)
    if validation:
        count = min(max(1, len(windows) * validation // asked), len(windows) - 1)
        apart[(np.arange(count) * len(windows) + len(windows) // 2) // count] = True
    used, held = windows[~apart], windows[apart]
    held = held[[not (used == window).all(axis=1).any() for window in held]]
    if validation and not len(held):
        raise ArgumentError(
            "text", "a file that does not repeat itself window by window", str(calibration.text)
        )
    return used, held
