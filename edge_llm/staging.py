"""A folder that is there as a whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_llm.errors import ArgumentError, BundleError, ExportError
from edge_llm.manifest import MANIFEST_NAME, Manifest

__all__ = ["check_target", "staged"]


@contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder that becomes ``target`` if the block ends well, and is removed if not.

    The folder lies beside the target, so that the last step is a rename on one file system. It is
    removed on every way out, an interrupt and a full disk included.

    Raises:
        ArgumentError: See :func:`check_target`.
        ExportError: The folder cannot be made or written.
    """
    target = check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(
            f"Cannot write beside {str(target)!r}: {error.strerror}.", "Choose another folder."
        ) from error
    try:
        stage.chmod(0o755)  # mkdtemp's 0o700 would keep other users from reading the bundle
        yield stage
        _replace(stage, target)
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ExportError(
            f"Writing {str(target)!r} failed: {error.strerror}; nothing was left behind.",
            "Free some disk space, or choose another folder." if full else "Choose another folder.",
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> Path:
    """Refuse a target that cannot be replaced, or that would destroy something, before any work.

    Returns:
        The target behind all symbolic links: they stay, and what they point to is replaced.

    Raises:
        ArgumentError: The target is not empty and ``overwrite`` is false, or it is not a bundle,
            or it is a folder that the system does not let go of.
        ExportError: The target cannot be read.
    """
    try:
        real = target.resolve()
        if real.is_symlink():
            raise RuntimeError("its symbolic links lead in a circle")  # resolve()'s own until 3.13
        if not real.exists():
            return real
        empty = real.is_dir() and not any(real.iterdir())
        held = os.path.ismount(real) or real in (Path.cwd(), *Path.cwd().parents)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(
            f"Cannot use {str(target)!r}: {reason}.", "Choose another folder."
        ) from error
    if not empty:
        _check_bundle(target, overwrite=overwrite)
    if held:
        raise ArgumentError(
            "output",
            "a folder that can be replaced as a whole, so no mount point, and neither the current "
            "folder nor one above it",
            str(target),
            "Name a folder inside it.",
        )
    return real


def _check_bundle(target: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise ArgumentError(
            "output",
            "a folder that does not exist or is empty",
            str(target),
            "Or pass overwrite=True (--overwrite) to replace the bundle in it.",
        )
    try:
        # Other things keep a manifest.json too, so its name alone does not make it a bundle's.
        Manifest.from_json((target / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, BundleError) as error:
        raise ArgumentError(
            "output", "a bundle, where it is to be overwritten", str(target), "Remove it yourself."
        ) from error


def _replace(stage: Path, target: Path) -> None:
    """Put the stage in the target's place; an old bundle stays whole until then."""
    if not target.exists():
        stage.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    moved = old / target.name
    try:
        target.replace(moved)
        stage.rename(target)
    finally:
        if not target.exists():
            _put_back(moved, target)
        shutil.rmtree(old, ignore_errors=True)


def _put_back(moved: Path, target: Path) -> None:
    try:
        moved.replace(target)
    except OSError as error:
        raise ExportError(
            f"Replacing {str(target)!r} failed, and so did putting it back: {error.strerror}.",
            f"The old bundle is whole and lies in {str(moved)!r}: move it yourself.",
        ) from error
