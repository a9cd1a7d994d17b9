"""What is read of a tokenizer is what transformers' AutoTokenizer and generate would do."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edge_llm.errors import CheckpointError
from edge_llm.huggingface.files import read_json
from edge_llm.huggingface.tokenizer import (
    _BY_MODEL_TYPE,
    _FAMILIES,
    TokenizerFiles,
    read_tokenizer,
)

# Every token that one of the tokenizer classes of transformers assumes, then others.
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<bos>", "<eos>", "<pad>", "<UNK>"]
SPECIAL += ["<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|im_end|>", "<tool>"]
# The prefix of these classes of transformers 4 is not tokenizer.json's.
CLASSES = ["PreTrainedTokenizer", "LlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"]
CLASSES += ["GPTNeoXTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "BloomTokenizer"]


def write(
    folder: Path,
    *,
    prefix: str = "",
    suffix: str = "",
    tokenizer_config: object = None,
    generation: object = None,
    **files: object,
) -> Path:
    """A word-level tokenizer's folder, with the JSON files given."""
    pieces = [*SPECIAL, "a", "b", "hello"]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    if prefix or suffix:
        around = [(piece, ids[piece]) for piece in f"{prefix} {suffix}".split()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A {suffix}".strip(), special_tokens=around
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    files |= {"tokenizer_config": tokenizer_config, "generation_config": generation}
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, **config: Any) -> TokenizerFiles:
    return read_tokenizer(folder, config)


def transformers_reads(folder: Path) -> Any:
    """AutoTokenizer on the folder, which needs a model type."""
    transformers = pytest.importorskip("transformers")
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("prefix", ["", "<s>"])
@pytest.mark.parametrize("fast", ["", "Fast"])
@pytest.mark.parametrize("name", CLASSES)
def test_bos_and_special_tokens_are_autotokenizers(
    tmp_path: Path, name: str, fast: str, prefix: str, add_bos: bool | None
) -> None:
    if name == "PreTrainedTokenizer":
        fast = "Fast"
    settings: dict[str, Any] = {"tokenizer_class": name + fast}
    settings |= {} if add_bos is None else {"add_bos_token": add_bos}
    if prefix:
        settings["bos_token"] = {"__type": "AddedToken", "content": prefix, "special": True}
    write(tmp_path, prefix=prefix, tokenizer_config=settings)
    theirs = transformers_reads(tmp_path)
    ours = read(tmp_path, model_type="llama")
    ids = theirs("hello").input_ids
    assert ours.special_tokens == {
        key: value for key, value in theirs.special_tokens_map.items() if isinstance(value, str)
    }
    assert ours.bos == (ids[0] if ours.add_bos else theirs.bos_token_id)
    assert ids == [*([ours.bos] if ours.add_bos else []), len(SPECIAL) + 2]


@pytest.mark.parametrize("model_type", ["llama", "gemma", "qwen2", "gpt_neox", "smollm3"])
def test_the_model_type_decides_where_no_class_is_named(tmp_path: Path, model_type: str) -> None:
    write(tmp_path, config={"model_type": model_type})
    ids = transformers_reads(tmp_path)("hello").input_ids
    ours = read_tokenizer(tmp_path, read_json(tmp_path / "config.json"))
    assert ids == [*([ours.bos] if ours.add_bos else []), len(SPECIAL) + 2]


def test_the_tables_are_those_of_transformers() -> None:
    auto = pytest.importorskip("transformers.models.auto.tokenization_auto")
    for model_type, name in _BY_MODEL_TYPE.items():
        assert auto.TOKENIZER_MAPPING_NAMES[model_type][1] == f"{name}TokenizerFast"
    names = {fast for _, fast in auto.TOKENIZER_MAPPING_NAMES.values() if fast}
    classes = {name: auto.tokenizer_class_from_name(name) for name in names}
    rewriting = {
        name.removesuffix("TokenizerFast")
        for name, kind in classes.items()
        if hasattr(kind, "update_post_processor")
    }
    assert {name for name, family in _FAMILIES.items() if family.add_bos is not None} == rewriting
    for name, family in _FAMILIES.items():
        stated = inspect.signature(classes[f"{name}TokenizerFast"].__init__).parameters
        for field, token in asdict(family).items():
            parameter = stated.get("add_bos_token" if field == "add_bos" else f"{field}_token")
            assert token == (parameter.default if parameter else None)


