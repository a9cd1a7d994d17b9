"""Weights as this processor's kernels want them, in files that are mapped when a model is loaded.

Loading a bundle, ONNX Runtime packs each matrix for the kernels of this processor: a copy in
anonymous memory. Compiled, that copy lies in a file beside the matrix itself. ONNX Runtime still
needs the latter, packs it once more when it loads, and takes a copy from the file only where it is
the one that it just made: so a file of another processor cannot change a result, and disk space is
what the bundle takes and as much again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

from edge_llm.bundle import Bundle, sha256_file
from edge_llm.caching.folder import (
    CacheFolder,
    default_cache_folder,
    is_readable,
    own_cache_folder,
)
from edge_llm.errors import ArgumentError, CacheWarning, RuntimeFailure
from edge_llm.runtime.device import cpu_identity
from edge_llm.runtime.session import create_session, import_onnxruntime

__all__ = ["CompiledModels", "compiled_folder", "compiled_graph", "find_compiled"]

FORMAT = 1
GRAPH = "model.onnx"
LIST = "files.json"
KIND = "compiled"
NAMED = "[0-9a-f]{32}"

LIMIT = 16 << 30
"""Bytes of a cache folder by default: some ten models of a billion parameters."""

# What packing may add to the weights on the disk, besides a second copy: sums and scales of blocks.
GROWTH = 2.5
# Where less is left behind a failure, it was the disk.
NEARLY_FULL = 1 << 20


class CompiledModels:
    """The compiled models of a cache folder, by what went into them.

    An entry's name is the hash of all that its content follows from: the bundle's graph and
    weights, the version of onnxruntime, and the processor. When one of them differs, so does the
    name, and what nobody looks for any more goes by the folder's limit.

    Args:
        path: The folder.
        limit: Most bytes of all compiled models together.
        mode: Rights that the folder is made with; by default it is for this user alone.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, limit: int = LIMIT, mode: int = 0o700
    ) -> None:
        self._folder = CacheFolder(path, limit=limit, named=NAMED, mode=mode)
        self.path = self._folder.path

    def find(self, bundle: Bundle, *, verify: bool = False) -> Path | None:
        """The compiled graph of a bundle, or None where there is none that is beyond doubt.

        Args:
            bundle: The bundle.
            verify: Compare the files' SHA-256 too, besides their sizes.
        """
        if bundle.foreign or not is_readable(self.path):
            return None
        entry = self._folder.find(_name(bundle))
        return entry / GRAPH if entry is not None and _is_whole(entry, verify=verify) else None

    def compile(self, bundle: Bundle, *, threads: int, verify: bool = False) -> Path | None:
        """Compile a bundle, unless that is done already; what was damaged is made anew.

        Args:
            bundle: The bundle; its files' hashes are compared first.
            threads: Threads to compute with.
            verify: Look for damage by the SHA-256 of what is there too, besides the sizes.

        Returns:
            The compiled graph, or None where the folder cannot be written or its limit is too low
            (a :class:`~edge_llm.errors.CacheWarning` says which).

        Raises:
            ArgumentError: The bundle is a foreign folder.
            IntegrityError: A file of the bundle is altered.
        """
        if bundle.foreign:
            raise ArgumentError(
                "bundle",
                "a bundle: weights are compiled by their hashes, which other folders do not state",
                str(bundle.path),
                "`edge-llm import` makes a bundle of it.",
            )
        name = _name(bundle)
        if (found := self.find(bundle, verify=verify)) is not None:
            return found
        if self._folder.find(name) is not None:
            self._folder.remove(name)
        entry = self._folder.publish(
            name, lambda stage: _write(bundle, stage, threads), size=_model_bytes(bundle)
        )
        if entry is None and self._folder.writable:
            self._warn_of_limit()
        if entry is None or not _is_whole(entry, verify=False):
            return None
        return entry / GRAPH

    def prune(self, limit: int | None = None) -> int:
        """Remove the compiled models beyond a limit in bytes, those used least recently first.

        Returns:
            Bytes that were freed.
        """
        return self._folder.prune(limit)

    def _warn_of_limit(self) -> None:
        warnings.warn(
            f"The compiled model is not kept in {str(self.path)!r}: it takes more than that "
            f"folder's limit of {self._folder.limit:,} bytes.",
            CacheWarning,
            stacklevel=3,
        )


