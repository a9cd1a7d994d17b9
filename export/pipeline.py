"""From a checkpoint to a verified bundle."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_llm.errors import ArgumentError, CheckpointError, UnsupportedModelError
from edge_llm.huggingface.tokenizer import read_tokenizer
from edge_llm.manifest import Manifest, Quality
from edge_llm.quality import read_text_file
from edge_llm.staging import check_target, staged

from .architectures.registry import ARCHITECTURES, read_architecture
from .architectures.spec import DecoderSpec
from .building import build, quantize_stage, write
from .checkpoint.hub import Checkpoint, resolve
from .checkpoint.packed import open_weights
from .checkpoint.prequantized import read_packing
from .choices import KV_CACHES, LONGEST_DEFAULT_CONTEXT, VIAS
from .config import read_config
from .evaluate.figures import measure_quality, of_cache
from .evaluate.overlap import check_disjoint
from .evaluate.selfcheck import run_once
from .fallback.model import OptimumModel, read_model
from .plan import Plan, Progress
from .quantize.budget import Budget, check_least
from .quantize.calibration import Calibration
from .quantize.choice import Request, choose_recipe
from .quantize.kv import choose_kv_calibration
from .quantize.storage import FLOAT32
from .writer import BundleWriter

__all__ = ["Progress", "export_model"]


def export_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quantize: str | None = None,
    block: int | None = None,
    method: str | None = None,
    vocabulary: str | None = None,
    target: str | None = None,
    max_kld: float | None = None,
    max_ppl_increase: float | None = None,
    max_size: int | None = None,
    calibration: Calibration | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    kv_cache: str = KV_CACHES[0],
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
        quantize: "auto", "fp32", "int8" or "int4". "auto" (the default, unless one of ``block``,
            ``method`` and ``vocabulary`` is given) stores each matrix in as many bits as measuring
            shows it to be worth, 4.8 on the average, scales included, or within a budget. A
            checkpoint that GPTQ or AWQ quantized keeps its integers, unless "fp32" dequantizes
            them; where optimum makes the graph, "auto" is "int4".
        block: Weights that share a scale: 32, 64 or 128 (default 32).
        method: How floats are rounded: "rtn", to the nearest integers (the default), or "gptq", for
            the inputs that each matrix has when the model runs on some text.
        vocabulary: "int4" or "int8": how the embedding and the head are stored (default: int8 with
            "gptq", where a 4-bit vocabulary would lose most, or else as the rest).
        target: The CPU that the bundle is for: "x86", "arm64" (from Cortex-A76 and Raspberry Pi 5
            on) or "arm64-nodotprod" (Raspberry Pi 3 and 4), which has int8 with a scale per row as
            its default and int4 to save memory. Without one the graph is that of the first two.
        max_kld: A mix that loses no more: KL divergence from the float32 model, nats per token, on
            text that is like what it is calibrated on, but apart from it.
        max_ppl_increase: A mix whose perplexity grows by no larger a share, on such text.
        max_size: The truest mix whose bundle has no more bytes. At most one of the three is given.
        calibration: What to calibrate on, and how (default: the model writes the text itself).
        work_dir: A folder where GPTQ keeps each layer's result. An export that was interrupted
            goes on from there if it is asked for the same again; it may be removed at any time
            (default: a temporary one).
        kv_cache: How keys and values are kept: "fp32", or "int8" with a scale per channel, in a
            quarter of the memory; calibrated on the same text.
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
            original is what its integers stand for. Calibration text that shares a passage with it
            is refused where it is a file, and left out where the model writes it.
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
    kv_calibration = choose_kv_calibration(kv_cache, calibration)
    request = Request(
        quantize=quantize,
        block=block,
        method=method,
        vocabulary=vocabulary,
        calibration=calibration,
        work_dir=work_dir,
        target=target,
        cache_calibrated=kv_calibration is not None,
        budget=Budget.read(max_kld=max_kld, max_ppl_increase=max_ppl_increase, max_size=max_size),
    )
    if via not in VIAS:
        raise ArgumentError("via", f"one of {', '.join(VIAS)}", via)
    folder = check_target(Path(output), overwrite=overwrite)
    text = None if evaluate is None else read_text_file(evaluate, "evaluate")
    seen = None if calibration is None else calibration.read_text()
    if seen is not None and text is not None:
        check_disjoint(seen, text)
    report = progress or (lambda phase, done, total: None)
    say = warn or (lambda text: None)
    report("reading", 0, 1)
    checkpoint = resolve(os.fspath(source), revision=revision, token=token)
    plan = replace(
        _read(checkpoint, request, max_context, ignore_config, via, say),
        work_dir=None if work_dir is None else Path(work_dir),
        scored=text,
        kv_calibration=kv_calibration,
    )
    if kv_calibration is not None and not isinstance(plan.model, DecoderSpec):
        raise ArgumentError(
            "kv_cache",
            f"{KV_CACHES[0]!r} where optimum makes the graph",
            "int8",
            "Its cache grows by concatenation, for which there are no int8 operators.",
        )
    for name in plan.files.ignored:
        say(f"generation_config.json: {name} is not supported and was left out")
    floats = plan.recipe.storage == FLOAT32
    with (
        open_weights(checkpoint.path, plan.packing, dequantize=floats) as weights,
        staged(folder, overwrite=overwrite) as stage,
        ExitStack() as kept,
    ):
        float_cache = stage
        with build(plan, weights, stage, report, say) as built:
            manifest = write(plan, built, stage, report)
            if built.windows is not None and plan.kv_calibration is not None:
                if text is not None:
                    float_cache = kept.enter_context(_copied(stage, folder))
                manifest = quantize_stage(plan, stage, manifest, built.windows, report)
        report("verifying", 0, 1)
        run_once(stage, warn=say)
        report("verifying", 1, 1)
        if evaluate is not None and text is not None:

            def measured(reference: Path) -> tuple[Quality, ...]:
                return measure_quality(
                    stage,
                    reference,
                    text,
                    data=Path(evaluate).name,
                    progress=lambda done, total: report("evaluating", done, total),
                )

            with _original(plan, float_cache, folder, via, ignore_config, report) as original:
                quality = measured(original)
            if float_cache != stage:
                quality += of_cache(quality if original == float_cache else measured(float_cache))
            manifest = dataclasses.replace(manifest, quality=quality)
            BundleWriter(stage).write_manifest(manifest)
    return manifest


@contextmanager
def _copied(stage: Path, target: Path) -> Iterator[Path]:
    """A copy of a bundle beside the target while the block lasts."""
    prefix = f".{target.name}.float-cache."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as folder:
        yield shutil.copytree(stage, Path(folder) / "bundle")


@contextmanager
def _original(
    plan: Plan,
    written: Path,
    target: Path,
    via: str,
    ignore: Collection[str],
    report: Progress,
) -> Iterator[Path]:
    """The checkpoint's float32 bundle while the block lasts: ``written``, or one made for it.

    Its context is the same, for rotary scaling may hang on it.
    """
    if plan.recipe.storage == FLOAT32:
        yield written
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
    request: Request,
    max_context: int | None,
    ignore: Collection[str],
    via: str,
    say: Callable[[str], None],
) -> Plan:
    """Read all but the weights, and refuse what the model cannot be."""
    config = read_config(checkpoint.path)
    packing = read_packing(config, ignore=ignore)
    model = _read_model(config, ignore, via, say)
    recipe = choose_recipe(request, packing, layered=isinstance(model, DecoderSpec))
    if recipe.budget is not None and isinstance(model, DecoderSpec):
        check_least(recipe.budget, model.tensor_shapes().values())
    context = _context(model, max_context, say)
    files = read_tokenizer(checkpoint.path, config)
    files.check(model.vocab)
    return Plan(
        checkpoint=checkpoint,
        model=model,
        files=files,
        recipe=recipe,
        packing=packing,
        context=context,
        work_dir=None,
        scored=None,
        target=request.target,
        kv_calibration=None,
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
