"""One answer: chosen token by token, turned into text, ended for one of four reasons."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
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
from edge_llm.decoding.speculation import PromptLookup
from edge_llm.decoding.stops import StopMatcher
from edge_llm.engine.job import NO_TOKENS, Feed, Job, Steps, feed_prompt
from edge_llm.errors import QueueFullError
from edge_llm.results import Chunk, FinishReason, RequestReport, Timings, Usage
from edge_llm.text.streaming import Detokenizer

if TYPE_CHECKING:
    from edge_llm.engine.drafting import Drafting
    from edge_llm.engine.slot import Reuse, Slot
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
        lookup: Whether to draft tokens from what stands in front of them.
        reuse: Whether to take what the cache holds of the prompt.
        logprobs: Alternatives to report per token; None reports nothing.
        hook: The user's function on the logits.
        cancel: Ends the request when it is set.
        timeout: Seconds after which the request ends.
        priority: Of two waiting requests the one with the higher priority is served first.
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
    lookup: bool
    reuse: bool
    logprobs: int | None
    hook: LogitsHook | None
    cancel: threading.Event | None
    timeout: float | None
    priority: int
    progress: bool
    stream: bool


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """So many of a prompt's tokens are done."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class _Part:
    """What the engine hands over of an answer: tokens, and text where it had to look at it."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    text: str | None
    reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class Generation(Job):
    """Answers a request.

    Puts :class:`PromptProgress` where it was asked for, and parts that :meth:`chunk` turns into
    :class:`Chunk`. Tokens become text on the caller's thread, while the engine computes the next
    one; only stop strings need the text between two steps.

    Behind the prompt, :meth:`wanted` says what to feed next, and :meth:`consume` takes the logits.

    Args:
        request: What is asked for.
        tokenizer: Makes text of tokens.
        vocab: Width of the logits.
        drafting: Whether drafts are of use, and how many.
        load_seconds: What loading the model took.
    """

    kind = "answer"

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        *,
        vocab: int,
        drafting: Drafting,
        load_seconds: float,
    ) -> None:
        super().__init__(
            cancel=request.cancel,
            timeout=request.timeout,
            prompt=request.prompt if request.reuse else NO_TOKENS,
            priority=request.priority,
        )
        self._request = request
        self._sampler = Sampler(
            request.sampling,
            vocab_size=vocab,
            prompt=request.prompt,
            rng=np.random.default_rng(request.seed),
            hook=request.hook,
        )
        self._drafting = drafting
        self._lookup = None
        if request.lookup and drafting.possible:
            self._lookup = PromptLookup(request.prompt.tolist())
        self._last = int(request.prompt[-1])
        self._drafts: list[int] = []
        self._reason: FinishReason | None = None
        self._drafted = self._accepted = 0
        self._forbidden = tuple(request.ending)
        self._writer = _Writer(tokenizer, request)
        self._load_seconds = load_seconds
        self._clock = _Clock(self.created)
        self._reuse: Reuse | None = None
        self._last_part: _Part | None = None
        # What was not handed over yet: by the engine, and by the caller's side.
        self._part = _Part([], [], "" if request.stops else None)
        self._held = _Part([], [], None)

    def steps(self, slot: Slot) -> Steps:
        """Compute the prompt, then token after token."""
        self._clock.started = time.perf_counter()
        prompt = self._request.prompt
        self._reuse = yield from slot.recall(self.prompt)
        logits = yield from feed_prompt(slot, prompt, self._progress)
        slot.offer(prompt, computed=len(prompt) - self._reuse.tokens)
        self._clock.prompted = time.perf_counter()
        while True:
            slot.drop(self.consume(logits))
            if self._reason:
                self._end(self._reason)
                return
            if self._request.stream:
                self.put(self._part)
                self._part = _Part([], [], "" if self._request.stops else None)
            given = yield self.wanted(slot)
            assert given is not None
            logits = given

    def wanted(self, slot: Slot) -> Feed:
        """What to feed next: the last token, and drafts behind it."""
        lookup, self._drafts = self._lookup, []
        if lookup is None or not lookup.active or not self._drafting.costs.pays:
            return Feed([self._last])
        most = self._drafting.most(slot, self._request.max_tokens - self.answered)
        self._drafts = lookup.draft(min(most, lookup.proven) - 1)
        return Feed([self._last], drafts=self._drafts, chance=lookup.chance)

    def consume(self, logits: NDArray[np.float32]) -> int:
        """Take tokens up to the first one that was not drafted, or that ends the answer.

        To draw from the model's distribution p, and to go on where the draw is the draft's token t,
        is speculative sampling (Leviathan et al. 2023, arXiv:2211.17192) with a draft that is
        certain: t is accepted with probability p(t), and else the token comes from p without t.
        Each token takes one draw as in plain decoding, so that a seed gives the same text.

        Args:
            logits: float32 [1 + drafts, vocab], behind the last token and those drafts that were
                fed.

        Returns:
            How many of the fed tokens to drop from the cache.
        """
        del self._drafts[len(logits) - 1 :]
        self._drafted += len(self._drafts)
        for taken, row in enumerate(logits):
            self._last = self._choose(row)
            self._reason = self._take(self._last) or self.ended()
            if self._reason or self._drafts[taken : taken + 1] != [self._last]:
                break
        self._accepted += taken
        return len(self._drafts) - taken

    def interrupted(self) -> None:
        """A step was ended in the middle because the request was to end."""
        self._end(self.ended() or "cancelled")

    def chunk(self, result: object) -> Chunk | None:
        """Make a chunk of what :meth:`run` put, on the caller's thread; None without new text."""
        assert isinstance(result, _Part)
        text = result.text
        if text is None:
            text = "".join(map(self._writer.push, result.tokens))
            if result.reason:
                text += self._writer.flush()
        self._held.tokens.extend(result.tokens)
        self._held.logprobs.extend(result.logprobs)
        if not text and not result.reason:
            return None
        tokens, logprobs = tuple(self._held.tokens), tuple(self._held.logprobs)
        self._held.tokens.clear()
        self._held.logprobs.clear()
        return Chunk(
            text=text,
            tokens=tokens,
            logprobs=logprobs if self._request.logprobs is not None else None,
            finish_reason=result.reason,
            usage=result.usage,
            timings=result.timings,
        )

    def _progress(self, done: int) -> None:
        if self._request.progress:
            self.put(PromptProgress(done, len(self._request.prompt)))

    def _choose(self, logits: NDArray[np.float32]) -> int:
        early = self.answered < self._request.min_tokens
        token = self._sampler.sample(logits, forbidden=self._forbidden if early else ())
        if self._request.logprobs is not None:
            self._part.logprobs.append(token_logprobs(logits, token, self._request.logprobs))
        return token

    def _take(self, token: int) -> FinishReason | None:
        """Add a token to the answer; the reason if it is the last."""
        self._clock.token()
        self._sampler.accept(token)
        if self._lookup is not None:
            self._lookup.accept(token)
        self.answered += 1
        self._part.tokens.append(token)
        if token in self._request.ending:
            return "stop"
        if self._part.text is not None:
            self._part = replace(self._part, text=self._part.text + self._writer.push(token))
            if self._writer.stopped:
                return "stop"
        return "length" if self.answered == self._request.max_tokens else None

    def report(self, error: BaseException | None) -> RequestReport:
        """How the answer ended, for whoever keeps count."""
        if isinstance(error, QueueFullError):
            return super().report(error)
        last = self._last_part
        return RequestReport(
            kind=self.kind,
            finish_reason=last.reason if last and error is None else None,
            usage=last.usage if last else self._usage(),
            timings=last.timings if last else self._timings(),
            error=error,
        )

    def _end(self, reason: FinishReason) -> None:
        text = self._part.text
        self._last_part = replace(
            self._part,
            text=None if text is None else text + self._writer.flush(),
            reason=reason,
            usage=self._usage(),
            timings=self._timings(),
        )
        self.put(self._last_part)

    def _usage(self) -> Usage:
        """Tokens so far."""
        reuse = self._reuse
        return Usage(
            prompt_tokens=len(self._request.prompt),
            reused_tokens=reuse.tokens if reuse else 0,
            completion_tokens=self.answered,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            reused_from_disk=reuse.from_disk if reuse else 0,
            prefix_break=reuse.broken if reuse else None,
        )

    def _timings(self) -> Timings:
        return self._clock.timings(self._load_seconds, self.answered)


class _Writer:
    """Turns the tokens of an answer into its text, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(request.stops)
        self._ending = request.ending
        # Stop strings count only in what comes behind the first min_tokens tokens.
        self._unwatched = request.min_tokens

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.matched is not None

    def push(self, token: int) -> str:
        """The text that is certain with this token; an ending token is none."""
        if token in self._ending:
            return ""
        piece = self._detokenizer.decode(token)
        if self._unwatched:
            self._unwatched -= 1
            return piece
        return self._stops.decode(piece)

    def flush(self) -> str:
        """What was held back, which is text after all, unless it completes a stop string."""
        if self.stopped:
            return ""
        return self._stops.decode(self._detokenizer.flush()) + self._stops.flush()


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
