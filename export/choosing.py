"""Which matrices a decoder gets: rounded to nearest, calibrated, or mixed by measurement."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edge_llm.text.tokenizer import Tokenizer

from .architectures.spec import DecoderSpec
from .checkpoint.weights import Weights
from .choices import DEFAULT_BLOCK
from .graph.matrices import checkpoint_names
from .mixer import Mixer
from .plan import MIN_ONNXRUNTIME, Plan, Progress
from .quantize.alternatives import vocabularies
from .quantize.runs import CalibrationRuns
from .quantize.selection import Selection, Write
from .quantize.storage import RoundedMatrix, Storage
from .quantize.text import calibration_windows
from .quantize.work import work_folder

__all__ = ["choose_matrices"]

# Windows of text on which mixes are measured; none of them is calibrated on.
VALIDATION = 16


@contextmanager
def choose_matrices(
    plan: Plan,
    spec: DecoderSpec,
    weights: Weights,
    write: Write,
    scratch: Path,
    report: Progress,
) -> Iterator[Selection]:
    """The matrices; they can be read until the block ends.

    Args:
        plan: What is asked for.
        spec: The architecture.
        weights: The checkpoint.
        write: Writes a bundle with some matrices into an empty folder.
        scratch: A folder on a disk with room for bundles.
        report: Called with a phase, the work done and the whole work.

    Raises:
        ArgumentError: No mix meets the budget.
    """
    recipe = plan.recipe
    calibration = recipe.calibration or plan.kv_calibration
    if calibration is None:
        yield _with_vocabulary(Selection(recipe.storage), spec, weights, recipe.vocabulary)
        return
    with work_folder(
        plan.work_dir, plan.checkpoint.path, calibration, context=plan.context
    ) as work:
        used, held = calibration_windows(
            calibration,
            tokenizer=_tokenizer(plan),
            context=plan.context,
            work=work,
            draft=lambda folder: write(Selection(Storage(8, DEFAULT_BLOCK)), folder),
            scored=plan.scored,
            report=report,
            validation=VALIDATION if recipe.budget else 0,
        )
        if recipe.calibration is None:
            plain = Selection(recipe.storage, windows=used)
            yield _with_vocabulary(plain, spec, weights, recipe.vocabulary)
            return
        runs = CalibrationRuns(
            spec, weights, used, recipe.calibration, plan.context, work, MIN_ONNXRUNTIME, report
        )
        if recipe.budget is None:
            yield _with_vocabulary(
                replace(runs.one_storage(recipe.storage, recipe.vocabulary), windows=used),
                spec,
                weights,
                recipe.vocabulary,
            )
            return
        with tempfile.TemporaryDirectory(prefix=".edge-llm-", dir=scratch) as name:
            mixer = Mixer(runs, recipe.budget, write, Path(name), report)
            selection = mixer.find(held)
        yield replace(selection, windows=used)


def _with_vocabulary(
    selection: Selection, spec: DecoderSpec, weights: Weights, storage: Storage
) -> Selection:
    """The selection with the embedding and the head in a storage of their own."""
    if storage == selection.storage:
        return selection
    found = vocabularies(spec, weights)
    return replace(
        selection,
        matrices={
            **selection.matrices,
            **{n: (RoundedMatrix(one, storage),) for n, one in found.items()},
        },
        others={tensor: storage for one in found.values() for tensor in checkpoint_names(one)},
    )


def _tokenizer(plan: Plan) -> Tokenizer:
    return Tokenizer.from_file(
        plan.files.tokenizer_json,
        bos=plan.files.bos,
        eos=plan.files.eos,
        add_bos=plan.files.add_bos,
        vocab=plan.model.vocab,
    )
