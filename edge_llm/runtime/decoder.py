"""What the engine asks of a decoder, whatever the layout of its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["WIDEST_STEP", "Decoder", "Interrupted", "StateCache"]

# Most tokens of a prompt's chunk. Wider steps are not faster per token, and what a step needs
# besides the cache (activations, the slack of window caches) grows with its width.
WIDEST_STEP = 512


class Interrupted(Exception):  # noqa: N818 - no error: somebody asked for it
    """A step was ended by :meth:`Decoder.interrupt`.

    The cache is as it was before the step, or empty where a window has moved on meanwhile.
    """


class StateCache(Protocol):
    """The decoder's state, and how much of it each row holds.

    Attributes:
        capacity: Most tokens of a row.
        lengths: int32 [rows], tokens that each row holds.
    """

    capacity: int
    lengths: NDArray[np.int32]

    def truncate(self, row: int, length: int) -> int:
        """Forget what a row holds from ``length`` on.

        Returns:
            What is left: ``length``, or 0 where something in front of it is no longer there.
        """

    def room(self, row: int) -> int:
        """Tokens that a row can be given so that all of them can be taken back."""

    def copy(self, source: int, target: int, length: int) -> int:
        """Let a row hold what the first ``length`` tokens of another one are.

        Returns:
            What it holds then: ``length``, or 0 where something of them is no longer there.
        """

    def shortest(self, length: int) -> int:
        """The length, besides 0, below which a row of ``length`` tokens cannot be rolled back."""

    def read_row(self, row: int, length: int) -> dict[str, NDArray[np.generic]]:
        """What a row holds of its first ``length`` tokens, to which it could be rolled back.

        Returns:
            By input's name, [kv_heads, positions, head_dim]: all of these tokens, or the last of
            them that a window still holds. Steps may change the memory behind it.
        """

    def accepts(self, length: int, arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """Whether :meth:`write_row` can make a row of ``length`` tokens from these arrays.

        Args:
            length: Tokens.
            arrays: By input's name, [kv_heads, positions, head_dim]: the last ``positions`` of
                the tokens.
        """

    def write_row(self, row: int, length: int, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Put into a row what :meth:`read_row` gave; what it held before is forgotten.

        Args:
            row: Which.
            length: Tokens, to which the arrays are cut.
            arrays: As for :meth:`accepts`, which must have said yes.
        """


class Decoder(Protocol):
    """Feeds tokens to a graph and gives logits, in buffers that are allocated once."""

    @property
    def cache(self) -> StateCache:
        """What the graph has seen of each row."""

    @property
    def rows(self) -> int:
        """Sequences that are held at once."""

    @property
    def widest(self) -> int:
        """Most tokens of a step whose buffers stay small; wider ones are served all the same."""

    @property
    def verifies(self) -> bool:
        """Whether one run of the graph scores several tokens behind others."""

    def step(
        self, tokens: Sequence[int] | NDArray[np.int64], *, scored: int
    ) -> NDArray[np.float32]:
        """Append tokens to the first row and give the logits of the last ``scored`` of them.

        Args:
            tokens: New tokens, at least one; they must fit into the cache.
            scored: Rows of logits to compute, from 0 to the number of tokens.

        Returns:
            float32 [scored, vocab]: a view of a buffer that the next step overwrites.

        Raises:
            Interrupted: :meth:`interrupt` was called.
            RuntimeFailure: ONNX Runtime failed.
        """

    def step_rows(
        self,
        tokens: Sequence[Sequence[int] | NDArray[np.int64]],
        *,
        scored: Sequence[int],
        first: int = 0,
    ) -> NDArray[np.float32]:
        """Append tokens to rows that lie beside each other, to each its own.

        Args:
            tokens: New tokens of row ``first``, ``first + 1`` and so on, of any lengths; a row that
                gets none stays as it is. At least one gets some. They are padded to the longest,
                for which each row that gets some must have room.
            scored: Of each row, how many of its last new tokens to score.
            first: The first of the rows.

        Returns:
            float32 [sum(scored), vocab], row after row: a view of a buffer that the next step
            overwrites.

        Raises:
            Interrupted: :meth:`interrupt` was called.
            RuntimeFailure: ONNX Runtime failed.
        """

    def interrupt(self) -> None:
        """End the running step between two of its operators, and every later one; any thread."""

    def resume(self) -> None:
        """Allow steps again."""
