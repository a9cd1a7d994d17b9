"""What does an export cost? ``edge-llm export`` against onnxruntime-genai's model builder.

Both turn the same folder, a seeded random checkpoint, into int4 with a scale per 32 weights, each
in a process of its own whose time and peak memory the system reports; they alternate. The last
line of stdout is a JSON document.

    python benchmarks/export.py --shape qwen2.5-0.5b --builder-python genai/bin/python

The builder (onnxruntime-genai 0.18, with torch) imports names that only transformers 5 has, so it
may need another environment than the tests, which compare with transformers 4.57.
"""

# Nothing large is imported here: a child's peak starts from what its parent holds.
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall-clock seconds, peak resident bytes, and bytes written."""

    seconds: float
    peak: int
    size: int


def measure(command: list[str], output: Path) -> Cost:
    """Run a command that writes a folder, and remove the folder."""
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')}")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    shutil.rmtree(output)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(seconds, peak, size)


def commands(checkpoint: Path, work: Path, builder_python: str) -> dict[str, list[str]]:
    """The two exports; each writes ``work / name``."""
    ours = [sys.executable, "-m", "edge_llm.cli.main", "export", str(checkpoint)]
    builder = [builder_python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    return {
        "edge-llm": [*ours, "-o", str(work / "edge-llm"), "--quantize", "int4", "--block", "32"],
        "builder": [
            *builder,
            *("-o", str(work / "builder"), "-p", "int4", "-e", "cpu", "-c", str(work / "cache")),
        ],
    }


def versions(python: str, *names: str) -> dict[str, str]:
    """The versions of distributions that a Python has."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    run = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    return dict(zip(names, run.stdout.split(), strict=True))


def summarize(costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Medians, and the median of each round's ratios to the builder."""
    summary: dict[str, Any] = {}
    for name, own in costs.items():
        pairs = list(zip(own, costs["builder"], strict=True))
        summary[name] = {
            "seconds": statistics.median(cost.seconds for cost in own),
            "peak_bytes": statistics.median(cost.peak for cost in own),
            "size_bytes": own[0].size,
            "seconds_ratio": statistics.median(a.seconds / b.seconds for a, b in pairs),
            "peak_ratio": statistics.median(a.peak / b.peak for a, b in pairs),
        }
    return summary


def show(summary: dict[str, Any]) -> str:
    """The summary as a table."""
    lines = [f"{'':<10}{'seconds':>10}{'ratio':>8}{'peak MB':>10}{'ratio':>8}{'size MB':>10}"]
    for name, one in summary.items():
        lines.append(
            f"{name:<10}{one['seconds']:>10.1f}{one['seconds_ratio']:>8.2f}"
            f"{one['peak_bytes'] / 1e6:>10.0f}{one['peak_ratio']:>8.2f}"
            f"{one['size_bytes'] / 1e6:>10.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="a shape of benchmarks/shapes.py")
    parser.add_argument(
        "--folder", type=Path, default=Path("bundles"), help="where the made checkpoint lies"
    )
    parser.add_argument(
        "--builder-python", default=sys.executable, help="the Python that has onnxruntime-genai"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    checkpoint = arguments.folder / arguments.shape
    shapes = Path(__file__).with_name("shapes.py")
    subprocess.run([sys.executable, shapes, arguments.shape, checkpoint], check=True)
    costs: dict[str, list[Cost]] = {"edge-llm": [], "builder": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        for round_ in range(arguments.rounds):
            order = list(commands(checkpoint, Path(work), arguments.builder_python).items())
            for name, command in order if round_ % 2 == 0 else reversed(order):
                costs[name].append(measure(command, Path(work) / name))
    summary = summarize(costs)
    print(show(summary))
    document = {
        "benchmark": "export",
        "shape": arguments.shape,
        "rounds": arguments.rounds,
        **summary,
        "versions": {
            "edge-llm": versions(sys.executable, "edge-llm", "onnx", "onnxruntime"),
            "builder": versions(
                arguments.builder_python, "onnxruntime-genai", "torch", "transformers"
            ),
        },
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
