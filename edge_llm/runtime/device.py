"""What this machine lets this process do: cores, memory, instruction sets, heat.

Linux tells most of it in /proc and /sys; where a system does not tell, the answer is None.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from edge_llm.errors import PlatformError

__all__ = [
    "available_memory",
    "big_cpus",
    "check_platform",
    "cpu_allowance",
    "cpu_features",
    "cpu_identity",
    "cpu_name",
    "cpus_of_cores",
    "mapped_memory",
    "others_cpu_seconds",
    "peak_memory",
    "release_memory",
    "resident_memory",
    "throttle_events",
    "usable_cores",
]

# Where Linux tells; tests put a tree of their own here.
PROC = Path("/proc")
SYS = Path("/sys")
LIB = Path("/lib")

# What tells one processor's kernels from another's in /proc/cpuinfo: x86's fields, then ARM's.
IDENTITY = (
    *("vendor_id", "cpu family", "model", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
)

# Instruction sets that decide which of ONNX Runtime's kernels run.
_X86 = ("sse4_2", "avx2", "avx_vnni", "avx512_vnni", "avx512f")
FEATURES = (*_X86, "asimddp", "i8mm", "sve")

# Cores below this share of the fastest one's speed are little ones: every step waits for them.
BIG = 0.75


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
    return platform.libc_ver()[0] != "glibc" and any(LIB.glob("ld-musl-*"))


def usable_cores(*, physical: bool = True, big: bool = True) -> int:
    """Cores inside the affinity mask, cut down to the cgroup's CPU quota; at least 1.

    Args:
        physical: Count the hardware threads of a core once, where the system tells them apart.
        big: Of cores that differ in speed count the fast ones only (where ``physical``).
    """
    mask = big_cpus() if physical and big else _affinity_mask()
    cores = len(cpus_of_cores(mask) if physical else mask)
    quota = _cgroup_cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def big_cpus() -> set[int]:
    """The CPUs inside the affinity mask, without those of little cores where cores differ."""
    mask = _affinity_mask()
    # cpu_capacity weighs the cores' designs too; a frequency alone is the next best.
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        folder = SYS / "devices/system/cpu"
        speeds = {cpu: _count(_read(folder / f"cpu{cpu}" / name)) or 0 for cpu in mask}
        if all(speeds.values()):
            most = max(speeds.values())
            return {cpu for cpu, speed in speeds.items() if speed >= BIG * most}
    return mask


def cpus_of_cores(cpus: Iterable[int]) -> list[int]:
    """One CPU, the first, of each physical core that some CPUs are hardware threads of.

    Two hardware threads of a core share the units that a matrix product keeps busy.
    """
    first: dict[str, int] = {}
    for cpu in sorted(cpus):
        first.setdefault(_siblings(cpu), cpu)
    return list(first.values())


def cpu_allowance() -> tuple[tuple[int, ...], float | None]:
    """The CPUs of the affinity mask, and the CPUs' worth of time that control groups allow."""
    return tuple(sorted(_affinity_mask())), _cgroup_cpu_quota()


def _affinity_mask() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    return _read(SYS / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _cgroup_cpu_quota() -> float | None:
    """Cores' worth of CPU time that the control groups around this process allow."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        both = (_read(folder / "cpu.max") or "").split()  # version 2: "max 100000"
        if len(both) != 2:
            both = [_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        quota, period = map(_count, both)
        if quota and period:  # no limit is "max" in version 2 and -1 in version 1
            quotas.append(quota / period)
    return min(quotas, default=None)


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's control group and those around it, innermost first (cgroup v2 and v1)."""
    folders: list[Path] = []
    for line in (_read(PROC / "self/cgroup") or "").splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if controllers == "":
            root = SYS / "fs/cgroup"
        elif controller in controllers.split(","):
            root = SYS / "fs/cgroup" / controller
        else:
            continue
        inner = root / path.lstrip("/")
        folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(root))]
    return folders


def others_cpu_seconds() -> float | None:
    """CPU seconds that all but this process have had of its CPUs; only differences tell a thing.

    What a hypervisor gave to other machines counts. None where the system does not tell.
    """
    if not hasattr(os, "sysconf"):
        return None
    busy, told = 0, 0
    mask = {f"cpu{cpu}" for cpu in _affinity_mask()}
    for line in (_read(PROC / "stat") or "").splitlines():
        name, *ticks = line.split()
        if name in mask:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, ticks[:8])
            busy += user + nice + system + irq + softirq + steal
            told += 1
    own = sum(os.times()[:4])
    return busy / os.sysconf("SC_CLK_TCK") - own if told == len(mask) else None


