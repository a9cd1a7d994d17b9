"""How fast and large engines are beside each other: by turns, each time in a process of its own.

In one process they would share cores with each other's idle threads; and a session is some per cent
faster or slower for as long as it lives, by where its weights come to lie in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.engines.engine import ENGINES, engine_class
from edge_llm.runtime import device

__all__ = ["Process", "Speed", "Workload", "by_turns", "measure_by_turns", "ratio", "time_by_turns"]

ROOT = Path(__file__).parents[2]
SHARED_SEED = 1_000_000

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is answered: prompts of random tokens, of which each round has its own.

    Attributes:
        vocab: Tokens to draw from.
        prompt_tokens: Length of a prompt.
        max_tokens: Length of an answer.
        threads: To compute with.
        answers: Of each process, behind one for warming up.
        warmup_tokens: Length of the prompt for warming up, by default that of all.
        context: Tokens to load a model for, by default what is needed.
        shared_tokens: So many tokens at the beginning of every prompt are the same in all rounds.
        shared_warmup: Of the prompt for warming up too.
    """

    vocab: int
    prompt_tokens: int
    max_tokens: int
    threads: int
    answers: int = 3
    warmup_tokens: int | None = None
    context: int | None = None
    shared_tokens: int = 0
    shared_warmup: bool = False

    def shared(self) -> list[int]:
        """The beginning of every prompt."""
        rng = np.random.default_rng(SHARED_SEED)
        return list(map(int, rng.integers(self.vocab, size=self.shared_tokens)))


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to the first token and of each further one: medians of a process's answers."""

    first_token: float
    per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What one process found.

    Attributes:
        speed: Of its answers.
        load: Seconds of loading the model, libraries imported before.
        fresh: Seconds from the process's start to the first token of the answer for warming up.
        processor: Seconds that processors computed, of a second of its answers.
        anonymous: Bytes of anonymous memory behind all answers; None if not told.
        peak: Most bytes that were ever resident; None if not told.
    """

    speed: Speed
    load: float
    fresh: float
    processor: float
    anonymous: int | None
    peak: int | None


def time_by_turns(
    models: Mapping[str, tuple[str, Path]],
    workload: Workload,
    *,
    rounds: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[Speed]]:
    """Like :func:`measure_by_turns`, the speeds alone."""
    found = measure_by_turns(models, workload, rounds=rounds, progress=progress)
    return {name: [process.speed for process in own] for name, own in found.items()}


def measure_by_turns(
    models: Mapping[str, tuple[str, Path]],
    workload: Workload,
    *,
    rounds: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[Process]]:
    """Measure every model once in each round, every other round in the opposite order.

    Args:
        models: Engine and path of each, by any name.
        workload: What they answer.
        rounds: How often.
        progress: Called with what is measured next.
    """

    def measure(name: str, round_: int) -> Process:
        return measure_process(*models[name], workload, seed=round_)

    return by_turns(list(models), measure, rounds=rounds, progress=progress)


def by_turns(
    names: Sequence[str],
    measure: Callable[[str, int], Result],
    *,
    rounds: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[Result]]:
    """Call ``measure`` with each name and round, every other round in the opposite order."""
    found: dict[str, list[Result]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in names if round_ % 2 == 0 else reversed(names):
            if progress:
                progress(f"round {round_ + 1} of {rounds}: {name}")
            found[name].append(measure(name, round_))
    return found


def measure_process(engine: str, path: Path, workload: Workload, *, seed: int) -> Process:
    """Measure a model in a process of its own."""
    command = [sys.executable, "-m", __name__, engine, str(path.resolve()), str(seed)]
    asked = json.dumps(dataclasses.asdict(workload))
    started = str(time.monotonic())
    done = subprocess.run([*command, asked, started], stdout=subprocess.PIPE, check=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    return Process(**found | {"speed": Speed(**found["speed"])})


def ratio(own: list[Speed], base: list[Speed]) -> float:
    """How many times as fast as ``base`` tokens follow each other: the median over rounds."""
    return statistics.median(b.per_token / a.per_token for a, b in zip(own, base, strict=True))


def main() -> None:
    """Measure one model in this process, and print a :class:`Process`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("path", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("workload", type=json.loads)
    parser.add_argument("started", type=float, help="by time.monotonic()")
    arguments = parser.parse_args()
    load = Workload(**arguments.workload)
    rng = np.random.default_rng(arguments.seed)
    warmup = rng.integers(load.vocab, size=load.warmup_tokens or load.prompt_tokens).tolist()
    prompts = rng.integers(load.vocab, size=(load.answers, load.prompt_tokens)).tolist()
    for prompt in [*prompts, *([warmup] if load.shared_warmup else [])]:
        prompt[: load.shared_tokens] = load.shared()
    context = load.context or load.max_tokens + max(load.prompt_tokens, len(warmup))
    kind = engine_class(arguments.engine)
    imported = time.monotonic()
    with kind(arguments.path, context=context, threads=load.threads) as model:
        loaded = time.monotonic()
        first = model.answer(warmup, max_tokens=load.max_tokens).first_token
        answering, computing = time.monotonic(), time.process_time()
        answers = [model.answer(prompt, max_tokens=load.max_tokens) for prompt in prompts]
        answered, computed = time.monotonic(), time.process_time()
        anonymous = device.resident_memory().get("anonymous")
    speed = Speed(
        statistics.median(answer.first_token for answer in answers),
        statistics.median(answer.per_token for answer in answers),
    )
    found = Process(
        speed=speed,
        load=loaded - imported,
        fresh=loaded - arguments.started + first,
        processor=(computed - computing) / (answered - answering),
        anonymous=anonymous,
        peak=device.peak_memory(),
    )
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
