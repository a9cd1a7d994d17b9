"""The checkpoint in the repository, and the bundle in the package that comes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_llm import LLM
from edge_llm.builtin import BUNDLE
from edge_llm.manifest import Manifest
from edge_llm_export.builtin.answer import parse
from edge_llm_export.builtin.bundle import export_builtin
from edge_llm_export.builtin.evaluation import exact_match, held_out_split, read_pairs
from edge_llm_export.builtin.sensors import is_sensor
from edge_llm_export.builtin.train import CHECKPOINT
from edge_llm_export.quantize.packing import unpack
from edge_llm_export.quantize.rtn import dequantize_blocks


def weights(bundle: Path) -> dict[str, NDArray[Any]]:
    """Every stored weight of a bundle, dequantized."""
    model = onnx.load(bundle / "model.onnx")
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    found: dict[str, NDArray[Any]] = {}
    for name, value in stored.items():
        if name.endswith("weight_q8"):
            scales = stored[name.removesuffix("q8") + "scales"]
            columns = value.shape[1] * value.shape[2]
            found[name] = dequantize_blocks(unpack(value, 8), scales, bits=8, columns=columns)
        elif not name.endswith(("scales", "_gather_scales")):
            found[name] = value
    return found


def test_the_bundle_is_the_checkpoints_export(tmp_path: Path) -> None:
    export_builtin(tmp_path / "again")
    shipped, again = weights(BUNDLE), weights(tmp_path / "again")
    assert shipped.keys() == again.keys()
    assert sum(name.endswith("weight_q8") for name in shipped) == 21
    for name, value in shipped.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    one, two = (
        Manifest.from_json((folder / "manifest.json").read_text())
        for folder in (BUNDLE, tmp_path / "again")
    )
    for key in ("dims", "tokens", "sampling", "quantization", "chat", "decoder"):
        assert getattr(one, key) == getattr(two, key), key


def test_sizes() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 8_000_000
    manifest = json.loads((BUNDLE / "manifest.json").read_text())
    assert manifest["dims"]["parameters"] <= 4_000_000
    assert manifest["dims"]["hidden"] % 256 == manifest["dims"]["intermediate"] % 256 == 0


@pytest.fixture(scope="module")
def answered() -> tuple[Any, list[str]]:
    """Some of the held-out split (the benchmark asks all of it), and the package's answers."""
    samples = held_out_split(400)
    with LLM(BUNDLE) as llm:
        answers = [llm.chat([{"role": "user", "content": one.request}]).text for one in samples]
    return samples, answers


def test_held_out_requests_are_understood(answered: tuple[Any, list[str]]) -> None:
    samples, answers = answered
    right, total = exact_match(samples, answers)["all"]
    assert right / total >= 0.97


def test_requests_that_the_generator_did_not_make_are_understood() -> None:
    pairs = read_pairs(Path(__file__).parents[1] / "data" / "builtin_independent.jsonl")
    with LLM(BUNDLE) as llm:
        given = [llm.chat([{"role": "user", "content": one.request}]).text for one in pairs]
    right, total = exact_match(pairs, given)["all"]
    assert right / total >= 0.95


def test_every_answer_has_the_contracts_shape(answered: tuple[Any, list[str]]) -> None:
    for sample, answer in zip(*answered, strict=True):
        if is_sensor(sample.request):
            assert answer.endswith(".")
        else:
            parse(answer)
