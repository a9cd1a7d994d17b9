"""Whether a checkpoint's tensors are those of its architecture."""

from __future__ import annotations

import re

from edge_llm.errors import CheckpointError

from ..checkpoint.packed import is_empty_bias, packed_tensor
from ..checkpoint.weights import Weights
from .spec import DecoderSpec

__all__ = ["check_tensors"]

# Tensors that are no weights: transformers computes them from config.json.
_BUFFERS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.(bias|masked_bias)$"
)


def check_tensors(weights: Weights, spec: DecoderSpec) -> None:
    """Compare the checkpoint's tensors with the architecture's, before any work.

    Raises:
        CheckpointError: One is missing, of another shape, or unknown.
    """
    expected = spec.tensor_shapes()
    names = set(weights.names)
    for name, shape in expected.items():
        if name not in names:
            raise CheckpointError(
                f"The checkpoint has no tensor {name!r}.",
                "It is incomplete, or config.json is of another model.",
            )
        if tuple(weights.shape(name)) != shape:
            raise CheckpointError(
                f"Tensor {name!r} has shape {list(weights.shape(name))}; config.json asks for "
                f"{list(shape)}.",
                "config.json is of another model.",
            )
    # A tied head may be stored all the same, and old files carry rotary frequencies and masks.
    head = f"{spec.names.head}.weight"
    tied_head = {head} if spec.tied else set()
    if spec.tied and packed_tensor(weights, head):
        raise CheckpointError(
            f"config.json says that the head is the embedding, but {head!r} is quantized.",
            "Set tie_word_embeddings to false if the head is the model's own.",
        )
    unknown = [
        name
        for name in sorted(names - expected.keys() - tied_head)
        if not _BUFFERS.search(name) and not is_empty_bias(weights, name)
    ]
    if unknown:
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} tensors that a {spec.architecture} model of this "
            f"configuration does not have, such as {unknown[0]!r}.",
            "Merge adapters first, and check config.json.",
        )
