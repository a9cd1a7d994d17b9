"""Token rows for training: generated on the fly, bucketed by length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from .generator import samples
from .tokenizer import ANSWER, BOS, EOS, rendered


class Batch(NamedTuple):
    """Right-padded rows.

    Attributes:
        tokens: int64 (rows, width).
        targets: int64 (rows, width): the token to predict at each position, -100 for none.
    """

    tokens: torch.Tensor
    targets: torch.Tensor


def encode(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Turn pairs into (BOS request ANSWER answer EOS, length up to and with ANSWER)."""
    bos, eos, mark = (tokenizer.token_to_id(name) for name in (BOS, EOS, ANSWER))
    asked = tokenizer.encode_batch([rendered(pair[0]) for pair in pairs], add_special_tokens=False)
    answered = tokenizer.encode_batch([pair[1] for pair in pairs], add_special_tokens=False)
    return [
        ([bos, *request.ids, mark, *answer.ids, eos], len(request.ids) + 2)
        for request, answer in zip(asked, answered, strict=True)
    ]


def chunk(
    tokenizer: Tokenizer,
    seed: int,
    *,
    count: int,
    rows: int,
    stage: int = 0,
    longest: int = 480,
) -> Iterator[Batch]:
    """The batches of one chunk of generated samples.

    Args:
        tokenizer: The model's tokenizer.
        seed: Same seed, same batches.
        count: Samples to draw.
        rows: Rows of a batch of average length; long rows come in smaller batches.
        stage: Whose shares of the mixture to draw in.
        longest: Rows longer than this are left out.

    Yields:
        Batches of rows of similar length, in random order.
    """
    drawn = [(item.request, item.answer) for item in islice(samples(seed, stage=stage), count)]
    encoded = sorted(
        (row for row in encode(tokenizer, drawn) if len(row[0]) <= longest),
        key=lambda row: len(row[0]),
    )
    budget = rows * sum(len(row[0]) for row in encoded) // max(len(encoded), 1)
    batches: list[list[tuple[list[int], int]]] = [[]]
    for row in encoded:
        if (len(batches[-1]) + 1) * len(row[0]) > budget and batches[-1]:
            batches.append([])
        batches[-1].append(row)
    if len(batches[-1]) == 1:
        batches.pop()  # a width of one row would be compiled anew
    random.Random(seed).shuffle(batches)
    for batch in batches:
        yield collate(batch, pad=0)


def collate(batch: list[tuple[list[int], int]], *, pad: int) -> Batch:
    """Pad rows on the right; targets are the answer and EOS only."""
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.full((len(batch), width), pad)
    targets = torch.full((len(batch), width), -100)
    for index, (ids, start) in enumerate(batch):
        row = torch.tensor(ids)
        tokens[index, : len(ids)] = row
        targets[index, start - 1 : len(ids) - 1] = row[start:]
    return Batch(tokens, targets)
