"""In which ways the matrices of a model may be stored, and what each is expected to lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..architectures.spec import DecoderSpec
from ..checkpoint.weights import Weights
from ..graph.decoder import embedding_matrix
from ..graph.matrices import CheckpointMatrix, MappedRows, Matrix
from .calibrate import Candidates
from .gptq import row_losses
from .mixing import CHOICES, Option
from .storage import QuantizedMatrix, RoundedMatrix, RowRange

__all__ = ["alternatives", "token_weights", "vocabularies"]

# How the rows of frequent tokens are stored.
WIDE = CHOICES[-1]

# Tokenizers number frequent tokens first: by merges, or by likelihood. So the first rows of a
# vocabulary are worth more bits than the last.
SHARES = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)

# Kernels take rows in groups.
ROWS_AT_ONCE = 32


def alternatives(
    candidates: Mapping[str, Candidates],
    vocabularies: Mapping[str, Matrix],
    frequencies: NDArray[np.float64],
) -> dict[str, list[Option]]:
    """The options of every matrix.

    Args:
        candidates: The projections in each of :data:`~.mixing.CHOICES`; the head in all but the
            last.
        vocabularies: The embedding and the head.
        frequencies: How often each token comes, float64 [vocab].
    """
    found = {name: _projection(one) for name, one in candidates.items() if name not in vocabularies}
    for name, matrix in vocabularies.items():
        narrow: Sequence[QuantizedMatrix]
        if name in candidates:
            stored = list(candidates[name].matrices.values())
            narrow, losses = stored, [one.losses for one in stored]
        else:
            narrow = [RoundedMatrix(matrix, one) for one in CHOICES[:-1]]
            # All that a gathered row's elements lose counts the same.
            even = np.eye(matrix.shape[1], dtype=np.float32)
            losses = [row_losses(matrix, even, one) for one in narrow]
        found[name] = _vocabulary(matrix, narrow, losses, frequencies)
    return found


def vocabularies(spec: DecoderSpec, weights: Weights) -> dict[str, Matrix]:
    """The embedding, and the head where it is another matrix, by their names in the graph."""
    found = {"embed_tokens": embedding_matrix(spec, weights)}
    if not spec.tied:
        found["lm_head"] = CheckpointMatrix(weights, f"{spec.names.head}.weight")
    return found


def token_weights(windows: NDArray[np.int64], vocab: int) -> NDArray[np.float64]:
    """How often each token comes in a text, float64 [vocab]; none never."""
    counts = np.bincount(windows.reshape(-1), minlength=vocab) + 0.5
    shares: NDArray[np.float64] = counts / counts.sum()
    return shares


def _projection(one: Candidates) -> list[Option]:
    reference = float(one.first.losses.sum()) or 1.0
    return [
        Option((matrix,), _stored_size(matrix), one.error * float(matrix.losses.sum()) / reference)
        for matrix in one.matrices.values()
    ]


def _vocabulary(
    matrix: Matrix,
    narrow: Sequence[QuantizedMatrix],
    losses: Sequence[NDArray[np.float32]],
    frequencies: NDArray[np.float64],
) -> list[Option]:
    """The first rows in 8 bits, which lose next to nothing, and the others in 4."""
    rows, found = matrix.shape[0], []
    for share in SHARES:
        first = int(share * rows) // ROWS_AT_ONCE * ROWS_AT_ONCE if share < 1 else rows
        wide = RoundedMatrix(MappedRows(matrix, np.arange(first)), WIDE)
        for rest, lost in zip(narrow, losses, strict=True):
            parts: list[QuantizedMatrix] = [wide] if first else []
            if first < rows:
                parts.append(RowRange(rest, first, rows))
            loss = float(frequencies[first:] @ lost[first:])
            found.append(Option(tuple(parts), sum(map(_stored_size, parts)), loss))
    return found


def _stored_size(matrix: QuantizedMatrix) -> int:
    """Bytes of the integers and the scales."""
    blob = matrix.storage.blob_shape(*matrix.shape)
    return math.prod(blob) + 4 * blob[0] * blob[1]
