"""Does every family compute what transformers computes? The README's table of families.

The config.json of each published checkpoint (tests/export/configs) is shrunk: fewer heads of the
same size, fewer layers, a small vocabulary, a window of 16 tokens; what is peculiar to the family
stays. A seeded checkpoint of that shape is exported, fed a prompt of 50 tokens and 32 tokens one at
a time, and its logits are compared with transformers'. Bytes of the cache are those of the
published sizes. The last line of stdout is a JSON document.

    python benchmarks/families.py
    python benchmarks/families.py qwen3-0.6b gpt2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

from edge_llm import LLM
from edge_llm.errors import EdgeLLMError
from edge_llm_export import export_model
from edge_llm_export.architectures.registry import read_architecture
from edge_llm_export.choices import LONGEST_DEFAULT_CONTEXT

CONFIGS = Path(__file__).parents[1] / "tests" / "export" / "configs"
VOCAB, LAYERS, WINDOW, CONTEXT = 400, 6, 16, 100
TOKENS = np.random.default_rng(0).integers(2, VOCAB, 82)
PROMPT = 50

FAMILIES = {
    "Llama 2 and 3, TinyLlama, SmolLM2": ["llama-3.2-1b-instruct"],
    "Mistral": ["mistral-7b-v0.3", "mistral-7b-v0.1"],
    "Qwen2, Qwen2.5": ["qwen2.5-0.5b-instruct"],
    "Qwen3": ["qwen3-0.6b"],
    "Gemma": ["gemma-2b-it"],
    "Gemma 2": ["gemma-2-2b-it"],
    "Gemma 3 (text)": ["gemma-3-270m-it", "gemma-3-1b-it"],
    "Phi-3, Phi-3.5 mini": ["phi-3-mini-4k-instruct", "phi-3-mini-128k-instruct"],
    "Phi-4-mini": ["phi-4-mini-instruct"],
    "SmolLM3": ["smollm3-3b"],
    "Granite 3": ["granite-3.3-2b-instruct"],
    "Granite 4 (dense)": ["granite-4.0-350m", "granite-4.0-1b"],
    "OLMo 2": ["olmo-2-0425-1b"],
    "StableLM": ["stablelm-2-1_6b", "stablelm-zephyr-3b"],
    "GPT-NeoX, Pythia": ["pythia-160m", "pythia-70m"],
    "GPT-2": ["gpt2", "distilgpt2"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was found for one published checkpoint.

    Attributes:
        checkpoint: Its name.
        model_type: As config.json has it.
        fp32_error: Largest difference from transformers' logits, relative to their range.
        int8_runs: Exported, run, and gave finite logits.
        int4_runs: Likewise.
        kv_bytes: Cache that a token takes in the published sizes.
        kv_bytes_beyond: What it takes once every sliding window is full.
    """

    checkpoint: str
    model_type: str
    fp32_error: float
    int8_runs: bool
    int4_runs: bool
    kv_bytes: int
    kv_bytes_beyond: int


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """A config of the same quirks whose checkpoint is made in a moment."""
    names = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
    }
    keys = {names.get(key, key): key for key in config}
    heads = config[keys["num_attention_heads"]]
    kv_heads = config.get("num_key_value_heads", heads)
    few = min(kv_heads, 2)
    small = config | {
        keys["num_attention_heads"]: few * heads // kv_heads,
        keys["hidden_size"]: config[keys["hidden_size"]] // heads * few * heads // kv_heads,
        keys["num_hidden_layers"]: min(config[keys["num_hidden_layers"]], LAYERS),
        "vocab_size": VOCAB,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    for key, value in {
        "num_key_value_heads": few,
        "intermediate_size": 320,
        "shared_intermediate_size": 320,
        "sliding_window": WINDOW,
        "mamba_n_heads": 8,
        "mamba_d_head": small[keys["hidden_size"]] // 4,
    }.items():
        if config.get(key) is not None:
            small[key] = value
    # float32 throughout: transformers rounds Gemma 3's scale of the embedding to the checkpoint's.
    small.pop("torch_dtype", None)
    # hidden_activation overwrites hidden_act, but not in transformers' modeling_gemma.py.
    if {"hidden_act", "hidden_activation"} <= config.keys():
        small["hidden_act"] = config["hidden_activation"]
    for key in ("layer_types", "no_rope_layers"):
        if key in config:
            small[key] = config[key][:LAYERS]
    return small


def write_checkpoint(config: dict[str, Any], folder: Path) -> torch.nn.Module:
    """Seeded weights, and norms and biases that do something; a tokenizer of numbered words."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.3
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    vocab = {f"<{i}>": i for i in range(VOCAB)}
    Tokenizer(models.WordLevel(vocab, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return model


def logits(checkpoint: Path, bundle: Path, quantize: str) -> NDArray[np.float32]:
    """Of every token of the prompt and of the steps behind it, float32 [tokens, vocab]."""
    export_model(checkpoint, bundle, quantize=quantize, max_context=CONTEXT, overwrite=True)
    with LLM(bundle, threads=1) as llm:
        loaded = llm._model.engine._model
        assert loaded is not None
        decoder = loaded.decoder
        pieces = [TOKENS[:PROMPT], *TOKENS[PROMPT:, None]]
        return np.concatenate([decoder.step(one, scored=len(one)).copy() for one in pieces])


def runs(checkpoint: Path, bundle: Path, quantize: str) -> bool:
    """Whether such a bundle can be made, and gives numbers."""
    try:
        return bool(np.isfinite(logits(checkpoint, bundle, quantize)).all())
    except EdgeLLMError as error:
        print(f"{checkpoint}, {quantize}: {error}")
        return False


def measure(name: str, work: Path) -> Row:
    """Export and run the shrunken checkpoint in every precision."""
    published = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    checkpoint, bundle = work / name, work / "bundle"
    model = write_checkpoint(shrink(published), checkpoint)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS[None])).logits[0].numpy()
    got = logits(checkpoint, bundle, "fp32")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    windows_slide = any(one["kind"] == "window" for one in manifest["decoder"]["state"])
    spec = read_architecture(published)
    spec = spec.within(min(spec.context, LONGEST_DEFAULT_CONTEXT))
    layer = 2 * spec.kv_heads * spec.padded_head_dim * 4  # float32 keys and values
    growing = sum(one.window is None or not windows_slide for one in spec.attention)
    return Row(
        checkpoint=name,
        model_type=published["model_type"],
        fp32_error=float(np.abs(got - expected).max() / np.ptp(expected)),
        int8_runs=runs(checkpoint, bundle, "int8"),
        int4_runs=runs(checkpoint, bundle, "int4"),
        kv_bytes=layer * spec.layers,
        kv_bytes_beyond=layer * growing,
    )


def table(rows: dict[str, Row]) -> Iterator[str]:
    """The families whose checkpoints were measured, as a table in Markdown."""
    yield "| family | `model_type` | float32 error | int8, int4 | KV bytes per token |"
    yield "| --- | --- | --- | --- | --- |"
    for family, names in FAMILIES.items():
        found = [rows[name] for name in names if name in rows]
        if not found:
            continue
        first = found[0]
        quantized = all(row.int8_runs and row.int4_runs for row in found)
        cache = f"{first.kv_bytes:,}"
        if first.kv_bytes_beyond != first.kv_bytes:
            cache += f", beyond the window {first.kv_bytes_beyond:,}"
        yield (
            f"| {family} | {', '.join(sorted({row.model_type for row in found}))} "
            f"| {max(row.fp32_error for row in found):.0e} | {'run' if quantized else 'FAIL'} "
            f"| {cache} ({first.checkpoint}) |"
        )


def main() -> None:
    """Measure and report."""
    known = [name for names in FAMILIES.values() for name in names]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", default=known, metavar="CHECKPOINT")
    chosen = parser.parse_args().checkpoints
    if unknown := set(chosen) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    with tempfile.TemporaryDirectory() as work:
        rows = {name: measure(name, Path(work)) for name in chosen}
    print("\n".join(table(rows)))
    document = {
        "benchmark": "families",
        "tokens": len(TOKENS),
        "rows": [asdict(row) for row in rows.values()],
        "versions": {
            name: version(name) for name in ("edge-llm", "onnxruntime", "torch", "transformers")
        },
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
