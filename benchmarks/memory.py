"""Does a model take what was predicted? Term by term, compiled and not, a process each.

    python benchmarks/memory.py --shapes smollm2-135m qwen2.5-0.5b --work-dir DIR

Int4 bundles of random weights are made on the spot and kept in the work folder. A first process
takes the steps of loading one by one and then fills the context with random tokens in chunks of
512; a second one does so through ``LLM``, for the sum. Measured are resident pages: of mapped files
in the bundle's or compiled folder (weights_file), anonymous ones that making the session adds
(weights_anonymous), those of the cache's buffers (kv), what filling the context adds besides
(scratch), and all other (runtime). The last line of stdout is a JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_llm import LLM, Bundle
from edge_llm.cli.layout import table
from edge_llm.compiled import compiled_graph
from edge_llm.memory import estimate_memory
from edge_llm.runtime import device
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import import_onnxruntime, open_session
from edge_llm.text.tokenizer import Tokenizer

CHUNK = 512


def main() -> None:
    """Measure and report; with --terms or --sum be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--quantize", default="int4", choices=["int4", "int8", "fp32"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--work-dir", type=Path, help="where to make bundles and keep them")
    parser.add_argument("--terms", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sum", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache-dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.terms:
        print(json.dumps(measure_terms(arguments.terms, arguments.cache_dir, arguments.context)))
    elif arguments.sum:
        print(json.dumps(measure_sum(arguments.sum, arguments.cache_dir, arguments.context)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            report(arguments, arguments.work_dir or Path(temporary))


def report(arguments: argparse.Namespace, work: Path) -> None:
    """Run the processes and print what they found."""
    results = []
    for shape in arguments.shapes:
        folder = make_bundle(shape, arguments.quantize, work)
        cache = work / "cache"
        for compiled in (False, True):
            options = ["--context", str(arguments.context)]
            if compiled:
                compile_bundle = [sys.executable, "-m", "edge_llm.cli.main", "compile", str(folder)]
                subprocess.run(
                    [*compile_bundle, "--cache-dir", str(cache)],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                options += ["--cache-dir", str(cache)]
            terms, whole = (child([one, str(folder), *options]) for one in ("--terms", "--sum"))
            predicted = terms["predicted"]
            measured = {**terms["measured"], "total": whole["total"]}
            rows = [(f"{shape}{', compiled' if compiled else ''}", "predicted", "measured", "")]
            for name, size in predicted.items():
                found = measured[name]
                rows.append(
                    (
                        name,
                        f"{size / 1e6:.1f} MB",
                        f"{found / 1e6:.1f} MB",
                        f"{size / max(found, 1):.2f}",
                    )
                )
            print(table(rows), f"load {whole['load']:.2f} s, ", end="")
            print(f"anonymous after it {whole['anonymous'] / 1e6:.1f} MB\n", flush=True)
            results.append(
                {"shape": shape, "compiled": compiled, "predicted": predicted, "measured": measured}
                | {name: whole[name] for name in ("load", "anonymous", "peak")}
            )
    print(json.dumps({"benchmark": "memory", "context": arguments.context, "results": results}))


def make_bundle(shape: str, quantize: str, work: Path) -> Path:
    """A bundle of random weights; what is there already is kept."""
    folder = work / f"{shape}-{quantize}"
    if not folder.is_dir():
        from edge_llm_export import export_model  # which a measured process must not import

        shapes = Path(__file__).with_name("shapes.py")
        subprocess.run([sys.executable, shapes, shape, work / shape], check=True)
        block = 128 if quantize == "int4" else None
        export_model(work / shape, folder, quantize=quantize, block=block)
    return folder


def child(options: list[str]) -> dict[str, Any]:
    """What a process of its own measures."""
    command = [sys.executable, __file__, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_terms(folder: Path, cache_dir: Path | None, context: int) -> dict[str, dict[str, int]]:
    """Load a model step by step and fill its context."""
    bundle = Bundle.open(folder)
    manifest, tokens = bundle.manifest, bundle.manifest.tokens
    compiled = compiled_graph(bundle, cache_dir=cache_dir, threads=1, verify=False)
    assert (compiled is None) == (cache_dir is None)
    import_onnxruntime()
    device.release_memory()
    start = _anonymous()
    graph = bundle.file(manifest.decoder.graph)
    session = open_session(graph, compiled=compiled, threads=1, minimum=manifest.min_onnxruntime)
    weights = _anonymous() - start
    # Behind the session, or its graph would lie in what reading the tokenizer has freed.
    tokenizer = Tokenizer.from_file(
        bundle.file(manifest.tokenizer), bos=tokens.bos, eos=tokens.eos, add_bos=tokens.add_bos
    )
    device.release_memory()
    start = _anonymous()
    decoder = open_decoder(session, manifest, capacity=context)
    buffers = list(decoder.cache.buffers.values())  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    for left in range(context, 0, -CHUNK):
        decoder.step(rng.integers(manifest.dims.vocab, size=min(CHUNK, left)), scored=1)
    kv = sum(map(_resident, buffers))
    scratch = _anonymous() - start - kv
    mapped = device.mapped_memory((compiled or graph).parent)
    total = device.resident_memory()["total"]
    assert mapped is not None
    assert tokenizer.vocab_size
    measured = {
        "weights_file": mapped,
        "weights_anonymous": weights,
        "kv": kv,
        "scratch": scratch,
        "runtime": total - mapped - weights - kv - scratch,
    }
    estimate = estimate_memory(bundle, context=context, compiled=compiled)
    predicted = dataclasses.asdict(estimate) | {"total": estimate.total}
    return {"predicted": predicted, "measured": measured}


def measure_sum(folder: Path, cache_dir: Path | None, context: int) -> dict[str, object]:
    """Load a model as everybody does, and fill its context."""
    with LLM(folder, cache_dir=cache_dir, context=context, prefill_chunk=CHUNK, threads=1) as llm:
        anonymous = _anonymous()
        prompt = np.random.default_rng(0).integers(llm.manifest.dims.vocab, size=context - 1)
        llm.generate(prompt.tolist(), max_tokens=1)
        return {
            "total": device.resident_memory()["total"],
            "load": llm.load_seconds,
            "anonymous": anonymous,
            "peak": device.peak_memory(),
        }


def _anonymous() -> int:
    return device.resident_memory()["anonymous"]


def _resident(array: NDArray[np.generic]) -> int:
    """Bytes of an array whose pages are present: bit 63 of their words in the page map."""
    first = array.ctypes.data // mmap.PAGESIZE
    pages = (array.ctypes.data + array.nbytes - 1) // mmap.PAGESIZE - first + 1
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(first * 8)
        words = np.frombuffer(file.read(pages * 8), np.uint64)
    return min(int((words >> np.uint64(63)).sum()) * mmap.PAGESIZE, array.nbytes)


if __name__ == "__main__":
    main()
