"""From a checkpoint to a verified bundle."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_llm.errors import ArgumentError, CheckpointError
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
from edge_llm.staging import check_target, staged

from .architectures.registry import read_architecture
from .architectures.spec import DecoderSpec
from .checkpoint.hub import Checkpoint, resolve
from .checkpoint.weights import Weights
from .choices import (
    BLOCKS,
    DEFAULT_BLOCK,
    DEFAULT_QUANTIZATION,
    LONGEST_DEFAULT_CONTEXT,
    QUANTIZATIONS,
)
from .config import read_config
from .evaluate.selfcheck import run_once
from .graph.decoder import build_decoder
from .quantize.storage import FLOAT32, Storage
from .writer import BundleWriter

__all__ = ["Progress", "export_model"]

MIN_ONNXRUNTIME = "1.32"

# Tensors that are no weights: transformers computes them from config.json.
_BUFFERS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.(bias|masked_bias)$"
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is known before the weights are read."""

    checkpoint: Checkpoint
    spec: DecoderSpec
    files: TokenizerFiles
    storage: Storage
    context: int


def export_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quantize: str = DEFAULT_QUANTIZATION,
    block: int | None = None,
    max_context: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    ignore_config: Collection[str] = (),
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Manifest:
    """Export a Hugging Face checkpoint as a bundle, open the bundle and run it once.

    Args:
        source: A folder, or a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
        output: The bundle's folder; must not exist or be empty.
        quantize: "fp32", "int8" or "int4".
        block: Weights that share a scale: 32, 64 or 128 (default 32).
        max_context: Longest sequence, in tokens (default: the model's own, but at most 8,192).
        revision: Branch, tag or commit on the hub.
        token: The hub's access token (default: ``HF_TOKEN``, or that of ``hf auth login``).
        overwrite: Replace a bundle that is there.
        ignore_config: Keys of config.json that do not change the computation.
        progress: Called with a phase, the work done and the whole work.
        warn: Called with what the user should know (default: nothing is said).

    Returns:
        The bundle's manifest.

    Raises:
        ArgumentError: An argument is outside its domain.
        CheckpointError: The checkpoint's files are not usable.
        UnsupportedModelError: The model needs what the builder does not know.
        VerificationError: The written bundle does not run.
        ExportError: The disk is full, or the output cannot be written.
    """
    storage = _storage(quantize, block)
    target = check_target(Path(output), overwrite=overwrite)
    report = progress or (lambda phase, done, total: None)
    say = warn or (lambda text: None)
    report("reading", 0, 1)
    checkpoint = resolve(os.fspath(source), revision=revision, token=token)
    plan = _read(checkpoint, storage, max_context, ignore_config)
    for name in plan.files.ignored:
        say(f"generation_config.json: {name} is not supported and was left out")
    with Weights.open(checkpoint.path) as weights, staged(target, overwrite=overwrite) as stage:
        manifest = _write(plan, weights, stage, report)
        report("verifying", 0, 1)
        run_once(stage, warn=say)
        report("verifying", 1, 1)
    return manifest


def _storage(quantize: str, block: int | None) -> Storage:
    if quantize not in QUANTIZATIONS:
        raise ArgumentError("quantize", f"one of {', '.join(QUANTIZATIONS)}", quantize)
    if block is not None and block not in BLOCKS:
        raise ArgumentError("block", f"one of {', '.join(map(str, BLOCKS))}", block)
    if quantize == "fp32":
        if block is not None:
            raise ArgumentError("block", "left out with fp32, which has no blocks", block)
        return FLOAT32
    return Storage(QUANTIZATIONS[quantize], block or DEFAULT_BLOCK)


def _read(
    checkpoint: Checkpoint, storage: Storage, max_context: int | None, ignore: Collection[str]
) -> _Plan:
    """Read all but the weights, and refuse what the model cannot be."""
    config = read_config(checkpoint.path)
    spec = read_architecture(config, ignore=ignore)
    context = _context(spec, max_context)
    files = read_tokenizer(checkpoint.path, config)
    files.check(spec.vocab)
    return _Plan(checkpoint=checkpoint, spec=spec, files=files, storage=storage, context=context)


