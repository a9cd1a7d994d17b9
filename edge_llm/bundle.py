"""Opening a bundle: a folder whose files are the ones that its manifest lists."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_llm.errors import BundleError, BundleNotFoundError, IntegrityError, ManifestError
from edge_llm.manifest import MANIFEST_NAME, Manifest

__all__ = ["Bundle", "sha256_file"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder that was checked against its manifest.

    Attributes:
        path: The folder.
        manifest: What it says about itself.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = False,
        on_file: Callable[[str], None] | None = None,
    ) -> Bundle:
        """Open a bundle; sizes are always checked, contents where asked for.

        Args:
            path: The bundle's folder.
            verify: Also compare every file's SHA-256 (reads the whole bundle).
            on_file: Called with each file's name before it is hashed.

        Raises:
            BundleNotFoundError: No folder, or no manifest in it.
            BundleError: The manifest may not be read.
            ManifestError: The manifest breaks its schema.
            UnsupportedFormatError: The bundle needs a newer runtime.
            IntegrityError: A file is missing or altered.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleNotFoundError(
                f"{str(folder)!r} is a file, not a folder."
                if folder.exists()
                else f"There is no folder {str(folder)!r}.",
                "Give the path of a bundle; `edge-llm export MODEL -o DIR` makes one.",
            )
        try:
            text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise BundleNotFoundError(
                f"{str(folder)!r} has no {MANIFEST_NAME}, so it is not a bundle.",
                "A Hugging Face checkpoint becomes one with `edge-llm export`.",
            ) from error
        except UnicodeDecodeError as error:
            raise ManifestError(f"{MANIFEST_NAME} is not UTF-8.", "Export again.") from error
        except OSError as error:
            raise BundleError(
                f"{MANIFEST_NAME} in {str(folder)!r} cannot be read: {error.strerror}.",
                "Give this user the right to read it.",
            ) from error
        bundle = cls(folder, Manifest.from_json(text))
        bundle._check_files(verify=verify, on_file=on_file)
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists."""
        return self.path / name

    @property
    def size(self) -> int:
        """Bytes of all listed files together."""
        return sum(entry.size for entry in self.manifest.files.values())

    def _check_files(self, *, verify: bool, on_file: Callable[[str], None] | None) -> None:
        remedy = "Copy the bundle again, or export it again."
        for name, entry in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise IntegrityError(f"The bundle's file {name!r} is missing.", remedy)
            size = file.stat().st_size
            if size != entry.size:
                raise IntegrityError(
                    f"The bundle's file {name!r} has {size} bytes; it must have {entry.size}.",
                    remedy,
                )
            if verify:
                if on_file:
                    on_file(name)
                if sha256_file(file) != entry.sha256:
                    raise IntegrityError(
                        f"The bundle's file {name!r} is altered: its SHA-256 is not the "
                        "manifest's.",
                        remedy,
                    )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
