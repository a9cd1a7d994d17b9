"""What a model's files say of its tokenizer, chat templates and generation settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edge_llm.errors import CheckpointError
from edge_llm.huggingface.files import read_json
from edge_llm.huggingface.generation import read_sampling

__all__ = ["TokenizerFiles", "read_tokenizer"]

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True, slots=True)
class _Family:
    """What a tokenizer class of transformers 4 assumes where tokenizer_config.json is silent.

    ``add_bos`` says whether BOS goes in front; None where the class leaves that to tokenizer.json.
    """

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    add_bos: bool | None = None


_LLAMA = _Family("<s>", "</s>", "<unk>", add_bos=True)
_GPT2 = _Family("<|endoftext|>", "<|endoftext|>", "<|endoftext|>")
_FAMILIES = {
    "Llama": _LLAMA,
    "CodeLlama": _LLAMA,
    "Gemma": _Family("<bos>", "<eos>", "<unk>", "<pad>", add_bos=True),
    "Cohere": _Family("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<UNK>", add_bos=True),
    "Bloom": _Family("<s>", "</s>", "<unk>", "<pad>"),
    "GPT2": _GPT2,
    "CodeGen": _GPT2,
    "GPTNeoX": _Family("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", add_bos=False),
    "Qwen2": _Family(None, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
}
# The class that AutoTokenizer takes where no file names one.
_BY_MODEL_TYPE = (
    dict.fromkeys(("arcee", "llama", "ministral", "mistral", "mixtral", "phi3"), "Llama")
    | dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "Gemma")
    | dict.fromkeys(("gpt_neox", "olmo", "olmo2", "stablelm"), "GPTNeoX")
    | dict.fromkeys(("qwen2", "qwen3"), "Qwen2")
    | dict.fromkeys(("exaone4", "gpt2", "olmo3", "starcoder2"), "GPT2")
    | {"bloom": "Bloom", "cohere": "Cohere", "cohere2": "Cohere", "phi": "CodeGen"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What a bundle needs besides the graph.

    Attributes:
        tokenizer_json: The tokenizer's file.
        vocab_size: Its highest id + 1.
        bos: Begin-of-sequence id: the one that is put in front where ``add_bos`` is true, and the
            one that generation from nothing starts with.
        eos: Ids that end a generation: those that transformers' ``generate`` stops at
            (generation_config.json's, or else config.json's), then config.json's and the
            tokenizer's, if they are added tokens. An ordinary piece ends nothing unless
            ``generate`` says so.
        pad: Padding id.
        add_bos: Whether AutoTokenizer puts ``bos`` in front of a text.
        chat_templates: Jinja sources by name, "default" first; empty for a base model.
        special_tokens: What a chat template sees by name, such as ``bos_token``.
        sampling: Default sampling: temperature (0: greedy), top_k, top_p, min_p,
            repetition_penalty.
        ignored: Generation settings that change decoding and that the runtime does not have.
    """

    tokenizer_json: Path
    vocab_size: int
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    add_bos: bool
    chat_templates: dict[str, str]
    special_tokens: dict[str, str]
    sampling: dict[str, float | int]
    ignored: tuple[str, ...]

    def check(self, vocab: int) -> None:
        """Refuse ids that a model has no row for.

        Args:
            vocab: The rows that it has.

        Raises:
            CheckpointError: There is such an id.
        """
        if self.vocab_size > vocab:
            raise CheckpointError(
                f"tokenizer.json has ids up to {self.vocab_size - 1}, but the model's vocabulary "
                f"has {vocab} rows.",
                "Use the tokenizer that belongs to this model.",
            )
        for name, ids in {"bos": [self.bos], "eos": self.eos, "pad": [self.pad]}.items():
            for token in ids:
                if token is not None and token >= vocab:
                    raise CheckpointError(
                        f"{name}_token_id is {token}, but the model's vocabulary has {vocab} rows.",
                        "Repair it in generation_config.json and config.json.",
                    )

    def template_paths(self) -> dict[str, str]:
        """Where a bundle keeps each chat template, by the template's name.

        Raises:
            CheckpointError: A name cannot be a file's.
        """
        paths = {}
        for name in self.chat_templates:
            if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
                raise CheckpointError(
                    f"The chat template's name {name!r} cannot be a file's name.",
                    "Rename it in tokenizer_config.json.",
                )
            default = name == "default"
            paths[name] = (
                "chat_template.jinja" if default else f"additional_chat_templates/{name}.jinja"
            )
        return paths


