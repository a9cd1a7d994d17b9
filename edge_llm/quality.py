"""How true a model is: its perplexity on a text, and how far it is from a reference model.

**Windows.** The text's tokens are scored in windows as in Hugging Face's guide "Perplexity of
fixed-length models" (huggingface.co/docs/transformers/perplexity): a window starts every ``stride``
tokens of the text, and of each window only the tokens count that no window before it scored, so
that every token counts once. From the second window on, a token is judged from at least
``window - stride`` tokens of the text; those of the first window count with the fewer tokens that
are there. A token that has nothing in front of it counts nowhere: the first of the text, and with
``stride == window`` the first of each window. Where the model wants a BOS token, each window starts
with one (as in llama.cpp; the guide's GPT-2 has none), it takes a place in the window, and every
token has something in front of it.

**Figures.** Means over all scored tokens, in nats: perplexity is ``exp(mean -log q(token))``, the
divergence ``mean sum_v p(v) (log p(v) - log q(v))`` with p the reference's and q the model's
distribution over the whole vocabulary, and agreement the share of tokens where both find the same
token likeliest: as ``llama-perplexity --kl-divergence`` defines them.

**Standard errors.** Tokens of a passage are alike, so the windows' scored passages are the samples,
not the tokens: ``SE = sqrt(K / (K - 1) * sum_w (S_w - n_w * mean)^2) / N`` with K passages of n_w
tokens that sum up to S_w, and N tokens in all: the linearized ratio estimator (Cochran, Sampling
Techniques, 1977, 9A.1; Miller, arXiv 2411.00640, section 2.2). With passages of one token it is
llama.cpp's. ``exp`` passes errors on in first order: ``SE(PPL) = PPL * SE(mean)``, as there.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.bundle import Bundle
from edge_llm.engine.scoring import even_pieces, scored_width
from edge_llm.errors import ArgumentError, RuntimeFailure
from edge_llm.llm import LLM
from edge_llm.options import integer

__all__ = [
    "DEFAULT_WINDOW",
    "Estimate",
    "QualityReport",
    "Window",
    "estimate_mean",
    "evaluate",
    "open_for_evaluation",
    "read_text_file",
    "split_windows",
    "token_figures",
]

DEFAULT_WINDOW = 512
"""llama.cpp's, too; shorter where a context is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A measured figure; ``standard_error`` is None where a single window was scored."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """All that :func:`evaluate` finds; what needs a reference is None without one.

    Attributes:
        model: The model's name.
        reference: The reference's name.
        text_sha256: Of the whole text in UTF-8, hexadecimal.
        tokens: How many were scored.
        windows: How many windows.
        window: Tokens of a window at most, BOS included.
        stride: Tokens of the text from the start of a window to that of the next.
        bos: Whether each window starts with BOS.
        perplexity: The model's.
        reference_perplexity: The reference's.
        log_perplexity_ratio: ``ln(perplexity / reference_perplexity)``, whose error is smaller than
            the two perplexities' own: both models stumble over the same passages.
        kl_divergence: From the reference to the model, nats per token.
        top1_agreement: Share of tokens (0 to 1) where both find the same token likeliest.
    """

    model: str
    reference: str | None
    text_sha256: str
    tokens: int
    windows: int
    window: int
    stride: int
    bos: bool
    perplexity: Estimate
    reference_perplexity: Estimate | None
    log_perplexity_ratio: Estimate | None
    kl_divergence: Estimate | None
    top1_agreement: Estimate | None


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens ``begin`` to ``end`` of the text, of which those from ``scored`` on count."""

    begin: int
    end: int
    scored: int


