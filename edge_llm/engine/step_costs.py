"""What a step over several tokens costs on this machine, as a multiple of a step over one."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

__all__ = ["WIDTHS", "StepCosts"]

# Tokens of a step that verifies drafts. All are even: kernels take rows in pairs, and an odd one
# left over is computed by another kernel, which rounds otherwise (measured, ONNX Runtime 1.32).
WIDTHS = (2, 4, 8, 16)

# Assumed until a width was measured: about the least that was ever seen, so that each is tried.
FIRST_GUESS = {2: 1.1, 4: 1.3, 8: 1.7, 16: 2.5}
ENOUGH = 3
REMEMBERED = 16
# A busy moment must not decide for ever, nor the depth at which something was measured.
MEASURE_AGAIN = 2000

# Drafts are given up where even those that are copies gain less than this. Machines are far from
# it on either side, so that measuring again finds the same.
COPY = 0.95
LEAST_GAIN = 1.05
SUREST = 0.99


class StepCosts:
    """Learns from the steps themselves what a width costs, and which width pays most.

    One object serves all requests of a model, for steps of so many rows.

    Args:
        single: Seconds that a step over one token of each row takes.
        curve: Costs by width, relative to one token, to start from.

    Attributes:
        widths: Widths to choose from, in rising order.
        pays: Whether drafts are of any use here.
    """

    def __init__(self, *, single: float, curve: Mapping[int, float] | None = None) -> None:
        self.widths: tuple[int, ...] = WIDTHS
        self._start = FIRST_GUESS | dict(curve or {})
        self._seconds = {
            width: collections.deque[float](maxlen=REMEMBERED) for width in (1, *WIDTHS)
        }
        self._seconds[1].append(single)
        self._steps = 0
        self._settle()

    @property
    def curve(self) -> dict[int, float]:
        """Costs by width, relative to one token: measured ones, or what stands in for them."""
        return dict(self._curve)

    def observe(self, width: int, seconds: float) -> None:
        """Learn what a step over ``width`` tokens took."""
        if width not in self._seconds:  # the end of a prompt, an odd number of tokens
            return
        self._seconds[width].append(seconds)
        self._steps += 1
        again = self._steps >= MEASURE_AGAIN
        if again:
            self._steps = 0
            for one in WIDTHS:
                self._seconds[one].clear()
        if again or width > 1:
            self._settle()

    def best(self, guesses: Iterable[tuple[float, int]], *, rows: int = 1) -> int:
        """The width that gives the most tokens in its time.

        Args:
            guesses: Of each row that has drafts: the chance of each one to come true, if the one
                before it did, and the most tokens that the row can take in a step.
            rows: Rows of the step. One row alone gets the best width of those that fit, and 1 only
                where none does: which tokens are computed in a step of several must not hang on the
                clock, for one token alone rounds otherwise.
        """
        guesses = list(guesses)
        longest = max((most for _, most in guesses), default=1)
        fitting = [width for width in self.widths if width <= longest]
        if rows > 1:
            fitting.insert(0, 1)
        return max(fitting, key=lambda width: self._speed(guesses, rows, width), default=1)

    def _speed(self, guesses: list[tuple[float, int]], rows: int, width: int) -> float:
        """Tokens of a step in the time of a step of width 1."""
        tokens = sum(_expected(chance, min(width, most)) for chance, most in guesses)
        return (tokens + rows - len(guesses)) / self._cost(width)

    def _cost(self, width: int) -> float:
        return 1.0 if width == 1 else self._curve[width]

    def _settle(self) -> None:
        """Take over what was measured."""
        single = _typical(self._seconds[1])
        self._curve = {
            width: _typical(self._seconds[width]) / single
            if len(self._seconds[width]) >= ENOUGH
            else self._start[width]
            for width in WIDTHS
        }
        self.pays = (
            max(_expected(COPY, width) / self._cost(width) for width in self.widths) >= LEAST_GAIN
        )


def _expected(chance: float, width: int) -> float:
    """Tokens that a step is expected to give.

    With a chance of a for each of w - 1 drafts they are 1 + a + ... + a^(w - 1) (Leviathan et al.
    2023, arXiv:2211.17192, equation 1).
    """
    chance = min(chance, SUREST)
    return (1.0 - chance**width) / (1.0 - chance)


def _typical(seconds: collections.deque[float]) -> float:
    """The lower quartile: what else the machine does only ever makes a step longer."""
    return sorted(seconds)[len(seconds) // 4]
