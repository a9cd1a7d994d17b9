"""Models to compare, made from one checkpoint."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines import genai, own

__all__ = ["ModelFolder", "Recipe", "recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is made.

    Attributes:
        engine: Who makes and runs it.
        arguments: edge-llm: flags of its ``export``. llama.cpp: a file type, such as Q4_K_M, or
            F32. onnxruntime-genai: a precision, and its builder's extra options. transformers:
            none, as it runs the checkpoint itself.
    """

    engine: str
    arguments: tuple[str, ...]


def recipe(engine: str, arguments: str) -> Recipe:
    """A recipe whose arguments are written as in a shell."""
    return Recipe(engine, tuple(shlex.split(arguments)))


class ModelFolder:
    """Makes models of a checkpoint, each where it is not there yet.

    What is there is taken for what would be made: a folder is for one checkpoint and one version of
    the programs that make them.

    Args:
        checkpoint: A Hugging Face folder.
        folder: Where they lie.
        flags: Of every ``edge-llm export``.
        threads: To quantize with.
    """

    def __init__(
        self, checkpoint: Path, folder: Path, *, flags: tuple[str, ...] = (), threads: int = 1
    ) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._flags, self._threads = flags, threads

    def make(self, wanted: Recipe) -> Path:
        """The model's file or folder."""
        if wanted.engine in ("transformers", "transformers bfloat16"):
            return self._checkpoint
        if wanted.engine == "edge-llm compiled":
            bundle = self.make(dataclasses.replace(wanted, engine="edge-llm"))
            own.compile_bundle(bundle)
            return bundle
        name = "_".join([wanted.engine, *wanted.arguments]).replace("/", "_")
        path = self._folder / name
        if not path.exists():
            unfinished = self._folder / f"{name}.unfinished"
            self._write(wanted, unfinished)
            unfinished.rename(path)
        return path

    def _write(self, wanted: Recipe, path: Path) -> None:
        if wanted.engine == "edge-llm":
            flags = [*wanted.arguments, *self._flags]
            own.export(self._checkpoint, path, [*flags, "--overwrite"])
        elif wanted.engine == "onnxruntime-genai":
            precision, *options = wanted.arguments
            genai.build(self._checkpoint, path, precision=precision, options=options)
        else:
            self._write_gguf(path, *wanted.arguments)

    def _write_gguf(self, path: Path, kind: str) -> None:
        from benchmarks.engines import gguf_file, llama_cpp

        if kind == "F32":
            gguf_file.write_gguf(self._checkpoint, path)
        else:
            source = self.make(Recipe("llama.cpp", ("F32",)))
            llama_cpp.quantize(source, path, kind, threads=self._threads)
