"""Steps of a graph whose state grows by concatenation (layout "standard.v1")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge_llm.errors import RuntimeFailure
from edge_llm.manifest import Manifest
from edge_llm.runtime.growing_cache import GrowingCache
from edge_llm.runtime.masked_layout import MaskedDecoder

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["StandardDecoder"]

BRANCH = "use_cache_branch"

# Tokens with which a merged graph is tried, and how much of the logits' range their logits may
# differ by: rounding makes less than this of a quantized model's, seeing the future far more.
TRIAL = 8
TOLERANCE = 0.02


class StandardDecoder(MaskedDecoder):
    """A :class:`MaskedDecoder` that reads one side of a :class:`GrowingCache` and writes the other.

    optimum's merged graphs have a branch without a past, for the beginning of a sequence, and one
    with it (``use_cache_branch``). Some of the latter were traced for a single token and give
    several at once no causal mask, so that is tried once, and such a graph gets single tokens.

    Args:
        session: The graph.
        manifest: The manifest.
        capacity: Most tokens of the sequence.

    Raises:
        RuntimeFailure: The graph is not what the manifest says.
        ArgumentError: There is no memory for this capacity.
    """

    cache: GrowingCache

    def __init__(self, session: ort.InferenceSession, manifest: Manifest, *, capacity: int) -> None:
        state = manifest.decoder.state
        cache = GrowingCache(state, capacity=capacity)
        super().__init__(session, manifest, cache, extra_inputs=[BRANCH])
        self._names = [(one.input, one.output) for one in state]
        # The last step's output is the next one's input: which side and length it has.
        self._given: tuple[tuple[int, int], list[Any]] = ((0, -1), [])
        self._branch = np.zeros(1, np.bool_)
        if BRANCH in self.graph.inputs:
            self.graph.check(BRANCH, dtypes=("bool",), shape=(1,))
            self.graph.bind(BRANCH, self._branch)
            self._together = self._takes_several(manifest.dims.vocab)

    def _bind_state(self, past: int, total: int) -> None:
        cache, graph = self.cache, self.graph
        self._branch[0] = past > 0
        held, given = (cache.side, past), (1 - cache.side, total)
        values = self._given[1]
        if self._given[0] != held:
            values = [graph.value(view) for view in cache.views(*held)]
        self._given = given, [graph.value(view) for view in cache.views(*given)]
        for (past_name, present_name), before, after in zip(
            self._names, values, self._given[1], strict=True
        ):
            graph.bind_value(past_name, before)
            graph.bind_output_value(present_name, after)

    def _takes_several(self, vocab: int) -> bool:
        """Whether tokens that are fed together behind another give the logits that they should."""
        tokens = np.arange(min(TRIAL, self.cache.capacity)) * 7919 % vocab
        whole = self.step(tokens, scored=len(tokens)).copy()
        self.cache.truncate(0, 1)
        try:
            behind = self._feed(tokens[1:], 1, len(tokens) - 1)
        except RuntimeFailure:
            return False
        finally:
            self.cache.truncate(0, 0)
        return float(np.abs(behind - whole[1:]).max()) <= TOLERANCE * float(np.ptp(whole))
