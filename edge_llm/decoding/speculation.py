"""Drafts of what comes next in an answer, looked up in what stands in front of it.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): where the last tokens
stood before, what followed them then is a guess at what follows now. Guesses are followed all the
time, drafted or not, so how often they come true is known before a draft costs anything.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable

__all__ = ["PromptLookup"]

# How often a guess comes true depends most on how many tokens have matched: fewer than 2 (going on
# behind a token that differed), 2, 3, 4 and 5, 6 to 9, 10 to 19, more. The first estimates are
# those of novels, articles, code and edited copies of them, and weigh as much as so many guesses:
# the first draft that fails is the last until guesses have come true again.
MATCHES = (2, 3, 4, 6, 10, 20)
FIRST_CHANCES = (0.5, 0.3, 0.4, 0.55, 0.7, 0.85, 0.95)
FIRST_WEIGHT = 1.0
# From this chance on, drafts pay or cost next to nothing, on every machine that was measured. It
# is no measure of the clock: the same tokens are drafted in every run.
WORTH_DRAFTING = 0.75
# What an earlier guess still weighs when the next one is known: it is the last 20 that count.
DECAY = 0.95

# Longer matches are not told apart, and older ones than so many are not looked at.
LONGEST = MATCHES[-1]
CANDIDATES = 8
# An edited copy goes on behind the edit: after so long a match one differing token is passed over.
PASSED_OVER = 4

# A source proves itself with a short draft before it gets long ones, which cost more if they fail.
FIRST_WIDTH = 4


class PromptLookup:
    """Guesses each next token of an answer; the guesses and their chances hang on tokens alone.

    A guess is followed along its source for as long as it comes true. Then the last two tokens are
    looked up, and of the latest places where they stood the one with the longest match is followed.
    A token takes microseconds, however long the text is.

    Args:
        prompt: The tokens in front of the answer, at least one.

    Attributes:
        active: Whether to draft: since a guess last failed, their chance has been high enough. It
            stays so until one fails, so that what is active in front of a draft is active behind
            each of its tokens that come true, however long the draft is.
    """

    __slots__ = (
        "_earlier",
        "_hits",
        "_latest",
        "_matched",
        "_run",
        "_source",
        "_tokens",
        "_trials",
        "active",
    )

    def __init__(self, prompt: Iterable[int]) -> None:
        self._tokens = list(prompt)
        # Chains, as in zlib: where each pair of tokens ended last (the position behind it), and for
        # every such position the one of the same pair before; 0 is none.
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier = [0, 0]
        for end, pair in enumerate(itertools.pairwise(self._tokens), 2):
            self._earlier.append(self._latest.get(pair, 0))
            self._latest[pair] = end
        self._source: int | None = None  # where the token stands that is guessed next
        self._matched = 0
        self._run = 0  # guesses of this source that came true
        self._hits = [chance * FIRST_WEIGHT for chance in FIRST_CHANCES]
        self._trials = [FIRST_WEIGHT] * len(FIRST_CHANCES)
        self.active = False

    @property
    def proven(self) -> int:
        """Most tokens that a step should be trusted with: two more for each guess come true."""
        return FIRST_WIDTH + 2 * self._run

    @property
    def chance(self) -> float:
        """How likely the guess is to come true; 0 without one."""
        if self._source is None:
            return 0.0
        kind = bisect_right(MATCHES, self._matched)
        return self._hits[kind] / self._trials[kind]

    def accept(self, token: int) -> None:
        """Take a token into the answer."""
        tokens, source = self._tokens, self._source
        hit = source is not None and tokens[source] == token
        if source is not None:
            kind = bisect_right(MATCHES, self._matched)
            self._hits[kind] = DECAY * self._hits[kind] + hit
            self._trials[kind] = DECAY * self._trials[kind] + 1
        pair = (tokens[-1], token)
        earlier = self._latest.get(pair, 0)
        tokens.append(token)
        self._latest[pair] = len(tokens)
        self._earlier.append(earlier)
        if hit:
            assert source is not None
            self._source = source + 1
            self._matched += 1
            self._run += 1
            self.active = self.active or self.chance >= WORTH_DRAFTING
        else:
            self._look_up(earlier)
            self.active = self.chance >= WORTH_DRAFTING

    def draft(self, count: int) -> list[int]:
        """The next ``count`` guesses; what runs into the end of the text goes round in a circle."""
        assert self._source is not None
        piece = self._tokens[self._source : self._source + count]
        return list(itertools.islice(itertools.cycle(piece), count))

    def _look_up(self, end: int) -> None:
        """Of the places on a chain, follow the one with the longest match, the latest of several.

        Args:
            end: The position behind the latest one; 0 is none.
        """
        tokens, here = self._tokens, len(self._tokens)
        missed, run = self._source, self._matched
        self._source, self._matched, self._run = None, 0, 0
        for _ in range(CANDIDATES):
            if not end:
                break
            matched = 2
            while matched < min(end, LONGEST) and (
                tokens[end - 1 - matched] == tokens[here - 1 - matched]
            ):
                matched += 1
            if matched > self._matched:
                self._source, self._matched = end, matched
                if matched == LONGEST:
                    break
            end = self._earlier[end]
        if self._source is None and missed is not None and run >= PASSED_OVER:
            self._source = missed + 1
