"""What an export knows before the weights are read, and what its manifest says behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_llm.huggingface.tokenizer import TokenizerFiles
from edge_llm.manifest import (
    FORMAT,
    ChatTemplates,
    DecoderGraph,
    Dims,
    FileEntry,
    Manifest,
    Quantization,
    Source,
    Tokens,
)

from .architectures.spec import DecoderSpec
from .checkpoint.hub import Checkpoint
from .checkpoint.prequantized import Packing
from .fallback.model import OptimumModel
from .graph.recorder import GraphRecorder
from .quantize.calibration import Calibration
from .quantize.choice import Recipe
from .quantize.work import describe_calibration

__all__ = ["MIN_ONNXRUNTIME", "Built", "Plan", "Progress", "make_manifest", "read_dims"]

MIN_ONNXRUNTIME = "1.32"

_PRODUCERS = ("edge-llm", "onnx", "numpy", "onnxruntime")

# Of a calibration, what concerns weights alone.
_OF_WEIGHTS = ("method", "damping", "act_order", "correction", "rounds")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is known before the weights are read.

    ``recipe`` is for what the checkpoint has as floats, ``packing`` tells of its integers.
    ``kv_calibration`` is that of an int8 cache; None: the cache is float32.
    ``scored`` is the text on which the bundle will be measured: no calibration may have seen it.
    """

    checkpoint: Checkpoint
    model: DecoderSpec | OptimumModel
    files: TokenizerFiles
    recipe: Recipe
    packing: Packing | None
    context: int
    work_dir: Path | None
    scored: str | None
    target: str | None
    kv_calibration: Calibration | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A graph, and what the manifest says of it."""

    graph: GraphRecorder
    decoder: DecoderGraph
    dims: Dims
    quantization: Quantization
    producers: tuple[str, ...]
    info: Mapping[str, Any]
    windows: NDArray[np.int64] | None = None


def make_manifest(
    plan: Plan, built: Built, chat: ChatTemplates, entries: Mapping[str, FileEntry]
) -> Manifest:
    """The manifest of a bundle whose other files are written."""
    checkpoint, files = plan.checkpoint, plan.files
    info: dict[str, Any] = {**built.info}
    if files.ignored:
        info["ignored_generation_config"] = list(files.ignored)
    if plan.kv_calibration:
        described = describe_calibration(plan.kv_calibration)
        info["kv_cache_calibration"] = {
            key: value for key, value in described.items() if key not in _OF_WEIGHTS
        }
    if plan.recipe.calibration:
        info["calibration"] = describe_calibration(plan.recipe.calibration)
    return Manifest(
        format=FORMAT,
        requires=(),
        min_onnxruntime=MIN_ONNXRUNTIME,
        name=(checkpoint.repo or checkpoint.path.resolve().name).rsplit("/", 1)[-1],
        target=plan.target,
        source=Source(
            architecture=plan.model.architecture,
            repo=checkpoint.repo,
            revision=checkpoint.revision,
            license=checkpoint.license,
        ),
        dims=built.dims,
        decoder=built.decoder,
        quantization=built.quantization,
        tokens=Tokens(bos=files.bos, eos=files.eos, pad=files.pad, add_bos=files.add_bos),
        sampling=dict(files.sampling),
        tokenizer="tokenizer.json",
        chat=chat,
        files=entries,
        quality=(),
        producer={name: version(name) for name in (*_PRODUCERS, *built.producers)},
        info=info,
    )


def read_dims(spec: DecoderSpec, context: int) -> Dims:
    """The sizes of a decoder that is exported for ``context`` tokens."""
    return Dims(
        layers=spec.layers,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab=spec.vocab,
        context=context,
        parameters=sum(map(math.prod, spec.tensor_shapes().values())),
    )
