"""How much a bundle may weigh or lose, and the search for the mix that stays within it."""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edge_llm.errors import ArgumentError

from .mixing import CHOICES, Ladder, Mix, Option, best, cheapest, rescaled

__all__ = ["Budget", "Found", "Trial", "check_least", "find_mix", "parse_size"]

MOST_FINISHED = 4
"""Mixes that are finished for a limited loss: each takes as long as a calibration."""

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One limit; the others are None.

    Attributes:
        max_kld: Divergence from the float32 model, nats per token.
        max_ppl_increase: Growth of the perplexity, as a share of the float32 model's.
        max_size: Bytes of the bundle.
        max_bits: Bits of a weight, scales included, on the average over all matrices.
    """

    max_kld: float | None = None
    max_ppl_increase: float | None = None
    max_size: int | None = None
    max_bits: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__slots__ if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise ArgumentError("budget", "exactly one limit", said, "Keep the one that matters.")
        name, value = self.limit
        number = int if name == "max_size" else int | float
        if isinstance(value, bool) or not isinstance(value, number) or not value > 0:
            raise ArgumentError(name, f"{'bytes' if number is int else 'a number'} above 0", value)

    @classmethod
    def read(
        cls, *, max_kld: float | None, max_ppl_increase: float | None, max_size: int | None
    ) -> Budget | None:
        """A budget, or None where no limit is given."""
        if max_kld is max_ppl_increase is max_size is None:
            return None
        return cls(max_kld=max_kld, max_ppl_increase=max_ppl_increase, max_size=max_size)

    @property
    def limit(self) -> tuple[str, float]:
        """The limit's name and value."""
        return next(
            (name, value) for name in self.__slots__ if (value := getattr(self, name)) is not None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A mix that was written and measured.

    Attributes:
        size: Bytes of the bundle.
        weights: Bytes of its matrices.
        kl_divergence: From the float32 model, nats per token.
        ppl_increase: Growth of the perplexity, as a share.
        top1_agreement: Share of tokens where both find the same one likeliest.
    """

    size: int
    weights: int
    kl_divergence: float
    ppl_increase: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class Found:
    """The mix that was chosen, and all that was measured on the way, the chosen one's last."""

    mix: Mix
    trials: tuple[Trial, ...]


def find_mix(
    options: Mapping[str, Sequence[Option]],
    groups: Sequence[Sequence[str]],
    budget: Budget,
    *,
    weights: int,
    measure: Callable[[Mix], Trial],
    finish: Callable[[Mix], Mix],
    reserve: int = 0,
) -> Found:
    """The smallest mix that loses no more than it may, or the truest that is no larger.

    What is finished loses less than what was searched. By how much less, each that is found tells;
    so where the loss is limited, the next search allows for it. Where bits are limited to fewer
    than any mix takes, as where rows fill no whole blocks, the smallest is taken.

    Args:
        options: Of every matrix.
        groups: Matrices whose losses can be compared; one group's with another's once both are
            measured.
        budget: The limit.
        weights: Elements of all matrices.
        measure: Writes and measures a mix.
        finish: Makes of a mix what will be used, with the same sizes.
        reserve: Bytes that the bundle will have besides what was measured.

    Raises:
        ArgumentError: No mix meets the limit; it names the best that is reached.
    """
    trials: list[Trial] = []

    def tried(mix: Mix) -> Trial:
        trials.append(measure(mix))
        return trials[-1]

    truest = best(options)
    top = tried(truest)
    fixed = top.size - top.weights + reserve
    room = _room(budget, fixed, weights)
    if room is None:
        _check_reach(budget, top)
    else:
        least = sum(one.size for one in cheapest(options).values())
        if budget.max_bits is not None:
            room = max(room, least)
        if least > room:
            raise _too_small(budget, f"at least {least + fixed:,} bytes")
    for names in groups:
        low = cheapest({name: options[name] for name in names})
        lost = tried({**truest, **low}).kl_divergence - top.kl_divergence
        options = rescaled(options, names, lost)
    ladder = Ladder(options)
    if room is not None:
        mix = finish(ladder.filled(room))
        tried(mix)
        return Found(mix, tuple(trials))
    search = _Search(ladder, truest, top, budget, tried, finish)
    mix, last = search.run()
    return Found(mix, (*(one for one in trials if one is not last), last))


def check_least(budget: Budget, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse a size that even the smallest storage of a model's matrices exceeds.

    Args:
        budget: The limit.
        shapes: Of the model's tensors; only matrices are counted.

    Raises:
        ArgumentError: No mix can be that small.
    """
    if budget.max_size is None:
        return
    least = sum(map(_least, (shape for shape in shapes if len(shape) == 2)))
    if least > budget.max_size:
        raise _too_small(budget, f"more than {least:,} bytes")


def _least(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix's smallest storage, whichever of its sides is rows."""
    blobs = (one.blob_shape(*sides) for one in CHOICES for sides in (shape, shape[::-1]))
    return min(math.prod(blob) + 4 * blob[0] * blob[1] for blob in blobs)


def _too_small(budget: Budget, domain: str) -> ArgumentError:
    return ArgumentError(
        "max_size",
        f"{domain}, which this model takes at 4 bits",
        budget.max_size,
        "Allow more, or take a smaller model.",
    )


def _check_reach(budget: Budget, top: Trial) -> None:
    name, value = budget.limit
    if _lost(budget, top) > value:
        raise ArgumentError(
            name,
            f"at least {_rounded_up(_lost(budget, top))}, which this model loses at 8 bits, the "
            "best that can be reached",
            value,
            "Allow more, or export it as fp32.",
        )


def _rounded_up(value: float) -> str:
    """Three digits of what is no less."""
    context = decimal.Context(prec=3, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal(repr(value))):g}"


@dataclass(frozen=True, slots=True)
class _Search:
    """The search for the smallest mix that loses no more than a limit."""

    ladder: Ladder
    truest: Mix
    top: Trial
    budget: Budget
    tried: Callable[[Mix], Trial]
    finish: Callable[[Mix], Mix]
    rungs: dict[int, Trial] = field(default_factory=dict)

    def run(self) -> tuple[Mix, Trial]:
        """The mix, finished, and what was measured of it."""
        _, limit = self.budget.limit
        aim, done, fitting = limit, set[int](), list[tuple[Mix, Trial]]()
        while len(done) < MOST_FINISHED:
            mix, rough = self._smallest(aim)
            if _size(mix) in done:
                break
            done.add(_size(mix))
            mix = self.finish(mix)
            trial = self.tried(mix)
            if _lost(self.budget, trial) <= limit:
                fitting.append((mix, trial))
            aim = limit * _lost(self.budget, rough) / max(_lost(self.budget, trial), 1e-12)
        # The truest one was measured first, and does meet the limit.
        return min(fitting, key=lambda one: one[1].size, default=(self.truest, self.top))

    def _smallest(self, limit: float) -> tuple[Mix, Trial]:
        """Bisect the ladder for the lowest rung that loses no more."""
        low, high, found, last = 0, len(self.ladder) + 1, self.truest, self.top
        while low < high:
            rung = (low + high) // 2
            mix = self.ladder.mix(rung)
            trial = self.rungs.get(rung) or self.tried(mix)
            self.rungs[rung] = trial
            if _lost(self.budget, trial) <= limit:
                high, found, last = rung, mix, trial
            else:
                low = rung + 1
        return found, last


def _lost(budget: Budget, trial: Trial) -> float:
    """What the budget limits."""
    return trial.kl_divergence if budget.max_kld is not None else trial.ppl_increase


def _size(mix: Mix) -> int:
    return sum(one.size for one in mix.values())


def _room(budget: Budget, fixed: int, weights: int) -> int | None:
    """Bytes that the matrices may have; None: what they lose is limited."""
    if budget.max_size is not None:
        return budget.max_size - fixed
    return None if budget.max_bits is None else int(budget.max_bits * weights / 8)


def parse_size(text: str) -> int:
    """Bytes, from such as ``250MB``, ``1.5GiB`` or ``1000000``.

    Raises:
        ArgumentError: It is none of these.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ArgumentError("max_size", "bytes, or a number with kB, MB, GB, KiB, MiB or GiB", text)
    return int(float(match[1]) * _UNITS[match[2]])
