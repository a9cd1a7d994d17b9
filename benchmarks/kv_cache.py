"""What does an int8 cache of keys and values cost, and what does it bring?

Fidelity: a bundle with an int8 cache against its twin with a float32 cache, weights float32, so
that nothing but the cache differs: on the checkpoint and the text that were named, and on the
built-in model's held-out requests, in the form in which it is asked.

Speed: the next token at some depths of the context, and a prompt, on random weights of a real
shape, by turns with both caches; ratios are taken within a round. The last line of stdout is a JSON
document.

    python benchmarks/kv_cache.py --checkpoint CHECKPOINT --text FILE
    python benchmarks/kv_cache.py --shape smollm2-135m --depths 128 1024
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_llm import LLM
from edge_llm.cli.layout import table
from edge_llm.measure import environment
from edge_llm.quality import evaluate, read_text_file, token_figures
from edge_llm.runtime.kv_cache import state_bytes
from edge_llm_export import Calibration, export_model
from edge_llm_export.builtin.bundle import MAX_CONTEXT
from edge_llm_export.builtin.evaluation import held_out_split
from edge_llm_export.builtin.train import CHECKPOINT

KINDS = ("fp32", "int8")


def export_both(
    checkpoint: Path, folder: Path, calibration: Calibration | None = None, **options: Any
) -> tuple[Path, Path]:
    """Bundles with both caches; what is there already is kept."""
    paths = tuple(folder / f"{checkpoint.resolve().name}-{kind}" for kind in KINDS)
    for kind, path in zip(KINDS, paths, strict=True):
        if not path.is_dir():
            text = calibration if kind == "int8" else None
            export_model(checkpoint, path, kv_cache=kind, calibration=text, **options)
    return paths[0], paths[1]


def bytes_per_token(llm: LLM) -> int:
    """Of the cache, at full length."""
    state, context = llm.manifest.decoder.state, llm.manifest.dims.context
    return state_bytes(state, rows=1, capacity=context) // context


def fidelity(paths: tuple[Path, Path], text: str, tokens: int) -> dict[str, Any]:
    """Figures of a text's first tokens."""
    with LLM(paths[0], context=512) as twin, LLM(paths[1], context=512) as llm:
        report = evaluate(llm, text, reference=twin, max_tokens=tokens)
        sizes = [bytes_per_token(one) for one in (twin, llm)]
    assert report.kl_divergence is not None
    assert report.top1_agreement is not None
    assert report.reference_perplexity is not None
    return {
        "kl_divergence": report.kl_divergence.value,
        "kl_standard_error": report.kl_divergence.standard_error,
        "top1_agreement": report.top1_agreement.value,
        "perplexity": report.perplexity.value,
        "float_perplexity": report.reference_perplexity.value,
        "bytes_per_token": sizes,
    }


def builtin_fidelity(paths: tuple[Path, Path], count: int) -> dict[str, Any]:
    """Figures of the built-in model's answers, and how many it gets right to the letter."""
    figures, right = [], [0, 0]
    with LLM(paths[0]) as twin, LLM(paths[1]) as llm:
        end = llm.manifest.tokens.eos[0]
        for sample in held_out_split(count):
            messages = [{"role": "user", "content": sample.request}]
            answer = [*llm.tokenize(sample.answer, add_bos=False), end]
            tokens = [*llm.apply_chat_template(messages), *answer]
            logits = [one.logits(tokens[:-1], last=len(answer)).copy() for one in (llm, twin)]
            figures.append(token_figures(logits[0], logits[1], np.array(answer)))
            for i, one in enumerate((twin, llm)):
                right[i] += one.chat(messages).text == sample.answer
        sizes = [bytes_per_token(one) for one in (twin, llm)]
    means = np.concatenate(figures).mean(axis=0)
    return {
        "kl_divergence": float(means[2]),
        "top1_agreement": float(means[3]),
        "perplexity": float(np.exp(means[0])),
        "float_perplexity": float(np.exp(means[1])),
        "exact": [count, *right],
        "bytes_per_token": sizes,
    }


