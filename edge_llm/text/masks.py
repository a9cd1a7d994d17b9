"""Stand-ins for characters of messages, so that text can never become a control token."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from edge_llm.text.tokenizer import Tokenizer

__all__ = ["Masks"]

_NAMES = ("role", "type")


class Masks:
    """Puts stand-ins, characters of private use, in the place of others, and takes them back.

    Args:
        tokenizer: Knows the control tokens.
        inputs: Everything that reaches the template: no stand-in occurs there.
    """

    def __init__(self, tokenizer: Tokenizer, inputs: Any) -> None:
        self._tokenizer = tokenizer
        self._spellings = _spellings(tokenizer)
        self._taken = set[str]().union(*_strings(inputs))
        self._next = 0xF0000  # plane 15
        self._stand_ins: dict[str, str] = {}

    def message(self, message: Mapping[str, Any]) -> Any:
        """A message with stand-ins, by the rule of its role."""
        mask = self._special if message["role"] == "assistant" else self._control
        return self._map(message, mask)

    def user(self, value: Any) -> Any:
        """Any value with stand-ins wherever a control token could begin."""
        return self._map(value, self._control)

    def restored(self, text: str) -> str:
        """A rendered text with the characters back that stand-ins took the place of."""
        text = text.translate({ord(s): original for original, s in self._stand_ins.items()})
        if "\\" in text:  # a template may have escaped it: tojson(ensure_ascii=True), or repr
            for original, stand_in in self._stand_ins.items():
                text = text.replace(json.dumps(stand_in)[1:-1], json.dumps(original)[1:-1])
                text = text.replace(repr(stand_in)[1:-1], original)
        return text

    def _map(self, value: Any, mask: Callable[[str], str], *, name: bool = False) -> Any:
        """Masks every string, except that a name that is a mere identifier stays."""
        if isinstance(value, str):
            return value if name and value.isidentifier() else mask(value)
        if isinstance(value, Mapping):
            return {
                self._map(key, mask, name=True): self._map(item, mask, name=key in _NAMES)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._map(item, mask) for item in value]
        return value

    def _control(self, text: str) -> str:
        starts = [c for c in set(text) if not self._spellings.starts.isdisjoint(_fold(c))]
        masked = text.translate({ord(c): self._stand_in(c) for c in starts})
        return self._edges(masked, self._spellings.control)

    def _special(self, text: str) -> str:
        while spans := self._special_spans(text):
            characters = list(text)
            for start, stop in spans:
                at = next((i for i in range(start, stop) if self._maskable(characters[i])), None)
                if at is not None:
                    characters[at] = self._stand_in(characters[at])
            text = "".join(characters)
        return self._edges(text, self._spellings.special)

    def _special_spans(self, text: str) -> list[tuple[int, int]]:
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        special = {i for i, token in self._tokenizer.control_tokens.items() if token.special}
        return [
            span
            for id_, span in zip(ids, offsets, strict=True)
            if id_ in special
            and self._tokenizer.is_control(id_, text, span)
            and any(map(self._maskable, text[slice(*span)]))
        ]

    def _edges(self, text: str, spelled: str) -> str:
        """Masks an end of the text that the template's own text could make a token of."""
        inner = text.strip()
        if not inner:
            return text
        first, last = text.index(inner[0]), text.rindex(inner[-1])
        known = self._spellings
        head, tail = _fold(inner[: known.longest]), _fold(inner[-known.longest :])
        if any(c in known.ends and f"{head[:n]}\0" in spelled for n, c in enumerate(head, 1)):
            text = self._masked_at(text, first)
        if any(c in known.starts and f"\0{tail[n:]}" in spelled for n, c in enumerate(tail)):
            text = self._masked_at(text, last)
        return text

    def _maskable(self, character: str) -> bool:
        return not character.isspace() and character not in self._stand_ins.values()

    def _masked_at(self, text: str, at: int) -> str:
        return text[:at] + self._stand_in(text[at]) + text[at + 1 :]

    def _stand_in(self, character: str) -> str:
        if character in self._stand_ins.values():
            return character
        if character not in self._stand_ins:
            while chr(self._next) in self._taken:
                self._next += 1
            self._stand_ins[character] = chr(self._next)
            self._next += 1
        return self._stand_ins[character]


@dataclass(frozen=True, slots=True)
class _Spellings:
    """The control tokens' texts, folded.

    Attributes:
        starts: The characters that any of them begins with, white space aside.
        ends: The same for their ends.
        control: All of them, between zero characters.
        special: Those marked special.
        longest: The most characters of one.
    """

    starts: frozenset[str]
    ends: frozenset[str]
    control: str
    special: str
    longest: int


_SPELLINGS: WeakKeyDictionary[Tokenizer, _Spellings] = WeakKeyDictionary()


def _spellings(tokenizer: Tokenizer) -> _Spellings:
    if tokenizer not in _SPELLINGS:
        added = tokenizer.control_tokens.values()
        folded = [_fold(token.content).strip() for token in added]
        special = [_fold(token.content).strip() for token in added if token.special]
        _SPELLINGS[tokenizer] = _Spellings(
            starts=frozenset(spelling[0] for spelling in folded if spelling),
            ends=frozenset(spelling[-1] for spelling in folded if spelling),
            control="\0".join(["", *folded, ""]),
            special="\0".join(["", *special, ""]),
            longest=max(map(len, folded), default=0),
        )
    return _SPELLINGS[tokenizer]


@lru_cache(maxsize=4096)
def _fold(text: str) -> str:
    """Text with the distinctions gone that normalizers of tokenizers ignore.

    Folding more than a tokenizer does only masks more than there would be need for.
    """
    decomposed = unicodedata.normalize("NFKD", text.replace("▁", " ")).casefold()
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
