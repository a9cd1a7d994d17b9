"""What ``benchmarks/peers.py`` shows of its figures: ratios, tables, goals and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_llm.cli.layout import table

__all__ = ["GOALS", "OWN", "UNITS", "Figures", "Goal", "draw", "judge", "merge", "show"]

OWN = "edge-llm"

Figures = dict[str, dict[str, list[float]]]
"""Of one shape: by row and model, a figure of each round."""


@dataclass(frozen=True, slots=True)
class Unit:
    """How a row's figures are written.

    Attributes:
        name: Of the unit.
        scale: A figure is multiplied by this.
        digits: Behind the point.
        higher_is_better: Or else lower is.
    """

    name: str
    scale: float
    digits: int
    higher_is_better: bool


UNITS = {
    "prefill": Unit("tok/s", 1, 0, True),
    "decode": Unit("tok/s", 1, 1, True),
    "bandwidth": Unit("%", 100, 0, True),
    "TTFT": Unit("s", 1, 3, False),
    "load": Unit("s", 1, 2, False),
    "peak": Unit("MB", 1e-6, 0, False),
    "anonymous": Unit("MB", 1e-6, 0, False),
    "disk": Unit("MB", 1e-6, 1, False),
}
"""By the first word of a row's name."""


@dataclass(frozen=True, slots=True)
class Goal:
    """How many times as good as a peer edge_llm shall be.

    Attributes:
        shape: Of the model.
        row: Of the table.
        peer: The other model; None: the figure itself is meant.
        least: The ratio, or the figure.
        own: Which of edge_llm's models.
    """

    shape: str
    row: str
    peer: str | None
    least: float
    own: str = OWN


SMALL, MIDDLE, LARGE = "smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b"
Q4_0 = "llama.cpp Q4_0"
GOALS = (
    Goal(SMALL, "decode 0", Q4_0, 1.1),
    Goal(MIDDLE, "decode 0", Q4_0, 1.3),
    Goal(LARGE, "decode 0", Q4_0, 1.3),
    *(Goal(shape, "decode 0", "genai b32", 1.35) for shape in (SMALL, MIDDLE, LARGE)),
    *(Goal(shape, "decode 0", "genai b128", 1.05) for shape in (SMALL, MIDDLE, LARGE)),
    Goal(LARGE, "bandwidth", None, 0.9),
    Goal(SMALL, "decode 4096", Q4_0, 1.3),
    Goal(MIDDLE, "decode 4096", Q4_0, 1.5),
    *(Goal(shape, "prefill 128", Q4_0, 1.2) for shape in (SMALL, MIDDLE, LARGE)),
    *(Goal(shape, "prefill 4096", Q4_0, 1.5) for shape in (SMALL, MIDDLE, LARGE)),
    *(Goal(shape, "TTFT baked", "edge-llm unbaked", 15) for shape in (SMALL, MIDDLE)),
    Goal(MIDDLE, "peak", Q4_0, 1 / 0.7, own="edge-llm compiled"),
)


def unit(row: str) -> Unit:
    """How a row's figures are written."""
    return UNITS[row.split()[0]]


def ratio(figures: Figures, row: str, peer: str, *, own: str = OWN) -> float:
    """How many times as good as a peer's edge_llm's figure is: the median over rounds."""
    pairs = zip(figures[row][own], figures[row][peer], strict=True)
    if unit(row).higher_is_better:
        return statistics.median(ours / theirs for ours, theirs in pairs)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def show(figures: Figures) -> str:
    """A shape's table: a column per model; what was not measured stays empty."""
    models = list(dict.fromkeys(model for row in figures.values() for model in row))
    rows = [("", "", *models)]
    for row, measured in figures.items():
        one = unit(row)
        cells = []
        for model in models:
            found = measured.get(model)
            if not found:
                cells.append("")
                continue
            cell = f"{one.scale * statistics.median(found):,.{one.digits}f}"
            if OWN in measured and model != OWN:
                cell += f" ({ratio(figures, row, model):.2f})"
            cells.append(cell)
        rows.append((row, one.name, *cells))
    return table(rows)


def judge(shapes: Mapping[str, Figures]) -> list[tuple[Goal, float]]:
    """The goals whose figures were measured, and what was reached."""
    found = []
    for goal in GOALS:
        measured = shapes.get(goal.shape, {}).get(goal.row, {})
        if goal.own not in measured:
            continue
        if goal.peer is None:
            found.append((goal, statistics.median(measured[goal.own])))
        elif goal.peer in measured:
            reached = ratio(shapes[goal.shape], goal.row, goal.peer, own=goal.own)
            found.append((goal, reached))
    return found


def show_goals(judged: Sequence[tuple[Goal, float]]) -> str:
    """A line per goal."""
    rows = [("goal", "", "to", "at least", "is", "")]
    for goal, reached in judged:
        short = f"misses {100 * (1 - reached / goal.least):.0f} %"
        verdict = "reached" if reached >= goal.least else short
        cells = (goal.shape, f"{goal.own}: {goal.row}", goal.peer or "-")
        rows.append((*cells, f"{goal.least:.2f}", f"{reached:.2f}", verdict))
    return table(rows)


def merge(files: Iterable[Path]) -> dict[str, Any]:
    """One document of what several runs have printed.

    Rounds of a row are put together where the same models were measured; of other models, the
    later run's count: ratios are taken within rounds.
    """
    merged: dict[str, Any] = {}
    for file in files:
        document = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
        shapes: dict[str, Figures] = merged.get("shapes", {})
        for shape, figures in document["shapes"].items():
            rows = shapes.setdefault(shape, {})
            for row, found in figures.items():
                before = rows.get(row, {})
                together = {name: before.get(name, []) + values for name, values in found.items()}
                rows[row] = together if before.keys() == found.keys() else found
        merged = document | {"shapes": shapes}
    return merged


def draw(shapes: Mapping[str, Figures], file: Path) -> None:
    """Tokens per second by model: one picture per shape and kind of row."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = ("prefill", "decode")
    size = (6 * len(kinds), 4 * len(shapes))
    figure, axes = pyplot.subplots(len(shapes), len(kinds), figsize=size, squeeze=False)
    for line, (shape, figures) in zip(axes, shapes.items(), strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            rows = [row for row in figures if row.split()[0] == kind]
            models = list(dict.fromkeys(model for row in rows for model in figures[row]))
            for model in models:
                found = [(row, figures[row][model]) for row in rows if model in figures[row]]
                speeds = [statistics.median(speed) for _, speed in found]
                axis.plot([row.split()[1] for row, _ in found], speeds, "o-", label=model)
            axis.set_title(f"{shape}, {kind}")
            axis.set_xlabel("tokens")
            axis.set_ylabel("tokens per second")
            axis.set_ylim(bottom=0)
            if models:
                axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
