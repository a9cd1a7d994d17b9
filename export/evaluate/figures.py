"""The quality figures that a bundle's manifest carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from edge_llm.manifest import CACHE_METRIC, Quality
from edge_llm.quality import evaluate, open_for_evaluation

__all__ = ["measure_quality", "of_cache"]


def measure_quality(
    folder: Path,
    reference: Path,
    text: str,
    *,
    data: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Quality, ...]:
    """Measure a bundle against its float32 original.

    Args:
        folder: The bundle.
        reference: The float32 bundle of the same checkpoint.
        text: What is scored, in the windows that :func:`edge_llm.quality.evaluate` takes by itself.
        data: The text's name.
        progress: Called with the scored tokens and all that are to be.

    Returns:
        Perplexity, KL divergence and top-1 agreement; the reference's own values of the latter two
        are 0 and 1 by definition.

    Raises:
        ArgumentError: The text holds no token to score.
        RuntimeFailure: A model gives no finite probabilities.
    """
    with open_for_evaluation(folder) as llm, open_for_evaluation(reference) as original:
        report = evaluate(llm, text, reference=original, progress=progress)
    assert report.reference_perplexity is not None
    figures = {
        "perplexity": (report.perplexity, report.reference_perplexity.value),
        "kl_divergence": (report.kl_divergence, 0.0),
        "top1_agreement": (report.top1_agreement, 1.0),
    }
    found = []
    for metric, (own, ideal) in figures.items():
        assert own is not None
        found.append(
            Quality(
                metric=metric,
                data=data,
                reference=ideal,
                value=own.value,
                standard_error=own.standard_error,
                sha256=report.text_sha256,
                tokens=report.tokens,
                window=report.window,
                stride=report.stride,
            )
        )
    return tuple(found)


def of_cache(figures: Iterable[Quality]) -> tuple[Quality, ...]:
    """Name figures after what was measured: a bundle against itself with a float32 cache."""
    return tuple(replace(one, metric=f"{CACHE_METRIC}{one.metric}") for one in figures)
