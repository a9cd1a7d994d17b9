"""What the machine allows, read from trees like those of real machines, and from broken ones."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_llm.errors import PlatformError
from edge_llm.runtime import device

Tree = Callable[[dict[str, str | bytes]], None]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Writes files below a root that stands for ``/``; nothing else is there."""
    for name in ("PROC", "SYS", "LIB"):
        monkeypatch.setattr(device, name, tmp_path / name.lower())

    def write(files: dict[str, str | bytes]) -> None:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def affinity(monkeypatch: pytest.MonkeyPatch, cpus: Iterable[int]) -> None:
    allowed = set(cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)


def siblings(*groups: str) -> dict[str, str | bytes]:
    """Hardware threads that share a core, as Linux lists them: ``0,4`` or ``0-1``."""
    files: dict[str, str | bytes] = {}
    for group in groups:
        first, _, last = group.partition("-")
        cpus = range(int(first), int(last) + 1) if last else map(int, group.split(","))
        for cpu in cpus:
            files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{group}\n"
    return files


def quota_v2(group: str, content: str) -> dict[str, str | bytes]:
    return {"proc/self/cgroup": f"0::{group}\n", f"sys/fs/cgroup{group}/cpu.max": content}


def quota_v1(group: str, quota: str, period: str = "100000") -> dict[str, str | bytes]:
    folder = f"sys/fs/cgroup/cpu{group}"
    return {
        "proc/self/cgroup": f"4:memory:/other\n2:cpu,cpuacct:{group}\n1:name=systemd:/x\n",
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


@pytest.mark.parametrize("cpus", [{0}, {1, 3}, {0, 1, 2, 3, 4, 5, 6, 7}])
def test_cores_are_those_of_the_affinity_mask(
    cpus: set[int], tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    affinity(monkeypatch, cpus)
    tree({})
    assert device.usable_cores() == len(cpus)


@pytest.mark.parametrize(
    ("cpus", "cores"), [(range(8), 4), ({0, 4}, 1), ({0, 1}, 2), ({0, 1, 4}, 2), ({5}, 1)]
)
def test_threads_of_one_core_count_once(
    cpus: Iterable[int], cores: int, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    affinity(monkeypatch, cpus)
    tree(siblings("0,4", "1,5", "2,6", "3,7"))
    assert device.usable_cores() == cores


def test_a_cpu_of_each_core(tree: Tree) -> None:
    tree(siblings("0,4", "1,5", "2,6", "3,7"))
    assert device.cpus_of_cores({7, 4, 3, 0, 1}) == [0, 1, 3]
    assert device.cpus_of_cores([]) == []


def test_siblings_may_be_listed_as_a_range(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity(monkeypatch, range(4))
    tree(siblings("0-1", "2-3"))
    assert device.usable_cores() == 2


def test_empty_files_of_siblings_do_not_make_one_core(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    affinity(monkeypatch, range(2))
    tree({f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": "\n" for i in (0, 1)})
    assert device.usable_cores() == 2


QUOTAS = [
    (400_000, 4),
    (350_000, 3),
    (150_000, 1),  # one and a half threads would wait for one another
    (100_000, 1),
    (50_000, 1),
    (1_000, 1),
    (6_400_000, 8),
]


@pytest.mark.parametrize(("quota", "threads"), QUOTAS)
def test_quota_of_cgroup_v2(
    quota: int, threads: int, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    affinity(monkeypatch, range(8))
    tree(quota_v2("/user.slice/app", f"{quota} 100000\n"))
    assert device.usable_cores() == threads


@pytest.mark.parametrize(("quota", "threads"), QUOTAS)
def test_quota_of_cgroup_v1(
    quota: int, threads: int, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    affinity(monkeypatch, range(8))
    tree(quota_v1("/docker/1a2b", str(quota)))
    assert device.usable_cores() == threads


def test_the_period_counts(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity(monkeypatch, range(8))
    tree(quota_v2("/", "100000 50000"))
    assert device.usable_cores() == 2
    tree(quota_v1("/", "30000", "10000"))
    assert device.usable_cores() == 3


def test_a_quota_that_is_not_set_is_none(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity(monkeypatch, range(8))
    for files in (quota_v2("/", "max 100000"), quota_v1("/", "-1"), quota_v1("/", "1", "0")):
        tree(files)
        assert device.usable_cores() == 8


def test_the_tightest_group_around_the_process_decides(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    affinity(monkeypatch, range(8))
    tree(
        {
            "proc/self/cgroup": "0::/a/b/c\n",
            "sys/fs/cgroup/cpu.max": "max 100000",
            "sys/fs/cgroup/a/cpu.max": "200000 100000",
            "sys/fs/cgroup/a/b/cpu.max": "600000 100000",
            "sys/fs/cgroup/a/b/c/cpu.max": "max 100000",
            "sys/fs/cgroup/a/other/cpu.max": "100000 100000",
            "cpu.max": "100000 100000",  # outside the tree of groups
        }
    )
    assert device.usable_cores() == 2


def test_in_a_container_the_group_is_mounted_at_the_root(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    # /proc names the host's path, which the container does not see.
    affinity(monkeypatch, range(8))
    tree(
        {
            "proc/self/cgroup": "2:cpu,cpuacct:/docker/1a2b\n0::/system.slice/docker.service\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        }
    )
    assert device.usable_cores() == 3


def speeds(name: str, *values: int) -> dict[str, str | bytes]:
    folder = "sys/devices/system/cpu"
    return {f"{folder}/cpu{cpu}/{name}": f"{value}\n" for cpu, value in enumerate(values)}


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
@pytest.mark.parametrize(
    ("values", "big"),
    [
        ((1024, 1024, 1024, 1024), {0, 1, 2, 3}),
        ((530, 530, 530, 530, 1024, 1024, 1024, 1024), {4, 5, 6, 7}),  # Rockchip RK3588
        ((325, 325, 325, 325, 890, 890, 890, 1024), {4, 5, 6, 7}),  # Snapdragon: gold and prime
        ((5_000_000, 4_800_000, 4_900_000, 5_000_000), {0, 1, 2, 3}),  # a PC's preferred cores
        ((1024, 0, 400, 1024), {0, 1, 2, 3}),  # not told of all: none is left out
    ],
)
def test_little_cores_do_not_count(
    name: str,
    values: tuple[int, ...],
    big: set[int],
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    affinity(monkeypatch, range(len(values)))
    tree(speeds(name, *values))
    assert device.big_cpus() == big
    assert device.usable_cores() == len(big)
    assert device.usable_cores(big=False) == device.usable_cores(physical=False) == len(values)


def test_capacity_outweighs_frequency(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity(monkeypatch, range(2))
    tree(speeds("cpu_capacity", 400, 1024) | speeds("cpufreq/cpuinfo_max_freq", 2000, 2000))
    assert device.big_cpus() == {1}


def test_a_mask_of_little_cores_uses_them(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity(monkeypatch, {0, 1})
    tree(speeds("cpu_capacity", 400, 400, 1024, 1024))
    assert device.usable_cores() == 2


def test_quotas_bind_big_cores_too(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity(monkeypatch, range(6))
    tree(speeds("cpu_capacity", 400, 400, 400, 400, 1024, 1024) | quota_v2("/", "150000 100000"))
    assert device.usable_cores() == 1
    assert device.cpu_allowance() == ((0, 1, 2, 3, 4, 5), 1.5)


def test_without_affinity_masks(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    tree({})
    for count, cores in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert device.usable_cores() == cores


GIB = 1 << 30
MEMINFO = "MemTotal:        8388608 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 4 * GIB),
        (
            {
                "proc/self/cgroup": "0::/app",
                "sys/fs/cgroup/app/memory.max": f"{2 * GIB}",
                "sys/fs/cgroup/app/memory.current": f"{GIB // 2}",
            },
            2 * GIB - GIB // 2,
        ),
        (
            {
                "proc/self/cgroup": "0::/app",
                "sys/fs/cgroup/app/memory.max": "max",
                "sys/fs/cgroup/app/memory.current": f"{GIB}",
            },
            4 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/app",
                "sys/fs/cgroup/app/memory.max": f"{2 * GIB}",
                "sys/fs/cgroup/app/memory.current": f"{2 * GIB}",
                # A model file that was read is cached, and gives way to whatever is allocated.
                "sys/fs/cgroup/app/memory.stat": f"anon 7\nfile {GIB}\ninactive_file {GIB}\n",
            },
            GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/app",
                "sys/fs/cgroup/app/memory.max": f"{GIB}",
                "sys/fs/cgroup/app/memory.current": f"{2 * GIB}",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/app\n0::/\n",
                "sys/fs/cgroup/memory/app/memory.limit_in_bytes": f"{3 * GIB}",
                "sys/fs/cgroup/memory/app/memory.usage_in_bytes": f"{2 * GIB}",
                "sys/fs/cgroup/memory/app/memory.stat": f"total_inactive_file {GIB}",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{5 * GIB}",
            },
            2 * GIB,
        ),
    ],
    ids=["no group", "v2", "no limit", "v2 with cached files", "over the limit", "v1"],
)
def test_available_memory(files: dict[str, str | bytes], available: int, tree: Tree) -> None:
    tree({"proc/meminfo": MEMINFO, **files})
    assert device.available_memory() == available


def test_resident_memory(tree: Tree) -> None:
    tree({"proc/self/status": "Name:\tpython\nVmRSS:\t  20 kB\nRssAnon:\t 8 kB\nRssFile: 12 kB\n"})
    assert device.resident_memory() == {"total": 20480, "anonymous": 8192, "file": 12288}


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own files")
def test_on_this_very_machine() -> None:
    assert 1 <= device.usable_cores() <= len(os.sched_getaffinity(0))
    resident, available = device.resident_memory(), device.available_memory()
    peak = device.peak_memory()
    assert peak is not None
    assert 1 << 20 < resident["anonymous"] <= resident["total"] <= peak * 1.01 + (1 << 20)
    assert available is not None
    assert available > 1 << 20
    assert device.cpu_name()
    device.check_platform()


def test_the_processor_on_x86(tree: Tree) -> None:
    one = "processor : {}\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\n"
    tree({"proc/cpuinfo": one.format(0) + one.format(1)})
    assert device.cpu_name() == "AMD EPYC 9B14"
    assert device.cpu_features() == ("avx2", "avx512_vnni", "avx512f")


def test_the_processor_on_arm(tree: Tree) -> None:
    tree(
        {
            "proc/cpuinfo": "processor : 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0b\n",
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        }
    )
    assert device.cpu_name() == "Raspberry Pi 5 Model B Rev 1.0"
    assert device.cpu_features() == ("asimddp",)
    assert "asimddp" not in ["asimd"]  # a Pi 4 has the one and not the other
    tree({"proc/cpuinfo": "Features : fp asimd\n"})
    assert device.cpu_features() == ()


@pytest.mark.parametrize(
    ("flags", "events"),
    [("0", 0), ("0x0", 0), ("50005", 0), ("0x20002", 2), ("e000e", 6), ("4\n", 1), ("80000", 1)],
)
def test_a_raspberry_pi_tells_of_throttling(flags: str, events: int, tree: Tree) -> None:
    # Bits 0 and 16 (too little voltage) alone slow nothing down; bit 2 is "throttled now".
    tree({"sys/devices/platform/soc/soc:firmware/get_throttled": flags})
    expected = (int(flags, 16) & 0b1110_0000_0000_0000_1110).bit_count()
    assert device.throttle_events() == expected
    if flags != "50005":
        assert expected == events


def test_x86_tells_of_throttling_core_by_core(tree: Tree) -> None:
    folder = "sys/devices/system/cpu"
    tree({f"{folder}/cpu{i}/thermal_throttle/core_throttle_count": f"{i + 1}\n" for i in range(4)})
    assert device.throttle_events() == 10
    tree({f"{folder}/cpu3/thermal_throttle/core_throttle_count": "no number"})
    assert device.throttle_events() == 6


def test_systems_that_tell_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    for system in ("darwin", "win32", "freebsd14"):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        tree({})
        assert device.usable_cores() >= 1
        assert device.available_memory() is None
        assert device.resident_memory() == {}
        assert device.cpu_name()
        assert device.cpu_features() == ()
        assert device.throttle_events() is None
        assert (device.peak_memory() is None) == (system == "win32")
        device.check_platform()


def test_peak_memory_is_this_programs_own(tree: Tree) -> None:
    tree({"proc/self/status": "VmPeak:\t 90 kB\nVmHWM:\t 30 kB\n"})
    assert device.peak_memory() == 30 * 1024


def test_peak_memory_is_in_bytes_on_every_system(
    monkeypatch: pytest.MonkeyPatch, tree: Tree
) -> None:
    tree({})
    resource = pytest.importorskip("resource", reason="Windows has no module resource")
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", "linux")
    in_kib = device.peak_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    in_bytes = device.peak_memory()
    assert in_kib is not None
    assert in_bytes is not None
    assert in_kib >= here * 1024
    assert here <= in_bytes < in_kib


GARBAGE = ["", "\n", "::", "0", "0::", "a:b", "max", "-1", "1 2 3", "NaN", "0x", "\0", "½ 1"]
PROBED = [
    "proc/self/cgroup",
    "proc/self/status",
    "proc/meminfo",
    "proc/cpuinfo",
    "proc/device-tree/model",
    "sys/devices/system/cpu/cpu0/topology/thread_siblings_list",
    "sys/devices/system/cpu/cpu0/cpu_capacity",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq",
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
    "sys/devices/platform/soc/soc:firmware/get_throttled",
    "sys/fs/cgroup/cpu.max",
    "sys/fs/cgroup/memory.max",
    "sys/fs/cgroup/memory.current",
    "sys/fs/cgroup/memory.stat",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us",
]
LINES = ["MemAvailable:", "MemAvailable: x kB", "VmRSS:", "VmRSS: -3", "0::/", "1:cpu:/", "flags"]
# The fixture writes into one folder, which every example fills anew.
every_example_writes_all = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(st.data())
@every_example_writes_all
def test_garbage_is_never_a_traceback(tree: Tree, data: st.DataObject) -> None:
    text = st.sampled_from(GARBAGE) | st.lists(st.sampled_from(LINES)).map("\n".join)
    content = text.map(str.encode) | st.binary(max_size=20)
    tree({name: data.draw(content, label=name) for name in PROBED})
    assert device.usable_cores() >= 1
    memory = device.available_memory()
    assert memory is None or memory >= 0
    assert all(value >= 0 for value in device.resident_memory().values())
    events = device.throttle_events()
    assert events is None or events >= 0
    assert isinstance(device.cpu_name(), str)
    assert isinstance(device.cpu_features(), tuple)


def test_folders_in_place_of_files(tree: Tree) -> None:
    tree({f"{name}/x": "" for name in PROBED})
    assert device.usable_cores() >= 1
    assert device.available_memory() is None
    assert device.throttle_events() is None


def test_32_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    with pytest.raises(PlatformError, match="64-bit") as caught:
        device.check_platform()
    assert "Raspberry Pi OS" in caught.value.remedy


@pytest.mark.parametrize("told", [("", ""), ("musl", "1.2.5"), ("libc", "")])
def test_musl_is_refused(
    told: tuple[str, str], tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: told)
    tree({})
    device.check_platform()  # a system that does not tell gets the benefit of the doubt
    tree({"lib/ld-musl-aarch64.so.1": b""})
    with pytest.raises(PlatformError, match="musl") as caught:
        device.check_platform()
    assert "Debian" in caught.value.remedy


def test_glibc_with_musl_installed_beside_it_is_served(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.41"))
    tree({"lib/ld-musl-x86_64.so.1": b""})
    device.check_platform()


def test_what_others_had_of_the_cores(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity(monkeypatch, {0, 2})
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(os, "times", lambda: (1.0, 0.5, 0.25, 0.25, 99.0))
    cpus = [
        "cpu  9 9 9 9 9 9 9 9 9 9",
        "cpu0 100 20 30 7777 888 4 6 40 0 0",
        "cpu1 9 9 9 9 9 9 9 9 9 9",
    ]
    tree({"proc/stat": "\n".join([*cpus, "intr 5 0"])})
    assert device.others_cpu_seconds() is None  # nothing is told of CPU 2
    tree({"proc/stat": "\n".join([*cpus, "cpu2 100 100 0 0 0 0 0 0 0 0", "intr 5 0"])})
    assert device.others_cpu_seconds() == pytest.approx(2 + 2 - 2)
