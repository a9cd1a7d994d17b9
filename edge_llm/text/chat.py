"""Conversations to text and tokens, by a model's chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import isfunction, ismethod
from typing import Any

from edge_llm.errors import ArgumentError, ChatTemplateError
from edge_llm.text.masks import Masks
from edge_llm.text.tokenizer import Tokenizer
from edge_llm.text.tools import function_schema

__all__ = ["ChatTemplate", "Message", "Tool", "checked_options", "choose_template", "encode_chat"]

Message = Mapping[str, Any]
"""A `role`, its `content` (text, a list of parts, or None) and whatever else the template reads."""

Tool = Mapping[str, Any] | Callable[..., Any]
"""A function that the model may call: its JSON schema, or a Python function to take it from."""

_LONGEST_REASON = 500
# transformers' own mark, for some templates look for it (LFM2.5).
_END = "CONTINUE_FINAL_MESSAGE_TAG "
_GIVEN = ("messages", "tools", "add_generation_prompt", "continue_final_message")


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
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: At least one; each a mapping with a `role` and mostly a `content`.
            tools: Functions that the model may call.
            add_generation_prompt: Whether the text ends in the head of the model's answer; by
                default it does, unless the last message is to be continued.
            continue_final_message: Whether the text ends where the last message does, for the
                model to write on.
            **variables: What else the template reads, such as `enable_thinking` or `documents`.

        Raises:
            ArgumentError: Messages or tools have another form.
            ChatTemplateError: The template is broken, refuses this conversation, or does more
                work than one of this length can need.
        """
        # Here and not above: a model that only completes text does without jinja2's import time.
        from edge_llm.text import sandbox

        _check(messages)
        if add_generation_prompt and continue_final_message:
            raise ArgumentError(
                "add_generation_prompt", "left out where the final message is continued", True
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        schemas = _schemas(tools)
        end = _END if continue_final_message else ""
        given = {
            "documents": None,
            **self._variables,
            **variables,
            "messages": _ending_in(end, messages) if end else list(messages),
            "tools": schemas,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = sandbox.render(self.source, given)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            reason = str(error)[:_LONGEST_REASON] or type(error).__name__
            raise ChatTemplateError(f"The chat template refused this: {reason}") from error
        return _cut(text, end, messages[-1]) if end else text


def choose_template(
    templates: Mapping[str, str], name: str | None, *, tools: Sequence[Tool] | None = None
) -> str:
    """The template to render with, of several, as transformers chooses it.

    Args:
        templates: Sources by name.
        name: The one to take; by default "tool_use" where there are tools and such a template,
            and else "default".
        tools: The functions that the model may call.

    Raises:
        ChatTemplateError: There is no such template.
    """
    wanted = name
    if wanted is None:
        wanted = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if not isinstance(wanted, str) or wanted not in templates:
        known = ", ".join(sorted(templates))
        raise ChatTemplateError(
            f"The bundle has no chat template {wanted!r}.",
            f"It has: {known}." if known else "Use generate(): this is a base model.",
        )
    return templates[wanted]


def checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a template reads besides messages and tools, checked.

    Raises:
        ArgumentError: No mapping of names, or a name that is an argument of its own.
    """
    if options is None:
        return {}
    domain = f"a mapping from names to values, without {', '.join(_GIVEN)}"
    if not isinstance(options, Mapping) or not all(
        isinstance(name, str) and name not in _GIVEN for name in options
    ):
        raise ArgumentError("template_options", domain, options)
    return dict(options)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
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
        messages: As for `ChatTemplate.render`, like the next four.
        tools: See there.
        add_generation_prompt: See there.
        continue_final_message: See there.
        **variables: See there.

    Returns:
        Ids, with BOS only where the template writes it.

    Raises:
        ArgumentError: As for `ChatTemplate.render`; or a text holds a lone surrogate.
        ChatTemplateError: As for `ChatTemplate.render`.
    """
    from edge_llm.text.budget import weigh

    _check(messages)
    schemas = _schemas(tools)
    weigh([messages, schemas, variables])  # what is nested too deeply, or in itself, ends here
    masks = Masks(tokenizer, [template.source, messages, schemas, variables])
    text = template.render(
        [masks.message(message) for message in messages],
        tools=None if schemas is None else [masks.user(schema) for schema in schemas],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **{name: masks.user(value) for name, value in variables.items()},
    )
    ids, offsets = tokenizer.encode_with_offsets(text)
    if masks.restored(text) == text:
        return ids
    out: list[int] = []
    done = position = 0
    known = tokenizer.control_tokens
    controls = [
        i
        for i, id_ in enumerate(ids)
        if id_ in known and tokenizer.is_control(id_, text, offsets[i])
    ]
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


def _check(messages: Any) -> None:
    if not _listed(messages) or not all(isinstance(message, Mapping) for message in messages):
        raise ArgumentError("messages", "a list of mappings", messages)
    if not messages:
        raise ArgumentError("messages", "a list of at least one message", messages)
    for index, message in enumerate(messages):
        if not isinstance(role := message.get("role"), str):
            raise ArgumentError(f"messages[{index}]['role']", "a string", role)
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            domain = "a string, a list of parts, or None"
            raise ArgumentError(f"messages[{index}]['content']", domain, content)


def _schemas(tools: Any) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    if not _listed(tools):
        raise ArgumentError("tools", "a list of JSON schemas or functions", tools)
    schemas: list[Mapping[str, Any]] = []
    for index, tool in enumerate(tools):
        if isfunction(tool) or ismethod(tool):
            schemas.append(function_schema(tool))
        elif isinstance(tool, Mapping):
            schemas.append(tool)
        else:
            raise ArgumentError(f"tools[{index}]", "a JSON schema or a function", tool)
    return schemas


def _listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _ending_in(end: str, messages: Sequence[Message]) -> list[Message]:
    """The messages, the last one's last text with this at its end."""
    *others, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*others, {**last, "content": content + end}]
    parts = list(content or ())
    for index in reversed(range(len(parts))):
        if _is_text(parts[index]):
            parts[index] = {**parts[index], "text": parts[index]["text"] + end}
            return [*others, {**last, "content": parts}]
    raise ArgumentError(
        f"messages[{len(others)}]['content']", "text where it is to be continued", content
    )


def _last_text(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return next(str(part["text"]) for part in reversed(content) if _is_text(part))


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _cut(text: str, end: str, last: Message) -> str:
    """The rendered text up to the end of the last message's content."""
    at = text.rfind(end.strip())
    if at < 0 or _last_text(last).strip() not in text[:at]:
        raise ChatTemplateError(
            "The chat template leaves out the final message or a part of it, so it cannot be "
            "continued.",
            f"It is of the role {last['role']!r}; templates keep most of what an assistant wrote.",
        )
    # Where the template strips white space off a content, it does so here too.
    return text[:at] if text.startswith(end, at) else text[:at].rstrip()
