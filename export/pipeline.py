"""From a checkpoint to a verified bundle."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.errors import ArgumentError, CheckpointError, UnsupportedModelError
from edge_llm.huggingface.tokenizer import TokenizerFiles, read_tokenizer
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
from edge_llm.quality import read_text_file
from edge_llm.staging import check_target, staged
from edge_llm.text.tokenizer import Tokenizer

from .architectures.registry import ARCHITECTURES, read_architecture
from .architectures.spec import DecoderSpec
from .architectures.tensors import check_tensors
from .checkpoint.hub import Checkpoint, resolve
from .checkpoint.packed import open_weights, packed_tensor
from .checkpoint.prequantized import Packing, read_packing
from .checkpoint.weights import Weights
from .choices import DEFAULT_BLOCK, LONGEST_DEFAULT_CONTEXT, METHODS, VIAS
from .config import read_config
from .evaluate.figures import measure_quality
from .evaluate.selfcheck import run_once
from .fallback.model import PRODUCERS, OptimumModel, read_model
from .graph.decoder import build_decoder
from .graph.linear import Calibrated
from .graph.recorder import GraphRecorder
from .quantize.calibrate import calibrate
from .quantize.calibration import Calibration, draw_windows, read_windows
from .quantize.choice import (
    check_choice,
    choose_calibration,
    choose_storage,
    describe_storage,
)
from .quantize.shelf import save_array
from .quantize.storage import FLOAT32, Storage
from .quantize.work import describe_calibration, matrices_folder, work_folder
from .writer import BundleWriter

__all__ = ["Progress", "export_model"]

MIN_ONNXRUNTIME = "1.32"

_PRODUCERS = ("edge-llm", "onnx", "numpy", "onnxruntime")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is known before the weights are read.

    ``storage`` is that of what the checkpoint has as floats, ``packing`` tells of its integers.
    """

    checkpoint: Checkpoint
    model: DecoderSpec | OptimumModel
    files: TokenizerFiles
    storage: Storage
    packing: Packing | None
    context: int
    calibration: Calibration | None
    work_dir: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """A graph, and what the manifest says of it."""

    graph: GraphRecorder
    decoder: DecoderGraph
    dims: Dims
    quantization: Quantization
    producers: tuple[str, ...]


def export_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quantize: str | None = None,
    block: int | None = None,
    method: str = METHODS[0],
    calibration: Calibration | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    max_context: int | None = None,
    via: str = VIAS[0],
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    ignore_config: Collection[str] = (),
    evaluate: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Manifest:
    """Export a Hugging Face checkpoint as a bundle, open the bundle and run it once.

    Args:
        source: A folder, or a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
        output: The bundle's folder; must not exist or be empty.
        quantize: "fp32", "int8" or "int4" (default: "int4"). A checkpoint that GPTQ or AWQ
            quantized keeps its integers, unless "fp32" dequantizes them.
        block: Weights that share a scale: 32, 64 or 128 (default 32).
        method: How floats are rounded: "rtn", to the nearest integers, or "gptq", for the inputs
            that each matrix has when the model runs on some text.
        calibration: That text, and how GPTQ is done (default: the model writes the text itself).
        work_dir: A folder where GPTQ keeps each layer's result. An export that was interrupted
            goes on from there if it is asked for the same again; it may be removed at any time
            (default: a temporary one).
        max_context: Longest sequence, in tokens (default: the model's own, but at most 8,192).
        via: Who makes the graph: "builder" (the graph builder), "optimum" (optimum's exporter,
            extra ``optimum``), or "auto": optimum where the builder does not know the
            ``model_type``, which ``warn`` is told.
        revision: Branch, tag or commit on the hub.
        token: The hub's access token (default: ``HF_TOKEN``, or that of ``hf auth login``).
        overwrite: Replace a bundle that is there.
        ignore_config: Keys of config.json that do not change the computation; optimum leaves it
            to transformers what each key means.
        evaluate: A file of UTF-8 text on which to measure the bundle against its float32 original,
            which is exported beside it for the time; the manifest then has perplexity, KL
            divergence and top-1 agreement. Of a checkpoint that GPTQ or AWQ quantized, the
            original is what its integers stand for.
        progress: Called with a phase, the work done and the whole work.
        warn: Called with what the user should know (default: nothing is said).

    Returns:
        The bundle's manifest.

    Raises:
        ArgumentError: An argument is outside its domain.
        CheckpointError: The checkpoint's files are not usable.
        UnsupportedModelError: The model needs what the builder, or optimum, does not know.
        VerificationError: The written bundle does not run, or what optimum traced does not compute
            what transformers computes.
        ExportError: The disk is full, the output cannot be written, or optimum is not installed.
    """
    check_choice(quantize, block)
    calibration = choose_calibration(method, calibration, work_dir, quantize)
    if via not in VIAS:
        raise ArgumentError("via", f"one of {', '.join(VIAS)}", via)
    target = check_target(Path(output), overwrite=overwrite)
    text = None if evaluate is None else read_text_file(evaluate, "evaluate")
    report = progress or (lambda phase, done, total: None)
    say = warn or (lambda text: None)
    report("reading", 0, 1)
    checkpoint = resolve(os.fspath(source), revision=revision, token=token)
    plan = replace(
        _read(checkpoint, quantize, block, max_context, ignore_config, via, say),
        calibration=calibration,
        work_dir=None if work_dir is None else Path(work_dir),
    )
    _check_calibration(plan)
    for name in plan.files.ignored:
        say(f"generation_config.json: {name} is not supported and was left out")
    floats = plan.storage == FLOAT32
    with (
        open_weights(checkpoint.path, plan.packing, dequantize=floats) as weights,
        staged(target, overwrite=overwrite) as stage,
    ):
        with _build(plan, weights, stage, report, say) as built:
            manifest = _write(plan, built, stage, report)
        report("verifying", 0, 1)
        run_once(stage, warn=say)
        report("verifying", 1, 1)
        if evaluate is not None and text is not None:
            with _original(plan, stage, target, via, ignore_config, report) as original:
                quality = measure_quality(
                    stage,
                    original,
                    text,
                    data=Path(evaluate).name,
                    progress=lambda done, total: report("evaluating", done, total),
                )
            manifest = dataclasses.replace(manifest, quality=quality)
            BundleWriter(stage).write_manifest(manifest)
    return manifest


