"""The distribution over the next token: the draw, and log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import ArgumentError, RuntimeFailure

__all__ = ["Logits", "TokenLogprob", "draw", "not_finite", "token_logprobs"]

Logits = NDArray[np.float32]

_FLOAT32 = np.finfo(np.float32)
_HEADS = (64, 1024, 16384)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model itself found a token.

    Attributes:
        token: The token's id.
        logprob: Its log-probability in nats.
        top: The most likely ids and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def draw(
    logits: Logits,
    u: float,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Temperature, top-k, top-p, min-p and the draw.

    The plain definition: order the tokens by falling logit, the lower id first among equals; keep
    the first top_k; weigh each `exp((logit - max) / temperature)` in float32; let `total` be the
    sum of the weights in float64; keep the fewest first tokens whose sum reaches top_p x total;
    of these the ones before the first that weighs less than min_p (the heaviest weighs 1); take
    the first token at which the running sum exceeds u x the sum of the kept ones.

    Only as much of the head of that order is sorted as the decision needs. transformers 4.57 has
    the same order of steps (but keeps ties at the k-th place); llama.cpp has the temperature last.

    Args:
        logits: (vocab,) float32.
        u: The draw, uniform in [0, 1).
        temperature: Above 0.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.

    Returns:
        The chosen token's id.

    Raises:
        RuntimeFailure: The logits hold NaN or no finite value at all.
    """
    size = logits.size
    maxima = _group_maxima(logits)
    top = maxima.max()
    _require_finite(top)
    # Bounds keep 0 * inf and -inf * 0 out; beyond them the result is greedy or flat anyway.
    scale = min(max(1.0 / temperature, float(_FLOAT32.tiny)), float(_FLOAT32.max))
    if 0 < top_k < size:
        tokens = _head(logits, maxima, top_k)[:top_k]
        weights = _weights(logits[tokens], top, scale)
        total = float(np.cumsum(weights, dtype=np.float64)[-1])
        index = _choose(weights, total, u, top_p, min_p, whole=True)
        assert index is not None
        return int(tokens[index])
    every = _weights(logits, top, scale)
    total = float(every.sum(dtype=np.float64))
    for count in (*_HEADS, size):
        tokens = _head(logits, maxima, min(count, size))
        index = _choose(every[tokens], total, u, top_p, min_p, whole=tokens.size == size)
        if index is not None:
            return int(tokens[index])
    raise AssertionError("the whole order decides")


def token_logprobs(logits: Logits, token: int, n: int) -> TokenLogprob:
    """Log-probabilities in the model's own distribution, before bias, penalties and temperature.

    Args:
        logits: (vocab,) float32, as the model gave them.
        token: The chosen token's id.
        n: How many of the most likely tokens to list, from 0 to the vocabulary's size.

    Raises:
        ArgumentError: `token` or `n` is outside its domain.
        RuntimeFailure: The logits hold NaN or no finite value at all.
    """
    size = logits.size
    if not 0 <= token < size:
        raise ArgumentError("token", f"an id from 0 to {size - 1}", token)
    if not 0 <= n <= size:
        raise ArgumentError("logprobs", f"an integer from 0 to {size}", n)
    maxima = _group_maxima(logits)
    top = maxima.max()
    _require_finite(top)
    total = float(_weights(logits, top, 1.0).sum(dtype=np.float64))
    log_total = float(top) + math.log(total)
    best = _head(logits, maxima, n)[:n] if n else np.empty(0, np.intp)
    return TokenLogprob(
        token=token,
        logprob=float(logits[token]) - log_total,
        top=tuple((int(i), float(logits[i]) - log_total) for i in best),
    )


def not_finite(top: float) -> RuntimeFailure:
    """The error for logits whose maximum is NaN or infinite."""
    return RuntimeFailure(
        f"The model gave logits whose maximum is {top}.",
        "Check that the bundle's files are whole, or export the model anew.",
    )


def _choose(
    weights: Logits, total: float, u: float, top_p: float, min_p: float, *, whole: bool
) -> int | None:
    """The drawn position in a head of the order, or None where the head is too short to tell."""
    sums = np.cumsum(weights, dtype=np.float64)
    kept, cut = sums.size, False
    if top_p < 1.0:
        needed = int(sums.searchsorted(top_p * total)) + 1
        if needed <= kept:
            kept, cut = needed, True
    if min_p > 0.0 and (light := weights[:kept] < min_p).any():
        kept, cut = int(light.argmax()), True
    if not (cut or whole) and (top_p < 1.0 or min_p > 0.0):
        return None
    mass = float(sums[kept - 1]) if cut else total
    index = int(sums[:kept].searchsorted(u * mass, side="right"))
    if index < kept:
        return index
    # Rounding alone can carry the draw past the end; a token of no weight is never chosen.
    return int(np.count_nonzero(weights[:kept])) - 1 if cut or whole else None


def _weights(logits: Logits, top: np.float32, scale: float) -> Logits:
    """Unnormalised probabilities, the heaviest 1: float32 of the logits' shape."""
    with np.errstate(over="ignore"):
        weights: Logits = logits - top
        weights *= np.float32(scale)
    np.exp(weights, out=weights)
    return weights


def _group_maxima(logits: Logits) -> Logits:
    """The maxima of about 1,024 groups that partition the logits; NaN if any is NaN."""
    height = max(1, logits.size // 1024)
    width = logits.size // height
    columns: Logits = logits[: height * width].reshape(height, width)
    return np.concatenate([columns.max(axis=0), logits[height * width :]])


def _head(logits: Logits, maxima: Logits, count: int) -> NDArray[np.intp]:
    """At least `count` first ids by falling logit, the lower id first among equals.

    As many logits as groups reach the count-th largest group maximum, so it is a threshold that
    leaves few to sort.
    """
    if count >= logits.size:
        return _descending(logits)
    source = maxima if count <= maxima.size else logits
    threshold = np.partition(source, source.size - count)[source.size - count]
    ids = np.flatnonzero(logits >= threshold)
    return ids[_descending(logits[ids])]


def _descending(logits: Logits) -> NDArray[np.intp]:
    """The positions by falling logit, the lower first among equals."""
    if logits.size < 4096:
        return np.argsort(-logits, kind="stable")
    # numpy sorts 16-bit integers by radix: two passes over keys that rise as the logits fall.
    bits = (logits + np.float32(0.0)).view(np.uint32)  # -0.0 becomes 0.0
    keys = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    low = np.argsort(keys.astype(np.uint16), kind="stable")
    high = (keys >> 16).astype(np.uint16)
    return low[np.argsort(high[low], kind="stable")]


def _require_finite(top: np.float32) -> None:
    if not math.isfinite(top):
        raise not_finite(float(top))
