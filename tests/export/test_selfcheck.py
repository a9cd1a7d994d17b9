"""A written bundle is tried before it is called one."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm import LLM
from edge_llm.errors import VerificationError
from edge_llm_export import export_model

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
REFUSING = "{{ raise_exception('A system message comes first') }}"
UNKNOWN_FILTER = "{{ messages[0].content | no_such_filter }}"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy without chat templates of its own in files."""
    folder = tmp_path / "checkpoint"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize("source", ["{% for m in messages %}{{m.content}", UNKNOWN_FILTER, "{{"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_broken_chat_template_is_no_verified_bundle(
    source: str, name: str, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "chat_template.jinja").write_text(PLAIN)
    (checkpoint / name).write_text(source)
    with pytest.raises(VerificationError, match=rf"^{name}: .* is no Jinja template: .*Repair"):
        export_model(checkpoint, tmp_path / "bundle", quantize="int4")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_chat_template_may_refuse_a_lone_message_of_the_user(
    checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "chat_template.jinja").write_text(PLAIN)
    (checkpoint / "additional_chat_templates" / "strict.jinja").write_text(REFUSING)
    said: list[str] = []
    export_model(checkpoint, tmp_path / "bundle", warn=said.append, quantize="int4")
    (text,) = said
    assert text.startswith("additional_chat_templates/strict.jinja does not render a lone message")
    assert "A system message comes first" in text
    with LLM(tmp_path / "bundle") as llm:
        assert llm.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_nothing_is_said_of_templates_that_render(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    export_model(tiny_checkpoint, tmp_path / "bundle", warn=said.append, quantize="int4")
    assert said == []
