"""The model as a Python object."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from edge_llm.builtin import BUNDLE, announce
from edge_llm.bundle import Bundle
from edge_llm.caching.prefixes import LIMIT, PrefixCache, common_length
from edge_llm.compiled import compiled_graph
from edge_llm.decoding.sampling import Sampling
from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.engine.drafting import Drafting
from edge_llm.engine.generation import Generation, PromptProgress
from edge_llm.engine.scheduler import Engine
from edge_llm.engine.scoring import Distributions, ScoreEnd, Scoring
from edge_llm.engine.sessions import Baking, LoadSession, SaveSession
from edge_llm.engine.slot import Slot
from edge_llm.engine.step_costs import StepCosts
from edge_llm.errors import (
    ArgumentError,
    CancelledError,
    ContextLengthError,
    DeadlineError,
    ManifestError,
    SessionError,
    SlowKernelWarning,
)
from edge_llm.manifest import Manifest
from edge_llm.memory import MemoryEstimate, estimate_memory, fitting_context, parse_bytes
from edge_llm.options import (
    GenerateOptions,
    build_request,
    cancel_event,
    integer,
    seconds,
)
from edge_llm.results import Chunk, Completion, Score
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.device import release_memory
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import open_session, resolve_threads
from edge_llm.states import open_prefixes, state_owner
from edge_llm.text.chat import (
    ChatTemplate,
    Message,
    Tool,
    checked_options,
    choose_template,
    encode_chat,
)
from edge_llm.text.tokenizer import Tokenizer

__all__ = ["LLM"]

DEFAULT_CONTEXT = 4096

Prompt = str | Sequence[int]


class LLM:
    """A language model, loaded from a bundle and ready to answer.

    Requests of several threads are served in turn. Close it, or use it in a ``with`` block::

        with LLM("smollm2-int4") as llm:
            print(llm.generate("Once upon a time", max_tokens=50).text)

    Args:
        path: A bundle's folder, or one that onnxruntime-genai, transformers.js or optimum runs.
        variant: Which graph of a transformers.js or optimum folder, by the end of its file's name
            ("q4", "int8", "fp32"); by default the fastest on a CPU.
        context: Most tokens of prompt and answer together; by default what was exported, but at
            most 4,096. The key/value cache is allocated for it.
        threads: Threads to compute with; by default one per core that this process may use.
        prefill_chunk: Tokens of a prompt to feed at once; by default as many as take about 150 ms.
        cache_dir: Compile the weights into this folder (see :mod:`edge_llm.compiled`), which later
            processes then map. Without it nothing is written; what ``edge-llm compile`` has
            compiled is used all the same.
        prefix_cache: Keep the beginnings of prompts in this folder, in the clear, and take what is
            there in place of computing it (see :meth:`bake`). Without it nothing is written, and
            what ``edge-llm bake`` has put into this user's cache folder is used.
        prefix_cache_limit: Most bytes of that folder, or text such as "2GB"; what was used least
            recently goes. By default 1 GiB.
        memory_limit: Most bytes, or text such as "512MB", that a process with nothing but this
            model may have resident (see :class:`~edge_llm.memory.MemoryEstimate`). Without
            ``context``, the longest that fits is taken.
        verify: Compare every file's SHA-256 first.

    Attributes:
        manifest: What the bundle says about itself.
        context: Most tokens of prompt and answer together.
        threads: Threads that compute.
        load_seconds: What loading took.

    Warns:
        SlowKernelWarning: This CPU has no fast kernels for the weights; the text says what to do.

    Raises:
        BundleError: The folder is not a usable bundle (see its subclasses).
        ArgumentError: An argument is outside its domain.
        PlatformError: This machine cannot run the model.
        RuntimeFailure: ONNX Runtime refuses the graph.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        context: int | None = None,
        threads: int | None = None,
        prefill_chunk: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        prefix_cache: str | os.PathLike[str] | None = None,
        prefix_cache_limit: int | str = LIMIT,
        memory_limit: int | str | None = None,
        verify: bool = False,
    ) -> None:
        started = time.perf_counter()
        self._bundle = bundle = Bundle.open(path, variant=variant, verify=verify)
        # Nobody can export the embedded model again, and it is small.
        if bundle.slow and bundle.path != BUNDLE:
            warnings.warn(bundle.slow, SlowKernelWarning, stacklevel=2)
        self.manifest: Manifest = bundle.manifest
        dims, tokens = self.manifest.dims, self.manifest.tokens
        wanted = integer("context", context, 2, dims.context)
        self.context: int = wanted or min(dims.context, DEFAULT_CONTEXT)
        self._fixed_chunk = integer("prefill_chunk", prefill_chunk, 1, self.context)
        self.threads: int = resolve_threads(threads)
        self._prefixes = open_prefixes(
            bundle, prefix_cache, limit=parse_bytes("prefix_cache_limit", prefix_cache_limit)
        )
        self._compiled = compiled_graph(
            bundle, cache_dir=cache_dir, threads=self.threads, verify=verify
        )
        if memory_limit is not None:
            self.context = fitting_context(
                bundle,
                longest=self.context,
                shortest=wanted or 2,
                limit=parse_bytes("memory_limit", memory_limit),
                compiled=self._compiled,
                prefill_chunk=self._fixed_chunk,
            )
        try:
            self._defaults = Sampling.from_dict(self.manifest.sampling)
        except ArgumentError as error:
            raise ManifestError(f"sampling: {error.message}", "Export the bundle again.") from error
        self._tokenizer = Tokenizer.from_file(
            bundle.file(self.manifest.tokenizer),
            bos=tokens.bos,
            eos=tokens.eos,
            add_bos=tokens.add_bos,
            vocab=dims.vocab,
        )
        self._templates = {
            name: bundle.read_text(file) for name, file in self.manifest.chat.templates.items()
        }
        release_memory()  # reading a tokenizer frees nearly as much as it keeps
        session = open_session(
            bundle.file(self.manifest.decoder.graph),
            compiled=self._compiled,
            threads=self.threads,
            minimum=self.manifest.min_onnxruntime,
        )
        decoder = open_decoder(session, self.manifest, capacity=self.context)
        single = _single_token(decoder)
        planner = ChunkPlanner(fixed=self._fixed_chunk, widest=decoder.widest, single_token=single)
        self._drafting = Drafting(StepCosts(single=single), possible=decoder.verifies)
        self._engine = Engine(decoder, Slot(decoder, planner, self._prefixes))
        # Runs when the object goes, and at exit: the engine's thread must not outlive Python.
        self._finalizer = weakref.finalize(self, _close, self._engine, self._prefixes)
        self.load_seconds: float = time.perf_counter() - started

    @classmethod
    def builtin(
        cls,
        *,
        context: int | None = None,
        threads: int | None = None,
        prefill_chunk: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        prefix_cache: str | os.PathLike[str] | None = None,
        prefix_cache_limit: int | str = LIMIT,
        memory_limit: int | str | None = None,
        verify: bool = False,
    ) -> Self:
        """Load the embedded home-command model, which says once on stderr what it is.

        Ask it with :meth:`chat`: ``llm.chat([{"role": "user", "content": "dim the light"}])``.
        The arguments are those of the class.
        """
        announce()
        return cls(
            BUNDLE,
            context=context,
            threads=threads,
            prefill_chunk=prefill_chunk,
            cache_dir=cache_dir,
            prefix_cache=prefix_cache,
            prefix_cache_limit=prefix_cache_limit,
            memory_limit=memory_limit,
            verify=verify,
        )

    @functools.cached_property
    def memory(self) -> MemoryEstimate:
        """What the model takes when its context is full, as it was loaded."""
        return estimate_memory(
            self._bundle,
            context=self.context,
            compiled=self._compiled,
            prefill_chunk=self._fixed_chunk,
        )

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Answer a prompt.

        Args:
            prompt: Text, or tokens as they are. Empty text starts from BOS alone.
            options: See :class:`GenerateOptions`.

        Raises:
            ContextLengthError: Prompt and ``max_tokens`` do not fit into the context.
            ArgumentError: An argument is outside its domain.
            ClosedError: The model was closed.
        """
        return self._complete(self._prompt_tokens(prompt), options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """Answer a prompt piece by piece; closing the iterator ends the answer.

        Arguments and errors are those of :meth:`generate`; errors in arguments are raised by this
        call, not by the first ``next()``.
        """
        return self._stream(self._prompt_tokens(prompt), options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Answer the last message of a conversation.

        What the cache holds of the conversation is not computed again.

        Args:
            messages: ``{"role": ..., "content": ...}`` each. Text that looks like a special token
                stays text.
            tools: Functions that the model may call, for templates that know tools: JSON schemas,
                or Python functions with type hints and a docstring in Google's style.
            template: Name of the chat template; by default "tool_use" where there are tools and a
                template of that name, and else "default".
            template_options: What else the template reads: ``{"enable_thinking": False}``.
            continue_final_message: Write on from the end of the last message.
            options: See :class:`GenerateOptions`.

        Raises:
            ChatTemplateError: The bundle has no such template, or it refuses the messages.
        """
        tokens = self.apply_chat_template(
            messages,
            tools=tools,
            template=template,
            template_options=template_options,
            continue_final_message=continue_final_message,
        )
        return self._complete(self._prompt_tokens(tokens), options)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Chunk]:
        """Answer the last message of a conversation piece by piece; see :meth:`chat`."""
        tokens = self.apply_chat_template(
            messages,
            tools=tools,
            template=template,
            template_options=template_options,
            continue_final_message=continue_final_message,
        )
        return self._stream(self._prompt_tokens(tokens), options)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The tokens of a conversation, as :meth:`chat` feeds them."""
        source = choose_template(self._templates, template, tools=tools)
        return encode_chat(
            self._tokenizer,
            ChatTemplate(source, special_tokens=self.manifest.chat.special_tokens),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **checked_options(template_options),
        )

    def score(
        self,
        text: Prompt,
        *,
        cancel: threading.Event | None = None,
        timeout: float | None = None,
    ) -> Score:
        """How likely the model finds a text.

        Args:
            text: Text, or tokens as they are.
            cancel: An event that ends the work when it is set.
            timeout: Seconds after which the work ends.

        Raises:
            ContextLengthError: The text does not fit into the context.
            DeadlineError: The time was up.
            CancelledError: ``cancel`` was set.
        """
        tokens = self._prompt_tokens(text, "text")
        if len(tokens) > self.context:
            raise ContextLengthError(len(tokens), 0, self.context)
        job = Scoring(
            tokens,
            vocab=self.manifest.dims.vocab,
            cancel=cancel_event(cancel),
            timeout=seconds("timeout", timeout),
        )
        (end,) = self._engine.execute(job)
        assert isinstance(end, ScoreEnd)
        if end.reason == "timeout":
            raise DeadlineError(f"Scoring took longer than {timeout} seconds.", "Allow it more.")
        if end.reason is not None:
            raise CancelledError("Scoring was cancelled.")
        return Score(tokens=tuple(tokens.tolist()), logprobs=tuple(end.logprobs.tolist()))

    def logits(
        self, tokens: Sequence[int] | NDArray[np.int64], *, last: int = 1, continued: int = 0
    ) -> NDArray[np.float32]:
        """The model's own distributions over what follows each of a sequence's last tokens.

        Args:
            tokens: The whole sequence.
            last: How many of its last tokens to give logits for; each takes 4 bytes per token of
                the vocabulary.
            continued: Length of the leading part that the call before this one was given: asked for
                piece by piece, a long sequence is computed once. The result does not hang on it.

        Returns:
            float32 [last, vocab].

        Raises:
            ContextLengthError: The sequence does not fit into the context.
            ArgumentError: An argument is outside its domain.
        """
        sequence = self._prompt_tokens(tokens, "tokens")
        if len(sequence) > self.context:
            raise ContextLengthError(len(sequence), 0, self.context)
        integer("last", last, 1, len(sequence))
        integer("continued", continued, 0, len(sequence) - last)
        (found,) = self._engine.execute(Distributions(sequence, last=last, continued=continued))
        assert isinstance(found, np.ndarray)
        return found

    def chat_prefix(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens that a conversation begins with whatever the user says behind these messages.

        Arguments and errors are those of :meth:`chat`; the result is for :meth:`bake`.
        """
        one, other = (
            self.apply_chat_template(
                [*messages, {"role": "user", "content": text}],
                tools=tools,
                template=template,
                template_options=template_options,
            )
            for text in ("Zebra", "7")
        )
        return one[: common_length(np.array(one), np.array(other))]

    def bake(self, prefix: Prompt, *, on_prompt: Callable[[int, int], None] | None = None) -> Path:
        """Compute what prompts will begin with, and write it to the prefix cache to last.

        Args:
            prefix: Text, or tokens as :meth:`chat_prefix` gives them. Text is cut into tokens as if
                nothing came behind it, so it should end where a word does.
            on_prompt: Called with the tokens done and in all, before each chunk.

        Returns:
            The file, of which there is one whatever was baked how often.

        Raises:
            ArgumentError: The model was loaded without ``prefix_cache``.
            ContextLengthError: The prefix does not fit into the context.
            SessionError: The folder cannot be written, or its limit is too low.
        """
        if self._prefixes is None or not self._prefixes.writes:
            raise ArgumentError("prefix_cache", "a folder to bake into", None)
        tokens = self._prompt_tokens(prefix, "prefix")
        if len(tokens) > self.context:
            raise ContextLengthError(len(tokens), 0, self.context)
        (entry,) = self._engine.execute(Baking(tokens, progress=on_prompt))
        if entry is None:
            raise SessionError(
                f"Nothing was baked into {str(self._prefixes.path)!r}.",
                "Choose another folder, free some disk space, or raise prefix_cache_limit.",
            )
        assert isinstance(entry, Path)
        return entry

    def save_session(self, path: str | os.PathLike[str]) -> int:
        """Write what is computed of the last conversation to a file.

        Another process, or this one after other requests, goes on from there with
        :meth:`load_session`. The messages are the caller's to keep.

        Args:
            path: The file, which is replaced. It holds the conversation's tokens in the clear.

        Returns:
            How many tokens were saved.

        Raises:
            SessionError: Nothing was computed yet.
            ArgumentError: The model is another program's folder.
            OSError: The system refuses; what was there before is still there.
        """
        (count,) = self._engine.execute(SaveSession(Path(path), self._owner))
        return cast(int, count)

    def load_session(self, path: str | os.PathLike[str]) -> int:
        """Take up a conversation that :meth:`save_session` wrote, so that none of it is computed.

        Args:
            path: The file.

        Returns:
            How many tokens it has.

        Raises:
            SessionError: The file is damaged, or belongs to another model, version of onnxruntime
                or processor, or to a longer context. Nothing has changed then.
            ArgumentError: The model is another program's folder.
            OSError: The file cannot be read.
        """
        (count,) = self._engine.execute(LoadSession(Path(path), self._owner))
        return cast(int, count)

    def tokenize(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """The tokens of a text; BOS comes in front where the model wants it, or as asked for."""
        return self._tokenizer.encode(text, add_bos=add_bos)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(tokens, skip_special=skip_special)

    def close(self) -> None:
        """End running requests and free the model; may be called again."""
        self._finalizer()

    @functools.cached_property
    def _owner(self) -> str:
        return state_owner(self._bundle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<LLM {self.manifest.name!r} context={self.context} threads={self.threads}"
            f"{'' if self._finalizer.alive else ' closed'}>"
        )

    def _prompt_tokens(
        self, prompt: Prompt | NDArray[np.int64], name: str = "prompt"
    ) -> NDArray[np.int64]:
        """The tokens of an argument that is text or tokens; ``name`` is the argument's."""
        tokens: object = prompt
        if isinstance(prompt, str):
            tokens = self._tokenizer.encode(prompt)
            bos = self.manifest.tokens.bos
            if not tokens and bos is None:
                raise ArgumentError(name, "at least one token", prompt, "There is no BOS token.")
            tokens = tokens or [bos]
        vocab = self.manifest.dims.vocab
        domain = f"text, or a sequence of at least one integer from 0 to {vocab - 1}"
        try:
            array = np.asarray(tokens)
        except ValueError as error:  # rows of different lengths
            raise ArgumentError(name, domain, prompt) from error
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise ArgumentError(name, domain, prompt)
        if array.min() < 0 or array.max() >= vocab:
            raise ArgumentError(name, domain, prompt)
        return array.astype(np.int64)

    def _generation(
        self, prompt: NDArray[np.int64], options: GenerateOptions, *, stream: bool
    ) -> Generation:
        self._engine.check_usable()
        request = build_request(
            prompt,
            options,
            defaults=self._defaults,
            eos=self.manifest.tokens.eos,
            vocab=self.manifest.dims.vocab,
            context=self.context,
            stream=stream,
        )
        return Generation(
            request,
            self._tokenizer,
            vocab=self.manifest.dims.vocab,
            drafting=self._drafting,
            load_seconds=self.load_seconds,
        )

    def _complete(self, prompt: NDArray[np.int64], options: GenerateOptions) -> Completion:
        generation = self._generation(prompt, options, stream=False)
        (chunk,) = self._chunks(generation, options.get("on_prompt"))
        assert chunk.finish_reason is not None
        assert chunk.usage is not None
        assert chunk.timings is not None
        return Completion(
            text=chunk.text,
            tokens=chunk.tokens,
            finish_reason=chunk.finish_reason,
            usage=chunk.usage,
            timings=chunk.timings,
            logprobs=chunk.logprobs,
        )

    def _stream(self, prompt: NDArray[np.int64], options: GenerateOptions) -> Iterator[Chunk]:
        generation = self._generation(prompt, options, stream=True)
        return self._chunks(generation, options.get("on_prompt"))

    def _chunks(
        self, generation: Generation, on_prompt: Callable[[int, int], None] | None
    ) -> Iterator[Chunk]:
        with contextlib.closing(self._engine.execute(generation)) as results:
            for result in results:
                if isinstance(result, PromptProgress):
                    assert on_prompt is not None
                    on_prompt(result.done, result.total)
                elif chunk := generation.chunk(result):
                    yield chunk


def _close(engine: Engine, prefixes: PrefixCache | None) -> None:
    engine.close()
    if prefixes is not None:
        prefixes.flush()


def _single_token(decoder: Decoder) -> float:
    """Seconds of a step of one token; also makes the first request as fast as later ones."""
    for _ in range(2):  # the first brings the weights into memory
        started = time.perf_counter()
        decoder.step([0], scored=1)
        elapsed = time.perf_counter() - started
        decoder.cache.truncate(0, 0)
    return elapsed
