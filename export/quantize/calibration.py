"""What to calibrate on, and how."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.errors import ArgumentError
from edge_llm.text.tokenizer import Tokenizer

from .gptq import DEFAULT_DAMPING

__all__ = ["Calibration", "draw_windows", "read_windows"]


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
    """

    text: str | os.PathLike[str] | None = None
    samples: int = 64
    tokens: int = 256
    seed: int = 0
    damping: float = DEFAULT_DAMPING
    correction: float = 0.5
    act_order: bool = True

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("tokens", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(name, f"an integer of at least {least}", value)
        if not 0 < self.damping <= 1:
            raise ArgumentError("damping", "above 0 and at most 1", self.damping)
        if not 0 <= self.correction <= 1:
            raise ArgumentError("correction", "from 0 to 1", self.correction)


def read_windows(
    tokenizer: Tokenizer, calibration: Calibration, *, context: int
) -> NDArray[np.int64]:
    """Windows of the file's text, spread evenly over it, int64 [windows, tokens].

    Args:
        tokenizer: The model's tokenizer.
        calibration: What to calibrate on.
        context: Most tokens of a window.

    Raises:
        ArgumentError: The file cannot be read, or is shorter than a window.
    """
    assert calibration.text is not None
    path = Path(calibration.text)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ArgumentError("text", f"a readable file in UTF-8 ({error})", str(path)) from error
    first = tokenizer.encode("")  # BOS, where a prompt starts with it
    width = min(calibration.tokens, context) - len(first)
    stream = np.array(tokenizer.encode(text, add_bos=False), np.int64)
    whole = len(stream) // width
    if not whole:
        raise ArgumentError(
            "text", f"a file of at least {width} tokens", f"{path} ({len(stream)} tokens)"
        )
    chosen = np.unique(np.linspace(0, whole - 1, calibration.samples).round().astype(np.int64))
    windows = stream[: whole * width].reshape(whole, width)[chosen]
    return np.insert(windows, np.zeros(len(first), np.int64), first, axis=1)


def draw_windows(
    llm: LLM, calibration: Calibration, report: Callable[[str, int, int], None]
) -> NDArray[np.int64]:
    """Windows of text that the model itself writes, int64 [samples, tokens].

    Every text starts from BOS, or from a random token where there is no BOS; where one ends early,
    the next one fills its window up.
    """
    width = min(calibration.tokens, llm.context)
    random = np.random.default_rng(calibration.seed)
    windows = np.empty((calibration.samples, width), np.int64)
    for i, window in enumerate(windows):
        report("drawing", i, len(windows))
        held: list[int] = []
        while len(held) < width:
            held += _text(llm, width - len(held), random)
        window[:] = held
    report("drawing", len(windows), len(windows))
    return windows


def _text(llm: LLM, most: int, random: np.random.Generator) -> Iterator[int]:
    """One text of at most ``most`` tokens, all of the distribution's tokens possible."""
    bos = llm.manifest.tokens.bos
    first = int(random.integers(llm.manifest.dims.vocab)) if bos is None else bos
    seed = int(random.integers(1 << 31))
    yield first
    if most > 1:
        answer = llm.generate(
            [first],
            max_tokens=most - 1,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logit_bias={},
            seed=seed,
        )
        yield from answer.tokens
