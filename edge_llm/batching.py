"""Many prompts on one model: lists and streams of any length, answered together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from edge_llm.engine.generation import Generation, PromptProgress
from edge_llm.engine.job import POLL_SECONDS
from edge_llm.errors import ArgumentError, EdgeLLMError, QueueFullError
from edge_llm.options import ChatOptions
from edge_llm.results import Completion
from edge_llm.text.chat import Message

if TYPE_CHECKING:
    from edge_llm.engine.scheduler import Engine
    from edge_llm.model import Prompt

__all__ = ["BatchItem", "BatchResult", "Errors", "OnPrompt", "answer_all", "is_conversation"]

Errors = Literal["raise", "return"]

# Requests in the engine's hands, for each slot: the next one stands ready when one ends.
AHEAD = 2

# Results that wait for an earlier one, for each slot: the slots go on beside a long answer until
# there are so many.
EARLY = 64


@dataclass(frozen=True, slots=True)
class BatchItem:
    """A prompt of many with something of its own.

    Attributes:
        prompt: Text, tokens, a list of messages; or the error that keeps it from being any of them,
            which is its result then.
        options: They win over those of the batch.
    """

    prompt: Prompt | Sequence[Message] | EdgeLLMError
    options: ChatOptions = field(default_factory=ChatOptions)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The answer to one prompt of many.

    Attributes:
        index: Place of the prompt, from 0.
        completion: The answer, where there is one.
        error: What was raised in its place.
    """

    index: int
    completion: Completion | None = None
    error: EdgeLLMError | None = None

    @property
    def text(self) -> str:
        """The answer's text.

        Raises:
            EdgeLLMError: There is none; it says why.
        """
        if self.completion is None:
            assert self.error is not None
            raise self.error
        return self.completion.text


OnPrompt = Callable[[int, int], object]

Make = Callable[[], tuple[Generation, OnPrompt | None]]
"""Makes the job of a request, and says who wants to know how far its prompt is; raises what is
wrong with it."""


def answer_all(
    engine: Engine,
    requests: Iterable[Make],
    *,
    slots: int,
    ordered: bool,
    errors: Errors,
    on_progress: Callable[[int], object] | None,
) -> Iterator[BatchResult]:
    """Answer requests as they are made, a few of them at a time.

    Args:
        engine: The engine.
        requests: Read on a thread of its own, for it may wait for whoever gets the results. What
            reading raises is raised behind the results of what was read before.
        slots: Requests that the engine computes together.
        ordered: Give results in the order of the requests, rather than as they come.
        errors: "raise" ends everything with the first error; "return" gives it as a result.
        on_progress: Called with the number of results so far.
    """
    if errors not in ("raise", "return"):
        raise ArgumentError("errors", "'raise' or 'return'", errors)
    return _Batch(engine, requests, slots, errors, on_progress).run(ordered)


@dataclass(slots=True)
class _Request:
    """A request that was made.

    Attributes:
        generation: Its job.
        on_prompt: Called with how far its prompt is.
        results: What the job puts.
        answer: The last of them, once it is there.
    """

    generation: Generation
    on_prompt: OnPrompt | None
    results: Iterator[object] = field(init=False)
    answer: Completion | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.results = self.generation.results(lambda: None)

    def take(self, result: object) -> None:
        """Take one of the results."""
        if not isinstance(result, PromptProgress):
            chunk = self.generation.chunk(result)
            assert chunk is not None
            self.answer = Completion.of(chunk)
        elif self.on_prompt is not None:
            self.on_prompt(result.done, result.total)


