from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from edge_llm.errors import ArgumentError, UnsupportedFormatError
from edge_llm.text.streaming import Detokenizer
from edge_llm.text.tokenizer import Tokenizer

Kind = Callable[[str], Tokenizer]


def check(tokenizer: Tokenizer, tokens: list[int], *, skip_special: bool) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    whole = tokenizer.decode(tokens, skip_special=skip_special)
    shown = ""
    for token in tokens:
        shown += detokenizer.decode(token)
        assert whole.startswith(shown)
    assert shown + detokenizer.flush() == whole


def find(tokenizer: Tokenizer, string: str) -> int:
    strings = [tokenizer.token_string(token) for token in range(tokenizer.vocab_size)]
    return strings.index(string)


def ids(tokenizer: Tokenizer, data: st.DataObject) -> list[int]:
    """Any ids, but often ones from a small part of the vocabulary: the bytes come first."""
    high = data.draw(st.sampled_from([tokenizer.vocab_size, min(262, tokenizer.vocab_size)]))
    return data.draw(st.lists(st.integers(0, high - 1), max_size=40))


@given(data=st.data(), skip_special=st.booleans())
def test_pieces_make_the_whole(
    data: st.DataObject, skip_special: bool, kind: str, small_tokenizer: Kind
) -> None:
    tokenizer = small_tokenizer(kind)
    check(tokenizer, ids(tokenizer, data), skip_special=skip_special)


@pytest.mark.parametrize("name", ["books7m", "stories260k"])
@given(data=st.data(), skip_special=st.booleans())
def test_pieces_make_the_whole_on_real_tokenizers(
    data: st.DataObject, skip_special: bool, name: str, shared: Path
) -> None:
    path = shared / "models" / name / "tokenizer.json"
    tokenizer = Tokenizer.from_file(path, bos=1, eos=[2], add_bos=True)
    check(tokenizer, ids(tokenizer, data), skip_special=skip_special)


@given(text=st.text(max_size=30), skip_special=st.booleans())
def test_pieces_make_the_whole_of_text(
    text: str, skip_special: bool, kind: str, small_tokenizer: Kind
) -> None:
    tokenizer = small_tokenizer(kind)
    check(tokenizer, tokenizer.encode(text), skip_special=skip_special)


@given(data=st.lists(st.integers(0, 255), max_size=12).map(bytes))
def test_any_bytes(data: bytes, small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("llama2")
    tokens = [3 + byte for byte in data]
    check(tokenizer, tokens, skip_special=True)
    check(tokenizer, [*tokens, tokenizer.encode("the")[0]], skip_special=True)


def test_text_comes_as_soon_as_it_is_certain(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.decode(token) for token in tokenizer.encode("hello é中<s>!")]
    assert pieces == ["hello", " ", "", "é", "", "", "中", "", "!"]
    assert detokenizer.flush() == ""


def test_a_run_of_byte_tokens_is_held_until_it_ends(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("llama2")
    detokenizer = Detokenizer(tokenizer)
    strings = ["▁", "the", "<0xE4>", "<0xB8>", "<0xAD>", "<0xC3>", "<0xA9>", "!"]
    pieces = [detokenizer.decode(find(tokenizer, string)) for string in strings]
    assert pieces == ["", "the", "", "", "", "", "", "中é!"]


def test_flush_begins_anew(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("llama2")
    detokenizer = Detokenizer(tokenizer)
    the = find(tokenizer, "▁the")
    assert [detokenizer.decode(the), detokenizer.decode(3 + 0xE4), detokenizer.flush()] == [
        "the",
        "",
        "�",
    ]
    assert detokenizer.decode(the) == "the"


@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
@pytest.mark.parametrize("byte", [0x80, 0xE4, 0xFF])
def test_endless_bytes_that_form_no_character_are_bounded(
    kind: str, byte: int, small_tokenizer: Kind
) -> None:
    tokenizer = small_tokenizer(kind)
    string = f"<0x{byte:02X}>" if kind == "llama2" else {0x80: "Ģ", 0xE4: "ä", 0xFF: "ÿ"}[byte]
    token = find(tokenizer, string)
    detokenizer = Detokenizer(tokenizer)
    shown = 0
    for n in range(1, 2001):
        shown += len(detokenizer.decode(token))
        assert n - 3 <= shown <= n


def test_a_token_costs_the_same_however_long_the_text_is(small_tokenizer: Kind, kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    tokens = tokenizer.encode("the hello world") * 4000

    def seconds(n: int) -> float:
        detokenizer = Detokenizer(tokenizer)
        started = time.process_time()
        for token in tokens[:n]:
            detokenizer.decode(token)
        return time.process_time() - started

    seconds(100)
    # Ten times the tokens in well under the hundred times that a quadratic cost would take.
    assert seconds(5000) < 40 * max(seconds(500), 1e-3)


def test_an_id_outside_the_vocabulary_is_refused(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    with pytest.raises(ArgumentError, match="token"):
        Detokenizer(tokenizer).decode(tokenizer.vocab_size)


def _with_decoder(decoder: object) -> Tokenizer:
    library = Library(models.WordLevel({"a": 0, " a ": 1, "  ": 2, "▁": 3, "x": 4}, unk_token="a"))
    library.decoder = decoder
    return Tokenizer(library.to_str(), bos=None, eos=(), add_bos=False)


@given(
    tokens=st.lists(st.sampled_from([0, 1, 3, 4]), min_size=2, max_size=9).map(lambda t: [0, *t, 0])
)
@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence(
            [decoders.Fuse(), decoders.Strip(" ", 1, 2), decoders.Replace("▁", "--")]
        ),
        decoders.Sequence([decoders.Strip(" ", 1, 1), decoders.Fuse()]),
        decoders.Sequence(
            [
                decoders.Sequence([decoders.Replace("a", " ")]),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 2),
            ]
        ),
        decoders.WordPiece("x", cleanup=False),
        decoders.Strip(" ", 1, 1),
    ],
    ids=repr,
)
def test_other_decoders(tokens: list[int], decoder: object) -> None:
    check(_with_decoder(decoder), tokens, skip_special=True)


def test_a_decoder_that_needs_the_whole_text_is_refused() -> None:
    decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    with pytest.raises(UnsupportedFormatError, match="Replace"):
        Detokenizer(_with_decoder(decoder))