def read_tokenizer(
    folder: Path,
    config_json: Mapping[str, Any],
    *,
    generation_json: Mapping[str, Any] | None = None,
) -> TokenizerFiles:
    """Read the tokenizer's and the generation's files of a model.

    The rules are those of transformers 4.57's AutoTokenizer and GenerationConfig, and for a
    tokenizer_config.json written by transformers 5, of that.

    Args:
        folder: The model's folder.
        config_json: The content of its config.json.
        generation_json: The content of its generation_config.json; by default that file's, and
            where there is none config.json's, as in transformers.

    Raises:
        CheckpointError: A file is missing or broken, or holds what the runtime could not follow.
    """
    path = folder / "tokenizer.json"
    tokenizer = _load(path)
    settings = _read_settings(folder)
    family = _family(settings, config_json)
    special = _special_tokens(settings, family)
    _check_added(folder, tokenizer, settings)
    path_of_generation = folder / "generation_config.json"
    if generation_json is None and path_of_generation.is_file():
        generation_json = read_json(path_of_generation)
    generation = config_json if generation_json is None else generation_json
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    prefix = _prefix(tokenizer, settings, family, ids)
    sources = (generation, config_json)
    bos = [*prefix, *_known(ids, "bos_token"), *_ids("bos_token_id", *sources)]
    pad = [*_known(ids, "pad_token"), *_ids("pad_token_id", *sources)]
    sampling, ignored = read_sampling(generation, strict=generation_json is not None)
    return TokenizerFiles(
        tokenizer_json=path,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        bos=bos[0] if bos else None,
        eos=_eos(tokenizer, generation, config_json, _known(ids, "eos_token")),
        pad=pad[0] if pad else None,
        add_bos=bool(prefix),
        chat_templates=_chat_templates(folder, settings),
        special_tokens=special,
        sampling=sampling,
        ignored=ignored,
    )


