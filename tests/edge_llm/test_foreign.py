"""Other programs' ONNX folders: opened as they are, imported, and refused by name."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_llm import LLM, Bundle
from edge_llm.cli.main import main
from edge_llm.errors import (
    ArgumentError,
    BundleError,
    BundleNotFoundError,
    CheckpointError,
    ExportError,
    IntegrityError,
    UnsupportedFormatError,
)
from edge_llm.foreign.transformers_js import preference
from edge_llm.importing import import_folder
from edge_llm.manifest import TensorQuantization
from edge_llm.runtime.session import import_onnxruntime

BUILDER = Path(__file__).parents[2] / "benchmarks" / "genai_builder.py"
PROMPT = np.random.default_rng(3).integers(2, 350, 24).tolist()
TOKENS = 24
VARIANTS = ("q4", "int8", "fp32", "fp16")


def quantize(folder: Path) -> None:
    """Make the other variants of a float32 graph, as its conversion for transformers.js would."""
    import_onnxruntime()  # before the others import it, with its telemetry on
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    whole = folder / "model.onnx"
    fours = MatMulNBitsQuantizer(onnx.load(whole), block_size=32, accuracy_level=4)
    fours.process()
    onnx.save(
        fours.model.model,
        folder / "model_q4.onnx",
        save_as_external_data=True,
        location="model_q4.onnx_data",
        size_threshold=0,
    )
    eights = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul"]}
    quantize_dynamic(whole, folder / "model_int8.onnx", **eights)
    onnx.save(convert_float_to_float16(onnx.load(whole)), folder / "model_fp16.onnx")


@contextmanager
def quiet() -> Iterator[None]:
    """Let the peers warn and log as they like."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export_optimum(checkpoint: Path, folder: Path) -> None:
    import_onnxruntime()
    with quiet():
        from optimum.exporters.onnx import main_export

        main_export(str(checkpoint), folder, task="text-generation-with-past", do_validation=False)


