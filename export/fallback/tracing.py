"""optimum's exporter at work: transformers' own model, traced into an ONNX graph and compared."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import CheckpointError, EdgeLLMError, UnsupportedModelError

from ..checkpoint.weights import INDEX, SINGLE, read_index

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["TASK", "Trace", "trace"]

TASK = "text-generation-with-past"

# Tokens whose logits are compared, in steps as the runtime takes them: a prompt, a chunk of it
# behind a past, and single tokens. The tracing itself sees 16 tokens behind a past of 16.
STEPS = (5, 4, 1, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """An ONNX graph, and what the model that it was traced from gives.

    Attributes:
        graph: The file.
        parameters: How many numbers the model has learned.
        tokens: Some tokens, int64 [n].
        logits: What transformers' model gives for them, float32 [n, vocab].
    """

    graph: Path
    parameters: int
    tokens: NDArray[np.int64]
    logits: NDArray[np.float32]


def trace(
    checkpoint: Path,
    config: PretrainedConfig,
    scratch: Path,
    *,
    context: int,
    warn: Callable[[str], None],
) -> Trace:
    """Load a checkpoint into transformers' model, and let optimum trace it.

    transformers is shown the weights alone, in safetensors, beside a configuration that was read
    already: so nothing else of the checkpoint can be loaded, unpickled or run.

    Args:
        checkpoint: Its folder.
        config: Its configuration.
        scratch: An empty folder for the graph and its weights.
        context: Longest sequence that the model takes, in tokens.
        warn: Called with what the user should know.

    Raises:
        CheckpointError: The weights are not those of the configuration, or are no numbers.
        UnsupportedModelError: The model cannot be traced.
    """
    source, target = scratch / "checkpoint", scratch / "traced"
    source.mkdir()
    for name in _weight_files(checkpoint):
        (source / name).symlink_to((checkpoint / name).resolve())
    with _quiet():
        model = _load(source, config, warn)
        tokens, logits = _reference(model, context)
        parameters = model.num_parameters()
        _export(model, target)
        del model
        gc.collect()  # the weights are on the disk now
    return Trace(graph=target / "model.onnx", parameters=parameters, tokens=tokens, logits=logits)


def _weight_files(checkpoint: Path) -> list[str]:
    if (checkpoint / SINGLE).is_file():
        return [SINGLE]
    return [INDEX, *sorted(set((read_index(checkpoint) or {}).values()))]


def _load(source: Path, config: PretrainedConfig, warn: Callable[[str], None]) -> Any:
    """The model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (EdgeLLMError, OSError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot load the checkpoint: {_first_line(error)}",
            "Take the config.json that belongs to the weights.",
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"The checkpoint has no tensor {missing[0]!r}.",
            "It is incomplete, or config.json is of another model.",
        )
    if unused := sorted(found["unexpected_keys"]):
        warn(
            f"{len(unused)} tensors of the checkpoint, such as {unused[0]!r}, are not used by "
            f"transformers' {type(model).__name__} and were left out"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"Tensor {name!r} holds weights that are infinite or not a number.",
                "The training went wrong, or a conversion to float16 overflowed: use the "
                "checkpoint in its original precision.",
            )
    return model.float().eval()


def _reference(model: Any, context: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Some tokens, and the model's logits for them."""
    import torch

    count = min(sum(STEPS), context)
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=count)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None]), use_cache=False).logits[0]
    return tokens, logits.numpy()


def _export(model: Any, target: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    model.config.use_cache = True
    try:
        onnx_export_from_model(
            model,
            target,
            task=TASK,
            # Weights keep their names in the checkpoint, and tied ones stay one.
            do_constant_folding=False,
            no_post_process=True,
            do_validation=False,  # it looks at one length only
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"optimum cannot export this {model.config.model_type!r} model: {_first_line(error)}",
            "Please report it to the optimum-onnx project.",
        ) from error


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    return f"{type(error).__name__}: {line}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporters are known to say of every model; all else is still heard."""
    from torch.jit import TracerWarning
    from transformers.utils import logging as hub_logging

    loggers = [logging.getLogger(name) for name in ("optimum", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = hub_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        # Whether a branch that was taken fits other lengths too is measured, see compare.
        warnings.filterwarnings("ignore", category=TracerWarning)
        for text in (
            "You are using the legacy TorchScript-based ONNX export",
            "The feature will be removed. Please remove usage of this function",
            "`torch.jit.script` is deprecated",
        ):
            warnings.filterwarnings("ignore", text, DeprecationWarning)
        warnings.filterwarnings(
            "ignore", "Exporting aten::index operator of advanced indexing", UserWarning
        )
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            hub_logging.disable_progress_bar()
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if bars:
                hub_logging.enable_progress_bar()
