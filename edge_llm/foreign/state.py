"""What a graph's inputs, outputs and attention say of its layout and its key/value cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edge_llm.errors import IntegrityError, UnsupportedFormatError
from edge_llm.foreign.onnx_file import Node, OnnxModel, Value
from edge_llm.manifest import STATE_DTYPES, DecoderGraph, StateTensor

__all__ = [
    "STANDARD_NAMES",
    "CacheSizes",
    "check_window",
    "read_context",
    "read_decoder",
    "read_vocab",
]

STANDARD_NAMES = {
    "past_key_values.%d.key": "present.%d.key",
    "past_key_values.%d.value": "present.%d.value",
}
"""Outputs by input, of the keys and of the values; %d is the layer."""

# What the layouts' decoders feed besides the state; see edge_llm.runtime.
_FED = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "use_cache_branch",
    "num_logits_to_keep",
    "logits_to_keep",
)
_ELSEWHERE = "Use a conversion of the text model alone, for the CPU, with a key/value cache."


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Sizes that a graph may leave open: heads with keys of their own, and their width."""

    kv_heads: int | None = None
    head_dim: int | None = None


def read_decoder(
    model: OnnxModel, graph: str, sizes: CacheSizes, names: Mapping[str, str] = STANDARD_NAMES
) -> DecoderGraph:
    """The layout and the state of a graph.

    Where GroupQueryAttention alone reads and writes the cache, it can do so in one shared buffer
    ("genai.v1"); any other graph gives a longer cache than it takes ("standard.v1").

    Args:
        model: What was read of the ONNX file.
        graph: Its path inside the folder.
        sizes: Those that the graph leaves open, from a configuration.
        names: Pairs of names as in :data:`STANDARD_NAMES`, keys first.

    Raises:
        UnsupportedFormatError: It asks for inputs that no layout has, or its cache is of another
            form; the message names them.
    """
    inputs = {one.name: one for one in model.inputs}
    outputs = {one.name: one for one in model.outputs}
    pairs = _pairs(inputs, names)
    _check_inputs(graph, inputs, pairs)
    readers = _readers(model, set(pairs))
    shared = all(_shares(readers[past], past, present) for past, present in pairs.items())
    windowed = [name for name in pairs if any(map(_window, readers[name]))]
    if windowed and not shared:
        raise UnsupportedFormatError(
            f"{graph} keeps a window in {windowed[0]!r}, but its cache cannot be updated in place.",
            _ELSEWHERE,
        )
    state = []
    for past, present in pairs.items():
        if present not in outputs:
            raise UnsupportedFormatError(
                f"{graph} has the input {past!r} but no output {present!r}.", _ELSEWHERE
            )
        window = _window(readers[past][0]) if shared else None
        shape = _shape(graph, inputs[past], sizes)
        state.append(
            StateTensor(
                input=past,
                output=present,
                dtype=inputs[past].dtype,
                shape=shape,
                batch_axis=0,
                sequence_axis=2,
                shared=shared,
                kind="kv" if window is None else "window",
                window=window,
            )
        )
    layout = "genai.v1" if shared else "standard.v1"
    return DecoderGraph(graph=graph, layout=layout, state=tuple(state))


def read_vocab(model: OnnxModel, graph: str, stated: int | None) -> int:
    """Rows of the logits: the graph's own number, or where that is open the stated one.

    Raises:
        UnsupportedFormatError: There are no logits, of an element type that the CPU has.
        IntegrityError: The two numbers differ.
    """
    logits = next((one for one in model.outputs if one.name == "logits"), None)
    if logits is None or not logits.shape or logits.dtype not in ("float32", "float16"):
        found = ", ".join(f"{one.name!r} ({one.dtype})" for one in model.outputs[:4])
        raise UnsupportedFormatError(
            f"{graph} has no output 'logits' of float32 or float16, but {found or 'none'}.",
            _ELSEWHERE,
        )
    rows = logits.shape[-1] if isinstance(logits.shape[-1], int) else stated
    if rows is None or stated not in (None, rows):
        raise IntegrityError(
            f"{graph} gives {rows or 'an untold number of'} logits for a token; its configuration "
            f"says that the vocabulary has {stated or 'an untold number of'} tokens.",
            "Take the configuration that belongs to the graph.",
        )
    return rows