def compiled_folder(
    cache_dir: str | os.PathLike[str] | None = None, *, beside: Path | None = None
) -> Path:
    """Where compiled models lie: in a cache folder, this user's by default, or beside a bundle.

    What lies there is trusted as the bundle is, so it must come from nobody else.

    Args:
        cache_dir: The cache folder.
        beside: The bundle.
    """
    if beside is not None:
        bundle = beside.resolve()
        return bundle.with_name(f"{bundle.name}.{KIND}")
    return default_cache_folder(KIND) if cache_dir is None else Path(cache_dir) / KIND


def compiled_graph(
    bundle: Bundle, *, cache_dir: str | os.PathLike[str] | None, threads: int, verify: bool
) -> Path | None:
    """The compiled graph to load a bundle by, or None.

    Args:
        bundle: The bundle.
        cache_dir: Where to compile it where it is not compiled yet; with None, nothing is written.
        threads: Threads to compile with.
        verify: Compare the files' SHA-256 too.

    Raises:
        ArgumentError: ``cache_dir`` is given with a foreign folder.
        IntegrityError: A file of the bundle is altered, found before compiling it.
    """
    found = find_compiled(bundle, cache_dir=cache_dir, verify=verify)
    if found is not None or cache_dir is None:
        return found
    models = CompiledModels(compiled_folder(cache_dir))
    return models.compile(bundle, threads=threads, verify=verify)


def find_compiled(
    bundle: Bundle, *, cache_dir: str | os.PathLike[str] | None, verify: bool = False
) -> Path | None:
    """The compiled graph that is there to load a bundle by, or None.

    Args:
        bundle: The bundle.
        cache_dir: A cache folder to look into first, before beside the bundle and in this user's.
        verify: Compare the files' SHA-256 too.
    """
    named = None if cache_dir is None else compiled_folder(cache_dir)
    beside = compiled_folder(beside=bundle.path)
    for place in (named, beside, own_cache_folder(KIND)):
        if place is not None and (place != beside or _is_trusted(beside, bundle)):
            graph = CompiledModels(place).find(bundle, verify=verify)
            if graph is not None:
                return graph
    return None


def _name(bundle: Bundle) -> str:
    parts = {
        "format": FORMAT,
        "graph": bundle.manifest.decoder.graph,
        "files": {name: one.sha256 for name, one in bundle.model_files.items()},
        "onnxruntime": import_onnxruntime().__version__,
        "processor": cpu_identity(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _is_trusted(beside: Path, bundle: Bundle) -> bool:
    """Whether what lies beside a bundle is from its owner, the system's or this user.

    The folder around both may be one where anybody can put something, as /tmp is: also a link, to
    where a trusted owner lets anybody put something.
    """
    if not hasattr(os, "geteuid") or not is_readable(beside):
        return True
    trusted = {_owner(bundle.path.resolve()), 0, os.geteuid()}
    return {_owner(beside), _owner(beside.resolve())} <= trusted


def _owner(path: Path) -> int:
    return path.lstat().st_uid


def _model_bytes(bundle: Bundle) -> int:
    return sum(one.size for one in bundle.model_files.values())


def _write(bundle: Bundle, stage: Path, threads: int) -> None:
    """Compile into a new folder.

    Raises:
        OSError: The system refuses.
    """
    if shutil.disk_usage(stage.parent).free < GROWTH * _model_bytes(bundle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    bundle.verify()
    graph, minimum = bundle.file(bundle.manifest.decoder.graph), bundle.manifest.min_onnxruntime
    stage.mkdir()
    try:
        create_session(graph, threads=threads, minimum=minimum, save_to=stage / GRAPH)
        create_session(stage / GRAPH, threads=threads, minimum=minimum, optimized=True)
    except RuntimeFailure as error:
        # ONNX Runtime's way to say that a file cannot be written; a graph that it does not take is
        # told of when the bundle itself is opened.
        full = shutil.disk_usage(stage).free < NEARLY_FULL
        reason = os.strerror(errno.ENOSPC) if full else error.message
        raise OSError(errno.ENOSPC if full else errno.EIO, reason) from error
    listed = {
        file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(stage.iterdir())
    }
    (stage / LIST).write_text(json.dumps(listed), encoding="utf-8")


def _is_whole(entry: Path, *, verify: bool) -> bool:
    """Whether an entry has the files that it lists, in their sizes."""
    try:
        listed = json.loads((entry / LIST).read_text(encoding="utf-8"))
        return GRAPH in listed and all(
            (entry / name).stat().st_size == one["size"]
            and (not verify or sha256_file(entry / name) == one["sha256"])
            for name, one in listed.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
