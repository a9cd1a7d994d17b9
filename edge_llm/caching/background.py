"""What a thread need not wait for."""

from __future__ import annotations

import collections
import threading
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
                return self._work.popleft()
            self._running = False
            return None
