"""How matrices are stored: what was asked for, and what the checkpoint allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edge_llm.errors import ArgumentError
from edge_llm.manifest import Quantization, TensorQuantization
from edge_llm.runtime.kernels import NO_DOT_PRODUCT

from ..checkpoint.prequantized import Packing
from ..choices import (
    AUTO,
    AUTO_BITS,
    BLOCKS,
    DEFAULT_BLOCK,
    METHODS,
    QUANTIZATIONS,
    TARGETS,
    VOCABULARIES,
)
from .budget import Budget
from .calibration import Calibration
from .mixing import CHOICES
from .storage import CHANNELS, FLOAT32, Storage

__all__ = ["Recipe", "Request", "choose_recipe", "describe_storage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for; None: nothing was said.

    Attributes:
        quantize: "auto", "fp32", "int8" or "int4".
        block: Weights that share a scale.
        method: "rtn" or "gptq".
        vocabulary: "int4" or "int8", of the embedding and the head.
        calibration: How GPTQ is done.
        work_dir: Where it keeps its results.
        budget: What a mix may weigh or lose.
        target: The CPU: "x86", "arm64", "arm64-nodotprod", or None: any of the first two.

        cache_calibrated: Whether the cache is calibrated, be the weights or not.

    Raises:
        ArgumentError: What no checkpoint can be stored as.
    """

    quantize: str | None = None
    block: int | None = None
    method: str | None = None
    vocabulary: str | None = None
    calibration: Calibration | None = None
    work_dir: object = None
    budget: Budget | None = None
    target: str | None = None
    cache_calibrated: bool = False

    def __post_init__(self) -> None:
        domains = {
            "quantize": (AUTO, *QUANTIZATIONS),
            "block": BLOCKS,
            "method": METHODS,
            "vocabulary": VOCABULARIES,
            "target": TARGETS,
        }
        for name, domain in domains.items():
            value = getattr(self, name)
            if value is not None and value not in domain:
                raise ArgumentError(name, f"one of {', '.join(map(str, domain))}", value)
        if self.channels:
            said = ("block", "method", "vocabulary", "budget")
            self._refuse(f"with int8 for {self.target}, which has a scale per row", *said)
        if self.mixed:
            self._refuse("with a mix, which chooses by itself", "block", "vocabulary")
            if self.method == "rtn":
                raise ArgumentError("method", "'gptq' or left out with a mix", self.method)
        elif self.budget is not None:
            name, value = self.budget.limit
            raise ArgumentError(name, "left out where one storage is asked for", value)
        if self.quantize == "fp32":
            self._refuse("with fp32, which rounds nothing", "block", "method", "vocabulary")
        if self.quantize == "int8" and self.vocabulary == "int4":
            raise ArgumentError("vocabulary", "'int8' or left out with int8", self.vocabulary)
        if not self.calibrated and not self.cache_calibrated:
            self._refuse(
                "without method 'gptq', as nothing is calibrated", "calibration", "work_dir"
            )

    @property
    def channels(self) -> bool:
        """Whether matrices get 8 bits with a scale per row, as the target multiplies no blocks."""
        return self.target == NO_DOT_PRODUCT and self.quantize in (None, AUTO, "int8")

    @property
    def mixed(self) -> bool:
        """Whether each matrix gets a storage of its own."""
        if self.channels:
            return False
        said = (self.block, self.method, self.vocabulary)
        return self.quantize == AUTO or (
            self.quantize is None and (self.budget is not None or not any(said))
        )

    @property
    def calibrated(self) -> bool:
        """Whether weights are rounded for their inputs."""
        return self.method == "gptq" or self.mixed

    def _refuse(self, reason: str, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None:
                raise ArgumentError(name, f"left out {reason}", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the matrices that a checkpoint has as floats are stored.

    Attributes:
        storage: Of most of them; of a mix the smallest.
        vocabulary: Of the embedding and the head.
        calibration: How they are rounded for their inputs; None: to the nearest integers.
        budget: What a mix may weigh or lose; None: there is one storage.
    """

    storage: Storage
    vocabulary: Storage
    calibration: Calibration | None = None
    budget: Budget | None = None


def choose_recipe(request: Request, packing: Packing | None, *, layered: bool) -> Recipe:
    """How to store what the checkpoint has as floats.

    Args:
        request: What was asked for.
        packing: The checkpoint's integers, which stay as they are unless "fp32" is asked for.
        layered: Whether the layers are known one by one, which calibration needs.

    Raises:
        ArgumentError: An argument contradicts the checkpoint.
    """
    if request.quantize == "fp32":
        return Recipe(storage=FLOAT32, vocabulary=FLOAT32)
    block = request.block or DEFAULT_BLOCK
    if packing is not None:
        return _packed_recipe(request, packing)
    if request.channels:
        if not layered:
            raise ArgumentError(
                "target",
                "left out where optimum makes the graph, or with int4 or fp32",
                request.target,
                "Only the graph builder knows int8 with a scale per row.",
            )
        return Recipe(storage=CHANNELS, vocabulary=CHANNELS)
    if not layered:
        reason = "Only the graph builder knows a model layer by layer."
        _refuse_calibration(request, "where optimum makes the graph", reason)
        storage = Storage(8 if request.quantize == "int8" else 4, block)
        return Recipe(storage=storage, vocabulary=storage)
    calibration = (request.calibration or Calibration()) if request.calibrated else None
    if request.mixed:
        budget = request.budget or Budget(max_bits=AUTO_BITS)
        return Recipe(
            storage=CHOICES[0], vocabulary=CHOICES[0], calibration=calibration, budget=budget
        )
    storage = Storage(QUANTIZATIONS[request.quantize or "int4"], block)
    # A calibrated model loses most in a 4-bit vocabulary (benchmarks/quality.py).
    bits = QUANTIZATIONS[request.vocabulary] if request.vocabulary else 8 if calibration else 0
    return Recipe(
        storage=storage,
        vocabulary=Storage(bits or storage.bits, block),
        calibration=calibration,
    )


def _packed_recipe(request: Request, packing: Packing) -> Recipe:
    remedy = f"The checkpoint is quantized already ({packing}) and keeps its integers."
    _refuse_calibration(request, "for this checkpoint", remedy)
    if request.quantize in QUANTIZATIONS and QUANTIZATIONS[request.quantize] != packing.bits:
        raise ArgumentError("quantize", f"int{packing.bits} or fp32", request.quantize, remedy)
    if request.block not in (None, packing.block):
        raise ArgumentError("block", f"{packing.block} or left out", request.block, remedy)
    if request.target == NO_DOT_PRODUCT and packing.bits == 8:
        raise ArgumentError(
            "target",
            f"left out, or {NO_DOT_PRODUCT} with fp32",
            NO_DOT_PRODUCT,
            f"The checkpoint's integers ({packing}) have blocks, which such a CPU unpacks at every "
            "step: export from the unquantized checkpoint that it was made from.",
        )
    storage = Storage(packing.bits, request.block or DEFAULT_BLOCK)
    return Recipe(storage=storage, vocabulary=storage)


def _refuse_calibration(request: Request, where: str, remedy: str) -> None:
    """Refuse what was said of calibration; that nothing was said does not ask for any."""
    limit = request.budget and request.budget.limit
    said = [
        ("method", request.method if request.method == "gptq" else None),
        ("vocabulary", request.vocabulary),
        ("calibration", None if request.cache_calibrated else request.calibration),
        ("work_dir", None if request.cache_calibrated else request.work_dir),
        limit or ("", None),
    ]
    for name, value in said:
        if value is not None:
            raise ArgumentError(name, f"left out {where}", value, remedy)


def describe_storage(
    storage: Storage,
    packing: Packing | None = None,
    *,
    calibrated: bool = False,
    others: Mapping[str, Storage] | None = None,
    rounded: Iterable[str] = (),
    kept: Iterable[str] = (),
) -> Quantization:
    """What the manifest says.

    Args:
        storage: How what the checkpoint has as floats is stored.
        packing: The checkpoint's integers.
        calibrated: Whether the projections were rounded for their inputs.
        others: What is stored in another way.
        rounded: The matrices that it has as floats, named if they are not stored as most are.
        kept: Matrices that stay float32 whatever the storage.
    """
    if storage == FLOAT32:
        return Quantization(method="none", bits=32, block=None, exceptions={})
    most = other = TensorQuantization(bits=storage.bits, block=storage.block)
    if packing is not None:
        most = TensorQuantization(bits=packing.bits, block=packing.block)
    exceptions = {} if other == most else dict.fromkeys(rounded, other)
    for name, one in (others or {}).items():
        exceptions[name] = TensorQuantization(bits=one.bits, block=one.block)
    return Quantization(
        method=packing.method if packing else "calibrated" if calibrated else "rtn",
        bits=most.bits,
        block=most.block,
        exceptions=exceptions | dict.fromkeys(kept, TensorQuantization(bits=32, block=None)),
    )
