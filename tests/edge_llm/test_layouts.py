"""Graphs in transformers' layout with the quirks that exporters show, against numpy."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_llm.errors import RuntimeFailure
from edge_llm.manifest import Manifest
from edge_llm.runtime import masked_layout
from edge_llm.runtime.decoder import Decoder, Interrupted
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.masked_layout import MaskedDecoder
from edge_llm.runtime.session import create_session

VOCAB, HEADS, SIZE, CONTEXT = 60, 2, 4, 64
WIDTH = HEADS * SIZE
TOKENS = np.random.default_rng(2).integers(0, VOCAB, 40)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer of attention with learned positions, whose graph has every quirk that is asked for.

    Attributes:
        state: Element type of the keys and values.
        logits: Element type of the logits.
        ids: Element type of ``input_ids``.
        keep: Name of an input that says how many rows of logits to give.
        last_only: Whether it gives the last row alone.
        merged: Whether a branch without a past is chosen by ``use_cache_branch``.
        causal: Whether the branch with a past hides later tokens of the same step.
        extra: An input that nobody knows.
    """

    state: type[np.generic] = np.float32
    logits: type[np.generic] = np.float32
    ids: type[np.generic] = np.int64
    keep: str = ""
    last_only: bool = False
    merged: bool = False
    causal: bool = True
    extra: str = ""
    weights: dict[str, NDArray[np.float32]] = field(default_factory=lambda: _weights())

    def reference(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of every token, [tokens, vocab], in numpy."""
        w, n = self.weights, len(tokens)
        x = w["embedding"][tokens] + w["positions"][:n]
        q, k, v = ((x @ w[name]).reshape(n, HEADS, SIZE).swapaxes(0, 1) for name in "qkv")
        scores = q @ k.swapaxes(1, 2) / math.sqrt(SIZE)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -1e9
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(n, WIDTH)
        logits: NDArray[np.float32] = (x + mixed @ w["o"]) @ w["embedding"].T
        return logits

    def save(self, folder: Path) -> Path:
        """Write model.onnx and what stands for its tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text("{}")
        sizes = ["batch", HEADS, "past", SIZE]
        inputs = [
            _info("input_ids", self.ids, ["batch", "tokens"]),
            _info("attention_mask", np.int64, ["batch", "total"]),
            _info("position_ids", np.int64, ["batch", "tokens"]),
            *(_info(f"past_key_values.0.{part}", self.state, sizes) for part in PARTS),
        ]
        inputs += [_info(self.keep, np.int64, [])] if self.keep else []
        inputs += [_info("use_cache_branch", np.bool_, [1])] if self.merged else []
        inputs += [_info(self.extra, np.int64, [1])] if self.extra else []
        outputs = self._outputs()
        nodes = list(self._nodes("", past=True, causal=self.causal))
        if self.merged:
            branches = {
                "then_branch": list(self._nodes("with/", past=True, causal=self.causal)),
                "else_branch": list(self._nodes("without/", past=False, causal=True)),
            }
            graphs = {
                key: helper.make_graph(
                    [*branch, *self._renamed(prefix)], key, [], self._outputs(prefix + "out/")
                )
                for (key, branch), prefix in zip(
                    branches.items(), ("with/", "without/"), strict=True
                )
            }
            names = [one.name for one in outputs]
            nodes = [helper.make_node("If", ["use_cache_branch"], names, **graphs)]
        constants = {**self.weights, **CONSTANTS}
        graph = helper.make_graph(
            nodes,
            "attention",
            inputs,
            outputs,
            initializer=[numpy_helper.from_array(v, k) for k, v in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, folder / "model.onnx")
        return folder / "model.onnx"

    def _outputs(self, prefix: str = "") -> list[onnx.ValueInfoProto]:
        rows: int | str = 1 if self.last_only else "rows"
        return [
            _info(f"{prefix}logits", self.logits, ["batch", rows, VOCAB]),
            *(
                _info(f"{prefix}present.0.{part}", self.state, ["batch", HEADS, "all", SIZE])
                for part in PARTS
            ),
        ]

    def _renamed(self, prefix: str) -> Iterator[onnx.NodeProto]:
        for name in ("logits", *(f"present.0.{part}" for part in PARTS)):
            yield helper.make_node("Identity", [prefix + name], [f"{prefix}out/{name}"])

    def _nodes(self, prefix: str, *, past: bool, causal: bool) -> Iterator[onnx.NodeProto]:
        """The layer; its results are ``{prefix}logits`` and ``{prefix}present.0.*``."""

        def op(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
            return helper.make_node(kind, inputs, [prefix + output], **attributes)

        def own(*names: str) -> list[str]:
            return [prefix + name for name in names]

        yield op("Gather", ["embedding", "input_ids"], "embedded")
        yield op("Gather", ["positions", "position_ids"], "placed")
        yield op("Add", own("embedded", "placed"), "x")
        for name in "qkv":
            yield op("MatMul", [prefix + "x", name], f"{name}_flat")
            yield op("Reshape", [f"{prefix}{name}_flat", "heads"], f"{name}_heads")
            yield op("Transpose", own(f"{name}_heads"), f"{name}_new", perm=[0, 2, 1, 3])
        for name, part in zip("kv", PARTS, strict=True):
            to = helper.np_dtype_to_tensor_dtype(np.dtype(self.state))
            yield op("Cast", own(f"{name}_new"), f"{name}_cast", to=to)
            before = [f"past_key_values.0.{part}"] if past else []
            yield op("Concat", [*before, f"{prefix}{name}_cast"], f"present.0.{part}", axis=2)
            yield op("Cast", own(f"present.0.{part}"), f"{name}_all", to=TensorProto.FLOAT)
        yield op("Transpose", own("k_all"), "k_turned", perm=[0, 1, 3, 2])
        yield op("MatMul", own("q_new", "k_turned"), "products")
        yield op("Mul", [prefix + "products", "scale"], "scores")
        # What the mask hides, and where its length puts the new tokens.
        yield op("Cast", ["attention_mask"], "mask", to=TensorProto.FLOAT)
        yield op("Sub", ["one", prefix + "mask"], "hidden")
        yield op("Shape", ["attention_mask"], "total", start=1)
        yield op("Shape", ["input_ids"], "new", start=1)
        yield op("Sub", own("total", "new"), "first")
        for name in ("total", "first"):
            yield op("Squeeze", own(name), f"{name}_scalar")
        yield op("Range", ["zero", prefix + "total_scalar", "step"], "columns")
        yield op("Range", [*own("first_scalar", "total_scalar"), "step"], "rows")
        yield op("Unsqueeze", [prefix + "rows", "axis_1"], "rows_up")
        yield op("Greater", own("columns", "rows_up"), "later")
        yield op("Cast", own("later"), "later_float", to=TensorProto.FLOAT)
        yield op("Add", own("hidden", "later_float") if causal else own("hidden", "hidden"), "out")
        yield op("Mul", [prefix + "out", "minus"], "bias")
        yield op("Add", own("scores", "bias"), "biased")
        yield op("Softmax", own("biased"), "shares", axis=-1)
        yield op("MatMul", own("shares", "v_all"), "mixed")
        yield op("Transpose", own("mixed"), "mixed_turned", perm=[0, 2, 1, 3])
        yield op("Reshape", [prefix + "mixed_turned", "flat"], "mixed_flat")
        yield op("MatMul", [prefix + "mixed_flat", "o"], "branch")
        yield op("Add", own("x", "branch"), "residual")
        result = "residual"
        if self.keep or self.last_only:
            yield op("Neg", [self.keep or "step"], "from")
            yield op("Reshape", [prefix + "from", "axis_minus"], "starts")
            yield op("Slice", [*own("residual", "starts"), "far", "axis_1"], "kept")
            result = "kept"
        yield op("Transpose", ["embedding"], "head", perm=[1, 0])
        yield op("MatMul", own(result, "head"), "scored")
        to = helper.np_dtype_to_tensor_dtype(np.dtype(self.logits))
        yield op("Cast", own("scored"), "logits", to=to)


PARTS = ("key", "value")
CONSTANTS = {
    "heads": np.array([0, -1, HEADS, SIZE]),
    "flat": np.array([0, -1, WIDTH]),
    "scale": np.array(1 / math.sqrt(SIZE), np.float32),
    "one": np.array(1, np.float32),
    "minus": np.array(-1e9, np.float32),
    "zero": np.array(0),
    "step": np.array(1),
    "axis_1": np.array([1]),
    "axis_minus": np.array([-1]),
    "far": np.array([2**62]),
}


def _info(name: str, dtype: type[np.generic], shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
    )


def _weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    shapes = {"embedding": (VOCAB, WIDTH), "positions": (CONTEXT, WIDTH)}
    shapes |= dict.fromkeys("qkvo", (WIDTH, WIDTH))
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


ManifestFor = Callable[..., Manifest]
OpenGraph = Callable[[Attention], Decoder]


@pytest.fixture
def open_graph(tmp_path: Path, manifest_for: ManifestFor) -> OpenGraph:
    """Writes a graph and gives its decoder."""

    def open_it(attention: Attention) -> Decoder:
        graph = attention.save(tmp_path)
        manifest = manifest_for(graph, "standard.v1", vocab=VOCAB, context=CONTEXT)
        session = create_session(graph, threads=1, minimum="1.32")
        return open_decoder(session, manifest, capacity=CONTEXT)

    return open_it


def feed(decoder: Decoder, tokens: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
    """Logits of every token, fed from an empty cache in chunks."""
    decoder.cache.truncate(0, 0)
    parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    return np.concatenate([decoder.step(part, scored=len(part)).copy() for part in parts])


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


QUIRKS: dict[str, tuple[Attention, float]] = {
    "plain": (Attention(), 1e-5),
    "half state": (Attention(state=np.float16), 2e-3),
    "half logits": (Attention(logits=np.float16), 2e-3),
    "all half": (Attention(state=np.float16, logits=np.float16), 2e-3),
    "int32 tokens": (Attention(ids=np.int32), 1e-5),
    "num_logits_to_keep": (Attention(keep="num_logits_to_keep"), 1e-5),
    "logits_to_keep": (Attention(keep="logits_to_keep", logits=np.float16), 2e-3),
    "last row only": (Attention(last_only=True), 1e-5),
    "merged": (Attention(merged=True), 1e-5),
    "merged for one token": (Attention(merged=True, causal=False), 1e-5),
    "merged for one token, last row only": (
        Attention(merged=True, causal=False, last_only=True),
        1e-5,
    ),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_logits_of_every_quirk(quirk: str, open_graph: OpenGraph) -> None:
    attention, tolerance = QUIRKS[quirk]
    decoder = open_graph(attention)
    expected = attention.reference(TOKENS)
    for chunk in (len(TOKENS), 9, 1):
        assert relative_error(feed(decoder, TOKENS, chunk), expected) < tolerance
    assert decoder.cache.truncate(0, 10) == 10
    assert decoder.step(TOKENS[10:15], scored=0).shape == (0, VOCAB)
    got = decoder.step(TOKENS[15:30], scored=3)
    assert got.dtype == np.float32
    assert relative_error(got, expected[27:30]) < tolerance
    assert decoder.cache.lengths[0] == 30


def test_a_merged_graph_that_sees_the_future_would_be_wrong(open_graph: OpenGraph) -> None:
    """The trial is needed: fed together, tokens get other logits."""
    attention = Attention(merged=True, causal=False)
    decoder = open_graph(attention)
    assert isinstance(decoder, MaskedDecoder)
    assert not decoder._together
    decoder._together = True
    assert relative_error(feed(decoder, TOKENS, 9), attention.reference(TOKENS)) > 0.05


def test_an_interrupted_step_leaves_the_cache_as_it_was(open_graph: OpenGraph) -> None:
    attention = Attention(last_only=True)
    decoder = open_graph(attention)
    decoder.step(TOKENS[:20], scored=0)
    for scored in (0, 3):
        decoder.interrupt()
        with pytest.raises(Interrupted):
            decoder.step(TOKENS[20:30], scored=scored)
        decoder.resume()
        assert decoder.cache.lengths[0] == 20
    expected = attention.reference(TOKENS)[28:30]
    assert relative_error(decoder.step(TOKENS[20:30], scored=2), expected) < 1e-5


def test_an_interrupt_between_the_parts_of_a_step(open_graph: OpenGraph) -> None:
    attention = Attention(last_only=True)
    decoder = open_graph(attention)
    decoder.step(TOKENS[:20], scored=0)
    timer = threading.Timer(0.01, decoder.interrupt)
    timer.start()

    def step_for_ever() -> None:
        while True:
            decoder.step(TOKENS[20:], scored=20)
            decoder.cache.truncate(0, 20)

    with pytest.raises(Interrupted):
        step_for_ever()
    timer.join()
    decoder.resume()
    assert decoder.cache.lengths[0] == 20
    expected = attention.reference(TOKENS)[20:]
    assert relative_error(decoder.step(TOKENS[20:], scored=20), expected) < 1e-5


def test_a_step_leaves_nothing_behind(open_graph: OpenGraph) -> None:
    decoder = open_graph(Attention())
    decoder.step(TOKENS[:20], scored=0)
    sizes = np.zeros(8, np.int64)  # a list of integers would itself grow
    tracemalloc.start()
    try:
        for round_ in range(len(sizes)):
            decoder.cache.truncate(0, 20)
            for token in range(40):
                decoder.step([token], scored=1)
            gc.collect()
            sizes[round_] = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # In the first rounds the interpreter itself still keeps things. Garbage comes and goes; what a
    # step leaves behind would be there at the lowest points too.
    assert sizes[6:].min() - sizes[4:6].min() < 2_000


def test_chunks_are_bounded_by_the_logits_of_all_their_tokens(
    open_graph: OpenGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_graph(Attention()).widest == CONTEXT
    monkeypatch.setattr(masked_layout, "LOGITS_BYTES", 4 * VOCAB * 10)
    assert open_graph(Attention()).widest == 10
    assert open_graph(Attention(keep="num_logits_to_keep")).widest == CONTEXT


def _with_state(manifest: Manifest, **changes: Any) -> Manifest:
    state = [dataclasses.replace(one, **changes) for one in manifest.decoder.state]
    decoder = dataclasses.replace(manifest.decoder, state=tuple(state))
    return dataclasses.replace(manifest, decoder=decoder)


REFUSALS: dict[str, tuple[Attention, Callable[[Manifest], Manifest], str]] = {
    "an unknown input": (
        Attention(extra="encoder_hidden_states"),
        lambda manifest: manifest,
        "asks for 'encoder_hidden_states'",
    ),
    "another vocabulary": (
        Attention(),
        lambda manifest: dataclasses.replace(
            manifest, dims=dataclasses.replace(manifest.dims, vocab=VOCAB + 1)
        ),
        r"'logits' is float32 .*60.*61",
    ),
    "logits of another type": (
        Attention(logits=np.float64),
        lambda manifest: manifest,
        r"'logits' is tensor\(double\)",
    ),
    "state of another type": (
        Attention(),
        lambda manifest: _with_state(manifest, dtype="float16"),
        r"'past_key_values\.0\.key' is float32",
    ),
    "state of another shape": (
        Attention(),
        lambda manifest: _with_state(manifest, shape=("batch", HEADS, "capacity", 2 * SIZE)),
        r"'past_key_values\.0\.key' is .*4\]; .* ask for .*8\]",
    ),
    "state of another name": (
        Attention(),
        lambda manifest: _with_state(manifest, output="present.7.key"),
        r"no 'present\.7\.key'",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_graphs_that_do_not_fit_are_refused_by_name(
    what: str, tmp_path: Path, manifest_for: ManifestFor
) -> None:
    attention, alter, message = REFUSALS[what]
    graph = attention.save(tmp_path)
    manifest = alter(manifest_for(graph, "standard.v1", vocab=VOCAB, context=CONTEXT))
    session = create_session(graph, threads=1, minimum="1.32")
    with pytest.raises(RuntimeFailure, match=message):
        open_decoder(session, manifest, capacity=CONTEXT)


def test_another_layouts_graph_is_refused(tiny_bundle: Path) -> None:
    manifest = Manifest.from_json((tiny_bundle / "manifest.json").read_text())
    session = create_session(tiny_bundle / "model.onnx", threads=1, minimum="1.32")
    decoder = dataclasses.replace(manifest.decoder, layout="genai.v1")
    with pytest.raises(RuntimeFailure, match="no 'attention_mask'"):
        open_decoder(session, dataclasses.replace(manifest, decoder=decoder), capacity=64)


def test_a_failing_step_is_a_typed_error(open_graph: OpenGraph) -> None:
    decoder = open_graph(Attention())
    with pytest.raises(RuntimeFailure, match="failed in a step"):
        decoder.step([VOCAB + 5], scored=1)
    assert decoder.cache.lengths[0] == 0
