"""Text to tokens and back, exactly as the tokenizer file says."""

from __future__ import annotations

import json
import operator
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex

import tokenizers

from edge_llm.errors import ArgumentError, IntegrityError
from edge_llm.text.growth import check_growth

__all__ = ["Tokenizer"]

LARGEST_FILE = 1 << 28  # bytes; eight times Gemma's, the largest of the well-known


class Tokenizer:
    """Encodes and decodes with a tokenizer.json.

    Parity: ids and text are those of transformers' fast tokenizer on the same file with
    `clean_up_tokenization_spaces=False`. It may be used from several threads.

    Args:
        source: The JSON text of tokenizer.json. Its truncation and padding are switched off.
        bos: The id of the beginning-of-sequence token, if the model has one.
        eos: The ids that end an answer.
        add_bos: Whether BOS goes in front of a text.
        vocab: Rows of the model's logits. Many models have more than the tokenizer has tokens; the
            ids in between stand for no text.

    Raises:
        ArgumentError: `bos` or `eos` is no id of this tokenizer, or `add_bos` lacks a `bos`.
        IntegrityError: The source is no tokenizer.json, is made to fill the memory, or has more
            tokens than the model.
    """

    def __init__(
        self, source: str, *, bos: int | None, eos: Sequence[int], add_bos: bool, vocab: int = 0
    ) -> None:
        with _panics_are_errors():
            try:
                self._full = tokenizers.Tokenizer.from_str(source)
            except Exception as error:  # the library raises nothing narrower
                raise IntegrityError(f"tokenizer.json cannot be read: {error}.") from error
        check_growth(self._full)
        self._full.no_truncation()
        self._full.no_padding()
        self.added_tokens: Mapping[int, tokenizers.AddedToken] = MappingProxyType(
            self._full.get_added_tokens_decoder()
        )
        """The tokens that are recognised as a whole in text, by id."""
        own = self._own_tokens()
        # Some tokenizers add more tokens than the model has (Gemma 3 adds one for images).
        if vocab and own > vocab:
            raise IntegrityError(
                f"tokenizer.json has a vocabulary of {own} tokens, but the model knows {vocab}.",
                "It belongs to another model: take the one that belongs to the weights.",
            )
        self.vocab_size: int = max(own, max(self.added_tokens, default=-1) + 1, vocab)
        """One more than the highest id."""
        self.control_tokens: Mapping[int, tokenizers.AddedToken] = MappingProxyType(
            {
                token: added
                for token, added in self.added_tokens.items()
                if added.special or added.content.replace("▁", " ").strip()
            }
        )
        """The added tokens that structure a text, by id: all but plain ones of white space.

        Several vocabularies add runs of spaces and newlines (GPT-NeoX, Gemma); these are text.
        """
        # Nobody can write into a message what nobody can guess.
        self._sentinel = secrets.token_hex(16)
        self.bos = None if bos is None else self._id("bos", bos)
        self.eos = tuple(self._id("eos", token) for token in eos)
        if add_bos and bos is None:
            raise ArgumentError("add_bos", "False where there is no bos", add_bos)
        self.add_bos = add_bos

    def _own_tokens(self) -> int:
        """One more than the highest id, without the added tokens."""
        size: int = self._full.get_vocab_size(with_added_tokens=False)
        # As many ids as tokens: to look them up costs half of what a dictionary of them costs.
        if None not in map(self._full.model.id_to_token, range(size)):
            return size
        return max(self._full.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        bos: int | None,
        eos: Sequence[int],
        add_bos: bool,
        vocab: int = 0,
    ) -> Tokenizer:
        """Reads a tokenizer.json.

        Args:
            path: The file.
            bos: As for the class, like the next three.
            eos: See there.
            add_bos: See there.
            vocab: See there.

        Raises:
            ArgumentError: As for the class.
            IntegrityError: The file is missing or is no tokenizer.json.
        """
        try:
            if (size := Path(path).stat().st_size) > LARGEST_FILE:
                raise IntegrityError(
                    f"{path} has {size} bytes; at most {LARGEST_FILE} are read.",
                    "It is no tokenizer.json.",
                )
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}.") from error
        return cls(source, bos=bos, eos=eos, add_bos=add_bos, vocab=vocab)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """The ids of a text; added tokens in it are recognised.

        Args:
            text: Any text that UTF-8 can hold.
            add_bos: Whether BOS goes in front; None leaves it to the tokenizer's `add_bos`.

        Raises:
            ArgumentError: `text` is no string or holds a lone surrogate; or BOS is asked for
                where there is none.
        """
        ids: list[int] = self._encode(self._full, text).ids
        return self._bos(add_bos) + ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text without BOS, and where in it each comes from.

        Args:
            text: Like `encode`'s.

        Returns:
            Ids, and for each the (start, stop) of its characters. An added token that strips white
            space has this in its range.
        """
        encoding = self._encode(self._full, text)
        return encoding.ids, encoding.offsets

    def encode_literal(
        self, text: str, *, add_bos: bool | None = None, continues: bool = False
    ) -> list[int]:
        """The ids of a text in which nothing is a control token, whatever it spells.

        Args:
            text: Like `encode`'s.
            add_bos: Like `encode`'s.
            continues: Whether an added token precedes the text; matters to tokenizers that treat
                the beginning of a text in another way.

        Raises:
            ArgumentError: Like `encode`.
        """
        whole = self._sentinel + text if continues else text
        twin = self._plain
        encoding = self._encode(twin.library, whole)
        if not self.control_tokens.keys().isdisjoint(encoding.ids) and any(
            self.is_control(i, whole, s) for i, s in _pairs(encoding)
        ):
            # A vocabulary that holds the control token's text as an ordinary piece.
            twin = self._purged
            encoding = self._encode(twin.library, whole)
        ids: list[int] = encoding.ids
        if continues:
            sentinel, *ids = ids
            assert sentinel == twin.sentinel
        return self._bos(add_bos) + [twin.true_ids.get(i, i) for i in ids]

    def is_control(self, token: int, text: str, span: tuple[int, int]) -> bool:
        """Whether an id stands for a control token that the text spells out.

        The unknown token, mostly a control token too, is none where it stands for other text.

        Args:
            token: An id that `encode_with_offsets` gave for the text.
            text: The text.
            span: The id's range of characters.
        """
        added = self.control_tokens.get(token)
        if added is None:
            return False
        surface, content = text[slice(*span)], added.content.strip()
        if content in surface or self._full.normalizer is None:
            return content in surface
        # A normalized added token, or a vocabulary whose own piece normalized text spells.
        normalize = self._full.normalizer.normalize_str
        return normalize(content).strip() in normalize(surface)

    def decode(self, tokens: Iterable[SupportsIndex], *, skip_special: bool = True) -> str:
        """The text of ids.

        Args:
            tokens: Ids.
            skip_special: Whether special tokens are left out.

        Raises:
            ArgumentError: An id is outside the vocabulary.
        """
        ids = [self._id("tokens", token) for token in tokens]
        with _panics_are_errors():
            return str(self._full.decode(ids, skip_special_tokens=skip_special))

    def token_string(self, token: SupportsIndex, *, skip_special: bool = True) -> str | None:
        """What the decoder is given for an id, before it makes text of it.

        Args:
            token: An id.
            skip_special: Whether special tokens are left out.

        Returns:
            The vocabulary's string; None for a special token to be left out and for an unused id.

        Raises:
            ArgumentError: The id is outside the vocabulary.
        """
        index = self._id("token", token)
        added = self.added_tokens.get(index)
        if added is not None and added.special and skip_special:
            return None
        string: str | None = self._full.id_to_token(index)
        return string

    def decoder_spec(self) -> dict[str, Any] | None:
        """The `decoder` of tokenizer.json, or None where it has none."""
        decoder = self._full.decoder
        return None if decoder is None else json.loads(decoder.__getstate__())

    def _bos(self, add_bos: bool | None) -> list[int]:
        if not (self.add_bos if add_bos is None else add_bos):
            return []
        if self.bos is None:
            raise ArgumentError("add_bos", "False for a tokenizer without BOS", add_bos)
        return [self.bos]

    def _id(self, name: str, token: SupportsIndex) -> int:
        try:
            index = operator.index(token)
        except TypeError:
            index = -1
        if isinstance(token, bool) or not 0 <= index < self.vocab_size:
            raise ArgumentError(name, f"token ids from 0 to {self.vocab_size - 1}", token)
        return index

    @staticmethod
    def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
        try:
            with _panics_are_errors():
                return tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            domain = "a string without lone surrogates (text that UTF-8 can hold)"
            raise ArgumentError("text", domain, text) from None

    # Two threads may each build a twin at once: both are the same and whole, and either will do.

    @cached_property
    def _plain(self) -> _Twin:
        """The same model, shared, without the control tokens."""
        return self._twin(self._full.model)

    @cached_property
    def _purged(self) -> _Twin:
        """The plain twin over a model whose own vocabulary cannot spell a control token either."""
        spec = json.loads(self._full.to_str())
        model = _purge(spec["model"], {t.content for t in self.control_tokens.values()})
        bare = {"version": spec["version"], "model": model, "added_tokens": []}
        return self._twin(tokenizers.Tokenizer.from_str(json.dumps(bare)).model)

    def _twin(self, model: Any) -> _Twin:
        library = tokenizers.Tokenizer(model)
        library.normalizer = self._full.normalizer
        library.pre_tokenizer = self._full.pre_tokenizer
        texts = sorted(self.added_tokens.keys() - self.control_tokens.keys())
        library.add_tokens([self.added_tokens[token] for token in texts])
        sentinel = tokenizers.AddedToken(self._sentinel, normalized=False, special=True)
        library.add_special_tokens([sentinel])
        own = {library.token_to_id(self.added_tokens[token].content): token for token in texts}
        return _Twin(library, library.token_to_id(self._sentinel), own)


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Where the library's Rust gives up, on a regular expression without end for example."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's, which no module exports
            raise
        raise IntegrityError(
            f"tokenizer.json cannot be used on this: {error}.", "The file is broken."
        ) from error


@dataclass(frozen=True, slots=True)
class _Twin:
    """A tokenizer that knows no control token but the sentinel.

    Attributes:
        library: The tokenizer.
        sentinel: The sentinel's id in it.
        true_ids: The true ids of added tokens by their ids in it.
    """

    library: tokenizers.Tokenizer
    sentinel: int
    true_ids: Mapping[int, int]


def _pairs(encoding: tokenizers.Encoding) -> zip[tuple[int, tuple[int, int]]]:
    return zip(encoding.ids, encoding.offsets, strict=True)


def _purge(model: dict[str, Any], contents: set[str]) -> dict[str, Any]:
    """A model's JSON with entries renamed so that text cannot reach them; ids stay."""
    name = {content: secrets.token_hex(16) for content in contents}
    purged = dict(model)
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: (piece, score) in the order of ids
        purged["vocab"] = [[name.get(piece, piece), score] for piece, score in vocab]
    else:
        purged["vocab"] = {name.get(piece, piece): token for piece, token in vocab.items()}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        purged["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if not contents & {left, right, left + right.removeprefix(prefix)}
        ]
    if model.get("unk_token") in name:
        purged["unk_token"] = name[model["unk_token"]]
    return purged
