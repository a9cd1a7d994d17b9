"""The options of a request, and checking them before any work."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from edge_llm.decoding.sampling import LogitsHook, Sampling
from edge_llm.engine.generation import Request
from edge_llm.errors import ArgumentError, ContextLengthError
from edge_llm.results import RequestReport
from edge_llm.text.chat import Tool

__all__ = [
    "ChatOptions",
    "GenerateOptions",
    "LoadOptions",
    "build_request",
    "cancel_event",
    "check_names",
    "folder",
    "integer",
    "priority_level",
    "seconds",
]

Speculation = Literal["lookup", "off"]

MOST_LOGPROBS = 100
MOST_PRIORITY = 1000
SAMPLING_FIELDS = tuple(Sampling.__dataclass_fields__)


class LoadOptions(TypedDict, total=False):
    """Options of loading a model.

    Attributes:
        variant: Which graph of a transformers.js or optimum folder, by the end of its file's name
            ("q4", "int8", "fp32"); by default the fastest on a CPU.
        context: Most tokens of prompt and answer together; by default what was exported, but at
            most 4,096. The key/value cache is allocated for it.
        threads: Threads to compute with; by default what ``edge-llm tune`` has found, or one per
            core that this process may use, little cores left out. With another number than the
            tuned one, nothing of a tuning is used.
        slots: Requests that are computed together, each with a cache of its own: a step for many
            answers takes little longer than one for a single answer. By default 4, or as many as
            take a quarter of the memory that is left. (Graphs of other exporters have one.)
        queue_limit: Requests that may wait for a slot; one more is refused (256 by default).
        prefill_chunk: Tokens of a prompt to feed at once; by default as many as take about 150 ms.
        cache_dir: Compile the weights into this folder (see :mod:`edge_llm.compiled`), which later
            processes then map. Without it nothing is written; what ``edge-llm compile`` has
            compiled is used all the same. A tuning is looked for here first.
        prefix_cache: Keep the beginnings of prompts in this folder, in the clear, and take what is
            there in place of computing it (see :meth:`edge_llm.LLM.bake`). Without it nothing is
            written, and what ``edge-llm bake`` has put into this user's cache folder is used. While
            one is written, a copy of what it has in the cache takes memory.
        prefix_cache_limit: Most bytes of that folder, or text such as "2GB"; what was used least
            recently goes. By default 1 GiB.
        memory_limit: Most bytes, or text such as "512MB", that a process with nothing but this
            model may have resident (see :class:`~edge_llm.memory.MemoryEstimate`). Without
            ``context``, the longest that fits one slot is taken; without ``slots``, as many as fit
            then.
        on_request: Called once for each request, with a
            :class:`~edge_llm.results.RequestReport`, when it has ended in whatever way or was
            refused because the queue is full: mostly on the engine's thread, so it must be quick,
            for all requests wait for it. What it raises is only logged. (Arguments that are refused
            make no request, and neither does a model that was closed.)
        verify: Compare every file's SHA-256 first.
    """

    variant: str | None
    context: int | None
    threads: int | None
    slots: int | None
    queue_limit: int
    prefill_chunk: int | None
    cache_dir: str | os.PathLike[str] | None
    prefix_cache: str | os.PathLike[str] | None
    prefix_cache_limit: int | str
    memory_limit: int | str | None
    on_request: Callable[[RequestReport], object] | None
    verify: bool


class GenerateOptions(TypedDict, total=False):
    """Options of every call that generates. What is left out comes from the bundle.

    Attributes:
        max_tokens: Most tokens of the answer; None means what the context has left.
        min_tokens: Tokens before which nothing may end the answer.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens that together have this probability.
        min_p: Keep tokens at least this share as likely as the most likely one.
        repetition_penalty: Of tokens in prompt and answer, as in transformers; 1 is none.
        presence_penalty: Taken off the logits of tokens in the answer, as in the OpenAI API.
        frequency_penalty: ... for each time that they occur in it.
        logit_bias: Added to the logits of these tokens.
        logits_hook: ``hook(tokens, logits)`` gets prompt and answer so far and a copy of the
            logits, float32 [vocab], and returns what to use in their place. It runs on the
            engine's thread, where neither ``cancel`` nor ``timeout`` can end it, and where every
            other request waits for it: a slow one slows down all streams.
        seed: Same seed, same text; None draws one from the system. (On a quantized bundle a
            near-tie may fall otherwise where the cache still holds tokens that were answered
            before: one token at a time rounds otherwise than several.)
        stop: A string or strings that end the answer and are not part of it.
        stop_tokens: Tokens that end the answer besides the model's own.
        speculation: "lookup" guesses tokens from what stands before them and computes several in a
            step where that is faster; "off" computes each by itself. Greedy or sampled, the text is
            the same, but for near-ties on a quantized bundle: several tokens at once round
            otherwise than one. Which are guessed hangs on the tokens alone, not on the clock.
        reuse_prefix: Whether to take what a cache holds of the prompt (True by default) rather than
            compute all of it.
        logprobs: Report each token's log-probability and those of so many alternatives.
        cancel: An event that ends the answer when it is set, inside a step too.
        timeout: Seconds after which the answer ends, waiting and the prompt's time included.
        priority: Where requests wait, one with a higher priority (an integer, 0 by default) comes
            first; each 5 seconds of waiting count as 1 more.
        on_prompt: Called with the prompt's tokens done and in all, before each of its chunks.
    """

    max_tokens: int | None
    min_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logits_hook: LogitsHook | None
    seed: int | None
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]
    speculation: Speculation
    reuse_prefix: bool
    logprobs: int | None
    cancel: threading.Event | None
    timeout: float | None
    priority: int
    on_prompt: Callable[[int, int], None] | None


class ChatOptions(GenerateOptions, total=False):
    """Options of the calls that answer a conversation: those of an answer, and how to render it.

    Attributes:
        tools: Functions that the model may call, for templates that know tools: JSON schemas, or
            Python functions with type hints and a docstring in Google's style.
        template: Name of the chat template; by default "tool_use" where there are tools and a
            template of that name, and else "default".
        template_options: What else the template reads: ``{"enable_thinking": False}``.
        continue_final_message: Write on from the end of the last message.
    """

    tools: Sequence[Tool] | None
    template: str | None
    template_options: Mapping[str, Any] | None
    continue_final_message: bool


def build_request(
    prompt: NDArray[np.int64],
    options: GenerateOptions,
    *,
    defaults: Sampling,
    eos: Sequence[int],
    vocab: int,
    context: int,
    stream: bool,
) -> Request:
    """Check the options of a call and fill in what it leaves out.

    Args:
        prompt: int64 [tokens], at least one.
        options: As the caller gave them.
        defaults: The bundle's own sampling.
        eos: The model's ending tokens.
        vocab: Size of the vocabulary.
        context: Most tokens of prompt and answer together.
        stream: Whether the answer is handed over as it comes.

    Raises:
        ContextLengthError: Prompt and answer do not fit into the context.
        ArgumentError: An option is unknown, or outside its domain.
    """
    check_names(options, GenerateOptions)
    sampling = defaults.merged(**{name: options.get(name) for name in SAMPLING_FIELDS})
    max_tokens = integer("max_tokens", options.get("max_tokens"), 1)
    if max_tokens is None:
        max_tokens = max(1, context - len(prompt))
    if len(prompt) + max_tokens > context:
        raise ContextLengthError(len(prompt), max_tokens, context)
    min_tokens = integer("min_tokens", options.get("min_tokens"), 0, max_tokens) or 0
    return Request(
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=sampling,
        seed=integer("seed", options.get("seed"), 0),
        stops=_stops(options.get("stop")),
        ending=frozenset(eos) | _stop_tokens(options.get("stop_tokens"), vocab),
        lookup=_speculation(options.get("speculation", "lookup")),
        reuse=_boolean("reuse_prefix", options.get("reuse_prefix", True)),
        logprobs=integer("logprobs", options.get("logprobs"), 0, min(vocab, MOST_LOGPROBS)),
        hook=_callable("logits_hook", options.get("logits_hook")),
        cancel=cancel_event(options.get("cancel")),
        timeout=seconds("timeout", options.get("timeout")),
        priority=priority_level(options.get("priority")),
        progress=_callable("on_prompt", options.get("on_prompt")) is not None,
        stream=stream,
    )


def check_names(options: Mapping[str, object], known: type) -> None:
    """Refuse an option that there is not.

    Args:
        options: As the caller gave them.
        known: The TypedDict of those that there are.

    Raises:
        ArgumentError: There is no such option.
    """
    for name, given in options.items():
        if name not in known.__annotations__:
            domain = "left out (there is no such option)"
            there = ", ".join(known.__annotations__)
            raise ArgumentError(name, domain, given, f"The options are: {there}.")


def integer(name: str, value: object, lowest: int, highest: int | None = None) -> int | None:
    """An integer within bounds, or None.

    Raises:
        ArgumentError: It is neither.
    """
    if value is None:
        return None
    integral = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integral or value < lowest or (highest is not None and value > highest):  # type: ignore[operator]
        domain = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ArgumentError(name, f"an integer {domain}", value)
    return int(value)  # type: ignore[call-overload, no-any-return]


def folder(name: str, value: object) -> Path | None:
    """The path of a folder, or None.

    Raises:
        ArgumentError: It is neither, or empty, which would be the folder that the process is in.
    """
    if value is None:
        return None
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and path and "\0" not in path:
            return Path(path)
    raise ArgumentError(name, "the path of a folder", value)


def seconds(name: str, value: object) -> float | None:
    """A positive, finite number of seconds, or None.

    Raises:
        ArgumentError: It is neither.
    """
    if value is None:
        return None
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise ArgumentError(name, "a positive number of seconds", value)
    return float(value)  # type: ignore[arg-type]


def priority_level(value: object) -> int:
    """A request's priority; None is 0.

    Raises:
        ArgumentError: It is no integer, or out of bounds.
    """
    return integer("priority", value, -MOST_PRIORITY, MOST_PRIORITY) or 0


def cancel_event(value: threading.Event | None) -> threading.Event | None:
    """An event, or None.

    Raises:
        ArgumentError: It is neither.
    """
    if value is not None and not callable(getattr(value, "is_set", None)):
        raise ArgumentError("cancel", "a threading.Event", value)
    return value


def _stop_tokens(value: object, vocab: int) -> frozenset[int]:
    tokens = () if value is None else value
    if not isinstance(tokens, Iterable) or isinstance(tokens, str | bytes):
        raise ArgumentError("stop_tokens", f"a sequence of integers from 0 to {vocab - 1}", value)
    checked = (integer("stop_tokens", token, 0, vocab - 1) for token in tokens)
    return frozenset(token for token in checked if token is not None)


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
        raise ArgumentError("stop", "a string or strings, none of them empty", value)
    return tuple(stops)


def _speculation(value: object) -> bool:
    if value not in ("lookup", "off"):
        raise ArgumentError("speculation", "'lookup' or 'off'", value)
    return value == "lookup"


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ArgumentError(name, "True or False", value)
    return value


def _callable(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise ArgumentError(name, "a function", value)
    return value
