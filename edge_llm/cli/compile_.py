"""``edge-llm compile``: weights as this processor wants them, mapped when a model is loaded."""

from __future__ import annotations

import argparse
import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from edge_llm.cli.command import Command
from edge_llm.cli.layout import Progress, megabytes, write
from edge_llm.errors import ArgumentError, EdgeLLMError

if TYPE_CHECKING:
    from edge_llm.compiled import CompiledModels

__all__ = ["COMMAND"]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Keep the weights as this processor's kernels want them, in a file that every run maps "
        "rather than pack them anew: less memory, sooner loaded. It takes about twice the disk "
        "space of the bundle. What is there already and whole is left as it is."
    )
    parser.add_argument(
        "bundle",
        metavar="FOLDER",
        nargs="?",
        help="the folder of a bundle; with --prune it may be left out",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="the folder to write to, which LLM(..., cache_dir=DIR) and --cache-dir read (default: "
        "this user's cache folder, in which every run looks)",
    )
    place.add_argument(
        "--beside",
        action="store_true",
        help="write to FOLDER.compiled, in which every run looks too",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with")
    parser.add_argument(
        "--limit",
        metavar="SIZE",
        help='most bytes of all compiled models there, such as "4GB": those used least recently '
        "go (default: 16GiB)",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="compile nothing, but remove what is beyond --limit (default then: everything), of "
        "whatever bundle it is",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    from edge_llm.memory import parse_bytes

    limit = None if arguments.limit is None else parse_bytes("limit", arguments.limit)
    models = _models(arguments, limit)
    if arguments.prune:
        freed = models.prune(limit or 0)
        document: dict[str, object] = {"path": str(models.path), "freed": freed}
        text = f"Freed {megabytes(freed)} in {models.path}.\n"
    else:
        graph = _compile(arguments, models)
        size = sum(file.stat().st_size for file in graph.parent.iterdir())
        document = {"path": str(graph.parent), "size": size}
        text = f"Compiled into {graph.parent} ({megabytes(size)}).\n"
    write(json.dumps(document) + "\n" if arguments.json else text)
    return 0


def _models(arguments: argparse.Namespace, limit: int | None) -> CompiledModels:
    from edge_llm.compiled import LIMIT, CompiledModels, compiled_folder
    from edge_llm.options import folder

    if arguments.bundle is None and (arguments.beside or not arguments.prune):
        raise ArgumentError("bundle", "the folder of a bundle", None)
    if not arguments.beside:
        path = compiled_folder(folder("cache_dir", arguments.cache_dir))
        return CompiledModels(path, limit=limit or LIMIT)
    bundle = Path(arguments.bundle)
    # Whoever may read the bundle may read what lies beside it.
    mode = stat.S_IMODE(bundle.stat().st_mode) if bundle.is_dir() else 0o700
    return CompiledModels(compiled_folder(beside=bundle), limit=limit or LIMIT, mode=mode)


def _compile(arguments: argparse.Namespace, models: CompiledModels) -> Path:
    from edge_llm.bundle import Bundle
    from edge_llm.runtime.session import resolve_threads

    progress = Progress()
    try:
        progress.show("compiling ...")
        graph = models.compile(
            Bundle.open(arguments.bundle),
            threads=resolve_threads(arguments.threads),
            verify=True,
        )
    finally:
        progress.show("")
    if graph is None:
        raise EdgeLLMError(
            f"Nothing was compiled into {str(models.path)!r}.",
            "Choose another folder, free some disk space, or raise --limit.",
        )
    return graph


COMMAND = Command("compile", "prepare weights for this processor, to load fast", _configure, _run)
