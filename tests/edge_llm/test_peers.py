"""Folders of optimum and onnxruntime-genai: transformers' logits, and the peers' own tokens."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.errors import ContextLengthError
from edge_llm.manifest import Manifest
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import create_session, import_onnxruntime

BUILDER = Path(__file__).parents[2] / "benchmarks" / "genai_builder.py"
PROMPT = np.random.default_rng(1).integers(2, 400, 50)


def decoder_of(folder: Path) -> Decoder:
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    session = create_session(folder / "model.onnx", threads=1, minimum="1.32")
    return open_decoder(session, manifest, capacity=128)


def feed(decoder: Decoder, tokens: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
    """Logits of every token, fed from an empty cache in chunks."""
    decoder.cache.truncate(0, 0)
    parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    return np.concatenate([decoder.step(part, scored=len(part)).copy() for part in parts])


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


def write_gpt2(folder: Path) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, eos_token_id=1, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    model.save_pretrained(folder)
    return model


def export_optimum(checkpoint: Path, folder: Path) -> None:
    import_onnxruntime()  # before optimum does it, with its telemetry on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.exporters.onnx import main_export

        main_export(str(checkpoint), folder, task="text-generation-with-past", do_validation=False)


def export_genai(checkpoint: Path, folder: Path) -> None:
    options = ["-p", "fp32", "-e", "cpu", "-c", str(folder.parent / "cache")]
    subprocess.run(
        [sys.executable, BUILDER, "-i", checkpoint, "-o", folder, *options],
        check=True,
        capture_output=True,
        timeout=120,
    )


LAYOUTS = {"optimum gpt2": "standard.v1", "optimum llama": "standard.v1", "genai": "genai.v1"}


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(
    request: pytest.FixtureRequest,
    make_llama: Callable[..., Any],
    manifest_for: Callable[..., Manifest],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str, Any]:
    """A folder that is a bundle too, its layout, and the transformers model that it was made of."""
    name: str = request.param
    folder = tmp_path_factory.mktemp("exported")
    checkpoint, target = folder / "checkpoint", folder / name
    model = make_llama(checkpoint, hidden_size=128)
    if name == "optimum gpt2":
        model = write_gpt2(checkpoint)
    (export_genai if name == "genai" else export_optimum)(checkpoint, target)
    (target / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    manifest = manifest_for(target / "model.onnx", LAYOUTS[name], vocab=400, context=256)
    (target / "manifest.json").write_text(manifest.to_json())
    return target, LAYOUTS[name], model


def greedy(model: Any, tokens: int) -> list[int]:
    """What transformers answers."""
    answer = model.generate(
        torch.tensor(PROMPT[None]),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return cast("list[int]", answer[0, len(PROMPT) :].tolist())


def test_logits_equal_transformers(exported: tuple[Path, str, Any]) -> None:
    folder, _, model = exported
    tokens = np.concatenate([PROMPT, greedy(model, 32)])
    with torch.no_grad():
        expected = model(torch.tensor(tokens[None])).logits[0].numpy()
    decoder = decoder_of(folder)
    for chunk in (len(tokens), 7, 1):
        assert relative_error(feed(decoder, tokens, chunk), expected) < 1e-4
    # Rolled back and fed again; another end in between.
    for length in (60, 20, 1):
        assert decoder.cache.truncate(0, length) == length
        decoder.step([5, 6, 7], scored=1)
        assert decoder.cache.truncate(0, length) == length
        got = decoder.step(tokens[length : length + 9], scored=4)
        assert relative_error(got, expected[length + 5 : length + 9]) < 1e-4


def test_the_same_tokens_as_the_peer(exported: tuple[Path, str, Any]) -> None:
    folder, layout, model = exported
    peer = genai_greedy if layout == "genai.v1" else optimum_greedy
    expected = peer(folder, 64)
    assert expected == greedy(model, 64)
    for chunk in (None, 7, 1):
        with LLM(folder, prefill_chunk=chunk) as llm:
            got = llm.generate(PROMPT.tolist(), max_tokens=64, temperature=0)
            assert list(got.tokens) == expected[: len(got.tokens)]
            assert len(got.tokens) == 64 or got.tokens[-1] == 1


def optimum_greedy(folder: Path, tokens: int) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.onnxruntime import ORTModelForCausalLM

        return greedy(ORTModelForCausalLM.from_pretrained(folder), tokens)


def genai_greedy(folder: Path, tokens: int) -> list[int]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    length = len(PROMPT) + tokens
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(PROMPT.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]


def test_scores_reuse_and_limits(exported: tuple[Path, str, Any]) -> None:
    folder, _, model = exported
    with torch.no_grad():
        logits = model(torch.tensor(PROMPT[None])).logits[0]
    expected = logits.log_softmax(-1)[range(49), torch.tensor(PROMPT[1:])].numpy()
    with LLM(folder, context=80) as llm:
        got = llm.score(PROMPT.tolist())
        assert np.abs(np.array(got.logprobs) - expected).max() < 1e-3
        first = llm.generate(PROMPT.tolist(), max_tokens=5, temperature=0)
        assert first.usage.reused_tokens == 48
        again = llm.generate([*PROMPT.tolist(), *first.tokens], max_tokens=5, temperature=0)
        assert again.usage.reused_tokens == 53
        with LLM(folder, context=80) as fresh:
            unaided = fresh.generate([*PROMPT.tolist(), *first.tokens], max_tokens=5, temperature=0)
        assert again.tokens == unaided.tokens
        with pytest.raises(ContextLengthError):
            llm.generate(PROMPT.tolist(), max_tokens=31)
        assert llm.generate(PROMPT.tolist(), max_tokens=30, min_tokens=30).tokens


def test_a_cancelled_request_leaves_a_valid_cache(exported: tuple[Path, str, Any]) -> None:
    folder, _, _ = exported
    with LLM(folder, prefill_chunk=4) as llm:
        expected = llm.generate(PROMPT.tolist(), max_tokens=8, temperature=0).tokens
        llm.generate([7, 8, 9], max_tokens=1)
        event = threading.Event()

        def stop_half_way(done: int, total: int) -> None:
            if done >= total // 2:
                event.set()

        llm.generate(PROMPT.tolist(), max_tokens=8, cancel=event, on_prompt=stop_half_way)
        assert llm.generate(PROMPT.tolist(), max_tokens=8, temperature=0).tokens == expected