def evaluate(
    llm: LLM,
    text: str,
    *,
    reference: LLM | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QualityReport:
    """Measure a model on a text; the module's docstring defines every figure.

    Needs the logits of some tokens of a window at a time, at most 16 MiB of each model's.

    Args:
        llm: The model.
        text: What it shall predict.
        reference: The model that it is to be like; it must have the same tokenizer.
        window: Tokens that a model sees at once at most (default: 512, or the shorter context).
        stride: Tokens from the start of a window to that of the next (default: half a window).
        max_tokens: Use only so many tokens of the text, its first.
        progress: Called with the scored tokens and all that are to be.

    Raises:
        ArgumentError: An argument is outside its domain, the text holds no token to score, the
            models' tokenizers differ, or the model says that it was calibrated on this very text.
        RuntimeFailure: A model gives no finite probabilities.
    """
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    _check_unseen(llm, digest)
    longest = min(one.context for one in (llm, reference) if one is not None)
    bos = llm.manifest.tokens.bos if llm.manifest.tokens.add_bos else None
    prefix = [] if bos is None else [bos]
    length = integer("window", window, 2, longest) or min(DEFAULT_WINDOW, longest)
    room = length - len(prefix)
    step = integer("stride", stride, 1, room) or max(1, length // 2)
    limit = integer("max_tokens", max_tokens, 1)
    tokens = llm.tokenize(text, add_bos=False)
    if reference is not None:
        _check_tokenizers(llm, reference, text, tokens)
    tokens = tokens[:limit]
    parts = split_windows(len(tokens), length=room, stride=step, context_free=bos is not None)
    total = sum(part.end - part.scored for part in parts)
    if not total:
        needed = 2 - len(prefix)
        raise ArgumentError("text", f"at least {needed} tokens long", text, "Take a longer one.")
    sums, done = [], 0
    for part in parts:
        sequence = np.array([*prefix, *tokens[part.begin : part.end]], np.int64)
        figures = _window_figures(llm, reference, sequence, part.end - part.scored)
        sums.append(figures.sum(axis=0))
        done += len(figures)
        if progress:
            progress(done, total)
    counts = np.array([part.end - part.scored for part in parts])
    loss, *others = (estimate_mean(column, counts) for column in np.array(sums).T)
    reference_loss, kl_divergence, agreement, difference = others or (None, None, None, None)
    return QualityReport(
        model=llm.manifest.name,
        reference=None if reference is None else reference.manifest.name,
        text_sha256=digest,
        tokens=total,
        windows=len(parts),
        window=length,
        stride=step,
        bos=bos is not None,
        perplexity=_exponential(loss),
        reference_perplexity=reference_loss and _exponential(reference_loss),
        log_perplexity_ratio=difference,
        kl_divergence=kl_divergence,
        top1_agreement=agreement,
    )


def split_windows(
    tokens: int, *, length: int, stride: int, context_free: bool = False
) -> list[Window]:
    """The windows of a text in which at least one token counts.

    Args:
        tokens: Length of the text.
        length: Most tokens of a window, without BOS.
        stride: From 1 to ``length``.
        context_free: Whether a window's first token has something in front of it: BOS.
    """
    windows, scored = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        first = max(scored, begin + (not context_free))
        if first < end:
            windows.append(Window(begin, end, first))
        scored = end
        if end == tokens:
            break
    return windows


def token_figures(
    logits: NDArray[np.float32],
    reference: NDArray[np.float32] | None,
    targets: NDArray[np.int64],
) -> NDArray[np.float64]:
    """What each token adds to the figures.

    Args:
        logits: The model's, float32 [n, vocab].
        reference: The reference's, float32 [n, vocab], or None.
        targets: The tokens that come, int64 [n].

    Returns:
        float64 [n, 1], -log q(target) in nats; with a reference [n, 5]: then -log p(target),
        KL(p || q), whether both find the same token likeliest (1 or 0), and log p/q (target).
    """
    figures = np.empty((len(targets), 1 if reference is None else 5), np.float64)
    for i, target in enumerate(targets):
        _, own = _softmax(logits[i])
        figures[i, 0] = -own[target]
        if reference is not None:
            probabilities, true = _softmax(reference[i])
            figures[i, 1] = -true[target]
            figures[i, 2] = probabilities @ (true - own)
            figures[i, 3] = logits[i].argmax() == reference[i].argmax()
            figures[i, 4] = true[target] - own[target]
    return figures


def estimate_mean(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Estimate:
    """The mean over all tokens, and its standard error from sums over passages.

    Args:
        sums: float64 [passages], each passage's sum.
        counts: int64 [passages], its tokens.
    """
    passages, total = len(counts), int(counts.sum())
    mean = float(sums.sum() / total)
    if passages < 2:
        return Estimate(value=mean, standard_error=None)
    spread = float(np.square(sums - counts * mean).sum()) * passages / (passages - 1)
    return Estimate(value=mean, standard_error=math.sqrt(spread) / total)


def open_for_evaluation(
    path: str | os.PathLike[str],
    *,
    window: int | None = None,
    variant: str | None = None,
    threads: int | None = None,
    verify: bool = False,
) -> LLM:
    """Load a model with a cache for one window.

    Args:
        path: As for :class:`~edge_llm.LLM`, like ``variant``, ``threads`` and ``verify``.
        window: As for :func:`evaluate`.
        variant: See there.
        threads: See there.
        verify: See there.

    Raises:
        ArgumentError: The window is longer than what was exported.
        BundleError: The folder is not a usable bundle.
    """
    longest = Bundle.open(path, variant=variant).manifest.dims.context
    context = integer("window", window, 2, longest) or min(DEFAULT_WINDOW, longest)
    return LLM(path, variant=variant, context=context, threads=threads, verify=verify)


def read_text_file(path: str | os.PathLike[str], argument: str = "text") -> str:
    """The text of a file, byte for byte.

    Raises:
        ArgumentError: It is empty or not UTF-8; ``argument`` names it.
        OSError: It cannot be read.
    """
    remedy = "Convert it first, with iconv for example."
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(argument, "a file of UTF-8 text", os.fspath(path), remedy) from error
    if not text:
        raise ArgumentError(argument, "a file that is not empty", os.fspath(path))
    return text


def _window_figures(
    llm: LLM, reference: LLM | None, tokens: NDArray[np.int64], scored: int
) -> NDArray[np.float64]:
    """:func:`token_figures` of a window's last ``scored`` tokens."""
    inputs, targets = tokens[:-1], tokens[-scored:]
    start = first = len(inputs) - scored
    found = []
    for part in even_pieces(targets, scored_width(llm.manifest.dims.vocab)):
        end = start + len(part)
        continued = start if start > first else 0
        logits = [
            model.logits(inputs[:end], last=len(part), continued=continued)
            for model in (llm, reference)
            if model is not None
        ]
        figures = token_figures(logits[0], None if reference is None else logits[1], part)
        if not np.isfinite(figures).all():
            raise RuntimeFailure(
                "A token's probability is 0 or no number, so that nothing can be measured.",
                "Check the checkpoint's weights for infinities, and export again.",
            )
        found.append(figures)
        start = end
    return np.concatenate(found)


def _check_unseen(llm: LLM, digest: str) -> None:
    """Refuse the text that a bundle was calibrated on; of other texts it does not know enough."""
    for name in ("calibration", "kv_cache_calibration"):
        calibration = llm.manifest.info.get(name)
        if isinstance(calibration, dict) and calibration.get("sha256") == digest:
            raise ArgumentError(
                "text",
                f"another one than {llm.manifest.name!r} was calibrated on",
                f"the text whose SHA-256 is {digest}",
                "A model that was fitted to a text looks better on it than it is.",
            )


def _check_tokenizers(llm: LLM, reference: LLM, text: str, tokens: list[int]) -> None:
    def alphabet(one: LLM) -> tuple[int, int | None]:
        manifest = one.manifest
        return manifest.dims.vocab, manifest.tokens.bos if manifest.tokens.add_bos else None

    same = alphabet(llm) == alphabet(reference)
    if not same or reference.tokenize(text, add_bos=False) != tokens:
        raise ArgumentError(
            "reference",
            f"a model with the tokenizer and the vocabulary of {llm.manifest.name!r}",
            reference.manifest.name,
            "Take the float32 model that the bundle was made from.",
        )


def _softmax(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """float32 [vocab] -> probabilities and their logarithms, float64 [vocab]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    probabilities = np.exp(shifted)
    total = probabilities.sum()
    probabilities /= total
    shifted -= math.log(total)
    return probabilities, shifted


def _exponential(mean: Estimate) -> Estimate:
    value = math.exp(mean.value)
    error = mean.standard_error
    return Estimate(value=value, standard_error=None if error is None else value * error)
