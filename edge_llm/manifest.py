"""The bundle's manifest: the only thing that export and runtime share.

``manifest.json`` is UTF-8 JSON and maps one to one onto :class:`Manifest`. Reading is strict: a
missing or unknown key is an error that names it, except inside ``info``, which is kept and never
interpreted. ``format`` is ``major.minor``; a newer major is refused, and so is every name in
``requires`` that this runtime does not know.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeVar

from edge_llm.errors import ManifestError, UnsupportedFormatError
from edge_llm.schema import cut, decode, load

__all__ = [
    "CACHE_METRIC",
    "FORMAT",
    "MANIFEST_NAME",
    "ChatTemplates",
    "DecoderGraph",
    "Dims",
    "FileEntry",
    "Manifest",
    "Quality",
    "Quantization",
    "Source",
    "StateTensor",
    "TensorQuantization",
    "Tokens",
]

FORMAT = "1.2"
MANIFEST_NAME = "manifest.json"
# Each layout of the graph, and whether a state's input and output are one buffer in it.
LAYOUTS = {"edge_llm.v1": True, "standard.v1": False, "genai.v1": True}
STATE_KINDS = ("kv", "window")
STATE_DTYPES = ("float32", "float16", "int8", "uint8")
# How the metrics are named that compare a bundle with itself with a float32 cache.
CACHE_METRIC = "kv_cache_"
KNOWN_FEATURES: frozenset[str] = frozenset()

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the weights come from.

    Attributes:
        architecture: The checkpoint's ``model_type`` ("llama"). For people; never branched on.
        repo: Hub id, or None for a local folder.
        revision: Resolved commit, or None.
        license: The licence that the checkpoint states, or None.
    """

    architecture: str
    repo: str | None
    revision: str | None
    license: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Sizes of the model, as its authors count them (``head_dim`` before any padding).

    ``hidden``, ``intermediate`` and ``heads`` are None where a foreign folder does not tell them.
    """

    layers: int
    hidden: int | None
    intermediate: int | None
    heads: int | None
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    parameters: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ManifestError(f"dims.{name} must be at least 1, got {size}.", _EXPORT_AGAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One tensor that a step reads and writes.

    Attributes:
        input: Name of the graph's input.
        output: Name of the graph's output.
        dtype: numpy's name of the element type.
        shape: Sizes; "batch" and "capacity" stand for what the runtime chooses.
        batch_axis: Which axis is the batch.
        sequence_axis: Which axis grows with the tokens.
        shared: Whether input and output are one buffer, updated in place.
        kind: "kv" (grows a row a token, rolled back by its length) or "window" (the last tokens,
            contiguous, compacted on eviction).
        window: Tokens that attention looks at, its own included, where the kind is "window".
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]
    batch_axis: int
    sequence_axis: int
    shared: bool
    kind: str
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderGraph:
    """The ONNX file, the contract it follows, and its state.

    Attributes:
        graph: The file.
        layout: Names and meaning of the inputs and outputs: "edge_llm.v1" (this project's own),
            "standard.v1" (transformers', whose state grows by concatenation) or "genai.v1"
            (onnxruntime-genai's).
        state: Tensor by tensor.
    """

    graph: str
    layout: str
    state: tuple[StateTensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorQuantization:
    """How one tensor is stored: ``bits`` 32 means float32, and then ``block`` is None."""

    bits: int
    block: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the weight matrices are stored.

    Attributes:
        method: "none", "rtn" (round to nearest), "calibrated" (rounded by the export for the
            inputs that the weights have, see ``info.calibration``), "gptq" or "awq" (the
            checkpoint's own), or "foreign" (as another exporter did it).
        bits: Bits of a weight; without a method 32 means float32 and 16 float16.
        block: Weights that share a scale, or None where a whole column or matrix does, or where
            there is none.
        exceptions: Tensors that are stored in another way, by their name in the checkpoint.
    """

    method: str
    bits: int
    block: int | None
    exceptions: Mapping[str, TensorQuantization]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Control tokens: ids, and whether a prompt starts with ``bos``."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    add_bos: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplates:
    """Chat templates by name ("default" first of all), and the token strings they see."""

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of a file.

    The hash is None in a manifest that was derived from a foreign folder; a file has one always.
    """

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One measured figure: the reference's value and this bundle's, on stated data.

    The reference is the float32 model; of a metric that starts with "kv_cache_", it is the bundle
    itself with a float32 cache of keys and values: what its int8 cache alone loses.

    Attributes:
        metric: "perplexity", "kl_divergence" (nats per token, from the reference), "top1_agreement"
            (share of tokens), or another.
        data: Name of the text.
        reference: The reference's value.
        value: This bundle's.
        standard_error: Of ``value``; None where it is not known.
        sha256: Of the text in UTF-8, hexadecimal.
        tokens: How many were scored.
        window: Tokens that the model saw at once at most.
        stride: Tokens from the start of a window to that of the next.
    """

    metric: str
    data: str
    reference: float
    value: float
    standard_error: float | None = None
    sha256: str | None = None
    tokens: int | None = None
    window: int | None = None
    stride: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that the runtime knows about a bundle besides the graph itself.

    Attributes:
        format: Version of this schema, "major.minor".
        requires: Features that a runtime must know to run the bundle rightly.
        min_onnxruntime: Oldest ONNX Runtime that has the graph's operators.
        name: What people call the model.
        sampling: Defaults for what the caller leaves out (fields of ``Sampling``).
        files: Every file of the bundle save the manifest, by path inside it.
        quality: Measured figures; empty where nothing was measured.
        producer: Versions of what wrote the bundle.
        target: The CPU that it was made for: "x86", "arm64", "arm64-nodotprod", or another; None:
            no particular one. For people, and for warnings; never branched on by computation.
        info: Kept, never interpreted.
    """

    format: str
    requires: tuple[str, ...]
    min_onnxruntime: str
    name: str
    source: Source
    dims: Dims
    decoder: DecoderGraph
    quantization: Quantization
    tokens: Tokens
    sampling: Mapping[str, float]
    tokenizer: str
    chat: ChatTemplates
    files: Mapping[str, FileEntry]
    quality: tuple[Quality, ...]
    producer: Mapping[str, str]
    target: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decoder.layout not in LAYOUTS:
            raise UnsupportedFormatError(
                f"decoder.layout must be one of {', '.join(LAYOUTS)}, got {self.decoder.layout!r}.",
                "Upgrade edge-llm.",
            )
        for token in (self.tokens.bos, self.tokens.pad, *self.tokens.eos):
            if token is not None and not 0 <= token < self.dims.vocab:
                raise ManifestError(
                    f"tokens must be ids from 0 to {self.dims.vocab - 1}, got {token}.",
                    _EXPORT_AGAIN,
                )
        for i, state in enumerate(self.decoder.state):
            _check_state(state, f"decoder.state[{i}]", shared=LAYOUTS[self.decoder.layout])
        for path in self.files:
            parts = PurePosixPath(path).parts
            if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
                raise ManifestError(
                    f"files: {path!r} is not a relative path inside the bundle.", _EXPORT_AGAIN
                )
        named = {self.decoder.graph, self.tokenizer, *self.chat.templates.values()}
        for path in sorted(named - set(self.files)):
            raise ManifestError(f"files does not list {path!r}, which is used.", _EXPORT_AGAIN)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest.

        Raises:
            UnsupportedFormatError: It is of a newer major version, or requires an unknown feature.
            ManifestError: It is not JSON, or a key is missing, unknown or of the wrong type.
        """
        try:
            data = load(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                f"{MANIFEST_NAME} is not JSON: {cut(str(error))}.", _EXPORT_AGAIN
            ) from error
        if not isinstance(data, dict):
            raise ManifestError(f"{MANIFEST_NAME} must be a JSON object.", _EXPORT_AGAIN)
        _check_version(data)
        manifest = decode(cls, data, "")
        for name, entry in manifest.files.items():
            if entry.sha256 is None:
                raise ManifestError(f"files.{name}.sha256 must be str, got None.", _EXPORT_AGAIN)
        return manifest

    def to_json(self) -> str:
        """Write the manifest as indented JSON that ends in a newline."""
        content = dataclasses.asdict(self)
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_EXPORT_AGAIN = "Export the bundle again."


def _check_version(data: Mapping[str, Any]) -> None:
    version = data.get("format")
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,9}\.[0-9]{1,9}", version):
        raise ManifestError(
            f'format must be "major.minor", got {cut(repr(version))}.', _EXPORT_AGAIN
        )
    major, known = (int(one.split(".")[0]) for one in (version, FORMAT))
    if major != known:
        raise UnsupportedFormatError(
            f"The bundle has format {version}; this runtime reads format {FORMAT}.",
            "Upgrade edge-llm." if major > known else _EXPORT_AGAIN,
        )
    requires = data.get("requires", [])
    for name in requires if isinstance(requires, list) else []:
        if isinstance(name, str) and name not in KNOWN_FEATURES:
            raise UnsupportedFormatError(
                f"The bundle requires {name!r}, which this runtime does not know.",
                "Upgrade edge-llm.",
            )


def _check_state(state: StateTensor, where: str, *, shared: bool) -> None:
    if state.kind not in STATE_KINDS:
        raise UnsupportedFormatError(
            f"{where}.kind must be one of {', '.join(STATE_KINDS)}, got {state.kind!r}.",
            "Upgrade edge-llm.",
        )
    if state.dtype not in STATE_DTYPES:
        raise UnsupportedFormatError(
            f"{where}.dtype must be one of {', '.join(STATE_DTYPES)}, got {state.dtype!r}.",
            "Upgrade edge-llm.",
        )
    if state.shared != shared:
        raise ManifestError(
            f"{where}.shared must be {shared} in this layout, got {state.shared}.", _EXPORT_AGAIN
        )
    windowed = state.kind == "window"
    if windowed != (state.window is not None) or (state.window is not None and state.window < 1):
        raise ManifestError(
            f"{where}.window must be {'at least 1' if windowed else 'left out'} where the kind is "
            f"{state.kind!r}, got {state.window}.",
            _EXPORT_AGAIN,
        )
    axes = {"batch": ("batch_axis", state.batch_axis)}
    axes["capacity"] = ("sequence_axis", state.sequence_axis)
    for size, (key, axis) in axes.items():
        if not 0 <= axis < len(state.shape) or state.shape[axis] != size:
            raise ManifestError(
                f'{where}.{key} must be the axis of "{size}" in {list(state.shape)}, got {axis}.',
                _EXPORT_AGAIN,
            )
    for length in state.shape:
        if length not in axes and (isinstance(length, str) or length < 1):
            raise ManifestError(
                f'{where}.shape must hold "batch", "capacity" and integers of at least 1, got '
                f"{length!r}.",
                _EXPORT_AGAIN,
            )
