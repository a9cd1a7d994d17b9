"""Opening a model: a bundle, or a foreign folder that is read as if it were one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from edge_llm.errors import (
    ArgumentError,
    BundleError,
    BundleNotFoundError,
    IntegrityError,
    ManifestError,
    UnsupportedFormatError,
)
from edge_llm.foreign.external_data import check_external_data, check_link
from edge_llm.foreign.onnx_file import OnnxModel, read_onnx
from edge_llm.manifest import MANIFEST_NAME, FileEntry, Manifest
from edge_llm.runtime.kernels import BlockProduct, block_products, slow_kernels

__all__ = ["Bundle", "sha256_file"]

# A model of a thousand layers has a manifest of half a megabyte.
MANIFEST_BYTES = 16 << 20

_COPY_AGAIN = "Copy the bundle again, or export it again."


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder that was checked against its manifest.

    Attributes:
        path: The folder.
        manifest: What it says about itself, or for a foreign folder what follows from its files.
        variants: The graphs that a foreign folder has, the fastest on a CPU first; empty where
            there is no choice.
        texts: Files that the manifest lists and that a foreign folder has in another form.
        foreign: Whether the manifest was derived.
        products: How its graph multiplies weights that are stored in blocks.
    """

    path: Path
    manifest: Manifest
    variants: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    foreign: bool = False
    products: frozenset[BlockProduct] = frozenset()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        verify: bool = False,
        on_file: Callable[[str], None] | None = None,
    ) -> Bundle:
        """Open a bundle, or a folder of onnxruntime-genai, transformers.js or optimum.

        Sizes are always checked, and that the graph finds its weights in the folder; contents
        where asked for.

        Args:
            path: The folder.
            variant: Which graph of a transformers.js or optimum folder, by the end of its file's
                name ("q4", "int8", "fp32"); by default the fastest on a CPU.
            verify: Also compare every file's SHA-256 (reads the whole bundle).
            on_file: Called with each file's name before it is hashed.

        Raises:
            ArgumentError: There is no such variant, or the folder has no hashes to verify.
            BundleNotFoundError: No folder, or nothing in it that this runtime opens.
            BundleError: A file may not be read.
            ManifestError: The manifest breaks its schema.
            UnsupportedFormatError: The model needs what this runtime does not have.
            IntegrityError: A file is missing, altered, or no ONNX graph.
            CheckpointError: A foreign folder's tokenizer or configuration is not usable.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleNotFoundError(
                f"{str(folder)!r} is a file, not a folder."
                if folder.exists()
                else f"There is no folder {str(folder)!r}.",
                "Give the path of a bundle; `edge-llm export MODEL -o DIR` makes one.",
            )
        text = _read_manifest(folder)
        if text is None:
            return cls._open_foreign(folder, variant, verify=verify)
        if variant is not None:
            raise ArgumentError("variant", "left out with a bundle: it has one graph", variant)
        # Absolute, since the process may go to work elsewhere while it holds the bundle.
        bundle = cls(folder.absolute(), Manifest.from_json(text))
        bundle._check_sizes()
        if verify:
            bundle.verify(on_file=on_file)
        return replace(bundle, products=block_products(bundle._check_graph().nodes))

    @classmethod
    def _open_foreign(cls, folder: Path, variant: str | None, *, verify: bool) -> Bundle:
        # A bundle needs none of this, and the tokenizers library takes time to import.
        from edge_llm.foreign.folder import KINDS, find_model
        from edge_llm.foreign.found import derive_manifest

        found = find_model(folder, variant)
        if found is None:
            raise BundleNotFoundError(
                f"{str(folder)!r} is not a bundle: it has no {MANIFEST_NAME}. Nor is it a model of "
                f"another program: it has no {KINDS}.",
                "A Hugging Face checkpoint becomes a bundle with `edge-llm export`.",
            )
        if verify:
            raise ArgumentError(
                "verify",
                f"False for this {found.kind}, which states no hashes",
                verify,
                "`edge-llm import` makes a bundle of it that can be verified.",
            )
        manifest, texts = derive_manifest(folder, found)
        products = block_products(read_onnx(folder / found.graph).nodes)
        return cls(
            folder.absolute(), manifest, found.variants, texts, foreign=True, products=products
        )

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists."""
        return self.path / name

    def read_text(self, name: str) -> str:
        """The content of a listed file that is text.

        Raises:
            IntegrityError: It cannot be read.
        """
        if name in self.texts:
            return self.texts[name]
        try:
            return self.file(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise IntegrityError(
                f"The bundle's file {name!r} cannot be read: {error}.", "Export the bundle again."
            ) from error

    @property
    def size(self) -> int:
        """Bytes of all listed files together."""
        return sum(entry.size for entry in self.manifest.files.values())

    @property
    def slow(self) -> str | None:
        """Why this CPU has no fast kernels for it, and what to do; None where it has."""
        return slow_kernels(self.products, target=self.manifest.target)

    @property
    def model_files(self) -> dict[str, FileEntry]:
        """The listed files that are the model itself: its graph and weights, by name."""
        texts = {self.manifest.tokenizer, *self.manifest.chat.templates.values()}
        return {name: one for name, one in self.manifest.files.items() if name not in texts}

    def _check_graph(self) -> OnnxModel:
        """Refuse a graph that would read what is no part of the bundle."""
        name = self.manifest.decoder.graph
        graph = self.file(name)
        if graph.suffix != ".onnx":  # ONNX Runtime goes by it, and knows another format
            raise UnsupportedFormatError(
                f"The graph {name!r} is no .onnx file.", "Export the bundle again."
            )
        above = PurePosixPath(name).parent
        model = read_onnx(graph)
        for data in check_external_data(model, graph):
            if str(above / data) not in self.manifest.files:
                raise IntegrityError(
                    f"{name} needs {data!r}, which {MANIFEST_NAME} does not list.",
                    _COPY_AGAIN,
                )
        return model

    def verify(self, *, on_file: Callable[[str], None] | None = None) -> None:
        """Compare every file's SHA-256; reads the whole bundle.

        Args:
            on_file: Called with each file's name before it is hashed.

        Raises:
            IntegrityError: A file is altered.
        """
        for name, entry in self.manifest.files.items():
            if on_file:
                on_file(name)
            if sha256_file(self.path / name) != entry.sha256:
                raise IntegrityError(
                    f"The bundle's file {name!r} is altered: its SHA-256 is not the manifest's.",
                    _COPY_AGAIN,
                )

    def _check_sizes(self) -> None:
        for name, entry in self.manifest.files.items():
            size = self._size(name)
            if size is None:
                raise IntegrityError(f"The bundle's file {name!r} is missing.", _COPY_AGAIN)
            if size != entry.size:
                raise IntegrityError(
                    f"The bundle's file {name!r} has {size} bytes; it must have {entry.size}.",
                    _COPY_AGAIN,
                )

    def _size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none.

        Raises:
            IntegrityError: It cannot be looked at, or is a link to a place outside.
        """
        file = self.path / name
        try:
            if not file.is_file():
                return None
            check_link(file, self.path)
            return file.stat().st_size
        except OSError as error:
            raise IntegrityError(
                f"The bundle's file {name[:80]!r} cannot be looked at: {error.strerror}.",
                _COPY_AGAIN,
            ) from error


def _read_manifest(folder: Path) -> str | None:
    """The manifest's text, or None where there is none."""
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            raise ManifestError(
                f"{MANIFEST_NAME} must have at most {MANIFEST_BYTES} bytes, got "
                f"{path.stat().st_size}.",
                "Export again.",
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{MANIFEST_NAME} is not UTF-8.", "Export again.") from error
    except OSError as error:
        raise BundleError(
            f"{MANIFEST_NAME} in {str(folder)!r} cannot be read: {error.strerror}.",
            "Give this user the right to read it.",
        ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
