"""Small tokenizers of every kind that checkpoints come with, and manifests for other layouts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from edge_llm.manifest import (
    FORMAT,
    ChatTemplates,
    DecoderGraph,
    Dims,
    FileEntry,
    Manifest,
    Quantization,
    Source,
    StateTensor,
    Tokens,
)
from edge_llm.runtime.session import create_session
from edge_llm.text.tokenizer import Tokenizer

WORDS = "the hello world user assistant system is it a of and then hell wor llo 12 in INST tool"
SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
PLAIN = ("[INST]", "[/INST]", "<think>", "</think>", "<tool_call>", "<<a", "a>>")


def _added() -> list[AddedToken]:
    return [
        *(AddedToken(text, normalized=False, special=True) for text in SPECIAL),
        *(AddedToken(text, normalized=False) for text in PLAIN),
        AddedToken("<mask>", normalized=False, special=True, lstrip=True),
        AddedToken("<sep>", normalized=False, lstrip=True, rstrip=True),
        AddedToken("Foo", normalized=False, single_word=True),
        AddedToken("<Tag>", normalized=True),
        AddedToken("  ", normalized=False),
        AddedToken("\n\n", normalized=False),
    ]


def _merges(words: list[str], alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE vocabulary that builds each word from left to right."""
    pieces = dict.fromkeys(alphabet)
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
            pieces[word[:end]] = None
    return {piece: index for index, piece in enumerate(pieces)}, list(merges)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>|/_[].,!?\n▁é")


def _sentencepiece() -> models.BPE:
    words = [prefix + word for word in WORDS.split() for prefix in ("", "▁")]
    vocab, merges = _merges(words, ["<unk>", "<s>", "</s>", *BYTES, *LETTERS])
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def byte_level() -> Library:
    """GPT-2, Llama 3, Qwen."""
    words = [prefix + word for word in WORDS.split() for prefix in ("", "Ġ")]
    tokenizer = Library(models.BPE(*_merges(words, sorted(pre_tokenizers.ByteLevel.alphabet()))))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level_whole_words() -> Library:
    """Llama 3's `ignore_merges`, with a control token in the vocabulary, and a prefix space."""
    vocab, merges = _merges(["hello", "Ġhello"], sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocab["<s>"] = len(vocab)
    tokenizer = Library(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("hello", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def llama2() -> Library:
    """Llama 2 before `legacy=False`: a mark in front of every section."""
    tokenizer = Library(_sentencepiece())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _metaspace(scheme: str) -> Library:
    tokenizer = Library(_sentencepiece())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    return tokenizer


def unigram() -> Library:
    """T5: the control tokens are pieces of the model too, and the best ones."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<|im_end|>", 0.0), ("[INST]", 0.0)]
    pieces += [(letter, -6.0) for letter in LETTERS]
    pieces += [("▁" + word, -3.0) for word in WORDS.split()]
    tokenizer = Library(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def word_piece() -> Library:
    """BERT: lower case, so that normalized added tokens match in any case."""
    pieces = ["<unk>", *WORDS.lower().split()]
    pieces += [letter.lower() for letter in LETTERS]
    pieces += [f"##{letter.lower()}" for letter in LETTERS]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Library(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def word_ends() -> Library:
    """CLIP, the first GPT: a suffix at the end of words."""
    vocab, merges = _merges(["hello</w>"[:5], "the"], ["<unk>", *LETTERS, *"</w>"])
    vocab |= {f"{letter}</w>": len(vocab) + i for i, letter in enumerate(LETTERS)}
    model = models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Library(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return tokenizer


def words() -> Library:
    """No decoder at all."""
    vocab = {word: index for index, word in enumerate(["<unk>", *WORDS.split()])}
    tokenizer = Library(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def ctc() -> Library:
    tokenizer = words()
    tokenizer.decoder = decoders.CTC(pad_token="a", word_delimiter_token="o")
    return tokenizer


KINDS: dict[str, Callable[[], Library]] = {
    "byte_level": byte_level,
    "byte_level_whole_words": byte_level_whole_words,
    "llama2": llama2,
    "metaspace_first": lambda: _metaspace("first"),
    "metaspace_always": lambda: _metaspace("always"),
    "metaspace_never": lambda: _metaspace("never"),
    "unigram": unigram,
    "word_piece": word_piece,
    "word_ends": word_ends,
    "words": words,
    "ctc": ctc,
}


@cache
def _source(kind: str) -> str:
    tokenizer = KINDS[kind]()
    for added in _added():
        tokenizer.add_special_tokens([added]) if added.special else tokenizer.add_tokens([added])
    return str(tokenizer.to_str())


@cache
def _tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(_source(kind), bos=None, eos=(), add_bos=False)


@pytest.fixture(params=sorted(KINDS), scope="session")
def kind(request: pytest.FixtureRequest) -> Any:
    """Each kind of tokenizer in turn."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer_source() -> Callable[[str], str]:
    """Gives the tokenizer.json of a kind."""
    return _source


@pytest.fixture(scope="session")
def small_tokenizer() -> Callable[[str], Tokenizer]:
    """Gives the Tokenizer of a kind."""
    return _tokenizer


def _manifest_for(graph: Path, layout: str, *, vocab: int, context: int) -> Manifest:
    """A manifest for a graph whose state is named as transformers names it.

    Beside the graph lies its tokenizer.
    """
    session = create_session(graph, threads=1, minimum="1.32")
    config = graph.parent / "genai_config.json"
    size = json.loads(config.read_text())["model"]["decoder"]["head_size"] if config.exists() else 0
    state = tuple(
        StateTensor(
            input=one.name,
            output=one.name.replace("past_key_values", "present"),
            dtype={"tensor(float)": "float32", "tensor(float16)": "float16"}[one.type],
            shape=("batch", one.shape[1], "capacity", size or one.shape[3]),
            batch_axis=0,
            sequence_axis=2,
            shared=layout == "genai.v1",
            kind="kv",
        )
        for one in session.get_inputs()
        if one.name.startswith("past")
    )
    return Manifest(
        format=FORMAT,
        requires=(),
        min_onnxruntime="1.32",
        name=graph.parent.name,
        source=Source(architecture="any", repo=None, revision=None, license=None),
        dims=Dims(
            layers=len(state) // 2,
            hidden=1,
            intermediate=1,
            heads=1,
            kv_heads=1,
            head_dim=1,
            vocab=vocab,
            context=context,
            parameters=1,
        ),
        decoder=DecoderGraph(graph=graph.name, layout=layout, state=state),
        quantization=Quantization(method="none", bits=32, block=None, exceptions={}),
        tokens=Tokens(bos=None, eos=(1,), pad=None, add_bos=False),
        sampling={},
        tokenizer="tokenizer.json",
        chat=ChatTemplates(templates={}, special_tokens={}),
        files={path.name: _entry(path) for path in sorted(graph.parent.iterdir())},
        quality=(),
        producer={},
    )


def _entry(path: Path) -> FileEntry:
    content = path.read_bytes()
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture(scope="session")
def manifest_for() -> Callable[..., Manifest]:
    """Gives the manifest of a graph in another exporter's layout; its tokenizer lies beside it.

    ``manifest_for(graph, layout, vocab=..., context=...)``
    """
    return _manifest_for
