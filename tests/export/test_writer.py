"""A bundle is there as a whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_llm import Bundle
from edge_llm.errors import ArgumentError, ExportError
from edge_llm.manifest import (
    ChatTemplates,
    DecoderGraph,
    Dims,
    FileEntry,
    Manifest,
    Quantization,
    Source,
    Tokens,
)
from edge_llm.runtime.session import create_session
from edge_llm.staging import check_target, staged
from edge_llm_export.graph.recorder import GraphRecorder, TensorInfo
from edge_llm_export.writer import ALIGNMENT, BundleWriter


def manifest(files: dict[str, FileEntry], name: str = "test") -> Manifest:
    return Manifest(
        format="1.0",
        requires=(),
        min_onnxruntime="1.32",
        name=name,
        source=Source(architecture="llama", repo=None, revision=None, license=None),
        dims=Dims(**{field.name: 1 for field in dataclasses.fields(Dims)}),
        decoder=DecoderGraph(graph="model.onnx", layout="edge_llm.v1", state=()),
        quantization=Quantization(method="none", bits=32, block=None, exceptions={}),
        tokens=Tokens(bos=None, eos=(), pad=None, add_bos=False),
        sampling={},
        tokenizer="model.onnx",
        chat=ChatTemplates(templates={}, special_tokens={}),
        files=files,
        quality=(),
        producer={},
    )


def small_graph() -> GraphRecorder:
    """Tensors of awkward sizes: y = (x * scale + shift) @ weight, and a view of the weight."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 7)).astype(np.float32)
    graph = GraphRecorder("small")
    graph.input("x", np.float32, ["n", 3])
    graph.keep("scale", np.array([2, 3, 4], np.float32))
    graph.defer(
        [TensorInfo("flags", np.dtype(np.uint8), (5,)), TensorInfo("weight", weight.dtype, (3, 7))],
        # A matrix may come in pieces, and two tensors from one computation.
        lambda: [[np.arange(5, dtype=np.uint8)], iter([weight[:1], weight[1:]])],
    )
    graph.keep("shift", np.array([1, 1, 1], np.float32))
    graph.view("flat", "weight", (21,))
    scaled = graph.op("Mul", "/scale", ["x", "scale"])
    shifted = graph.op("Add", "/shift", [scaled, "shift"])
    graph.op("MatMul", "/product", [shifted, "weight"], outputs=["y"])
    graph.op("Identity", "/flat", ["flat"], outputs=["all"])
    graph.op("Cast", "/flags", ["flags"], outputs=["f"], to=onnx.TensorProto.FLOAT)
    graph.output("y", np.float32, ["n", 7])
    graph.output("all", np.float32, [21])
    graph.output("f", np.float32, [5])
    return graph


def write_bundle(folder: Path, name: str = "test") -> None:
    writer = BundleWriter(folder)
    writer.write_graph(small_graph(), producer="1.2.3", on_bytes=lambda size: None)
    writer.write("texts/inner/template.jinja", b"{{ messages }}")
    writer.write_manifest(manifest(writer.files, name))


