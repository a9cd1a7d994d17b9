"""The calls of an LLM that generate: each plain, and for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from edge_llm.batching import (
    BatchItem,
    BatchResult,
    Errors,
    OnPrompt,
    answer_all,
    is_conversation,
)
from edge_llm.engine.generation import Generation
from edge_llm.errors import EdgeLLMError
from edge_llm.options import ChatOptions, GenerateOptions, integer
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

    def batch(
        self,
        prompts: Iterable[Prompt | Sequence[Message] | BatchItem],
        *,
        ordered: bool = True,
        errors: Errors = "raise",
        on_progress: Callable[[int], object] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[BatchResult]:
        """Answer many prompts together, however many there are.

        As many as there are slots are computed at a time, and few more are read ahead: an endless
        iterator takes no more memory than a list of some hundreds. It is read on a thread of its
        own, so that it may wait: for other programs, or for the results of the prompts before.
        Closing the iterator of results ends what is under way.

        Args:
            prompts: Text, tokens or lists of messages, in any mixture; a
                :class:`~edge_llm.batching.BatchItem` is one of them with options of its own.
            ordered: Give the results in the order of the prompts; up to 64 for each slot wait for
                one before them that takes longer. False gives each as it comes.
            errors: "raise" ends the batch with the first error, in its prompt's place; "return"
                gives errors of edge_llm as results.
            on_progress: Called with the number of results so far, errors included, whenever there
                is one more; what it raises ends the batch.
            options: Of all answers; see :class:`ChatOptions`. ``timeout`` counts from the moment
                when a prompt is read ahead.
        """
        return answer_all(
            self._model.engine,
            (partial(self._batched, prompt, options) for prompt in prompts),
            slots=self._model.slots,
            ordered=ordered,
            errors=errors,
            on_progress=on_progress,
        )

    def samples(
        self, prompt: Prompt | Sequence[Message], n: int, **options: Unpack[ChatOptions]
    ) -> list[Completion]:
        """Several answers to one prompt, which is computed once.

        Args:
            prompt: Text, tokens or a list of messages.
            n: How many answers.
            options: See :class:`ChatOptions`. With a ``seed``, the answers are those of ``seed``,
                ``seed + 1`` and so on.

        Raises:
            ArgumentError: An argument is outside its domain, and so on as for :meth:`generate`.
        """
        count = integer("n", n, 1)
        assert count is not None
        seed = integer("seed", options.get("seed"), 0)

        def make(i: int) -> tuple[Generation, OnPrompt | None]:
            own: ChatOptions = options if seed is None else {**options, "seed": seed + i}
            return self._batched(prompt, own)

        results = answer_all(
            self._model.engine,
            (partial(make, i) for i in range(count)),
            slots=self._model.slots,
            ordered=True,
            errors="raise",
            on_progress=None,
        )
        return [one.completion for one in results if one.completion is not None]

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

    def _batched(
        self, prompt: Prompt | Sequence[Message] | BatchItem, options: ChatOptions
    ) -> tuple[Generation, OnPrompt | None]:
        """The job of one prompt of many, and who is told of the prompt's progress."""
        if isinstance(prompt, BatchItem):
            if isinstance(prompt.prompt, EdgeLLMError):
                raise prompt.prompt
            options = {**options, **prompt.options}
            prompt = prompt.prompt
        if is_conversation(prompt):
            tokens, answering = self._chat(cast("Sequence[Message]", prompt), options)
        else:
            tokens = self._model.prompt_tokens(cast("Prompt", prompt))
            answering = cast("GenerateOptions", options)
        generation = self._model.generation(tokens, answering, stream=False)
        return generation, answering.get("on_prompt")

    def _chat(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> tuple[NDArray[np.int64], GenerateOptions]:
        """The prompt of a conversation, and what is asked of its answer."""
        rendering = {name: options[name] for name in _TEMPLATE if name in options}  # type: ignore[literal-required]
        rest = {name: value for name, value in options.items() if name not in _TEMPLATE}
        tokens = self.apply_chat_template(messages, **rendering)
        return self._model.prompt_tokens(tokens), cast("GenerateOptions", rest)
