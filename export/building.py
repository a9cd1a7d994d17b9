"""From a plan to the files of a bundle: the graph, calibrated where asked for, and the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_llm.errors import CheckpointError
from edge_llm.huggingface.tokenizer import TokenizerFiles
from edge_llm.manifest import ChatTemplates, Manifest

from .architectures.spec import DecoderSpec
from .architectures.tensors import check_tensors
from .checkpoint.packed import packed_tensor
from .checkpoint.weights import Weights
from .choosing import choose_matrices
from .fallback.model import PRODUCERS
from .graph.cache import quantize_cache
from .graph.decoder import GRAPH_FILE, build_decoder
from .plan import MIN_ONNXRUNTIME, Built, Plan, Progress, make_manifest, read_dims
from .quantize.choice import describe_storage
from .quantize.kv import cache_scales, turning_pairs
from .quantize.selection import Selection
from .writer import BundleWriter

__all__ = ["build", "quantize_stage", "write"]


@contextmanager
def build(
    plan: Plan, weights: Weights, stage: Path, report: Progress, say: Callable[[str], None]
) -> Iterator[Built]:
    """The graph, whose weights can be computed until the block ends."""
    if isinstance(plan.model, DecoderSpec):
        spec = plan.model.as_stored(weights.names)
        check_tensors(weights, spec)
        trial = partial(_write_trial, plan, spec, weights, report)
        with choose_matrices(plan, spec, weights, trial, stage.parent, report) as selection:
            yield _record(plan, spec, weights, selection)
        return
    report("tracing", 0, 1)
    with plan.model.traced(
        plan.checkpoint.path,
        stage,
        storage=plan.recipe.storage,
        context=plan.context,
        minimum=MIN_ONNXRUNTIME,
        warn=say,
    ) as traced:
        report("tracing", 1, 1)
        yield Built(
            graph=traced.graph,
            decoder=traced.decoder,
            dims=traced.dims,
            quantization=describe_storage(plan.recipe.storage, kept=traced.kept),
            producers=PRODUCERS,
            info={},
        )


def _record(plan: Plan, spec: DecoderSpec, weights: Weights, selection: Selection) -> Built:
    kept = [f"{spec.names.positions}.weight"] if spec.names.positions else []
    rounded = [
        name
        for name, shape in spec.tensor_shapes().items()
        if len(shape) == 2 and packed_tensor(weights, name) is None and name not in kept
    ]
    graph, decoder = build_decoder(
        spec,
        weights,
        storage=selection.storage,
        context=plan.context,
        calibrated=selection.matrices,
    )
    return Built(
        graph=graph,
        decoder=decoder,
        dims=read_dims(spec, plan.context),
        quantization=describe_storage(
            selection.storage,
            plan.packing,
            calibrated=plan.recipe.calibration is not None,
            others=selection.others,
            rounded=rounded,
            kept=kept,
        ),
        producers=(),
        info=selection.info,
        windows=selection.windows,
    )


def _write_trial(
    plan: Plan,
    spec: DecoderSpec,
    weights: Weights,
    report: Progress,
    selection: Selection,
    folder: Path,
) -> None:
    """Write a bundle that is not the last one, into an empty folder.

    One with windows to calibrate on gets the cache that the last one will have.
    """
    manifest = write(plan, _record(plan, spec, weights, selection), folder, report)
    if plan.kv_calibration is not None and selection.windows is not None:
        quantize_stage(plan, folder, manifest, selection.windows, report)


def quantize_stage(
    plan: Plan, stage: Path, manifest: Manifest, windows: NDArray[np.int64], report: Progress
) -> Manifest:
    """Make a written bundle's cache int8, calibrated on ``windows`` int64 [windows, tokens]."""
    assert isinstance(plan.model, DecoderSpec)
    turning = turning_pairs(plan.model.within(plan.context))
    scales = cache_scales(stage, windows, turning, report)
    model = onnx.load(stage / GRAPH_FILE, load_external_data=False)
    quantize_cache(model, scales)
    writer = BundleWriter(stage)
    writer.files.update(manifest.files)
    writer.write(GRAPH_FILE, model.SerializeToString(deterministic=True))
    state = tuple(replace(one, dtype="int8") for one in manifest.decoder.state)
    decoder = replace(manifest.decoder, state=state)
    manifest = replace(manifest, decoder=decoder, files=writer.files)
    writer.write_manifest(manifest)
    return manifest


def write(plan: Plan, built: Built, stage: Path, report: Progress) -> Manifest:
    """Write the whole bundle into the stage."""
    graph = built.graph
    total = sum(info.size for group in graph.deferred for info in group.tensors)
    written = 0

    def count(size: int) -> None:
        nonlocal written
        written += size
        report("writing", written, total)

    writer = BundleWriter(stage)
    chat = _write_texts(writer, plan.files)
    writer.write_graph(graph, producer=version("edge-llm"), on_bytes=count)
    manifest = make_manifest(plan, built, chat, writer.files)
    writer.write_manifest(manifest)
    return manifest


def _write_texts(writer: BundleWriter, files: TokenizerFiles) -> ChatTemplates:
    """Write the tokenizer and the chat templates."""
    try:
        tokenizer = files.tokenizer_json.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{files.tokenizer_json} cannot be read: {error.strerror}.", "Download it again."
        ) from error
    writer.write("tokenizer.json", tokenizer)
    templates = files.template_paths()
    for name, path in templates.items():
        writer.write(path, files.chat_templates[name].encode("utf-8"))
    return ChatTemplates(templates=templates, special_tokens=dict(files.special_tokens))
