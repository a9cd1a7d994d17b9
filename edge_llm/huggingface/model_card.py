"""README.md of a model: its licence."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["read_license"]


def read_license(folder: Path) -> str | None:
    """The licence in README.md's front matter, see https://huggingface.co/docs/hub/model-cards."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return None
    matter = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if matter is None:
        return None

    def field(name: str) -> str:
        """A scalar, or a list joined by commas: these two need no YAML parser."""
        found = re.search(rf"^{name}:(.*(?:\n[ \t]*-[ \t].*)*)", matter[1], re.MULTILINE)
        values = re.split(r"[,\n]", re.sub(r"[ \t]#.*", "", found[1])) if found else []
        return ", ".join(filter(None, (value.strip(" \t-[]'\"") for value in values)))

    stated = field("license")
    return (field("license_name") if stated == "other" else "") or stated or None
