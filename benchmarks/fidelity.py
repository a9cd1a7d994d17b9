"""How far an engine's model is from a reference, by the figures of ``edge_llm.quality``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from benchmarks.engines.engine import Engine
from edge_llm import LLM
from edge_llm.quality import Estimate, estimate_mean, split_windows, token_figures
from edge_llm_export.builtin.dataset import encode
from edge_llm_export.builtin.generator import Sample

__all__ = ["Fidelity", "Passage", "measure_fidelity", "request_passages", "text_passages"]


@dataclass(frozen=True, slots=True)
class Passage:
    """A sequence that every engine is shown from its start; its last ``scored`` tokens count."""

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Figures over all scored tokens, as ``edge_llm.quality`` defines them.

    Attributes:
        loss: Mean negative log-likelihood, in nats per token; perplexity is its exponential.
        kl_divergence: From the reference to the model, in nats per token.
        top1_agreement: Share of tokens (0 to 1) where both find the same token likeliest.
        log_perplexity_ratio: To the reference's.
    """

    loss: Estimate
    kl_divergence: Estimate
    top1_agreement: Estimate
    log_perplexity_ratio: Estimate


def text_passages(llm: LLM, text: str, *, window: int, limit: int) -> list[Passage]:
    """The first windows of a text, side by side.

    Args:
        llm: Its tokenizer, and whether a window starts with BOS.
        text: Any text.
        window: Tokens of a window, BOS included.
        limit: How many windows at most.
    """
    bos = llm.manifest.tokens.bos if llm.manifest.tokens.add_bos else None
    prefix = () if bos is None else (bos,)
    tokens, room = llm.tokenize(text, add_bos=False), window - len(prefix)
    parts = split_windows(len(tokens), length=room, stride=room, context_free=bos is not None)
    return [
        Passage((*prefix, *tokens[part.begin : part.end]), part.end - part.scored)
        for part in islice(parts, limit)
    ]


def request_passages(tokenizer: Tokenizer, samples: Iterable[Sample]) -> list[Passage]:
    """Requests to the built-in model, each with its answer, whose tokens count (EOS too)."""
    rows = encode(tokenizer, [(sample.request, sample.answer) for sample in samples])
    return [Passage(tuple(tokens), len(tokens) - start) for tokens, start in rows]


def measure_fidelity(
    model: Engine,
    reference: Engine,
    passages: Sequence[Passage],
    *,
    vocab: int,
    progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Score a model against a reference.

    Standard errors take passages for the samples. Whole passages are computed at once, however many
    logits that is: a peer's interface may have no other way.

    Args:
        model: What is judged.
        reference: What it should be like.
        passages: At least one.
        vocab: Tokens that the reference knows; a peer that pads its vocabulary gets no more.
        progress: Called with the passages done and all of them.
    """
    sums = []
    for done, passage in enumerate(passages):
        inputs, targets = passage.tokens[:-1], np.array(passage.tokens[-passage.scored :])
        own = model.logits(inputs, last=passage.scored)[:, :vocab]
        true = reference.logits(inputs, last=passage.scored)[:, :vocab]
        figures = token_figures(own, true, targets)
        if not np.isfinite(figures).all():
            raise ValueError(f"passage {done}: a token's probability is 0 or no number")
        sums.append(figures.sum(axis=0))
        if progress:
            progress(done + 1, len(passages))
    counts = np.array([passage.scored for passage in passages])
    loss, _, divergence, agreement, difference = np.array(sums).T
    return Fidelity(
        loss=estimate_mean(loss, counts),
        kl_divergence=estimate_mean(divergence, counts),
        top1_agreement=estimate_mean(agreement, counts),
        log_perplexity_ratio=estimate_mean(difference, counts),
    )
