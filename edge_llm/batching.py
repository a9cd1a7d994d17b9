"""Many prompts on one model: lists and streams of any length, answered together."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from edge_llm.engine.generation import Generation
from edge_llm.engine.job import POLL_SECONDS
from edge_llm.errors import ArgumentError, EdgeLLMError, QueueFullError
from edge_llm.options import ChatOptions
from edge_llm.results import Completion
from edge_llm.text.chat import Message

if TYPE_CHECKING:
    from edge_llm.engine.scheduler import Engine
    from edge_llm.model import Prompt

__all__ = ["BatchItem", "BatchResult", "Errors", "answer_all", "is_conversation"]

Errors = Literal["raise", "return"]

# Requests in the engine's hands, for each slot: the next one stands ready when one ends.
AHEAD = 2


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


def answer_all(
    engine: Engine,
    requests: Iterable[Callable[[], Generation]],
    *,
    slots: int,
    ordered: bool,
    errors: Errors,
    on_progress: Callable[[int], object] | None,
) -> Iterator[BatchResult]:
    """Answer requests as they are made, a few of them at a time.

    Args:
        engine: The engine.
        requests: Each makes a job; it may raise what is wrong with the request.
        slots: Requests that the engine computes together.
        ordered: Give results in the order of the requests, rather than as they come.
        errors: "raise" ends everything with the first error; "return" gives it as a result.
        on_progress: Called with the number of results so far.
    """
    if errors not in ("raise", "return"):
        raise ArgumentError("errors", "'raise' or 'return'", errors)
    return _Batch(engine, requests, slots * AHEAD, errors).run(ordered, on_progress)


class _Batch:
    """A window over the requests: what is in the engine's hands, and what came too early."""

    def __init__(
        self,
        engine: Engine,
        requests: Iterable[Callable[[], Generation]],
        width: int,
        errors: Errors,
    ) -> None:
        self._engine = engine
        self._requests = enumerate(requests)
        self._width = width
        self._errors = errors
        self._running: dict[int, Generation] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._early: dict[int, BatchResult] = {}
        self._held: tuple[int, Generation] | None = None  # the queue was full
        self._more = True

    def run(
        self, ordered: bool, on_progress: Callable[[int], object] | None
    ) -> Iterator[BatchResult]:
        """Give the results."""
        given = done = 0
        try:
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
                if not self._running and not self._more and self._held is None:
                    return
                done += self._wait()
                if on_progress is not None:
                    on_progress(done)
        finally:
            for generation in self._running.values():
                self._engine.abandon(generation)

    def _fill(self) -> None:
        """Submit requests as long as there is room."""
        while len(self._running) + len(self._early) < self._width:
            if self._held is None and not self._next():
                return
            if self._held is None:
                continue
            index, generation = self._held
            generation.notify = partial(self._ended.put, index)
            try:
                self._engine.submit(generation)
            except QueueFullError:
                return  # others fill it; some time later there is room
            self._running[index] = generation
            self._held = None

    def _next(self) -> bool:
        """Make the next request; False where there is none."""
        index, make = next(self._requests, (0, None)) if self._more else (0, None)
        if make is None:
            self._more = False
            return False
        try:
            self._held = index, make()
        except EdgeLLMError as error:
            self._early[index] = BatchResult(index, error=error)
        return True

    def _wait(self) -> int:
        """Wait for news from the engine; gives how many requests have ended."""
        if not self._running:
            time.sleep(POLL_SECONDS)
            return 0
        try:
            index = self._ended.get(timeout=POLL_SECONDS)
        except queue.Empty:
            for one in self._running.values():
                if one.ended():
                    self._engine.interrupt(one)
            return 0
        # Each puts twice: its answer, and that there is no more.
        generation = self._running.get(index)
        if generation is None or not generation.finished:
            return 0
        del self._running[index]
        self._early[index] = _result(index, generation)
        return 1


def _result(index: int, generation: Generation) -> BatchResult:
    """What a generation that has ended gives."""
    try:
        (result,) = generation.results(lambda: None)
    except EdgeLLMError as error:
        return BatchResult(index, error=error)
    chunk = generation.chunk(result)
    assert chunk is not None
    return BatchResult(index, Completion.of(chunk))


def is_conversation(prompt: object) -> bool:
    """Whether a prompt is a list of messages, rather than text or tokens."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and isinstance(prompt[0], Mapping)
    )
