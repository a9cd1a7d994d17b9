"""Sliding layers in window-sized caches, far beyond their window, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.bundle import Bundle
from edge_llm.runtime.kv_cache import WINDOW_SLACK
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.own_layout import OwnDecoder
from edge_llm.runtime.session import create_session
from edge_llm_export import export_model

WINDOW, CONTEXT = 64, 1024
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma3_text": {"head_dim": 16, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
}
# Longer than three windows, and long enough for the slack to run full before the answer and in it.
PROMPT = np.random.default_rng(3).integers(2, 400, WINDOW + WINDOW_SLACK + 30)
ANSWER = np.random.default_rng(4).integers(2, 400, 64)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(
    request: pytest.FixtureRequest,
    make_checkpoint: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, NDArray[np.float32]]:
    """A bundle, and transformers' logits of prompt and answer."""
    folder = tmp_path_factory.mktemp("windows")
    model = make_checkpoint(
        folder / "checkpoint",
        request.param,
        sliding_window=WINDOW,
        max_position_embeddings=CONTEXT,
        **FAMILIES[request.param],
    )
    export_model(folder / "checkpoint", folder / "bundle", quantize="fp32")
    with torch.no_grad():
        logits = model(torch.tensor(np.concatenate([PROMPT, ANSWER])[None])).logits[0].numpy()
    return folder / "bundle", logits


def open_bundle(folder: Path) -> OwnDecoder:
    bundle = Bundle.open(folder)
    session = create_session(bundle.file("model.onnx"), threads=1, minimum="1.32")
    decoder = open_decoder(session, bundle.manifest, capacity=CONTEXT)
    assert isinstance(decoder, OwnDecoder)
    return decoder


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


def test_logits_equal_transformers(exported: tuple[Path, NDArray[np.float32]]) -> None:
    folder, expected = exported
    decoder = open_bundle(folder)
    for chunk in (len(PROMPT), 512, 100):
        decoder.cache.truncate(0, 0)
        parts = [PROMPT[i : i + chunk] for i in range(0, len(PROMPT), chunk)]
        rows = [decoder.step(part, scored=len(part)).copy() for part in parts]
        rows += [decoder.step([token], scored=1).copy() for token in ANSWER]
        assert relative_error(np.concatenate(rows), expected) < 1e-4
    # Back to where the windows still reach, and on with several tokens at once.
    length = len(PROMPT) + 20
    assert decoder.cache.truncate(0, length) == length
    got = decoder.step(ANSWER[20:30], scored=10)
    assert relative_error(got, expected[length : length + 10]) < 1e-4
    assert decoder.cache.truncate(0, WINDOW) == 0


def test_the_buffers_are_the_windows(exported: tuple[Path, NDArray[np.float32]]) -> None:
    folder, _ = exported
    state = Bundle.open(folder).manifest.decoder.state
    windows = [one.window for one in state]
    assert WINDOW in windows
    buffers = open_bundle(folder).cache.buffers
    for one in state:
        rows = CONTEXT if one.window is None else WINDOW + WINDOW_SLACK
        assert buffers[one.input].shape[2] == rows
    # A context that no window is shorter than has none.
    checkpoint = folder.with_name("checkpoint")
    whole = export_model(checkpoint, folder.with_name("short"), quantize="fp32", max_context=WINDOW)
    assert {one.kind for one in whole.decoder.state} == {"kv"}


def test_scores_and_reuse(exported: tuple[Path, NDArray[np.float32]]) -> None:
    folder, logits = exported
    tokens = np.concatenate([PROMPT, ANSWER])
    rows = torch.tensor(logits[:-1]).log_softmax(-1).numpy()
    with LLM(folder) as llm:
        got = np.array(llm.score(tokens.tolist()).logprobs)
        expected = rows[np.arange(len(rows)), tokens[1:]]
        assert np.abs(got - expected).max() < 1e-3
        first = llm.generate(PROMPT.tolist(), max_tokens=9, min_tokens=9, temperature=0)
        # The windows have moved on once, but not since the prompt's end.
        assert first.usage.reused_tokens == len(PROMPT) - 2
        turn = [*PROMPT.tolist(), *first.tokens, *ANSWER.tolist()]
        second = llm.generate(turn, max_tokens=9, min_tokens=9, temperature=0)
        assert second.usage.reused_tokens == len(PROMPT) + 8
        edited = llm.generate(PROMPT[:100].tolist(), max_tokens=9, min_tokens=9, temperature=0)
        assert edited.usage.reused_tokens == 0
    for prompt, answer in ((turn, second), (PROMPT[:100].tolist(), edited)):
        with LLM(folder) as fresh:
            alone = fresh.generate(prompt, max_tokens=9, min_tokens=9, temperature=0)
        assert alone.tokens == answer.tokens
