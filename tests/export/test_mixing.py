"""Mixed precision: the ladder, the search for a budget, and whole exports."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm import LLM
from edge_llm.bundle import Bundle
from edge_llm.cli.layout import report_bundle
from edge_llm.cli.main import main
from edge_llm.errors import ArgumentError
from edge_llm_export import Calibration, export_model
from edge_llm_export.mixer import RESERVE
from edge_llm_export.quantize.alternatives import token_weights
from edge_llm_export.quantize.budget import Budget, Trial, find_mix, parse_size
from edge_llm_export.quantize.mixing import Ladder, Mix, Option, best, cheapest, rescaled

SMALL = Calibration(samples=4, tokens=64)

numbers = st.integers(1, 40)
some_options = st.lists(
    st.builds(lambda size, loss: Option((), size, loss), numbers, numbers), min_size=1, max_size=4
)
models = st.dictionaries(st.sampled_from("abc"), some_options, min_size=1)


def size(mix: Mix) -> int:
    return sum(one.size for one in mix.values())


def loss(mix: Mix) -> float:
    return sum(one.loss for one in mix.values())


@given(models)
def test_no_mix_of_a_rungs_size_loses_less(options: Mapping[str, Sequence[Option]]) -> None:
    ladder = Ladder(options)
    mixes = [dict(zip(options, some, strict=True)) for some in itertools.product(*options.values())]
    for rung in range(len(ladder) + 1):
        mix = ladder.mix(rung)
        assert size(mix) == ladder.sizes[rung]
        assert loss(mix) == min(loss(one) for one in mixes if size(one) <= size(mix))
    assert size(ladder.mix(0)) == size(cheapest(options))
    assert loss(ladder.mix(len(ladder))) == loss(best(options))


@given(models, st.data())
def test_a_size_is_filled_beyond_the_highest_rung_that_fits(
    options: Mapping[str, Sequence[Option]], data: st.DataObject
) -> None:
    ladder = Ladder(options)
    room = data.draw(st.integers(ladder.sizes[0], ladder.sizes[-1] + 1))
    highest = max(i for i, one in enumerate(ladder.sizes) if one <= room)
    mix, rung = ladder.filled(room), ladder.mix(highest)
    assert size(mix) <= room
    assert all(mix[name].loss <= rung[name].loss for name in options)
    assert (mix == rung) or loss(mix) < loss(rung)
    steps = [ladder.mix(i) for i in range(len(ladder) + 1)]
    for name in options:
        larger = [one[name] for one in steps if one[name].size > mix[name].size]
        assert all(size({**mix, name: one}) > room for one in larger)


@given(models, st.floats(0, 10))
def test_losses_in_the_unit_of_what_was_measured(
    options: Mapping[str, Sequence[Option]], lost: float
) -> None:
    names = sorted(options)[:1]
    scaled = rescaled(options, names, lost)
    grown = loss(cheapest({n: scaled[n] for n in names})) - loss(
        best({n: scaled[n] for n in names})
    )
    # The cheapest of several that are as cheap is the truest of them: there may be no step.
    expected = loss(cheapest({n: options[n] for n in names})) > loss(
        best({n: options[n] for n in names})
    )
    assert grown == pytest.approx(lost if expected else 0)
    assert all(scaled[name] == options[name] for name in options if name not in names)


OPTIONS = {
    "layer": [Option((), 10, 0.8), Option((), 20, 0.1), Option((), 40, 0.0)],
    "other": [Option((), 10, 0.2), Option((), 20, 0.1), Option((), 40, 0.0)],
    "vocabulary": [Option((), 10, 30.0), Option((), 30, 0.0)],
}


def measure(mix: Mix) -> Trial:
    """What the losses add up to, those of the vocabulary a hundredth, over a floor."""
    true = {name: {one.size: one.loss for one in some} for name, some in OPTIONS.items()}
    true["vocabulary"] = {size: loss / 100 for size, loss in true["vocabulary"].items()}
    lost = sum(true[name][one.size] for name, one in mix.items())
    return Trial(
        size=size(mix) + 7,
        weights=size(mix),
        kl_divergence=lost + 0.01,
        ppl_increase=2 * lost,
        top1_agreement=1 - lost / 2,
    )


def found(**limit: Any) -> tuple[Mix, tuple[Trial, ...]]:
    groups = [["layer", "other"], ["vocabulary"]]
    result = find_mix(
        OPTIONS, groups, Budget(**limit), weights=80, measure=measure, finish=lambda mix: mix
    )
    assert result.trials[-1] == measure(result.mix)
    return result.mix, result.trials


@pytest.mark.parametrize("limit", [0.01, 0.02, 0.11, 0.2, 0.35, 0.5, 1.0, 1.31, 9.0])
def test_the_smallest_mix_within_a_divergence(limit: float) -> None:
    mix, trials = found(max_kld=limit)
    assert trials[-1].kl_divergence <= limit
    ladder = [measure(one) for one in _rungs()]
    assert size(mix) == min(one.weights for one in ladder if one.kl_divergence <= limit)


def _rungs() -> list[Mix]:
    """Those that the search should find, with the losses that it takes for comparable."""
    vocabulary = [Option((), one.size, one.loss / 100) for one in OPTIONS["vocabulary"]]
    ladder = Ladder({**OPTIONS, "vocabulary": vocabulary})
    return [ladder.mix(i) for i in range(len(ladder) + 1)]


def test_the_smallest_mix_within_a_perplexity() -> None:
    mix, _ = found(max_ppl_increase=0.4)
    assert measure(mix).ppl_increase <= 0.4
    assert size(mix) < size(best(OPTIONS))


@pytest.mark.parametrize("limit", [37, 47, 60, 77, 117, 1000])
def test_the_truest_mix_within_a_size(limit: int) -> None:
    mix, trials = found(max_size=limit)
    assert size(mix) + 7 <= limit
    fitting = [measure(one) for one in _rungs() if size(one) + 7 <= limit]
    assert trials[-1].kl_divergence <= min(one.kl_divergence for one in fitting)
    assert len(trials) == 4


def test_bits_of_a_weight() -> None:
    mix, _ = found(max_bits=6.0)
    assert size(mix) <= 60


@pytest.mark.parametrize(
    ("limit", "reached"),
    [
        ({"max_kld": 0.005}, "at least 0.01, "),
        ({"max_size": 36}, "at least 37 bytes"),
    ],
)
def test_what_cannot_be_met_names_the_best_that_can(limit: dict[str, Any], reached: str) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(limit))} must be {reached}"):
        found(**limit)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_kld": 0},
        {"max_kld": -1.0},
        {"max_size": 1.5},
        {"max_size": True},
        {},
        {"max_kld": 1, "max_size": 1},
    ],
)
def test_budgets_outside_their_domain(limits: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Budget(**limits)


def test_sizes_as_people_write_them() -> None:
    assert parse_size("90MB") == 90_000_000
    assert parse_size(" 1.5 GiB") == 3 << 29
    assert parse_size("1234") == 1234
    for text in ("", "MB", "-1", "1 TBit", "1e3"):
        with pytest.raises(ArgumentError, match="max_size"):
            parse_size(text)


def test_frequent_tokens_weigh_more() -> None:
    shares = token_weights(np.array([[1, 1, 3]]), 5)
    assert shares.sum() == pytest.approx(1)
    assert shares.argmax() == 1
    assert (shares > 0).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"quantize": "int4", "max_kld": 0.1}, "max_kld"),
        ({"block": 64, "max_size": 10**9}, "block"),
        ({"quantize": "auto", "block": 64}, "block"),
        ({"quantize": "auto", "method": "rtn"}, "method"),
        ({"quantize": "auto", "vocabulary": "int8"}, "vocabulary"),
        ({"quantize": "fp32", "vocabulary": "int8"}, "vocabulary"),
        ({"quantize": "int8", "vocabulary": "int4"}, "vocabulary"),
        ({"quantize": "int4", "vocabulary": "int2"}, "vocabulary"),
        ({"max_kld": 0.1, "max_ppl_increase": 0.1}, "budget"),
        ({"max_kld": -1.0}, "max_kld"),
        ({"max_size": 1000}, "max_size must be more than"),
    ],
)
def test_what_contradicts_itself(
    options: dict[str, Any], name: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=name):
        export_model(tiny_checkpoint, tmp_path / "bundle", **options)
    assert list(tmp_path.iterdir()) == []


def test_auto_tells_what_it_did(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = export_model(tiny_checkpoint, tmp_path / "bundle", calibration=SMALL)
    mix = manifest.info["mix"]
    assert mix["bits_per_weight"] <= mix["budget"]["max_bits"] == 4.8
    assert manifest.quantization.method == "calibrated"
    assert manifest.quantization.block == 128
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    size = sum(path.stat().st_size for path in (tmp_path / "bundle").rglob("*") if path.is_file())
    # The trial had no account of the search in its manifest.
    assert 0 <= size - mix["measured"]["size"] < RESERVE
    with LLM(tmp_path / "bundle") as llm:
        assert llm.generate([1, 5, 9], max_tokens=4).usage.completion_tokens == 4


def test_rows_that_fill_no_whole_blocks_have_a_default_too(
    make_llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_llama(tmp_path / "checkpoint", hidden_size=96, intermediate_size=96, num_hidden_layers=1)
    manifest = export_model(tmp_path / "checkpoint", tmp_path / "bundle", calibration=SMALL)
    mix = manifest.info["mix"]
    assert mix["bits_per_weight"] > mix["budget"]["max_bits"]
    report_bundle(tmp_path / "bundle", manifest, as_json=False)
    out = capsys.readouterr().out
    assert f"taken: {mix['bits_per_weight']:.2f} bits a weight" in out
    assert out.count("%") == 2 * (1 + len(mix["tried"]))
    assert main(["info", str(tmp_path / "bundle")]) == 0
    assert "taken: " in capsys.readouterr().out


def test_a_folder_keeps_to_its_size_whatever_its_cache(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    losses = []
    for kv_cache in ("fp32", "int8"):
        options: dict[str, Any] = {"calibration": SMALL, "kv_cache": kv_cache}
        auto = export_model(tiny_checkpoint, tmp_path / f"auto {kv_cache}", **options)
        limit = auto.info["mix"]["measured"]["size"] + RESERVE
        folder = tmp_path / kv_cache
        manifest = export_model(tiny_checkpoint, folder, max_size=limit, **options)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= limit
        losses.append(manifest.info["mix"]["measured"]["kl_divergence"])
    assert losses[0] != losses[1]  # the trials had the cache that the bundle has


def test_a_budget_is_met_on_a_real_model(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "stories260k"
    options: dict[str, Any] = {"calibration": SMALL, "work_dir": tmp_path / "work"}
    loose = export_model(source, tmp_path / "loose", max_kld=0.02, **options)
    tight = export_model(source, tmp_path / "tight", max_kld=0.005, **options)
    sizes = []
    for manifest, limit in ((loose, 0.02), (tight, 0.005)):
        measured = manifest.info["mix"]["measured"]
        assert measured["kl_divergence"] <= limit
        sizes.append(measured["size"])
    assert sizes[0] < sizes[1]
    assert any(one.bits == 8 for one in tight.quantization.exceptions.values())
    limit = (sizes[0] + sizes[1]) // 2
    between = export_model(source, tmp_path / "between", max_size=limit, **options)
    measured = between.info["mix"]["measured"]
    assert measured["size"] <= limit
    assert measured["kl_divergence"] <= loose.info["mix"]["measured"]["kl_divergence"]
    with pytest.raises(ArgumentError, match=r"max_kld must be at least 0\.00"):
        export_model(source, tmp_path / "none", max_kld=1e-9, **options)
    assert not (tmp_path / "none").exists()
    assert Bundle.open(tmp_path / "tight", verify=True).manifest == tight
