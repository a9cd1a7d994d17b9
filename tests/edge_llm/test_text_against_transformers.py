"""Ids and text are transformers' for the same tokenizer file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from edge_llm.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

FRAGMENTS = [
    "<s>", "</s>", "<unk>", "<|im_end|>", "[INST]", "</think>", "<<a>>", " <mask> ", " <sep>  ",
    "Foo", "xFoo", " Foo.", "<Tag>", "<TAG>", "  ", "\n\n", " ", "hello", " the", "<", "é", "中",
    "e\u0301", "▁", "<0x41>", "don't", "123", "\t", "👩‍🚀",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=8).map(
    "".join
)


def check(mine: Tokenizer, theirs: Any, text: str, ids: list[int]) -> None:
    encoded = mine.encode(text, add_bos=False)
    assert encoded == theirs.encode(text, add_special_tokens=False)
    for tokens in (encoded, ids):
        for skip in (True, False):
            assert mine.decode(tokens, skip_special=skip) == theirs.decode(
                tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


@given(text=texts, data=st.data())
def test_small_tokenizers(
    text: str,
    data: st.DataObject,
    kind: str,
    tokenizer_source: Callable[[str], str],
    small_tokenizer: Callable[[str], Tokenizer],
) -> None:
    mine = small_tokenizer(kind)
    library = Library.from_str(tokenizer_source(kind))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library)
    ids = data.draw(st.lists(st.integers(0, mine.vocab_size - 1), max_size=12))
    check(mine, theirs, text, ids)


@pytest.fixture(scope="module", params=["books7m", "stories260k"])
def real(request: pytest.FixtureRequest, shared: Path) -> tuple[Tokenizer, Any]:
    folder = shared / "models" / request.param
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    mine = Tokenizer.from_file(
        folder / "tokenizer.json",
        bos=theirs.bos_token_id,
        eos=[theirs.eos_token_id],
        add_bos=request.param == "stories260k",
    )
    return mine, theirs


@given(text=texts, data=st.data())
def test_real_tokenizers(text: str, data: st.DataObject, real: tuple[Tokenizer, Any]) -> None:
    mine, theirs = real
    ids = data.draw(st.lists(st.integers(0, mine.vocab_size - 1), max_size=40))
    check(mine, theirs, text, ids)
    assert mine.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("name", ["books_eval.txt", "tinystories_valid_sample.txt"])
def test_real_text(name: str, real: tuple[Tokenizer, Any], shared: Path) -> None:
    mine, theirs = real
    with (shared / "data" / name).open(encoding="utf-8") as file:
        text = file.read(20_000)
    ids = mine.encode(text)
    assert ids == theirs.encode(text)
    assert mine.decode(ids) == text
