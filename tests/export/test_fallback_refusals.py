"""What cannot go through optimum is refused by name, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from edge_llm.cli.main import main
from edge_llm.errors import (
    ArgumentError,
    CheckpointError,
    EdgeLLMError,
    ExportError,
    UnsupportedModelError,
    VerificationError,
)
from edge_llm_export import export_model
from edge_llm_export.fallback.compare import compare
from edge_llm_export.fallback.interface import read_state
from edge_llm_export.fallback.model import read_model
from edge_llm_export.fallback.tracing import STEPS, Trace

TWO_LAYERS = {
    "num_layers": 2,
    "attention_layers": ["global", "global"],
    "attention_types": [[["global"], 2]],
}

Capture = pytest.CaptureFixture[str]
Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def original(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-Neo, which has no row in the graph builder."""
    folder = tmp_path_factory.mktemp("neo")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 400}
    more = {"max_position_embeddings": 64, "attention_types": [[["global"], 1]]}
    config = GPTNeoConfig(**sizes, **more, bos_token_id=None, eos_token_id=1)
    GPTNeoForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / file, folder / file)
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy whose files may be changed."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: one for key, one in content.items() if one is not ...}))


def edit_weights(folder: Path, change: Edit) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refused(checkpoint: Path, kind: type[EdgeLLMError], match: str, **options: Any) -> EdgeLLMError:
    """Export, be refused, and find nothing left."""
    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(kind, match=match) as caught:
        export_model(checkpoint, checkpoint.parent / "bundle", **options)
    assert sorted(checkpoint.parent.rglob("*")) == before
    return caught.value


def test_a_type_that_nobody_knows(checkpoint: Path) -> None:
    edit(checkpoint, model_type="mamba")
    said: list[str] = []
    refused(
        checkpoint, UnsupportedModelError, "'mamba' .* optimum-onnx .* decoder", warn=said.append
    )
    assert said == ["the graph builder does not know the model_type 'mamba': optimum exports it"]


def test_the_builder_alone_does_not_ask_optimum(checkpoint: Path) -> None:
    said: list[str] = []
    error = refused(
        checkpoint,
        UnsupportedModelError,
        "'gpt_neo'.*graph builder",
        via="builder",
        warn=said.append,
    )
    assert "--via optimum" in error.remedy
    assert said == []


def test_what_the_builder_refuses_does_not_go_to_optimum_by_itself(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    edit(checkpoint, new_idea=1)
    error = refused(checkpoint, UnsupportedModelError, "new_idea = 1")
    assert "--ignore-config new_idea" in error.remedy
    assert "--via optimum" in error.remedy
    manifest = export_model(checkpoint, tmp_path / "bundle", via="optimum")
    assert manifest.decoder.layout == "standard.v1"


def test_an_unknown_way(checkpoint: Path) -> None:
    refused(checkpoint, ArgumentError, "via must be one of auto, builder, optimum", via="torch")


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "quantization_config"),
        ({"is_encoder_decoder": True}, UnsupportedModelError, "is_encoder_decoder"),
        ({"model_type": "internlm2"}, UnsupportedModelError, "'internlm2' is not one"),
        ({"model_type": ...}, CheckpointError, "no model_type"),
        ({"hidden_size": "wide"}, CheckpointError, "config.json"),
        ({"hidden_size": 48}, CheckpointError, "(?s)transformers cannot load.*config.json"),
        (TWO_LAYERS, CheckpointError, "no tensor 'transformer.h.1"),
        ({"vocab_size": 300}, CheckpointError, "has 300 rows"),
    ],
)
def test_configurations(
    changes: dict[str, Any], kind: type[EdgeLLMError], match: str, checkpoint: Path
) -> None:
    edit(checkpoint, **changes)
    refused(checkpoint, kind, match, via="optimum")


def test_a_length_that_nobody_states(tiny_checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 400}
    model = BloomForCausalLM(BloomConfig(**sizes, bos_token_id=None, eos_token_id=1))
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / file, checkpoint / file)
    refused(checkpoint, CheckpointError, "how long a sequence .*--max-context")
    manifest = export_model(checkpoint, tmp_path / "bundle", max_context=100)
    assert manifest.dims.context == 100


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda weights: weights.pop("transformer.h.0.mlp.c_fc.weight"), "mlp.c_fc.weight'"),
        (lambda weights: weights["transformer.wte.weight"][3].fill_(np.nan), "not a number"),
    ],
)
def test_weights(change: Edit, match: str, checkpoint: Path) -> None:
    edit_weights(checkpoint, change)
    refused(checkpoint, CheckpointError, match)


