"""What does prompt lookup gain where there is something to copy, and cost where there is not?

Each case is answered with and without drafts by one loaded model, in changing order; the ratio is
that of the times per token, plain / lookup, so above 1 drafts are faster. Two kinds of cases:

- replayed: a recorded text is put through the verifier, by a hook that makes its next token the
  likeliest whatever the weights say. So random weights of a real model's shape (--shape) meet the
  acceptance of real text: a copy of the prompt, a copy with one word in thirty changed, and
  sentences that are not in the prompt.
- own: what the model itself answers (--bundle, and the built-in model): a text that goes on from a
  sentence, a text that goes on behind a list that came before, and commands of a conversation.

Greedy answers with and without drafts are compared: on quantized bundles near-ties may fall
otherwise, and how often they do is told per 1,000 tokens. The last line of stdout is a JSON
document.

    python benchmarks/speculation.py --shape smollm2-135m --shape qwen2.5-0.5b
    python benchmarks/speculation.py --bundle BUNDLE
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_llm import LLM, Completion
from edge_llm.builtin import BUNDLE
from edge_llm.cli.layout import table
from edge_llm.measure import environment
from edge_llm.options import GenerateOptions
from edge_llm_export import export_model

SENTENCES = Path(__file__).parents[1] / "export" / "builtin" / "tables" / "book_sentences.txt"
COMMANDS = (
    "turn on the kitchen light",
    "turn on the kitchen light and the bedroom lamp",
    "dim the bedroom lamp by 20 percent",
    "dim the kitchen light by 20 percent",
    "turn off the kitchen light and the bedroom lamp",
    "set the living room thermostat to 21 degrees",
    "set the bedroom thermostat to 19 degrees",
)
CHANGED = 1 / 30


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, and the text to replay behind it where the model shall not choose itself."""

    name: str
    prompt: tuple[int, ...]
    target: tuple[int, ...] | None = None


