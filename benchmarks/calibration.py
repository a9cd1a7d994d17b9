"""What does a calibrated export cost? ``edge-llm export``, phase by phase.

First the text that the model writes for itself: in lockstep, as the export draws it, against one
text at a time by ``LLM.generate``, which it did before. Both draw from one int8 bundle, by turns,
and the ratio is that of seconds per token. Then the whole export in this process, with wall-clock
and CPU seconds of each phase. The last line of stdout is a JSON document.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --shape qwen2.5-0.5b --quantize int4 --block 128

Random weights make a flat distribution, whose draws sort the whole vocabulary. So the weights of
the last norm are set to 4 here: logits of that standard deviation have a trained model's entropy,
about 3 nats a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - safetensors looks bfloat16 up by its name
import numpy as np
from safetensors.numpy import load_file, save_file

from edge_llm import LLM
from edge_llm.cli.layout import table
from edge_llm.measure import environment
from edge_llm_export import Calibration, export_model
from edge_llm_export.quantize.drawing import Writer
from edge_llm_export.quantize.text import ROWS

WAYS = ("lockstep", "one by one")


class Phases:
    """A progress callback that adds up the seconds of each phase."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._phase = "starting"
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """What has gone by since the last call belongs to the phase that was named then."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.wall[self._phase] = self.wall.get(self._phase, 0.0) + wall - self._wall
        self.cpu[self._phase] = self.cpu.get(self._phase, 0.0) + cpu - self._cpu
        self._phase, self._wall, self._cpu = phase, wall, cpu


def sharpen(checkpoint: Path) -> None:
    """Multiply a made checkpoint's logits by 4."""
    tensors = load_file(checkpoint / "model.safetensors")
    norm = tensors["model.norm.weight"]
    if norm[0] == 1:
        tensors["model.norm.weight"] = norm * norm.dtype.type(4)
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def alternate(bundle: Path, *, tokens: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds per token of both ways, wall clock and CPU, round by round."""
    writer = Writer(bundle, tokens=tokens, rows=ROWS)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    with LLM(bundle, context=tokens) as llm:

        def lockstep(round_: int) -> int:
            seeds = [np.random.SeedSequence(round_, spawn_key=(i,)) for i in range(ROWS)]
            return writer.write(seeds, lambda each: None).size

        def one_by_one(round_: int) -> int:
            first = round_ + 1
            answer = llm.generate(
                [first], max_tokens=tokens - 1, min_tokens=tokens - 1, temperature=1.0, seed=round_
            )
            return 1 + len(answer.tokens)

        ways: dict[str, Callable[[int], int]] = dict(zip(WAYS, (lockstep, one_by_one), strict=True))
        for round_ in range(rounds):
            for name in sorted(ways, reverse=bool(round_ % 2)):
                wall, cpu = time.perf_counter(), time.process_time()
                drawn = ways[name](round_)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                seconds[name].append((wall / drawn, cpu / drawn))
    return seconds


def measure_drawing(checkpoint: Path, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of both ways, and of each round's ratio."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        bundle = Path(folder) / "int8"
        export_model(checkpoint, bundle, quantize="int8", block=32)
        seconds = alternate(bundle, tokens=tokens, rounds=rounds)
        with LLM(bundle, context=tokens) as llm:
            machine = dataclasses.asdict(environment(llm))
    figures: dict[str, Any] = {"rows": ROWS, "environment": machine}
    for i, clock in enumerate(("wall", "cpu")):
        own, other = ([round_[i] for round_ in seconds[name]] for name in WAYS)
        figures[clock] = {
            **{name: statistics.median(s[i] for s in seconds[name]) for name in WAYS},
            "ratio": statistics.median(a / b for a, b in zip(own, other, strict=True)),
        }
    return figures


def measure_export(checkpoint: Path, calibration: Calibration, **options: Any) -> dict[str, Any]:
    """Wall-clock and CPU seconds of each phase of an export with some options."""
    phases = Phases()
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        export_model(
            checkpoint,
            Path(folder) / "bundle",
            calibration=calibration,
            progress=phases,
            **options,
        )
    phases("end", 0, 0)
    total = {"wall": sum(phases.wall.values()), "cpu": sum(phases.cpu.values())}
    return {"wall": phases.wall, "cpu": phases.cpu, "total": total}


def show_drawing(drawing: dict[str, Any]) -> str:
    """Both ways as a table."""
    drawn = [("drawing, ms per token", "wall", "CPU")]
    clocks = drawing["wall"], drawing["cpu"]
    for name in WAYS:
        wall, cpu = (f"{clock[name] * 1e3:.2f}" for clock in clocks)
        drawn.append((name, wall, cpu))
    wall, cpu = (f"{clock['ratio']:.3f}" for clock in clocks)
    drawn.append(("ratio", wall, cpu))
    return table(drawn)


def show_export(export: dict[str, Any]) -> str:
    """Its phases as a table."""
    rows = [("phase", "wall, s", "CPU, s")]
    rows += [
        (name, f"{export['wall'][name]:.1f}", f"{export['cpu'][name]:.1f}")
        for name in export["wall"]
    ]
    rows.append(("all", f"{export['total']['wall']:.1f}", f"{export['total']['cpu']:.1f}"))
    return table(rows)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", help="a shape of benchmarks/shapes.py")
    parser.add_argument("--quantize", choices=["auto", "int8", "int4"], default="auto")
    parser.add_argument("--block", type=int, default=128, help="of int8 and int4")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="of drawing text; 0 leaves it out")
    parser.add_argument(
        "--folder", type=Path, default=Path("bundles"), help="where the made checkpoint lies"
    )
    arguments = parser.parse_args()
    checkpoint = arguments.folder / f"{arguments.shape}-sharp"
    shapes = Path(__file__).with_name("shapes.py")
    subprocess.run([sys.executable, shapes, arguments.shape, checkpoint], check=True)
    sharpen(checkpoint)
    drawing = None
    if arguments.rounds:
        drawing = measure_drawing(checkpoint, tokens=arguments.tokens, rounds=arguments.rounds)
    calibration = Calibration(samples=arguments.samples, tokens=arguments.tokens)
    options: dict[str, Any] = {"quantize": arguments.quantize}
    if arguments.quantize != "auto":
        options |= {"method": "gptq", "block": arguments.block}
    export = measure_export(checkpoint, calibration, **options)
    if drawing is not None:
        print(f"{show_drawing(drawing)}\n")
    print(show_export(export))
    document = {
        "benchmark": "calibration",
        "shape": arguments.shape,
        "options": options,
        "samples": arguments.samples,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "drawing": drawing,
        "export": export,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
