"""Which ways of quantizing to 4 bits are worth having? KL divergence from float32 of each.

GPTQ as the exporter does it, without its act-order, and without taking back what the matrices in
front have changed; and activation-aware scaling (AWQ, Lin et al., arXiv 2306.00978) in front of
rounding to nearest and of GPTQ: columns with strong inputs are stored larger, and the norm's gain
in front of them is divided by as much. For zero points, rounding to nearest in torch, symmetric
(scale by the largest value, its sign kept) and from the least to the largest value of a block.

    python benchmarks/calibration_ways.py CHECKPOINT TEXT

Linear layers in blocks of 128; the vocabulary in 8 bits, in torch in float32. A Llama is needed:
where a norm stands in front of its projections. The last line of stdout is a JSON document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edge_llm import LLM
from edge_llm.cli.layout import notice, table
from edge_llm.quality import QualityReport, evaluate, read_text_file
from edge_llm_export import Calibration, export_model

BLOCK = 128
ALPHAS = (0.25, 0.5)
GROUPS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The projections behind each norm of a layer."""


def drawn_text(model: Any, *, windows: int = 32, tokens: int = 256) -> Any:
    """What the model writes itself, int64 [windows, tokens]."""
    torch.manual_seed(0)
    start = torch.full((windows, 1), model.config.bos_token_id or 0)
    return model.generate(
        start,
        do_sample=True,
        top_k=0,
        temperature=1.0,
        min_new_tokens=tokens - 1,
        max_new_tokens=tokens - 1,
        pad_token_id=0,
    )


def input_strengths(model: Any) -> dict[str, Any]:
    """The mean magnitude of each input of the first projection behind each norm."""
    found: dict[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[name] = inputs[0].detach().abs().mean(dim=(0, 1))

        return hook

    handles = []
    for number, layer in enumerate(model.model.layers):
        for norm, (first, *_) in GROUPS.items():
            module = layer.get_submodule(first)
            handles.append(module.register_forward_hook(watch(f"model.layers.{number}.{norm}")))
    with torch.no_grad():
        model(drawn_text(model))
    for handle in handles:
        handle.remove()
    return found


def scale_checkpoint(source: Path, target: Path, strengths: dict[str, Any], alpha: float) -> None:
    """Write a checkpoint that computes the same, its strong columns larger by strength ** alpha."""
    shutil.copytree(source, target)
    weights = {name: one.float() for name, one in load_file(target / "model.safetensors").items()}
    for norm, strength in strengths.items():
        scales = strength.clamp(min=1e-4) ** alpha
        scales = scales / (scales.max() * scales.min()).sqrt()
        layer, _, kind = norm.rpartition(".")
        weights[f"{norm}.weight"] = weights[f"{norm}.weight"] / scales
        for projection in GROUPS[kind]:
            weights[f"{layer}.{projection}.weight"] = (
                weights[f"{layer}.{projection}.weight"] * scales
            )
    save_file(
        {name: one.contiguous() for name, one in weights.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )


def rounded(weight: Any, *, zero_points: bool) -> Any:
    """A matrix in 4 bits, each block of a row with a scale, and perhaps a zero point."""
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK))
    blocks = blocks.reshape(len(weight), -1, BLOCK)
    if zero_points:
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True)
        scale = (high.clamp(min=0) - low).clamp(min=1e-9) / 15
        zero = (-low / scale).round()
        stored = ((blocks / scale).round() + zero).clamp(0, 15)
        restored = (stored - zero) * scale
    else:
        place = blocks.abs().argmax(-1, keepdim=True)
        scale = blocks.gather(-1, place) / -8
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        restored = (blocks / scale).round().clamp(-8, 7) * scale
    return restored.reshape(len(weight), -1)[:, : weight.shape[1]]


def torch_divergence(checkpoint: Path, windows: list[list[int]], *, zero_points: bool) -> float:
    """KL divergence of rounding the linear layers, nats per token."""
    load = AutoModelForCausalLM.from_pretrained
    reference, model = (load(checkpoint, dtype=torch.float32).eval() for _ in range(2))
    total, count = 0.0, 0
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded(module.weight, zero_points=zero_points))
        for window in windows:
            tokens = torch.tensor([window])
            true, own = (
                one(tokens).logits[0].double().log_softmax(-1) for one in (reference, model)
            )
            total += float((true.exp() * (true - own)).sum())
            count += len(window)
    return total / count


def measure(bundle: Path, original: Path, text: str, tokens: int) -> QualityReport:
    """A bundle beside its float32 original."""
    with LLM(bundle) as llm, LLM(original) as reference:
        return evaluate(llm, text, reference=reference, window=256, stride=256, max_tokens=tokens)


def main() -> None:
    """Export in each way, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=15_360, help="of the text to score")
    arguments = parser.parse_args()
    text, found = read_text_file(arguments.text), dict[str, dict[str, float]]()
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    strengths = input_strengths(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = folder / "fp32"
        export_model(arguments.checkpoint, original, quantize="fp32")
        checkpoints = {"": arguments.checkpoint}
        for alpha in ALPHAS:
            target = folder / f"scaled-{alpha}"
            scale_checkpoint(arguments.checkpoint, target, strengths, alpha)
            checkpoints[f", AWQ {alpha}"] = target
        ways: dict[str, tuple[Path, dict[str, Any]]] = {}
        for said, checkpoint in checkpoints.items():
            ways[f"RTN{said}"] = checkpoint, {"method": "rtn", "vocabulary": "int8"}
            ways[f"GPTQ{said}"] = checkpoint, {"method": "gptq", "calibration": Calibration()}
        ways["GPTQ, no act-order"] = (
            arguments.checkpoint,
            {"method": "gptq", "calibration": Calibration(act_order=False)},
        )
        ways["GPTQ, nothing taken back"] = (
            arguments.checkpoint,
            {"method": "gptq", "calibration": Calibration(correction=0.0)},
        )
        for way, (checkpoint, options) in ways.items():
            notice(way)
            export_model(
                checkpoint,
                folder / "trial",
                quantize="int4",
                block=BLOCK,
                overwrite=True,
                **options,
            )
            report = measure(folder / "trial", original, text, arguments.tokens)
            assert report.kl_divergence is not None
            assert report.top1_agreement is not None
            assert report.kl_divergence.standard_error is not None
            found[way] = {
                "kl_divergence": report.kl_divergence.value,
                "standard_error": report.kl_divergence.standard_error,
                "top1_agreement": report.top1_agreement.value,
            }
        with LLM(original) as llm:
            tokens = llm.tokenize(text)[: arguments.tokens]
    windows = [tokens[i : i + 255] for i in range(0, len(tokens) - 255, 255)]
    divergences = {
        "RTN in torch, symmetric": torch_divergence(
            arguments.checkpoint, windows, zero_points=False
        ),
        "RTN in torch, zero points": torch_divergence(
            arguments.checkpoint, windows, zero_points=True
        ),
    }
    rows = [("", "KLD", "±", "top-1 %")]
    for way, one in found.items():
        rows.append(
            (
                way,
                f"{one['kl_divergence']:.5f}",
                f"{one['standard_error']:.5f}",
                f"{100 * one['top1_agreement']:.2f}",
            )
        )
    rows += [(way, f"{value:.5f}", "", "") for way, value in divergences.items()]
    print(table(rows))
    print(
        json.dumps(
            {
                "benchmark": "calibration_ways",
                "checkpoint": arguments.checkpoint.name,
                "block": BLOCK,
                "ways": found,
                "torch": divergences,
            }
        )
    )


if __name__ == "__main__":
    main()
