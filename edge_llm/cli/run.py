"""``edge-llm run``: one prompt, one answer."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from edge_llm.cli.command import Command
from edge_llm.cli.layout import checked, describe, explain, notice, read_text, stdin, write
from edge_llm.cli.options import (
    add_generate_flags,
    add_model_flags,
    add_template_flags,
    generate_options,
    load_model,
    require_template,
)

if TYPE_CHECKING:
    from edge_llm.llm import LLM
    from edge_llm.results import Chunk, Completion

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answer a prompt and write the answer to stdout as it comes. Where the bundle has a chat "
        "template, the prompt is a user's message; with --raw, or in a base model, it is text to "
        "go on from."
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the prompt; - or nothing reads stdin (without its last line break)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="insist on the chat template")
    form.add_argument("--raw", action="store_true", help="take the prompt as it is")
    add_template_flags(parser)
    parser.add_argument("--json", action="store_true", help="write one JSON object at the end")
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: log-probabilities of each token and N alternatives",
    )
    parser.add_argument("--stats", action="store_true", help="write tokens and speed to stderr")
    add_model_flags(parser)
    add_generate_flags(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.raw and (arguments.system is not None or arguments.template is not None):
        arguments.parser.error("--system and --template need the chat template: drop --raw")
    if arguments.logprobs is not None and not arguments.json:
        arguments.parser.error("--logprobs needs --json")
    prompt = _prompt(arguments)
    options = generate_options(arguments)
    with load_model(arguments) as llm:
        tokens = _tokens(llm, prompt, arguments)
        answer: Completion | Chunk
        if arguments.json:
            answer = llm.generate(tokens, **options)
            write(json.dumps(_document(answer)) + "\n")
        else:
            text = ""
            for answer in llm.stream(tokens, **options):
                text = answer.text or text
                write(answer.text)
            if not text.endswith("\n"):
                write("\n")
            explain(answer.finish_reason, options)
    if arguments.stats:
        assert answer.usage is not None
        assert answer.timings is not None
        assert answer.finish_reason is not None
        notice(describe(answer.usage, answer.timings, answer.finish_reason))
    return 0


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt not in (None, "-"):
        return checked(arguments.prompt, "PROMPT")
    source = stdin()
    if arguments.prompt is None and source.isatty():
        arguments.parser.error("no prompt given: write it behind the command, or pipe it in")
    return read_text(source.read, "stdin").removesuffix("\n").removesuffix("\r")


def _tokens(llm: LLM, prompt: str, arguments: argparse.Namespace) -> str | list[int]:
    """What to feed: the prompt itself, or the conversation that it opens."""
    wanted = arguments.chat or arguments.system is not None or arguments.template is not None
    if arguments.raw or not (wanted or "default" in llm.manifest.chat.templates):
        return prompt
    template = arguments.template or "default"
    require_template(llm, template)
    messages = [{"role": "user", "content": prompt}]
    if arguments.system is not None:
        messages.insert(0, {"role": "system", "content": checked(arguments.system, "--system")})
    return llm.apply_chat_template(messages, template=template)


def _document(answer: Completion) -> dict[str, Any]:
    document = dataclasses.asdict(answer)
    if answer.logprobs is None:
        del document["logprobs"]
    return document


COMMAND = Command("run", "answer a prompt", _configure, _run)
