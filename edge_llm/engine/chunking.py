"""How many of a prompt's tokens to feed at once."""

from __future__ import annotations

__all__ = ["ChunkPlanner"]

# Between two chunks a request can be cancelled, and its progress is told. The budget is what one
# chunk may take; planning for three quarters of it leaves room for a slow moment.
BUDGET_SECONDS = 0.2
TARGET_SECONDS = 0.15

# A step has a price of its own, so ever shorter chunks would make a slow machine slower still. A
# chunk of 8 tokens costs about two lone ones; cancelling acts inside it all the same.
NARROWEST = 8

# Before anything was measured: a further token costs this share of a lone one. The largest share
# seen was 0.25 (a 0.5B model, 16 tokens at once), so the first chunk errs on the short side.
FIRST_GUESS_SHARE = 0.3


class ChunkPlanner:
    """Chooses chunks that take at most about 200 ms, from what chunks took so far.

    Args:
        fixed: Tokens of every chunk, where the user wants it so.
        widest: Most tokens of a chunk.
        single_token: Seconds that a step of one token takes.
    """

    def __init__(self, *, fixed: int | None, widest: int, single_token: float) -> None:
        self._fixed = fixed
        self._widest = widest
        further = max(0.0, TARGET_SECONDS / single_token - 1) / FIRST_GUESS_SHARE
        self._tokens = self._bounded(1 + int(further))

    def next(self, remaining: int) -> int:
        """Tokens of the next chunk of a prompt that has ``remaining`` left."""
        if self._fixed is not None:
            return min(self._fixed, remaining)
        # One token alone takes another kernel than several at once, and on a quantized model the
        # two round differently. A prompt's last token is therefore never fed by itself, so that
        # the logits do not depend on where the clock cut the prompt.
        chunk = min(self._tokens, remaining)
        if remaining - chunk == 1:
            chunk += 1 if chunk < self._widest else -1
        return max(1, chunk)

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn what a chunk took; tiny chunks tell too little of large ones, unless slow."""
        if seconds <= 0 or (tokens * 4 < self._tokens and seconds < TARGET_SECONDS):
            return
        wanted = tokens * TARGET_SECONDS / seconds
        # At most doubling guards against a lucky measurement; shrinking is immediate.
        self._tokens = self._bounded(int(min(wanted, self._tokens * 2)))

    def _bounded(self, tokens: int) -> int:
        return min(max(NARROWEST, tokens), self._widest)
