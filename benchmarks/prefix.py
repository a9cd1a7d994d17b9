"""How much sooner does an answer begin behind a system prompt that was baked?

    python benchmarks/prefix.py --shapes smollm2-135m qwen2.5-0.5b --work-dir DIR

Int4 bundles of random weights are made on the spot and kept in the work folder. A prefix of 1,000
random tokens is baked; prompts are this prefix and some random tokens of a question. Time to the
first token, model loaded, three ways by turns: the prompt computed, the prefix read from the cache
on disk (its file is in the system's page cache), and the prefix still in memory. Then whole
processes, from their start to the first token, imports and loading included, with and without that
cache. Medians over rounds; ratios are taken within a round. The last line of stdout is a JSON
document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: only this folder is on sys.path
    sys.path[0] = str(Path(__file__).parents[1])

import numpy as np

from benchmarks.memory import make_bundle
from edge_llm import LLM
from edge_llm.cli.layout import table
from edge_llm.measure import environment

CONTEXT = 2048
WAYS = ("computed", "from disk", "from memory")
PROCESSES = ("fresh process, computed", "fresh process, from disk")

# What a fresh process does; the parent notes when the line comes.
CHILD = """
import json, sys
from edge_llm import LLM
prompt, options = json.loads(sys.argv[2]), json.loads(sys.argv[3])
with LLM(sys.argv[1], **options) as llm:
    for chunk in llm.stream(prompt, max_tokens=2, temperature=0):
        if chunk.tokens:
            print("token", flush=True)
            break
"""


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--quantize", default="int4", choices=["int4", "int8", "fp32"])
    parser.add_argument("--prefix-tokens", type=int, default=1000)
    parser.add_argument("--question-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work-dir", type=Path, help="where to make bundles and keep them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        # Nothing that this user has baked is to be found.
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary) / "home")
        work = arguments.work_dir or Path(temporary)
        results = {}
        for shape in arguments.shapes:
            folder = make_bundle(shape, arguments.quantize, work)
            results[shape] = measure(folder, Path(temporary) / shape, arguments)
            print(show(shape, results[shape]), flush=True)
    document = {
        "benchmark": "prefix",
        "quantize": arguments.quantize,
        "prefix_tokens": arguments.prefix_tokens,
        "question_tokens": arguments.question_tokens,
        "rounds": arguments.rounds,
        "results": results,
    }
    print(json.dumps(document))


def measure(bundle: Path, cache: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token, way by way, and what the baked prefix takes."""
    options: dict[str, Any] = {"context": CONTEXT, "threads": arguments.threads}
    times: dict[str, list[float]] = {name: [] for name in (*WAYS, *PROCESSES)}
    rng = np.random.default_rng(0)
    with LLM(bundle, **options) as plain, LLM(bundle, prefix_cache=cache, **options) as cached:
        vocab = plain.manifest.dims.vocab
        prefix: list[int] = rng.integers(vocab, size=arguments.prefix_tokens).tolist()
        entry = cached.bake(prefix)
        for round_ in range(1 + arguments.rounds):
            questions = rng.integers(vocab, size=(3, arguments.question_tokens)).tolist()
            # One token of another prompt empties the cache in memory.
            for llm in (plain, cached):
                llm.generate([(prefix[0] + 1) % vocab], max_tokens=1)
            found = [
                first_token(plain, prefix + questions[0], 0, from_disk=0),
                first_token(cached, prefix + questions[1], len(prefix), from_disk=len(prefix)),
                first_token(cached, prefix + questions[2], len(prefix), from_disk=0),
            ]
            if round_:
                for name, one in zip(WAYS, found, strict=True):
                    times[name].append(one)
        described = dataclasses.asdict(environment(plain))
    for round_ in range(1 + arguments.rounds):
        prompt = prefix + rng.integers(vocab, size=arguments.question_tokens).tolist()
        found = [
            process(bundle, prompt, options),
            process(bundle, prompt, {**options, "prefix_cache": str(cache)}),
        ]
        if round_:
            for name, one in zip(PROCESSES, found, strict=True):
                times[name].append(one)
    return {
        "bytes": entry.stat().st_size,
        "seconds": {name: statistics.median(found) for name, found in times.items()},
        "sooner": {
            WAYS[1]: ratio(times, WAYS[0], WAYS[1]),
            WAYS[2]: ratio(times, WAYS[0], WAYS[2]),
            PROCESSES[1]: ratio(times, PROCESSES[0], PROCESSES[1]),
        },
        "environment": described,
    }


def first_token(llm: LLM, prompt: list[int], reused: int, *, from_disk: int) -> float:
    """Seconds from the call to the first token, of which so much must have been reused."""
    answer = llm.generate(prompt, max_tokens=1)
    assert (answer.usage.reused_tokens, answer.usage.reused_from_disk) == (reused, from_disk)
    assert answer.timings.first_token is not None
    return answer.timings.first_token


def process(bundle: Path, prompt: list[int], options: dict[str, Any]) -> float:
    """Seconds from the start of a process to its first token."""
    command = [sys.executable, "-c", CHILD, str(bundle), json.dumps(prompt), json.dumps(options)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "token\n"
        elapsed = time.perf_counter() - started
    assert child.returncode == 0
    return elapsed


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """The median of each round's ratio."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def show(shape: str, result: dict[str, Any]) -> str:
    """A result as a table."""
    rows = [(f"{shape}, {result['bytes'] / 1e6:.1f} MB", "ms to the first token", "sooner")]
    for name, seconds in result["seconds"].items():
        sooner = result["sooner"].get(name)
        rows.append((name, f"{seconds * 1e3:.1f}", f"{sooner:.1f} x" if sooner else ""))
    return table(rows)


if __name__ == "__main__":
    main()
