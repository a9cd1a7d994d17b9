"""Checkpoints whose linear layers are integers already: what config.json says of them.

References: transformers' ``GPTQConfig`` and ``AwqConfig``, and the configurations that AutoGPTQ,
GPTQModel, AutoAWQ and AutoRound write.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edge_llm.errors import UnsupportedModelError

from ..choices import BLOCKS
from ..config import ConfigReader

__all__ = ["Packing", "read_packing"]

# What the quantizer did, where it ran, and which kernels are to be used. Which layers are integers,
# and the order of their columns (desc_act, static_groups), the tensors themselves say.
_QUANTIZER = """
    quant_method desc_act static_groups act_group_aware lm_head modules_to_not_convert
    modules_in_block_to_quantize block_name_to_quantize module_name_preceding_first_block
    to_quant_block_names true_sequential damp_percent damp_auto_increment mse v2 v2_alpha gptaq
    dataset tokenizer batch_size model_seqlen seqlen nsamples iters lr minmax_lr amp
    enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input gradient_accumulate_steps
    low_gpu_mem_usage scale_dtype autoround_version model_name_or_path model_file_base_name
    pad_token_id cache_block_outputs max_input_length meta pack_impl offload_to_disk
    offload_to_disk_path act_data_type act_dynamic act_group_size act_sym"""
_KERNELS = """
    use_exllama disable_exllama exllama_config use_cuda_fp16 do_fuse fuse_max_seq_len
    modules_to_fuse"""
_INERT = frozenset(f"{_QUANTIZER} {_KERNELS}".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a checkpoint's integers are laid out.

    Attributes:
        method: "gptq" or "awq".
        bits: Bits of an integer, 4 or 8.
        group: Columns that share a scale, a multiple of 16; -1 for whole rows.
        symmetric: config.json says that every zero point is ``2 ** (bits - 1)``.
        zero_offset: What is added to a stored zero point.
    """

    method: str
    bits: int
    group: int
    symmetric: bool
    zero_offset: int = 0

    @property
    def block(self) -> int:
        """The largest of our blocks that the end of no group cuts."""
        return max(BLOCKS) if self.group == -1 else math.gcd(self.group, max(BLOCKS))

    def __str__(self) -> str:
        groups = "a scale per row" if self.group == -1 else f"groups of {self.group}"
        return f"{self.method}, {self.bits} bits, {groups}"


def read_packing(config: Mapping[str, Any], *, ignore: Collection[str] = ()) -> Packing | None:
    """What config.json's ``quantization_config`` says; None where the weights are floats.

    Args:
        config: The content of config.json.
        ignore: Keys that the user vouches do not change the computation, such as
            "quantization_config.foo".

    Raises:
        CheckpointError: A key is missing, or its value is of another type.
        UnsupportedModelError: The method, a key or a value is not known.
    """
    names = ("compression_config", "quantization_config")
    for name in [name for name in names if config.get(name) is not None]:
        details = config[name]
        method = _method(details)
        if name == "quantization_config" and method in _READERS:
            reader = ConfigReader(details, within=f"{name}.", inert=_INERT)
            packing = _READERS[method](reader)
            reader.finish(ignore)
            return packing
        raise UnsupportedModelError(
            f"config.json: {name} says that the weights are quantized already (quant_method: "
            f"{method}); only gptq and awq can be taken over.",
            "Export from the unquantized checkpoint that it was made from.",
        )
    return None


def _method(details: object) -> str:
    if not isinstance(details, dict):
        return "not given"
    if any(details.get(f"load_in_{bits}bit") is True for bits in (4, 8)):
        return "bitsandbytes"
    return str(details.get("quant_method", "not given")).lower()


def _read_gptq(reader: ConfigReader) -> Packing:
    first, second = "gptq", "gptq_v2"
    format_ = reader.honour("checkpoint_format", {first, second}, first)
    reader.honour("format", {format_}, format_)
    reader.honour("method", {"gptq"}, "gptq")
    reader.honour("is_marlin_format", {False}, False)
    reader.get("backend", str, "")  # GPTQModel's kernel
    _read_activations(reader)
    # Rules that begin with a minus leave layers unquantized, which the tensors themselves say.
    rules = [rule for rule in reader.get("dynamic", dict, {}) if not rule.startswith("-")]
    if rules:
        raise UnsupportedModelError(
            "config.json: quantization_config.dynamic quantizes some layers in another way "
            f"({rules[0]!r}), which the graph builder does not know.",
            "Export from a checkpoint whose layers are quantized alike.",
        )
    return Packing(
        method="gptq",
        bits=_read_bits(reader, {4, 8}),
        group=_read_group(reader),
        symmetric=reader.get("sym", bool, True),
        zero_offset=int(format_ == first),
    )


def _read_awq(reader: ConfigReader) -> Packing:
    for name in ("version", "format", "checkpoint_format"):
        reader.honour(name, {"gemm", "GEMM"}, "gemm")
    reader.honour("method", {"awq"}, "awq")
    reader.honour("backend", {"autoawq"}, "autoawq")
    reader.get("sym", bool, True)  # zero_point says the same
    _read_activations(reader)
    return Packing(
        method="awq",
        bits=_read_bits(reader, {4}),
        group=_read_group(reader),
        symmetric=not reader.get("zero_point", bool, True),
    )


_READERS = {"gptq": _read_gptq, "awq": _read_awq}


def _read_bits(reader: ConfigReader, known: Collection[int]) -> int:
    return reader.honour("bits", known, reader.require("bits", int))


def _read_group(reader: ConfigReader) -> int:
    group = reader.require("group_size", int)
    if group != -1 and (group < 16 or group % 16):
        raise UnsupportedModelError(
            f"config.json: quantization_config.group_size is {group}, which MatMulNBits cannot "
            "compute with.",
            "Supported: multiples of 16, and -1 for a scale per row.",
        )
    return group


def _read_activations(reader: ConfigReader) -> None:
    """Refuse activations that are quantized too, and integers in other words than int32."""
    reader.honour("act_bits", {16, 32}, 16)
    reader.honour("data_type", {"int"}, "int")
    reader.honour("pack_dtype", {"int32", "torch.int32"}, "int32")
