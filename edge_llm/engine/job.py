"""Work for the engine: done on its thread, awaited on the caller's."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edge_llm.results import FinishReason

if TYPE_CHECKING:
    from edge_llm.engine.slot import Slot

__all__ = ["Job"]

# How often a waiting caller looks at its cancel event and its deadline. Short enough to act at
# once; and on Windows a wait without end could not be interrupted from the keyboard.
POLL_SECONDS = 0.05


class Job(ABC):
    """A unit of work with a way to end it early.

    The engine calls :meth:`run` on its own thread; what it puts is read by :meth:`results` on the
    caller's. A caller that reads slowly holds nobody up: what was put waits for it.

    Args:
        cancel: An event of the caller's that ends the job when it is set.
        timeout: Seconds from now after which the job ends.
    """

    def __init__(self, *, cancel: threading.Event | None, timeout: float | None) -> None:
        self.created = time.perf_counter()
        self._cancel = cancel
        self._deadline = None if timeout is None else self.created + timeout
        self._abandoned = False
        self._results: queue.SimpleQueue[object] = queue.SimpleQueue()

    @abstractmethod
    def run(self, slot: Slot) -> None:
        """Do the work; put results; stop between two steps once :meth:`ended` says so."""

    @abstractmethod
    def interrupted(self) -> None:
        """Put the last result after a step was ended in the middle, or before the first one."""

    def ended(self) -> FinishReason | None:
        """Why the job should stop now, if it should."""
        if self._abandoned or (self._cancel is not None and self._cancel.is_set()):
            return "cancelled"
        if self._deadline is not None and time.perf_counter() >= self._deadline:
            return "timeout"
        return None

    def abandon(self) -> None:
        """Nobody waits for the results any more."""
        self._abandoned = True

    def put(self, result: object) -> None:
        """Hand a result to the caller."""
        self._results.put(result)

    def finish(self, error: BaseException | None = None) -> None:
        """Tell the caller that there is no more, or that the work failed."""
        self._results.put(_End(error))

    def results(self, interrupt: Callable[[], None]) -> Iterator[object]:
        """The results in order, as they come.

        Args:
            interrupt: Called when the job is to stop, so that a running step ends early.

        Raises:
            BaseException: What :meth:`run` raised.
        """
        while True:
            try:
                result = self._results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self.ended():
                    interrupt()
                continue
            if isinstance(result, _End):
                if result.error is not None:
                    raise result.error
                return
            yield result


class _End:
    """Nothing more comes."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
