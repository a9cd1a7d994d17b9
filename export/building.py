"""From a plan to the files of a bundle: the graph, calibrated where asked for, and the texts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.errors import CheckpointError
from edge_llm.huggingface.tokenizer import TokenizerFiles
from edge_llm.manifest import ChatTemplates, Manifest
from edge_llm.text.tokenizer import Tokenizer

from .architectures.spec import DecoderSpec
from .architectures.tensors import check_tensors
from .checkpoint.packed import packed_tensor
from .checkpoint.weights import Weights
from .choices import DEFAULT_BLOCK
from .fallback.model import PRODUCERS
from .graph.cache import quantize_cache
from .graph.decoder import GRAPH_FILE, build_decoder
from .graph.linear import Calibrated
from .plan import MIN_ONNXRUNTIME, Built, Plan, Progress, make_manifest, read_dims
from .quantize.calibrate import calibrate
from .quantize.calibration import Calibration, draw_windows, read_windows
from .quantize.choice import describe_storage
from .quantize.kv import cache_scales, turning_pairs
from .quantize.shelf import save_array
from .quantize.storage import Storage
from .quantize.work import matrices_folder, work_folder
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
        kept = [f"{spec.names.positions}.weight"] if spec.names.positions else []
        rounded = [
            name
            for name, shape in spec.tensor_shapes().items()
            if len(shape) == 2 and packed_tensor(weights, name) is None and name not in kept
        ]
        with _calibrated(plan, spec, weights, report) as (calibrated, windows):
            graph, decoder = build_decoder(
                spec, weights, storage=plan.storage, context=plan.context, calibrated=calibrated
            )
            yield Built(
                graph=graph,
                decoder=decoder,
                dims=read_dims(spec, plan.context),
                quantization=describe_storage(
                    plan.storage,
                    plan.packing,
                    calibrated=plan.calibration is not None,
                    rounded=rounded,
                    kept=kept,
                ),
                producers=(),
                windows=windows,
            )
        return
    report("tracing", 0, 1)
    with plan.model.traced(
        plan.checkpoint.path,
        stage,
        storage=plan.storage,
        context=plan.context,
        minimum=MIN_ONNXRUNTIME,
        warn=say,
    ) as traced:
        report("tracing", 1, 1)
        yield Built(
            graph=traced.graph,
            decoder=traced.decoder,
            dims=traced.dims,
            quantization=describe_storage(plan.storage, kept=traced.kept),
            producers=PRODUCERS,
        )


@contextmanager
def _calibrated(
    plan: Plan, spec: DecoderSpec, weights: Weights, report: Progress
) -> Iterator[tuple[Calibrated, NDArray[np.int64] | None]]:
    """The matrices that are rounded for their inputs, on disk until the block ends, and the text.

    There are no matrices where only the cache is calibrated, and no text where nothing is.
    """
    calibration = plan.calibration or plan.kv_calibration
    if calibration is None:
        yield {}, None
        return
    with work_folder(
        plan.work_dir, plan.checkpoint.path, calibration, context=plan.context
    ) as work:
        windows = _windows(plan, calibration, weights, work, report)
        if plan.calibration is None:
            yield {}, windows
            return
        matrices = calibrate(
            spec,
            weights,
            windows,
            storage=plan.storage,
            context=plan.context,
            calibration=calibration,
            folder=matrices_folder(work, plan.storage),
            minimum=MIN_ONNXRUNTIME,
            report=report,
        )
        yield matrices, windows


def _windows(
    plan: Plan, calibration: Calibration, weights: Weights, work: Path, report: Progress
) -> NDArray[np.int64]:
    """The tokens to calibrate on, int64 [windows, tokens]."""
    file = work / "windows.npy"
    if file.exists():
        stored: NDArray[np.int64] = np.load(file)
        return stored
    if calibration.text is None:
        windows = _draw(plan, calibration, weights, report)
    else:
        tokenizer = Tokenizer.from_file(
            plan.files.tokenizer_json,
            bos=plan.files.bos,
            eos=plan.files.eos,
            add_bos=plan.files.add_bos,
            vocab=plan.model.vocab,
        )
        windows = read_windows(tokenizer, calibration, context=plan.context)
    save_array(file, windows)
    return windows


def _draw(
    plan: Plan, calibration: Calibration, weights: Weights, report: Progress
) -> NDArray[np.int64]:
    """Let the model write the text; at 8 bits it writes as it would in float32, but faster."""
    draft = replace(plan, storage=Storage(8, DEFAULT_BLOCK), calibration=None, kv_calibration=None)
    with tempfile.TemporaryDirectory(prefix="edge-llm-") as name:
        folder = Path(name)
        with build(draft, weights, folder, report, lambda text: None) as built:
            write(draft, built, folder, report)
        with LLM(folder, context=min(plan.context, calibration.tokens)) as llm:
            return draw_windows(llm, calibration, report)


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
