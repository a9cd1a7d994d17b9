"""A checkpoint of any architecture that optimum's ONNX exporter knows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from edge_llm.errors import CheckpointError, ExportError, UnsupportedModelError
from edge_llm.manifest import DecoderGraph, Dims
from edge_llm.runtime.session import import_onnxruntime

from ..architectures.reading import check_layers
from ..graph.decoder import GRAPH_FILE
from ..graph.recorder import GraphRecorder
from ..quantize.storage import FLOAT32, Storage
from .compare import compare
from .initializers import Initializers
from .interface import LAYOUT, read_state
from .rewrite import rewrite
from .tracing import TASK, trace

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["PRODUCERS", "OptimumModel", "Traced", "read_model"]

PRODUCERS = ("optimum", "optimum-onnx", "torch", "transformers")
"""Distributions whose versions decide what the graph looks like."""

# Keys of config.json that make transformers fetch and run code, as private ones can too.
_CODE = ("auto_map", "attn_implementation")

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What an export consists of, besides the tokenizer.

    Attributes:
        graph: The graph and its weights; usable as long as the scratch folder is there.
        decoder: What the manifest says of it.
        dims: The model's sizes.
        kept: Matrices that stayed float32.
    """

    graph: GraphRecorder
    decoder: DecoderGraph
    dims: Dims
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimumModel:
    """What is known before the weights are read.

    Attributes:
        architecture: The checkpoint's ``model_type``.
        vocab: Rows of the embedding.
        context: Longest sequence that a traced graph can be right for, in tokens; None where
            config.json does not say.
        hidden: Width of the residual stream.
        heads: Query heads.
        intermediate: Width of the MLP.
        config: transformers' configuration.
    """

    architecture: str
    vocab: int
    context: int | None
    hidden: int
    heads: int
    intermediate: int
    config: PretrainedConfig

    @contextmanager
    def traced(
        self,
        checkpoint: Path,
        stage: Path,
        *,
        storage: Storage,
        context: int,
        minimum: str,
        warn: Callable[[str], None],
    ) -> Iterator[Traced]:
        """Trace the model in a scratch folder inside ``stage``, which goes when the block ends.

        Args:
            checkpoint: The checkpoint's folder.
            stage: A folder on a disk that has room for the float32 weights.
            storage: How the matrices are stored.
            context: Longest sequence of the bundle, in tokens.
            minimum: Oldest version of onnxruntime that has the bundle's operators.
            warn: Called with what the user should know.

        Raises:
            CheckpointError: The weights are not those of the configuration, or are no numbers.
            UnsupportedModelError: The model cannot be traced, or into no decoder.
            VerificationError: The traced graph does not compute what the model computes.
        """
        with tempfile.TemporaryDirectory(dir=stage, prefix=".optimum.") as scratch:
            found = trace(checkpoint, self.config, Path(scratch), context=context, warn=warn)
            model = onnx.load(found.graph, load_external_data=False)
            state = read_state(model.graph)
            compare(found, state, minimum=minimum)
            initializers = Initializers(model.graph, found.graph.parent)
            new = rewrite(model, initializers, storage=storage, vocab=self.vocab)
            quantized = storage != FLOAT32
            if quantized and new.unrecognized:
                warn(
                    f"{len(new.unrecognized)} matrices, such as {new.unrecognized[0]!r}, stay "
                    "float32, since they are not used in a plain product"
                )
            first = state[0].shape
            assert isinstance(first[1], int)
            assert isinstance(first[3], int)
            yield Traced(
                graph=new.graph,
                decoder=DecoderGraph(graph=GRAPH_FILE, layout=LAYOUT, state=state),
                dims=Dims(
                    layers=len({one.input.split(".")[1] for one in state}),
                    hidden=self.hidden,
                    intermediate=self.intermediate,
                    heads=self.heads,
                    kv_heads=first[1],
                    head_dim=first[3],
                    vocab=self.vocab,
                    context=context,
                    parameters=found.parameters,
                ),
                kept=(*new.tables, *new.unrecognized),
            )


def read_model(config_json: Mapping[str, Any]) -> OptimumModel:
    """Read config.json as transformers and optimum do.

    Args:
        config_json: Its content.

    Raises:
        CheckpointError: A key is missing or of another type.
        ExportError: optimum is not installed.
        UnsupportedModelError: optimum's exporter does not know the family, or what it knows is no
            decoder.
    """
    family = config_json.get("model_type")
    if not isinstance(family, str):
        raise CheckpointError(
            "config.json has no model_type.", "Take the config.json that belongs to the weights."
        )
    for name in ("quantization_config", "compression_config"):
        if config_json.get(name) is not None:
            raise UnsupportedModelError(
                f"config.json: {name} says that the weights are quantized already, which cannot be "
                "traced.",
                "Export from the unquantized checkpoint that it was made from.",
            )
    try:
        normalize, types = _load_exporter(family)
    except ImportError as error:
        raise ExportError(
            f"The model_type {family!r} takes optimum, which cannot be imported: {error}.",
            "Install what it needs with `pip install 'edge-llm[optimum]'`.",
        ) from error
    trusted = {
        key: value
        for key, value in config_json.items()
        if key not in _CODE and not key.startswith("_")
    }
    try:
        config = types[family].from_dict(trusted)
        sizes = normalize(config)
        check_layers("the number of layers", sizes.num_layers)
        model = OptimumModel(
            architecture=family,
            vocab=sizes.vocab_size,
            context=_longest(config),
            hidden=sizes.hidden_size,
            heads=sizes.num_attention_heads,
            intermediate=_first(config, _WIDTHS) or 4 * sizes.hidden_size,
            config=config,
        )
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"transformers cannot read config.json: {error}.",
            "Take the config.json that belongs to the weights.",
        ) from error
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"config.json: is_encoder_decoder says that this {family!r} model has an encoder.",
            "Export a model that is a decoder alone.",
        )
    return model


def _load_exporter(family: str) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """The exporter's reader of the family's sizes, and transformers' configurations by family."""
    import_onnxruntime()  # before optimum does it, with its telemetry on
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers what it can export
    from optimum.exporters.tasks import TasksManager
    from transformers.models.auto import CONFIG_MAPPING

    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(
            family, "onnx", library_name="transformers"
        )
    except KeyError:
        tasks = {}
    if TASK not in tasks or family not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"model_type {family!r} is not one that optimum-onnx {version('optimum-onnx')} exports "
            "as a decoder.",
            "Ask for it at the optimum-onnx project, or for a row in the graph builder.",
        )
    return tasks[TASK].func.NORMALIZED_CONFIG_CLASS, CONFIG_MAPPING


def _longest(config: PretrainedConfig) -> int | None:
    """Tokens up to which the model is what the tracing sees of it; None where nothing says so."""
    # Beyond its original context longrope turns by other factors, and a traced graph cannot change.
    scaling = getattr(config, "rope_scaling", None) or {}
    if "longrope" in (scaling.get("rope_type"), scaling.get("type")):
        return _first(config, ("original_max_position_embeddings", *_LENGTHS))
    return _first(config, _LENGTHS)


def _first(config: PretrainedConfig, names: Iterable[str]) -> int | None:
    """The first of the settings that is a positive integer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
