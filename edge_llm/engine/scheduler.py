"""The engine: one thread that owns the model and does one job after the other."""

from __future__ import annotations

import collections
import logging
import os
import threading
from collections.abc import Generator

from edge_llm.engine.job import Job
from edge_llm.engine.slot import Slot
from edge_llm.errors import ArgumentError, ClosedError, ForkError
from edge_llm.runtime.decoder import Decoder, Interrupted

__all__ = ["Engine"]

log = logging.getLogger("edge_llm")


class Engine:
    """Runs jobs in the order in which they came, on a thread of its own.

    The step loop lives here and nowhere else, so a caller that is slow to read its answer holds up
    nobody, and requests of several threads need no further care.

    Args:
        decoder: The model.
        slot: The row that jobs work on.
    """

    def __init__(self, decoder: Decoder, slot: Slot) -> None:
        self._decoder: Decoder | None = decoder
        self._slot: Slot | None = slot
        self._pid = os.getpid()
        self._waiting: collections.deque[Job] = collections.deque()
        self._current: Job | None = None
        self._closed = threading.Event()
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None

    def execute(self, job: Job) -> Generator[object, None, None]:
        """Queue a job and give its results as they come; leaving early ends the job.

        Raises:
            ClosedError: The engine was closed.
            ForkError: This process was forked from the one that loaded the model.
        """
        try:
            self._submit(job)
            yield from job.results(lambda: self._interrupt(job))
        finally:
            job.abandon()
            self._interrupt(job)

    def check_usable(self) -> None:
        """Refuse work that could only hang.

        Raises:
            ClosedError: The engine was closed.
            ForkError: This process was forked from the one that loaded the model.
            ArgumentError: A function of the caller's that runs inside a request asks for another.
        """
        if self._closed.is_set():
            raise ClosedError("The model is closed.", "Load it again with LLM(path).")
        if os.getpid() != self._pid:
            raise ForkError(
                "The model was loaded before this process was forked; its threads do not exist "
                "here.",
                "Load the model in the child, or start children with "
                'multiprocessing.get_context("spawn").',
            )
        if threading.current_thread() is self._thread:
            raise ArgumentError(
                "logits_hook",
                "a function that does not ask the model which is waiting for it",
                "one that does",
                "Load a second model for it.",
            )

    def close(self) -> None:
        """End all jobs and the thread; may be called again, and from any thread."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closed.set()
            while self._waiting:
                self._waiting.popleft().finish(
                    ClosedError("The model was closed while the request waited.")
                )
            if self._current is not None:
                self._current.abandon()
                self._interrupt(self._current)
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._decoder = self._slot = None  # frees the weights and the cache

    def _submit(self, job: Job) -> None:
        self.check_usable()  # in a forked child the lock may never be released
        with self._changed:
            self.check_usable()
            if self._thread is None:
                # A daemon, for Python waits for other threads before it runs exit handlers: it is
                # the exit handler that ends this thread and waits for it.
                self._thread = threading.Thread(
                    target=self._loop, name="edge_llm-engine", daemon=True
                )
                self._thread.start()
            self._waiting.append(job)
            self._changed.notify_all()

    def _interrupt(self, job: Job) -> None:
        """End the running step if it is this job's; a waiting job is dropped."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if job is self._current and self._decoder is not None:
                self._decoder.interrupt()
            elif job in self._waiting:
                self._waiting.remove(job)
                job.interrupted()
                job.finish()

    def _loop(self) -> None:
        decoder, slot = self._decoder, self._slot
        assert decoder is not None
        assert slot is not None
        while True:
            with self._changed:
                while not self._waiting and not self._closed.is_set():
                    self._changed.wait()
                if self._closed.is_set():
                    return
                job = self._current = self._waiting.popleft()
                decoder.resume()
            error: BaseException | None = None
            try:
                try:
                    job.run(slot)
                except Interrupted:
                    job.interrupted()
            except BaseException as failure:
                # Whatever went wrong belongs to the caller; the engine lives on.
                log.debug("a request failed", exc_info=True)
                error = failure
            with self._changed:
                self._current = None
                if error is None and self._closed.is_set():
                    error = ClosedError("The model was closed during the request.")
            job.finish(error)
            del job, error
            slot.settle()