def available_memory() -> int | None:
    """Bytes that can still be allocated: what the system has left, or the control group."""
    system = _fields(PROC / "meminfo").get("MemAvailable")
    limits = [] if system is None else [system * 1024]
    for folder in _cgroup_folders("memory"):
        for limit_file, used_file, cache_field in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _count(_read(folder / limit_file)), _count(_read(folder / used_file))
            if limit is not None and used is not None:
                # Cached files count as used, and are dropped as soon as memory is asked for.
                cache = _fields(folder / "memory.stat").get(cache_field, 0)
                limits.append(max(0, limit - max(0, used - cache)))
    return min(limits, default=None)


def resident_memory() -> dict[str, int]:
    """Bytes resident now, by kind: "total", "anonymous" and "file" (empty where not told)."""
    kinds = {"VmRSS": "total", "RssAnon": "anonymous", "RssFile": "file"}
    told = _fields(PROC / "self/status")
    return {kind: told[name] * 1024 for name, kind in kinds.items() if name in told}


def mapped_memory(folder: Path) -> int | None:
    """Bytes resident now of files in a folder that this process has mapped; None if not told."""
    maps = _read(PROC / "self/smaps")
    if maps is None:
        return None
    folder = folder.resolve()
    inside, total = False, 0
    for line in maps.splitlines():
        name, *values = line.split(maxsplit=5)
        if not name.endswith(":"):  # a mapping: addresses, rights, offset, device, inode, path
            inside = len(values) == 5 and Path(values[4]).parent == folder
        elif inside and name == "Rss:":
            total += int(values[0]) * 1024
    return total


def release_memory() -> None:
    """Give the system back what was freed; glibc keeps it, and a loaded model needs none of it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int | None:
    """Most bytes that were ever resident in this process."""
    # getrusage() starts from what the parent held when it started this process; VmHWM does not.
    told = _fields(PROC / "self/status").get("VmHWM")
    if told is not None:
        return told * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """What the processor calls itself."""
    lines = [line.partition(":") for line in (_read(PROC / "cpuinfo") or "").splitlines()]
    told = {name.strip(): value.strip() for name, _, value in lines}
    for name in ("model name", "Model", "Hardware"):
        if told.get(name):
            return told[name]
    model = _read(PROC / "device-tree/model")
    return model.rstrip("\0") if model else platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """The instruction sets among :data:`FEATURES` that the system reports."""
    for line in (_read(PROC / "cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            present = set(value.split())
            return tuple(feature for feature in FEATURES if feature in present)
    return ()


def cpu_identity() -> tuple[str, ...]:
    """All that the system tells of the kinds of cores here; equal where the same kernels run."""
    lines = [line.partition(":") for line in (_read(PROC / "cpuinfo") or "").splitlines()]
    told = {(name.strip(), value.strip()) for name, _, value in lines}
    fields = sorted(f"{name}: {value}" for name, value in told if name in IDENTITY)
    return (platform.machine(), *(fields or [platform.processor()]))


def throttle_events() -> int | None:
    """A count that rises when the processor is slowed down by heat, where the system tells.

    x86 counts events per core; a Raspberry Pi's firmware gives a bit field, whose bits 1 to 3 and
    17 to 19 say that the frequency is or was capped.
    """
    flags = _count(_read(SYS / "devices/platform/soc/soc:firmware/get_throttled"), base=16)
    if flags is not None:
        return (flags & 0xE000E).bit_count()
    cores = (SYS / "devices/system/cpu").glob("cpu*/thermal_throttle/core_throttle_count")
    counts = [count for core in cores if (count := _count(_read(core))) is not None]
    return sum(counts) if counts else None


def _read(path: Path) -> str | None:
    """A small file of the system; None where it is not there or not to be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _count(text: str | None, *, base: int = 10) -> int | None:
    """A number that is not negative; None where a system tells anything else."""
    try:
        number = int(text or "", base)
    except ValueError:
        return None
    return number if number >= 0 else None


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a table whose lines are a name, perhaps a colon, and a number."""
    lines = [line.split() for line in (_read(path) or "").splitlines()]
    pairs = [(words[0].rstrip(":"), _count(words[1])) for words in lines if len(words) > 1]
    return {name: number for name, number in pairs if number is not None}
