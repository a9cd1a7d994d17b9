"""Which graphs a CPU has no fast kernels for, and how a user learns of it."""

from __future__ import annotations

import platform
from collections.abc import Collection
from pathlib import Path

import pytest

from edge_llm import LLM, Bundle
from edge_llm.cli.main import main
from edge_llm.errors import SlowKernelWarning
from edge_llm.foreign.onnx_file import Node
from edge_llm.runtime import device
from edge_llm.runtime.kernels import NO_DOT_PRODUCT, block_products, slow_kernels
from edge_llm_export import export_model

PI4 = ("aarch64", ())
PI5 = ("aarch64", ("asimddp",))
MAC = ("arm64", ())
ATOM = ("x86_64", ("sse4_2",))
HASWELL = ("x86_64", ("sse4_2", "avx2"))
UNTOLD = ("AMD64", ())


@pytest.mark.parametrize(
    ("cpu", "products", "target", "said"),
    [
        (PI4, {(4, 4)}, None, "float32, which makes prompts slow"),
        (PI4, {(4, 4)}, "arm64", "float32, which makes prompts slow"),
        (PI4, {(4, 4)}, NO_DOT_PRODUCT, None),
        (PI4, {(8, 4)}, None, "weights of 8 bits are unpacked at every step"),
        (PI4, {(4, 4), (8, 4), (2, 4)}, None, "weights of 2 and 8 bits are unpacked"),
        (PI4, set(), None, None),
        (PI5, {(4, 4), (8, 4)}, None, None),
        (PI5, {(8, 0)}, None, "slow kernels on every CPU: its weights of 8 bits"),
        (PI5, {(4, 0)}, None, None),
        (MAC, {(4, 4), (8, 4)}, None, None),
        (ATOM, {(4, 4)}, None, "without AVX2: its 4-bit weights are unpacked"),
        (ATOM, {(8, 4)}, None, "without AVX2: its weights of 8 bits are unpacked"),
        (ATOM, set(), NO_DOT_PRODUCT, None),
        (HASWELL, {(4, 4), (8, 4)}, None, None),
        (UNTOLD, {(4, 4), (8, 4)}, None, None),
    ],
)
def test_who_has_no_fast_kernels(
    cpu: tuple[str, Collection[str]],
    products: set[tuple[int, int]],
    target: str | None,
    said: str | None,
) -> None:
    machine, features = cpu
    reason = slow_kernels(products, target=target, machine=machine, features=features)
    if said is None:
        assert reason is None
    else:
        assert reason is not None
        assert said in reason
        assert (f"`--target {NO_DOT_PRODUCT}`" in reason) == ("every CPU" not in said)


def test_products_are_read_off_the_nodes() -> None:
    def node(operator: str, **integers: int) -> Node:
        return Node("com.microsoft", operator, "", (), (), integers, {}, {})

    nodes = [
        node("MatMulNBits", bits=8, accuracy_level=4),
        node("MatMulNBits"),
        node("DynamicQuantizeMatMul"),
    ]
    assert block_products(nodes) == {(8, 4), (4, 0)}


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle of each kind: blocks, and rows."""
    folder = tmp_path_factory.mktemp("bundles")
    export_model(tiny_checkpoint, folder / "blocks", quantize="int8")
    export_model(tiny_checkpoint, folder / "rows", target=NO_DOT_PRODUCT)
    return folder


@pytest.fixture
def old_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc of a CPU without dot products, or without AVX2."""
    (tmp_path / "proc").mkdir()
    line = "Features : fp asimd" if platform.machine() == "aarch64" else "flags : fpu sse4_2"
    (tmp_path / "proc/cpuinfo").write_text(line + "\n")
    monkeypatch.setattr(device, "PROC", tmp_path / "proc")


@pytest.mark.usefixtures("old_cpu")
def test_loading_warns_of_slow_kernels(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(SlowKernelWarning, match="weights of 8 bits are unpacked") as caught:
        LLM(bundles / "blocks", threads=1).close()
    assert caught[0].filename == __file__
    LLM(bundles / "rows", threads=1).close()
    assert main(["info", str(bundles / "blocks")]) == 0
    assert "no fast kernels on this" in capsys.readouterr().out
    assert main(["info", str(bundles / "rows")]) == 0
    shown = capsys.readouterr().out
    assert "fast kernels" in shown
    assert NO_DOT_PRODUCT in shown


@pytest.mark.usefixtures("old_cpu")
def test_the_embedded_model_does_not_warn() -> None:
    LLM.builtin(threads=1).close()


def test_a_bundle_knows_its_products(bundles: Path) -> None:
    assert Bundle.open(bundles / "blocks").products == {(8, 4)}
    assert Bundle.open(bundles / "rows").products == frozenset()