@pytest.mark.parametrize("prefix", ["", "<s>"])
def test_a_file_of_transformers_5_leaves_bos_to_tokenizer_json(tmp_path: Path, prefix: str) -> None:
    settings = {"tokenizer_class": "LlamaTokenizer", "backend": "tokenizers", "bos_token": "<s>"}
    write(tmp_path, prefix=prefix, tokenizer_config=settings)
    files = read(tmp_path)
    assert (files.bos, files.add_bos) == (1, bool(prefix))
    assert files.special_tokens == {"bos_token": "<s>"}


@pytest.mark.parametrize("model", ["stories260k", "books7m"])
def test_shared_models(shared: Path, model: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "models" / model
    ours = read_tokenizer(folder, read_json(folder / "config.json"))
    # transformers 4.57 does not know books7m's class by name, TokenizersBackend of version 5.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = "Once upon a time"
    bare = theirs(text, add_special_tokens=False).input_ids
    assert theirs(text).input_ids == [*([ours.bos] if ours.add_bos else []), *bare]
    assert ours.add_bos is (model == "stories260k")
    assert (ours.bos, ours.eos) == (1, (2,))
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    assert ours.pad == (0 if model == "books7m" else None)
    assert (ours.sampling, ours.ignored) == ({"temperature": 0}, ())
    assert ours.chat_templates == {}
    assert ours.tokenizer_json == folder / "tokenizer.json"


def test_a_lone_prefix_is_bos_whatever_the_settings_say(tmp_path: Path) -> None:
    write(tmp_path, prefix="<bos>", tokenizer_config={"bos_token": "<s>"})
    files = read(tmp_path, bos_token_id=3)
    assert (files.bos, files.add_bos) == (SPECIAL.index("<bos>"), True)


def test_truncation_and_padding_do_not_disturb_the_reading(tmp_path: Path) -> None:
    write(tmp_path, prefix="<s>")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(length=8, pad_id=6, pad_token="<pad>")
    tokenizer.enable_truncation(1)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read(tmp_path).add_bos is True


@pytest.mark.parametrize(
    ("suffix", "settings", "message"),
    [
        ("</s>", {}, "behind every text"),
        ("", {"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, "behind every text"),
        ("", {"tokenizer_class": "LlamaTokenizer", "bos_token": None}, "asks for BOS"),
    ],
)
def test_prefixes_that_cannot_be_followed_are_refused(
    tmp_path: Path, suffix: str, settings: object, message: str
) -> None:
    write(tmp_path, suffix=suffix, tokenizer_config=settings)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_two_tokens_in_front_are_refused(tmp_path: Path) -> None:
    write(tmp_path, prefix="<s> <bos>")
    with pytest.raises(CheckpointError, match=r"puts \[1, 4\] in front of every text"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "own", "eos"),
    [
        ({"eos_token_id": [10, 3]}, {"eos_token_id": 3}, "<|im_end|>", (10, 3)),
        ({"eos_token_id": 2}, {"eos_token_id": 3}, "<|im_end|>", (2, 3, 10)),
        ({}, {"eos_token_id": [3, 2]}, None, (3, 2)),
        (None, {"eos_token_id": 3}, "</s>", (3, 2)),
        (None, {}, "</s>", (2,)),
        (None, {}, None, ()),
        # An ordinary piece ends a text only where generate itself would stop at it.
        ({"eos_token_id": 2}, {"eos_token_id": 12}, None, (2,)),
        ({"eos_token_id": 12}, {}, None, (12,)),
        (None, {"eos_token_id": 12}, None, (12,)),
        ({"eos_token_id": -1}, {"eos_token_id": 3}, None, (3,)),
    ],
)
def test_eos_is_what_generate_stops_at_and_further_added_tokens(
    tmp_path: Path, generation: Any, config: Any, own: str | None, eos: tuple[int, ...]
) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": own}
    write(tmp_path, tokenizer_config=settings, generation=generation)
    assert read(tmp_path, **config).eos == eos


def test_bos_and_pad_fall_back_to_the_configurations(tmp_path: Path) -> None:
    write(tmp_path, generation={"pad_token_id": 6})
    files = read(tmp_path, bos_token_id=3, pad_token_id=1)
    assert (files.bos, files.pad, files.add_bos) == (3, 6, False)
    assert read(tmp_path, pad_token_id=-1).bos is None
    (tmp_path / "generation_config.json").unlink()
    assert read(tmp_path, pad_token_id=-1).pad is None


@pytest.mark.parametrize("value", ["2", True, [1, None], 2.0])
def test_ids_that_are_no_ids_are_named(tmp_path: Path, value: object) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match="eos_token_id must be an id"):
        read(tmp_path, eos_token_id=value)


def test_special_tokens_of_an_older_folder(tmp_path: Path) -> None:
    """special_tokens_map.json wins, unless added_tokens_decoder is there."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<tool>"],
    }
    older = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "additional_special_tokens": ["<eos>"],
    }
    write(tmp_path, tokenizer_config=settings, special_tokens_map=older)
    for expected in ("<|im_end|>", "</s>"):
        theirs = transformers_reads(tmp_path).special_tokens_map
        theirs.pop("additional_special_tokens")
        assert (
            read(tmp_path).special_tokens == theirs == {"bos_token": "<s>", "eos_token": expected}
        )
        settings["added_tokens_decoder"] = {"2": {"content": "</s>", "special": True}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))


def test_extra_special_tokens_have_names(tmp_path: Path) -> None:
    extra = {"tool_token": "<tool>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": extra}
    write(tmp_path, tokenizer_config=settings)
    assert read(tmp_path).special_tokens == extra == transformers_reads(tmp_path).special_tokens_map


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<new>"}},
        {"tokenizer_config": {"eos_token": "hello"}},
        {"tokenizer_config": {"additional_special_tokens": ["<s>", {"content": "<new>"}]}},
        {"tokenizer_config": {"added_tokens_decoder": {"99": {"content": "<new>"}}}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<new>"}}},
        {"tokenizer_config": {"extra_special_tokens": ["<new>"]}},
        {"added_tokens": {"<new>": 99}},
        {"special_tokens_map": {"additional_special_tokens": ["<new>"]}},
    ],
)
def test_tokens_that_transformers_would_add_are_missed(tmp_path: Path, files: Any) -> None:
    write(tmp_path, **files)
    with pytest.raises(CheckpointError, match=r"lacks 1 special tokens .*'(<new>|hello)'.*Write"):
        read(tmp_path)


def test_a_padding_token_that_tokenizer_json_lacks_does_no_harm(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"pad_token": "[PAD]"})
    files = read(tmp_path)
    assert (files.pad, files.special_tokens) == (None, {"pad_token": "[PAD]"})


def test_a_special_token_that_is_no_text_is_named(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": {"id": 2}})
    with pytest.raises(CheckpointError, match="eos_token must be a string or an object"):
        read(tmp_path)


def put(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "stated", "expected"),
    [
        ({}, None, {}),
        ({}, "config é", {"default": "config é"}),
        (
            {},
            [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
            {"default": "d", "tool_use": "t"},
        ),
        ({"chat_template.jinja": "file é"}, "config", {"default": "file é"}),
        (
            {"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"},
            "config",
            {"default": "file", "rag": "rag"},
        ),
        ({"additional_chat_templates/rag.jinja": "rag"}, "config", {"rag": "rag"}),
        ({"chat_template.json": '{"chat_template": "legacy"}'}, "config", {"default": "config"}),
    ],
)
def test_chat_templates_are_autotokenizers(
    tmp_path: Path, files: dict[str, str], stated: object, expected: dict[str, str]
) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": stated}
    write(tmp_path, tokenizer_config=settings)
    for name, content in files.items():
        put(tmp_path, name, content)
    templates = read(tmp_path).chat_templates
    assert templates == expected
    assert list(templates) == list(expected)
    theirs = transformers_reads(tmp_path).chat_template or {}
    assert ({"default": theirs} if isinstance(theirs, str) else theirs) == expected


def test_the_processors_template_is_the_last_resort(tmp_path: Path) -> None:
    write(tmp_path, chat_template={"chat_template": "legacy"})
    assert read(tmp_path).chat_templates == {"default": "legacy"}


@pytest.mark.parametrize("stated", [3, ["x"], [{"name": "default"}], {"default": None}])
def test_broken_chat_templates_are_named(tmp_path: Path, stated: object) -> None:
    write(tmp_path, tokenizer_config={"chat_template": stated})
    with pytest.raises(CheckpointError, match="chat_template must be"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0}),
        (
            {"do_sample": None, "repetition_penalty": 1.1, "top_k": 20},
            {"temperature": 0, "repetition_penalty": 1.1},
        ),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0},
        ),
        ({"do_sample": True, "top_k": 0}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": None, "temperature": 0.5}, {"temperature": 0.5}),
        (
            {"do_sample": True, "repetition_penalty": 1.05, "top_k": 5.0},
            {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.05},
        ),
    ],
)
def test_sampling_is_that_of_generate(
    tmp_path: Path, generation: dict[str, Any], sampling: dict[str, Any]
) -> None:
    write(tmp_path, generation=generation)
    files = read(tmp_path, do_sample=True, temperature=0.1)
    assert files.sampling == sampling
    assert isinstance(files.sampling.get("top_k", 0), int)
    assert files.ignored == ()


def test_config_json_stands_in_for_generation_config_json(tmp_path: Path) -> None:
    write(tmp_path)
    files = read(tmp_path, do_sample=True, temperature=0.1, top_k=3, hidden_size=64, num_beams=4)
    assert files.sampling == {"temperature": 0.1, "top_k": 3}
    assert files.ignored == ("num_beams",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", 1),
        ("temperature", -0.1),
        ("temperature", "warm"),
        ("temperature", float("nan")),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1),
        ("repetition_penalty", 0),
    ],
)
def test_settings_outside_their_domain_are_named(tmp_path: Path, name: str, value: object) -> None:
    write(tmp_path, generation={"do_sample": True, name: value})
    with pytest.raises(CheckpointError, match=f"{name} must be"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("penalty_alpha", 0.6),
        ("no_repeat_ngram_size", 3),
        ("forced_bos_token_id", 5),
        ("suppress_tokens", [7]),
        ("stop_strings", ["\n"]),
        ("guidance_scale", 1.5),
        ("min_new_tokens", 3),
        ("a_setting_of_tomorrow", True),
    ],
)
def test_settings_that_cannot_be_honoured_are_listed(
    tmp_path: Path, name: str, value: object
) -> None:
    write(tmp_path, generation={"max_new_tokens": 9, name: value})
    assert read(tmp_path).ignored == (name,)


@pytest.mark.parametrize("draws", [True, False])
def test_samplers_are_listed_only_where_tokens_are_drawn(tmp_path: Path, draws: bool) -> None:
    write(tmp_path, generation={"do_sample": draws, "typical_p": 0.9, "eta_cutoff": 0.0})
    assert read(tmp_path).ignored == (("typical_p",) if draws else ())


def test_the_defaults_of_transformers_are_not_listed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig(penalty_alpha=None).to_dict()
    write(tmp_path, generation=defaults)
    assert defaults.keys() > {"num_beams", "typical_p"}
    assert read(tmp_path).ignored == ()
    (tmp_path / "generation_config.json").unlink()
    assert read(tmp_path, **transformers.LlamaConfig().to_dict()).ignored == ()


def test_vocab_size_is_the_highest_id_and_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 41}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read(tmp_path).vocab_size == 42


def test_a_missing_tokenizer_json_names_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*save_pretrained\(folder\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
    ],
)
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_broken_json_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert str(tmp_path / name) in caught.value.message


def test_json_that_is_no_tokenizer_and_text_that_is_no_template_name_the_file(
    tmp_path: Path,
) -> None:
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        read(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Telepathy"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not what the tokenizers"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null"])
def test_json_that_is_broken_is_named_and_not_printed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(path) in caught.value.message
    assert len(str(caught.value)) < 1000


def test_a_folder_in_the_files_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_json(tmp_path / "config.json")


def test_transformers_own_number_for_no_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert read_json(tmp_path / "a.json") == {"model_max_length": 1000000000000000019884624838656}
    (tmp_path / "a.json").write_text('{"model_max_length": 1' + "0" * 400 + "}")
    with pytest.raises(CheckpointError, match="integer of 401 characters"):
        read_json(tmp_path / "a.json")
