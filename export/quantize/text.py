"""The text of a calibration, and text apart from it to validate on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError
from edge_llm.text.tokenizer import Tokenizer

from ..evaluate.overlap import PASSAGE, ScoredText
from .calibration import Calibration, read_windows
from .drawing import Writer
from .shelf import save_array

__all__ = ["calibration_windows"]

# Windows that are drawn at once: 32 take about eight times as long as one. What the caches hold
# is bounded by their tokens. Both decide what is drawn, so neither may depend on the machine.
ROWS = 32
TOKENS_AT_ONCE = 8192

# As many windows as are asked for are drawn so many times before those left out are too many.
MOST_DRAWN = 2


def calibration_windows(
    calibration: Calibration,
    *,
    tokenizer: Tokenizer,
    context: int,
    work: Path,
    draft: Callable[[Path], None],
    scored: str | None,
    report: Callable[[str, int, int], None],
    validation: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows to calibrate on, and others to validate on.

    Those of a file lie evenly in it, the ones between the others. Those that the model writes have
    random streams of their own, all from one seed; one that has a passage of the scored text, which
    the model then knows by heart, is left out for another.

    Args:
        calibration: What to calibrate on.
        tokenizer: The model's tokenizer.
        context: Most tokens of a window.
        work: Where windows are kept that the model wrote; what is there is not written again.
        draft: Writes a bundle of the model into an empty folder; called where windows are missing.
        scored: The text that the model is to be measured on, if any. It is not compared with a
            file here: :func:`~..evaluate.overlap.check_disjoint` does that before any work.
        report: Called with a phase, the tokens drawn and all.
        validation: Windows to validate on; of a file that is too short there may be fewer.

    Returns:
        int64 [windows, tokens] both; no window is in both.

    Raises:
        ArgumentError: The file is too short, or the model knows the scored text by heart.
    """
    if calibration.text is not None:
        return read_windows(tokenizer, calibration, context=context, validation=validation)
    drawing = _Drawing(
        seed=calibration.seed,
        tokens=min(calibration.tokens, context),
        work=work,
        draft=draft,
        tokenizer=tokenizer,
        scored=None if scored is None or len(scored) < PASSAGE else ScoredText(scored),
        report=report,
    )
    used = drawing.take(calibration.samples, stream=0, phase="drawing")
    held = drawing.take(validation, stream=1, phase="drawing to validate", unlike=used)
    shutil.rmtree(drawing.model, ignore_errors=True)
    return used, held


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """Windows from the work folder, or from the model where they are not there yet."""

    seed: int
    tokens: int
    work: Path
    draft: Callable[[Path], None]
    tokenizer: Tokenizer
    scored: ScoredText | None
    report: Callable[[str, int, int], None]

    @property
    def model(self) -> Path:
        """The bundle that writes; it is there as a whole or not at all."""
        return self.work / "draft"

    def take(
        self, count: int, *, stream: int, phase: str, unlike: Iterable[NDArray[np.int64]] = ()
    ) -> NDArray[np.int64]:
        """So many windows, int64 [count, tokens], each unlike the others that are given."""
        rows = max(1, min(ROWS, TOKENS_AT_ONCE // self.tokens))
        others = {window.tobytes() for window in unlike}
        kept: list[NDArray[np.int64]] = []
        passage, start = "", 0
        writer: Writer | None = None
        while len(kept) < count:
            if start >= MOST_DRAWN * count:
                raise _used_up(passage)
            stop = start + min(rows, count - len(kept))
            file = self.work / f"drawn-{stream}-{start}-{stop}.npy"
            if not file.exists():
                writer = writer or self._open(rows)
                seeds = [
                    np.random.SeedSequence(self.seed, spawn_key=(stream, i))
                    for i in range(start, stop)
                ]
                done = partial(self._count, phase, len(kept), len(seeds), count)
                save_array(file, writer.write(seeds, done))
            for window in np.load(file):
                found = self.scored and self.scored.passage(self.tokenizer.decode(window))
                passage = found or passage
                if not found and window.tobytes() not in others:
                    kept.append(window)
            start = stop
        return np.array(kept, np.int64).reshape(count, self.tokens)

    def _open(self, rows: int) -> Writer:
        if not self.model.exists():
            part = self.model.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            self.draft(part)
            part.rename(self.model)
        return Writer(self.model, tokens=self.tokens, rows=rows)

    def _count(self, phase: str, done: int, rows: int, count: int, tokens: int) -> None:
        self.report(phase, done * self.tokens + rows * tokens, count * self.tokens)


def _used_up(passage: str) -> ArgumentError:
    if passage:
        return ArgumentError(
            "evaluate",
            f"a text of which the model itself seldom writes {PASSAGE} characters",
            passage,
            "The model knows it by heart, so text that it draws cannot be kept apart: measure on "
            "another text, or calibrate on a file (--calibrate).",
        )
    return ArgumentError(
        "calibration",
        "drawn from a model whose texts differ",
        "the same windows again and again",
        "Calibrate on a file (--calibrate).",
    )
