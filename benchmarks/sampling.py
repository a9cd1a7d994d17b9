"""How long does it take to choose a token from its logits?

Greedy decoding reads the logits once; sampling has to weigh all of them, then sorts only as much
of the head as the draw needs. Peaked logits are what a language model mostly gives; flat ones are
the worst case, where the whole vocabulary may have to be sorted. Prints a table of medians; the
last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from edge_llm.decoding.sampling import Sampler, Sampling

VOCABULARIES = (49_152, 151_936)
CASES = {
    "greedy": ("peaked", Sampling()),
    "greedy, penalties": ("peaked", Sampling(repetition_penalty=1.1, frequency_penalty=0.2)),
    "sampled, peaked": ("peaked", Sampling(temperature=0.8)),
    "sampled, peaked, top-p": ("peaked", Sampling(temperature=0.8, top_p=0.95)),
    "sampled, peaked, top-k": ("peaked", Sampling(temperature=0.8, top_k=40, top_p=0.95)),
    "sampled, peaked, all": (
        "peaked",
        Sampling(
            temperature=0.8,
            top_k=40,
            top_p=0.95,
            min_p=0.05,
            repetition_penalty=1.1,
            presence_penalty=0.1,
            logit_bias={5: 1.0},
        ),
    ),
    "sampled, flat": ("flat", Sampling(temperature=0.8)),
    "sampled, flat, top-p": ("flat", Sampling(temperature=0.8, top_p=0.95)),
    "sampled, flat, top-k": ("flat", Sampling(temperature=0.8, top_k=40)),
}


def rows(shape: str, vocab: int, count: int) -> NDArray[np.float32]:
    """Logits: (count, vocab) float32; peaked ones fall with the logarithm of a token's rank."""
    rng = np.random.default_rng(0)
    if shape == "flat":
        return rng.standard_normal((count, vocab), np.float32)
    ranks = np.stack([rng.permutation(vocab) for _ in range(count)]) + 1.0
    logits: NDArray[np.float32] = (-2.0 * np.log(ranks)).astype(np.float32)
    return logits


def microseconds(vocab: int, shape: str, sampling: Sampling, calls: int) -> float:
    """The median time of one choice, penalties over a prompt of 1,000 tokens included."""
    logits = rows(shape, vocab, 8)
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, vocab, 1000).tolist()
    sampler = Sampler(sampling, vocab_size=vocab, prompt=prompt, rng=rng)
    times = []
    for call in range(calls + 10):
        started = time.perf_counter()
        token = sampler.sample(logits[call % len(logits)])
        times.append(time.perf_counter() - started)
        sampler.accept(token)
    return statistics.median(times[10:]) * 1e6  # the first ten warm up


def main() -> None:
    """Prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500, help="calls per case")
    calls = parser.parse_args().calls
    print(f"{'median microseconds':28}" + "".join(f"{vocab:>10,}" for vocab in VOCABULARIES))
    results: dict[str, dict[str, float]] = {}
    for name, (shape, sampling) in CASES.items():
        times = {str(v): microseconds(v, shape, sampling, calls) for v in VOCABULARIES}
        results[name] = {vocab: round(time, 1) for vocab, time in times.items()}
        print(f"{name:28}" + "".join(f"{time:10.1f}" for time in times.values()))
    print(json.dumps({"benchmark": "sampling", "unit": "us", "calls": calls, "median": results}))


if __name__ == "__main__":
    main()
