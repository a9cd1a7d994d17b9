"""Conversations to text and tokens, by a model's chat template."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

from edge_llm.errors import ArgumentError, ChatTemplateError
from edge_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "Message", "encode_chat"]

_NAMES = ("role", "type")

Message = Mapping[str, Any]
"""A `role`, its `content` (text, a list of parts, or None) and whatever else the template reads."""


class ChatTemplate:
    """A Jinja chat template, rendered in a sandbox as transformers' `apply_chat_template` does.

    Args:
        source: The template's text.
        special_tokens: Token strings by the variable that stands for them (`bos_token`, ...).
    """

    __slots__ = ("_variables", "source")

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._variables = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: At least one; each a mapping with a `role` and mostly a `content`.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: Whether the text ends in the head of the model's answer.
            **variables: What else the template reads, such as `enable_thinking` or `documents`.

        Raises:
            ArgumentError: Messages or tools have another form.
            ChatTemplateError: The template is broken, or refuses this conversation.
        """
        _check(messages, tools)
        try:
            return _compiled(self.source).render(
                **{
                    "documents": None,
                    **self._variables,
                    **variables,
                    "messages": list(messages),
                    "tools": None if tools is None else list(tools),
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise ChatTemplateError(f"The chat template refused this: {error}") from error


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """The tokens of a conversation, in which what people wrote can never act as a control token.

    Text in messages, tools and variables that spells a control token stays text. In messages of
    the role "assistant" this holds for special tokens only: templates look there for the model's
    own marks, such as `</think>`, and they must come back as the tokens that they were.

    Where a control token could begin, a stand-in takes the character's place while the template
    is rendered. Sections of the result that hold stand-ins get their characters back and are
    encoded as plain text.

    Args:
        tokenizer: The model's tokenizer.
        template: The model's chat template.
        messages: As for `ChatTemplate.render`, like the next three.
        tools: See there.
        add_generation_prompt: See there.
        **variables: See there.

    Returns:
        Ids, with BOS only where the template writes it.

    Raises:
        ArgumentError: As for `ChatTemplate.render`; or a text holds a lone surrogate.
        ChatTemplateError: As for `ChatTemplate.render`.
    """
    _check(messages, tools)
    masks = _Masks(tokenizer, [template.source, messages, tools, variables])
    text = template.render(
        [masks.message(message) for message in messages],
        tools=None if tools is None else [masks.user(tool) for tool in tools],
        add_generation_prompt=add_generation_prompt,
        **{name: masks.user(value) for name, value in variables.items()},
    )
    ids, offsets = tokenizer.encode_with_offsets(text)
    if masks.restored(text) == text:
        return ids
    out: list[int] = []
    done = position = 0
    controls = [i for i, id_ in enumerate(ids) if tokenizer.is_control(id_, text, offsets[i])]
    for index in [*controls, len(ids)]:
        start, stop = offsets[index] if index < len(ids) else (len(text), len(text))
        section = text[position:start]
        restored = masks.restored(section)
        if restored == section:
            out += ids[done:index]
        else:
            out += tokenizer.encode_literal(restored, add_bos=False, continues=position > 0)
        out += ids[index : index + 1]
        done, position = index + 1, stop
    return out


def _check(messages: Any, tools: Any) -> None:
    for name, values in (("messages", messages), ("tools", tools)):
        if name == "tools" and values is None:
            continue
        listed = isinstance(values, Sequence) and not isinstance(values, str)
        if not listed or not all(isinstance(value, Mapping) for value in values):
            raise ArgumentError(name, "a list of mappings", values)
    if not messages:
        raise ArgumentError("messages", "a list of at least one message", messages)
    for index, message in enumerate(messages):
        if not isinstance(role := message.get("role"), str):
            raise ArgumentError(f"messages[{index}]['role']", "a string", role)
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            domain = "a string, a list of parts, or None"
            raise ArgumentError(f"messages[{index}]['content']", domain, content)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"The chat template is no Jinja template: {error}.") from error


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """The sandbox, with the filters and globals that transformers gives to templates.

    Source: transformers.utils.chat_template_utils, `_compile_jinja_template`.
    """
    # Here and not above: a model that only completes text does without jinja2's import time.
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what a model wrote, for training; here it only groups."""

        tags = {"generation"}  # noqa: RUF012 - the attribute that jinja2 reads

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Masks:
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

    def message(self, message: Message) -> Any:
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
        return [
            span
            for id_, span in zip(ids, offsets, strict=True)
            if self._tokenizer.is_control(id_, text, span)
            and self._tokenizer.control_tokens[id_].special
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
