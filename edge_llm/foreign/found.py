"""What is found in a foreign folder, whoever made it, and the manifest that follows from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edge_llm.errors import CheckpointError, IntegrityError
from edge_llm.foreign.external_data import check_external_data
from edge_llm.foreign.onnx_file import OnnxModel, read_onnx
from edge_llm.foreign.state import (
    STANDARD_NAMES,
    CacheSizes,
    check_window,
    read_context,
    read_decoder,
    read_vocab,
)
from edge_llm.foreign.weights import count_parameters, read_quantization
from edge_llm.huggingface.model_card import read_license
from edge_llm.huggingface.tokenizer import TokenizerFiles, read_tokenizer
from edge_llm.manifest import (
    FORMAT,
    ChatTemplates,
    DecoderGraph,
    Dims,
    FileEntry,
    Manifest,
    Source,
    Tokens,
)

__all__ = ["Found", "derive_manifest", "positive"]

MIN_ONNXRUNTIME = "1.32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a foreign folder's configuration says.

    Attributes:
        kind: What the folder is, for people.
        graph: The ONNX file, as a path inside the folder.
        variant: Which of several graphs it is, or None.
        variants: All that there are.
        config: Content of config.json, or what stands in for it: model type and token ids.
        generation: Content of generation_config.json where another file stands in for it.
        names: The state's names, see :data:`edge_llm.foreign.state.STANDARD_NAMES`.
        cache: Sizes of the cache that the graph may leave open.
        window: Tokens that sliding layers attend to, where there are any.
        sizes: layers, hidden, intermediate, heads, vocab, context; None where nothing tells.
    """

    kind: str
    graph: str
    variant: str | None = None
    variants: tuple[str, ...] = ()
    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None
    names: Mapping[str, str] = field(default_factory=lambda: STANDARD_NAMES)
    cache: CacheSizes = field(default_factory=CacheSizes)
    window: int | None = None
    sizes: Mapping[str, int | None]


def derive_manifest(folder: Path, found: Found) -> tuple[Manifest, dict[str, str]]:
    """The manifest that a bundle of these files would have, save the hashes.

    Args:
        folder: The folder.
        found: What its configuration says.

    Returns:
        The manifest, and the texts of those of its files that the folder has in another form: chat
        templates, by their path in a bundle.

    Raises:
        IntegrityError: A file is missing, broken, or of another model than the rest.
        UnsupportedFormatError: The graph is none that this runtime feeds.
        CheckpointError: A tokenizer's or configuration's file is not usable.
    """
    graph = folder / found.graph
    model = read_onnx(graph)
    data = check_external_data(model, graph)
    decoder = read_decoder(model, found.graph, found.cache, found.names)
    if found.window is not None:
        check_window(model, found.graph, found.window)
    vocab = read_vocab(model, found.graph, found.sizes["vocab"])
    files = read_tokenizer(folder, found.config, generation_json=found.generation)
    files.check(vocab)
    templates = files.template_paths()
    texts = {templates[name]: source for name, source in files.chat_templates.items()}
    above = PurePosixPath(found.graph).parent
    names = [found.graph, *(str(above / name) for name in data), files.tokenizer_json.name]
    entries = {name: FileEntry(size=(folder / name).stat().st_size, sha256=None) for name in names}
    for path, text in texts.items():
        content = text.encode("utf-8")
        entries[path] = FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    repo, revision = _cached(folder)
    manifest = Manifest(
        format=FORMAT,
        requires=(),
        min_onnxruntime=MIN_ONNXRUNTIME,
        name=(repo or folder.resolve().name).rsplit("/", 1)[-1],
        source=Source(
            architecture=str(found.config.get("model_type") or "unknown"),
            repo=repo,
            revision=revision,
            license=read_license(folder),
        ),
        dims=_dims(found, decoder, model, vocab),
        decoder=decoder,
        quantization=read_quantization(model),
        tokens=Tokens(bos=files.bos, eos=files.eos, pad=files.pad, add_bos=files.add_bos),
        sampling=dict(files.sampling),
        tokenizer=files.tokenizer_json.name,
        chat=ChatTemplates(templates=templates, special_tokens=dict(files.special_tokens)),
        files=entries,
        quality=(),
        producer={model.producer[0] or "unknown exporter": model.producer[1]},
        info=_info(found, files),
    )
    return manifest, texts


def positive(source: str, name: str, value: object) -> int | None:
    """A size that a configuration states; None where it is left out or null.

    Args:
        source: The file, for the error.
        name: The key.
        value: Its value.

    Raises:
        CheckpointError: It is no integer of at least 1.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{source}: {name} must be an integer of at least 1, got {value!r}.",
            "Take the file that belongs to the graph.",
        )
    return value


def _dims(found: Found, decoder: DecoderGraph, model: OnnxModel, vocab: int) -> Dims:
    first = decoder.state[0].shape
    assert isinstance(first[1], int)
    assert isinstance(first[3], int)
    context = found.sizes["context"]
    if context is None:
        raise IntegrityError(
            f"Nothing in the {found.kind} says how long a text the model can read.",
            "Set max_position_embeddings in config.json to the longest context in tokens.",
        )
    layers, heads = len(decoder.state) // 2, found.sizes["heads"]
    if found.sizes["layers"] not in (None, layers) or (heads is not None and heads % first[1]):
        raise IntegrityError(
            f"{found.graph} has {layers} layers of {first[1]} key/value heads; its configuration "
            f"says {found.sizes['layers']} layers of {heads} heads.",
            "Take the configuration that belongs to the graph.",
        )
    return Dims(
        layers=layers,
        hidden=found.sizes["hidden"],
        intermediate=found.sizes["intermediate"],
        heads=found.sizes["heads"],
        kv_heads=first[1],
        head_dim=first[3],
        vocab=vocab,
        context=read_context(model, context),
        parameters=count_parameters(model),
    )


def _info(found: Found, files: TokenizerFiles) -> dict[str, Any]:
    info: dict[str, Any] = {"origin": found.kind}
    if found.variant:
        info["variant"] = found.variant
    if files.ignored:
        info["ignored_generation_config"] = list(files.ignored)
    return info


def _cached(folder: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of a folder in huggingface_hub's cache."""
    place = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?$", folder.absolute().as_posix())
    return (place[1].replace("--", "/", 1), place[2]) if place else (None, None)
