"""Which storage of weights is fast on this CPU? One model, stored in each way, by turns.

Prompts and single steps are timed apart; medians over rounds, and ratios within a round to int4 in
blocks of 32. What is not fast by the rules of ``edge-llm info`` is marked. The bundles are made
where they are not there yet, so that a device can run those that a desktop made. The last line of
stdout is a JSON document.

    python benchmarks/target.py CHECKPOINT --folder bundles
    qemu-aarch64 -cpu cortex-a72 ... python3 benchmarks/target.py --folder bundles

Under an emulator floating-point arithmetic costs several times what it costs a real CPU, and memory
nothing: read its figures as "computes in integers" or "does not".
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from edge_llm import LLM, Bundle
from edge_llm.cli.layout import table
from edge_llm.measure import environment, random_prompts

WAYS: dict[str, dict[str, Any]] = {
    "int4 block 32": {"quantize": "int4", "block": 32},
    "int4 block 128": {"quantize": "int4", "block": 128},
    "int8 block 32": {"quantize": "int8", "block": 32},
    "int8 row": {"target": "arm64-nodotprod"},
}
BASELINE = "int4 block 32"


def find_bundles(folder: Path, checkpoint: str | None) -> dict[str, Path]:
    """The bundle of each way, made where it is not there yet."""
    found = {}
    for way, options in WAYS.items():
        bundle = found[way] = folder / way.replace(" ", "-")
        if bundle.is_dir():
            continue
        if checkpoint is None:
            raise SystemExit(f"{bundle} is not there: name a checkpoint to make it of")
        from edge_llm_export import export_model  # a device has no exporter

        export_model(checkpoint, bundle, **options)
    return found


def measure(
    models: dict[str, LLM], *, length: int, max_tokens: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a prompt and of a step, by way, a round after the other."""
    prompts = random_prompts(models[BASELINE], length)
    turns = itertools.cycle(itertools.permutations(models))
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in models}
    for round_ in range(1 + rounds):
        prompt = next(prompts)
        for way in next(turns):
            answer = models[way].generate(
                prompt, max_tokens=max_tokens, min_tokens=max_tokens, temperature=0.0
            )
            assert answer.usage.reused_tokens == 0
            assert answer.timings.per_token is not None
            if round_:
                seconds[way].append((answer.timings.prompt, answer.timings.per_token))
    return seconds


def summarize(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and each round's ratios to the baseline."""
    base = seconds[BASELINE]
    return {
        way: {
            "prompt": statistics.median(prompt for prompt, _ in own),
            "step": statistics.median(step for _, step in own),
            "prompt_ratio": statistics.median(
                mine[0] / theirs[0] for mine, theirs in zip(own, base, strict=True)
            ),
            "step_ratio": statistics.median(
                mine[1] / theirs[1] for mine, theirs in zip(own, base, strict=True)
            ),
        }
        for way, own in seconds.items()
    }


def show(summary: dict[str, dict[str, float]], bundles: dict[str, Path], length: int) -> str:
    """The summary as a table."""
    rows = [("stored as", "MB", "ms per step", "ratio", f"ms, prompt of {length}", "ratio", "")]
    for way, one in summary.items():
        bundle = Bundle.open(bundles[way])
        rows.append(
            (
                way,
                f"{bundle.size / 1e6:.1f}",
                f"{one['step'] * 1e3:.2f}",
                f"{one['step_ratio']:.2f}",
                f"{one['prompt'] * 1e3:.1f}",
                f"{one['prompt_ratio']:.2f}",
                "no fast kernels here" if bundle.slow else "",
            )
        )
    return table(rows)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="of which to make the bundles")
    parser.add_argument("--folder", type=Path, default=Path("bundles/target"))
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    length, max_tokens = arguments.prompt_tokens, arguments.max_tokens
    bundles = find_bundles(arguments.folder, arguments.checkpoint)
    models = {
        way: LLM(bundle, context=length + max_tokens, threads=arguments.threads)
        for way, bundle in bundles.items()
    }
    seconds = measure(models, length=length, max_tokens=max_tokens, rounds=arguments.rounds)
    summary = summarize(seconds)
    document = {
        "benchmark": "target",
        "model": models[BASELINE].manifest.name,
        "prompt_tokens": length,
        "max_tokens": max_tokens,
        "rounds": arguments.rounds,
        **summary,
        "environment": dataclasses.asdict(environment(models[BASELINE])),
    }
    print(f"{document['model']}: ratios of seconds to {BASELINE}; below 1 is faster")
    print(show(summary, bundles, length))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
