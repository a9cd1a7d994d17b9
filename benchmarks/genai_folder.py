"""Is a folder of onnxruntime-genai's as fast in edge_llm as in onnxruntime-genai itself?

A seeded checkpoint goes through genai's own model builder (int4, CPU). Both runtimes then open the
very same folder in this process and answer greedily by turns, with a pause before each so that the
other's threads have stopped spinning. Times are medians over rounds, ratios are taken within a
round. The last line of stdout is a JSON document.

    python benchmarks/genai_folder.py --shape smollm2-135m
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edge_llm import LLM
from edge_llm.cli.layout import table
from edge_llm.measure import environment, random_prompts
from edge_llm.runtime.session import import_onnxruntime

SETTLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of one prompt and of each token behind it, and the tokens."""

    prompt: float
    per_token: float
    tokens: tuple[int, ...]


class Genai:
    """onnxruntime-genai on a folder, with so many threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        import_onnxruntime()  # its telemetry is off from here on
        import onnxruntime_genai as og

        self._og = og
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)

    def run(self, prompt: list[int], max_tokens: int) -> Run:
        """Answer greedily."""
        length = len(prompt) + max_tokens
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self._og.Generator(self._model, params)
        started = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        prompted = time.perf_counter()
        for _ in range(max_tokens - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        tokens = generator.get_sequence(0)[len(prompt) :]
        return Run(
            prompted - started,
            (ended - prompted) / (max_tokens - 1),
            tuple(int(token) for token in tokens),
        )


def run_llm(llm: LLM, prompt: list[int], max_tokens: int) -> Run:
    """The same in edge_llm."""
    answer = llm.generate(prompt, max_tokens=max_tokens, min_tokens=max_tokens, temperature=0.0)
    assert answer.usage.reused_tokens == 0
    assert answer.timings.per_token is not None
    return Run(answer.timings.prompt, answer.timings.per_token, answer.tokens)


def alternate(
    llm: LLM, genai: Genai, *, length: int, max_tokens: int, rounds: int
) -> dict[str, list[Run]]:
    """Run both ``rounds`` times by turns, after a warm-up round."""
    prompts = random_prompts(llm, length)
    runs: dict[str, list[Run]] = {"edge-llm": [], "onnxruntime-genai": []}
    ways = {
        "edge-llm": lambda prompt: run_llm(llm, prompt, max_tokens),
        "onnxruntime-genai": lambda prompt: genai.run(prompt, max_tokens),
    }
    for round_ in range(1 + rounds):
        prompt = next(prompts)
        for name in list(ways) if round_ % 2 else reversed(ways):
            time.sleep(SETTLE_SECONDS)
            run = ways[name](prompt)
            if round_:
                runs[name].append(run)
    return runs


def summarize(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians, and of each round's ratios of genai's seconds to edge_llm's: above 1 is faster."""
    pairs = list(zip(runs["edge-llm"], runs["onnxruntime-genai"], strict=True))
    return {
        **{
            name: {
                "per_token": statistics.median(run.per_token for run in own),
                "prompt": statistics.median(run.prompt for run in own),
            }
            for name, own in runs.items()
        },
        "decode_speed_ratio": statistics.median(b.per_token / a.per_token for a, b in pairs),
        "prompt_speed_ratio": statistics.median(b.prompt / a.prompt for a, b in pairs),
        "same_tokens": all(a.tokens == b.tokens for a, b in pairs),
    }


def make_folder(folder: Path, shape: str) -> Path:
    """The shape's checkpoint in genai's layout, made where it is not there yet."""
    checkpoint, target = folder / shape, folder / f"{shape}-genai-int4"
    if not (target / "genai_config.json").is_file():
        here = Path(__file__).parent
        subprocess.run([sys.executable, here / "shapes.py", shape, checkpoint], check=True)
        command = [sys.executable, str(here / "genai_builder.py"), "-p", "int4", "-e", "cpu"]
        folders = ["-i", str(checkpoint), "-o", str(target), "-c", str(folder / "genai-cache")]
        subprocess.run([*command, *folders], check=True)
    return target


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", help="a shape of benchmarks/shapes.py")
    parser.add_argument(
        "--folder", type=Path, default=Path("bundles"), help="where what is made lies"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=16)
    arguments = parser.parse_args()
    length, max_tokens = arguments.prompt_tokens, arguments.max_tokens
    folder = make_folder(arguments.folder, arguments.shape)
    with LLM(folder, context=length + max_tokens, threads=arguments.threads) as llm:
        genai = Genai(folder, llm.threads)
        summary = summarize(
            alternate(llm, genai, length=length, max_tokens=max_tokens, rounds=arguments.rounds)
        )
    rows = [("", "ms per token", "tok/s", f"prompt of {length}, tok/s")]
    for name in ("edge-llm", "onnxruntime-genai"):
        one = summary[name]
        seconds, prompt = one["per_token"], one["prompt"]
        rows.append((name, f"{seconds * 1e3:.3f}", f"{1 / seconds:.1f}", f"{length / prompt:.0f}"))
    print(table(rows))
    print(
        f"edge-llm decodes {summary['decode_speed_ratio']:.3f} times as fast, reads prompts "
        f"{summary['prompt_speed_ratio']:.3f} times as fast; "
        f"{'the same' if summary['same_tokens'] else 'DIFFERENT'} tokens"
    )
    document = {
        "benchmark": "genai_folder",
        "shape": arguments.shape,
        "prompt_tokens": length,
        "max_tokens": max_tokens,
        "rounds": arguments.rounds,
        **summary,
        "onnxruntime_genai": version("onnxruntime-genai"),
        "environment": dataclasses.asdict(environment(llm)),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
