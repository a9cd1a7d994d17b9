"""What matrices take back of what the quantized ones in front of them changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_llm_export.architectures.registry import read_architecture
from edge_llm_export.architectures.spec import DecoderSpec
from edge_llm_export.checkpoint.weights import Weights
from edge_llm_export.config import read_config
from edge_llm_export.graph.linear import Calibrated
from edge_llm_export.graph.parts import Part, build_embedding, build_layer
from edge_llm_export.plan import MIN_ONNXRUNTIME
from edge_llm_export.quantize.alternatives import vocabularies
from edge_llm_export.quantize.calibrate import calibrate
from edge_llm_export.quantize.calibration import Calibration
from edge_llm_export.quantize.inputs import solve_correction, sum_inputs
from edge_llm_export.quantize.session import PartSession
from edge_llm_export.quantize.storage import FLOAT32, RoundedMatrix, Storage

CONTEXT = 64
STORAGE = Storage(4, 64)


def open_checkpoint(folder: Path) -> tuple[DecoderSpec, Weights]:
    weights = Weights.open(folder)
    return read_architecture(read_config(folder)).as_stored(weights.names), weights


def run(part: Part, source: NDArray[Any]) -> NDArray[np.float32]:
    with PartSession(part, MIN_ONNXRUNTIME) as session:
        return session.run(source)


def tokens(spec: DecoderSpec, seed: int, count: int = 24) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, spec.vocab, (count, CONTEXT))


def matrices(
    spec: DecoderSpec,
    weights: Weights,
    windows: NDArray[np.int64],
    folder: Path,
    calibration: Calibration,
) -> Calibrated:
    found = calibrate(
        spec,
        weights,
        windows,
        ways=lambda name: (STORAGE,),
        embedding=(RoundedMatrix(vocabularies(spec, weights)["embed_tokens"], STORAGE),),
        context=CONTEXT,
        calibration=calibration,
        folder=folder,
        minimum=MIN_ONNXRUNTIME,
        report=lambda done, total: None,
    )
    return {name: (one.first,) for name, one in found.items()}


def test_every_layer_of_a_real_model_loses_less_than_rounded_to_nearest(
    shared: Path, tmp_path: Path
) -> None:
    source = shared / "models" / "stories260k"
    text = (shared / "data" / "tinystories_valid_sample.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text[:40_000]).ids
    windows = np.array(ids[: 128 * CONTEXT], np.int64).reshape(128, CONTEXT)
    spec, weights = open_checkpoint(source)
    with weights:
        found = matrices(spec, weights, windows[:96], tmp_path, Calibration())
        exact, stream = (
            run(
                build_embedding(spec, weights, storage=one, context=CONTEXT, calibrated={}),
                windows[96:],
            )
            for one in (FLOAT32, STORAGE)
        )
        for i in range(spec.layers):

            def layer(storage: Storage, done: Calibrated, index: int = i) -> Part:
                return build_layer(
                    spec, weights, index, storage=storage, context=CONTEXT, calibrated=done
                )

            rounded = run(layer(STORAGE, {}), stream)
            exact, stream = run(layer(FLOAT32, {}), exact), run(layer(STORAGE, found), stream)
            lost = np.square(stream - exact).sum()
            assert lost < 0.9 * np.square(rounded - exact).sum()


def test_the_correction_is_the_least_squares_one(tiny_checkpoint: Path) -> None:
    spec, weights = open_checkpoint(tiny_checkpoint)
    with weights:
        part = build_layer(spec, weights, 0, storage=FLOAT32, context=CONTEXT, calibrated={})
        exact = run(
            build_embedding(spec, weights, storage=FLOAT32, context=CONTEXT, calibrated={}),
            tokens(spec, 0),
        )
        noise = np.random.default_rng(1).standard_normal(exact.shape, np.float32)
        stream: NDArray[np.float32] = exact + np.float32(0.05) * noise
        for one in part.projections.values():
            streams = [one.added] if one.added else []
            with PartSession(part, MIN_ONNXRUNTIME) as session:
                sums = sum_inputs(
                    session, session, exact, stream, source=one.input, streams=streams
                )
                names = [one.input, *streams]
                true, found = session.step(exact, names), session.step(stream, names)
            correction = solve_correction(sums, damping=1e-9, share=1.0)
            assert correction
            rows = one.matrix.shape[0]
            corrected = correction.apply(one.matrix, one.added).read(0, rows)
            weight = one.matrix.read(0, rows).astype(np.float64)

            def flat(values: NDArray[np.float32]) -> NDArray[np.float64]:
                return values.reshape(-1, values.shape[-1]).astype(np.float64)

            aim = flat(true[one.input]) @ weight.T
            if one.added:
                aim += flat(true[one.added]) - flat(found[one.added])
            best, *_ = np.linalg.lstsq(flat(found[one.input]), aim, rcond=None)
            np.testing.assert_allclose(corrected, best.T, atol=2e-3 * np.abs(best).max())
            halved = solve_correction(sums, damping=1e-9, share=0.5)
            assert halved
            half = halved.apply(one.matrix, one.added)
            np.testing.assert_allclose(
                half.read(1, 3), (corrected + weight)[1:3] / 2, rtol=1e-4, atol=1e-5
            )