def listing(folder: Path) -> set[str]:
    """Every file and folder, hidden ones included."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_what_is_written_opens_and_verifies(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    files = Bundle.open(tmp_path, verify=True).manifest.files
    assert set(files) == {"model.onnx", "model.onnx.data", "texts/inner/template.jinja"}
    for name, entry in files.items():
        content = (tmp_path / name).read_bytes()
        assert entry.size == len(content)
        assert entry.sha256 == hashlib.sha256(content).hexdigest()


def test_progress_adds_up_to_the_weights(tmp_path: Path) -> None:
    sizes: list[int] = []
    BundleWriter(tmp_path).write_graph(small_graph(), producer="", on_bytes=sizes.append)
    assert sizes == [12, 5, 28, 56, 12]
    graph = small_graph()
    assert sum(sizes) == sum(info.size for group in graph.deferred for info in group.tensors)


def test_weights_lie_aligned_one_behind_the_other(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        assert external["location"] == "model.onnx.data"
        places[tensor.name] = (int(external["offset"]), int(external["length"]))
    assert places["flat"] == places.pop("weight")
    ends = 0
    for offset, length in sorted(places.values()):
        assert offset % ALIGNMENT == 0
        assert ends <= offset < ends + ALIGNMENT
        ends = offset + length
    assert ends == (tmp_path / "model.onnx.data").stat().st_size


def test_the_graph_is_valid_and_computes_with_what_was_written(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "model.onnx")
    assert (model.producer_name, model.producer_version) == ("edge_llm_export", "1.2.3")
    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    assert stored["flags"].tolist() == [0, 1, 2, 3, 4]
    session = create_session(tmp_path / "model.onnx", threads=1, minimum="1.32")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    y, flat, flags = session.run(None, {"x": x})
    np.testing.assert_allclose(y, (x * [2, 3, 4] + 1) @ stored["weight"], rtol=1e-6)
    np.testing.assert_array_equal(flat, stored["weight"].ravel())
    assert flags.tolist() == [0, 1, 2, 3, 4]


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_bundle(tmp_path / name)
    for name in ("model.onnx", "model.onnx.data", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    "rows", [np.zeros(3, np.float64), np.zeros(2, np.float32), np.zeros(4, np.float32)]
)
def test_weights_that_are_not_what_was_promised_are_a_bug(
    rows: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    graph = GraphRecorder("wrong")
    graph.defer([TensorInfo("w", np.dtype(np.float32), (3,))], lambda: [[rows]])
    with pytest.raises(AssertionError, match="w"):
        BundleWriter(tmp_path).write_graph(graph, producer="", on_bytes=lambda size: None)


def test_success_gives_the_target_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "bundle"
    with staged(target, overwrite=False) as stage:
        assert stage.parent == target.parent, "a rename must stay on one file system"
        assert not target.exists()
        write_bundle(stage)
    assert listing(target.parent) == {"bundle"} | {f"bundle/{name}" for name in listing(target)}
    Bundle.open(target, verify=True)
    if os.name == "posix":
        assert target.stat().st_mode & 0o055 == 0o055, "others may read the bundle"


def test_an_empty_folder_is_a_fine_target(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with staged(target, overwrite=False) as stage:
        write_bundle(stage)
    assert listing(tmp_path) == {"bundle"} | {f"bundle/{name}" for name in listing(target)}
    Bundle.open(target)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("late", [False, True])
def test_whatever_ends_it_early_nothing_is_left(
    error: BaseException, late: bool, tmp_path: Path
) -> None:
    with (  # noqa: PT012 - the error must come from inside the block
        pytest.raises(type(error)),
        staged(tmp_path / "bundle", overwrite=False) as stage,
    ):
        if late:
            write_bundle(stage)
        raise error
    assert listing(tmp_path) == set()


class FullDisk(io.FileIO):
    """A file on a disk that has room for this many bytes in all."""

    room = 0

    def write(self, content: Any, /) -> int:
        if memoryview(content).nbytes > FullDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= memoryview(content).nbytes
        return super().write(content)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Leaves so many bytes free; files are buffered as ever, so some errors come at close()."""

    original = Path.open

    def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "w" not in mode:
            return original(path, mode, *rest, **more)
        binary = io.BufferedWriter(FullDisk(path, "wb"), 64)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")

    def leave(room: int) -> None:
        monkeypatch.setattr(FullDisk, "room", room)
        monkeypatch.setattr(Path, "open", opened)

    return leave


SIZES = [0, 13, 100, 300, 500, 1000, 1500, 2000]


@pytest.mark.parametrize("room", SIZES)
def test_a_full_disk_leaves_nothing(
    room: int, full_disk: Callable[[int], None], tmp_path: Path
) -> None:
    full_disk(room)
    with (
        pytest.raises(ExportError, match=r"No space left.*nothing was left behind.*Free some"),
        staged(tmp_path / "bundle", overwrite=False) as stage,
    ):
        write_bundle(stage)
    assert listing(tmp_path) == set()


