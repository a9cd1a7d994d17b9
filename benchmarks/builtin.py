"""How well, how fast and how small is the built-in model, and what does quantizing cost it?

Exact match on the held-out split (2,000 requests whose sentence shapes training never produced) and
on requests written by hand from the contract alone, for float32, int8 and int4 at blocks 32 and
128, all exported from the checkpoint in the repository, and for the bundle in the package;
milliseconds from the call to the whole answer; seconds from a cold Python to the first answer, and
that process's peak memory. The last line of stdout is a JSON document.

    python benchmarks/builtin.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_llm import LLM
from edge_llm.builtin import BUNDLE
from edge_llm.cli.layout import table
from edge_llm_export import export_model
from edge_llm_export.builtin.answer import parse
from edge_llm_export.builtin.bundle import MAX_CONTEXT
from edge_llm_export.builtin.evaluation import exact_match, held_out_split, read_pairs
from edge_llm_export.builtin.generator import Sample
from edge_llm_export.builtin.sensors import is_sensor
from edge_llm_export.builtin.train import CHECKPOINT

INDEPENDENT = Path(__file__).parents[1] / "tests" / "data" / "builtin_independent.jsonl"

COLD = """
import json, time
started = time.perf_counter()
from edge_llm import LLM
imported = time.perf_counter()
with LLM.builtin() as llm:
    llm.chat([{"role": "user", "content": "turn on the kitchen light"}])
    ended = time.perf_counter()
from edge_llm.runtime.device import peak_memory
result = {"import": imported - started, "first_answer": ended - imported, "peak": peak_memory()}
print(json.dumps(result))
"""


def ask(llm: LLM, requests: Sequence[str]) -> tuple[list[str], list[float]]:
    """Answers, and milliseconds of each."""
    answers, times = [], []
    for request in requests:
        started = time.perf_counter()
        answers.append(llm.chat([{"role": "user", "content": request}]).text)
        times.append((time.perf_counter() - started) * 1e3)
    return answers, times


def is_shaped(sample: Sample, answer: str) -> bool:
    """Whether an answer has the contract's shape: a sentence for a sensor, else its JSON."""
    if is_sensor(sample.request):
        return answer.endswith(".")
    try:
        parse(answer)
    except ValueError:
        return False
    return True


def judge(path: Path, sets: dict[str, Sequence[Sample]]) -> dict[str, Any]:
    """Exact match by set and kind, shape, size and speed of one bundle."""
    result: dict[str, Any] = {}
    with LLM(path) as llm:
        ask(llm, ["turn on the light"] * 3)
        for name, samples in sets.items():
            answers, times = ask(llm, [sample.request for sample in samples])
            pairs = zip(samples, answers, strict=True)
            result[name] = {
                "by_kind": exact_match(samples, answers),
                "shaped": sum(is_shaped(sample, answer) for sample, answer in pairs),
                "milliseconds": statistics.median(times),
                "milliseconds_p95": statistics.quantiles(times, n=20)[-1],
            }
    result["bytes"] = sum(file.stat().st_size for file in path.iterdir())
    return result


def cold_start(rounds: int) -> dict[str, float]:
    """Medians of a new process that loads the built-in model and answers once."""
    found = []
    for _ in range(1 + rounds):
        command = [sys.executable, "-c", COLD]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(result.stdout.splitlines()[-1]))
    return {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}


def show(results: dict[str, dict[str, Any]], sets: Sequence[str]) -> str:
    """One row per bundle, then one per kind."""
    rows = [("", *(f"{name}, %" for name in sets), "MB", "ms a command", "95th")]
    for name, one in results.items():
        shares = (one[s]["by_kind"]["all"] for s in sets)
        speed = one[sets[0]]
        rows.append(
            (
                name,
                *(f"{100 * right / total:.2f}" for right, total in shares),
                f"{one['bytes'] / 1e6:.2f}",
                f"{speed['milliseconds']:.1f}",
                f"{speed['milliseconds_p95']:.1f}",
            )
        )
    kinds = [("held-out, by kind", *results)]
    for kind in next(iter(results.values()))[sets[0]]["by_kind"]:
        counts = [one[sets[0]]["by_kind"][kind] for one in results.values()]
        kinds.append((kind, *(f"{100 * right / total:.1f}" for right, total in counts)))
    return table(rows) + "\n\n" + table(kinds)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="requests of the held-out split")
    parser.add_argument("--rounds", type=int, default=5, help="cold starts")
    options = parser.parse_args()
    sets: dict[str, Sequence[Sample]] = {
        "held-out": held_out_split(options.count),
        "independent": read_pairs(INDEPENDENT),
    }
    variants = [("fp32", None)] + [(q, b) for q in ("int8", "int4") for b in (32, 128)]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for quantize, block in variants:
            name = f"{quantize} block {block}" if block else quantize
            path = Path(folder) / name.replace(" ", "-")
            export_model(CHECKPOINT, path, quantize=quantize, block=block, max_context=MAX_CONTEXT)
            results[name] = judge(path, sets)
    results["in the package"] = judge(BUNDLE, sets)
    cold = cold_start(options.rounds)
    print(show(results, list(sets)))
    print(
        f"\ncold process: import {cold['import'] * 1e3:.0f} ms, LLM.builtin() to the first answer "
        f"{cold['first_answer'] * 1e3:.0f} ms, peak {cold['peak'] / 1e6:.0f} MB"
    )
    print(json.dumps({"benchmark": "builtin", "bundles": results, "cold": cold}))


if __name__ == "__main__":
    main()
