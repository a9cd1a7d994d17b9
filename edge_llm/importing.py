"""From a foreign ONNX folder to a bundle: the same graph and weights, and a manifest."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from edge_llm import __version__
from edge_llm.bundle import Bundle
from edge_llm.errors import ArgumentError
from edge_llm.llm import LLM
from edge_llm.manifest import Manifest
from edge_llm.staging import check_target, staged
from edge_llm.writer import FolderWriter

__all__ = ["import_folder"]

MOST_TRIED = 64  # tokens of the cache with which the bundle is tried


def import_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    variant: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a folder of onnxruntime-genai, transformers.js or optimum out as a bundle.

    Args:
        source: The folder.
        output: The bundle's folder; must not exist or be empty.
        variant: Which graph of a transformers.js or optimum folder, by the end of its file's name;
            by default the fastest on a CPU.
        overwrite: Replace a bundle that is there.
        progress: Called with the bytes that are copied and all that are to be.

    Returns:
        The bundle's manifest.

    Raises:
        ArgumentError: An argument is outside its domain.
        BundleError: The folder is none that this runtime opens (see its subclasses).
        RuntimeFailure: ONNX Runtime cannot run the graph.
        ExportError: The disk is full, or the output cannot be written.
    """
    target = check_target(Path(output), overwrite=overwrite)
    bundle = Bundle.open(source, variant=variant)
    if not bundle.foreign:
        raise ArgumentError(
            "source", "a folder that is no bundle yet", os.fspath(source), "Copy the bundle."
        )
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, bundle.size)

    with staged(target, overwrite=overwrite) as stage:
        writer = FolderWriter(stage)
        for name in bundle.manifest.files:
            if name in bundle.texts:
                text = bundle.texts[name].encode("utf-8")
                writer.write(name, text)
                count(len(text))
            else:
                writer.copy(name, bundle.file(name), on_bytes=count)
        manifest = dataclasses.replace(
            bundle.manifest,
            files=writer.files,
            producer={**bundle.manifest.producer, "edge-llm": __version__},
        )
        writer.write_manifest(manifest)
        # What was copied may have changed meanwhile, and what opens may yet not run.
        LLM(stage, context=min(MOST_TRIED, manifest.dims.context)).close()
    return manifest
