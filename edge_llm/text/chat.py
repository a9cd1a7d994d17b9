"""Conversations to text and tokens, by a model's chat template."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

from edge_llm.errors import ArgumentError, ChatTemplateError
from edge_llm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "Message", "encode_chat"]

Message = Mapping[str, Any]
"""A `role`, its `content` (text, a list of parts, or None) and whatever else the template reads."""


class ChatTemplate:
    """A Jinja chat template, rendered in a sandbox as transformers' `apply_chat_template` does.

    Args:
        source: The template's text.
        bos_token: What `bos_token` stands for in it; None leaves it undefined.
        eos_token: The same for `eos_token`.
        special_tokens: Further token strings by variable name (`pad_token`, ...).
    """

    __slots__ = ("_variables", "source")

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.source = source
        named = {"bos_token": bos_token, "eos_token": eos_token}
        self._variables = dict(special_tokens or {})
        self._variables.update({name: s for name, s in named.items() if s is not None})

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
                    "messages": messages,
                    "tools": tools,
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

    def _map(self, value: Any, mask: Callable[[str], str], name: str = "") -> Any:
        """Masks every string; roles, types and keys that are mere identifiers stay."""
        if isinstance(value, str):
            return value if name in ("role", "type") and value.isidentifier() else mask(value)
        if isinstance(value, Mapping):
            return {
                self._map(key, mask, "role"): self._map(item, mask, str(key))
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._map(item, mask) for item in value]
        return value

    def _control(self, text: str) -> str:
        starts = self._spellings.starts
        masked = "".join(self._stand_in(c) if _fold(c)[:1] in starts else c for c in text)
        return self._edges(masked, self._spellings.control)

    def _special(self, text: str) -> str:
        while spans := self._special_spans(text):
            for start, stop in spans:
                at = next((i for i in range(start, stop) if self._maskable(text[i])), None)
                if at is not None:
                    text = self._masked_at(text, at)
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
        sizes = range(1, self._spellings.longest)
        if any(f"{_fold(inner[:n])}\n\n" in spelled for n in sizes):
            text = self._masked_at(text, first)
        if any(f"\n\n{_fold(inner[-n:])}" in spelled for n in sizes):
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