def test_the_disk_of_these_tests_is_full_in_every_file(
    full_disk: Callable[[int], None], tmp_path: Path
) -> None:
    # Else the tests above and below would miss one of the writes.
    last = set()
    for room in SIZES:
        full_disk(room)
        folder = tmp_path / str(room)
        with pytest.raises(OSError, match="No space left"):
            write_bundle(folder)
        written = [path for path in folder.rglob("*") if path.is_file()]
        last.add(max(written, key=lambda path: path.stat().st_mtime_ns).name)
    assert last == {"model.onnx.data", "model.onnx", "manifest.json"}
    full_disk(10_000)
    write_bundle(tmp_path / "enough")


def test_a_target_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", "old")
    before = listing(tmp_path)
    with (
        pytest.raises(ArgumentError, match=r"not exist or is empty.*=True \(--overwrite\)"),
        staged(tmp_path / "bundle", overwrite=False),
    ):
        pytest.fail("there was work")
    assert listing(tmp_path) == before
    assert Bundle.open(tmp_path / "bundle", verify=True).manifest.name == "old"


def test_a_bundle_is_overwritten_where_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write_bundle(target, "old")
    (target / "leftover").write_text("of the old bundle")
    with staged(target, overwrite=True) as stage:
        assert listing(stage) == set()
        assert Bundle.open(target, verify=True).manifest.name == "old"
        write_bundle(stage, "new")
        assert Bundle.open(target, verify=True).manifest.name == "old"
    assert Bundle.open(target, verify=True).manifest.name == "new"
    assert listing(tmp_path) == {"bundle"} | {f"bundle/{name}" for name in listing(target)}
    assert not (target / "leftover").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"holiday.jpg": b"\xff\xd8"},
        {"config.json": b"{}", "model.safetensors": b""},
        {"manifest.json": b'{"name": "my web app", "icons": []}'},
        {"manifest.json": b"\xff not text"},
        {"manifest.json/inside": b""},
    ],
    ids=lambda files: ",".join(files),
)
def test_what_is_no_bundle_is_never_overwritten(files: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "mine"
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    before = listing(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ArgumentError, match="output must be a"):
            check_target(target, overwrite=overwrite)
        with (
            pytest.raises(ArgumentError, match="output must be a"),
            staged(target, overwrite=overwrite),
        ):
            pytest.fail("there was work")
    assert listing(tmp_path) == before


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for overwrite in (False, True):
        with pytest.raises(ArgumentError, match=r"output.*model\.gguf"):
            check_target(tmp_path / "model.gguf", overwrite=overwrite)


@pytest.mark.parametrize("room", SIZES)
def test_a_full_disk_leaves_the_old_bundle(
    room: int, full_disk: Callable[[int], None], tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    write_bundle(target, "old")
    before = listing(tmp_path)
    full_disk(room)
    with pytest.raises(ExportError, match="No space left"), staged(target, overwrite=True) as stage:
        write_bundle(stage, "new")
    assert listing(tmp_path) == before
    assert Bundle.open(target, verify=True).manifest.name == "old"


def test_an_interrupt_leaves_the_old_bundle(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    write_bundle(target, "old")
    before = listing(tmp_path)
    with (  # noqa: PT012 - the interrupt must come from inside the block
        pytest.raises(KeyboardInterrupt),
        staged(target, overwrite=True) as stage,
    ):
        write_bundle(stage, "new")
        raise KeyboardInterrupt
    assert listing(tmp_path) == before
    assert Bundle.open(target, verify=True).manifest.name == "old"


def fail_moves(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, blamed: Callable[[Path, Path], bool]
) -> None:
    """Let the moves fail that are to blame."""

    def move(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(source: Path, target: Path) -> Path:
            if blamed(source, target):
                raise error
            return original(source, target)

        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, move(getattr(Path, name)))


@pytest.mark.parametrize("first", [True, False], ids=["old away", "new in place"])
@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_a_failed_move_leaves_the_old_bundle(
    first: bool, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    write_bundle(target, "old")
    before = listing(tmp_path)

    def blamed(source: Path, other: Path) -> bool:
        return source == target if first else other == target and source.parent == tmp_path

    fail_moves(monkeypatch, error, blamed)
    expected = ExportError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), staged(target, overwrite=True) as stage:
        write_bundle(stage, "new")
    assert listing(tmp_path) == before
    assert Bundle.open(target, verify=True).manifest.name == "old"


def test_an_old_bundle_that_cannot_be_put_back_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    write_bundle(target, "old")
    error = OSError(errno.EIO, "Input/output error")
    fail_moves(monkeypatch, error, lambda source, other: other == target)
    with (
        pytest.raises(ExportError, match="putting it back: Input/output error") as caught,
        staged(target, overwrite=True) as stage,
    ):
        write_bundle(stage, "new")
    (left,) = tmp_path.glob("*/bundle")
    assert repr(str(left)) in caught.value.remedy
    assert Bundle.open(left, verify=True).manifest.name == "old"


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(ExportError, match="Cannot write beside"),
        staged(tmp_path / "file" / "bundle", overwrite=False),
    ):
        pytest.fail("there was work")

    def refuse(**_: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with (
        pytest.raises(ExportError, match=r"Permission denied.*another folder"),
        staged(tmp_path / "bundle", overwrite=False),
    ):
        pytest.fail("there was work")
    assert listing(tmp_path) == {"file"}


def test_a_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged(Path("bundle"), overwrite=False) as stage:
        write_bundle(stage)
    Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize(("overwrite", "inside"), [(False, "."), (True, "."), (True, "inner")])
def test_the_current_folder_is_refused_before_any_work(
    overwrite: bool, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    if overwrite:
        write_bundle(target, "old")
    (target / inside).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(target / inside)
    before = listing(tmp_path)
    for name in (Path(os.path.relpath(target)), target):
        with (
            pytest.raises(ArgumentError, match=r"replaced as a whole.*Name a folder inside it\."),
            staged(name, overwrite=overwrite),
        ):
            pytest.fail("there was work")
    assert listing(tmp_path) == before


def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "volume"
    mounted.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == mounted)
    with pytest.raises(ArgumentError, match=r"no mount point.*volume'. Name a folder inside"):
        check_target(mounted, overwrite=False)
    with staged(mounted / "bundle", overwrite=False) as stage:
        write_bundle(stage)
    Bundle.open(mounted / "bundle")


@pytest.mark.parametrize("content", ["nothing", "empty", "bundle"])
def test_a_link_stays_a_link(content: str, tmp_path: Path) -> None:
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    link.symlink_to(Path("elsewhere", "real"))
    if content == "empty":
        real.mkdir(parents=True)
    elif content == "bundle":
        write_bundle(real, "old")
    with staged(link, overwrite=content == "bundle") as stage:
        assert stage.parent == real.parent, "the last step is a rename on one file system"
        write_bundle(stage, "new")
    assert link.is_symlink()
    assert not real.is_symlink()
    assert Bundle.open(real, verify=True).manifest.name == "new"
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_links_in_a_circle_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with (
        pytest.raises(ExportError, match=r"Cannot use .*a'"),
        staged(tmp_path / "a", overwrite=True),
    ):
        pytest.fail("there was work")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBUSY])
def test_disk_space_is_the_remedy_for_a_full_disk_only(code: int, tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=os.strerror(code)) as caught,
        staged(tmp_path / "bundle", overwrite=False),
    ):
        raise OSError(code, os.strerror(code))
    assert ("disk space" in caught.value.remedy) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert "another folder" in caught.value.remedy
