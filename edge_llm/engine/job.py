"""Work for the engine: done on its thread, awaited on the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_llm.results import FinishReason, RequestKind, RequestReport

if TYPE_CHECKING:
    from edge_llm.engine.slot import Slot

__all__ = ["NO_TOKENS", "POLL_SECONDS", "Feed", "Job", "Steps", "feed_prompt"]

# How often a waiting caller looks at its cancel event and its deadline. Short enough to act at
# once; and on Windows a wait without end could not be interrupted from the keyboard.
POLL_SECONDS = 0.05

NO_TOKENS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Feed:
    """What a job wants computed next.

    Of several tokens the engine may feed only the first ones, so that no other job waits for all of
    them. Then it sends the logits of what was scored of these, or None where nothing was, and the
    job asks for the rest.

    Attributes:
        tokens: To append to the job's row, at least one.
        scored: How many of the last ones to give logits for.
        exact: Whether the logits themselves are the result, so that their last bits should not hang
            on the clock: it does not decide how many are fed, as long as no other job is at work.
        drafts: Guesses at what follows. The engine feeds as many of the first ones as pay, and
            gives logits for each.
        chance: Of each draft to come true, if the one before it did.
        until: What has to be done first, by another thread. Then there are no tokens: the engine
            goes on with other jobs meanwhile, and sends None once it is done, or it is too late.
        latest: From when on it is, in seconds of time.perf_counter().
    """

    tokens: Sequence[int] | NDArray[np.int64]
    scored: int = 1
    exact: bool = False
    drafts: Sequence[int] = ()
    chance: float = 0.0
    until: Future[Any] | None = None
    latest: float = math.inf

    @property
    def single(self) -> bool:
        """Whether this is the next token of an answer, which a step computes for many rows."""
        return len(self.tokens) == 1

    @property
    def waits(self) -> bool:
        """Whether there is nothing to feed yet."""
        return (
            self.until is not None and not self.until.done() and time.perf_counter() < self.latest
        )


Steps = Generator[Feed, NDArray[np.float32] | None, None]
"""A job in the engine's hands: gives feeds, and takes float32 [scored + drafts fed, vocab].

What it runs itself is memory and arithmetic; for the disk it waits with :attr:`Feed.until`."""


def feed_prompt(
    slot: Slot, prompt: NDArray[np.int64], progress: Callable[[int], object]
) -> Generator[Feed, NDArray[np.float32] | None, NDArray[np.float32]]:
    """Steps that feed what a row does not hold of a prompt, in chunks.

    Args:
        slot: The row, which holds a proper prefix of the prompt.
        prompt: int64 [tokens].
        progress: Called before each chunk with the number of tokens done.

    Returns:
        The last token's logits, float32 [1, vocab].
    """
    logits = None
    while logits is None:
        progress(slot.length)
        logits = yield Feed(prompt[slot.length :])
    return logits


class Job(ABC):
    """A unit of work with a way to end it early.

    The engine runs :meth:`steps` on its own thread, step by step among those of other jobs; what it
    puts is read by :meth:`results` on the caller's. A caller that reads slowly holds nobody up:
    what was put waits for it.

    Args:
        cancel: An event of the caller's that ends the job when it is set.
        timeout: Seconds from now after which the job ends.
        prompt: int64 [tokens]: what the job will feed first, where it can take what a row holds of
            it: the one that holds the longest part will be chosen.
        priority: Of two waiting jobs the one with the higher priority is served first.

    Attributes:
        created: When it was, in seconds of time.perf_counter().
        resumes: Whether it works on the row that was used last, as that is.
        callback: The option by which a caller gives a function that :meth:`steps` calls.
        answered: Tokens of an answer that were chosen so far.
        used: Whether its row counts as the one that was used last, or is as it was.
        finished: Whether all results are there.
        fault: What the cancel event raised in place of an answer, if it ever did.
        notify: Called, on the engine's thread, when a result was put.
    """

    kind: ClassVar[RequestKind]
    resumes: ClassVar[bool] = False
    callback: ClassVar[str] = "logits_hook"

    def __init__(
        self,
        *,
        cancel: threading.Event | None,
        timeout: float | None,
        prompt: NDArray[np.int64] = NO_TOKENS,
        priority: int = 0,
    ) -> None:
        self.created = time.perf_counter()
        self.answered = 0
        self.used = True
        self.finished = False
        self.fault: BaseException | None = None
        self.prompt = prompt
        self.priority = priority
        self.notify: Callable[[], object] | None = None
        self._cancel = cancel
        self._deadline = None if timeout is None else self.created + timeout
        self._abandoned = False
        self._stopped: FinishReason | None = None
        self._results: queue.SimpleQueue[object] = queue.SimpleQueue()

    @abstractmethod
    def steps(self, slot: Slot) -> Steps:
        """Do the work on a row; put results. It may be closed between any two steps."""

    @abstractmethod
    def interrupted(self) -> None:
        """Put the last result after the work was ended early, or before it began."""

    def stop(self) -> None:
        """End the work early, or before it began; raises what :meth:`interrupted` raises."""
        self._stopped = self.ended() or "cancelled"
        self.interrupted()

    def report(self, error: BaseException | None) -> RequestReport:
        """How the work ended, for whoever keeps count."""
        reason = self._stopped if error is None else None
        return RequestReport(kind=self.kind, finish_reason=reason, error=error)

    def waited(self) -> float:
        """Seconds since the job was made."""
        return time.perf_counter() - self.created

    def ended(self) -> FinishReason | None:
        """Why the job should stop now, if it should.

        Anybody may ask, the engine for one, so what a caller's own kind of event raises does not
        leave here: it ends the job, whose caller gets it in the end.
        """
        if self._abandoned or self._cancelled():
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
        if self.notify is not None:
            self.notify()

    def finish(self, error: BaseException | None = None) -> None:
        """Tell the caller that there is no more, or that the work failed; the first time counts."""
        if not self.finished:
            self.finished = True
            self.put(_End(error))

    def results(self, interrupt: Callable[[], None]) -> Iterator[object]:
        """The results in order, as they come.

        Args:
            interrupt: Called when the job is to stop, so that a running step ends early.

        Raises:
            BaseException: What :meth:`steps` raised.
        """
        while True:
            try:
                result = self._results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self.ended():
                    interrupt()
                continue
            if _is_end(result):
                return
            yield result

    async def aresults(
        self, came: asyncio.Event, interrupt: Callable[[], None]
    ) -> AsyncIterator[object]:
        """The results in order, as they come, on an event loop.

        Args:
            came: Set behind each result, by :attr:`notify`.
            interrupt: Called when the job is to stop, so that a running step ends early.

        Raises:
            BaseException: What :meth:`steps` raised.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(came.wait(), POLL_SECONDS)
            came.clear()
            while not self._results.empty():
                result = self._results.get_nowait()
                if _is_end(result):
                    return
                yield result
            if self.ended():
                interrupt()

    def _cancelled(self) -> bool:
        if self.fault is None and self._cancel is not None:
            try:
                return self._cancel.is_set()
            except KeyboardInterrupt:
                raise  # Ctrl-C is no fault of the event
            except BaseException as error:
                self.fault = error
        return self.fault is not None


class _End:
    """Nothing more comes."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _is_end(result: object) -> bool:
    """Whether there are no more results.

    Raises:
        BaseException: What ended them.
    """
    if not isinstance(result, _End):
        return False
    if result.error is not None:
        raise result.error
    return True