def sentences(llm: LLM, *, seed: int) -> list[int]:
    """Tokens of sentences from books, in an order of the seed's."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(lines)
    return llm.tokenize(" ".join(lines[:150]), add_bos=False)


def replayed(llm: LLM, *, prompt_tokens: int, seed: int) -> list[Case]:
    """A copy, an edited copy, and text that is not in the prompt."""
    text, other = sentences(llm, seed=seed), sentences(llm, seed=seed + 1000)
    rng = random.Random(seed)
    prompt = tuple(text[:prompt_tokens])
    edited = tuple(rng.choice(other) if rng.random() < CHANGED else token for token in prompt)
    return [
        Case("replayed: a copy", prompt, prompt),
        Case("replayed: an edited copy", prompt, edited),
        Case("replayed: nothing to copy", prompt, tuple(other)),
    ]


def own(llm: LLM, *, prompt_tokens: int, seed: int) -> list[Case]:
    """What a model of text goes on with: behind a sentence, and behind a passage begun again."""
    text = sentences(llm, seed=seed)
    passage = text[: prompt_tokens // 2]
    return [
        Case("own: goes on from a sentence", tuple(text[:20])),
        Case("own: a passage begun again", (*passage, *passage, *passage[:40])),
    ]


def conversation(llm: LLM) -> list[Case]:
    """Commands to the built-in model, each behind all that came before."""
    messages: list[dict[str, str]] = []
    cases = []
    for command in COMMANDS:
        messages.append({"role": "user", "content": command})
        cases.append(Case("own: commands", tuple(llm.apply_chat_template(messages))))
        answer = llm.chat(messages, speculation="off")
        messages.append({"role": "assistant", "content": answer.text})
    return cases[2:]


def replay(case: Case) -> Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]:
    """A hook that makes the target's next token the likeliest."""
    target, start = case.target, len(case.prompt)
    assert target is not None

    def hook(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[target[len(tokens) - start]] = 1e9
        return logits

    return hook


def seconds(answer: Completion) -> float:
    """Of each token behind the first."""
    assert answer.timings.per_token is not None
    return answer.timings.per_token


def compare(llm: LLM, cases: Sequence[Case], *, max_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of the rounds' ratios of one kind of case."""
    ratios, plain_times = [], []
    drafted = accepted = tokens = agreed = partings = 0
    for round_ in range(1 + rounds):
        for case in cases:
            length = max_tokens if case.target is None else min(max_tokens, len(case.target))
            options: GenerateOptions = {
                "temperature": 0.0,
                "repetition_penalty": 1.0,
                "max_tokens": length,
            }
            if case.target is not None:
                options |= {"min_tokens": length, "logits_hook": replay(case)}
            answers = {}
            for lookup in (round_ % 2 == 0, round_ % 2 == 1):
                options["speculation"] = "lookup" if lookup else "off"
                answers[lookup] = llm.generate(case.prompt, **options)
            fast, plain = answers[True], answers[False]
            if not round_ or min(len(fast.tokens), len(plain.tokens)) < 2:
                continue  # a warm-up, or nothing behind the first token
            ratios.append(seconds(plain) / seconds(fast))
            plain_times.append(seconds(plain))
            drafted += fast.usage.drafted_tokens
            accepted += fast.usage.accepted_tokens
            tokens += fast.usage.completion_tokens
            same = [a == b for a, b in zip(fast.tokens, plain.tokens, strict=False)]
            agreed += same.index(False) if False in same else len(same)
            partings += False in same
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "plain_per_token": statistics.median(plain_times),
        "accepted_of_drafted": accepted / drafted if drafted else None,
        "accepted_of_tokens": accepted / tokens,
        "partings_per_1000": 1000 * partings / max(1, agreed),
        "tokens": tokens,
    }


def measure(path: Path, kind: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of a bundle."""
    results = []
    with LLM(path, threads=arguments.threads) as llm:
        room = llm.context - arguments.max_tokens
        length = min(arguments.prompt_tokens, room - 40)
        groups: dict[str, list[Case]] = {}
        cases = conversation(llm) if kind == "builtin" else []
        for seed in range(arguments.texts):
            if kind == "text":
                cases += own(llm, prompt_tokens=length, seed=seed)
            cases += replayed(llm, prompt_tokens=length, seed=seed)
        for case in cases:
            groups.setdefault(case.name, []).append(case)
        for name, group in groups.items():
            rounds = max(1, arguments.rounds // len(group))
            result = compare(llm, group, max_tokens=arguments.max_tokens, rounds=rounds)
            curve = {w: round(c, 2) for w, c in llm._model.drafting.costs.curve.items()}
            quantization = llm.manifest.quantization
            results.append(
                {
                    "model": llm.manifest.name,
                    "bits": quantization.bits,
                    "block": quantization.block,
                    "case": name,
                    "curve": curve,
                    **result,
                    "environment": dataclasses.asdict(environment(llm)),
                }
            )
            print(row(results[-1]), file=sys.stderr, flush=True)
    return results


def row(one: dict[str, Any]) -> tuple[str, ...]:
    """A result's cells."""
    share = one["accepted_of_drafted"]
    return (
        f"{one['model']} {one['bits']}/{one['block']}",
        one["case"],
        f"{one['plain_per_token'] * 1e3:.2f}",
        f"{one['ratio']:.3f}",
        "-" if share is None else f"{100 * share:.0f} %",
        f"{100 * one['accepted_of_tokens']:.0f} %",
        f"{one['partings_per_1000']:.1f}",
        " ".join(f"{cost:.1f}" for cost in one["curve"].values()),
    )


def shape_bundle(shape: str, arguments: argparse.Namespace) -> Path:
    """A bundle of random weights, made where it is not there yet."""
    block = arguments.block
    bundle: Path = arguments.folder / f"{shape}-int4-{block}"
    if not bundle.is_dir():
        checkpoint = arguments.folder / shape
        shapes = Path(__file__).with_name("shapes.py")
        subprocess.run([sys.executable, shapes, shape, checkpoint], check=True)
        export_model(checkpoint, bundle, quantize="int4", block=block)
    return bundle


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", default=[], help="of benchmarks/shapes.py")
    parser.add_argument("--bundle", action="append", default=[], type=Path, help="a trained model")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=Path("bundles"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--texts", type=int, default=2, help="different texts of each case")
    parser.add_argument("--rounds", type=int, default=8, help="pairs of answers of each case")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    results = []
    for shape in arguments.shape:
        results += measure(shape_bundle(shape, arguments), "shape", arguments)
    for path in arguments.bundle:
        results += measure(path, "text", arguments)
    if not arguments.shape and not arguments.bundle:
        results += measure(BUNDLE, "builtin", arguments)
    head = ("model bits/block", "case", "plain ms/token", "plain / lookup", "accepted of drafted")
    tail = ("of tokens", "partings per 1,000", "cost of 2, 4, 8, 16")
    print(table([(*head, *tail), *map(row, results)]))
    print(json.dumps({"benchmark": "speculation", "results": results}))


if __name__ == "__main__":
    main()
