"""Flags that several commands share: the words of the Python API with dashes."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from edge_llm.errors import ArgumentError, ChatTemplateError

if TYPE_CHECKING:
    from edge_llm.llm import LLM
    from edge_llm.options import GenerateOptions

__all__ = [
    "add_generate_flags",
    "add_model_flags",
    "add_template_flags",
    "add_variant_flag",
    "generate_options",
    "load_model",
    "require_template",
]

_Flag = tuple[str, Callable[[str], object], str, str]

_GENERATE: tuple[_Flag, ...] = (
    ("max_tokens", int, "N", "most tokens of an answer (default: what the context has left)"),
    ("min_tokens", int, "N", "tokens before which nothing may end an answer"),
    ("temperature", float, "T", "0 is greedy; higher is more random"),
    ("top_k", int, "K", "choose among the K most likely tokens; 0 is off"),
    ("top_p", float, "P", "choose among the likeliest tokens that together reach P; 1 is off"),
    ("min_p", float, "P", "drop tokens below the share P of the likeliest one; 0 is off"),
    ("repetition_penalty", float, "X", "above 1: tokens of prompt and answer get less likely"),
    ("presence_penalty", float, "X", "what a token of the answer loses once, in logits"),
    ("frequency_penalty", float, "X", "what it loses for each time it occurs"),
    ("seed", int, "N", "same seed, same text"),
    ("timeout", float, "SECONDS", "end an answer after this time"),
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``-m`` and what loading a bundle takes."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        metavar="FOLDER",
        help="the folder of a bundle, or of a model that onnxruntime-genai, transformers.js or "
        "optimum runs (default: the small built-in home-command model)",
    )
    add_variant_flag(group)
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="most tokens of prompt and answer together (default: what was exported, but at most "
        "4096)",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads to compute with (default: one per core)"
    )
    group.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="answers that are computed together, each with a cache of its own (default: 4, or as "
        "many as fit into a quarter of the free memory)",
    )
    group.add_argument(
        "--queue-limit",
        type=int,
        metavar="N",
        help="requests that may wait for a slot (default: 256)",
    )
    group.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="compile the weights into this folder, for later runs; see `edge-llm compile`",
    )
    group.add_argument(
        "--prefix-cache",
        metavar="DIR",
        help="keep the beginnings of prompts in this folder, for later runs; see `edge-llm bake`",
    )
    group.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help='most memory that the process may take, such as "512MB"; without --context, the '
        "longest context that fits is taken",
    )
    group.add_argument(
        "--verify", action="store_true", help="compare the SHA-256 of every file first"
    )


def add_variant_flag(parser: argparse._ActionsContainer) -> None:
    """Add what chooses one of a folder's graphs."""
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="which graph of a transformers.js or optimum folder: q4, int8, fp32, ... (default: "
        "the fastest on a CPU)",
    )


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of a request; what is left out comes from the bundle."""
    group = parser.add_argument_group("answer", "What is left out comes from the bundle.")
    for name, kind, metavar, text in _GENERATE:
        group.add_argument(_flag(name), type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--speculation",
        choices=("lookup", "off"),
        help="guess tokens from what stands before them, where that is faster (default: lookup)",
    )
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text (may be repeated)"
    )


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """Add what shapes a conversation."""
    parser.add_argument("--system", metavar="TEXT", help="the conversation's system message")
    parser.add_argument(
        "--template", metavar="NAME", help="which of the bundle's chat templates (default: default)"
    )


def generate_options(arguments: argparse.Namespace) -> GenerateOptions:
    """The options that were given."""
    names = [name for name, *_ in _GENERATE] + ["speculation", "stop", "logprobs"]
    given = {name: getattr(arguments, name, None) for name in names}
    return cast(
        "GenerateOptions", {name: value for name, value in given.items() if value is not None}
    )


def load_model(arguments: argparse.Namespace) -> LLM:
    """Load the model that ``-m`` names, or the built-in one."""
    from edge_llm.llm import LLM

    load: Callable[..., LLM] = LLM.builtin
    if arguments.model is not None:
        load = functools.partial(LLM, arguments.model, variant=arguments.variant)
    elif arguments.variant is not None:
        raise ArgumentError("variant", "left out with the built-in model", arguments.variant)
    if arguments.queue_limit is not None:  # None is no number of requests
        load = functools.partial(load, queue_limit=arguments.queue_limit)
    return load(
        context=arguments.context,
        threads=arguments.threads,
        slots=arguments.slots,
        cache_dir=arguments.cache_dir,
        prefix_cache=arguments.prefix_cache,
        memory_limit=arguments.memory_limit,
        verify=arguments.verify,
    )


def require_template(llm: LLM, name: str) -> None:
    """Refuse a bundle without this chat template.

    Raises:
        ChatTemplateError: There is none of this name.
    """
    known = llm.manifest.chat.templates
    if name not in known:
        raise ChatTemplateError(
            f"{llm.manifest.name} has no chat template {name!r}.",
            f"It has: {', '.join(sorted(known))}."
            if known
            else "It is a base model: let it go on from a text with `edge-llm run --raw`.",
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
