"""Making ONNX Runtime sessions: telemetry off, this process's threads, errors with a remedy."""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import re
import sys
import types
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from edge_llm.errors import (
    ArgumentError,
    CacheWarning,
    ManifestError,
    PlatformError,
    RuntimeFailure,
    TelemetryWarning,
    UnsupportedFormatError,
)
from edge_llm.runtime.device import check_platform, release_memory, usable_cores

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["create_session", "import_onnxruntime", "open_session", "resolve_threads"]

log = logging.getLogger("edge_llm")

# Between two operators of a step a worker waits for a few microseconds, between two steps for some
# hundred (a token is chosen): spinning that long and no longer leaves an idle model's cores alone.
SPIN_MICROSECONDS = 1000

# How onnxruntime says that it knows no such operator, or has no kernel of it for CPUs.
_NO_OPERATOR = re.compile(
    r"(?:find an implementation for |No Op registered for |Fatal error: )([\w.:]+\w)"
    r"(?=\(\d+\) node| with domain_version|\(-?\d+\) is not a registered)"
)

_open_sessions: weakref.WeakSet[ort.InferenceSession] = weakref.WeakSet()


def _keep_in_child() -> None:
    """Keep every session for ever: a forked child that frees one waits for threads it lacks."""
    for session in _open_sessions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_in_child)


@functools.cache
def import_onnxruntime() -> types.ModuleType:
    """Import onnxruntime with its telemetry off.

    onnxruntime starts its telemetry client when it is imported, so the environment variable must
    be set before; its API call comes too late.

    Raises:
        PlatformError: No build of onnxruntime for this machine, or none installed.
    """
    check_platform()
    if "onnxruntime" in sys.modules and os.environ.get("ORT_DISABLE_TELEMETRY") != "1":
        warnings.warn(
            "onnxruntime was imported before edge_llm loaded a model, so its telemetry is on: it "
            "has started threads, writes to the home directory and may open connections. Load the "
            "model before that import, or set ORT_DISABLE_TELEMETRY=1 before Python starts.",
            TelemetryWarning,
            stacklevel=4,  # whoever called LLM(...)
        )
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise PlatformError(
            f"onnxruntime cannot be imported: {error}.",
            "Install it with `pip install 'onnxruntime>=1.32'`.",
        ) from error


def resolve_threads(threads: int | None) -> int:
    """Threads to compute with: those asked for, or one per usable physical core.

    Raises:
        ArgumentError: More threads than the affinity mask and the CPU quota allow, or below 1.
    """
    if threads is None:
        return usable_cores()
    most = usable_cores(physical=False)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= most:
        raise ArgumentError(
            "threads",
            f"an integer from 1 to {most} (what the affinity mask and the CPU quota allow)",
            threads,
            "More threads than that make every step wait for the slowest.",
        )
    return threads


def create_session(
    model: Path,
    *,
    threads: int,
    minimum: str,
    optimized: bool = False,
    save_to: Path | None = None,
    spin: int = SPIN_MICROSECONDS,
    affinities: str | None = None,
) -> ort.InferenceSession:
    """Open a graph on the CPU.

    Args:
        model: The ONNX file.
        threads: Threads that compute, the caller's own included.
        minimum: Oldest version of onnxruntime that has the graph's operators.
        optimized: Take the graph as it is: a session of this version has written it.
        save_to: Where to write the optimized graph, its weights as the kernels want them beside it
            in a file of the same name with ".data" behind it.
        spin: Microseconds that an idle thread waits busily for more work.
        affinities: CPUs of each thread but the caller's: "2;3", counted from 1.

    Raises:
        PlatformError: onnxruntime is too old or missing.
        RuntimeFailure: ONNX Runtime refuses the graph.
        UnsupportedFormatError: The graph has an operator that ONNX Runtime lacks; it is named.
    """
    ort = import_onnxruntime()
    if _version(ort.__version__) < _version(minimum):
        raise PlatformError(
            f"The bundle needs onnxruntime {minimum}; {ort.__version__} is installed.",
            f"Upgrade it with `pip install 'onnxruntime>={minimum}'`.",
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if spin:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin))
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if affinities is not None:
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    # Without VNNI, x86 kernels for int8 weights add two products in 16 bits, which saturate; this
    # has them take others.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Planning a step's memory ahead costs a second arena of the same size, and some time a token.
    options.enable_mem_pattern = False
    if optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to is not None:
        _save(options, save_to)
    log.debug("opening %s with %d threads", model, threads)
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except onnxruntime_errors() as error:
        if operator := _NO_OPERATOR.search(str(error)):
            raise UnsupportedFormatError(
                f"{model.name} needs the operator {operator[1]}, which ONNX Runtime "
                f"{ort.__version__} does not have for this data on CPUs.",
                "Upgrade onnxruntime, or take a conversion of the model for CPUs.",
            ) from error
        raise RuntimeFailure(
            f"ONNX Runtime {ort.__version__} refuses {model.name}: {error}",
            "Check the files with `edge-llm info --verify`, or export the bundle again.",
        ) from error
    _open_sessions.add(session)
    release_memory()  # packing has freed as much as the largest matrix
    return session


def open_session(
    graph: Path,
    *,
    compiled: Path | None,
    threads: int,
    minimum: str,
    spin: int = SPIN_MICROSECONDS,
    affinities: str | None = None,
) -> ort.InferenceSession:
    """Open a graph by its compiled form, where there is one.

    Args:
        graph: The ONNX file.
        compiled: What :func:`create_session` wrote of it in this version. Another process may have
            removed it meanwhile; then a warning says so, and the graph itself is opened.
        threads: As for :func:`create_session`, like ``minimum`` and the errors.
        minimum: See there, like ``spin`` and ``affinities``.
        spin: See there.
        affinities: See there.
    """
    open_ = functools.partial(
        create_session, threads=threads, minimum=minimum, spin=spin, affinities=affinities
    )
    if compiled is not None:
        try:
            return open_(compiled, optimized=True)
        except RuntimeFailure as error:
            warnings.warn(
                f"The compiled model in {str(compiled.parent)!r} cannot be opened, so the bundle "
                f"itself is; `edge-llm compile` makes it anew. {error.message}",
                CacheWarning,
                stacklevel=5,  # whoever called LLM(...)
            )
    return open_(graph)


def _save(options: ort.SessionOptions, target: Path) -> None:
    prefix = "session.optimized_model_external_initializers"
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry(f"{prefix}_file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")


@functools.cache
def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """The exceptions that onnxruntime's native part raises."""
    import_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    found = [one for one in vars(native).values() if isinstance(one, type)]
    raised = tuple(one for one in found if issubclass(one, Exception))
    return (*raised, RuntimeError)


def _version(text: str) -> tuple[int, ...]:
    """Major and minor of a version: "1.32.0" and "1.32rc1" give (1, 32)."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?", text)
    if numbers is None:
        raise ManifestError(f"min_onnxruntime must be a version, got {text!r}.", "Export again.")
    return tuple(int(number or 0) for number in numbers.groups())
