"""What a thread need not wait for."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Background"]

T = TypeVar("T")


class Background:
    """Does one piece of work after the other, on a thread that is there while there is any.

    A daemon: where the disk does not answer, Python ends all the same.

    Args:
        name: The thread's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._work: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._running = False
        self._begun: float | None = None  # when what is being done was

    @property
    def busy_seconds(self) -> float:
        """For how long one piece of work has been under way; 0 without work."""
        begun = self._begun
        return 0.0 if begun is None else time.perf_counter() - begun

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have something done; once its future is cancelled, it is left out.

        Raises:
            RuntimeError: The system has no thread left.
        """
        future: Future[T] = Future()
        with self._lock:
            if not self._running:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
                self._running = True
            self._work.append((future, work))
        return future

    def _run(self) -> None:
        while (one := self._next()) is not None:
            future, work = one
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """The next piece of work; None ends who asks."""
        with self._lock:
            if self._work:
                self._begun = time.perf_counter()
                return self._work.popleft()
            self._begun, self._running = None, False
            return None
