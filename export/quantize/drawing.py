"""Text that a model writes itself, several windows in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.bundle import Bundle
from edge_llm.decoding.sampling import Sampler, Sampling
from edge_llm.runtime.device import usable_cores
from edge_llm.runtime.own_layout import OwnDecoder
from edge_llm.runtime.session import create_session

__all__ = ["Writer"]


class Writer:
    """A model that writes windows of text, each from a random stream of its own.

    A text starts from BOS, or from a random token where the model has none, and goes on at
    temperature 1 with any token; behind one that ends early comes another, until the window is
    full. So every window has as many tokens, and each step adds one to all of them. No turn of a
    conversation is opened for the model: one that was trained on them starts them by itself.

    Args:
        folder: A bundle in edge_llm's own layout.
        tokens: Of a window.
        rows: Windows at once, at most.

    Raises:
        BundleError: The folder is not a usable bundle.
        ArgumentError: There is no memory for so many tokens.
    """

    def __init__(self, folder: Path, *, tokens: int, rows: int) -> None:
        bundle = Bundle.open(folder)
        manifest = bundle.manifest
        session = create_session(
            bundle.file(manifest.decoder.graph),
            threads=usable_cores(),
            minimum=manifest.min_onnxruntime,
        )
        self._decoder = OwnDecoder(session, manifest, capacity=tokens, rows=rows)
        self._vocab = manifest.dims.vocab
        self._bos = manifest.tokens.bos
        self._eos = frozenset(manifest.tokens.eos)

    def write(
        self, seeds: Sequence[np.random.SeedSequence], on_token: Callable[[int], None]
    ) -> NDArray[np.int64]:
        """Windows of text, int64 [seeds, tokens].

        The same seeds together give the same windows. Beside others a window may become another:
        in a quantized model a row's last digits hang on how many rows there are.

        Args:
            seeds: One for each window.
            on_token: Called with the tokens that each window has.
        """
        cache = self._decoder.cache
        randoms = [np.random.default_rng(seed) for seed in seeds]
        sampling = Sampling(temperature=1.0)
        samplers = [
            Sampler(sampling, vocab_size=self._vocab, prompt=(), rng=random) for random in randoms
        ]
        windows = np.empty((len(seeds), cache.capacity), np.int64)
        logits = np.empty((0, self._vocab), np.float32)
        for i in range(cache.capacity):
            for row, random in enumerate(randoms):
                if i and int(windows[row, i - 1]) not in self._eos:
                    windows[row, i] = samplers[row].sample(logits[row])
                else:
                    cache.truncate(row, 0)
                    windows[row, i] = self._first(random)
            on_token(i + 1)
            if i + 1 < cache.capacity:
                logits = self._decoder.step_rows(
                    list(windows[:, i : i + 1]), scored=[1] * len(seeds)
                )
        return windows

    def _first(self, random: np.random.Generator) -> int:
        return int(random.integers(self._vocab)) if self._bos is None else self._bos
