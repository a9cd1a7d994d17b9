"""Which matrices a decoder gets: rounded to nearest, calibrated, or mixed by measurement."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_llm.text.tokenizer import Tokenizer

from .architectures.spec import DecoderSpec
from .checkpoint.weights import Weights
from .choices import DEFAULT_BLOCK
from .evaluate.divergence import Reference
from .graph.linear import Calibrated
from .graph.matrices import Matrix, checkpoint_names
from .plan import MIN_ONNXRUNTIME, Plan, Progress
from .quantize.alternatives import alternatives, token_weights, vocabularies
from .quantize.budget import Found, Trial, find_mix
from .quantize.calibrate import Candidates, calibrate
from .quantize.mixing import CHOICES, Mix
from .quantize.storage import FLOAT32, QuantizedMatrix, RoundedMatrix, Storage
from .quantize.text import calibration_windows
from .quantize.work import matrices_folder, work_folder

__all__ = ["Choice", "choose_matrices"]

# Windows of text on which mixes are measured; none of them is calibrated on.
VALIDATION = 16

# How many mixes are measured as a rule, for the progress bar.
EXPECTED_TRIALS = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """What a graph's matrices are.

    Attributes:
        storage: Of what is not named.
        matrices: By the name of the weight in the graph.
        others: What is stored in another way than ``storage``, by its name in the checkpoint.
        info: What the manifest says of how it was chosen.
    """

    storage: Storage
    matrices: Calibrated = field(default_factory=dict)
    others: Mapping[str, Storage] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


Write = Callable[[Choice, Path], None]


@contextmanager
def choose_matrices(
    plan: Plan,
    spec: DecoderSpec,
    weights: Weights,
    write: Write,
    scratch: Path,
    report: Progress,
) -> Iterator[Choice]:
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
    calibration, recipe = plan.recipe.calibration, plan.recipe
    if calibration is None:
        yield _with_vocabulary(plan, spec, weights, {})
        return
    with work_folder(
        plan.work_dir, plan.checkpoint.path, calibration, context=plan.context
    ) as work:
        used, held = calibration_windows(
            calibration,
            tokenizer=_tokenizer(plan),
            context=plan.context,
            work=work,
            draft=lambda folder: write(Choice(Storage(8, DEFAULT_BLOCK)), folder),
            scored=plan.scored,
            report=report,
            validation=VALIDATION if recipe.budget else 0,
        )
        storages = CHOICES if recipe.budget else (recipe.storage,)
        # Of a wide vocabulary only the rows that a mix narrows are calibrated.
        wide = recipe.vocabulary != recipe.storage
        head = storages[:-1] if recipe.budget else () if wide else storages
        candidates = calibrate(
            spec,
            weights,
            used,
            storages=storages,
            vocabulary=recipe.vocabulary,
            head=head,
            context=plan.context,
            calibration=calibration,
            folder=matrices_folder(work, used, storages[0], recipe.vocabulary),
            minimum=MIN_ONNXRUNTIME,
            report=report,
        )
        if recipe.budget is None:
            yield _with_vocabulary(plan, spec, weights, candidates)
        else:
            with tempfile.TemporaryDirectory(prefix=".edge-llm-", dir=scratch) as name:
                found = vocabularies(spec, weights)
                mixing = _Mixing(plan, candidates, found, write, Path(name), report)
                choice = mixing.find(used, held)
            yield choice


def _with_vocabulary(
    plan: Plan, spec: DecoderSpec, weights: Weights, candidates: Mapping[str, Candidates]
) -> Choice:
    """One storage for the layers, and one for the embedding and the head."""
    storage, wide = plan.recipe.storage, plan.recipe.vocabulary
    matrices: Calibrated = {name: one.matrices for name, one in candidates.items()}
    if storage == wide:
        return Choice(storage, matrices)
    found = vocabularies(spec, weights)
    return Choice(
        storage,
        {**matrices, **{name: (RoundedMatrix(one, wide),) for name, one in found.items()}},
        {tensor: wide for one in found.values() for tensor in checkpoint_names(one)},
    )


def _tokenizer(plan: Plan) -> Tokenizer:
    return Tokenizer.from_file(
        plan.files.tokenizer_json,
        bos=plan.files.bos,
        eos=plan.files.eos,
        add_bos=plan.files.add_bos,
        vocab=plan.model.vocab,
    )


@dataclass(frozen=True, slots=True)
class _Mixing:
    """A search for the mix that meets a budget, with what it needs to write and measure one."""

    plan: Plan
    candidates: Mapping[str, Candidates]
    vocabularies: Mapping[str, Matrix]
    write: Write
    scratch: Path
    report: Progress

    def find(self, used: NDArray[np.int64], held: NDArray[np.int64]) -> Choice:
        """The mix that meets the budget on the windows that nothing was calibrated on."""
        budget = self.plan.recipe.budget
        assert budget is not None
        original = self.scratch / "original"
        self.report("original", 0, 1)
        self._write(Choice(FLOAT32), original)
        reference = Reference.of(original, held, self.scratch / "logits.npy")
        shutil.rmtree(original)
        self.report("original", 1, 1)
        frequencies = token_weights(used, self.plan.model.vocab)
        options = alternatives(self.candidates, self.vocabularies, frequencies)
        tried = 0

        def measure(mix: Mix) -> Trial:
            nonlocal tried
            tried += 1
            self.report("measuring mixes", tried, max(tried, EXPECTED_TRIALS))
            return self._measure(reference, mix)

        found = find_mix(
            options,
            [[n for n in options if n not in self.vocabularies], *([n] for n in self.vocabularies)],
            budget,
            weights=self._elements,
            measure=measure,
        )
        return self._choice(found)

    def _measure(self, reference: Reference, mix: Mix) -> Trial:
        folder = self.scratch / "trial"
        self._write(Choice(CHOICES[0], {name: one.matrices for name, one in mix.items()}), folder)
        distance = reference.distance(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
        return Trial(size=size, weights=sum(o.size for o in mix.values()), **asdict(distance))

    def _write(self, choice: Choice, folder: Path) -> None:
        folder.mkdir()
        self.write(choice, folder)

    def _choice(self, found: Found) -> Choice:
        budget, trial = self.plan.recipe.budget, found.trials[-1]
        assert budget is not None
        others: dict[str, Storage] = {}
        for name, option in found.mix.items():
            others |= dict(_exceptions(self._tensors(name), option.matrices))
        name, value = budget.limit
        info = {
            "budget": {name: value},
            "bits_per_weight": trial.weights * 8 / self._elements,
            "measured": asdict(trial),
            "tried": [asdict(one) for one in found.trials[:-1]],
        }
        matrices = {name: option.matrices for name, option in found.mix.items()}
        return Choice(CHOICES[0], matrices, others, {"mix": info})

    def _tensors(self, name: str) -> list[str]:
        """The tensors of the checkpoint that a matrix consists of."""
        if name in self.vocabularies:
            return checkpoint_names(self.vocabularies[name])
        return list(self.candidates[name].tensors)

    @property
    def _elements(self) -> int:
        shapes = [one.shape for one in self.vocabularies.values()]
        shapes += [
            one.matrices[0].shape
            for name, one in self.candidates.items()
            if name not in self.vocabularies
        ]
        return sum(rows * columns for rows, columns in shapes)


def _exceptions(
    tensors: Sequence[str], matrices: Sequence[QuantizedMatrix]
) -> Iterator[tuple[str, Storage]]:
    """Names of tensors, or of rows of them, that are not stored as most are."""
    start = 0
    for one in matrices:
        stop = start + one.shape[0]
        rows = f"[{start}:{stop}]" if len(matrices) > 1 else ""
        if one.storage != CHOICES[0]:
            yield from ((f"{tensor}{rows}", one.storage) for tensor in tensors)
        start = stop