def test_tensors_that_are_not_used_are_named(checkpoint: Path, tmp_path: Path) -> None:
    edit_weights(checkpoint, lambda weights: weights.update(adapter=torch.zeros(2)))
    said: list[str] = []
    export_model(checkpoint, tmp_path / "bundle", via="optimum", warn=said.append)
    (text,) = said
    assert text.startswith("1 tensors of the checkpoint, such as 'adapter', are not used by")


def test_without_optimum_the_extra_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "optimum", None)
    for name in [name for name in sys.modules if name.startswith("optimum.")]:
        monkeypatch.delitem(sys.modules, name)
    refused(checkpoint, ExportError, "'gpt_neo' takes optimum, which cannot be imported")
    output = str(checkpoint.parent / "bundle")
    assert main(["export", str(checkpoint), "-o", output]) == 1
    _, error = capsys.readouterr()
    assert error.endswith("Install what it needs with `pip install 'edge-llm[optimum]'`.\n")


def test_the_command_says_who_exports(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ["export", str(checkpoint), "-o", str(tmp_path / "bundle")]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == (
        "edge-llm: the graph builder does not know the model_type 'gpt_neo': optimum exports it\n"
    )
    assert out.startswith("Wrote ")
    assert main([*argv, "--via", "optimum", "--overwrite"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*argv, "--via", "builder", "--overwrite"]) == 1
    assert "--via optimum" in capsys.readouterr().err


def test_a_failing_exporter_leaves_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optimum.exporters.onnx as exporters

    def fail(model: object, output: Path, **_: object) -> NoReturn:
        output.mkdir()
        (output / "model.onnx").write_bytes(b"half")
        raise RuntimeError("no operator\nand a stack")

    monkeypatch.setattr(exporters, "onnx_export_from_model", fail)
    refused(
        checkpoint,
        UnsupportedModelError,
        "cannot export this 'gpt_neo' .*RuntimeError: no operator. Please",
    )


def test_nothing_but_weights_and_sizes_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code, kernels, adapters and pickles beside the weights are not looked at, nor the network."""
    (checkpoint / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    kernel = {"attn_implementation": "no/body", "_attn_implementation_internal": "no/body"}
    edit(checkpoint, auto_map=code, _name_or_path="no/body", **kernel)
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "nobody/base"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter))
    made: list[object] = []

    class Socket(socket.socket):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(arguments)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(socket, "socket", Socket)
    export_model(checkpoint, tmp_path / "bundle", quantize="fp32")
    assert made == []
    assert not (tmp_path / "ran").exists()


def traced(
    inputs: dict[str, list[int | str]], outputs: dict[str, list[int | str]], kind: int = 1
) -> onnx.GraphProto:
    takes, gives = (
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in part.items()]
        for part in (inputs, outputs)
    )
    return helper.make_graph([], "traced", takes, gives)


PAST: dict[str, list[int | str]] = {"past_key_values.0.key": ["b", 2, "p", 8]}
PRESENT: dict[str, list[int | str]] = {"present.0.key": ["b", 2, "t", 8], "logits": ["b", "n", 9]}


@pytest.mark.parametrize(
    ("inputs", "outputs", "match"),
    [
        ({"pixel_values": ["b", 3]}, PRESENT, "asks for 'pixel_values'"),
        (PAST, {"logits": ["b", "n", 9]}, "no output 'present.0.key'"),
        (PAST, PRESENT | {"present.0.key": ["b", 4, "t", 8]}, "of the shape of"),
        (PAST, PRESENT | {"present.1.key": ["b", 2, "t", 8]}, "has the outputs .*present.1.key"),
        (PAST, {"present.0.key": ["b", 2, "t", 8]}, "has the outputs present.0.key;"),
        ({}, {"logits": ["b", "n", 9]}, "has the outputs logits;"),
        ({"past_key_values.0.key": ["b", "p", 16]}, PRESENT, r"FLOAT \['b', 'p', 16\]"),
        ({"past_key_values.0.key": ["b", "h", "p", 8]}, PRESENT, "'h', 'p', 8"),
    ],
)
def test_interfaces_that_are_no_decoders(
    inputs: dict[str, list[int | str]], outputs: dict[str, list[int | str]], match: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        read_state(traced(inputs, outputs))


def test_a_state_of_halves_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"is FLOAT16 \["):
        read_state(traced(PAST, PRESENT, TensorProto.FLOAT16))


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Trace]:
    """A function that writes a graph whose logits are the number of tokens seen."""

    def make(*, kept: int = 1 << 30, frozen: bool = False, expected: float = 0.0) -> Trace:
        number = numpy_helper.from_array(np.ones((9, 1), np.float32), "ones")
        past = [helper.make_tensor_value_info("past_key_values.0.key", 1, ["b", 1, "p", 1])]
        ends = [
            numpy_helper.from_array(np.array([one]), f"c{i}") for i, one in enumerate((0, kept, 2))
        ]
        shape = numpy_helper.from_array(np.array([1, 1, -1, 1]), "shape")
        flat = numpy_helper.from_array(np.array([1, -1, 1]), "flat")
        nodes = [
            helper.make_node("Gather", ["ones", "input_ids"], ["rows"]),
            helper.make_node("Reshape", ["rows", "shape"], ["new"]),
            helper.make_node("Concat", ["past_key_values.0.key", "new"], ["all"], axis=2),
            helper.make_node("Slice", ["all", "c0", "c1", "c2"], ["present.0.key"]),
            helper.make_node("ReduceSum", ["new" if frozen else "all", "c2"], ["sum"]),
            helper.make_node("Reshape", ["sum", "flat"], ["total"]),
            helper.make_node("Mul", ["rows", "total"], ["wide"]),
            helper.make_node("Concat", ["wide", "rows"], ["logits"], axis=2),
        ]
        outputs = [
            helper.make_tensor_value_info("present.0.key", 1, ["b", 1, "t", 1]),
            helper.make_tensor_value_info("logits", 1, ["b", "n", 2]),
        ]
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "n"])
        graph = helper.make_graph(nodes, "toy", [ids, *past], outputs, [number, shape, flat, *ends])
        opsets = [helper.make_opsetid("", 18)]
        path = tmp_path / "model.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        seen = np.repeat(np.cumsum(STEPS), STEPS).astype(np.float32)
        logits = np.stack([seen + np.float32(expected), np.ones_like(seen)], axis=1)
        return Trace(graph=path, parameters=9, tokens=np.arange(len(seen)) % 9, logits=logits)

    return make


def check(trace: Trace) -> None:
    state = read_state(onnx.load(trace.graph).graph)
    compare(trace, state, minimum="1.32")


def test_a_trace_that_computes_the_same_passes(toy: Callable[..., Trace]) -> None:
    check(toy())


def test_a_trace_that_forgets_its_past_is_refused(toy: Callable[..., Trace]) -> None:
    with pytest.raises(VerificationError, match=f"from token {STEPS[0]} on"):
        check(toy(frozen=True))


@pytest.mark.parametrize("expected", [0.1, np.nan])
def test_a_trace_with_other_logits_is_refused(expected: float, toy: Callable[..., Trace]) -> None:
    with pytest.raises(VerificationError, match=r"logits differ .* from token 0 on"):
        check(toy(expected=expected))


def test_a_trace_whose_state_stops_growing_is_refused(toy: Callable[..., Trace]) -> None:
    with pytest.raises(VerificationError, match=r"'present.0.key' has 7 rows after 9 tokens"):
        check(toy(kept=7))


def test_a_trace_that_does_not_run_is_refused(toy: Callable[..., Trace]) -> None:
    trace = toy()
    trace.graph.write_bytes(b"no graph")
    state = read_state(traced(PAST, PRESENT))
    with pytest.raises(VerificationError, match="does not run"):
        compare(trace, state, minimum="1.32")


def test_sizes_that_have_other_names() -> None:
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 77, "vocab_size": 50}
    model = read_model({"model_type": "mpt", "expansion_ratio": 4, **sizes})
    assert (model.hidden, model.heads, model.intermediate, model.context) == (32, 2, 128, 77)


def test_longrope_is_traced_with_its_short_factors_so_it_ends_where_they_do() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 50}
    lengths = {"max_position_embeddings": 1000, "original_max_position_embeddings": 100}
    factors = [1.0] * 8
    rope = {"type": "longrope", "short_factor": factors, "long_factor": factors}
    settings = {"model_type": "phi3", "pad_token_id": None, **sizes, **lengths}
    assert read_model(settings).context == 1000
    assert read_model(settings | {"rope_scaling": rope}).context == 100
