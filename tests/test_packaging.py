"""What is installed, what importing it costs, and which way the dependencies run."""

from __future__ import annotations

import ast
import fnmatch
import inspect
import json
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge_llm
from edge_llm import errors

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# design.md: "errors, manifest <- text, decoding, runtime <- engine <- llm <- cli, server". The
# modules that it does not name stand where they are used: what two layers share lies below both.
LAYERS = {
    "errors": 0,
    "schema": 1,
    "manifest": 2,
    "builtin": 3,
    "caching": 3,
    "decoding": 3,
    "huggingface": 3,
    "results": 3,
    "runtime": 3,
    "staging": 3,
    "text": 3,
    "writer": 3,
    "engine": 4,
    "foreign": 4,
    "bundle": 5,
    "options": 5,
    "compiled": 6,
    "memory": 6,
    "states": 6,
    "tuning": 6,
    "batching": 7,
    "sizes": 7,
    "tune": 7,
    "model": 8,
    "calls": 9,
    "llm": 10,
    "importing": 11,
    "measure": 11,
    "quality": 11,
    "cli": 12,
    "server": 12,
}
EXPORT_STACK = ("onnx", "torch", "transformers", "huggingface_hub", "edge_llm_export")


def fresh(code: str, *arguments: str) -> str:
    """What a new interpreter prints that runs the code."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str, *arguments: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after the code."""
    tail = "\nimport json, sys\nprint(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    return set(json.loads(fresh(code + tail, *arguments).splitlines()[-1]))


def sources() -> list[Path]:
    """Every module of the runtime, relative to its package's folder."""
    folder = ROOT / "edge_llm"
    return [path.relative_to(folder) for path in sorted(folder.rglob("*.py"))]


def imports(source: Path) -> Iterator[tuple[str, bool]]:
    """Every absolute module name that a module imports, and whether for type checkers only."""
    tree = ast.parse((ROOT / "edge_llm" / source).read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        lazily = id(node) in typing_only
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            assert node.module is not None
            # `from edge_llm import runtime` names a module as well as `from edge_llm.runtime`.
            yield from ((f"{node.module}.{alias.name}", lazily) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            (name, *_) = node.args
            if isinstance(name, ast.Constant):
                yield str(name.value), lazily


def test_packages_are_the_folders_on_disk() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]
    folders = {
        ".".join((name, *file.parent.relative_to(ROOT / folder).parts))
        for folder, name in (("edge_llm", "edge_llm"), ("export", "edge_llm_export"))
        for file in (ROOT / folder).rglob("*.py")
    }
    assert sorted(packages) == packages, "keep the list sorted"
    assert set(packages) == folders


def test_every_file_of_data_is_packaged() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for folder, name in (("edge_llm", "edge_llm"), ("export", "edge_llm_export")):
        for file in (ROOT / folder).rglob("*"):
            if not file.is_file() or file.suffix == ".py" or "__pycache__" in file.parts:
                continue
            home = file.parent
            while not (home / "__init__.py").is_file():
                home = home.parent
            package = ".".join((name, *home.relative_to(ROOT / folder).parts))
            path = file.relative_to(home).as_posix()
            assert any(fnmatch.fnmatch(path, pattern) for pattern in data[package]), file


def test_every_package_has_an_init_and_is_marked_as_typed() -> None:
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        top, *inner = package.split(".")
        assert (ROOT / folders[top]).joinpath(*inner, "__init__.py").is_file(), package
    for top, folder in folders.items():
        assert (ROOT / folder / "py.typed").is_file()
        assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][top]


def test_runtime_dependencies_are_exactly_these_four() -> None:
    dependencies = {
        re.split(r"[<>=~!\[; ]", one)[0]: one for one in PROJECT["project"]["dependencies"]
    }
    assert set(dependencies) == {"onnxruntime", "numpy", "tokenizers", "jinja2"}
    assert dependencies["onnxruntime"] == "onnxruntime>=1.32"


def test_version_is_stated_once() -> None:
    assert edge_llm.__version__ == PROJECT["project"]["version"]


def test_public_names_are_sorted_complete_and_documented() -> None:
    # Constants first, then classes, then functions, each by name: the order that ruff keeps.
    assert edge_llm.__all__ == sorted(edge_llm.__all__, key=lambda n: (not n.isupper(), n))
    assert len(set(edge_llm.__all__)) == len(edge_llm.__all__)
    assert set(edge_llm.__all__) <= set(dir(edge_llm))
    for name in edge_llm.__all__:
        assert inspect.getdoc(getattr(edge_llm, name)), name
    lazy = set(edge_llm._HOMES)
    eager = {
        name
        for name, value in vars(edge_llm).items()
        if inspect.isclass(value) and issubclass(value, errors.EdgeLLMError)
    }
    assert set(edge_llm.__all__) == lazy | eager
    with pytest.raises(AttributeError, match="'edge_llm' has no attribute 'nonsense'"):
        edge_llm.nonsense  # noqa: B018 - the access is the test


