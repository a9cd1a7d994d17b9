"""Which of ONNX Runtime's session options make decoding or reading a prompt faster?

Each try opens the bundle twice in one process, as edge_llm opens it and with one option changed,
and both answer by turns: a prompt, then tokens one by one. They are opened anew several times, in
changing order, since where weights come to lie makes a session some per cent faster or slower for
as long as it lives. Ratios are seconds with the option by those without, medians over all rounds;
"spread" gives the medians of the single openings, and "same" says whether the logits are equal bit
for bit. The try "nothing changed" shows what noise makes of it. The last line of stdout is a JSON
document.

    python benchmarks/options.py BUNDLE
    python benchmarks/options.py BUNDLE --only "spin 0" "dynamic blocks 4"
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from edge_llm import Bundle
from edge_llm.cli.layout import table
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import create_session, import_onnxruntime, resolve_threads


@dataclass(frozen=True, slots=True)
class Try:
    """Session options to change: config entries, and attributes of SessionOptions."""

    entries: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, object] = field(default_factory=dict)


TRIES = {
    "nothing changed": Try(),
    "dynamic blocks 2": Try({"session.dynamic_block_base": "2"}),
    "dynamic blocks 4": Try({"session.dynamic_block_base": "4"}),
    "dynamic blocks 16": Try({"session.dynamic_block_base": "16"}),
    "no spinning": Try({"session.intra_op.allow_spinning": "0"}),
    "spin 100 us": Try({"session.intra_op.spin_duration_us": "100"}),
    "spin 10000 us": Try({"session.intra_op.spin_duration_us": "10000"}),
    "backoff 8": Try({"session.intra_op.spin_backoff_max": "8"}),
    "backoff 64": Try({"session.intra_op.spin_backoff_max": "64"}),
    "force_spinning_stop": Try({"session.force_spinning_stop": "1"}),
    "threads bound to CPUs": Try({"session.intra_op_thread_affinities": "CPUS"}),
    "denormals as zero": Try({"session.set_denormal_as_zero": "1"}),
    "memory pattern": Try(attributes={"enable_mem_pattern": True}),
    "no CPU arena": Try(attributes={"enable_cpu_mem_arena": False}),
    "no prepacking": Try({"session.disable_prepacking": "1"}),
    "prepacking in parallel": Try({"session.prepack.enable_parallel": "1"}),
    "allocator of the device": Try({"session.use_device_allocator_for_initializers": "1"}),
    "LUT products": Try({"mlas.use_lut_gemm": "1"}),
    "float32 products": Try({"mlas.qnbit.force_fp32": "1"}),
    "parallel execution": Try({"session.execution_mode": "1"}),
    "gelu approximated": Try({"optimization.enable_gelu_approximation": "1"}),
    "deterministic": Try(attributes={"use_deterministic_compute": True}),
}


@contextlib.contextmanager
def changed(one: Try, threads: int) -> Iterator[None]:
    """Have sessions opened meanwhile get these options on top of edge_llm's own."""
    ort = import_onnxruntime()
    real = ort.InferenceSession

    def opened(model: Path, options: Any, **others: Any) -> Any:
        for name, value in one.entries.items():
            places = ";".join(str(cpu + 1) for cpu in range(1, threads))
            options.add_session_config_entry(name, value.replace("CPUS", places))
        for name, wanted in one.attributes.items():
            setattr(options, name, wanted)
        return real(model, options, **others)

    with mock.patch.object(ort, "InferenceSession", opened):
        yield


class Way:
    """A bundle opened with some options."""

    def __init__(self, bundle: Bundle, one: Try, threads: int, prompt: int, tokens: int) -> None:
        manifest = bundle.manifest
        with changed(one, threads):
            session = create_session(
                bundle.file(manifest.decoder.graph),
                threads=threads,
                minimum=manifest.min_onnxruntime,
            )
        self.decoder: Decoder = open_decoder(session, manifest, capacity=prompt + tokens, rows=1)
        self._prompt = np.random.default_rng(0).integers(0, manifest.dims.vocab, prompt)
        self._tokens = tokens

    def answer(self) -> tuple[float, float, NDArray[np.float32]]:
        """Seconds of the prompt and of each token, and the last logits, float32 [vocab]."""
        started = time.perf_counter()
        self.decoder.step(self._prompt, scored=1)
        prompted = time.perf_counter()
        for token in range(self._tokens):
            logits = self.decoder.step([token], scored=1)
        ended = time.perf_counter()
        self.decoder.cache.truncate(0, 0)
        return prompted - started, (ended - prompted) / self._tokens, logits[0].copy()


def compare(
    bundle: Bundle, one: Try, *, threads: int, prompt: int, tokens: int, openings: int, rounds: int
) -> dict[str, Any]:
    """Ratios of seconds with the options by those without."""
    decode: list[list[float]] = []
    prefill: list[list[float]] = []
    same = True
    for opening in range(openings):
        pair = [Try(), one] if opening % 2 == 0 else [one, Try()]
        ways = [Way(bundle, each, threads, prompt, tokens) for each in pair]
        plain, other = ways if opening % 2 == 0 else reversed(ways)
        same &= bool(np.array_equal(plain.answer()[2], other.answer()[2]))  # the warm-up
        decode.append([])
        prefill.append([])
        for round_ in range(rounds):
            order = (plain, other) if round_ % 2 == 0 else (other, plain)
            took = {way: way.answer() for way in order}
            prefill[-1].append(took[other][0] / took[plain][0])
            decode[-1].append(took[other][1] / took[plain][1])
    return {
        "decode": statistics.median(itertools.chain(*decode)),
        "decode_spread": [statistics.median(each) for each in decode],
        "prefill": statistics.median(itertools.chain(*prefill)),
        "prefill_spread": [statistics.median(each) for each in prefill],
        "same": same,
    }


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(TRIES), metavar="NAME")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--openings", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each opening")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    bundle = Bundle.open(arguments.bundle)
    threads = resolve_threads(arguments.threads)
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.only or TRIES:
        try:
            results[name] = compare(
                bundle,
                TRIES[name],
                threads=threads,
                prompt=arguments.prompt_tokens,
                tokens=arguments.max_tokens,
                openings=arguments.openings,
                rounds=arguments.rounds,
            )
        except Exception as error:  # refused in one way or another, which the table tells
            results[name] = {"refused": f"{type(error).__name__}: {error}"}
    rows = [("option", "decode", "spread", "prefill", "spread", "logits")]
    for name, one in results.items():
        if "refused" in one:
            rows.append((name, "refused", one["refused"][:60], "", "", ""))
            continue
        spreads = [
            " ".join(f"{x:.3f}" for x in one[f"{key}_spread"]) for key in ("decode", "prefill")
        ]
        logits = "same" if one["same"] else "others"
        decode, prefill = f"{one['decode']:.3f}", f"{one['prefill']:.3f}"
        rows.append((name, decode, spreads[0], prefill, spreads[1], logits))
    print(f"{bundle.manifest.name}, {threads} threads: ratios of seconds; below 1 is faster")
    print(table(rows))
    document = {"benchmark": "options", "model": bundle.manifest.name, "threads": threads}
    print(json.dumps({**document, "results": results}))


if __name__ == "__main__":
    main()
