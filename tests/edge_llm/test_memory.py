"""What a model is predicted to take, against what ONNX Runtime packs and what numpy allocates."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm import LLM, ArgumentError, Bundle
from edge_llm.compiled import CompiledModels
from edge_llm.errors import MemoryLimitError
from edge_llm.foreign.onnx_file import OnnxModel, read_onnx
from edge_llm.memory import MemoryEstimate, estimate_memory, fitting_context, parse_bytes
from edge_llm.runtime import device
from edge_llm.runtime.kv_cache import KVCache
from edge_llm.tuning import Tuning, save_tuning
from edge_llm_export import export_model


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="kernels of others pack otherwise"
)
@pytest.mark.parametrize("quantize", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_bytes_are_those_that_onnxruntime_writes(
    quantize: str, tied: bool, make_llama: Callable[..., Any], tmp_path: Path
) -> None:
    make_llama(tmp_path / "checkpoint", tie_word_embeddings=tied, intermediate_size=192)
    export_model(tmp_path / "checkpoint", tmp_path / "bundle", quantize=quantize)
    bundle = Bundle.open(tmp_path / "bundle")
    graph = CompiledModels(tmp_path / "compiled").compile(bundle, threads=1)
    assert graph is not None
    packed = 0
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key.startswith("prepacked"):  # name|offset;length;checksum
                packed += int(entry.value.split("|")[1].split(";")[1])
    plain = estimate_memory(bundle, context=64)
    compiled = estimate_memory(bundle, context=64, compiled=graph)
    moved = plain.weights_anonymous - compiled.weights_anonymous
    assert moved == pytest.approx(packed, rel=0.02)
    assert compiled.weights_file - plain.weights_file == moved
    assert compiled.total == plain.total


def test_the_cache_is_told_to_the_byte(tiny_bundle: Path) -> None:
    sizes: Any = {"context": 100, "slots": 3, "prefill_chunk": 8}
    with LLM(tiny_bundle, **sizes) as llm:
        cache = KVCache(llm.manifest.decoder.state, rows=3, capacity=100)
        assert llm.memory.kv == sum(array.nbytes for array in cache.buffers.values())
        assert llm.memory == estimate_memory(Bundle.open(tiny_bundle), **sizes)
    assert llm.memory.scratch < estimate_memory(Bundle.open(tiny_bundle), context=100).scratch
    terms = ("weights_file", "weights_anonymous", "kv", "scratch", "runtime")
    assert llm.memory.total == sum(getattr(llm.memory, one) for one in terms)


def test_a_limit_gives_the_longest_context_that_fits(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    limit = estimate_memory(bundle, context=100).total
    with LLM(tiny_bundle, memory_limit=limit) as llm:
        assert llm.context == 100
        assert llm.memory.total <= limit
    with LLM(tiny_bundle, memory_limit=limit - 1) as llm:
        assert llm.context == 99
    with LLM(tiny_bundle, memory_limit="100GB") as llm:
        assert llm.context == bundle.manifest.dims.context


def test_slots_take_what_is_left_of_a_limit(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    one, three = (estimate_memory(bundle, context=100, slots=n) for n in (1, 3))
    assert three.kv == 3 * one.kv
    with LLM(tiny_bundle, context=100, memory_limit=three.total) as llm:
        assert llm.slots == 3
        assert llm.memory == three
    with LLM(tiny_bundle, context=100, memory_limit=three.total - 1) as llm:
        assert llm.slots == 2
    # Slots that were asked for shorten the context, if need be.
    with LLM(tiny_bundle, slots=5, memory_limit=three.total) as llm:
        assert llm.slots == 5
        assert llm.context < 100
    with LLM(tiny_bundle) as llm:
        assert llm.slots == 4
    for wrong in (0, 65, True, "2"):
        with pytest.raises(ArgumentError, match="slots must be an integer from 1 to 64"):
            LLM(tiny_bundle, slots=wrong)  # type: ignore[arg-type]


def test_the_graph_is_read_once_for_a_limit(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = estimate_memory(Bundle.open(tiny_bundle), context=100).total
    reads: list[Path] = []

    def read(path: Path) -> OnnxModel:
        reads.append(path)
        return read_onnx(path)

    monkeypatch.setattr("edge_llm.memory.read_onnx", read)
    with LLM(tiny_bundle, memory_limit=limit) as llm:
        assert llm.memory.total <= limit
    assert len(reads) == 1


def test_what_was_tuned_bounds_a_step(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    save_tuning(bundle, Tuning(threads=1, prefill_chunk=16), cache_dir=tmp_path)
    with LLM(tiny_bundle, cache_dir=tmp_path, slots=1) as llm:
        assert llm.memory.scratch == estimate_memory(bundle, context=64, prefill_chunk=16).scratch


@given(context=st.integers(2, 256), over=st.integers(0, 10_000))
def test_nothing_longer_would_fit(tiny_bundle: Path, context: int, over: int) -> None:
    bundle = Bundle.open(tiny_bundle)
    limit = estimate_memory(bundle, context=context).total + over
    found = fitting_context(
        lambda context: estimate_memory(bundle, context=context),
        longest=256,
        shortest=2,
        limit=limit,
    )
    assert found >= context
    assert estimate_memory(bundle, context=found).total <= limit
    assert found == 256 or estimate_memory(bundle, context=found + 1).total > limit


def test_too_low_a_limit_is_refused_with_the_sum(tiny_bundle: Path) -> None:
    with pytest.raises(MemoryLimitError) as caught:
        LLM(tiny_bundle, memory_limit="50MB")
    error = caught.value
    least = estimate_memory(Bundle.open(tiny_bundle), context=2)
    assert (error.limit, error.context, error.needed) == (50_000_000, 2, least.total)
    assert set(error.terms) == set(MemoryEstimate.__dataclass_fields__)
    for text in ("weights file ", "kv ", "scratch ", "runtime ", f"= {least.total / 1e6:,.1f}"):
        assert text in str(error)
    # A context that was asked for is not shortened.
    limit = estimate_memory(Bundle.open(tiny_bundle), context=99).total
    with pytest.raises(MemoryLimitError, match="for a context of 100 tokens"):
        LLM(tiny_bundle, context=100, memory_limit=limit)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("7", 7),
        ("512MB", 512_000_000),
        (" 1.5 GiB ", 3 << 29),
        ("2kb", 2000),
        ("64MiB", 64 << 20),
        ("10B", 10),
    ],
)
def test_sizes_in_words(text: int | str, size: int) -> None:
    assert parse_bytes("memory_limit", text) == size


@pytest.mark.parametrize("value", [0, -1, True, "", "MB", "-5MB", "5 apples", "0MB", "5ib", 1.5])
def test_what_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="memory_limit must be a number of bytes"):
        parse_bytes("memory_limit", value)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_mapped_pages_are_counted_by_folder(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    array = np.memmap(tmp_path / "data", np.uint8, "r")
    assert array.sum() == 0  # which reads every page
    assert device.mapped_memory(tmp_path) == 1 << 20
    assert device.mapped_memory(tmp_path / "other") == 0
