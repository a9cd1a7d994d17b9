"""The calls of an LLM that generate: each plain, and for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from edge_llm.options import ChatOptions, GenerateOptions
from edge_llm.results import Chunk, Completion
from edge_llm.text.chat import (
    ChatTemplate,
    Message,
    checked_options,
    choose_template,
    encode_chat,
)

if TYPE_CHECKING:
    from edge_llm.model import Model, Prompt

__all__ = ["Calls"]

_TEMPLATE = ("tools", "template", "template_options", "continue_final_message")


class Calls:
    """What can be asked of a model, whoever holds it.

    Every call may come from any thread, and at any time; as many as there are slots are computed
    together, and the others wait.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Answer a prompt.

        Args:
            prompt: Text, or tokens as they are. Empty text starts from BOS alone.
            options: See :class:`GenerateOptions`.

        Raises:
            ContextLengthError: Prompt and ``max_tokens`` do not fit into the context.
            ArgumentError: An argument is outside its domain.
            QueueFullError: As many requests wait as may.
            ClosedError: The model was closed.
        """
        return self._model.complete(self._model.prompt_tokens(prompt), options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """Answer a prompt piece by piece; closing the iterator ends the answer.

        Arguments and errors are those of :meth:`generate`; errors in arguments are raised by this
        call, not by the first ``next()``.
        """
        return self._model.stream(self._model.prompt_tokens(prompt), options)

    def chat(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Completion:
        """Answer the last message of a conversation.

        What the cache holds of the conversation is not computed again.

        Args:
            messages: ``{"role": ..., "content": ...}`` each. Text that looks like a special token
                stays text.
            options: See :class:`ChatOptions`.

        Raises:
            ChatTemplateError: The bundle has no such template, or it refuses the messages.
            ContextLengthError: As for :meth:`generate`, like the others.
        """
        return self._model.complete(*self._chat(messages, options))

    def stream_chat(
        self, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> Iterator[Chunk]:
        """Answer the last message of a conversation piece by piece; see :meth:`chat`."""
        return self._model.stream(*self._chat(messages, options))

    async def agenerate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """:meth:`generate` for asyncio; cancelling the task ends the answer."""
        return await self._model.acomplete(self._model.prompt_tokens(prompt), options)

    def astream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncIterator[Chunk]:
        """:meth:`stream` for asyncio; cancelling the task or closing the iterator ends the answer.

        A loop that is left early holds on to its iterator: ``contextlib.aclosing`` lets go of it.
        """
        return self._model.astream(self._model.prompt_tokens(prompt), options)

    async def achat(
        self, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> Completion:
        """:meth:`chat` for asyncio; cancelling the task ends the answer."""
        return await self._model.acomplete(*self._chat(messages, options))

    def astream_chat(
        self, messages: Sequence[Message], **options: Unpack[ChatOptions]
    ) -> AsyncIterator[Chunk]:
        """:meth:`stream_chat` for asyncio; see :meth:`astream`."""
        return self._model.astream(*self._chat(messages, options))

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        **options: Any,
    ) -> list[int]:
        """The tokens of a conversation, as :meth:`chat` feeds them.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether the answer's head stands at the end; by default where
                the last message is not to be continued.
            options: Those of :class:`ChatOptions` that tell how to render it.
        """
        tools = options.pop("tools", None)
        source = choose_template(self._model.templates, options.pop("template", None), tools=tools)
        continued = options.pop("continue_final_message", False)
        further = checked_options(options.pop("template_options", None))
        if options:
            raise TypeError(f"apply_chat_template() knows no {', '.join(sorted(options))}")
        special = self._model.manifest.chat.special_tokens
        return encode_chat(
            self._model.tokenizer,
            ChatTemplate(source, special_tokens=special),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continued,
            **further,
        )

    def _chat(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> tuple[NDArray[np.int64], GenerateOptions]:
        """The prompt of a conversation, and what is asked of its answer."""
        rendering = {name: options[name] for name in _TEMPLATE if name in options}  # type: ignore[literal-required]
        rest = {name: value for name, value in options.items() if name not in _TEMPLATE}
        tokens = self.apply_chat_template(messages, **rendering)
        return self._model.prompt_tokens(tokens), cast("GenerateOptions", rest)
