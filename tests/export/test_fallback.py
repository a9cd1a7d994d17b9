"""Architectures of other than the graph builder, through optimum: parity with both of its peers."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
import transformers
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.manifest import Manifest, TensorQuantization
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import create_session, import_onnxruntime
from edge_llm_export import export_model
from edge_llm_export.fallback.initializers import Initializers
from edge_llm_export.quantize.packing import pack
from edge_llm_export.quantize.rtn import dequantize_blocks, quantize_rows

PROMPT = np.random.default_rng(1).integers(2, 400, 40)

Settings = dict[str, Any]
GPT: Settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
LLAMA: Settings = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
BLOOM: Settings = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 128}
FALCON: Settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
NEO: Settings = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
    "max_position_embeddings": 128,
}
OPT: Settings = {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 48,
    "max_position_embeddings": 128,
}
ALIBI = {"alibi": True, "multi_query": False, "bias": True}
# Class names in transformers, and what its tiny configuration sets.
FAMILIES: dict[str, tuple[str, Settings]] = {
    "gpt2": ("GPT2", GPT),
    "llama": ("Llama", LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 8}),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "gpt_neo": ("GPTNeo", NEO),
    "opt": ("OPT", OPT),
    "bloom": ("Bloom", BLOOM),
    "falcon": ("Falcon", FALCON | {"max_position_embeddings": 128}),
    "falcon, alibi": ("Falcon", FALCON | ALIBI),
    "mpt": ("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "phi": ("Phi", LLAMA),
    "cohere": ("Cohere", LLAMA | {"num_key_value_heads": 2}),
    "mistral, window": ("Mistral", LLAMA | {"num_key_value_heads": 2, "sliding_window": 8}),
}
# The bits change nothing but the rounding, so each family is tried with one number of them.
INT8 = ("gptj", "opt", "mistral, window")


@dataclass(frozen=True)
class Exported:
    family: str
    model: Any
    checkpoint: Path
    bundle: Path
    said: list[str]


def write_checkpoint(family: str, folder: Path, tokenizer: Path) -> Any:
    name, settings = FAMILIES[family]
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(vocab_size=400, **settings, **ids)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # GPT-BigCode's module calls it when it is imported.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        model = getattr(transformers, f"{name}{head}")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.1
            elif "wpe" not in key:
                parameter *= 4  # logits far enough apart for greedy decoding to be stable
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder / file)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def exported(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """A checkpoint, its model, and its float32 bundle."""
    folder = tmp_path_factory.mktemp("fallback")
    checkpoint, bundle = folder / "checkpoint", folder / "fp32"
    model = write_checkpoint(request.param, checkpoint, tiny_checkpoint)
    said: list[str] = []
    export_model(checkpoint, bundle, quantize="fp32", via="optimum", warn=said.append)
    return Exported(request.param, model, checkpoint, bundle, said)


def decoder_of(folder: Path) -> Decoder:
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    session = create_session(folder / "model.onnx", threads=1, minimum="1.32")
    return open_decoder(session, manifest, capacity=manifest.dims.context)


def feed(decoder: Decoder, tokens: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
    """Logits of every token, fed from an empty cache in chunks."""
    decoder.cache.truncate(0, 0)
    parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    return np.concatenate([decoder.step(part, scored=len(part)).copy() for part in parts])


def reference(model: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor(tokens[None])).logits[0].numpy()
    return logits


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


def greedy(model: Any, count: int) -> list[int]:
    answer = model.generate(
        torch.tensor(PROMPT[None]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return cast("list[int]", answer[0, len(PROMPT) :].tolist())


def optimum_greedy(checkpoint: Path, folder: Path, count: int) -> list[int]:
    """What optimum's own runtime answers from optimum's own export."""
    import_onnxruntime()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.exporters.onnx import main_export
        from optimum.onnxruntime import ORTModelForCausalLM

        main_export(str(checkpoint), folder, task="text-generation-with-past", do_validation=False)
        return greedy(ORTModelForCausalLM.from_pretrained(folder), count)


def test_float32_equals_transformers(exported: Exported) -> None:
    answer = greedy(exported.model, 32)
    tokens = np.concatenate([PROMPT, answer])
    expected = reference(exported.model, tokens)
    decoder = decoder_of(exported.bundle)
    for chunk in (len(tokens), 7, 1):
        assert relative_error(feed(decoder, tokens, chunk), expected) < 1e-4
    # Only the last tokens' logits, the last one's alone included.
    for scored in (3, 1):
        decoder.cache.truncate(0, 20)
        got = decoder.step(tokens[20:29], scored=scored)
        assert relative_error(got, expected[29 - scored : 29]) < 1e-4


def test_the_same_tokens_as_both_peers(exported: Exported, tmp_path: Path) -> None:
    expected = optimum_greedy(exported.checkpoint, tmp_path / "peer", 32)
    assert expected == greedy(exported.model, 32)
    for chunk in (None, 7):
        with LLM(exported.bundle, prefill_chunk=chunk) as llm:
            got = llm.generate(PROMPT.tolist(), max_tokens=32, temperature=0)
            assert list(got.tokens) == expected[: len(got.tokens)]
            assert len(got.tokens) == 32 or got.tokens[-1] == 1


def test_quantized_weights_are_the_builders_rounding(exported: Exported, tmp_path: Path) -> None:
    quantize, bits = ("int8", 8) if exported.family in INT8 else ("int4", 4)
    manifest = export_model(exported.checkpoint, tmp_path / "q", quantize=quantize, via="optimum")
    graph = onnx.load(tmp_path / "q" / "model.onnx", load_external_data=False).graph
    stored = Initializers(graph, tmp_path / "q")
    weights = {name: one for name, one in exported.model.named_parameters() if one.ndim == 2}
    assert set(manifest.quantization.exceptions) <= {
        name for name in weights if "wpe" in name or "embed_positions" in name
    }
    with torch.no_grad():
        for name in weights.keys() - manifest.quantization.exceptions.keys():
            (found,) = {f"{name}_scales", f"{name}.T_scales"} & set(stored)
            turned = found == f"{name}.T_scales"
            rows = np.ascontiguousarray(weights[name].numpy().T if turned else weights[name])
            integers, scales = quantize_rows(rows, bits=bits, block=32)
            blocks = stored.array(found.replace("_scales", f"_q{bits}"))
            assert np.array_equal(stored.array(found), scales)
            assert np.array_equal(blocks.reshape(-1), pack(integers, bits).reshape(-1))
            rounded = dequantize_blocks(integers, scales, bits=bits, columns=rows.shape[1])
            weights[name].copy_(torch.from_numpy(rounded.T if turned else rounded))
    try:
        got = feed(decoder_of(tmp_path / "q"), PROMPT, len(PROMPT))
        assert relative_error(got, reference(exported.model, PROMPT)) < 0.05
    finally:
        original = type(exported.model).from_pretrained(exported.checkpoint)
        exported.model.load_state_dict(original.state_dict())
    with LLM(tmp_path / "q") as llm:
        answer = llm.generate(PROMPT.tolist(), max_tokens=8, temperature=0, logprobs=0)
    assert answer.logprobs
    assert all(np.isfinite(one.logprob) for one in answer.logprobs)


def test_the_manifest_tells_of_the_graph(exported: Exported) -> None:
    manifest = Manifest.from_json((exported.bundle / "manifest.json").read_text())
    config, dims = exported.model.config, manifest.dims
    assert manifest.source.architecture == config.model_type
    assert (dims.layers, dims.hidden, dims.heads, dims.head_dim) == (2, 64, 4, 16)
    shared = {"gpt_bigcode": 1, "falcon": 1, "llama": 2, "cohere": 2, "mistral, window": 2}
    assert dims.kv_heads == shared.get(exported.family, 4)
    assert dims.vocab == 400
    assert dims.context == (2048 if exported.family == "falcon, alibi" else 128)
    assert dims.parameters == exported.model.num_parameters()
    assert manifest.decoder.layout == "standard.v1"
    names = [(one.input, one.output) for one in manifest.decoder.state]
    assert names == [
        (f"past_key_values.{i}.{part}", f"present.{i}.{part}")
        for i in range(2)
        for part in ("key", "value")
    ]
    shape = ("batch", dims.kv_heads, "capacity", 16)
    assert {one.shape for one in manifest.decoder.state} == {shape}
    quantization = manifest.quantization
    assert (quantization.method, quantization.bits, quantization.block) == ("none", 32, None)
    assert manifest.producer.keys() >= {"optimum-onnx", "torch", "transformers"}
    assert exported.said == []
    assert sorted(path.name for path in exported.bundle.iterdir()) == [
        "chat_template.jinja",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    ]


@pytest.fixture(scope="module")
def opt(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("opt")
    return folder, write_checkpoint("opt", folder, tiny_checkpoint)


@pytest.mark.parametrize("form", ["external data", "shards", "bfloat16"])
def test_forms_that_give_the_same_bundle(
    form: str, opt: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = opt
    other = tmp_path / "other"
    shutil.copytree(source, other)
    if form == "bfloat16":
        half = type(model).from_pretrained(source, dtype=torch.bfloat16)
        half.save_pretrained(other)
        source = tmp_path / "rounded"
        shutil.copytree(other, source)
        half.float().save_pretrained(source)
    elif form == "shards":
        (other / "model.safetensors").unlink()
        model.save_pretrained(other, max_shard_size="100KB")
        assert len(list(other.glob("*.safetensors"))) > 1
    one = export_model(source, tmp_path / "a", quantize="int4")
    if form == "external data":  # as optimum writes graphs of more than 2 GB
        monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")
    two = export_model(other, tmp_path / "b", quantize="int4")
    assert one.files == two.files


def test_positions_stay_float32_and_are_named(opt: tuple[Path, Any], tmp_path: Path) -> None:
    said: list[str] = []
    manifest = export_model(opt[0], tmp_path / "bundle", quantize="int8", warn=said.append)
    assert manifest.quantization.exceptions == {
        "model.decoder.embed_positions.weight": TensorQuantization(bits=32, block=None)
    }
    assert said == ["the graph builder does not know the model_type 'opt': optimum exports it"]
    document = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert document["quantization"]["exceptions"].keys() == {"model.decoder.embed_positions.weight"}
