"""One answer: chosen token by token, turned into text, ended for one of four reasons."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_llm.decoding.sampling import (
    LogitsHook,
    Sampler,
    Sampling,
    TokenLogprob,
    token_logprobs,
)
from edge_llm.decoding.stops import StopMatcher
from edge_llm.engine.job import Job
from edge_llm.results import Chunk, FinishReason, Timings, Usage
from edge_llm.text.streaming import Detokenizer

if TYPE_CHECKING:
    from edge_llm.engine.slot import Slot
    from edge_llm.text.tokenizer import Tokenizer

__all__ = ["Generation", "PromptProgress", "Request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for; checked by whoever makes it.

    Attributes:
        prompt: int64 [tokens], at least one; with ``max_tokens`` it fits into the context.
        max_tokens: Most tokens of the answer, at least 1.
        min_tokens: Tokens before which nothing may end the answer.
        sampling: How tokens are chosen.
        seed: Of the random generator; None draws one from the system.
        stops: Strings that end the answer.
        ending: Tokens that end the answer.
        logprobs: Alternatives to report per token; None reports nothing.
        hook: The user's function on the logits.
        cancel: Ends the request when it is set.
        timeout: Seconds after which the request ends.
        progress: Whether to report how far the prompt is.
        stream: Whether to hand over the text as it comes, or as one piece at the end.
    """

    prompt: NDArray[np.int64]
    max_tokens: int
    min_tokens: int
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    ending: frozenset[int]
    logprobs: int | None
    hook: LogitsHook | None
    cancel: threading.Event | None
    timeout: float | None
    progress: bool
    stream: bool


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """So many of a prompt's tokens are done."""

    done: int
    total: int


class Generation(Job):
    """Answers a request.

    Puts :class:`PromptProgress` where it was asked for, and :class:`Chunk`.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, *, vocab: int, load_seconds: float
    ) -> None:
        super().__init__(cancel=request.cancel, timeout=request.timeout)
        self._request = request
        self._sampler = Sampler(
            request.sampling,
            vocab_size=vocab,
            prompt=request.prompt,
            rng=np.random.default_rng(request.seed),
            hook=request.hook,
        )
        self._forbidden = tuple(request.ending)
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(request.stops)
        self._load_seconds = load_seconds
        self._clock = _Clock(self.created)
        self._answered = 0
        self._reused = 0
        # What was not handed over yet.
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def run(self, slot: Slot) -> None:
        """Compute the prompt, then token after token."""
        self._clock.started = time.perf_counter()
        prompt = self._request.prompt
        self._reused = slot.rewind(prompt)
        logits = slot.prefill(prompt, between=self._between_chunks)
        self._clock.prompted = time.perf_counter()
        if logits is None:
            self._end(self.ended() or "cancelled")
            return
        while True:
            token = self._choose(logits)
            reason = self._take(token) or self.ended()
            if reason:
                self._end(reason)
                return
            if self._request.stream and self._text:
                self._hand_over()
            logits = slot.feed((token,), scored=1)[0]

    def interrupted(self) -> None:
        """A step was ended in the middle because the request was to end."""
        self._end(self.ended() or "cancelled")

    def _between_chunks(self, done: int) -> bool:
        if self._request.progress:
            self.put(PromptProgress(done, len(self._request.prompt)))
        return self.ended() is not None

    def _choose(self, logits: NDArray[np.float32]) -> int:
        early = self._answered < self._request.min_tokens
        token = self._sampler.sample(logits, forbidden=self._forbidden if early else ())
        if self._request.logprobs is not None:
            self._logprobs.append(token_logprobs(logits, token, self._request.logprobs))
        return token

    def _take(self, token: int) -> FinishReason | None:
        """Add a token to the answer; the reason if it is the last."""
        self._clock.token()
        self._sampler.accept(token)
        self._answered += 1
        self._tokens.append(token)
        if token in self._request.ending:
            return "stop"
        piece = self._detokenizer.decode(token)
        # Stop strings count only in what comes behind the first min_tokens tokens.
        if self._answered > self._request.min_tokens:
            piece = self._stops.decode(piece)
        if piece:
            self._text.append(piece)
        if self._stops.matched is not None:
            return "stop"
        return "length" if self._answered == self._request.max_tokens else None

    def _hand_over(self) -> None:
        self.put(Chunk(text="".join(self._text), tokens=tuple(self._tokens), logprobs=self._logs()))
        self._text.clear()
        self._tokens.clear()
        self._logprobs.clear()

    def _end(self, reason: FinishReason) -> None:
        if self._stops.matched is None:
            # The last bytes may complete a stop string; what was held back is text after all.
            self._text += [self._stops.decode(self._detokenizer.flush()), self._stops.flush()]
        self.put(
            Chunk(
                text="".join(self._text),
                tokens=tuple(self._tokens),
                logprobs=self._logs(),
                finish_reason=reason,
                usage=Usage(
                    prompt_tokens=len(self._request.prompt),
                    reused_tokens=self._reused,
                    completion_tokens=self._answered,
                ),
                timings=self._clock.timings(self._load_seconds, self._answered),
            )
        )

    def _logs(self) -> tuple[TokenLogprob, ...] | None:
        return tuple(self._logprobs) if self._request.logprobs is not None else None


class _Clock:
    """The moments of a request, in seconds of time.perf_counter()."""

    def __init__(self, created: float) -> None:
        self.created = created
        self.started: float | None = None
        self.prompted: float | None = None
        self.first: float | None = None
        self.last = created

    def token(self) -> None:
        """A token was chosen."""
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last

    def timings(self, load: float, answered: int) -> Timings:
        now = time.perf_counter()
        started = now if self.started is None else self.started
        prompted = now if self.prompted is None else self.prompted
        per_token = None
        if self.first is not None and answered > 1:
            per_token = (self.last - self.first) / (answered - 1)
        return Timings(
            load=load,
            queued=started - self.created,
            prompt=prompted - started,
            first_token=None if self.first is None else self.first - self.created,
            per_token=per_token,
            total=now - self.created,
        )
