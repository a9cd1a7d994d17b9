"""Does a traced graph compute what the model computes, at other lengths than it was traced at?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_llm.errors import RuntimeFailure, VerificationError
from edge_llm.manifest import StateTensor
from edge_llm.runtime.session import create_session, onnxruntime_errors, resolve_threads

from .tracing import STEPS, Trace

__all__ = ["TOLERANCE", "compare"]

TOLERANCE = 1e-3
"""Of the range of the logits: rounding stays a tenth of it, a wrong branch is far beyond."""

_REMEDY = "The tracing froze what depends on the length: report the model to optimum-onnx."


def compare(trace: Trace, state: Sequence[StateTensor], *, minimum: str) -> None:
    """Feed the graph the trace's tokens in several steps, and compare its logits.

    Args:
        trace: The graph, and the logits of transformers' model.
        state: The graph's state.
        minimum: Oldest version of onnxruntime that has the bundle's operators.

    Raises:
        VerificationError: The graph does not run, its state does not grow by the tokens of a
            step, or its logits are others.
    """
    refusals: tuple[type[Exception], ...] = (RuntimeFailure, *onnxruntime_errors())
    try:
        got = _run(trace, state, minimum)
    except refusals as error:
        raise VerificationError(f"The traced graph does not run: {error}", _REMEDY) from error
    expected = trace.logits[: len(got)]
    errors = np.abs(got - expected).max(axis=-1) / np.ptp(expected)
    wrong = ~(errors <= TOLERANCE)  # also where there are no numbers
    if wrong.any():
        raise VerificationError(
            f"The traced graph's logits differ from transformers' by {errors.max():.1%} of their "
            f"range, from token {np.argmax(wrong)} on.",
            _REMEDY,
        )


def _run(trace: Trace, state: Sequence[StateTensor], minimum: str) -> NDArray[np.float32]:
    session = create_session(trace.graph, threads=resolve_threads(None), minimum=minimum)
    wanted = {one.name for one in session.get_inputs()}
    names = [one.name for one in session.get_outputs()]
    sizes = {"batch": 1, "capacity": 0}
    past = {
        one.input: np.zeros(
            [sizes[size] if isinstance(size, str) else size for size in one.shape], one.dtype
        )
        for one in state
    }
    logits, done = [], 0
    for step in STEPS:
        if done + step > len(trace.tokens):
            break
        total = done + step
        feeds = {
            "input_ids": trace.tokens[None, done:total],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(done, total)[None],
        }
        given = {name: value for name, value in (feeds | past).items() if name in wanted}
        result = dict(zip(names, session.run(names, given), strict=True))
        past = {one.input: result[one.output] for one in state}
        for one in state:
            if past[one.input].shape[2] != total:
                raise VerificationError(
                    f"The traced graph's state {one.output!r} has {past[one.input].shape[2]} rows "
                    f"after {total} tokens.",
                    _REMEDY,
                )
        logits.append(result["logits"][0])
        done = total
    return np.concatenate(logits)