@pytest.fixture(scope="module")
def checkpoint(make_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "checkpoint"
    make_llama(folder, hidden_size=128, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def genai(checkpoint: Path) -> Path:
    """A folder that onnxruntime-genai's builder made, int4."""
    folder = checkpoint.parent / "genai"
    options = ["-p", "int4", "-e", "cpu", "-c", str(checkpoint.parent / "cache")]
    subprocess.run(
        [sys.executable, BUILDER, "-i", checkpoint, "-o", folder, *options],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return folder


@pytest.fixture(scope="module")
def transformers_js(checkpoint: Path) -> Path:
    """A folder as onnx-community has them: graphs of several precisions in onnx/."""
    folder = checkpoint.parent / "SmolSomething-ONNX"
    export_optimum(checkpoint, folder)
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")
    with quiet():
        quantize(folder / "onnx")
    # Many folders have the template in tokenizer_config.json only.
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    edit(folder / "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").unlink()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def gpt2(checkpoint: Path) -> Path:
    """An optimum export of GPT-2, with its graph beside config.json."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    source = checkpoint.parent / "gpt2-checkpoint"
    shutil.copytree(checkpoint, source, ignore=shutil.ignore_patterns("*.safetensors", "config*"))
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, bos_token_id=1, eos_token_id=1, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    model.save_pretrained(source)
    folder = checkpoint.parent / "gpt2"
    export_optimum(source, folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")


def answer(folder: Path, **options: Any) -> list[int]:
    """Greedy tokens; the prompt is fed at once, as the peers do."""
    with LLM(folder, prefill_chunk=len(PROMPT), **options) as llm:
        tokens = llm.generate(PROMPT, max_tokens=TOKENS, min_tokens=TOKENS, temperature=0).tokens
    return list(tokens)


def optimum_answer(folder: Path, file: str, subfolder: str = "") -> list[int]:
    import_onnxruntime()
    with quiet():
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        model = ORTModelForCausalLM.from_pretrained(folder, subfolder=subfolder, file_name=file)
        lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        whole = model.generate(torch.tensor([PROMPT]), pad_token_id=0, **lengths)
    return cast("list[int]", whole[0, len(PROMPT) :].tolist())


def genai_answer(folder: Path) -> list[int]:
    import_onnxruntime()
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    length = len(PROMPT) + TOKENS
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(PROMPT, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]


def test_a_genai_folder_answers_as_onnxruntime_genai_does(genai: Path) -> None:
    bundle = Bundle.open(genai)
    manifest = bundle.manifest
    assert manifest.decoder.layout == "genai.v1"
    assert (manifest.quantization.bits, manifest.quantization.block) == (4, 32)
    dims = manifest.dims
    assert (dims.context, dims.hidden, dims.intermediate, dims.head_dim) == (256, 128, None, 16)
    assert manifest.sampling["temperature"] == 0
    assert manifest.tokens.eos == (1,)
    assert set(manifest.files) == {
        *("model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja"),
    }
    assert manifest.producer["onnxruntime-genai"]
    assert (bundle.foreign, bundle.variants) == (True, ())
    assert answer(genai) == genai_answer(genai)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_transformers_js_folder_answers_as_optimum_does(
    transformers_js: Path, variant: str
) -> None:
    file = "model.onnx" if variant == "fp32" else f"model_{variant}.onnx"
    expected = optimum_answer(transformers_js, file, "onnx")
    assert answer(transformers_js, variant=variant) == expected


def test_an_optimum_folder_answers_as_optimum_does(gpt2: Path) -> None:
    bundle = Bundle.open(gpt2)
    assert bundle.manifest.source.architecture == "gpt2"
    assert bundle.manifest.decoder.layout == "standard.v1"
    assert (bundle.manifest.dims.context, bundle.manifest.dims.layers) == (128, 2)
    assert bundle.variants == ("fp32",)
    assert answer(gpt2) == optimum_answer(gpt2, "model.onnx")


def test_the_fastest_variant_is_the_default_and_another_has_to_be_there(
    transformers_js: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(transformers_js)
    assert bundle.variants == VARIANTS
    assert bundle.manifest.decoder.graph == "onnx/model_q4.onnx"
    assert bundle.manifest.info == {"origin": "transformers.js folder", "variant": "q4"}
    assert bundle.manifest.source.license == "apache-2.0"
    with pytest.raises(ArgumentError, match=r"\(q4, int8, fp32, fp16\), got 'q4f16'"):
        LLM(transformers_js, variant="q4f16")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_bytes((transformers_js / "config.json").read_bytes())
    names = ["fp16", "bnb4", "q4f16", "zz", "uint8", "quantized"]
    for name in names:
        (tmp_path / "onnx" / f"model_{name}.onnx").touch()
    for name in ("decoder_model_merged.onnx", "model.onnx_data", "other.onnx"):
        (tmp_path / "onnx" / name).touch()
    with pytest.raises(ArgumentError) as caught:
        Bundle.open(tmp_path, variant="fp32")
    assert "(quantized, uint8, bnb4, q4f16, fp16, zz)" in caught.value.domain


def test_the_default_is_what_the_processor_has_kernels_for() -> None:
    assert preference("x86_64", ["avx2"])[:2] == ("q4", "int8")
    assert preference("aarch64", ["asimddp"])[:2] == ("q4", "int8")
    assert preference("arm64", [])[:2] == ("q4", "int8")
    assert preference("aarch64", [])[:4] == ("int8", "quantized", "uint8", "q4")  # Cortex-A72
    assert preference()[-1] == "fp16"


def test_a_merged_decoder_is_found(gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "merged")
    (folder / "model.onnx").rename(folder / "decoder_model_merged_q4.onnx")
    assert Bundle.open(folder).variants == ("q4",)
    assert answer(folder) == answer(gpt2)


def test_quantization_is_read_from_the_operators(transformers_js: Path, tmp_path: Path) -> None:
    forms = {one: Bundle.open(transformers_js, variant=one).manifest for one in VARIANTS}
    shown = {name: (one.quantization.bits, one.quantization.block) for name, one in forms.items()}
    assert shown == {"q4": (4, 32), "int8": (8, None), "fp32": (32, None), "fp16": (16, None)}
    counts = {manifest.dims.parameters for manifest in forms.values()}
    assert max(counts) < 1.01 * min(counts), "every form holds the same weights"
    folder = shutil.copytree(transformers_js, tmp_path / "mixed")
    model = onnx.load(folder / "onnx" / "model_q4.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    next(one for one in node.attribute if one.name == "bits").i = 8
    onnx.save(model, folder / "onnx" / "model_q4.onnx")
    exceptions = Bundle.open(folder).manifest.quantization.exceptions
    assert exceptions == {node.input[1]: TensorQuantization(bits=8, block=32)}


def snapshot(folder: Path, cache: Path) -> Path:
    """The folder as huggingface_hub's cache holds it: links to blobs."""
    model = cache / "models--some--Model-ONNX"
    commit = model / "snapshots" / ("0123456789" * 4)
    (model / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        link = commit / path.relative_to(folder)
        if path.is_dir():
            link.mkdir(parents=True)
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = model / "blobs" / str(number)
        blob.write_bytes(path.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    return commit


def test_a_cache_of_huggingface_hub_opens(transformers_js: Path, tmp_path: Path) -> None:
    folder = snapshot(transformers_js, tmp_path)
    manifest = Bundle.open(folder).manifest
    assert manifest.name == "Model-ONNX"
    assert (manifest.source.repo, manifest.source.revision) == ("some/Model-ONNX", folder.name)
    assert answer(folder) == answer(transformers_js)
    import_folder(folder, tmp_path / "bundle")
    assert not any(path.is_symlink() for path in (tmp_path / "bundle").rglob("*"))
    assert answer(tmp_path / "bundle") == answer(transformers_js)


def test_an_imported_bundle_is_the_same_model(
    genai: Path, transformers_js: Path, gpt2: Path, tmp_path: Path
) -> None:
    message = [{"role": "user", "content": "Hello"}]
    done: list[tuple[int, int]] = []

    def progress(copied: int, total: int) -> None:
        done.append((copied, total))

    for folder, variant in ((genai, None), (transformers_js, "int8"), (gpt2, None)):
        target = tmp_path / folder.name
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        done.clear()
        manifest = import_folder(folder, target, variant=variant, progress=progress)
        assert done[-1][0] == done[-1][1] == sum(one.size for one in manifest.files.values())
        bundle = Bundle.open(target, verify=True)
        assert bundle.manifest == manifest
        assert not bundle.foreign
        assert "edge-llm" in manifest.producer
        written = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
        assert written == {"manifest.json", *manifest.files}
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        assert answer(target) == answer(folder, variant=variant)
        with LLM(folder, variant=variant) as one, LLM(target) as other:
            assert one.apply_chat_template(message) == other.apply_chat_template(message)
    assert {path.name for path in tmp_path.iterdir()} == {"genai", transformers_js.name, "gpt2"}


def test_an_import_replaces_a_bundle_only_where_asked_for(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "bundle")
    argv = ["import", str(gpt2), "-o", target]
    assert main(argv) == 0
    assert f"edge-llm run -m {target} PROMPT" in capsys.readouterr().out
    assert main(argv) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["manifest"] == json.loads(
        (tmp_path / "bundle" / "manifest.json").read_text(encoding="utf-8")
    )
    assert main(["import", target, "-o", str(tmp_path / "again")]) == 1
    assert "no bundle yet" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_file_that_goes_while_it_is_imported_leaves_nothing(gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "gpt2")

    def lose(done: int, total: int) -> None:
        (folder / "tokenizer.json").unlink(missing_ok=True)

    with pytest.raises(BundleError, match=r"tokenizer\.json' cannot be read"):
        import_folder(folder, tmp_path / "bundle", progress=lose)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


def test_commands_take_such_folders(
    transformers_js: Path, gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(transformers_js)
    assert main(["info", folder]) == 0
    shown = capsys.readouterr().out
    for part in ("transformers.js folder", "q4, int8, fp32, fp16", "not a bundle", "4 bits"):
        assert part in shown
    assert main(["info", folder, "--variant", "int8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["foreign"], document["variants"]) == (True, list(VARIANTS))
    (terms, *_) = document["memory"]["contexts"].values()
    assert terms["weights_file"] == 0  # they lie in the .onnx file itself, which is not mapped
    stored = (transformers_js / "onnx" / "model_int8.onnx").stat().st_size
    assert terms["weights_anonymous"] > 0.9 * stored
    run = ["run", "-m", folder, "--raw", "--max-tokens", "4", "--json", "the best"]
    assert main([*run, "--variant", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 4
    assert main([*run, "--variant", "q8"]) == 1
    assert "--variant must be one of those in" in capsys.readouterr().err
    assert main(["run", "--variant", "q4", "hello"]) == 1
    assert "--variant must be left out with the built-in model" in capsys.readouterr().err
    assert main(["info", str(gpt2), "--verify"]) == 1
    assert "edge-llm import" in capsys.readouterr().err


def test_what_is_no_model_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BundleNotFoundError) as caught:
        LLM(tmp_path)
    for name in ("manifest.json", "genai_config.json", "config.json", "onnx/model*.onnx"):
        assert name in caught.value.message
    assert "edge-llm export" in caught.value.remedy


Change = Callable[[Path], object]


def genai_decoder(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "genai_config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model"]["decoder"] |= changes
        path.write_text(json.dumps(content), encoding="utf-8")

    return change


def genai_model(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "genai_config.json"
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        edit(path, model=model | changes)

    return change


def linked(name: str) -> Change:
    """Put a link out of the folder in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../model.onnx")

    return change


def providers(name: str) -> Change:
    return genai_decoder(session_options={"provider_options": [{name: {}}]})


def graph(change: Callable[[onnx.ModelProto], object]) -> Change:
    def changed(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return changed


def value(name: str, dtype: int, *sizes: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(sizes))


def rename(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for one in (*model.graph.input, *model.graph.output):
            one.name = one.name.replace(old, new)

    return change


def retype(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for one in (*model.graph.input, *model.graph.output):
            if name in one.name:
                one.type.tensor_type.elem_type = TensorProto.BFLOAT16

    return change


def relocate(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return change


def more_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["zebra"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


GENAI: dict[str, tuple[Change, type[BundleError], str]] = {
    "CUDA": (providers("cuda"), UnsupportedFormatError, "execution provider cuda"),
    "DML": (providers("DML"), UnsupportedFormatError, "execution provider DML"),
    "QNN": (providers("qnn"), UnsupportedFormatError, "execution provider qnn"),
    "a pipeline": (
        genai_decoder(pipeline=[{"first": {}}]),
        UnsupportedFormatError,
        r"model\.decoder\.pipeline",
    ),
    "vision": (
        genai_model(vision={"filename": "vision.onnx"}),
        UnsupportedFormatError,
        r"model\.vision",
    ),
    "speech": (genai_model(speech={"filename": "s"}), UnsupportedFormatError, r"model\.speech"),
    "an embedding model": (
        genai_model(embedding={"filename": "e"}),
        UnsupportedFormatError,
        r"model\.embedding",
    ),
    "an encoder": (genai_model(encoder={"filename": "e"}), UnsupportedFormatError, "encoder"),
    "sliding inputs": (
        genai_decoder(sliding_window={"window_size": 8, "slide_inputs": True}),
        UnsupportedFormatError,
        "slide_inputs",
    ),
    "a window that the graph lacks": (
        genai_decoder(sliding_window={"window_size": 16, "layers": []}),
        UnsupportedFormatError,
        "attends to all tokens; .* sliding_window 16",
    ),
    "other layers": (genai_decoder(num_hidden_layers=7), IntegrityError, "2 layers of .* 7 layers"),
    "other heads": (genai_decoder(num_attention_heads=3), IntegrityError, "layers of 3 heads"),
    "a linked graph": (linked("model.onnx"), IntegrityError, "'model.onnx' is a link"),
    "a linked tokenizer": (linked("tokenizer.json"), IntegrityError, "'tokenizer.json' is a link"),
    "a linked template": (
        linked("chat_template.jinja"),
        IntegrityError,
        "'chat_template.jinja' is a link to a place outside",
    ),
    "another name of the tokens": (
        genai_decoder(inputs={"input_ids": "tokens"}),
        UnsupportedFormatError,
        "input_ids is 'tokens'",
    ),
    "a pattern without a layer": (
        genai_decoder(inputs={"past_key_names": "past"}),
        CheckpointError,
        "one %d",
    ),
    "a graph above": (
        genai_decoder(filename="../model.onnx"),
        IntegrityError,
        r"'\.\./model\.onnx' is not a relative path",
    ),
    "an absolute graph": (genai_decoder(filename="/model.onnx"), IntegrityError, "relative path"),
    "no graph": (genai_decoder(filename="other.onnx"), IntegrityError, "other.onnx cannot be read"),
    "a list for an object": (genai_model(decoder=[]), CheckpointError, "decoder must be an object"),
    "a text for a size": (genai_decoder(head_size="16"), CheckpointError, "head_size must be"),
    "no context": (genai_model(context_length=None), IntegrityError, "how long a text"),
    "another vocabulary": (genai_model(vocab_size=500), IntegrityError, "400 logits .* 500 tokens"),
    "eos beyond it": (genai_model(eos_token_id=[1, 400]), CheckpointError, "eos_token_id is 400"),
    "a tokenizer beyond it": (more_tokens, CheckpointError, "ids up to 400"),
    "broken JSON": (
        lambda folder: (folder / "genai_config.json").write_text("{"),
        CheckpointError,
        "genai_config.json cannot be read as JSON",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        CheckpointError,
        "no tokenizer.json",
    ),
    "other inputs": (
        graph(lambda m: m.graph.input.append(value("encoder_hidden_states", TensorProto.FLOAT))),
        UnsupportedFormatError,
        "'encoder_hidden_states'",
    ),
    "embeddings in": (
        graph(rename("input_ids", "inputs_embeds")),
        UnsupportedFormatError,
        "'inputs_embeds'",
    ),
    "no cache": (
        graph(lambda m: [m.graph.input.pop() for _ in range(4)]),
        UnsupportedFormatError,
        "no key/value cache",
    ),
    "no output for a cache": (
        graph(rename("present.1.key", "there.1.key")),
        UnsupportedFormatError,
        r"no output 'present\.1\.key'",
    ),
    "no logits": (graph(rename("logits", "scores")), UnsupportedFormatError, "no output 'logits'"),
    "bfloat16": (
        graph(retype("key")),
        UnsupportedFormatError,
        r"'past_key_values\.0\.key' is bfloat16",
    ),
    "bfloat16 logits": (
        graph(retype("logits")),
        UnsupportedFormatError,
        r"'logits' \(bfloat16\)",
    ),
    "a cache of fixed length": (
        graph(
            lambda m: m.graph.input[2].CopyFrom(
                value(m.graph.input[2].name, TensorProto.FLOAT, 1, 4, 256, 8)
            )
        ),
        UnsupportedFormatError,
        r"\[1, 4, 256, 8\]",
    ),
    "weights above": (
        graph(relocate("../model.onnx.data")),
        IntegrityError,
        r"'\.\./model\.onnx\.data' is not a relative path",
    ),
    "absolute weights": (graph(relocate("/etc/hostname")), IntegrityError, "'/etc/hostname' is"),
    "weights of another size": (
        lambda folder: os.truncate(folder / "model.onnx.data", 1000),
        IntegrityError,
        "reaches to byte .* of 'model.onnx.data', which has 1000",
    ),
    "10 GB": (
        graph(lambda m: m.graph.initializer[0].dims.insert(0, 1_000_000)),
        IntegrityError,
        "takes 204800000000 bytes, but 204800 are stated",
    ),
}

_opened: list[str] | None = None


def watch(event: str, details: tuple[Any, ...]) -> None:
    if (
        _opened is not None
        and event == "open"
        and isinstance(details[0], str | bytes | os.PathLike)
    ):
        _opened.append(os.fsdecode(details[0]))


sys.addaudithook(watch)


@contextmanager
def only_inside(folder: Path) -> Iterator[None]:
    """Fail where Python opens a file outside the folder, save its own modules."""
    global _opened
    _opened = []
    try:
        yield
    finally:
        opened, _opened = _opened, None
    outside = {path for path in opened if not Path(path).resolve().is_relative_to(folder)}
    assert {path for path in outside if not path.endswith((".py", ".pyc"))} == set()


@pytest.mark.parametrize("name", GENAI)
def test_a_genai_folder_that_cannot_be_run_is_refused_by_name(
    name: str, genai: Path, tmp_path: Path
) -> None:
    change, kind, message = GENAI[name]
    folder = shutil.copytree(genai, tmp_path / "model")
    shutil.copy(genai / "model.onnx", tmp_path)
    shutil.copy(genai / "model.onnx.data", tmp_path)
    change(folder)
    with only_inside(folder), pytest.raises(kind, match=message) as caught:
        Bundle.open(folder)
    assert isinstance(caught.value, BundleError)
    assert caught.value.remedy
    with pytest.raises(kind):
        import_folder(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_other_names_of_the_cache_are_honoured(genai: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(genai, tmp_path / "model")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, one in enumerate(names):
                names[place] = one.replace("past_key_values.", "kv_in_").replace("present.", "out-")
    rename("past_key_values.", "kv_in_")(model)
    rename("present.", "out-")(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    kinds = ("key", "value")
    genai_decoder(
        inputs={f"past_{kind}_names": f"kv_in_%d.{kind}" for kind in kinds},
        outputs={f"present_{kind}_names": f"out-%d.{kind}" for kind in kinds},
    )(folder)
    decoder = Bundle.open(folder).manifest.decoder
    assert [(one.input, one.output) for one in decoder.state[:2]] == [
        ("kv_in_0.key", "out-0.key"),
        ("kv_in_0.value", "out-0.value"),
    ]
    assert answer(folder) == answer(genai)


def test_the_search_section_gives_the_defaults_of_sampling(genai: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(genai, tmp_path / "model")
    search = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "max_length": 5}
    edit(folder / "genai_config.json", search=search | {"min_length": 3, "num_beams": 4})
    manifest = Bundle.open(folder).manifest
    assert manifest.sampling == {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    assert manifest.info["ignored_generation_config"] == ["num_beams"]


def test_a_cache_is_shared_only_where_attention_alone_touches_it(
    genai: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(genai, tmp_path / "model")
    name = "past_key_values.1.value"
    graph(lambda m: m.graph.node.append(helper.make_node("Shape", [name], ["length"])))(folder)
    decoder = Bundle.open(folder).manifest.decoder
    assert decoder.layout == "standard.v1"
    assert not any(one.shared for one in decoder.state)
    assert answer(folder) == answer(genai)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: edit(folder / "config.json", is_encoder_decoder=True),
            "is_encoder_decoder",
        ),
        (lambda folder: edit(folder / "config.json", vision_config={}), "vision_config"),
        (lambda folder: (folder / "encoder_model.onnx").touch(), r"encoder_model\.onnx"),
        (
            lambda folder: [
                (folder / "onnx").mkdir(),
                (folder / "model.onnx").rename(folder / "onnx" / "decoder_model_merged.onnx"),
                (folder / "onnx" / "vision_encoder_q4.onnx").touch(),
            ],
            r"onnx/vision_encoder_q4\.onnx",
        ),
    ],
)
def test_more_than_a_decoder_is_refused_by_name(
    change: Change, message: str, gpt2: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "model")
    change(folder)
    with pytest.raises(UnsupportedFormatError, match=message):
        Bundle.open(folder)


def test_an_operator_that_is_not_there_is_named(gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "model")

    def replace(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Tanh")
        node.op_type, node.domain = "WarpSpeed", "org.starship"
        model.opset_import.append(helper.make_opsetid("org.starship", 1))

    graph(replace)(folder)
    with pytest.raises(UnsupportedFormatError, match=r"operator org\.starship:WarpSpeed"):
        LLM(folder)


def test_weights_of_another_shape_are_a_typed_error(gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "model")
    edit(folder / "config.json", n_positions="many")
    with pytest.raises(CheckpointError, match="n_positions must be an integer"):
        LLM(folder)
    edit(folder / "config.json", n_positions=128, vocab_size=300)
    with pytest.raises(IntegrityError, match=r"400 logits for a token; .* 300 tokens"):
        LLM(folder)


def test_errors_of_a_models_files_are_both_families(gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("[]")
    for family in (BundleError, ExportError):
        with pytest.raises(family, match="must hold an object"):
            LLM(folder)
