"""Which saved states are a model's own, and where they lie."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from edge_llm.bundle import Bundle
from edge_llm.caching.folder import default_cache_folder, own_cache_folder
from edge_llm.caching.prefixes import LIMIT, PrefixCache
from edge_llm.caching.state_file import VERSION
from edge_llm.errors import ArgumentError
from edge_llm.runtime.device import cpu_identity
from edge_llm.runtime.session import import_onnxruntime

__all__ = ["default_prefix_cache", "open_prefixes", "state_owner"]

KIND = "prefixes"


def default_prefix_cache() -> Path:
    """This user's folder of baked prefixes, in which every run looks."""
    return default_cache_folder(KIND)


def state_owner(bundle: Bundle) -> str:
    """A hash of all that a decoder's state follows from besides the tokens.

    Graph, weights, tokenizer, the state's types and layout, the version of onnxruntime, and the
    processor, whose kernels round as no other's do.

    Raises:
        ArgumentError: The model is another program's folder, which states no hashes.
    """
    if bundle.foreign:
        raise ArgumentError(
            "path",
            "a bundle, for states to be kept: they are known by the hashes of the model's files, "
            "which other folders do not state",
            str(bundle.path),
            "`edge-llm import` makes a bundle of it.",
        )
    manifest = bundle.manifest
    files = {**bundle.model_files, manifest.tokenizer: manifest.files[manifest.tokenizer]}
    parts = {
        "format": VERSION,
        "files": {name: one.sha256 for name, one in files.items()},
        "decoder": asdict(manifest.decoder),
        "onnxruntime": import_onnxruntime().__version__,
        "processor": cpu_identity(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def open_prefixes(
    bundle: Bundle, path: str | os.PathLike[str] | None, *, limit: int = LIMIT
) -> PrefixCache | None:
    """The prefix cache of a model; None where there is none to look into.

    Args:
        bundle: The model.
        path: The folder; None reads what was baked into this user's cache folder.
        limit: Most bytes of all entries together.

    Raises:
        ArgumentError: ``path`` is given with another program's folder, which states no hashes.
    """
    if path is not None:
        return PrefixCache(path, owner=state_owner(bundle), limit=limit)
    own = own_cache_folder(KIND)
    if bundle.foreign or own is None:
        return None
    return PrefixCache(own, owner=state_owner(bundle), writes=False)
