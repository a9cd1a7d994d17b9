"""Choosing the next token from its logits.

The order is fixed: the user's hook; logit bias; repetition penalty (prompt and answer);
presence and frequency penalties (answer); forbidden ids; temperature; top-k; top-p; min-p; draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_llm.decoding.distribution import (
    Logits,
    TokenLogprob,
    draw,
    not_finite,
    token_logprobs,
)
from edge_llm.decoding.penalties import (
    TokenCounts,
    apply_count_penalties,
    apply_repetition_penalty,
)
from edge_llm.errors import ArgumentError, EdgeLLMError, RuntimeFailure

__all__ = ["LogitsHook", "Sampler", "Sampling", "TokenLogprob", "token_logprobs"]

LogitsHook = Callable[[Sequence[int], Logits], NDArray[Any]]
"""Maps the tokens so far (prompt and answer) and a private copy of the logits to new logits."""

_FLOAT32 = np.finfo(np.float32)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_k: Only the k most likely tokens are candidates; 0 is off.
        top_p: Only the fewest most likely tokens that together reach this probability, after
            top-k (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751); 1 is off.
        min_p: Only tokens with at least this share of the most likely one's probability (Nguyen et
            al. 2024, arXiv:2407.01082); 0 is off.
        repetition_penalty: Above 1 makes tokens of prompt and answer less likely; 1 is off.
        presence_penalty: What a token of the answer loses once, in logits.
        frequency_penalty: What a token of the answer loses for each occurrence, in logits.
        logit_bias: What is added to the logits of single tokens, by token id.

    Raises:
        ArgumentError: A value is outside its domain.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        top = float(_FLOAT32.max)
        for name, low, high, domain in (
            ("temperature", 0.0, top, "a number of at least 0"),
            ("top_p", 0.0, 1.0, "a number from 0 to 1"),
            ("min_p", 0.0, 1.0, "a number from 0 to 1"),
            ("repetition_penalty", float(_FLOAT32.tiny), top, "a number above 0"),
            ("presence_penalty", -top, top, "a finite number"),
            ("frequency_penalty", -top, top, "a finite number"),
        ):
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise ArgumentError(name, domain, value)
            object.__setattr__(self, name, float(value))
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise ArgumentError("top_k", "an integer of at least 0", self.top_k)
        object.__setattr__(self, "top_k", int(self.top_k))
        if not isinstance(self.logit_bias, Mapping) or not all(
            _is_integer(token) and token >= 0 and _is_number(bias) and abs(bias) <= top
            for token, bias in self.logit_bias.items()
        ):
            raise ArgumentError("logit_bias", "token ids mapped to finite numbers", self.logit_bias)
        bias = {int(token): float(value) for token, value in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sampling:
        """Makes a Sampling from plain data such as parsed JSON.

        Args:
            values: Attributes by name; the token ids of `logit_bias` may be decimal strings, as
                JSON has no other keys.

        Raises:
            ArgumentError: A key is unknown or a value outside its domain.
        """
        _refuse_unknown(values)
        known = dict(values)
        if isinstance(bias := known.get("logit_bias"), Mapping):
            known["logit_bias"] = {
                int(token) if isinstance(token, str) and token.isdecimal() else token: value
                for token, value in bias.items()
            }
        return cls(**known)

    def merged(self, **overrides: Any) -> Sampling:
        """This with some attributes replaced.

        Args:
            **overrides: Attributes by name; None leaves the attribute as it is.

        Raises:
            ArgumentError: A name is unknown or a value outside its domain.
        """
        _refuse_unknown(overrides)
        return replace(self, **{name: v for name, v in overrides.items() if v is not None})


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: How tokens are chosen.
        vocab_size: The number of logits.
        prompt: The prompt's token ids.
        rng: Drawn from once a sampled token, never for a greedy one.
        hook: Sees and may change the logits before everything else.

    Raises:
        ArgumentError: `logit_bias` or the prompt names a token outside the vocabulary.
    """

    __slots__ = (
        "_answer",
        "_bias_tokens",
        "_bias_values",
        "_changes",
        "_hook",
        "_rng",
        "_sampling",
        "_scratch",
        "_seen",
        "_tokens",
        "_vocab_size",
    )

    def __init__(
        self,
        sampling: Sampling,
        *,
        vocab_size: int,
        prompt: Sequence[int] | NDArray[np.integer],
        rng: np.random.Generator,
        hook: LogitsHook | None = None,
    ) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._rng = rng
        self._hook = hook
        self._bias_tokens = self._ids("logit_bias", list(sampling.logit_bias))
        self._bias_values = np.fromiter(sampling.logit_bias.values(), np.float32)
        seen = self._ids("prompt", prompt).tolist()
        self._tokens = seen if hook else []
        repeats = sampling.repetition_penalty != 1.0
        counts = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self._seen = TokenCounts(seen) if repeats else None
        self._answer = TokenCounts() if counts else None
        self._changes = bool(hook or sampling.logit_bias or repeats or counts)
        self._scratch: Logits | None = None

    def sample(self, logits: Logits, forbidden: Sequence[int] | NDArray[np.integer] = ()) -> int:
        """Chooses the next token; `accept` must follow before the next call if it is kept.

        Args:
            logits: (vocab,) float32; never changed.
            forbidden: Ids that cannot be chosen, whatever the hook or the bias say.

        Returns:
            The chosen token's id.

        Raises:
            ArgumentError: The logits' shape or dtype is wrong, the hook's result is unusable, or
                hook, bias and forbidden ids leave no token.
            RuntimeFailure: The model's logits hold NaN or no finite value at all.
        """
        if logits.shape != (self._vocab_size,) or logits.dtype != np.float32:
            domain = f"a float32 array of shape ({self._vocab_size},)"
            raise ArgumentError("logits", domain, f"{logits.dtype} {logits.shape}")
        changed = logits
        if self._changes or len(forbidden):
            changed = self._change(logits, self._ids("forbidden", forbidden))
        sampling = self._sampling
        if sampling.temperature == 0.0:
            token = int(changed.argmax())
            if not math.isfinite(changed[token]):
                raise self._no_choice(logits)
            return token
        try:
            return draw(
                changed,
                self._rng.random(),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
            )
        except RuntimeFailure:
            raise self._no_choice(logits) from None

    def accept(self, token: int) -> None:
        """Takes a token into the answer, so that the penalties and the hook know of it.

        Args:
            token: The token's id.

        Raises:
            ArgumentError: The id is outside the vocabulary.
        """
        if not 0 <= token < self._vocab_size:
            raise ArgumentError("token", f"an id from 0 to {self._vocab_size - 1}", token)
        if self._seen is not None:
            self._seen.add(token)
        if self._answer is not None:
            self._answer.add(token)
        if self._hook is not None:
            self._tokens.append(token)

    def _no_choice(self, logits: Logits) -> EdgeLLMError:
        top = float(logits.max())
        if not math.isfinite(top):
            return not_finite(top)
        return ArgumentError(
            "logits",
            "such that a token is left to choose",
            "none after the hook, logit_bias, penalties and forbidden ids",
        )

    def _ids(self, name: str, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        array = np.asarray(ids, np.int64)
        if array.size and not (array.min() >= 0 and array.max() < self._vocab_size):
            raise ArgumentError(name, f"token ids from 0 to {self._vocab_size - 1}", ids)
        return array

    def _change(self, logits: Logits, forbidden: NDArray[np.int64]) -> Logits:
        """All that comes before the temperature, on a private copy."""
        if self._scratch is None:
            self._scratch = np.empty_like(logits)
        scratch = self._scratch
        np.copyto(scratch, logits)
        with np.errstate(over="ignore", invalid="ignore"):
            if self._hook is not None:
                self._call_hook(scratch)
            scratch[self._bias_tokens] += self._bias_values
            sampling = self._sampling
            if self._seen is not None:
                apply_repetition_penalty(scratch, self._seen.tokens, sampling.repetition_penalty)
            if self._answer is not None:
                apply_count_penalties(
                    scratch,
                    self._answer.tokens,
                    self._answer.counts,
                    presence=sampling.presence_penalty,
                    frequency=sampling.frequency_penalty,
                )
        scratch[forbidden] = -np.inf
        return scratch

    def _call_hook(self, scratch: Logits) -> None:
        assert self._hook is not None
        result = self._hook(tuple(self._tokens), scratch)
        if (
            not isinstance(result, np.ndarray)
            or result.shape != scratch.shape
            or not np.issubdtype(result.dtype, np.floating)
        ):
            got = (
                f"{result.dtype} {result.shape}"
                if isinstance(result, np.ndarray)
                else type(result).__name__
            )
            domain = f"a floating-point array of shape ({self._vocab_size},)"
            raise ArgumentError("the logits hook's result", domain, got)
        if result is not scratch:
            np.copyto(scratch, result, casting="same_kind")


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    names = [f.name for f in fields(Sampling)]
    if unknown := sorted(set(values) - set(names)):
        raise ArgumentError("sampling", f"made of {', '.join(names)}", ", ".join(unknown))
