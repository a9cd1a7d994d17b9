"""``edge-llm info``: what a bundle is, and what it needs of this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from typing import TYPE_CHECKING, Any

from edge_llm.cli.command import Command
from edge_llm.cli.layout import Progress, describe_mix, megabytes, table, write
from edge_llm.cli.options import add_variant_flag
from edge_llm.errors import ArgumentError

if TYPE_CHECKING:
    from edge_llm.bundle import Bundle
    from edge_llm.manifest import Manifest, Quality

__all__ = ["COMMAND"]

CONTEXTS = (512, 1024, 2048, 4096)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        metavar="FOLDER",
        help="the folder of a bundle, or of a model that onnxruntime-genai, transformers.js or "
        "optimum runs",
    )
    add_variant_flag(parser)
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        metavar="N",
        help="contexts whose memory to show, in tokens (default: "
        f"{', '.join(map(str, CONTEXTS))} and the longest)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the SHA-256 of every file first"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="a cache folder whose tuning and compiled form to show, if they are there",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    from edge_llm.bundle import Bundle

    progress = Progress()
    try:
        bundle = Bundle.open(
            arguments.bundle,
            variant=arguments.variant,
            verify=arguments.verify,
            on_file=lambda name: progress.show(f"verifying {name} ..."),
        )
    finally:
        progress.show("")
    tuning = _tuning(bundle, arguments.cache_dir)
    memory = _memory(
        bundle, _contexts(bundle.manifest, arguments.context), arguments.cache_dir, tuning or {}
    )
    machine = _machine()
    if arguments.json:
        document = {
            "path": str(bundle.path),
            "size": bundle.size,
            "foreign": bundle.foreign,
            "variants": list(bundle.variants),
            "verified": arguments.verify,
            "manifest": dataclasses.asdict(bundle.manifest),
            "memory": memory,
            "slow": bundle.slow,
            "machine": machine,
            "tuning": tuning,
        }
        write(json.dumps(document) + "\n")
        return 0
    files = bundle.manifest.files
    parts = [
        _describe_model(bundle),
        f"\nFiles, {megabytes(bundle.size)}{' (verified)' if arguments.verify else ''}",
        table(((name, megabytes(files[name].size)) for name in sorted(files)), indent="  "),
        _describe_memory(memory),
        "\nThis machine",
        _pairs(machine | {"memory_available": megabytes(machine["memory_available"])}),
        "\nTuning (`edge-llm tune`)",
        _pairs(_describe_tuning(tuning)),
    ]
    write("\n".join(parts) + "\n")
    return 0


def _contexts(manifest: Manifest, wanted: list[int] | None) -> list[int]:
    longest = manifest.dims.context
    for context in wanted or ():
        if not 1 <= context <= longest:
            raise ArgumentError(
                "context", f"from 1 to {longest} (what was exported)", context, "Export it longer."
            )
    return sorted(set(wanted or [n for n in CONTEXTS if n < longest] + [longest]))


def _tuning(bundle: Bundle, cache_dir: str | None) -> dict[str, Any] | None:
    from edge_llm.tuning import find_tuning

    found = find_tuning(bundle, cache_dir=cache_dir)
    return None if found is None else dataclasses.asdict(found)


def _describe_tuning(tuning: dict[str, Any] | None) -> dict[str, Any]:
    if tuning is None:
        return {"measured": "not under these cores and this quota; defaults are used"}
    costs = ", ".join(f"{width}: {cost:.2f}" for width, cost in tuning["step_costs"].items())
    return {
        "threads": tuning["threads"],
        "spinning": f"{tuning['spin']} us",
        "bound to CPUs": tuning["affinities"] or "no",
        "prefill chunk": tuning["prefill_chunk"] or "by time alone",
        "step costs": costs or "measured while answering",
        "compiled form": "used" if tuning["compiled"] else "slower here, not used",
    }


def _memory(
    bundle: Bundle, contexts: list[int], cache_dir: str | None, tuning: dict[str, Any]
) -> dict[str, Any]:
    """Bytes by what for, of each context; and of the cache by token."""
    from edge_llm.compiled import find_compiled
    from edge_llm.memory import MemoryModel
    from edge_llm.runtime.kv_cache import state_bytes

    state = bundle.manifest.decoder.state
    growing = [one for one in state if one.kind == "kv"]
    windows = [one for one in state if one.kind == "window"]
    compiled = None
    if tuning.get("compiled", True):
        compiled = find_compiled(bundle, cache_dir=cache_dir)
    model = MemoryModel(bundle, prefill_chunk=tuning.get("prefill_chunk"))
    estimates = {str(one): model.estimate(one, compiled=compiled) for one in contexts}
    return {
        "compiled": None if compiled is None else str(compiled.parent),
        "cache_per_token": state_bytes(growing, rows=1, capacity=1),
        "cache_windows": state_bytes(windows, rows=1, capacity=bundle.manifest.dims.context),
        "contexts": {
            context: dataclasses.asdict(one) | {"total": one.total}
            for context, one in estimates.items()
        },
    }


def _machine() -> dict[str, Any]:
    from edge_llm.runtime import device

    return {
        "cpu": device.cpu_name(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": device.usable_cores(),
        "features": list(device.cpu_features()),
        "memory_available": device.available_memory(),
    }


def _describe_model(bundle: Bundle) -> str:
    manifest = bundle.manifest
    source, dims, tokens = manifest.source, manifest.dims, manifest.tokens
    eos = ", ".join(map(str, tokens.eos)) or "none"
    quality = [_describe_quality(one) for one in manifest.quality]
    rows: dict[str, object] = {
        "source": source.repo or "a local folder",
        "revision": source.revision or "not told",
        "licence": source.license or "not told",
        "parameters": f"{dims.parameters / 1e6:,.1f} million",
        "architecture": f"{source.architecture}, {dims.layers} layers of width "
        f"{_told(dims.hidden)} (MLP {_told(dims.intermediate)})",
        "attention": f"{_told(dims.heads)} heads of width {dims.head_dim}, {dims.kv_heads} of them "
        "with keys and values of their own",
        "vocabulary": f"{dims.vocab} tokens",
        "quantization": _describe_quantization(manifest),
        "made for": manifest.target or "no particular processor",
        "on this machine": bundle.slow or "fast kernels",
        "keys and values": _describe_state(manifest),
        "context": f"{dims.context} tokens",
        "tokens": f"BOS {'none' if tokens.bos is None else tokens.bos}"
        f"{' (put in front)' if tokens.add_bos else ''}, EOS {eos}, "
        f"PAD {'none' if tokens.pad is None else tokens.pad}",
        "sampling": ", ".join(f"{k} {v:g}" for k, v in manifest.sampling.items()) or "greedy",
        "chat templates": ", ".join(sorted(manifest.chat.templates)) or "none: a base model",
        "quality": quality or "not measured",
        "made by": [f"{name} {version}" for name, version in manifest.producer.items()],
        "format": f"{manifest.format}, for onnxruntime {manifest.min_onnxruntime} or later",
        **{name: value for name, value in manifest.info.items() if name != "mix"},
    }
    if bundle.foreign:
        rows["format"] = "not a bundle: opened as it is"
    if bundle.variants:
        rows["variants"] = ", ".join(bundle.variants)
    trade = f"\n{describe_mix(manifest.info['mix'])}" if "mix" in manifest.info else ""
    return f"{manifest.name}\n{_pairs(rows)}{trade}"


def _describe_quantization(manifest: Manifest) -> str:
    stored = manifest.quantization
    if stored.method == "none":
        return f"none: float{stored.bits}"
    scale = "column or matrix" if stored.block is None else f"{stored.block} weights"
    method = "by another exporter" if stored.method == "foreign" else stored.method
    text = f"{stored.bits} bits, a scale per {scale}, {method}"
    others = len(stored.exceptions)
    return f"{text}; {others} tensors in another way" if others else text


def _describe_state(manifest: Manifest) -> str:
    dtypes = sorted({one.dtype for one in manifest.decoder.state})
    return " and ".join(dtypes)


def _describe_quality(one: Quality) -> str:
    from edge_llm.manifest import CACHE_METRIC

    error = "" if one.standard_error is None else f" ± {one.standard_error:.2g}"
    data = one.data if one.window is None else f"{one.data} in windows of {one.window} tokens"
    reference = "float32 cache" if one.metric.startswith(CACHE_METRIC) else "float32"
    digest = "" if one.sha256 is None else f", SHA-256 {one.sha256[:12]}"
    return f"{one.metric} on {data}{digest}: {one.value:g}{error} ({reference}: {one.reference:g})"


def _told(size: int | None) -> str:
    return "not told" if size is None else str(size)


def _describe_memory(memory: dict[str, Any]) -> str:
    names = ("weights_file", "weights_anonymous", "kv", "scratch", "runtime", "total")
    heads = ("mapped weights", "weights", "cache", "scratch", "Python", "in all")
    rows: list[tuple[str, ...]] = [("  context", *heads)]
    for context, terms in memory["contexts"].items():
        sizes = (megabytes(terms[name]) for name in names)
        rows.append((f"  {context} tokens", *sizes))
    windows = memory["cache_windows"]
    fixed = f", and up to {megabytes(windows)} for windows, however long it is" if windows else ""
    how = memory["compiled"] or "no; `edge-llm compile` moves weights to the mapped ones"
    return "\n".join(
        [
            "\nMemory (a prediction: in a process of its own, with the context full)",
            table(rows),
            f"  compiled: {how}",
            "  Mapped weights are pages that the system may drop and read again. The cache takes",
            f"  {memory['cache_per_token']:,} bytes a token of the context{fixed}.",
        ]
    )


def _pairs(rows: dict[str, Any]) -> str:
    """Names and values in two columns; a list of values goes on one line."""
    lines = []
    for name, value in rows.items():
        if isinstance(value, dict):
            value = [f"{key.replace('_', ' ')} {one}" for key, one in value.items()]
        shown = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
        lines.append(f"  {name.replace('_', ' '):<16} {shown}")
    return "\n".join(lines)


COMMAND = Command("info", "say what a bundle is and what it needs", _configure, _run)
