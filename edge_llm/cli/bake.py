"""``edge-llm bake``: a system prompt that need not be computed any more."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from edge_llm.cli.command import Command
from edge_llm.cli.layout import Progress, megabytes, write
from edge_llm.cli.options import require_template
from edge_llm.errors import ArgumentError, ChatTemplateError, SessionError

if TYPE_CHECKING:
    from edge_llm.llm import LLM

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compute what prompts begin with, once, and keep it in a prefix cache: answers then begin "
        "at once. Without --prefix-cache it goes into this user's cache folder, in which every run "
        "looks."
    )
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        nargs="?",
        help="the folder of a bundle; with --prune it may be left out",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--system",
        metavar="FILE",
        help="a system message: all of the conversation that does not hang on the user's message",
    )
    what.add_argument("--prefix", metavar="FILE", help="plain text that prompts begin with")
    what.add_argument(
        "--prune",
        action="store_true",
        help="bake nothing, but remove what is beyond --limit (default then: everything)",
    )
    parser.add_argument(
        "--template", metavar="NAME", help="which of the bundle's chat templates (default: default)"
    )
    parser.add_argument(
        "--limit",
        metavar="SIZE",
        help='most bytes of all prefixes there, such as "4GB": those used least recently go, baked '
        "ones last (default: 1GiB)",
    )
    parser.add_argument(
        "--prefix-cache",
        metavar="DIR",
        help="the folder to write to, which LLM(..., prefix_cache=DIR) and --prefix-cache read "
        "(default: this user's cache folder)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="room for so many tokens (default: what was exported, but at most 4096)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with")
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    from edge_llm.caching.prefixes import LIMIT
    from edge_llm.memory import parse_bytes
    from edge_llm.states import default_prefix_cache

    limit = None if arguments.limit is None else parse_bytes("limit", arguments.limit)
    folder = arguments.prefix_cache or str(default_prefix_cache())
    if arguments.prune:
        document, text = _prune(folder, limit or 0)
    elif arguments.bundle is None:
        raise ArgumentError("bundle", "the folder of a bundle", None)
    else:
        document, text = _bake(arguments, folder, limit or LIMIT)
    write(json.dumps(document) + "\n" if arguments.json else text)
    return 0


def _bake(arguments: argparse.Namespace, folder: str, limit: int) -> tuple[dict[str, object], str]:
    from edge_llm.caching.folder import is_writable
    from edge_llm.llm import LLM

    if not is_writable(Path(folder)):  # found out now rather than behind the work
        raise _nothing_baked(folder)
    progress = Progress()
    try:
        progress.show("loading ...")
        with LLM(
            arguments.bundle,
            context=arguments.context,
            threads=arguments.threads,
            prefix_cache=folder,
            prefix_cache_limit=limit,
        ) as llm:
            prefix = _tokens(llm, arguments)
            entry = llm.bake(
                prefix,
                on_prompt=lambda done, total: progress.show(f"{done} of {total} tokens"),
            )
    except SessionError as error:  # which names the option of LLM(...)
        raise _nothing_baked(folder) from error
    finally:
        progress.show("")
    size = entry.stat().st_size
    document = {"path": str(entry), "tokens": len(prefix), "size": size}
    return document, f"Baked {len(prefix)} tokens into {entry} ({megabytes(size)}).\n"


def _nothing_baked(folder: str) -> SessionError:
    return SessionError(
        f"Nothing was baked into {folder!r}.",
        "Choose another folder with --prefix-cache, free some disk space, or raise --limit.",
    )


def _tokens(llm: LLM, arguments: argparse.Namespace) -> list[int]:
    from edge_llm.quality import read_text_file

    if arguments.prefix is not None:
        if arguments.template is not None:
            arguments.parser.error("--template needs --system")
        return llm.tokenize(read_text_file(arguments.prefix, "prefix"))
    template = arguments.template or "default"
    require_template(llm, template)
    text = read_text_file(arguments.system, "system")
    # As `edge-llm run --system "$(cat FILE)"` and most editors have it.
    system = {"role": "system", "content": text.removesuffix("\n").removesuffix("\r")}
    tokens = llm.chat_prefix([system], template=template)
    if not tokens:
        raise ChatTemplateError(
            "This chat template begins with the user's message, so there is nothing to bake."
        )
    return tokens


def _prune(folder: str, limit: int) -> tuple[dict[str, object], str]:
    from edge_llm.caching.prefixes import LIMIT, PrefixCache

    freed = PrefixCache(folder, owner="", limit=LIMIT).prune(limit)
    return {"path": folder, "freed": freed}, f"Freed {megabytes(freed)} in {folder}.\n"


COMMAND = Command("bake", "compute a system prompt once and keep it", _configure, _run)