def _load(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no tokenizer.json.",
            "Convert the tokenizer with transformers: AutoTokenizer.from_pretrained(source)"
            ".save_pretrained(folder)",
        )
    read_json(path)  # names what is broken better than the tokenizers library does
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(
            f"{path} is not what the tokenizers library reads: {error}.",
            "Download it again, or upgrade tokenizers.",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the older files where transformers reads them."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if "added_tokens_decoder" in settings:
        return settings
    if (older := folder / "special_tokens_map.json").is_file():
        more = settings.get("additional_special_tokens") or []
        settings |= read_json(older)
        settings["additional_special_tokens"] = [
            *more,
            *(settings.get("additional_special_tokens") or []),
        ]
    if (older := folder / "added_tokens.json").is_file():
        settings["added_tokens_decoder"] = {
            index: {"content": token} for token, index in read_json(older).items()
        }
    return settings


def _family(settings: Mapping[str, Any], config_json: Mapping[str, Any]) -> _Family:
    # transformers 5 writes "backend", and leaves BOS to tokenizer.json whatever the class.
    if "backend" in settings:
        return _Family()
    named = settings.get("tokenizer_class") or config_json.get("tokenizer_class")
    if named is None:
        named = _BY_MODEL_TYPE.get(str(config_json.get("model_type")), "")
    name = str(named).removesuffix("Fast").removesuffix("Tokenizer")
    return _FAMILIES.get(name, _Family())


def _special_tokens(settings: Mapping[str, Any], family: _Family) -> dict[str, str]:
    """Special tokens by the name that a chat template knows them by."""
    named: dict[str, Any] = {
        "bos_token": family.bos,
        "eos_token": family.eos,
        "unk_token": family.unk,
        "pad_token": family.pad,
    }
    named |= {name: settings[name] for name in _NAMED if name in settings}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(settings.get(key), dict):
            named |= settings[key]
    return {name: _content(token, name) for name, token in named.items() if token}


def _content(token: object, name: str) -> str:
    """The text of a token, which is a string or a dictionary with ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise CheckpointError(
            f"tokenizer_config.json: {name} must be a string or an object with content, got "
            f"{token!r}.",
            "Download it again.",
        )
    return content


def _check_added(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Refuse a tokenizer.json without tokens that transformers would add to it on loading."""
    declared = [settings.get("bos_token"), settings.get("eos_token")]
    declared += settings.get("additional_special_tokens") or []
    for key in ("added_tokens_decoder", "extra_special_tokens", "model_specific_special_tokens"):
        tokens = settings.get(key) or []
        declared += tokens.values() if isinstance(tokens, dict) else tokens
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    wanted = dict.fromkeys(_content(token, "a special token") for token in declared if token)
    if missing := [token for token in wanted if token not in known]:
        raise CheckpointError(
            f"{folder}: tokenizer.json lacks {len(missing)} special tokens that "
            f"tokenizer_config.json declares, such as {missing[0]!r}.",
            "Write it anew with transformers: AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder)",
        )


def _known(ids: Mapping[str, int | None], name: str) -> list[int]:
    """The id of a special token, if it has one."""
    return [item] if (item := ids.get(name)) is not None else []


def _prefix(
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
    family: _Family,
    ids: Mapping[str, int | None],
) -> list[int]:
    """The ids that AutoTokenizer puts in front of a text: none, or one."""
    if family.add_bos is None:
        encoding = tokenizer.encode("a")
        marks = [*encoding.special_tokens_mask, 0]
        prefix: list[int] = encoding.ids[: marks.index(0)]
        suffix = any(marks[len(prefix) :])
    else:
        # These classes put their own post-processor in the place of tokenizer.json's.
        prefix, suffix = [], bool(settings.get("add_eos_token", False))
        if settings.get("add_bos_token", family.add_bos):
            prefix = _known(ids, "bos_token")
            if not prefix:
                raise CheckpointError(
                    "tokenizer_config.json asks for BOS in front of a text, but its bos_token is "
                    "not in tokenizer.json.",
                    "Set bos_token to the token's text, or add_bos_token to false.",
                )
    if suffix or len(prefix) > 1:
        raise CheckpointError(
            f"The tokenizer puts {'a token behind' if suffix else f'{prefix} in front of'} every "
            "text; only one token in front is supported.",
            "Set add_eos_token to false in tokenizer_config.json, or repair the post_processor in "
            "tokenizer.json.",
        )
    return prefix


def _ids(name: str, *sources: Mapping[str, Any]) -> list[int]:
    """Token ids, each source's id or list; -1 is an old way to write none."""
    values = [source[name] for source in sources if source.get(name) is not None]
    ids = [item for value in values for item in (value if isinstance(value, list) else [value])]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int):
            raise CheckpointError(
                f"{name} must be an id or a list of ids, got {item!r}.",
                "Repair generation_config.json and config.json.",
            )
    return [item for item in ids if item >= 0]


def _eos(
    tokenizer: Tokenizer, generation: Mapping[str, Any], config: Mapping[str, Any], own: list[int]
) -> tuple[int, ...]:
    """See :class:`TokenizerFiles`: fine-tunes often name the end of a turn in one file only."""
    configured = _ids("eos_token_id", config)
    stops = _ids("eos_token_id", generation) or configured
    added = tokenizer.get_added_tokens_decoder()
    return tuple(dict.fromkeys([*stops, *(item for item in [*configured, *own] if item in added)]))


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: files win over tokenizer_config.json, the processors' own file is last."""
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.name.removesuffix(".jinja"): path for path in more}
    files = {name: path for name, path in files.items() if path.is_file()}
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    stated = settings.get("chat_template")
    if stated is None and (folder / "chat_template.json").is_file():
        stated = read_json(folder / "chat_template.json").get("chat_template")
    if stated is None:
        return {}
    if isinstance(stated, str):
        return {"default": stated}
    if isinstance(stated, list) and all(isinstance(entry, dict) for entry in stated):
        stated = {entry.get("name"): entry.get("template") for entry in stated}
    if not isinstance(stated, dict) or not all(
        isinstance(item, str) for pair in stated.items() for item in pair
    ):
        raise CheckpointError(
            f"{folder}: chat_template must be a string or a list of names and templates, got "
            f"{type(stated).__name__}.",
            "Repair tokenizer_config.json.",
        )
    return dict(sorted(stated.items(), key=lambda pair: pair[0] != "default"))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", "Download it again.") from error
