"""``edge-llm tune``: measure once how a bundle runs fastest on this device."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge_llm.cli.command import Command
from edge_llm.cli.layout import Progress, notice, table, write
from edge_llm.errors import ArgumentError, EdgeLLMError
from edge_llm.runtime.device import others_cpu_seconds, usable_cores

if TYPE_CHECKING:
    from edge_llm.tune import Trial
    from edge_llm.tuning import Tuning

__all__ = ["COMMAND"]

QUIET = 0.1
"""What others may take of the cores before the user is told that the choice may be theirs."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure threads, spinning, chunks and steps of several tokens on this device. The "
        "defaults stay unless another way is clearly faster. LLM(path) and every command use what "
        "is found, as long as they may use the same cores."
    )
    parser.add_argument("bundle", metavar="FOLDER", help="the folder of a bundle")
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="the folder to keep the choice in, which LLM(..., cache_dir=DIR) and --cache-dir read "
        "(default: this user's cache folder, in which every run looks)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="measure with so many threads only"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="rounds of each trial (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    from edge_llm.bundle import Bundle
    from edge_llm.caching.folder import is_writable
    from edge_llm.options import folder
    from edge_llm.tune import tune
    from edge_llm.tuning import check_tunable, save_tuning, tuning_folder

    if arguments.rounds < 1:
        raise ArgumentError("rounds", "at least 1", arguments.rounds)
    check_tunable(bundle := Bundle.open(arguments.bundle))
    cache_dir = folder("cache_dir", arguments.cache_dir)
    kept_in = tuning_folder(cache_dir)
    if not is_writable(kept_in):  # found out now rather than after minutes
        raise _nothing_kept(kept_in)
    progress = Progress()
    before, started = others_cpu_seconds(), time.perf_counter()
    try:
        tuning, trials = tune(
            bundle,
            threads=arguments.threads,
            cache_dir=cache_dir,
            rounds=arguments.rounds,
            on_phase=lambda phase: progress.show(f"measuring: {phase} ..."),
        )
    finally:
        progress.show("")
    others = _share(before, others_cpu_seconds(), time.perf_counter() - started)
    path = save_tuning(bundle, tuning, cache_dir=cache_dir)
    if path is None:
        raise _nothing_kept(kept_in)
    if arguments.json:
        document = {
            "path": str(path),
            "tuning": dataclasses.asdict(tuning),
            "trials": [dataclasses.asdict(one) for one in trials],
            "others": others,
        }
        write(json.dumps(document) + "\n")
    else:
        write(f"{_describe(tuning, trials)}\nKept in {path}.\n")
    if others is not None and others > QUIET:
        notice(
            f"note: other programs had {others:.0%} of these cores meanwhile, and the choice holds "
            "for that; run `edge-llm tune` again when they are quiet."
        )
    return 0


def _nothing_kept(folder: Path) -> EdgeLLMError:
    return EdgeLLMError(
        f"Nothing can be kept in {str(folder)!r}.", "Choose another folder with --cache-dir."
    )


def _share(before: float | None, after: float | None, seconds: float) -> float | None:
    """Share of this process's cores that others had, by their CPU seconds before and after."""
    if before is None or after is None:
        return None
    return max(0.0, after - before) / (seconds * usable_cores(physical=False))


def _describe(tuning: Tuning, trials: list[Trial]) -> str:
    rows = [("tried", "speed-up", "rounds won", "")]
    for one in trials:
        verdict = "taken" if one.taken else "not clearly faster"
        rows.append((one.name, f"{one.speedup:.3f}", f"{one.wins:.0%}", verdict))
    costs = ", ".join(f"{width}: {cost:.2f}" for width, cost in tuning.step_costs.items())
    return "\n".join(
        [
            table(rows),
            f"{tuning.threads} threads · spinning {tuning.spin} us · chunks "
            f"{tuning.prefill_chunk or 'by time alone'} · compiled form "
            f"{'where there is one' if tuning.compiled else 'not used'}",
            f"cost of a step by tokens, relative to one: {costs or 'not measured'}",
        ]
    )


COMMAND = Command("tune", "measure once how a bundle runs fastest here", _configure, _run)
