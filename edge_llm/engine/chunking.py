"""How many of a prompt's tokens to feed at once."""

from __future__ import annotations

__all__ = ["ChunkPlanner"]

# Between two chunks a prompt's progress is told and its end is checked. The budget is what one
# chunk may take; planning for three quarters of it leaves room for a slow moment.
BUDGET_SECONDS = 0.2
TARGET_SECONDS = 0.15

# A step costs something besides its tokens, most of all on a busy machine. Chunks are so long that
# this is at most a third of their time, whatever the budget: a prompt then takes at most 1.5 times
# as long as it must. (Cancelling and deadlines act inside a chunk all the same.)
LEAST_WORK = 2.0

# Before anything was measured: a further token costs this share of a lone one. The largest share
# seen was 0.25 (a 0.5B model, 16 tokens at once), so the first chunk errs on the short side.
FIRST_GUESS_SHARE = 0.3

# One slow moment makes a step's own cost look as large as a whole chunk. So what is taken for it
# may grow by this factor from one chunk to the next: a machine that has become slow is soon
# believed.
MOST_GROWTH = 4.0

# Two chunks tell a step's own cost from its tokens' only if one is clearly longer; and only for a
# while, so after some chunks of one length a longer one, still within the budget, asks again.
CLEARLY_LONGER = 1.3
ASK_AGAIN = 6


class ChunkPlanner:
    """Chooses chunks that take at most about 200 ms, from what chunks took so far.

    A chunk of n tokens is taken to cost ``fixed + n * each``; the two come from the last chunk and
    the last one before it of clearly another length.

    Args:
        fixed: Tokens of every chunk, where the user wants it so.
        widest: Most tokens of a chunk.
        single_token: Seconds that a step of one token takes.
    """

    def __init__(self, *, fixed: int | None, widest: int, single_token: float) -> None:
        self._fixed = fixed
        self._widest = widest
        self._last = self._other = (1, single_token)
        self._own = single_token
        self._age = 0
        self._each = each = FIRST_GUESS_SHARE * single_token
        self._tokens = self._plan(single_token - each, each)

    @property
    def tokens(self) -> int:
        """Most tokens of a step that others wait for."""
        return self._tokens if self._fixed is None else self._fixed

    @property
    def own_tokens(self) -> float:
        """How many tokens more a step could take in the time of another step's own cost."""
        return self._own / self._each

    def next(self, remaining: int, *, timed: bool = True) -> int:
        """Tokens of the next chunk.

        Args:
            remaining: Tokens that are left.
            timed: Whether it is to take no longer than others want to wait.
        """
        if self._fixed is not None:
            return min(self._fixed, remaining)
        # One token alone takes another kernel than several at once, and on a quantized model the
        # two round differently. A prompt's last token is therefore never fed by itself, so that
        # the logits do not depend on where the clock cut the prompt.
        chunk = min(self._tokens if timed else self._widest, remaining)
        if remaining - chunk == 1 and self._widest > 1:
            chunk += 1 if chunk < self._widest else -1
        return chunk

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn what a chunk took; a short remainder tells too little of long ones, unless slow."""
        if seconds <= 0 or (tokens * 4 < self._tokens and seconds < TARGET_SECONDS):
            return
        last, self._last = self._last, (tokens, seconds)
        if max(last[0], tokens) >= CLEARLY_LONGER * min(last[0], tokens):
            self._other, self._age = last, 0
        self._age += 1
        average = seconds / tokens
        # The bounds hold off what noise and a machine that has just changed its pace make of it.
        each = average
        if self._other[0] != tokens:
            slope = (seconds - self._other[1]) / (tokens - self._other[0])
            least = max(seconds - MOST_GROWTH * self._own, 0.1 * seconds) / tokens
            each = min(max(slope, least), average)
            self._own = max(seconds - each * tokens, self._own / MOST_GROWTH)
        self._each = each
        wanted = self._plan(seconds - each * tokens, each)
        if self._age % ASK_AGAIN == 0:
            wanted = min(max(wanted, int(tokens * CLEARLY_LONGER) + 1), self._widest)
        # At most doubling guards against a lucky measurement; shrinking is immediate.
        self._tokens = min(wanted, max(2, self._tokens * 2))

    def _plan(self, fixed: float, each: float) -> int:
        wanted = max(TARGET_SECONDS - fixed, LEAST_WORK * fixed) / each
        return min(max(2, int(min(wanted, self._widest))), self._widest)
