"""The model as a Python object."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self, Unpack

import numpy as np
from numpy.typing import NDArray

from edge_llm.builtin import BUNDLE, announce
from edge_llm.caching.offers import Snapshot
from edge_llm.caching.prefixes import common_length
from edge_llm.calls import Calls
from edge_llm.engine.scoring import Distributions
from edge_llm.engine.sessions import (
    Baking,
    LoadSession,
    SaveSession,
    read_session,
    write_session,
)
from edge_llm.engine.statistics import EngineStats
from edge_llm.errors import ArgumentError, ContextLengthError, SessionError
from edge_llm.manifest import Manifest
from edge_llm.memory import MemoryEstimate
from edge_llm.model import Model, Prompt
from edge_llm.options import ChatOptions, LoadOptions, integer
from edge_llm.results import Score
from edge_llm.text.chat import Message

__all__ = ["LLM"]


class LLM(Calls):
    """A language model, loaded from a bundle and ready to answer.

    Any number of threads may ask it at once. Close it, or use it in a ``with`` block::

        with LLM("smollm2-int4") as llm:
            print(llm.generate("Once upon a time", max_tokens=50).text)

    Args:
        path: A bundle's folder, or one that onnxruntime-genai, transformers.js or optimum runs.
        options: See :class:`~edge_llm.options.LoadOptions`.

    Warns:
        SlowKernelWarning: This CPU has no fast kernels for the weights; the text says what to do.

    Raises:
        BundleError: The folder is not a usable bundle (see its subclasses).
        ArgumentError: An argument is outside its domain.
        PlatformError: This machine cannot run the model.
        RuntimeFailure: ONNX Runtime refuses the graph.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> None:
        super().__init__(Model(path, options))

    @classmethod
    def builtin(cls, **options: Unpack[LoadOptions]) -> Self:
        """Load the embedded home-command model, which says once on stderr what it is.

        Ask it with :meth:`chat`: ``llm.chat([{"role": "user", "content": "dim the light"}])``.
        The options are those of the class.
        """
        announce()
        return cls(BUNDLE, **options)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._model.manifest

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._model.context

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._model.threads

    @property
    def slots(self) -> int:
        """Requests that are computed together."""
        return self._model.slots

    @property
    def load_seconds(self) -> float:
        """What loading took."""
        return self._model.load_seconds

    @property
    def memory(self) -> MemoryEstimate:
        """What the model takes when its slots are full, as it was loaded."""
        return self._model.memory

    def stats(self) -> EngineStats:
        """What the model is doing and has done: requests, tokens, speed, waiting, cache hits."""
        return self._model.engine.stats()

    def score(
        self,
        text: Prompt,
        *,
        cancel: threading.Event | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Score:
        """How likely the model finds a text.

        Args:
            text: Text, or tokens as they are.
            cancel: An event that ends the work when it is set.
            timeout: Seconds after which the work ends, waiting included.
            priority: As of an answer: where requests wait, a higher one comes first.

        Raises:
            ContextLengthError: The text does not fit into the context.
            DeadlineError: The time was up.
            CancelledError: ``cancel`` was set.
            QueueFullError: As many requests wait as may.
        """
        job = self._model.scoring(text, cancel=cancel, timeout=timeout, priority=priority)
        return job.score(self._model.execute(job))

    async def ascore(
        self,
        text: Prompt,
        *,
        cancel: threading.Event | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Score:
        """:meth:`score` for asyncio; cancelling the task ends the work."""
        job = self._model.scoring(text, cancel=cancel, timeout=timeout, priority=priority)
        return job.score(await self._model.aexecute(job))

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
        sequence = self._model.prompt_tokens(tokens, "tokens")
        if len(sequence) > self.context:
            raise ContextLengthError(len(sequence), 0, self.context)
        integer("last", last, 1, len(sequence))
        integer("continued", continued, 0, len(sequence) - last)
        found = self._model.execute(Distributions(sequence, last=last, continued=continued))
        assert isinstance(found, np.ndarray)
        return found

    def chat_prefix(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """The tokens that a conversation begins with whatever the user says behind these messages.

        Arguments and errors are those of :meth:`chat`; the result is for :meth:`bake`.
        """
        one, other = (
            self.apply_chat_template([*messages, {"role": "user", "content": text}], **options)
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
        prefixes = self._model.prefixes
        if prefixes is None or not prefixes.writes:
            raise ArgumentError("prefix_cache", "a folder to bake into", None)
        tokens = self._model.prompt_tokens(prefix, "prefix")
        if len(tokens) > self.context:
            raise ContextLengthError(len(tokens), 0, self.context)
        held = self._model.execute(Baking(tokens, progress=on_prompt))
        assert isinstance(held, Snapshot)
        entry = prefixes.bake(held)
        if entry is None:
            raise SessionError(
                f"Nothing was baked into {str(prefixes.path)!r}.",
                "Choose another folder, free some disk space, or raise prefix_cache_limit.",
            )
        return entry

    def save_session(self, path: str | os.PathLike[str]) -> int:
        """Write what is computed of the last conversation to a file.

        Another process, or this one after other requests, goes on from there with
        :meth:`load_session`. The messages are the caller's to keep. Other requests wait only while
        it is copied, not for the disk; while it is written, the copy takes as much memory again as
        it has in the cache. When this returns, it is on the disk.

        Args:
            path: The file, which is replaced. It holds the conversation's tokens in the clear.

        Returns:
            How many tokens were saved.

        Raises:
            SessionError: Nothing was computed yet, or it had to make room for other requests.
            ArgumentError: The model is another program's folder.
            OSError: The system refuses; what was there before is still there.
        """
        owner = self._model.owner
        held = self._model.execute(SaveSession())
        assert isinstance(held, Snapshot)
        write_session(Path(path), owner, held)
        return len(held.tokens)

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
        self._model.engine.check_usable()
        saved = read_session(Path(path), self._model.owner)
        self._model.execute(LoadSession(saved, path))
        return len(saved.tokens)

    def tokenize(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """The tokens of a text; BOS comes in front where the model wants it, or as asked for."""
        return self._model.tokenizer.encode(text, add_bos=add_bos)

    def detokenize(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of tokens."""
        return self._model.tokenizer.decode(tokens, skip_special=skip_special)

    def close(self) -> None:
        """End running requests with a ClosedError and free the model; may be called again.

        What computes is ended in the middle. A function of yours that a request is in
        (``logits_hook``, ``on_request``) is waited for, but for no more than 5 seconds: then all
        requests end without it, and the model is freed once it returns. A prompt that is being
        written to the prefix cache is written to its end.
        """
        self._model.finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<LLM {self.manifest.name!r} context={self.context} threads={self.threads} "
            f"slots={self.slots}{'' if self._model.finalizer.alive else ' closed'}>"
        )
