"""Tokens to text, one token at a time."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, Protocol, SupportsIndex

import tokenizers

from edge_llm.errors import UnsupportedFormatError
from edge_llm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Makes text of tokens as they come.

    The pieces together are exactly `tokenizer.decode` of all tokens, and none ends in a broken
    character. Each decoder of tokenizer.json is run as a stage that passes on what no later token
    can change; a token costs the same however long the text is.

    A tokenizer with byte fallback turns a run of byte tokens into text only if all of it is valid
    UTF-8, and into U+FFFD otherwise, so a run that is valid so far is held until it ends.

    Args:
        tokenizer: The tokenizer.
        skip_special: Whether special tokens are left out.

    Raises:
        UnsupportedFormatError: The tokenizer's decoder is unknown or cannot work piece by piece.
    """

    __slots__ = ("_skip_special", "_spec", "_stages", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._spec = tokenizer.decoder_spec()
        self._stages = _stages(self._spec)

    def decode(self, token: SupportsIndex) -> str:
        """Takes the next token.

        Args:
            token: Its id.

        Returns:
            The text that is certain now; may be empty.

        Raises:
            ArgumentError: The id is outside the vocabulary.
        """
        string = self._tokenizer.token_string(token, skip_special=self._skip_special)
        if string is None:
            return ""
        strings = [string]
        for stage in self._stages:
            strings = [out for string in strings for out in stage.push(string)]
        return "".join(strings)

    def flush(self) -> str:
        """Ends the text; the next token begins a new one.

        Returns:
            What was held back; an incomplete character becomes U+FFFD.
        """
        strings: list[str] = []
        for stage in self._stages:
            strings = [out for string in strings for out in stage.push(string)] + stage.end()
        self._stages = _stages(self._spec)
        return "".join(strings)


class _Stage(Protocol):
    """One decoder of tokenizer.json, made incremental."""

    def push(self, string: str) -> list[str]: ...

    def end(self) -> list[str]: ...


def _stages(spec: dict[str, Any] | None) -> list[_Stage]:
    if spec is None:
        return [_Spaced()]
    parts = _flat(spec)
    stages: list[_Stage] = []
    fused = False
    for part in parts:
        stages.append(_fused_stage(part) if fused else _stage(part))
        fused = fused or part["type"] in ("Fuse", "ByteLevel")
    return stages


def _flat(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [part for inner in spec["decoders"] for part in _flat(inner)]


def _stage(part: dict[str, Any]) -> _Stage:
    """The stage where each token is still a string of its own."""
    match part["type"]:
        case "ByteLevel":
            return _ByteLevel()
        case "ByteFallback":
            return _ByteRuns()
        case "Metaspace":
            first = " " if part["prepend_scheme"] == "never" else ""
            return _Metaspace(part["replacement"], first)
        case "WordPiece":
            return _WordPiece(part)
        case "BPEDecoder":
            return _WordEnds(part["suffix"])
        case "CTC":
            return _Distinct(part)
        case "Replace" | "Strip":
            return _Each(part)
        case "Fuse":
            return _Fuse()
    raise UnsupportedFormatError(f"tokenizer.json's decoder {part['type']!r} is unknown.")


def _fused_stage(part: dict[str, Any]) -> _Stage:
    """The stage where the decoder before it has joined all tokens into one string."""
    match part:
        case {"type": "Fuse"}:
            return _Fuse()
        case {"type": "Strip"}:
            return _StripEnds(part["content"], part["start"], part["stop"])
        case {"type": "Replace", "pattern": {"String": pattern}} if len(pattern) == 1:
            return _Each(part)
    raise UnsupportedFormatError(
        f"tokenizer.json's decoder {part['type']!r} after one that joins all tokens needs the "
        "whole text.",
        "Move it to the front of the sequence of decoders, if that means the same.",
    )


class _Fuse:
    """Joins the tokens: here a matter of how the next stages read them."""

    def push(self, string: str) -> list[str]:
        return [string]

    def end(self) -> list[str]:
        return []


class _Each(_Fuse):
    """A decoder that treats each token alone."""

    def __init__(self, part: dict[str, Any]) -> None:
        self._decoder = _library_decoder(part)

    def push(self, string: str) -> list[str]:
        return [self._decoder.decode([string])]


class _Distinct(_Each):
    """CTC: repetitions of a token count once."""

    _last: str | None = None

    def push(self, string: str) -> list[str]:
        if string == self._last:
            return []
        self._last = string
        return super().push(string)


class _Spaced(_Fuse):
    """No decoder at all: tokens with spaces between."""

    _separator = ""

    def push(self, string: str) -> list[str]:
        separator, self._separator = self._separator, " "
        return [separator + string]


class _WordPiece(_Fuse):
    """A space before each token but the first and the continuations of words."""

    def __init__(self, part: dict[str, Any]) -> None:
        self._decoder = _library_decoder(part)
        self._front: list[str] = []

    def push(self, string: str) -> list[str]:
        front, self._front = self._front, ["a"]
        return [self._decoder.decode([*front, string])[len(front) :]]


class _Metaspace(_Fuse):
    """A mark for each space; the first token's marks may be there for the mark's sake only."""

    def __init__(self, mark: str, first: str) -> None:
        self._mark = mark
        self._space = first

    def push(self, string: str) -> list[str]:
        space, self._space = self._space, " "
        return [string.replace(self._mark, space)]


class _WordEnds:
    """BPE with a suffix at the end of words, which is a space but after the last token."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held: list[str] = []

    def push(self, string: str) -> list[str]:
        held, self._held = self._held, [string]
        return [before.replace(self._suffix, " ") for before in held]

    def end(self) -> list[str]:
        return [last.replace(self._suffix, "") for last in self._held]


class _ByteRuns:
    """Byte tokens `<0x41>`: a run of them is text if all of it is UTF-8, else U+FFFD each."""

    # The library parses the two characters with Rust's from_str_radix, which takes a plus sign.
    _BYTE = re.compile("<0x([0-9A-Fa-f+][0-9A-Fa-f])>")

    _broken: bool

    def __init__(self) -> None:
        self._start()

    def push(self, string: str) -> list[str]:
        match = self._BYTE.fullmatch(string)
        if match is None:
            return [*self.end(), string]
        if self._broken:
            return ["\ufffd"]
        self._length += 1
        try:
            self._text.append(self._codec.decode(bytes([int(match[1], 16)])))
        except UnicodeDecodeError:
            self._broken = True
            return ["\ufffd"] * self._length
        return []

    def end(self) -> list[str]:
        length, text, broken = self._length, "".join(self._text), self._broken
        incomplete = bool(self._codec.getstate()[0])
        self._start()
        if broken or not length:
            return []
        return ["\ufffd"] * length if incomplete else [text]

    def _start(self) -> None:
        self._codec = codecs.getincrementaldecoder("utf-8")("strict")
        self._text: list[str] = []
        self._length = 0
        self._broken = False


class _ByteLevel:
    """Each character stands for a byte (GPT-2); bytes that are no UTF-8 become U+FFFD."""

    def __init__(self) -> None:
        self._codec = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, string: str) -> list[str]:
        try:
            data = bytes([_BYTE_OF[character] for character in string])
        except KeyError:
            data = string.encode()
        return [self._codec.decode(data)]

    def end(self) -> list[str]:
        return [self._codec.decode(b"", final=True)]


class _StripEnds:
    """Removes up to so many of one character at the two ends of the text."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content = content
        self._start = start
        self._stop = stop
        self._held = ""

    def push(self, string: str) -> list[str]:
        while self._start and string:
            if not string.startswith(self._content):
                self._start = 0
                break
            string = string[1:]
            self._start -= 1
        text = self._held + string
        cut = max(0, len(text) - self._stop)
        self._held = text[cut:]
        return [text[:cut]]

    def end(self) -> list[str]:
        return [self._held.rstrip(self._content)]


def _library_decoder(part: dict[str, Any]) -> Any:
    decoder = tokenizers.decoders.Fuse()
    decoder.__setstate__(json.dumps(part).encode())  # becomes what the state says
    return decoder


def _byte_of() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest is moved up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(rest)}


_BYTE_OF = _byte_of()
