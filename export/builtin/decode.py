"""Greedy answers from the PyTorch checkpoint, many requests at a time, to measure it."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaForCausalLM

from .tokenizer import ANSWER, BOS, EOS, PAD, rendered


def answers(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    requests: list[str],
    *,
    rows: int = 64,
    longest: int = 96,
) -> list[str]:
    """The greedy answer to each request.

    Args:
        model: The checkpoint.
        tokenizer: Its tokenizer.
        requests: What is asked, as typed.
        rows: Requests decoded at once.
        longest: Most tokens of an answer.

    Returns:
        The answers, in order.
    """
    bos, eos, mark, pad = (tokenizer.token_to_id(name) for name in (BOS, EOS, ANSWER, PAD))
    encoded = tokenizer.encode_batch([rendered(r) for r in requests], add_special_tokens=False)
    prompts = [[bos, *item.ids, mark] for item in encoded]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), rows):
        indices = order[start : start + rows]
        with torch.inference_mode():
            rows_out = _greedy(
                model, [prompts[i] for i in indices], eos=eos, pad=pad, longest=longest
            )
        for index, ids in zip(indices, rows_out, strict=True):
            texts[index] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def _greedy(
    model: LlamaForCausalLM, prompts: list[list[int]], *, eos: int, pad: int, longest: int
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    out: list[list[int]] = [[] for _ in prompts]
    open_rows = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(longest):
        logits = model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = logits.argmax(-1)
        open_rows &= chosen != eos
        if not open_rows.any():
            break
        for index in open_rows.nonzero().flatten().tolist():
            out[index].append(int(chosen[index]))
        tokens = chosen[:, None]
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], -1)
        positions = positions[:, -1:] + 1
    return out
