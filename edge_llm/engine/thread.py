"""The thread that the step loop runs on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from edge_llm.engine.job import POLL_SECONDS
from edge_llm.errors import ArgumentError, ForkError

__all__ = ["CLOSE_SECONDS", "EngineThread"]

CLOSE_SECONDS = 5.0
"""A caller's function that has not returned by then, after the engine was closed, is left behind.

Nobody can end it, and it may be waiting for the very thread that closes."""


class EngineThread:
    """Runs the step loop beside all callers.

    A daemon, for Python waits for other threads before it runs exit handlers: it is the exit
    handler that ends this thread and waits for it.

    Attributes:
        calling: The option whose function the thread may be in.
    """

    def __init__(self) -> None:
        self.calling = ""
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether there was ever anything to do."""
        return self._thread is not None

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def current(self) -> bool:
        """Whether this is the thread that asks."""
        return threading.current_thread() is self._thread

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that the thread is in."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Refuse a process that the thread is not in.

        Raises:
            ForkError: This process was forked from the one that loaded the model.
        """
        if self.forked:
            raise ForkError(
                "The model was loaded before this process was forked; its threads do not exist "
                "here.",
                "Load the model in the child, or start children with "
                'multiprocessing.get_context("spawn").',
            )

    def check_others(self) -> None:
        """Refuse callers for whom the loop could do nothing.

        Raises:
            ForkError: See :meth:`check_process`.
            ArgumentError: A function of the caller's that runs inside a request asks for another.
        """
        self.check_process()
        if self.current:
            raise ArgumentError(
                self.calling,
                "a function that does not ask the model which is waiting for it",
                "one that does",
                "Load a second model for it.",
            )

    def start(self, loop: Callable[[], None]) -> None:
        """Start the loop, unless that was done.

        Raises:
            RuntimeError: The system has no thread left; it can be tried again.
        """
        if self._thread is None:
            thread = threading.Thread(target=loop, name="edge_llm-engine", daemon=True)
            thread.start()
            self._thread = thread

    def join(self, computing: Callable[[], object]) -> bool:
        """Wait until the loop has ended.

        Args:
            computing: Whether a step is being computed, which is soon over, and must be before
                Python ends.

        Returns:
            False where a caller's function does not return.
        """
        if self._thread is None or self.current:
            return True
        patience = time.monotonic() + CLOSE_SECONDS
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            if time.monotonic() > patience and not computing():
                return not self._thread.is_alive()
        return True
