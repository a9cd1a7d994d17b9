"""Window-sized caches compute what whole ones compute, whatever is fed and taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm.builtin import BUNDLE
from edge_llm.engine.slot import Slot
from edge_llm.manifest import DecoderGraph, Manifest, StateTensor
from edge_llm.runtime.decoder import Interrupted
from edge_llm.runtime.kv_cache import WINDOW_SLACK
from edge_llm.runtime.own_layout import OwnDecoder
from edge_llm.runtime.session import create_session
from edge_llm_export.graph.recorder import GraphRecorder

VOCAB, HEADS, KV_HEADS, SIZE, CONTEXT = 50, 4, 2, 16, 2048
WIDTH = HEADS * SIZE
WINDOWS = (8, 100)  # of the first two layers; the third sees everything
TOKENS = np.random.default_rng(0).integers(0, VOCAB, CONTEXT)


def build(*, window_sized: bool) -> tuple[GraphRecorder, tuple[StateTensor, ...]]:
    """Three layers of attention, two of them sliding, in buffers of the windows' size or whole."""
    rng = np.random.default_rng(1)
    graph = GraphRecorder("windows")
    graph.input("input_ids", np.int64, ["batch", "tokens"])
    for name in ("query_lens", "seqlens_k"):
        graph.input(name, np.int32, ["batch"])
    graph.input("total_sequence_length", np.int32, [])
    graph.input("logits_index", np.int64, ["scored"])
    angles = np.arange(CONTEXT)[:, None] / 1e4 ** (np.arange(SIZE // 2) / (SIZE // 2))
    graph.constant("cos", np.cos(angles).astype(np.float32))
    graph.constant("sin", np.sin(angles).astype(np.float32))
    graph.constant("embedding", rng.standard_normal((VOCAB, WIDTH), np.float32))
    hidden = graph.op("Gather", "embed", ["embedding", "input_ids"])
    state = []
    shape = ("batch", KV_HEADS, "capacity", SIZE)
    for layer, window in enumerate((*WINDOWS, None)):
        sized = window_sized and window is not None
        for part in ("key", "value"):
            one = StateTensor(
                input=f"past.{layer}.{part}",
                output=f"present.{layer}.{part}",
                dtype="float32",
                shape=shape,
                batch_axis=0,
                sequence_axis=2,
                shared=True,
                kind="window" if sized else "kv",
                window=window if sized else None,
            )
            graph.input(one.input, np.float32, shape)
            graph.output(one.output, np.float32, shape)
            state.append(one)
        packed = (HEADS + 2 * KV_HEADS) * SIZE
        weights = rng.standard_normal((WIDTH, packed)).astype(np.float32) / 4
        qkv = graph.op("MatMul", f"qkv.{layer}", [hidden, graph.constant(f"w.{layer}", weights)])
        past = [f"past.{layer}.key", f"past.{layer}.value"]
        inputs = [qkv, "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"]
        attended = graph.microsoft(
            "GroupQueryAttention",
            f"attention.{layer}",
            [*inputs, *[""] * 7, "query_lens"],
            outputs=[f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"],
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            local_window_size=window or -1,
            sliding_window_cache=int(sized),
        )
        hidden = graph.op("Add", f"add.{layer}", [hidden, attended])
    flat = graph.op(
        "Reshape", "flat", [hidden, graph.constant("rows", np.array([-1, WIDTH], np.int64))]
    )
    scored = graph.op("Gather", "scored", [flat, "logits_index"])
    head = graph.constant("head", rng.standard_normal((WIDTH, VOCAB), np.float32))
    graph.op("MatMul", "head_product", [scored, head], outputs=["logits"])
    graph.output("logits", np.float32, ["scored", VOCAB])
    return graph, tuple(state)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, OwnDecoder]:
    """The graph with window-sized buffers (True) and with whole ones (False)."""
    folder = tmp_path_factory.mktemp("windows")
    return {
        window_sized: open_graph(folder, window_sized=window_sized, rows=1)
        for window_sized in (True, False)
    }


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> OwnDecoder:
    """The graph with window-sized buffers for three sequences."""
    return open_graph(tmp_path_factory.mktemp("rows"), window_sized=True, rows=3)


def open_graph(folder: Path, *, window_sized: bool, rows: int) -> OwnDecoder:
    path = folder / f"{window_sized}.onnx"
    graph, state = build(window_sized=window_sized)
    path.write_bytes(graph.model("none", {}, "0").SerializeToString())
    manifest = Manifest.from_json((BUNDLE / "manifest.json").read_text())
    described = dataclasses.replace(
        manifest,
        dims=dataclasses.replace(manifest.dims, vocab=VOCAB, context=CONTEXT),
        decoder=DecoderGraph(graph="model.onnx", layout="edge_llm.v1", state=state),
    )
    session = create_session(path, threads=1, minimum="1.32")
    return OwnDecoder(session, described, capacity=CONTEXT, rows=rows)


def relative_error(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


def feed(decoder: OwnDecoder, tokens: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
    """Logits of the last row of every chunk, fed behind what the cache holds."""
    parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    return np.concatenate([decoder.step(part, scored=1).copy() for part in parts])


def test_buffers_have_the_windows_size(decoders: dict[bool, OwnDecoder]) -> None:
    rows = {name: one.shape[2] for name, one in decoders[True].cache.buffers.items()}
    sizes = [window + WINDOW_SLACK for window in WINDOWS] + [CONTEXT]
    assert rows == {
        f"past.{layer}.{part}": size
        for layer, size in enumerate(sizes)
        for part in ("key", "value")
    }


@pytest.mark.parametrize("chunk", [1, 7, 200, 512, 1500])
def test_a_long_prompt_in_chunks(chunk: int, decoders: dict[bool, OwnDecoder]) -> None:
    for decoder in decoders.values():
        decoder.cache.truncate(0, 0)
    tokens = TOKENS[: 700 if chunk == 1 else 1500]
    got, expected = (feed(decoders[sized], tokens, chunk) for sized in (True, False))
    assert relative_error(got, expected) < 1e-4
    # And 64 single tokens behind it.
    got, expected = (feed(decoders[sized], TOKENS[1500:1564], 1) for sized in (True, False))
    assert relative_error(got, expected) < 1e-4


ACTIONS = st.lists(
    st.tuples(st.just("append"), st.integers(1, 600))
    | st.tuples(st.just("back"), st.integers(1, 8) | st.integers(1, 700))
    | st.tuples(st.just("interrupt"), st.integers(1, 600)),
    max_size=8,
)


@settings(max_examples=40)
@given(ACTIONS)
@example([("append", 521), ("back", 1), ("append", 3)])  # one row past the first eviction
@example([("append", 600), ("append", 33), ("back", 100), ("append", 1)])
@example([("append", 519), ("interrupt", 2), ("append", 1), ("interrupt", 1)])
def test_any_feeding_and_taking_back_equals_whole_caches(
    decoders: dict[bool, OwnDecoder], actions: list[tuple[str, int]]
) -> None:
    small, whole = decoders[True], decoders[False]
    for decoder in decoders.values():
        decoder.cache.truncate(0, 0)
    held = np.zeros(0, np.int64)
    rng = np.random.default_rng(len(actions))
    for what, count in actions:
        length = len(held)
        if what == "append":
            new = rng.integers(0, VOCAB, min(count, CONTEXT - 1 - length))
            if len(new):
                got, expected = (one.step(new, scored=1) for one in (small, whole))
                assert relative_error(got, expected) < 1e-4
            held = np.concatenate([held, new])
        elif what == "back":
            length = max(0, length - count)
            assert whole.cache.truncate(0, length) == length
            restore(small, held[:length], small.cache.truncate(0, length))
            held = held[:length]
        else:
            small.interrupt()
            with pytest.raises(Interrupted):
                small.step(rng.integers(0, VOCAB, min(count, CONTEXT - length)), scored=1)
            small.resume()
            restore(small, held, int(small.cache.lengths[0]))
    got, expected = (one.step([3], scored=1) for one in (small, whole))
    assert relative_error(got, expected) < 1e-4


def restore(decoder: OwnDecoder, held: NDArray[np.int64], left: int) -> None:
    """Compute again what is no longer there: all or nothing."""
    assert left in (0, len(held))
    if not left and len(held):
        decoder.step(held, scored=0)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=4),
    st.integers(0, 700),
    st.integers(0, 700),
    st.integers(1, 40),
)
@example([521], 0, 1, 1)  # one row past the first eviction
@example([600, 33], 100, 0, 1)
def test_a_row_that_is_read_and_written_back_equals_whole_caches(
    decoders: dict[bool, OwnDecoder], parts: list[int], back: int, cut: int, more: int
) -> None:
    small, whole = decoders[True], decoders[False]
    for decoder in decoders.values():
        decoder.cache.truncate(0, 0)
    for count in parts:
        length = int(small.cache.lengths[0])
        fed = TOKENS[length : min(length + count, CONTEXT - 50)]
        for decoder in (small, whole):
            if len(fed):
                decoder.step(fed, scored=0)
    held = int(small.cache.lengths[0])
    length = max(held - back, small.cache.shortest(held), 1)
    saved = {name: one.copy() for name, one in small.cache.read_row(0, length).items()}
    small.cache.truncate(0, 0)
    for buffer in small.cache.buffers.values():
        buffer.fill(np.nan)
    # A part of what was saved will do where no window has dropped what it needs.
    shorter = max(1, length - cut)
    arrays = {
        name: one[:, : max(0, one.shape[1] - length + shorter)] for name, one in saved.items()
    }
    assert small.cache.accepts(length, saved)
    assert not small.cache.accepts(length, {**saved, "past.2.key": saved["past.2.key"][:, 1:]})
    assert not small.cache.accepts(CONTEXT + 1, saved)
    if shorter >= small.cache.shortest(length):
        assert small.cache.accepts(shorter, arrays)
    if small.cache.accepts(shorter, arrays):
        small.cache.write_row(0, shorter, arrays)
        whole.cache.truncate(0, shorter)
        for step in (more, 2):
            fed = TOKENS[shorter : shorter + step]
            got, expected = (one.step(fed, scored=1) for one in (small, whole))
            assert relative_error(got, expected) < 1e-4
            shorter += step
    for buffer in small.cache.buffers.values():
        buffer.fill(0)
    small.cache.truncate(0, 0)


def test_taking_back_past_an_eviction_would_be_wrong(decoders: dict[bool, OwnDecoder]) -> None:
    """The rule is needed: the operator says nothing and looks at other rows."""
    small, whole = decoders[True], decoders[False]
    size = WINDOWS[0] + WINDOW_SLACK
    for decoder in (small, whole):
        decoder.cache.truncate(0, 0)
        decoder.step(TOKENS[: size + 1], scored=0)
        decoder.cache.lengths[0] = size - 1
    got, expected = (decoder.step(TOKENS[size - 1 : size], scored=1) for decoder in (small, whole))
    assert relative_error(got, expected) > 0.01


@given(
    st.lists(
        st.tuples(*[st.sampled_from([0, 0, 1, 1, 3, 40, 300])] * 3).filter(any),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 3),
    st.booleans(),
)
@example([(300, 1, 0), (300, 0, 3), (1, 40, 1), (300, 1, 1)], 3, True)
@settings(max_examples=10)
def test_rows_of_one_step_do_not_see_each_other(
    decoders: dict[bool, OwnDecoder],
    batched: OwnDecoder,
    steps: list[tuple[int, int, int]],
    rows: int,
    restart: bool,
) -> None:
    streams = [np.roll(TOKENS, 100 * row) for row in range(3)]
    for row in range(3):
        batched.cache.truncate(row, 0)
    for number, counts in enumerate(steps):
        used = rows if any(counts[:rows]) else 3
        if restart and number == 2:
            batched.cache.truncate(0, 0)
        starts = batched.cache.lengths.copy()
        parts = [streams[row][starts[row] :][: counts[row]] for row in range(used)]
        scored = [min(count, 2) for count in counts[:used]]
        got = batched.step_rows(parts, scored=scored)
        assert len(got) == sum(scored)
        assert batched.cache.lengths.tolist() == [
            start + (counts[row] if row < used else 0) for row, start in enumerate(starts)
        ]
        done = 0
        for row, count in enumerate(scored):
            if count:
                alone = decoders[False]
                alone.cache.truncate(0, 0)
                expected = alone.step(streams[row][: batched.cache.lengths[row]], scored=count)
                assert relative_error(got[done : done + count], expected) < 1e-4
                done += count


def turns() -> Iterator[Sequence[int]]:
    """Prompts of a conversation that is edited, continued and begun anew."""
    yield TOKENS[:300].tolist()
    yield TOKENS[:700].tolist()
    yield [*TOKENS[:690].tolist(), 1, 2, 3]
    yield [*TOKENS[:200].tolist(), 4, 5, 6]
    yield [(int(TOKENS[0]) + 1) % VOCAB, *TOKENS[:650].tolist()]


def test_a_slot_computes_again_what_windows_have_dropped(decoders: dict[bool, OwnDecoder]) -> None:
    slots = {sized: Slot(decoder.cache, 0) for sized, decoder in decoders.items()}
    reused = {True: [0], False: [0]}
    for slot in slots.values():
        slot.clear()
    for prompt in map(np.array, turns()):
        answers = {}
        for sized, slot in slots.items():
            reused[sized].append(slot.rewind(prompt))
            while slot.length < len(prompt):
                piece = prompt[slot.length :][:200]
                slot.note(piece)
                logits = decoders[sized].step(piece, scored=1)
            tokens = [logits[0].copy()]
            for _ in range(20):
                best = (int(tokens[-1].argmax()),)
                slot.note(best)
                tokens.append(decoders[sized].step(best, scored=1)[0].copy())
            answers[sized] = np.array(tokens)
        assert relative_error(answers[True], answers[False]) < 1e-4
    assert reused[False] == [0, 0, 300, 690, 200, 0]
    # The fourth prompt's end is out of the windows' reach.
    assert reused[True] == [0, 0, 300, 690, 0, 0]
