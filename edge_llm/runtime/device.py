"""What this machine lets this process do: cores, memory, instruction sets, heat.

Linux tells most of it in /proc and /sys; where a system does not tell, the answer is None.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from edge_llm.errors import PlatformError

__all__ = [
    "available_memory",
    "check_platform",
    "cpu_features",
    "cpu_name",
    "peak_memory",
    "resident_memory",
    "throttle_events",
    "usable_cores",
]

# Instruction sets that decide which of ONNX Runtime's kernels run.
FEATURES = ("avx2", "avx_vnni", "avx512_vnni", "avx512f", "asimddp", "i8mm", "sve")


def check_platform() -> None:
    """Refuse machines for which onnxruntime has no build, before importing it.

    Raises:
        PlatformError: A 32-bit Python, or a system on musl.
    """
    if sys.maxsize < 2**32:
        raise PlatformError(
            "edge_llm needs a 64-bit Python; this one has 32 bits.",
            "Install a 64-bit system (Raspberry Pi OS has a 64-bit image) and its Python.",
        )
    if sys.platform == "linux" and _is_musl():
        raise PlatformError(
            "edge_llm needs a Linux on glibc; this one is on musl.",
            "Use a Debian or Ubuntu image, such as python:3.12-slim in place of -alpine.",
        )


def _is_musl() -> bool:
    return platform.libc_ver()[0] != "glibc" and any(Path("/lib").glob("ld-musl-*"))


def usable_cores() -> int:
    """Physical cores inside the affinity mask, cut down to the cgroup's CPU quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        mask = os.sched_getaffinity(0)
    else:
        mask = set(range(os.cpu_count() or 1))
    # Two hardware threads of a core share the units that a matrix product keeps busy.
    cores = len({_siblings(cpu) for cpu in mask})
    quota = _cgroup_cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def _siblings(cpu: int) -> str:
    text = _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    return text if text is not None else str(cpu)


def _cgroup_cpu_quota() -> float | None:
    """Cores' worth of CPU time that the control groups around this process allow."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        both = (_read(folder / "cpu.max") or "").split()
        if len(both) != 2:
            both = [
                _read(folder / "cpu.cfs_quota_us") or "max",
                _read(folder / "cpu.cfs_period_us") or "0",
            ]
        quota, period = both
        if quota not in ("max", "-1") and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's control group and those around it, innermost first (cgroup v2 and v1)."""
    folders: list[Path] = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = Path("/sys/fs/cgroup")
        elif controller in controllers.split(","):
            root = Path("/sys/fs/cgroup") / controller
        else:
            continue
        inner = root / path.lstrip("/")
        folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(root))]
    return folders


def available_memory() -> int | None:
    """Bytes that can still be allocated: what the system has left, or the control group."""
    limits = []
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for folder in _cgroup_folders("memory"):
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit and used and limit != "max":
            limits.append(max(0, int(limit) - int(used)))
    return min(limits, default=None)


def resident_memory() -> dict[str, int]:
    """Bytes resident now, by kind: "total", "anonymous" and "file" (empty where not told)."""
    fields = {"VmRSS": "total", "RssAnon": "anonymous", "RssFile": "file"}
    found = {}
    for line in (_read(Path("/proc/self/status")) or "").splitlines():
        name, _, value = line.partition(":")
        if name in fields:
            found[fields[name]] = int(value.split()[0]) * 1024
    return found


def peak_memory() -> int | None:
    """Most bytes that were ever resident in this process."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """What the processor calls itself."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    model = _read(Path("/proc/device-tree/model"))
    return model.rstrip("\0") if model else platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """The instruction sets among :data:`FEATURES` that the system reports."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            present = set(value.split())
            return tuple(feature for feature in FEATURES if feature in present)
    return ()


def throttle_events() -> int | None:
    """A count that rises when the processor is slowed down by heat, where the system tells.

    x86 counts events per core; a Raspberry Pi's firmware gives a bit field, whose bits 1 to 3 and
    17 to 19 say that the frequency is or was capped.
    """
    firmware = _read(Path("/sys/devices/platform/soc/soc:firmware/get_throttled"))
    if firmware is not None:
        return (int(firmware, 16) & 0xE000E).bit_count()
    cpus = Path("/sys/devices/system/cpu")
    counts = [_read(file) for file in cpus.glob("cpu*/thermal_throttle/core_throttle_count")]
    known = [int(count) for count in counts if count is not None]
    return sum(known) if known else None


def _read(path: Path) -> str | None:
    """A small file of the system; None where it is not there or not to be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
