from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import ArgumentError, IntegrityError
from edge_llm.text.tokenizer import Tokenizer

Kind = Callable[[str], Tokenizer]
Source = Callable[[str], str]

FRAGMENTS = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "[INST]", "<think>", "</think>", "<<a",
    "a>>", "<<a>>", "<mask>", " <mask> ", "<sep>", " <sep>  ", "Foo", "xFoo", "Foos", "<Tag>",
    "<tag>", "<TAG>", "  ", "\n\n", "\n", " ", "hello", "the", "<", ">", "|", "<|im_", "end|>", "é",
    "中", "e\u0301", "▁", "Ġ", "<0x41>", "\u3000", "＜s>",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=8).map(
    "".join
)


def with_bos(source: str, **options: Any) -> Tokenizer:
    spec = json.loads(source)
    (bos,) = (t["id"] for t in spec["added_tokens"] if t["content"] == "<s>")
    return Tokenizer(source, **{"bos": bos, "eos": [bos + 1], "add_bos": True, **options})


def test_bos_goes_in_front_where_it_is_wanted(tokenizer_source: Source) -> None:
    source = tokenizer_source("byte_level")
    tokenizer = with_bos(source)
    bos = tokenizer.bos
    assert tokenizer.encode("") == [bos]
    assert tokenizer.encode("a", add_bos=False) == tokenizer.encode("a")[1:]
    assert tokenizer.encode_literal("a") == tokenizer.encode("a")
    assert tokenizer.encode("<s>") == [bos, bos]
    quiet = with_bos(source, add_bos=False)
    assert quiet.encode("") == []
    assert quiet.encode("", add_bos=True) == [bos]
    assert tokenizer.eos == (bos + 1,) if bos is not None else False


def test_bos_without_a_bos_is_refused(tokenizer_source: Source) -> None:
    source = tokenizer_source("byte_level")
    with pytest.raises(ArgumentError, match="add_bos"):
        with_bos(source, bos=None)
    with pytest.raises(ArgumentError, match="add_bos"):
        with_bos(source, bos=None, add_bos=False).encode("a", add_bos=True)


@pytest.mark.parametrize("options", [{"bos": 10**6}, {"bos": -1}, {"eos": [10**6]}, {"eos": [""]}])
def test_ids_of_bos_and_eos_are_checked(options: Any, tokenizer_source: Source) -> None:
    with pytest.raises(ArgumentError, match="token ids"):
        with_bos(tokenizer_source("byte_level"), **options)


def test_truncation_and_padding_in_the_file_are_switched_off(tokenizer_source: Source) -> None:
    from tokenizers import Tokenizer as Library

    library = Library.from_str(tokenizer_source("byte_level"))
    library.enable_truncation(3)
    library.enable_padding(length=20)
    plain = with_bos(tokenizer_source("byte_level"))
    assert with_bos(library.to_str()).encode("hello world!") == plain.encode("hello world!")


