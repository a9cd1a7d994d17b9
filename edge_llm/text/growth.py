"""How much longer a tokenizer may make a text: a bomb would fill the memory."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers

from edge_llm.errors import IntegrityError

__all__ = ["check_growth"]

# Real tokenizers put one mark in the place of another; Unicode's own longest (NFKD) is 18.
MOST = 64


def check_growth(tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse a tokenizer whose normalizer or decoder writes much more than it reads.

    Args:
        tokenizer: As it was read from the file.

    Raises:
        IntegrityError: All replacements together may make a character into more than 64 bytes.
    """
    for name, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        factor = 1
        for step in [] if part is None else _steps(json.loads(part.__getstate__())):
            factor *= max(1, _growth(step))
        if factor > MOST:
            raise IntegrityError(
                f"tokenizer.json's {name} may make a text {factor} times as long; at most {MOST} "
                "times is read.",
                "It is broken, or made to harm.",
            )


def _steps(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence, those of sequences in it too."""
    inner = [*spec.get("normalizers", ()), *spec.get("decoders", ())]
    for one in inner:
        yield from _steps(one)
    if not inner:
        yield spec


def _growth(step: Mapping[str, Any]) -> int:
    """The most bytes that a step makes of one."""
    match step.get("type"):
        case "Replace":
            pattern = step["pattern"].get("String") or " "
            return -(-len(step["content"].encode()) // len(pattern.encode()))
        case "Prepend":
            return len(step["prepend"].encode())
        case "Precompiled":
            # Sentencepiece's format: a trie behind its size, then the replacements.
            charsmap = base64.b64decode(step["precompiled_charsmap"])
            texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
            return max(map(len, texts.split(b"\0")))
    return 1
