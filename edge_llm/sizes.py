"""How long a context, and how many slots: by what was asked for, and by what fits into memory."""

from __future__ import annotations

import functools
from pathlib import Path

from edge_llm.bundle import Bundle
from edge_llm.memory import MemoryEstimate, MemoryModel, fitting_context, parse_bytes
from edge_llm.options import LoadOptions, integer
from edge_llm.runtime.device import available_memory
from edge_llm.runtime.kv_cache import state_bytes
from edge_llm.runtime.layouts import most_rows

__all__ = ["Sizes"]

DEFAULT_CONTEXT = 4096
MOST_SLOTS = 64
# Unless told otherwise: a slot costs memory only once it is used, and all of them together take no
# more than this share of what the machine has left.
DEFAULT_SLOTS = 4
SHARE_OF_MEMORY = 0.25


class Sizes:
    """The sizes that a model is loaded with.

    Args:
        bundle: The model.
        options: What was asked for.
        widest: Most tokens of a prompt to feed at once, where it was tuned.

    Attributes:
        context: Most tokens of prompt and answer together.
        slots: Sequences that are answered at once.
        prefill_chunk: Tokens of a prompt to feed at once, where that was asked for.

    Raises:
        ArgumentError: A size is outside its domain.
        MemoryLimitError: Nothing fits into the memory limit.
    """

    def __init__(self, bundle: Bundle, options: LoadOptions, *, widest: int | None) -> None:
        self._bundle, self._widest = bundle, widest
        longest = bundle.manifest.dims.context
        most = most_rows(bundle.manifest, MOST_SLOTS)
        wanted = integer("context", options.get("context"), 2, longest)
        slots = integer("slots", options.get("slots"), 1, most)
        self.context = wanted or min(longest, DEFAULT_CONTEXT)
        self.prefill_chunk = integer("prefill_chunk", options.get("prefill_chunk"), 1, self.context)
        limit = None
        if (told := options.get("memory_limit")) is not None:
            limit = parse_bytes("memory_limit", told)
            self.context = fitting_context(
                lambda context: self._model.estimate(context, slots=slots or 1),
                longest=self.context,
                shortest=wanted or 2,
                limit=limit,
            )
        self.slots = slots or self._default_slots(min(most, DEFAULT_SLOTS), limit)

    def memory(self, compiled: Path | None) -> MemoryEstimate:
        """What the model takes when its slots are full, loaded by a compiled graph or not."""
        return self._model.estimate(self.context, slots=self.slots, compiled=compiled)

    @functools.cached_property
    def _model(self) -> MemoryModel:
        return MemoryModel(self._bundle, prefill_chunk=self.prefill_chunk or self._widest)

    def _default_slots(self, most: int, limit: int | None) -> int:
        """As many slots as fit into the limit, and take no large share of the machine's memory."""
        state = self._bundle.manifest.decoder.state
        row = state_bytes(state, rows=1, capacity=self.context)
        left = available_memory()
        if left is not None:
            most = max(1, min(most, int(SHARE_OF_MEMORY * left) // row))
        while limit is not None and most > 1 and self._total(most) > limit:
            most -= 1
        return most

    def _total(self, slots: int) -> int:
        return self._model.estimate(self.context, slots=slots).total