def seconds(llm: LLM, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Of the prompt, and per token behind it."""
    answer = llm.generate(prompt, max_tokens=tokens, min_tokens=tokens, temperature=0.0)
    assert answer.usage.reused_tokens == 0
    assert answer.timings.per_token is not None
    return answer.timings.prompt, answer.timings.per_token


def speed(
    paths: tuple[Path, Path], depths: Sequence[int], *, tokens: int, rounds: int, threads: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Medians by depth, and of each round's ratios: int8's seconds to float32's."""
    context, rng = max(depths) + tokens, np.random.default_rng(0)
    found = []
    with (
        LLM(paths[0], context=context, threads=threads) as plain,
        LLM(paths[1], context=context, threads=threads) as small,
    ):
        for depth in depths:
            runs: list[dict[str, tuple[float, float]]] = []
            for number in range(1 + rounds):
                prompt = rng.integers(plain.manifest.dims.vocab, size=depth).tolist()
                prompt[0] = number  # no prompt begins like the one that the cache holds
                order = [("fp32", plain), ("int8", small)]
                run = {
                    kind: seconds(llm, prompt, tokens)
                    for kind, llm in (order if number % 2 else reversed(order))
                }
                runs += [run] if number else []  # the first is the warm-up
            found.append(_summary(runs, depth))
        about = dataclasses.asdict(environment(plain))
        about["bytes_per_token"] = [bytes_per_token(one) for one in (plain, small)]
    return found, about


def _summary(runs: list[dict[str, tuple[float, float]]], depth: int) -> dict[str, Any]:
    summary: dict[str, Any] = {"depth": depth}
    for i, name in enumerate(("prompt", "per_token")):
        for kind in KINDS:
            summary[f"{name}_{kind}"] = statistics.median(run[kind][i] for run in runs)
        summary[f"{name}_ratio"] = statistics.median(
            run["int8"][i] / run["fp32"][i] for run in runs
        )
    return summary


def show_fidelity(results: dict[str, dict[str, Any]]) -> str:
    """One row per model."""
    rows = [("int8 against float32 cache", "KLD", "top-1", "perplexity", "bytes a token")]
    for name, one in results.items():
        rows.append(
            (
                name,
                f"{one['kl_divergence']:.2e}",
                f"{100 * one['top1_agreement']:.2f} %",
                f"{one['perplexity']:.4f} ({one['float_perplexity']:.4f})",
                f"{one['bytes_per_token'][1]} ({one['bytes_per_token'][0]})",
            )
        )
    return table(rows)


def show_speed(results: list[dict[str, Any]]) -> str:
    """One row per depth; ratios of seconds, below 1 is faster."""
    rows = [("depth", "float32, ms a token", "int8", "ratio", "prompt's ratio")]
    for one in results:
        rows.append(
            (
                str(one["depth"]),
                f"{one['per_token_fp32'] * 1e3:.2f}",
                f"{one['per_token_int8'] * 1e3:.2f}",
                f"{one['per_token_ratio']:.3f}",
                f"{one['prompt_ratio']:.3f}",
            )
        )
    return table(rows)


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a model whose fidelity to measure")
    parser.add_argument("--text", type=Path, help="what to measure it on")
    parser.add_argument("--tokens", type=int, default=6000, help="of that text")
    parser.add_argument("--requests", type=int, default=300, help="to the built-in model")
    parser.add_argument("--shape", help="a shape of benchmarks/shapes.py whose speed to measure")
    parser.add_argument("--depths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--max-tokens", type=int, default=32, help="decoded at each depth")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    options = parse()
    document: dict[str, Any] = {"benchmark": "kv_cache"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.checkpoint is not None:
            text = read_text_file(options.text)
            paths = export_both(options.checkpoint, folder, quantize="fp32")
            builtin = export_both(CHECKPOINT, folder, quantize="fp32", max_context=MAX_CONTEXT)
            document["fidelity"] = {
                options.checkpoint.resolve().name: fidelity(paths, text, options.tokens),
                "built-in": builtin_fidelity(builtin, options.requests),
            }
            print(show_fidelity(document["fidelity"]))
        if options.shape is not None:
            checkpoint = folder / options.shape
            shapes = Path(__file__).with_name("shapes.py")
            subprocess.run([sys.executable, shapes, options.shape, checkpoint], check=True)
            paths = export_both(checkpoint, folder, Calibration(samples=1, tokens=2), block=128)
            document["speed"], document["environment"] = speed(
                paths,
                options.depths,
                tokens=options.max_tokens,
                rounds=options.rounds,
                threads=options.threads,
            )
            print(show_speed(document["speed"]))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
