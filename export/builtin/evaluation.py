"""Exact match of the checkpoint: `python -m edge_llm_export.builtin.evaluation [JSONL ...]`.

Without arguments the held-out split; a JSONL file has rows of kind, request and answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .decode import answers
from .generator import Sample, samples
from .train import CHECKPOINT

SPLIT_SEED = 424_242
SPLIT_SIZE = 2_000


def held_out_split(count: int = SPLIT_SIZE) -> tuple[Sample, ...]:
    """The held-out split: the same `count` samples every time, no request twice."""
    found: dict[str, Sample] = {}
    for sample in samples(SPLIT_SEED, held_out=True):
        found.setdefault(" ".join(sample.request.lower().split()), sample)
        if len(found) == count:
            break
    return tuple(found.values())


def read_pairs(path: Path) -> tuple[Sample, ...]:
    """Samples out of a JSONL file with the keys kind, request and answer."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    return tuple(Sample(row["request"], row["answer"], row["kind"], "", "") for row in rows)


def exact_match(pairs: Iterable[Sample], given: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(right answers, requests) by kind, and under "all"."""
    counts: dict[str, tuple[int, int]] = {}
    for sample, answer in zip(pairs, given, strict=True):
        for kind in (sample.kind, "all"):
            right, total = counts.get(kind, (0, 0))
            counts[kind] = (right + (answer == sample.answer), total + 1)
    return dict(sorted(counts.items()))


def main() -> None:
    """Print exact match by kind, the misses, and one JSON document as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="JSONL files")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--misses", type=int, default=0, help="misses to print of each set")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = LlamaForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    sets = {path.stem: read_pairs(path) for path in options.files} or {"held-out": held_out_split()}
    document = {}
    for name, pairs in sets.items():
        given = answers(model.eval(), tokenizer, [sample.request for sample in pairs])
        missed = [(s, a) for s, a in zip(pairs, given, strict=True) if s.answer != a]
        for sample, answer in missed[: options.misses]:
            print(f"{sample.request}\n  want {sample.answer}\n  got  {answer}")
        document[name] = exact_match(pairs, given)
        for kind, (right, total) in document[name].items():
            print(f"{name:16} {kind:10} {right:5} / {total:5}  {100 * right / total:6.2f} %")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
