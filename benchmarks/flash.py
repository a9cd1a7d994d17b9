"""What a hosted "Flash" model is advertised by, for a model that runs here: edge_llm beside fp32.

Latency, tokens per second, relative use of resources, and the price of a million tokens. The same
checkpoint is measured in edge_llm (int4 or what --quantize says) and in transformers in float32,
on the same threads, by turns, each time in a process of its own; a cell is the median of rounds.
The price is that of the electricity: seconds that a million tokens take, times --watts, times
--price. What the device costs, or its idling, is not in it. Latency is to the first token of a
prompt of 128 tokens in a loaded model.

    python benchmarks/flash.py --watts 10 --price 0.30
    python benchmarks/flash.py --shape qwen2.5-0.5b
    python benchmarks/flash.py --checkpoint FOLDER --quantize int8

Without a checkpoint, one of random weights with the shape of a real model is made on the spot. The
last line of stdout is a JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path: only this folder is on sys.path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.engines.engine import model_bytes
from benchmarks.engines.making import ModelFolder, Recipe
from benchmarks.engines.timing import Process, Workload, measure_by_turns
from benchmarks.shapes import SHAPES, make_checkpoint
from edge_llm import LLM
from edge_llm.cli.layout import notice, table
from edge_llm.measure import environment
from edge_llm.runtime.device import usable_cores

LATENCY_GOAL = 0.1
OWN, PLAIN = "edge-llm", "transformers fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A model as a provider would advertise it.

    Attributes:
        latency: Seconds to the first token.
        per_token: Seconds between two further tokens.
        input_speed: Tokens of a prompt per second.
        output_speed: Tokens of an answer per second.
        memory: Bytes resident at most; None if not told.
        disk: Bytes of graph and weights.
        processor: Seconds of processors that a thousand tokens of an answer take.
        energy: Watt-hours of a thousand tokens of an answer.
        input_price: Of a million tokens of prompts.
        output_price: Of a million tokens of answers.
    """

    latency: float
    per_token: float
    input_speed: float
    output_speed: float
    memory: float | None
    disk: float
    processor: float
    energy: float
    input_price: float
    output_price: float


def watt_hours(seconds: float, watts: float) -> float:
    """The energy of a device that takes ``watts`` for ``seconds``."""
    return seconds * watts / 3600


def describe(
    processes: Sequence[Process], *, prompt_tokens: int, size: int, watts: float, price: float
) -> Service:
    """Sum a model's rounds up.

    Args:
        processes: One of each round.
        prompt_tokens: Length of the prompts.
        size: Bytes on disk.
        watts: What the device takes while it computes.
        price: Of a kilowatt-hour.
    """
    latency = statistics.median(process.speed.first_token for process in processes)
    per_token = statistics.median(process.speed.per_token for process in processes)
    share = statistics.median(process.processor for process in processes)
    peaks = [process.peak for process in processes if process.peak is not None]
    million = 1_000_000
    return Service(
        latency=latency,
        per_token=per_token,
        input_speed=prompt_tokens / latency,
        output_speed=1 / per_token,
        memory=statistics.median(peaks) if peaks else None,
        disk=size,
        processor=1000 * per_token * share,
        energy=watt_hours(1000 * per_token, watts),
        input_price=watt_hours(million * latency / prompt_tokens, watts) / 1000 * price,
        output_price=watt_hours(million * per_token, watts) / 1000 * price,
    )


def show(services: Mapping[str, Service], currency: str) -> str:
    """The table: a column per model, and what edge_llm takes of what the plain model takes."""
    lines = (
        ("latency: first token", "ms", "latency", 1e3, 0),
        ("latency: each further token", "ms", "per_token", 1e3, 1),
        ("prompts", "tok/s", "input_speed", 1, 0),
        ("answers", "tok/s", "output_speed", 1, 1),
        ("memory at most", "MB", "memory", 1e-6, 0),
        ("disk", "MB", "disk", 1e-6, 0),
        ("processor time, 1,000 tokens", "s", "processor", 1, 1),
        ("energy, 1,000 tokens", "Wh", "energy", 1, 3),
        ("a million tokens of prompts", currency, "input_price", 1, 4),
        ("a million tokens of answers", currency, "output_price", 1, 4),
    )
    rows = [("", "", *services, "ratio")]
    for name, unit, field, scale, digits in lines:
        values = [getattr(service, field) for service in services.values()]
        if None in values:
            continue
        cells = [f"{scale * value:,.{digits}f}" for value in values]
        rows.append((name, unit, *cells, f"{values[0] / values[1]:.2f}"))
    return table(rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="random weights")
    parser.add_argument("--checkpoint", type=Path, help="a Hugging Face folder instead")
    parser.add_argument(
        "--quantize", default="int4 --block 128", help="as `edge-llm export` has it"
    )
    parser.add_argument("--watts", type=float, default=15.0, help="of the device, computing")
    parser.add_argument("--price", type=float, default=0.30, help="of a kilowatt-hour")
    parser.add_argument("--currency", default="USD", help="that the price is in")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep what is made there, and take what is there")
    options = parser.parse_args(arguments)
    if options.watts <= 0 or options.price < 0:
        parser.error("--watts must be above 0, and --price at least 0")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    arguments = parse(argv)
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        name = arguments.shape if arguments.checkpoint is None else arguments.checkpoint.name
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = arguments.checkpoint or folder / "checkpoint"
        if arguments.checkpoint is None:
            make_checkpoint(SHAPES[arguments.shape], checkpoint)
        own = Recipe("edge-llm", ("--quantize", *arguments.quantize.split()))
        bundle = ModelFolder(checkpoint, folder, threads=arguments.threads).make(own)
        models = {OWN: ("edge-llm", bundle), PLAIN: ("transformers", checkpoint)}
        with LLM(bundle, context=2, threads=arguments.threads) as llm:
            vocab, machine = llm.manifest.dims.vocab, dataclasses.asdict(environment(llm))
        load = Workload(
            vocab=vocab,
            prompt_tokens=arguments.prompt_tokens,
            max_tokens=arguments.max_tokens,
            threads=arguments.threads,
        )
        found = measure_by_turns(models, load, rounds=arguments.rounds, progress=notice)
        services = {
            model: describe(
                processes,
                prompt_tokens=load.prompt_tokens,
                size=model_bytes(models[model][1]),
                watts=arguments.watts,
                price=arguments.price,
            )
            for model, processes in found.items()
        }
    print(f"{name}, {load.threads} threads, {arguments.watts:g} W, ", end="")
    print(f"{arguments.price:g} {arguments.currency} a kWh")
    print(show(services, arguments.currency))
    reached = services[OWN].latency < LATENCY_GOAL
    print(f"a first token within {1e3 * LATENCY_GOAL:.0f} ms: {'yes' if reached else 'no'}")
    document = {
        "benchmark": "flash",
        "model": name,
        "watts": arguments.watts,
        "price_per_kwh": arguments.price,
        "currency": arguments.currency,
        "workload": dataclasses.asdict(load),
        "rounds": arguments.rounds,
        "latency_below_100_ms": reached,
        "services": {model: dataclasses.asdict(service) for model, service in services.items()},
        "environment": machine,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
