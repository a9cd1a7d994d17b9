"""What the public calls give back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edge_llm.errors import QueueFullError

if TYPE_CHECKING:
    from edge_llm.decoding.sampling import TokenLogprob

__all__ = [
    "Chunk",
    "Completion",
    "FinishReason",
    "Outcome",
    "PrefixBreak",
    "RequestKind",
    "RequestReport",
    "Score",
    "Timings",
    "Usage",
]

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
RequestKind = Literal["answer", "score", "logits", "session"]
Outcome = Literal["finished", "cancelled", "timed_out", "refused", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixBreak:
    """Where a prompt stopped being what was at hand, in memory or in the prefix cache.

    A date or a name in a system prompt's first lines costs the whole prompt: here it shows.

    Attributes:
        position: How many tokens of the prompt matched, at least 1.
        cached: The token that was at hand there.
        prompt: The prompt's own token there. ``LLM.detokenize`` gives their text.
    """

    position: int
    cached: int
    prompt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens that a request took.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        reused_tokens: How many of them were at hand and were not computed again.
        reused_from_disk: How many of these were read from the prefix cache; the others were still
            in memory.
        prefix_break: Which token ended what the prompt has in common with what was at hand; None
            where nothing was, or all matched.
        completion_tokens: Tokens of the answer, an ending token included.
        drafted_tokens: Guesses at the answer's tokens that were computed along with it.
        accepted_tokens: How many of them came true: so many steps were saved.
    """

    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    reused_from_disk: int = 0
    prefix_break: PrefixBreak | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Wall-clock seconds of a request.

    Attributes:
        load: Loading the model, before any request.
        queued: From the call until work began (others were served).
        prompt: Computing the prompt's tokens that were not reused, and reading what the disk has.
        first_token: From the call until the first token was chosen; None if there was none.
        per_token: Mean from the first token to the last; None for fewer than two tokens.
        total: From the call until the end.
    """

    load: float
    queued: float
    prompt: float
    first_token: float | None
    per_token: float | None
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer.

    Attributes:
        text: The answer, without special tokens and without the stop string that ended it.
        tokens: Every token that was chosen, the ending one included.
        finish_reason: "stop" (an ending token or a stop string), "length" (max_tokens),
            "cancelled" or "timeout".
        usage: Tokens.
        timings: Seconds.
        logprobs: One entry per token where they were asked for, else None.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None

    @classmethod
    def of(cls, chunk: Chunk) -> Completion:
        """An answer that came in one piece."""
        assert chunk.finish_reason is not None
        assert chunk.usage is not None
        assert chunk.timings is not None
        return cls(
            text=chunk.text,
            tokens=chunk.tokens,
            finish_reason=chunk.finish_reason,
            usage=chunk.usage,
            timings=chunk.timings,
            logprobs=chunk.logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of an answer; exactly one, the last, has a ``finish_reason``.

    Attributes:
        text: New text: whole characters, never a part of a stop string that ended the answer.
        tokens: The tokens since the chunk before.
        logprobs: One entry per token where they were asked for, else None.
        finish_reason: Why the answer ended; None before the last chunk.
        usage: Tokens of the whole request; on the last chunk only.
        timings: Seconds of the whole request; on the last chunk only.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport:
    """How a request ended, for whoever keeps count: each that was handed over has one report.

    Attributes:
        kind: What was asked for. A session or prefix has ended when it is copied from the cache, or
            into it: what the disk refuses is for the caller alone.
        finish_reason: Why an answer ended; of everything else "cancelled", "timeout" or None. None
            where there is an error.
        usage: Tokens of an answer, as far as it came; None where it was refused, and of everything
            else.
        timings: Seconds of an answer, where there is usage.
        error: What was raised in place of a result.
    """

    kind: RequestKind
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: BaseException | None = None

    @property
    def outcome(self) -> Outcome:
        """How it ended, in a word: "refused" is for want of room in the queue."""
        if self.error is not None:
            return "refused" if isinstance(self.error, QueueFullError) else "failed"
        if self.finish_reason == "timeout":
            return "timed_out"
        return "cancelled" if self.finish_reason == "cancelled" else "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely the model finds a text.

    Attributes:
        tokens: The text's tokens, a leading BOS included.
        logprobs: Natural logarithms of each token's probability given those before it; one fewer
            than ``tokens``, for the first token has nothing before it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """The text's log-probability, in nats."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-probability; 1 where nothing was scored."""
        return math.exp(-self.total / len(self.logprobs)) if self.logprobs else 1.0