def read_context(model: OnnxModel, stated: int) -> int:
    """Most tokens of a sequence: those stated, as far as the rotary tables reach.

    A graph of longrope takes another table where a text is longer than the trained context. The
    keys in the cache were turned by the first one, so the end of that is where a text must end.
    """
    tensors = {tensor.name: tensor for tensor in model.tensors}
    tables = {
        node.inputs[7]
        for node in model.nodes
        if node.operator == "GroupQueryAttention" and len(node.inputs) > 7
    }
    for node in model.nodes:
        for place, output in enumerate(node.outputs):
            if output in tables:
                tables.update(names[place] for names in node.branches.values() if names[place:])
    for node in model.nodes:
        if "value" in node.constants:
            tensors |= dict.fromkeys(node.outputs, node.constants["value"])
    rows = [tensors[name].shape[0] for name in tables if name in tensors and tensors[name].shape]
    return min([stated, *filter(None, rows)])


def check_window(model: OnnxModel, graph: str, window: int) -> None:
    """Refuse a graph without the sliding window that its configuration states.

    onnxruntime-genai 0.18's builder leaves Mistral's out, and its own runtime cuts the cache
    instead; run as it stands, such a graph attends to everything and answers otherwise.

    Raises:
        UnsupportedFormatError: No attention of it has a window.
    """
    if not any(node.integers.get("local_window_size", -1) > 0 for node in model.nodes):
        raise UnsupportedFormatError(
            f"{graph} attends to all tokens; its configuration says sliding_window {window}.",
            "Export the checkpoint with `edge-llm export`, which keeps the window.",
        )


def _pairs(inputs: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, str]:
    """Outputs of the state by its inputs, layer by layer."""
    found = {}
    for order, (past, present) in enumerate(names.items()):
        pattern = re.escape(past).replace("%d", "([0-9]{1,6})")
        for name in inputs:
            if layer := re.fullmatch(pattern, name):
                found[int(layer[1]), order] = (name, present.replace("%d", layer[1]))
    return dict(found[key] for key in sorted(found))


def _check_inputs(graph: str, inputs: Mapping[str, Value], pairs: Mapping[str, str]) -> None:
    unknown = [name for name in inputs if name not in pairs and name not in _FED]
    if unknown or "input_ids" not in inputs:
        raise UnsupportedFormatError(
            f"{graph} asks for {', '.join(map(repr, unknown)) or 'no input_ids'}; what is fed is "
            f"{', '.join(_FED)} and the key/value cache.",
            _ELSEWHERE,
        )
    if not pairs:
        raise UnsupportedFormatError(
            f"{graph} has no key/value cache: every token would compute the whole text again.",
            "Convert it with optimum's task text-generation-with-past.",
        )


def _shape(graph: str, value: Value, sizes: CacheSizes) -> tuple[int | str, ...]:
    """[batch, kv_heads, capacity, head_dim], as far as anything tells."""
    shape = value.shape or ()
    if len(shape) == 4 and not isinstance(shape[2], int) and value.dtype in STATE_DTYPES:
        heads = shape[1] if isinstance(shape[1], int) else sizes.kv_heads
        width = shape[3] if isinstance(shape[3], int) else sizes.head_dim
        if heads and width:
            return ("batch", heads, "capacity", width)
    raise UnsupportedFormatError(
        f"{graph}: {value.name!r} is {value.dtype} {list(shape)}; a cache must be [batch, heads, "
        f"an open length, width] of {', '.join(STATE_DTYPES)}.",
        _ELSEWHERE,
    )


def _readers(model: OnnxModel, names: set[str]) -> dict[str, list[Node]]:
    readers: dict[str, list[Node]] = {name: [] for name in names}
    for node in model.nodes:
        for name in names.intersection(node.inputs):
            readers[name].append(node)
    return readers


def _shares(readers: list[Node], past: str, present: str) -> bool:
    """Whether nothing but one GroupQueryAttention ever sees this tensor."""
    if len(readers) != 1 or readers[0].operator != "GroupQueryAttention":
        return False
    node = readers[0]
    places = [place for place, name in enumerate(node.inputs) if name == past]
    return places in ([3], [4]) and node.outputs[places[0] - 2 :][:1] == (present,)


def _window(reader: Node) -> int | None:
    """The window of a cache that holds no more than that."""
    settings = reader.integers
    return settings["local_window_size"] if settings.get("sliding_window_cache") else None
