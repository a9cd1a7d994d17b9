"""Is a folder of onnxruntime-genai's as fast in edge_llm as in onnxruntime-genai itself?

A seeded checkpoint goes through genai's own model builder (int4, CPU). Both runtimes then answer
greedily from the very same folder, by turns, each time in a process of their own: a session is some
per cent faster or slower for as long as it lives, by where its weights come to lie in memory. Times
are medians over rounds, ratios are taken within a round. The last line of stdout is a JSON
document.

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
from edge_llm.measure import environment
from edge_llm.runtime.session import import_onnxruntime

ENGINES = ("edge-llm", "onnxruntime-genai")
ANSWERS = 3  # of each process, behind one for warming up


@dataclass(frozen=True, slots=True)
class Run:
    """Median seconds of prompts and of each token behind them, and all tokens."""

    prompt: float
    per_token: float
    tokens: list[list[int]]


def ask_edge_llm(folder: Path, prompts: list[list[int]], max_tokens: int, threads: int) -> Run:
    """Answer each prompt in edge_llm."""
    with LLM(folder, context=len(prompts[0]) + max_tokens, threads=threads) as llm:
        answers = [
            llm.generate(
                prompt,
                max_tokens=max_tokens,
                min_tokens=max_tokens,
                temperature=0.0,
                speculation="off",
            )
            for prompt in prompts
        ]
    assert all(answer.usage.reused_tokens == 0 for answer in answers)
    per_token = [answer.timings.per_token or 0.0 for answer in answers[1:]]
    return Run(
        statistics.median(answer.timings.prompt for answer in answers[1:]),
        statistics.median(per_token),
        [list(answer.tokens) for answer in answers],
    )


def ask_genai(folder: Path, prompts: list[list[int]], max_tokens: int, threads: int) -> Run:
    """Answer each prompt in onnxruntime-genai."""
    import_onnxruntime()  # its telemetry is off from here on
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    prompt_seconds, per_token, tokens = [], [], []
    for prompt in prompts:
        length = len(prompt) + max_tokens
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        started = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        prompted = time.perf_counter()
        for _ in range(max_tokens - 1):
            generator.generate_next_token()
        per_token.append((time.perf_counter() - prompted) / (max_tokens - 1))
        prompt_seconds.append(prompted - started)
        tokens.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
    return Run(statistics.median(prompt_seconds[1:]), statistics.median(per_token[1:]), tokens)


def alternate(arguments: argparse.Namespace) -> dict[str, list[Run]]:
    """Run both engines ``rounds`` times by turns, in fresh processes."""
    runs: dict[str, list[Run]] = {name: [] for name in ENGINES}
    for round_ in range(arguments.rounds):
        for name in ENGINES if round_ % 2 else reversed(ENGINES):
            command = [sys.executable, __file__, "--engine", name, "--seed", str(round_)]
            for option in ("shape", "folder", "threads", "prompt_tokens", "max_tokens"):
                command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(Run(**json.loads(done.stdout.splitlines()[-1])))
    return runs


def summarize(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Medians, and of each round's ratios of genai's seconds to edge_llm's: above 1 is faster."""
    pairs = list(zip(*(runs[name] for name in ENGINES), strict=True))
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


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", help="a shape of benchmarks/shapes.py")
    parser.add_argument(
        "--folder", type=Path, default=Path("bundles"), help="where what is made lies"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--engine", choices=ENGINES, help="run one of the two and print a Run")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    folder = make_folder(arguments.folder, arguments.shape)
    if arguments.engine:
        vocab = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
        rng = np.random.default_rng(arguments.seed)
        prompts = rng.integers(vocab, size=(1 + ANSWERS, arguments.prompt_tokens)).tolist()
        ask = ask_edge_llm if arguments.engine == "edge-llm" else ask_genai
        run = ask(folder, prompts, arguments.max_tokens, arguments.threads)
        print(json.dumps(dataclasses.asdict(run)))
        return
    summary = summarize(alternate(arguments))
    length = arguments.prompt_tokens
    rows = [("", "ms per token", "tok/s", f"prompt of {length}, tok/s")]
    for name in ENGINES:
        seconds, prompt = summary[name]["per_token"], summary[name]["prompt"]
        rows.append((name, f"{seconds * 1e3:.3f}", f"{1 / seconds:.1f}", f"{length / prompt:.0f}"))
    print(table(rows))
    print(
        f"edge-llm decodes {summary['decode_speed_ratio']:.3f} times as fast, reads prompts "
        f"{summary['prompt_speed_ratio']:.3f} times as fast; "
        f"{'the same' if summary['same_tokens'] else 'DIFFERENT'} tokens"
    )
    with LLM(folder, context=2, threads=arguments.threads) as llm:
        machine = dataclasses.asdict(environment(llm))
    document = {
        "benchmark": "genai_folder",
        "shape": arguments.shape,
        "prompt_tokens": length,
        "max_tokens": arguments.max_tokens,
        "rounds": arguments.rounds,
        **summary,
        "onnxruntime_genai": version("onnxruntime-genai"),
        "environment": machine,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