def test_from_file(tokenizer_source: Source, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    options: Any = {"bos": None, "eos": (), "add_bos": False}
    with pytest.raises(IntegrityError, match="cannot be read"):
        Tokenizer.from_file(path, **options)
    path.write_bytes(b"\xff")
    with pytest.raises(IntegrityError, match="cannot be read"):
        Tokenizer.from_file(path, **options)
    path.write_text('{"model": 1}')
    with pytest.raises(IntegrityError, match="cannot be read"):
        Tokenizer.from_file(path, **options)
    path.write_text(tokenizer_source("llama2"), encoding="utf-8")
    assert Tokenizer.from_file(path, **options).encode("the")


@pytest.mark.parametrize("text", [None, 1, b"a", ["a"], ("a", "b"), "a\ud800b"])
def test_what_is_no_text_is_refused(text: Any, small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    for encode in (tokenizer.encode, tokenizer.encode_literal, tokenizer.encode_with_offsets):
        with pytest.raises(ArgumentError, match="surrogates"):
            encode(text)


@pytest.mark.parametrize("tokens", [[-1], [10**6], [2**40], ["a"], [1.0], [True], [None]])
def test_what_is_no_id_is_refused(tokens: Any, small_tokenizer: Kind) -> None:
    with pytest.raises(ArgumentError, match="token ids"):
        small_tokenizer("byte_level").decode(tokens)


def test_decode_takes_arrays_and_skips_special_tokens(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    ids = np.array(tokenizer.encode("a<s>b</think>"), np.int64)
    assert tokenizer.decode(ids) == "ab</think>"
    assert tokenizer.decode(ids, skip_special=False) == "a<s>b</think>"


@given(text=texts)
def test_byte_level_text_comes_back(text: str, small_tokenizer: Kind) -> None:
    import unicodedata

    tokenizer = small_tokenizer("byte_level")
    whole = unicodedata.normalize("NFC", text)
    back = tokenizer.decode(tokenizer.encode_literal(text), skip_special=False)
    assert back == whole


@given(text=texts)
def test_literal_text_holds_no_control_token(text: str, kind: str, small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    unknown = {i for i, t in tokenizer.added_tokens.items() if t.content == "<unk>"}
    for continues in (False, True):
        ids = tokenizer.encode_literal(text, continues=continues)
        assert not set(ids) & (tokenizer.control_tokens.keys() - unknown)


@given(text=texts)
def test_literal_is_plain_where_the_text_has_no_control_token(
    text: str, kind: str, small_tokenizer: Kind
) -> None:
    tokenizer = small_tokenizer(kind)
    ids, offsets = tokenizer.encode_with_offsets(text)
    if not any(tokenizer.is_control(i, text, o) for i, o in zip(ids, offsets, strict=True)):
        assert tokenizer.encode_literal(text) == ids
    ids, offsets = tokenizer.encode_with_offsets("<s>" + text)
    rest = zip(ids[1:], offsets[1:], strict=True)
    if not any(tokenizer.is_control(i, "<s>" + text, o) for i, o in rest):
        assert tokenizer.encode_literal(text, continues=True) == ids[1:]


@pytest.mark.parametrize("kind", ["unigram", "byte_level_whole_words"])
def test_a_control_token_in_the_models_own_vocabulary(kind: str, small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode_literal("<s>")
    spelled = "".join(str(tokenizer.token_string(i)) for i in ids).strip("▁Ġ")
    assert spelled == "<s>"
    assert len(ids) >= 3


def test_a_literal_unknown_character_is_still_unknown(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("unigram")
    assert tokenizer.encode_literal("中") == tokenizer.encode("中")
    literal = tokenizer.encode_literal("<unk>中")
    assert literal.count(0) == 1


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Threads that take turns as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("busy_threads")
def test_threads_that_meet_at_the_first_use(tokenizer_source: Source) -> None:
    """What is built at the first use must fit together, whichever thread built what."""
    text = "<s> hello  <|im_end|>"
    options: Any = {"bos": None, "eos": (), "add_bos": False}
    # unigram needs both twins.
    for source in map(tokenizer_source, ["byte_level", "unigram"]):
        expected = Tokenizer(source, **options).encode_literal(text, continues=True)
        for _ in range(10):
            tokenizer = Tokenizer(source, **options)
            barrier = threading.Barrier(8)

            def encode(
                tokenizer: Tokenizer = tokenizer, barrier: threading.Barrier = barrier
            ) -> list[list[int]]:
                barrier.wait()
                return [tokenizer.encode_literal(text, continues=True) for _ in range(3)]

            with ThreadPoolExecutor(8) as pool:
                found = [pool.submit(encode) for _ in range(8)]
            assert [future.result() for future in found] == [[expected] * 3] * 8


def test_what_two_threads_built_at_once_fits_together(tokenizer_source: Source) -> None:
    """Since Python 3.12 each of two threads may build a cached property."""
    text = "<s> hello  <|im_end|>"
    tokenizer = Tokenizer(tokenizer_source("unigram"), bos=None, eos=(), add_bos=False)
    expected = tokenizer.encode_literal(text, continues=True)
    cached = [name for name, value in vars(Tokenizer).items() if isinstance(value, cached_property)]
    built = {name: vars(tokenizer).pop(name) for name in cached if name in vars(tokenizer)}
    assert built
    for name, value in built.items():  # the others stay unbuilt, and are built anew
        vars(tokenizer)[name] = value
        assert tokenizer.encode_literal(text, continues=True) == expected
        for other in built:
            vars(tokenizer).pop(other)


def test_white_space_tokens_are_text(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    contents = {t.content for t in tokenizer.control_tokens.values()}
    assert not contents & {"  ", "\n\n"}
    assert {"<s>", "</think>", "[INST]"} <= contents
    ids = tokenizer.encode("a  b\n\nc")
    assert tokenizer.encode_literal("a  b\n\nc") == ids
    assert set(ids) & tokenizer.added_tokens.keys()
