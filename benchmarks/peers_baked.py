"""A system prompt that was computed once: what ``benchmarks/peers.py`` measures of it.

1,000 tokens are baked, in a process that ends; a prompt is these and 28 more. "TTFT baked": in a
process that has loaded the model, and answered something else, and then finds the baked prompt on
disk. "TTFT baked, fresh process": its start, imports and loading included. In the same rounds the
same prompts are computed whole ("unbaked"). onnxruntime-genai and transformers keep nothing across
processes, so they are measured unbaked alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

from benchmarks.engines.engine import ENGINES, BakingEngine, engine_class
from benchmarks.engines.timing import Process, Workload, by_turns, measure_process
from benchmarks.peers_report import Figures
from edge_llm import LLM

__all__ = ["BAKED_TOKENS", "FRESH", "LOADED", "PROMPT_TOKENS", "measure_baked"]

LOADED, FRESH = "TTFT baked", "TTFT baked, fresh process"
BAKED_TOKENS, PROMPT_TOKENS = 1000, 1028
WARMUP_TOKENS = 128


def measure_baked(
    models: dict[str, tuple[str, Path]],
    rows: list[str],
    load: Workload,
    *,
    rounds: int,
    progress: Callable[[str], None],
) -> Figures:
    """Measure some of the two rows.

    Args:
        models: Engine and path of each.
        rows: Which.
        load: Its vocabulary and threads count.
        rounds: How often.
        progress: Called with what is measured next.
    """
    load = dataclasses.replace(
        load, prompt_tokens=PROMPT_TOKENS, shared_tokens=BAKED_TOKENS, max_tokens=1, answers=1
    )
    measured: dict[str, tuple[str, Path]] = {}
    for name, (engine, path) in models.items():
        if can_bake(engine):
            progress(f"baking: {name}")
            bake(baked(engine), path, load)
            measured[name] = (baked(engine), path)
        measured[f"{name} unbaked"] = (engine, path)
    figures: Figures = {}
    for row in rows:
        fresh = row == FRESH
        length = PROMPT_TOKENS if fresh else WARMUP_TOKENS
        work = dataclasses.replace(load, warmup_tokens=length, shared_warmup=fresh)

        def one(name: str, round_: int, work: Workload = work) -> Process:
            return measure_process(*measured[name], work, seed=round_)

        def tell(text: str, row: str = row) -> None:
            progress(f"{row}, {text}")

        found = by_turns(list(measured), one, rounds=rounds, progress=tell)
        figures[row] = {
            name: [one.fresh if fresh else one.speed.first_token for one in processes]
            for name, processes in found.items()
        }
    return figures


def baked(engine: str) -> str:
    """The engine that starts from a baked prompt."""
    return f"{engine} baked"


def can_bake(engine: str) -> bool:
    """Whether an engine keeps the beginning of a prompt on disk."""
    return baked(engine) in ENGINES and (engine != "edge-llm" or hasattr(LLM, "bake"))


def bake(engine: str, path: Path, load: Workload) -> None:
    """Compute the beginning of all prompts, and keep it on disk."""
    kind = engine_class(engine)
    with kind(path, context=load.prompt_tokens + 1, threads=load.threads) as model:
        cast(BakingEngine, model).bake(load.shared())
