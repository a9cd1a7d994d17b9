"""The engine: one thread that owns the model and serves many jobs step by step."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_llm.engine.job import POLL_SECONDS, Feed, Job, Steps
from edge_llm.engine.slot import Slot
from edge_llm.engine.slots import Slots
from edge_llm.engine.statistics import EngineStats, Recorder
from edge_llm.engine.stepper import Stepper
from edge_llm.engine.thread import EngineThread
from edge_llm.engine.waiting import WaitingJobs
from edge_llm.errors import ClosedError, EdgeLLMError, QueueFullError, RuntimeFailure
from edge_llm.results import RequestReport
from edge_llm.runtime.decoder import Decoder, Interrupted

__all__ = ["Engine"]

log = logging.getLogger("edge_llm")

CLOSED = "The model was closed before the request had ended."


@dataclass(slots=True, eq=False)
class _Running:
    """A job that has a row."""

    job: Job
    slot: Slot
    steps: Steps
    feed: Feed


@dataclass(frozen=True, slots=True)
class _Model:
    decoder: Decoder
    stepper: Stepper
    slots: Slots


class Engine:
    """Computes the jobs of all callers together, on a thread of its own.

    The step loop lives here and nowhere else, so a caller that is slow to read its answer holds up
    nobody, and requests of several threads need no further care. Each turn of it is one step for
    the next tokens of all answers, and one chunk of one prompt, or several short prompts: no answer
    waits for more than that.

    Args:
        decoder: The model.
        stepper: Feeds it.
        slots: Its rows.
        queue_limit: Most jobs that wait for a row.
        on_request: Called when a job has ended, mostly on the engine's thread; what it raises is
            logged.
    """

    def __init__(
        self,
        decoder: Decoder,
        stepper: Stepper,
        slots: Slots,
        *,
        queue_limit: int,
        on_request: Callable[[RequestReport], object] | None = None,
    ) -> None:
        # What a closed engine lets go of: weights and cache.
        self._model: _Model | None = _Model(decoder, stepper, slots)
        self._size = len(slots.all)
        self._on_request = on_request
        self._waiting = WaitingJobs(queue_limit)
        self._running: list[_Running] = []
        self._stepping: Sequence[_Running] = ()
        self._recorder = Recorder()
        self._closed = threading.Event()
        self._changed = threading.Condition(threading.RLock())
        self._news = False  # what waits for a row, or for the disk, has to be looked at again
        self._thread = EngineThread()
        # Whose end on_request is being told of on the engine's thread, and its error.
        self._telling: Sequence[tuple[Job, BaseException | None]] = ()

    def execute(self, job: Job) -> Generator[object, None, None]:
        """Queue a job and give its results as they come; leaving early ends the job.

        Raises:
            QueueFullError: As many jobs wait as may.
            ClosedError: The engine was closed.
            ForkError: This process was forked from the one that loaded the model.
        """
        try:
            self.submit(job)
            yield from job.results(lambda: self.interrupt(job))
        finally:
            self.abandon(job)

    def submit(self, job: Job) -> None:
        """Queue a job, whose results can be read then; the errors are those of :meth:`execute`."""
        try:
            self.offer(job)
        except QueueFullError as error:
            self._tell(job, error)
            raise

    def offer(self, job: Job) -> None:
        """:meth:`submit` a job that is offered again where the queue is full: nobody is told."""
        self.check_usable()  # in a forked child the lock may never be released
        with self._changed:
            self.check_usable()
            self._thread.start(self._loop)
            self._waiting.add(job, free=self._size - len(self._running))
            self._wake()

    def abandon(self, job: Job) -> None:
        """End a job whose results nobody will read; one that has ended already stays as it is."""
        job.abandon()
        self.interrupt(job)

    def interrupt(self, job: Job) -> None:
        """Have a job that is to end do so soon.

        A waiting one ends at once; one that works behind this step, or inside it where nobody else
        waits for the step.
        """
        if self._thread.forked:
            return
        if not self._drop(job):
            with self._changed:
                self._end_step()

    def check_usable(self) -> None:
        """Refuse work that could only hang.

        Raises:
            ClosedError: The engine was closed.
            EdgeLLMError: See :meth:`~edge_llm.engine.thread.EngineThread.check_others`.
        """
        if self._closed.is_set():
            raise ClosedError("The model is closed.", "Load it again with LLM(path).")
        self._thread.check_others()

    def stats(self) -> EngineStats:
        """What the engine has done and is doing; not in a forked child, as :meth:`execute`."""
        self._thread.check_process()  # the lock may never be released there
        with self._changed:
            running, waiting = len(self._running), len(self._waiting)
            return self._recorder.snapshot(slots=self._size, running=running, waiting=waiting)

    def close(self) -> None:
        """End all jobs and the thread; may be called again, and from any thread.

        A caller's function that does not return is left behind after a while: then the callers hear
        of the end at once, and the rest is done when it does return.
        """
        if self._thread.forked:
            return
        with self._changed:
            self._closed.set()
            for one in self._running:
                one.job.abandon()
            self._end_step()
            self._wake()
            if not self._thread.started:
                self._model = None
        if not self._thread.join(lambda: self._stepping):
            self._leave_behind()

    def _leave_behind(self) -> None:
        """End all jobs for their callers, while the engine's thread does not come back."""
        log.warning("the model was closed, but %s has not returned", self._thread.calling)
        with self._changed:
            others = [*(one.job for one in self._running), *self._waiting]
        for job, error in (*self._telling, *((job, ClosedError(CLOSED)) for job in others)):
            job.finish(error)

    def _wake(self) -> None:
        """Something has happened that the engine's thread may have waited for."""
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _end_step(self) -> None:
        """End the running step if nobody wants it any more; the lock is held."""
        if self._stepping and all(one.job.ended() for one in self._stepping):
            assert self._model is not None
            self._model.decoder.interrupt()

    def _drop(self, job: Job) -> bool:
        """End a job that waits; False where it does not, or is left to the end of all."""
        with self._changed:
            if self._closed.is_set() or not self._waiting.remove(job):
                return False
        error: BaseException | None = None
        try:
            job.stop()
        except BaseException as failure:
            error = failure
        self._tell(job, error)
        return True

    def _tell(self, job: Job, error: BaseException | None) -> None:
        """Let everybody know that a job has ended; its caller in any case."""
        error = error or job.fault
        mine = self._thread.current
        if mine:
            self._thread.calling, self._telling = "on_request", [(job, error)]
        try:
            report = job.report(error)
            with self._changed:
                self._recorder.ended(report)
            if self._on_request is not None:
                self._on_request(report)
        except BaseException as failure:
            # Nothing ends the engine's thread, whereas Ctrl-C is for the thread that it came to.
            if not isinstance(failure, Exception) and not mine:
                raise
            log.exception("on_request failed")
        finally:
            job.finish(error)
            if mine:
                self._telling = ()

    def _loop(self) -> None:
        model = self._model
        assert model is not None
        error: EdgeLLMError = ClosedError(CLOSED)
        try:
            while self._gather(model.slots):
                self._turn(model)
            for one in list(self._running):
                self._end(one, error)
        except BaseException as failure:
            # What jobs raise does not come here, so nobody knows what state the rows are in.
            log.exception("the engine failed and is closed")
            error = RuntimeFailure(f"The engine failed: {failure!r}", "Load the model again.")
            error.__cause__ = failure
        finally:
            self._fail_all(error)

    def _fail_all(self, error: EdgeLLMError) -> None:
        """Close the engine and end what jobs are left: nobody would end them later."""
        with self._changed:
            self._closed.set()
            jobs = [*(one.job for one in self._running), *self._waiting]
            self._model = None
        with contextlib.ExitStack() as every:  # goes on where one fails, from the last to the first
            every.callback(self._running.clear)
            every.callback(self._waiting.clear)
            for job in jobs:
                every.callback(self._tell, job, error)

    def _gather(self, slots: Slots) -> bool:
        """Wait for work and give rows to jobs that wait; False when the engine is closed."""
        with self._changed:
            while not self._news and all(one.feed.waits for one in self._running):
                # Those that wait for the disk may have to end, or to go on, before it answers.
                if not self._changed.wait(POLL_SECONDS if self._running else None):
                    break
            self._news = False
            waiting = list(self._waiting)
        admitted = [one for job in waiting if (one := self._admit(job, slots)) is not None]
        for one in admitted:
            self._start(one)
        return not self._closed.is_set()

    def _admit(self, job: Job, slots: Slots) -> _Running | None:
        """Give a job a row, if it is still to have one and there is one.

        That may take a while, for rows are copied then, and the disk may have to be waited for. So
        it is done without the lock, and the job may be gone meanwhile: other threads may end it,
        and so may this one, when the garbage collector finds the iterator of its results.
        """
        if job.ended():
            self._drop(job)
            return None
        slot = slots.take(job.prompt, latest=job.resumes)
        if slot is None:
            return None
        with self._changed:
            if not self._closed.is_set() and self._waiting.remove(job):
                one = _Running(job, slot, job.steps(slot), Feed(()))
                self._running.append(one)
                return one
        slots.give_back(slot, latest=job.resumes)
        return None

    def _start(self, one: _Running) -> None:
        self._recorder.queued_seconds += one.job.waited()
        if one.job.ended():
            self._end_early(one)
        else:
            self._advance(one, None)

    def _turn(self, model: _Model) -> None:
        """One step for all answers, and one for prompts."""
        for one in list(self._running):
            if one.job.ended():
                self._end_early(one)
            elif one.feed.until is not None and not one.feed.waits:
                self._advance(one, None)
        ready = [one for one in self._running if one.feed.until is None]
        answering = [one for one in ready if one.feed.single]
        prompting = [one for one in ready if not one.feed.single]
        if answering:
            if len(answering) > 1:
                model.slots.close_gap([one.slot for one in answering])
            slots, feeds = [one.slot for one in answering], [one.feed for one in answering]
            self._step(model, answering, lambda: model.stepper.answer(slots, feeds))
        if prompting:
            group = model.stepper.chooser.next(prompting)
            self._step(model, group, lambda: self._read(model.stepper, group))

    def _read(
        self, stepper: Stepper, group: list[_Running]
    ) -> Sequence[NDArray[np.float32] | None]:
        if len(group) > 1:
            return stepper.prompts([one.slot for one in group], [one.feed for one in group])
        (one,) = group
        feed = one.feed if len(self._running) == 1 else replace(one.feed, exact=False)
        return [stepper.prompt(one.slot, feed)]

    def _step(
        self,
        model: _Model,
        group: list[_Running],
        compute: Callable[[], Sequence[NDArray[np.float32] | None]],
    ) -> None:
        """Run the graph for some jobs, and let each go on with its logits."""
        with self._changed:
            model.decoder.resume()
            self._stepping = group
            self._end_step()  # whoever asked for it since this turn began
            self._recorder.add(steps=1, step_rows=len(group))
        error: BaseException | None = None
        results: Sequence[NDArray[np.float32] | None] = ()
        try:
            results = compute()
        except Interrupted:
            pass
        except BaseException as failure:
            error = failure
        finally:
            with self._changed:
                self._stepping = ()
        if error is not None:
            for one in group:
                self._end(one, error)
        elif not results:
            for one in group:
                self._end_early(one)
        before = sum(one.job.answered for one in group)
        for one, logits in zip(group, results, strict=False):
            self._advance(one, logits)
        with self._changed:
            self._recorder.chosen(sum(one.job.answered for one in group) - before)

    def _advance(self, one: _Running, logits: NDArray[np.float32] | None) -> None:
        """Let a job take its logits and say what it wants next."""
        self._thread.calling = one.job.callback
        try:
            one.feed = one.steps.send(logits)
            if one.feed.until is not None:
                one.feed.until.add_done_callback(lambda _: self._wake())
        except StopIteration:
            self._end(one)
        except BaseException as error:
            # Whatever went wrong belongs to the caller; the engine lives on.
            self._end(one, error)

    def _end_early(self, one: _Running) -> None:
        try:
            one.steps.close()
            one.job.stop()
        except BaseException as error:
            self._end(one, error)
        else:
            self._end(one)

    def _end(self, one: _Running, error: BaseException | None = None) -> None:
        """Give a job's row back and tell its caller that it has ended."""
        if error is not None:
            log.debug("a request failed", exc_info=error)
        with self._changed:
            assert self._model is not None
            self._model.slots.release(one.slot, used=one.job.used)
            self._running.remove(one)
            self._wake()
            if error is None and self._closed.is_set():
                error = ClosedError(CLOSED)
        self._tell(one.job, error)
        one.slot.settle()
