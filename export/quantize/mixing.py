"""Which matrix is stored in how many bits: a ladder from the smallest bundle to the truest.

Every matrix has several options. Those that are worth their bytes lie on the lower convex hull of
loss over size, and the steps from one to the next, of all matrices, are taken in falling order of
loss spared per byte: each rung of that ladder is the mix of least loss for its size (Shoham and
Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers, 1988), if losses add up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from .storage import QuantizedMatrix, Storage

__all__ = ["CHOICES", "Ladder", "Mix", "Option", "best", "cheapest", "rescaled"]

CHOICES = (Storage(4, 128), Storage(4, 64), Storage(4, 32), Storage(8, 128))
"""What a matrix may be stored as; the first is the smallest."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a matrix.

    Attributes:
        matrices: The matrix as one or more below one another.
        size: Bytes.
        loss: What it is expected to add to the divergence; only ratios matter.
    """

    matrices: tuple[QuantizedMatrix, ...]
    size: int
    loss: float


Mix = Mapping[str, Option]
"""An option for every matrix, by its name in the graph."""


def cheapest(options: Mapping[str, Sequence[Option]]) -> dict[str, Option]:
    """The smallest option of each matrix."""
    return {name: min(some, key=lambda one: (one.size, one.loss)) for name, some in options.items()}


def best(options: Mapping[str, Sequence[Option]]) -> dict[str, Option]:
    """The truest option of each matrix."""
    return {name: min(some, key=lambda one: (one.loss, one.size)) for name, some in options.items()}


def rescaled(
    options: Mapping[str, Sequence[Option]], names: Collection[str], lost: float
) -> dict[str, Sequence[Option]]:
    """Options whose losses, for some matrices, are in the unit of a measured divergence.

    Args:
        options: Of every matrix.
        names: Whose losses are scaled.
        lost: By how much the divergence grew when they went from their best to their cheapest.
    """
    low, high = best(options), cheapest(options)
    expected = sum(high[name].loss - low[name].loss for name in names)
    # Noise can make a small loss negative; what costs nothing is never upgraded.
    factor = max(lost, 0.0) / expected if expected > 0 else 0.0
    return {
        name: [replace(one, loss=one.loss * factor) for one in some] if name in names else some
        for name, some in options.items()
    }


class Ladder:
    """The rungs from the cheapest mix, number 0, to that of least loss, number ``len``."""

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        self._start = cheapest(options)
        steps: list[tuple[float, str, Option, int, float]] = []
        for name, some in options.items():
            hull = _hull(some)
            for low, high in pairwise(hull):
                size, spared = high.size - low.size, low.loss - high.loss
                steps.append((spared / size, name, high, size, spared))
        # The sort is stable, and a hull's slopes fall, so a matrix's own steps stay in order.
        steps.sort(key=lambda step: -step[0])
        self._steps = [(name, option) for _, name, option, _, _ in steps]
        self.sizes = list(
            accumulate((s[3] for s in steps), initial=sum(o.size for o in self._start.values()))
        )
        """Bytes of all matrices at each rung."""

    def __len__(self) -> int:
        return len(self._steps)

    def mix(self, rung: int) -> dict[str, Option]:
        """The mix at a rung."""
        return self._start | dict(self._steps[:rung])

    def filled(self, room: int) -> dict[str, Option]:
        """The highest rung that fits into some bytes, and further steps as far as they fit too.

        Args:
            room: Bytes, at least those of the rung 0.
        """
        mix, left, stuck = dict(self._start), room - self.sizes[0], set[str]()
        for (name, option), (low, high) in zip(self._steps, pairwise(self.sizes), strict=True):
            if name in stuck:
                continue  # a later step of a matrix begins where the one before it ends
            if high - low <= left:
                mix[name], left = option, left - (high - low)
            else:
                stuck.add(name)
        return mix


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over size, from the smallest one on."""
    hull: list[Option] = []
    for one in sorted(options, key=lambda one: (one.size, one.loss)):
        if hull and one.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], one):
            hull.pop()
        hull.append(one)
    return hull


def _slope(low: Option, high: Option) -> float:
    return (low.loss - high.loss) / (high.size - low.size)