@contextmanager
def _original(
    plan: _Plan,
    stage: Path,
    target: Path,
    via: str,
    ignore: Collection[str],
    report: Progress,
) -> Iterator[Path]:
    """The checkpoint's float32 bundle while the block lasts: the stage, or one beside the target.

    Its context is the same, for rotary scaling may hang on it.
    """
    if plan.storage == FLOAT32:
        yield stage
        return
    prefix = f".{target.name}.original."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as folder:
        original = Path(folder) / "original"
        export_model(
            plan.checkpoint.path,
            original,
            quantize="fp32",
            max_context=plan.context,
            via=via,
            ignore_config=ignore,
            progress=lambda phase, done, total: report(f"original: {phase}", done, total),
        )
        yield original


def _read(
    checkpoint: Checkpoint,
    quantize: str | None,
    block: int | None,
    max_context: int | None,
    ignore: Collection[str],
    via: str,
    say: Callable[[str], None],
) -> _Plan:
    """Read all but the weights, and refuse what the model cannot be."""
    config = read_config(checkpoint.path)
    packing = read_packing(config, ignore=ignore)
    storage = choose_storage(quantize, block, packing)
    model = _read_model(config, ignore, via, say)
    context = _context(model, max_context, say)
    files = read_tokenizer(checkpoint.path, config)
    files.check(model.vocab)
    return _Plan(
        checkpoint=checkpoint,
        model=model,
        files=files,
        storage=storage,
        packing=packing,
        context=context,
        calibration=None,
        work_dir=None,
    )


def _check_calibration(plan: _Plan) -> None:
    """Refuse to calibrate what has no floats, or no layers that can be run one by one."""
    if plan.calibration is None:
        return
    if plan.packing is not None:
        raise ArgumentError(
            "method",
            "left out",
            "gptq",
            f"The checkpoint is quantized already ({plan.packing}) and keeps its integers.",
        )
    if not isinstance(plan.model, DecoderSpec):
        raise ArgumentError(
            "method",
            f"{METHODS[0]!r} where optimum makes the graph",
            "gptq",
            "Only the graph builder knows a model layer by layer.",
        )


def _read_model(
    config: dict[str, Any], ignore: Collection[str], via: str, say: Callable[[str], None]
) -> DecoderSpec | OptimumModel:
    """Decide who makes the graph, and read config.json as that one does."""
    family = config.get("model_type")
    if via == "auto" and isinstance(family, str) and family not in ARCHITECTURES:
        say(f"the graph builder does not know the model_type {family!r}: optimum exports it")
        via = "optimum"
    if via == "optimum":
        return read_model(config)
    try:
        return read_architecture(config, ignore=ignore)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            error.message,
            f"{error.remedy} Or let optimum export it: via='optimum' (--via optimum).".lstrip(),
        ) from error