class _Batch:
    """A window over the requests: what is in the engine's hands, and what came too early."""

    def __init__(
        self,
        engine: Engine,
        requests: Iterable[Make],
        slots: int,
        errors: Errors,
        on_progress: Callable[[int], object] | None,
    ) -> None:
        self._engine = engine
        self._errors = errors
        self._on_progress = on_progress
        self._most_running, self._most = slots * AHEAD, slots * (AHEAD + EARLY)
        # Who has news: the index of a request, or None for the source.
        self._news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._source = _Source(requests, slots, partial(self._news.put, None))
        self._running: dict[int, _Request] = {}
        self._early: dict[int, BatchResult] = {}
        self._held: _Request | None = None  # the queue was full
        self._made = self._done = 0

    def run(self, ordered: bool) -> Iterator[BatchResult]:
        """Give the results."""
        given = 0
        try:
            self._source.start()
            while True:
                self._fill()
                while self._early and (given in self._early or not ordered):
                    index = given if ordered else next(iter(self._early))
                    result = self._early.pop(index)
                    if result.error is not None and self._errors == "raise":
                        raise result.error
                    given += 1
                    yield result
                    self._fill()
                if not self._running and self._held is None and self._source.ended:
                    break
                self._wait()
            if self._source.error is not None:
                raise self._source.error
        finally:
            self._source.close()
            for request in self._running.values():
                self._engine.abandon(request.generation)

    def _fill(self) -> None:
        """Submit requests as long as there are any, and room."""
        while (
            len(self._running) < self._most_running
            and len(self._running) + len(self._early) < self._most
        ):
            if self._held is None:
                if (make := self._source.take()) is None:
                    return
                try:
                    self._held = _Request(*make())
                except EdgeLLMError as error:
                    self._end(self._made, BatchResult(self._made, error=error))
                    self._made += 1
                    continue
            self._held.generation.notify = partial(self._news.put, self._made)
            try:
                self._engine.offer(self._held.generation)
            except QueueFullError:
                return  # others fill it; some time later there is room
            except EdgeLLMError as error:  # the model was closed since it was made
                self._end(self._made, BatchResult(self._made, error=error))
            else:
                self._running[self._made] = self._held
            self._made += 1
            self._held = None

    def _wait(self) -> None:
        """Wait for news, for a while."""
        try:
            index = self._news.get(timeout=POLL_SECONDS)
        except queue.Empty:
            for one in self._running.values():
                if one.generation.ended():
                    self._engine.interrupt(one.generation)
            return
        if index is not None:
            self._take(index)

    def _take(self, index: int) -> None:
        """Take what a request has news of, one thing each time."""
        request, error = self._running.get(index), None
        if request is None:
            return  # it has ended without the engine, which was closed and puts some more
        try:
            result = next(request.results, None)
        except EdgeLLMError as failure:
            result, error = None, failure
        if result is not None:
            request.take(result)
            return
        del self._running[index]
        self._end(index, BatchResult(index, None if error else request.answer, error))

    def _end(self, index: int, result: BatchResult) -> None:
        """A request has its result."""
        self._early[index] = result
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done)


class _Source:
    """Reads an iterator on a thread of its own, a few items ahead of whoever takes them.

    So an iterator that blocks holds up nothing but what comes from it. The thread ends with the
    iterator, or behind the next item once nobody wants one; a daemon, for that may never come.

    Args:
        requests: The iterator.
        ahead: Most items that are read and not taken.
        came: Called, on the thread, when there is an item or the end.

    Attributes:
        ended: Whether all was taken.
        error: What ended the iterator, if it was no proper end.
    """

    def __init__(self, requests: Iterable[Make], ahead: int, came: Callable[[], object]) -> None:
        self.ended = False
        self.error: BaseException | None = None
        self._requests = requests
        self._came = came
        self._closed = False
        self._room = threading.Semaphore(ahead - 1)  # beside the one that is being read
        self._ready: queue.SimpleQueue[Make | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="edge_llm-batch", daemon=True).start()

    def take(self) -> Make | None:
        """The next item, if it is there."""
        if self.ended or self._ready.empty():
            return None
        make = self._ready.get()
        self.ended = make is None
        self._room.release()
        return make

    def close(self) -> None:
        """Nobody takes any more."""
        self._closed = True
        self._room.release()

    def _read(self) -> None:
        try:
            for make in self._requests:
                self._put(make)
                self._room.acquire()
                if self._closed:
                    return
        except BaseException as error:
            self.error = error
        self._put(None)

    def _put(self, make: Make | None) -> None:
        self._ready.put(make)
        self._came()


def is_conversation(prompt: object) -> bool:
    """Whether a prompt is a list of messages, rather than text or tokens."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and isinstance(prompt[0], Mapping)
    )
