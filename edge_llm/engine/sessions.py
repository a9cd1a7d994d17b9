"""Jobs that put what a row holds onto the disk, or read it from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.caching.folder import write_through
from edge_llm.caching.state_file import DoubtfulFileError, SavedState
from edge_llm.engine.job import Job, Steps, feed_prompt
from edge_llm.errors import SessionError

if TYPE_CHECKING:
    from edge_llm.engine.slot import Slot

__all__ = ["Baking", "LoadSession", "SaveSession"]


class Baking(Job):
    """Computes a prefix and writes it to the prefix cache; puts the entry's path, or None.

    Args:
        tokens: int64 [tokens], at most the context.
        progress: Called with the tokens done and in all, on the engine's thread.
    """

    kind = "session"
    callback = "on_prompt"

    def __init__(
        self, tokens: NDArray[np.int64], *, progress: Callable[[int, int], None] | None
    ) -> None:
        super().__init__(cancel=None, timeout=None, prompt=tokens)
        self._progress = progress

    def steps(self, slot: Slot) -> Steps:
        """Compute what is at hand nowhere, and write."""
        slot.recall(self.prompt)
        yield from feed_prompt(slot, self.prompt, self._tell)
        self.put(slot.bake())

    def interrupted(self) -> None:
        """Put nothing in place of the path."""
        self.put(None)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, len(self.prompt))


class SaveSession(Job):
    """Writes what a row holds to a file, whole or not at all; puts the number of tokens.

    Args:
        path: The file.
        owner: See :func:`~edge_llm.states.state_owner`.
    """

    kind = "session"
    resumes = True

    def __init__(self, path: Path, owner: str) -> None:
        super().__init__(cancel=None, timeout=None)
        self._path = path
        self._owner = owner

    def steps(self, slot: Slot) -> Steps:
        """Write.

        Raises:
            SessionError: There is nothing to save.
        """
        if not slot.length:
            raise SessionError("There is no session to save.", "Save it after an answer.")
        write_through(self._path, lambda stage: self.put(slot.save(stage, self._owner)))
        yield from ()  # nothing is computed

    def interrupted(self) -> None:
        """Nothing to put: no step is run."""


class LoadSession(Job):
    """Puts what a file holds into the row; puts the number of tokens.

    Args:
        path: The file.
        owner: See :func:`~edge_llm.states.state_owner`.
    """

    kind = "session"

    def __init__(self, path: Path, owner: str) -> None:
        super().__init__(cancel=None, timeout=None)
        self._path = path
        self._owner = owner

    def steps(self, slot: Slot) -> Steps:
        """Read.

        Raises:
            SessionError: The file is damaged, of another model, or too long for the context.
            OSError: It cannot be read.
        """
        remedy = "Begin the conversation anew: its messages are computed again."
        try:
            saved = SavedState.open(self._path, self._owner)
            saved.verify()
        except DoubtfulFileError as error:
            raise SessionError(
                f"{str(self._path)!r} is no session to go on from. {error}", remedy
            ) from error
        if not slot.load(saved):
            raise SessionError(
                f"The session in {str(self._path)!r} has {len(saved.tokens)} tokens and was saved "
                "with another context, into whose cache it does not fit.",
                "Load the model with the context that it was saved with, or a larger one.",
            )
        self.put(len(saved.tokens))
        yield from ()  # nothing is computed

    def interrupted(self) -> None:
        """Nothing to put: no step is run."""