def test_star_import_gives_the_public_names() -> None:
    code = "from edge_llm import *\nprint(sorted(n for n in dir() if not n.startswith('__')))"
    assert ast.literal_eval(fresh(code)) == sorted(edge_llm.__all__)


def test_importing_the_package_does_no_work() -> None:
    loaded = loaded_by("import edge_llm; dir(edge_llm)")
    assert not loaded & {"numpy", "onnxruntime", "jinja2", "tokenizers", *EXPORT_STACK}


def test_importing_the_llm_does_not_load_onnxruntime() -> None:
    # Its telemetry starts at import, so nothing but loading a model may import it.
    loaded = loaded_by("from edge_llm import LLM, Bundle, Completion")
    assert "numpy" in loaded
    assert not loaded & {"onnxruntime", *EXPORT_STACK}


def test_using_the_runtime_needs_nothing_of_the_export(tiny_bundle: Path) -> None:
    code = (
        "import sys\n"
        "from edge_llm import LLM\n"
        "with LLM(sys.argv[1], context=32) as llm:\n"
        "    message = [{'role': 'user', 'content': 'Hi'}]\n"
        "    assert llm.chat(message, max_tokens=2, min_tokens=2, seed=1).tokens\n"
        "    assert llm.score('Hello').logprobs\n"
        "    assert list(llm.stream('Hello', max_tokens=2))[-1].finish_reason\n"
    )
    loaded = loaded_by(code, str(tiny_bundle))
    assert "onnxruntime" in loaded
    assert not loaded & set(EXPORT_STACK)


def test_modules_import_downwards_only() -> None:
    checked = 0
    for source in sources():
        home = source.parts[0].removesuffix(".py")
        if home == "__init__":
            continue  # the public names come from everywhere, lazily
        assert home in LAYERS, f"give {source} a layer"
        for name, typing_only in imports(source):
            top, _, inner = name.partition(".")
            target = inner.split(".")[0]
            if top != "edge_llm" or target == home or typing_only:
                continue
            if target not in LAYERS:  # a public name, which may come from anywhere below
                public = target in edge_llm._HOMES or target in errors.__all__
                assert public or target == "__version__", f"give edge_llm.{target} a layer"
                target = edge_llm._HOMES.get(target, "errors")
            checked += 1
            assert LAYERS[target] < LAYERS[home], f"{source} imports {name}"
    assert checked > 30


def test_only_the_runtime_folder_imports_onnxruntime() -> None:
    importers = {
        source.parts[0]
        for source in sources()
        for name, _ in imports(source)
        if name.split(".")[0] == "onnxruntime"
    }
    assert importers == {"runtime"}


def test_the_manifest_and_the_errors_need_the_standard_library_only() -> None:
    for source in (Path("errors.py"), Path("manifest.py"), Path("bundle.py")):
        for name, _ in imports(source):
            top = name.split(".")[0]
            assert top == "edge_llm" or top in sys.stdlib_module_names, f"{source}: {name}"


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    assert errors.__doc__ is not None
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        drawn = re.match(r"    ([ │├└─]*)(\w+)( \(also an? (\w+)\))?", line)
        if drawn is None:
            continue
        depth, name = len(drawn[1]), drawn[2]
        above = [one for one in above if one[0] < depth]
        parents[name] = above[-1][1] if above else ""
        above.append((depth, name))
        bases = {base.__name__ for base in getattr(errors, name).__bases__}
        assert not drawn[4] or drawn[4] in bases, name
        assert not parents[name] or parents[name] in bases, name
    assert set(parents) == set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)
    defined = {n for n, one in vars(errors).items() if inspect.isclass(one)}
    assert defined == set(errors.__all__)


def an_error(name: str) -> Exception:
    """One of each, with all that it takes."""
    kind: type[Exception] = getattr(errors, name)
    special: dict[str, tuple[object, ...]] = {
        "ArgumentError": ("top_p", "from 0 to 1", 2, "Lower it."),
        "ContextLengthError": (100, 30, 128),
        "MemoryLimitError": (100, 2, {"kv": 60, "scratch": 50}),
        "QueueFullError": (256,),
    }
    if issubclass(kind, Warning):
        return kind("Telemetry is on.")
    return kind(*special.get(name, ("It is broken.", "Mend it.")))


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_survive_pickling(name: str) -> None:
    error = an_error(name)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))
    if isinstance(error, errors.EdgeLLMError):
        assert str(error).endswith(error.remedy)
        assert error.remedy


def test_errors_are_also_what_python_programmers_catch() -> None:
    assert issubclass(errors.ArgumentError, ValueError)
    with pytest.raises(FileNotFoundError) as caught:
        raise errors.BundleNotFoundError("There is no folder.", "Make one.")
    assert caught.value.errno == 2
    assert str(caught.value) == "There is no folder. Make one."
    context = errors.ContextLengthError(100, 30, 128)
    assert context.over == 2
    assert "2 tokens too many" in str(context)


def test_an_argument_error_does_not_print_a_book() -> None:
    message = str(errors.ArgumentError("stop", "short", "x" * 100_000))
    assert len(message) < 300
    assert "100002 characters" in message
