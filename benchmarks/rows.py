"""What do more rows cost? Products with several vectors, and prompts read together.

- products: microseconds of the product of so many vectors with each matrix of a shape's layer and
  with a part of its head, in each operator that multiplies integers. A session holds several
  matrices of one size, so that none stays in the cache.
- prompts: milliseconds a prompt, where 16 short ones are read in steps of so many rows.

By turns, medians over rounds; random weights. The last line of stdout is a JSON document.

    python benchmarks/rows.py BUNDLE
    python benchmarks/rows.py BUNDLE --rows prompts --rounds 9
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if not __package__:  # run by its path: only this folder is on sys.path
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.engines.timing import by_turns
from edge_llm import Bundle
from edge_llm.cli.layout import table
from edge_llm.manifest import Manifest
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import create_session, import_onnxruntime, resolve_threads

COPIES, REPEATS = 8, 5
VECTORS = (1, 4, 8, 16, 32, 128)
HEAD_ROWS = 8192
PROMPTS, LENGTHS, TOGETHER = 16, (8, 16, 32, 64), (1, 2, 4, 8)

Matrix = tuple[list[Any], str, dict[str, Any]]
"""Initializers, the operator that multiplies by them, and its attributes."""


def blocks_of(bits: int, columns: int, rows: int, rng: np.random.Generator) -> Matrix:
    """A matrix in blocks of 128 integers, for MatMulNBits."""
    count = -(-columns // 128)
    integers = rng.integers(0, 256, (rows, count, 16 * bits), dtype=np.uint8)
    scales = rng.random((rows, count), dtype=np.float32) / 100
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": 128, "accuracy_level": 4}
    return [integers, scales], "MatMulNBits", sizes


def with_a_scale_per_row(columns: int, rows: int, rng: np.random.Generator) -> Matrix:
    """A matrix of 8-bit integers, for DynamicQuantizeMatMul."""
    integers = rng.integers(-127, 128, (columns, rows), dtype=np.int8)
    return [integers, rng.random(rows, dtype=np.float32) / 100], "DynamicQuantizeMatMul", {}


WAYS: Mapping[str, Callable[[int, int, np.random.Generator], Matrix]] = {
    "int4 block 128": lambda columns, rows, rng: blocks_of(4, columns, rows, rng),
    "int8 block 128": lambda columns, rows, rng: blocks_of(8, columns, rows, rng),
    "int8 row": with_a_scale_per_row,
}


def open_products(way: str, columns: int, rows: int, threads: int) -> Any:
    """A session that multiplies its input by several matrices of one size."""
    rng = np.random.default_rng(0)
    nodes, constants = [], []
    for i in range(COPIES):
        arrays, operator, attributes = WAYS[way](columns, rows, rng)
        names = [f"{i}.{j}" for j in range(len(arrays))]
        constants += [
            numpy_helper.from_array(a, name) for a, name in zip(arrays, names, strict=True)
        ]
        domain = "com.microsoft"
        nodes.append(
            helper.make_node(operator, ["x", *names], [f"y{i}"], domain=domain, **attributes)
        )
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(COPIES)], ["y"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["vectors", size])
        for name, size in (("x", columns), ("y", rows))
    ]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def seconds(session: Any, given: Mapping[str, Any]) -> float:
    """What a run takes."""
    started = time.perf_counter()
    for _ in range(REPEATS):
        session.run(None, given)
    return (time.perf_counter() - started) / REPEATS


def matrices(manifest: Manifest) -> list[tuple[int, int]]:
    """Columns and rows of the products of a layer, and of a part of the head."""
    dims = manifest.dims
    hidden, inner, heads = dims.hidden, dims.intermediate, dims.heads
    if hidden is None or inner is None or heads is None:
        sys.exit("BUNDLE must be what edge-llm has exported, for another's sizes are not known.")
    queries, keys = heads * dims.head_dim, dims.kv_heads * dims.head_dim
    return [
        (hidden, queries + 2 * keys),
        (queries, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
        (hidden, HEAD_ROWS),
    ]


def measure_products(manifest: Manifest, *, threads: int, rounds: int) -> dict[str, Any]:
    """Microseconds of a product, by matrix, way and number of vectors."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for columns, rows in matrices(manifest):
        sessions = {way: open_products(way, columns, rows, threads) for way in WAYS}
        cell = found[f"{columns} x {rows}"] = {way: {} for way in WAYS}
        for count in VECTORS:
            given = {"x": rng.standard_normal((count, columns), np.float32)}
            took = by_turns(
                list(WAYS),
                lambda way, _, x=given, opened=sessions: seconds(opened[way], x),  # type: ignore[misc]
                rounds=rounds + 1,  # the first is the warm-up
            )
            for way in WAYS:
                cell[way][count] = statistics.median(took[way][1:]) / COPIES * 1e6
    return found


def measure_prompts(decoder: Decoder, vocab: int, *, rounds: int) -> dict[int, dict[int, float]]:
    """Milliseconds a prompt, by its length and how many are read together."""
    rng = np.random.default_rng(0)
    found = {}
    for length in LENGTHS:
        prompts = [rng.integers(0, vocab, length) for _ in range(PROMPTS)]

        def read(count: str, _: int, prompts: list[Any] = prompts) -> float:
            started = time.perf_counter()
            for i in range(0, PROMPTS, int(count)):
                part = prompts[i : i + int(count)]
                decoder.step_rows(part, scored=[1] * len(part), first=i)
            took = time.perf_counter() - started
            for row in range(PROMPTS):
                decoder.cache.truncate(row, 0)
            return took

        took = by_turns([str(count) for count in TOGETHER], read, rounds=rounds + 1)
        found[length] = {
            count: statistics.median(took[str(count)][1:]) / PROMPTS * 1e3 for count in TOGETHER
        }
    return found


def show_products(products: Mapping[str, Any]) -> str:
    """A line for each matrix and way."""
    lines = [("matrix", "way", *map(str, VECTORS))]
    for matrix, ways in products.items():
        for way, by_count in ways.items():
            lines.append((matrix, way, *(f"{by_count[count]:.0f}" for count in VECTORS)))
    return table(lines)


def show_prompts(prompts: Mapping[int, Mapping[int, float]]) -> str:
    """A line for each length."""
    lines = [("tokens", *(f"{count} together" for count in TOGETHER))]
    for length, by_count in prompts.items():
        lines.append((str(length), *(f"{by_count[count]:.1f}" for count in TOGETHER)))
    return table(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    kinds = ("products", "prompts")
    parser.add_argument("--rows", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    manifest, threads = bundle.manifest, resolve_threads(arguments.threads)
    document: dict[str, Any] = {"benchmark": "rows", "model": manifest.name, "threads": threads}
    print(f"{manifest.name}, {threads} threads")
    if "products" in arguments.rows:
        document["products"] = measure_products(manifest, threads=threads, rounds=arguments.rounds)
        print(f"microseconds of a product, by vectors\n{show_products(document['products'])}\n")
    if "prompts" in arguments.rows:
        graph = bundle.file(manifest.decoder.graph)
        session = create_session(graph, threads=threads, minimum=manifest.min_onnxruntime)
        capacity = max(LENGTHS) * 2
        decoder = open_decoder(session, manifest, capacity=capacity, rows=PROMPTS)
        prompts = measure_prompts(decoder, manifest.dims.vocab, rounds=arguments.rounds)
        document["prompts"] = prompts
        print(f"milliseconds a prompt\n{show_prompts(prompts)}\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
