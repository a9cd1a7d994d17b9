"""What measuring a bundle on this device has found to be faster than the defaults, kept in a file.

A choice holds for what it was measured with: the bundle's graph and weights, the version of
onnxruntime, the processor, and the cores and CPU quota that the process had. All of that is in the
file's name, so that whoever runs under other cores does not find it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_llm.bundle import Bundle
from edge_llm.caching.folder import (
    default_cache_folder,
    is_readable,
    own_cache_folder,
    write_through,
)
from edge_llm.engine.step_costs import WIDTHS
from edge_llm.errors import ArgumentError, CacheWarning
from edge_llm.runtime.device import cpu_allowance, cpu_identity
from edge_llm.runtime.session import SPIN_MICROSECONDS, import_onnxruntime

__all__ = ["Tuning", "find_tuning", "save_tuning", "tuning_folder"]

FORMAT = 1
KIND = "tuning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How to run a bundle on this device.

    Attributes:
        threads: Threads that compute.
        spin: Microseconds that a thread waits busily for more work before it sleeps.
        affinities: CPUs of each thread but the first, as onnxruntime writes them
            ("2;3", counted from 1); None leaves the choice to the system.
        prefill_chunk: Most tokens of a prompt to feed at once; None where no bound was of use.
        step_costs: Cost of a step over so many tokens, relative to one; empty if not measured.
        compiled: Whether to load the compiled form where there is one.
    """

    threads: int
    spin: int = SPIN_MICROSECONDS
    affinities: str | None = None
    prefill_chunk: int | None = None
    step_costs: Mapping[int, float] = field(default_factory=dict)
    compiled: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tuning:
        """What :func:`dataclasses.asdict` gave, after a way through JSON.

        Raises:
            ValueError: A value is missing, unknown or outside its domain.
        """
        if set(values) != set(cls.__dataclass_fields__):
            raise ValueError("other fields than those of a tuning")
        threads, spin, chunk = values["threads"], values["spin"], values["prefill_chunk"]
        places, costs = values["affinities"], values["step_costs"]
        if not (
            (_is_count(threads, 1) and _is_count(spin, 0))
            and (chunk is None or _is_count(chunk, 1))
            and (places is None or isinstance(places, str))
            and isinstance(values["compiled"], bool)
            and isinstance(costs, dict)
            and {int(width) for width in costs} in (set(), set(WIDTHS))
            and all(isinstance(cost, float) and 0 < cost < 1000 for cost in costs.values())
        ):
            raise ValueError("a value outside its domain")
        return cls(**{**values, "step_costs": {int(width): costs[width] for width in costs}})


def tuning_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where tunings lie: in a cache folder, this user's by default."""
    return default_cache_folder(KIND) if cache_dir is None else Path(cache_dir) / KIND


def find_tuning(bundle: Bundle, *, cache_dir: str | os.PathLike[str] | None) -> Tuning | None:
    """What was measured of this bundle under these circumstances, or None.

    A file that is damaged is as good as none; a :class:`~edge_llm.errors.CacheWarning` names it.

    Args:
        bundle: The bundle.
        cache_dir: A cache folder to look into first, before this user's own.
    """
    if bundle.foreign:
        return None
    named = None if cache_dir is None else tuning_folder(cache_dir)
    for folder in (named, own_cache_folder(KIND)):
        # What the names hang on takes onnxruntime, which is not loaded for nothing.
        if folder is None or not is_readable(folder):
            continue
        if (tuning := _read(folder / _name(bundle))) is not None:
            return tuning
    return None


def save_tuning(
    bundle: Bundle, tuning: Tuning, *, cache_dir: str | os.PathLike[str] | None
) -> Path | None:
    """Keep what was measured, in place of what was kept before.

    Returns:
        The file, or None where it cannot be written (a warning says why).

    Raises:
        ArgumentError: The bundle is a foreign folder.
    """
    check_tunable(bundle)
    path = tuning_folder(cache_dir) / _name(bundle)
    document = {"tuning": asdict(tuning), "sha256": _digest(asdict(tuning))}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_through(
            path, lambda stage: _write(stage, json.dumps(document, sort_keys=True, indent=1))
        )
    except OSError as error:
        warnings.warn(
            f"The tuning cannot be kept in {str(path.parent)!r}: {error.strerror or error}.",
            CacheWarning,
            stacklevel=2,
        )
        return None
    return path


def check_tunable(bundle: Bundle) -> None:
    """Refuse folders that do not state their files' hashes.

    Raises:
        ArgumentError: The bundle is a foreign folder.
    """
    if bundle.foreign:
        raise ArgumentError(
            "bundle",
            "a bundle: tunings are kept by the files' hashes, which other folders do not state",
            str(bundle.path),
            "`edge-llm import` makes a bundle of it.",
        )


def _read(path: Path) -> Tuning | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["sha256"] != _digest(document["tuning"]):
            raise ValueError("its content is not what its hash says")
        return Tuning.from_dict(document["tuning"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"The tuning {str(path)!r} is not used, as it cannot be read: {error!r}. "
            "`edge-llm tune` makes it anew.",
            CacheWarning,
            stacklevel=5,  # whoever called LLM(...)
        )
        return None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _digest(values: Mapping[str, Any]) -> str:
    # JSON's keys are text, which sorts otherwise than numbers.
    as_read = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _name(bundle: Bundle) -> str:
    cpus, quota = cpu_allowance()
    parts = {
        "format": FORMAT,
        "graph": bundle.manifest.decoder.graph,
        "files": {name: one.sha256 for name, one in bundle.model_files.items()},
        "onnxruntime": import_onnxruntime().__version__,
        "processor": cpu_identity(),
        "cpus": cpus,
        "quota": quota,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32] + ".json"


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
