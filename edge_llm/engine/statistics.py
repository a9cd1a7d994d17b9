"""What the engine has done and is doing, for whoever watches it."""

from __future__ import annotations

import collections
import time
from dataclasses import dataclass

from edge_llm.results import RequestReport

__all__ = ["EngineStats", "Recorder"]

RECENT_SECONDS = 10.0

COUNTED = (
    *("requests", "finished", "cancelled", "timed_out", "refused", "failed"),
    *("prompt_tokens", "reused_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens"),
    *("steps", "step_rows"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A model's state and its work so far.

    Attributes:
        slots: Sequences that can be answered at once.
        running: Requests that have a slot: they are computed, or wait for the disk.
        waiting: Requests that wait for a slot.
        requests: Requests that have ended, in whatever way: the sum of the next five.
        finished: How many of them came to their own end.
        cancelled: ... were cancelled, or nobody read on.
        timed_out: ... ran out of time.
        refused: ... found the queue full.
        failed: ... raised another error.
        prompt_tokens: Tokens of prompts of the ended requests, but for refused ones.
        reused_tokens: How many of them were not computed again.
        completion_tokens: Tokens of their answers.
        drafted_tokens: Guesses that were computed along with them.
        accepted_tokens: How many guesses came true.
        queued_seconds: Sum of the time that they waited for a slot.
        steps: Runs of the graph.
        step_rows: Rows at work in these steps, all together.
        tokens_per_second: Tokens that were chosen in the last 10 seconds, a second; counted from
            the end of the first step in that time, and 0 until the second one.
    """

    slots: int
    running: int
    waiting: int
    requests: int
    finished: int
    cancelled: int
    timed_out: int
    refused: int
    failed: int
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    queued_seconds: float
    steps: int
    step_rows: int
    tokens_per_second: float

    @property
    def cache_hit_rate(self) -> float:
        """Share of the prompts' tokens that were not computed again; 0 before the first prompt."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the guesses that came true; 0 before the first one."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def rows_per_step(self) -> float:
        """Rows at work in a step, on the average; 0 before the first one."""
        return self.step_rows / self.steps if self.steps else 0.0


class Recorder:
    """Counts; the engine's lock guards it.

    Attributes:
        totals: The counts of :class:`EngineStats` that only ever rise.
    """

    def __init__(self) -> None:
        self.totals: collections.Counter[str] = collections.Counter()
        self.queued_seconds = 0.0
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._recent_tokens = 0

    def add(self, **counts: int) -> None:
        """Add to the totals."""
        self.totals.update(counts)

    def ended(self, report: RequestReport) -> None:
        """A job has ended."""
        self.add(requests=1, **{report.outcome: 1})
        if (usage := report.usage) is not None:
            self.add(
                prompt_tokens=usage.prompt_tokens,
                reused_tokens=usage.reused_tokens,
                completion_tokens=usage.completion_tokens,
                drafted_tokens=usage.drafted_tokens,
                accepted_tokens=usage.accepted_tokens,
            )

    def chosen(self, tokens: int) -> None:
        """So many tokens of answers were chosen in a step."""
        now = time.perf_counter()
        self._recent.append((now, tokens))
        self._recent_tokens += tokens
        self._forget(now)

    def snapshot(self, *, slots: int, running: int, waiting: int) -> EngineStats:
        """The present state."""
        now = time.perf_counter()
        self._forget(now)
        return EngineStats(
            slots=slots,
            running=running,
            waiting=waiting,
            queued_seconds=self.queued_seconds,
            tokens_per_second=self._speed(now),
            **{name: self.totals[name] for name in COUNTED},
        )

    def _speed(self, now: float) -> float:
        """Tokens a second, without the first step's, whose beginning is not known."""
        if not self._recent:
            return 0.0
        began, first = self._recent[0]
        return (self._recent_tokens - first) / (now - began) if now > began else 0.0

    def _forget(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > RECENT_SECONDS:
            self._recent_tokens -= self._recent.popleft()[1]
