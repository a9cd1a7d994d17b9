"""Jobs that copy what a row holds, for the disk, or put into a row what came from there.

The engine's thread only copies memory: all that waits for the disk is done by the caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.caching.folder import write_through
from edge_llm.caching.offers import Snapshot
from edge_llm.caching.state_file import DoubtfulFileError, SavedState, write_state
from edge_llm.engine.job import Job, Steps, feed_prompt
from edge_llm.errors import SessionError

if TYPE_CHECKING:
    from edge_llm.engine.slot import Slot

__all__ = ["Baking", "LoadSession", "SaveSession", "read_session", "write_session"]


class Baking(Job):
    """Computes a prefix; puts a :class:`~edge_llm.caching.offers.Snapshot` of it, or None.

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
        """Compute what is at hand nowhere, and copy all."""
        yield from slot.recall(self.prompt)
        yield from feed_prompt(slot, self.prompt, self._tell)
        self.put(slot.snapshot())

    def interrupted(self) -> None:
        """Put nothing in place of the copy."""
        self.put(None)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, len(self.prompt))


class SaveSession(Job):
    """Puts a :class:`~edge_llm.caching.offers.Snapshot` of the row that was used last."""

    kind = "session"
    resumes = True

    def __init__(self) -> None:
        super().__init__(cancel=None, timeout=None)

    def steps(self, slot: Slot) -> Steps:
        """Copy.

        Raises:
            SessionError: There is nothing to save.
        """
        if not slot.length:
            raise SessionError("There is no session to save.", "Save it after an answer.")
        self.put(slot.snapshot())
        yield from ()  # nothing is computed

    def interrupted(self) -> None:
        """Nothing to put: no step is run."""


class LoadSession(Job):
    """Puts a session into a row; puts the number of tokens.

    Args:
        saved: The session, verified: so it was read only now, and the copy finds it in memory.
        path: Where it comes from.
    """

    kind = "session"

    def __init__(self, saved: SavedState, path: str | os.PathLike[str]) -> None:
        super().__init__(cancel=None, timeout=None)
        self.used = False  # until it is loaded
        self._saved = saved
        self._path = path

    def steps(self, slot: Slot) -> Steps:
        """Copy.

        Raises:
            SessionError: It is too long for the context.
        """
        count = len(self._saved.tokens)
        self.used = slot.load(self._saved)
        if not self.used:
            raise SessionError(
                f"The session in {os.fspath(self._path)!r} has {count} tokens and was saved with "
                "another context, into whose cache it does not fit.",
                "Load the model with the context that it was saved with, or a larger one.",
            )
        self.put(count)
        yield from ()  # nothing is computed

    def interrupted(self) -> None:
        """Nothing to put: no step is run."""


def write_session(path: Path, owner: str, held: Snapshot) -> None:
    """Write a session to a file, whole or not at all.

    Args:
        path: The file.
        owner: See :func:`~edge_llm.states.state_owner`.
        held: The session.

    Raises:
        OSError: The system refuses.
    """
    write_through(path, lambda stage: write_state(stage, owner, held.tokens, held.arrays))


def read_session(path: Path, owner: str) -> SavedState:
    """Read a session and verify all of it.

    Args:
        path: The file.
        owner: See :func:`~edge_llm.states.state_owner`.

    Raises:
        SessionError: The file is damaged, or of another model.
        OSError: It cannot be read.
    """
    try:
        saved = SavedState.open(path, owner)
        saved.verify()
    except DoubtfulFileError as error:
        raise SessionError(
            f"{str(path)!r} is no session to go on from. {error}",
            "Begin the conversation anew: its messages are computed again.",
        ) from error
    return saved
