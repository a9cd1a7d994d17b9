"""An 8-bit cache of keys and values: its scales, from what a float32 cache holds of some text.

A channel's scale covers the largest value seen, and of keys more than was seen: rotary embeddings
turn pairs of channels by a token's position, slow ones by little within a calibration's window and
by far more in a long context. So both channels of a pair that turns get the pair's largest radius.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.bundle import Bundle
from edge_llm.errors import ArgumentError, VerificationError
from edge_llm.runtime.device import usable_cores
from edge_llm.runtime.own_layout import OwnDecoder
from edge_llm.runtime.session import create_session

from ..architectures.spec import DecoderSpec
from ..choices import KV_CACHES
from ..graph.rotary import pair_frequencies
from .calibration import Calibration

__all__ = [
    "MARGIN",
    "cache_scales",
    "channel_peaks",
    "choose_kv_calibration",
    "peaks_to_scales",
    "turning_pairs",
]

# Room above the largest value that was seen. Clipping costs far more than coarser steps: on a 7M
# model of books a scale of 0.9 times the largest value loses 8 times what one of 1.1 times does.
MARGIN = 1.1

# Windows of random tokens besides those of text. A chat model was perhaps never trained to write
# what it is asked, and its own text then reaches half of the range that questions reach.
RANDOM_WINDOWS = 16

# Least scale of a channel, as a share of the largest of its layer's: what is rounded off there is
# nothing beside the others, and text of another kind may wake a channel that slept here.
LEAST_SHARE = 1e-3


def choose_kv_calibration(kv_cache: str, calibration: Calibration | None) -> Calibration | None:
    """What an int8 cache's scales are calibrated on; None: the cache is float32.

    Raises:
        ArgumentError: ``kv_cache`` is outside its domain.
    """
    if kv_cache not in KV_CACHES:
        raise ArgumentError("kv_cache", f"one of {', '.join(KV_CACHES)}", kv_cache)
    return None if kv_cache == KV_CACHES[0] else calibration or Calibration()


def turning_pairs(spec: DecoderSpec) -> dict[str, NDArray[np.bool_]]:
    """Which pairs of channels rotary embeddings turn: bool [head_dim / 2] by cache's input."""
    found = {}
    for i, layer in enumerate(spec.attention):
        if layer.rope is not None:
            frequencies = pair_frequencies(
                layer.rope, head_dim=spec.head_dim, padded=spec.padded_head_dim, context=2
            )
            found[f"past.{i}.key"] = frequencies != 0
    return found


def cache_scales(
    folder: Path,
    windows: NDArray[np.int64],
    turning: Mapping[str, NDArray[np.bool_]],
    report: Callable[[str, int, int], None],
) -> dict[str, NDArray[np.float32]]:
    """Scales of a bundle's cache: one per head and channel, from what it keeps of some text.

    Random tokens make some more windows: they reach further than text of any one kind.

    Args:
        folder: The bundle, its cache float32.
        windows: Tokens, int64 [windows, tokens].
        turning: What :func:`turning_pairs` gives.
        report: Called with a phase, the windows done and all.

    Returns:
        float32 [kv_heads, head_dim] by the name of each cache's input.

    Raises:
        VerificationError: A key or a value is no finite number.
    """
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    session = create_session(
        bundle.file(manifest.decoder.graph),
        threads=usable_cores(),
        minimum=manifest.min_onnxruntime,
    )
    decoder = OwnDecoder(session, manifest, capacity=windows.shape[1])
    random = np.random.default_rng(0)
    shape = RANDOM_WINDOWS, windows.shape[1]
    windows = np.concatenate([windows, random.integers(0, manifest.dims.vocab, shape)])
    peaks: dict[str, NDArray[np.float32]] = {}
    for done, window in enumerate(windows):
        report("calibrating the cache", done, len(windows))
        decoder.cache.truncate(0, 0)
        for start in range(0, len(window), decoder.widest):
            decoder.step(window[start : start + decoder.widest], scored=0)
            for name, buffer in decoder.cache.buffers.items():
                # Behind the row's end are other windows' keys and values, or zeros.
                peak = channel_peaks(buffer[0], turning.get(name))
                peaks[name] = np.maximum(peaks.get(name, peak), peak)
    report("calibrating the cache", len(windows), len(windows))
    return peaks_to_scales(peaks)


def channel_peaks(
    values: NDArray[np.generic], turning: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """The largest absolute value of each channel, at whatever position its token may stand.

    Args:
        values: Keys or values, float32 [kv_heads, tokens, head_dim].
        turning: Which pairs of channels (j, j + head_dim / 2) turn; None: none does.

    Returns:
        float32 [kv_heads, head_dim].
    """
    sizes: NDArray[np.float32] = np.abs(values)
    peaks: NDArray[np.float32] = sizes.max(axis=1)
    if turning is not None:
        radius = np.hypot(*np.split(sizes, 2, axis=-1)).max(axis=1)
        peaks = np.where(np.tile(turning, 2), np.tile(radius, 2), peaks)
    return peaks


def peaks_to_scales(
    peaks: Mapping[str, NDArray[np.float32]],
) -> dict[str, NDArray[np.float32]]:
    """Scales of caches, from the largest absolute value of each channel; both [heads, channels].

    Raises:
        VerificationError: One is no finite number.
    """
    scales = {}
    for name, peak in peaks.items():
        highest = peak.max()
        if not np.isfinite(highest):
            raise VerificationError(
                f"The cache {name!r} holds {highest} on the calibration text.",
                "Check the checkpoint's weights for infinities.",
            )
        least = highest * np.float32(LEAST_SHARE) or np.float32(1)
        scales[name] = np.maximum(peak, least) * np.float32(MARGIN / 127)
    return scales