def _context(
    model: DecoderSpec | OptimumModel, max_context: int | None, say: Callable[[str], None]
) -> int:
    longest = model.context
    default = model.default_context if isinstance(model, DecoderSpec) else longest
    if max_context is None:
        if default is None:
            raise CheckpointError(
                "config.json does not say how long a sequence may be.",
                "Pass max_context (--max-context), as long as the model was trained for.",
            )
        return min(default, LONGEST_DEFAULT_CONTEXT)
    if isinstance(max_context, bool) or not isinstance(max_context, int) or max_context < 2:
        raise ArgumentError("max_context", "an integer of at least 2", max_context)
    if longest is not None and max_context > longest:
        raise ArgumentError(
            "max_context",
            f"at most {longest} (the model's max_position_embeddings)",
            max_context,
            "The model was not trained beyond that.",
        )
    if default is not None and max_context > default:
        say(
            f"beyond {default} tokens longrope has other factors, and a bundle has one set: with "
            f"max_context {max_context} shorter texts are answered by the long ones too"
        )
    return max_context


@contextmanager
def _build(
    plan: _Plan, weights: Weights, stage: Path, report: Progress, say: Callable[[str], None]
) -> Iterator[_Built]:
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
        with _calibrated(plan, spec, weights, report) as calibrated:
            graph, decoder = build_decoder(
                spec, weights, storage=plan.storage, context=plan.context, calibrated=calibrated
            )
            yield _Built(
                graph=graph,
                decoder=decoder,
                dims=_dims(spec, plan.context),
                quantization=describe_storage(
                    plan.storage,
                    plan.packing,
                    calibrated=plan.calibration is not None,
                    rounded=rounded,
                    kept=kept,
                ),
                producers=(),
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
        yield _Built(
            graph=traced.graph,
            decoder=traced.decoder,
            dims=traced.dims,
            quantization=describe_storage(plan.storage, kept=traced.kept),
            producers=PRODUCERS,
        )


@contextmanager
def _calibrated(
    plan: _Plan, spec: DecoderSpec, weights: Weights, report: Progress
) -> Iterator[Calibrated]:
    """The matrices that are rounded for their inputs; they are on disk until the block ends."""
    calibration = plan.calibration
    if calibration is None:
        yield {}
        return
    with work_folder(
        plan.work_dir, plan.checkpoint.path, calibration, context=plan.context
    ) as work:
        yield calibrate(
            spec,
            weights,
            _windows(plan, calibration, weights, work, report),
            storage=plan.storage,
            context=plan.context,
            calibration=calibration,
            folder=matrices_folder(work, plan.storage),
            minimum=MIN_ONNXRUNTIME,
            report=report,
        )


def _windows(
    plan: _Plan, calibration: Calibration, weights: Weights, work: Path, report: Progress
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
    plan: _Plan, calibration: Calibration, weights: Weights, report: Progress
) -> NDArray[np.int64]:
    """Let the model write the text; at 8 bits it writes as it would in float32, but faster."""
    draft = replace(plan, storage=Storage(8, DEFAULT_BLOCK), calibration=None)
    with tempfile.TemporaryDirectory(prefix="edge-llm-") as name:
        folder = Path(name)
        with _build(draft, weights, folder, report, lambda text: None) as built:
            _write(draft, built, folder, report)
        with LLM(folder, context=min(plan.context, calibration.tokens)) as llm:
            return draw_windows(llm, calibration, report)


def _write(plan: _Plan, built: _Built, stage: Path, report: Progress) -> Manifest:
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
    manifest = _manifest(plan, built, chat, writer.files)
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


def _manifest(
    plan: _Plan, built: _Built, chat: ChatTemplates, entries: Mapping[str, FileEntry]
) -> Manifest:
    checkpoint, files = plan.checkpoint, plan.files
    info: dict[str, Any] = {}
    if files.ignored:
        info["ignored_generation_config"] = list(files.ignored)
    if plan.calibration:
        info["calibration"] = describe_calibration(plan.calibration)
    return Manifest(
        format=FORMAT,
        requires=(),
        min_onnxruntime=MIN_ONNXRUNTIME,
        name=(checkpoint.repo or checkpoint.path.resolve().name).rsplit("/", 1)[-1],
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


def _dims(spec: DecoderSpec, context: int) -> Dims:
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
