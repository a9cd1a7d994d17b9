"""What README.md shows does run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_examples_run(
    example: int,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "smollm2").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[example], f"example {example} of README.md", "exec"), {})
    assert capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2


def test_the_file_tree_names_what_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    tree = text[text.index("## What is where") :].split("```")[1]
    folder, names = README.parent, set[Path]()
    for line in tree.strip().splitlines():
        entry = re.split(r" {2,}", line.strip())[0]
        base = folder if line.startswith("  ") else README.parent
        for name in entry.split():
            path = base / name
            assert path.exists(), name
            names.add(path)
        if not line.startswith("  "):
            folder = README.parent / entry.split()[0]
    for package in ("edge_llm", "export"):
        listed = {path for path in names if path.parent == README.parent / package}
        here = {
            path
            for path in (README.parent / package).iterdir()
            if not path.name.startswith(("_", ".")) and path.name != "py.typed"
        }
        assert here == listed, sorted(path.name for path in here ^ listed)
