"""How fast engines are beside each other: by turns, each time in a process of its own.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.engines.engine import ENGINES, open_engine

__all__ = ["Speed", "Workload", "ratio", "time_by_turns"]

ROOT = Path(__file__).parents[2]
ANSWERS = 3  # of each process, behind one for warming up


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is answered: prompts of random tokens, of which each round has its own.

    Attributes:
        vocab: Tokens to draw from.
        prompt_tokens: Length of a prompt.
        max_tokens: Length of an answer.
        threads: To compute with.
    """

    vocab: int
    prompt_tokens: int
    max_tokens: int
    threads: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to the first token and of each further one: medians of a process's answers."""

    first_token: float
    per_token: float


def time_by_turns(
    models: Mapping[str, tuple[str, Path]],
    workload: Workload,
    *,
    rounds: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[Speed]]:
    """Time every model once in each round, every other round in the opposite order.

    Args:
        models: Engine and path of each, by any name.
        workload: What they answer.
        rounds: How often.
        progress: Called with what is timed next.
    """
    found: dict[str, list[Speed]] = {name: [] for name in models}
    for round_ in range(rounds):
        order = list(models.items())
        for name, (engine, path) in order if round_ % 2 == 0 else reversed(order):
            if progress:
                progress(f"round {round_ + 1} of {rounds}: {name}")
            command = [sys.executable, "-m", __name__, engine, str(path.resolve()), str(round_)]
            asked = json.dumps(dataclasses.asdict(workload))
            done = subprocess.run([*command, asked], stdout=subprocess.PIPE, check=True, cwd=ROOT)
            found[name].append(Speed(**json.loads(done.stdout.splitlines()[-1])))
    return found


def ratio(own: list[Speed], base: list[Speed]) -> float:
    """How many times as fast as ``base`` tokens follow each other: the median over rounds."""
    return statistics.median(b.per_token / a.per_token for a, b in zip(own, base, strict=True))


def main() -> None:
    """Time one model in this process, and print a :class:`Speed`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("path", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("workload", type=json.loads)
    arguments = parser.parse_args()
    load = Workload(**arguments.workload)
    rng = np.random.default_rng(arguments.seed)
    prompts = rng.integers(load.vocab, size=(1 + ANSWERS, load.prompt_tokens)).tolist()
    context = load.prompt_tokens + load.max_tokens
    with open_engine(
        arguments.engine, arguments.path, context=context, threads=load.threads
    ) as model:
        answers = [model.answer(prompt, max_tokens=load.max_tokens) for prompt in prompts][1:]
    speed = Speed(
        statistics.median(answer.first_token for answer in answers),
        statistics.median(answer.per_token for answer in answers),
    )
    print(json.dumps(dataclasses.asdict(speed)))


if __name__ == "__main__":
    main()
