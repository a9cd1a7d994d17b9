"""How matrices are stored: what was asked for, and what the checkpoint's integers allow."""

from __future__ import annotations

from collections.abc import Iterable

from edge_llm.errors import ArgumentError
from edge_llm.manifest import Quantization, TensorQuantization

from ..checkpoint.prequantized import Packing
from ..choices import BLOCKS, DEFAULT_BLOCK, DEFAULT_QUANTIZATION, METHODS, QUANTIZATIONS
from .calibration import Calibration
from .storage import FLOAT32, Storage

__all__ = ["check_choice", "choose_calibration", "choose_storage", "describe_storage"]


def check_choice(quantize: str | None, block: int | None) -> None:
    """Refuse what no checkpoint can be stored as.

    Raises:
        ArgumentError: An argument is outside its domain.
    """
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ArgumentError("quantize", f"one of {', '.join(QUANTIZATIONS)}", quantize)
    if block is not None and block not in BLOCKS:
        raise ArgumentError("block", f"one of {', '.join(map(str, BLOCKS))}", block)
    if quantize == "fp32" and block is not None:
        raise ArgumentError("block", "left out with fp32, which has no blocks", block)


def choose_storage(quantize: str | None, block: int | None, packing: Packing | None) -> Storage:
    """How to store what the checkpoint has as floats.

    Args:
        quantize: "fp32", "int8", "int4", or None: as many bits as the checkpoint's integers have,
            or else the default.
        block: Weights that share a scale, or None: the default.
        packing: The checkpoint's integers, which stay as they are unless ``quantize`` is "fp32".

    Raises:
        ArgumentError: An argument contradicts ``packing``.
    """
    if quantize == "fp32":
        return FLOAT32
    bits = QUANTIZATIONS[quantize or DEFAULT_QUANTIZATION]
    if packing is not None:
        remedy = f"The checkpoint is quantized already ({packing}) and keeps its integers."
        if quantize is not None and bits != packing.bits:
            raise ArgumentError("quantize", f"int{packing.bits} or fp32", quantize, remedy)
        if block not in (None, packing.block):
            raise ArgumentError("block", f"{packing.block} or left out", block, remedy)
        bits = packing.bits
    return Storage(bits, block or DEFAULT_BLOCK)


def choose_calibration(
    method: str,
    calibration: Calibration | None,
    work_dir: object,
    quantize: str | None,
    *,
    elsewhere: bool = False,
) -> Calibration | None:
    """How to calibrate the weights; None: not at all.

    Args:
        method: "rtn" or "gptq".
        calibration: What was asked for.
        work_dir: Where to keep results.
        quantize: How weights are stored.
        elsewhere: Whether something else than the weights is calibrated.

    Raises:
        ArgumentError: An argument is outside its domain, or of no use to the method.
    """
    if method not in METHODS:
        raise ArgumentError("method", f"one of {', '.join(METHODS)}", method)
    if method == "gptq":
        if quantize == "fp32":
            raise ArgumentError("method", "left out with fp32, which rounds nothing", method)
        return calibration or Calibration()
    for name, value in (("calibration", calibration), ("work_dir", work_dir)):
        if value is not None and not elsewhere:
            raise ArgumentError(
                name, f"left out with method {method!r}, which is not calibrated", value
            )
    return None


def describe_storage(
    storage: Storage,
    packing: Packing | None = None,
    *,
    calibrated: bool = False,
    rounded: Iterable[str] = (),
    kept: Iterable[str] = (),
) -> Quantization:
    """What the manifest says.

    Args:
        storage: How what the checkpoint has as floats is stored.
        packing: The checkpoint's integers.
        calibrated: Whether the projections were rounded for their inputs.
        rounded: The matrices that it has as floats, named if they are not stored as most are.
        kept: Matrices that stay float32 whatever the storage.
    """
    if storage == FLOAT32:
        return Quantization(method="none", bits=32, block=None, exceptions={})
    most = other = TensorQuantization(bits=storage.bits, block=storage.block)
    if packing is not None:
        most = TensorQuantization(bits=packing.bits, block=packing.block)
    exceptions = {} if other == most else dict.fromkeys(rounded, other)
    return Quantization(
        method=packing.method if packing else "calibrated" if calibrated else "rtn",
        bits=most.bits,
        block=most.block,
        exceptions=exceptions | dict.fromkeys(kept, TensorQuantization(bits=32, block=None)),
    )
