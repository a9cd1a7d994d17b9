"""How far bundles are from a float32 model, on tokens, many bundles against the same model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.engine.scoring import even_pieces, scored_width
from edge_llm.quality import token_figures

__all__ = ["Distance", "Reference"]

# Tokens of a window that are judged, its last: they have a context, and the reference's
# distributions of all windows are kept on disk.
JUDGED = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a bundle is from the reference.

    Attributes:
        kl_divergence: From the reference, nats per token.
        ppl_increase: Growth of the perplexity, as a share of the reference's.
        top1_agreement: Share of tokens where both find the same one likeliest.
    """

    kl_divergence: float
    ppl_increase: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Reference:
    """A float32 model's distributions over what follows the tokens of some windows.

    Attributes:
        windows: int64 [windows, tokens].
        logits: float32 [windows, judged, vocab], memory-mapped.
    """

    windows: NDArray[np.int64]
    logits: NDArray[np.float32]

    @classmethod
    def of(cls, bundle: Path, windows: NDArray[np.int64], file: Path) -> Reference:
        """Let a float32 bundle judge the windows; the file holds what it says."""
        judged = min(JUDGED, windows.shape[1] - 1)
        with LLM(bundle, context=windows.shape[1]) as llm:
            shape = len(windows), judged, llm.manifest.dims.vocab
            logits = np.lib.format.open_memmap(file, "w+", np.float32, shape)
            if hasattr(os, "posix_fallocate"):  # on a full disk a hole would end the process
                with file.open("r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
            for row, tokens in zip(logits, windows, strict=True):
                for part, found in _pieces(llm, tokens, judged):
                    row[part] = found
        logits.flush()
        return cls(windows, np.load(file, mmap_mode="r"))

    def distance(self, bundle: Path) -> Distance:
        """How far a bundle with the same vocabulary is."""
        judged = self.logits.shape[1]
        sums, count = np.zeros(5), 0
        with LLM(bundle, context=self.windows.shape[1]) as llm:
            for row, tokens in zip(self.logits, self.windows, strict=True):
                targets = tokens[-judged:]
                for part, found in _pieces(llm, tokens, judged):
                    sums += token_figures(found, row[part], targets[part]).sum(axis=0)
                    count += len(found)
        _, _, divergence, agreement, difference = sums / count
        return Distance(
            kl_divergence=float(divergence),
            ppl_increase=float(np.expm1(difference)),
            top1_agreement=float(agreement),
        )


def _pieces(
    llm: LLM, tokens: NDArray[np.int64], judged: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Which of the last ``judged`` tokens, and the logits in front of each of them."""
    inputs, start = tokens[:-1], 0
    begin = len(inputs) - judged
    for part in even_pieces(tokens[-judged:], scored_width(llm.manifest.dims.vocab)):
        stop = start + len(part)
        found = llm.logits(
            inputs[: begin + stop], last=len(part), continued=begin + start if start else 0
        )
        yield slice(start, stop), found
        start = stop