def _context(spec: DecoderSpec, max_context: int | None) -> int:
    if max_context is None:
        return min(spec.context, LONGEST_DEFAULT_CONTEXT)
    if isinstance(max_context, bool) or not isinstance(max_context, int) or max_context < 2:
        raise ArgumentError("max_context", "an integer of at least 2", max_context)
    if max_context > spec.context:
        raise ArgumentError(
            "max_context",
            f"at most {spec.context} (the model's max_position_embeddings)",
            max_context,
            "The model was not trained beyond that.",
        )
    return max_context


def _check_tensors(weights: Weights, spec: DecoderSpec) -> None:
    """Compare the checkpoint's tensors with the architecture's, before any work."""
    expected = spec.tensor_shapes()
    names = set(weights.names)
    for name, shape in expected.items():
        if name not in names:
            raise CheckpointError(
                f"The checkpoint has no tensor {name!r}.",
                "It is incomplete, or config.json is of another model.",
            )
        if tuple(weights.shape(name)) != shape:
            raise CheckpointError(
                f"Tensor {name!r} has shape {list(weights.shape(name))}; config.json asks for "
                f"{list(shape)}.",
                "config.json is of another model.",
            )
    # A tied head may be stored all the same, and old files carry rotary frequencies and masks.
    tied_head = {f"{spec.names.head}.weight"} if spec.tied else set()
    unknown = [
        name for name in sorted(names - expected.keys() - tied_head) if not _BUFFERS.search(name)
    ]
    if unknown:
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} tensors that a {spec.architecture} model of this "
            f"configuration does not have, such as {unknown[0]!r}.",
            "Merge adapters first, and check config.json.",
        )


def _write(plan: _Plan, weights: Weights, stage: Path, report: Progress) -> Manifest:
    """Write the whole bundle into the stage."""
    spec = plan.spec.as_stored(weights.names)
    _check_tensors(weights, spec)
    graph, decoder = build_decoder(spec, weights, storage=plan.storage, context=plan.context)
    total = sum(info.size for group in graph.deferred for info in group.tensors)
    written = 0

    def count(size: int) -> None:
        nonlocal written
        written += size
        report("writing", written, total)

    writer = BundleWriter(stage)
    chat = _write_texts(writer, plan.files)
    writer.write_graph(graph, producer=version("edge-llm"), on_bytes=count)
    manifest = _manifest(plan, decoder, chat, writer.files)
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
    plan: _Plan, decoder: DecoderGraph, chat: ChatTemplates, entries: Mapping[str, FileEntry]
) -> Manifest:
    checkpoint, spec, files, storage = plan.checkpoint, plan.spec, plan.files, plan.storage
    ignored: dict[str, Any] = {"ignored_generation_config": list(files.ignored)}
    return Manifest(
        format=FORMAT,
        requires=(),
        min_onnxruntime=MIN_ONNXRUNTIME,
        name=(checkpoint.repo or checkpoint.path.resolve().name).rsplit("/", 1)[-1],
        source=Source(
            architecture=spec.architecture,
            repo=checkpoint.repo,
            revision=checkpoint.revision,
            license=checkpoint.license,
        ),
        dims=_dims(spec, plan.context),
        decoder=decoder,
        quantization=Quantization(
            method="rtn" if storage.block else "none",
            bits=storage.bits,
            block=storage.block,
            exceptions={},
        ),
        tokens=Tokens(bos=files.bos, eos=files.eos, pad=files.pad, add_bos=files.add_bos),
        sampling=dict(files.sampling),
        tokenizer="tokenizer.json",
        chat=chat,
        files=entries,
        quality=(),
        producer={name: version(name) for name in ("edge-llm", "onnx", "numpy", "onnxruntime")},
        info=ignored if files.ignored else {},
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
