"""A loaded model and what is asked of it, in tokens."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import time
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_llm.builtin import BUNDLE
from edge_llm.bundle import Bundle
from edge_llm.caching.prefixes import LIMIT, PrefixCache
from edge_llm.compiled import compiled_graph
from edge_llm.decoding.sampling import Sampling
from edge_llm.engine.chunking import ChunkPlanner
from edge_llm.engine.drafting import Drafting
from edge_llm.engine.generation import Generation, PromptProgress
from edge_llm.engine.job import Job
from edge_llm.engine.scheduler import Engine
from edge_llm.engine.scoring import Scoring
from edge_llm.engine.slots import Slots
from edge_llm.engine.step_costs import StepCosts
from edge_llm.engine.stepper import Stepper
from edge_llm.errors import ArgumentError, ContextLengthError, ManifestError, SlowKernelWarning
from edge_llm.memory import MemoryEstimate, parse_bytes
from edge_llm.options import (
    GenerateOptions,
    LoadOptions,
    build_request,
    cancel_event,
    check_names,
    folder,
    integer,
    priority_level,
    seconds,
)
from edge_llm.results import Chunk, Completion, RequestReport
from edge_llm.runtime.decoder import Decoder
from edge_llm.runtime.device import release_memory
from edge_llm.runtime.layouts import open_decoder
from edge_llm.runtime.session import open_session, resolve_threads
from edge_llm.sizes import Sizes
from edge_llm.states import open_prefixes, state_owner
from edge_llm.text.tokenizer import Tokenizer
from edge_llm.tuning import Tuning, find_tuning

__all__ = ["Model", "Prompt"]

Prompt = str | Sequence[int]

QUEUE_LIMIT = 256


class Model:
    """A bundle's tokenizer and engine, opened.

    Args:
        path: The bundle's folder.
        options: How to load it.

    Attributes:
        bundle: The files.
        context: Most tokens of prompt and answer together.
        threads: Threads that compute.
        tuning: How to run it here: what ``edge-llm tune`` has found, or the defaults.
        slots: Sequences that are answered at once.
        tokenizer: Makes tokens of text, and text of tokens.
        prefixes: Where the beginnings of prompts are kept, if anywhere.
        drafting: Chooses the length of drafts.
        templates: Sources of the chat templates, by name.
        engine: Owns the decoder.
        load_seconds: What loading took.
    """

    def __init__(self, path: str | os.PathLike[str], options: LoadOptions) -> None:
        started = time.perf_counter()
        check_names(options, LoadOptions)
        verify = options.get("verify", False)
        self.bundle = bundle = Bundle.open(path, variant=options.get("variant"), verify=verify)
        # Nobody can export the embedded model again, and it is small.
        if bundle.slow and bundle.path != BUNDLE:
            warnings.warn(bundle.slow, SlowKernelWarning, stacklevel=3)  # whoever called LLM(...)
        self.manifest = manifest = bundle.manifest
        cache_dir = folder("cache_dir", options.get("cache_dir"))
        self.tuning = tuning = _tuning(bundle, options.get("threads"), cache_dir)
        self.threads = tuning.threads
        queue_limit = integer("queue_limit", options.get("queue_limit", QUEUE_LIMIT), 1)
        assert queue_limit is not None
        on_request = options.get("on_request")
        if on_request is not None and not callable(on_request):
            raise ArgumentError("on_request", "a function", on_request)
        self.prefixes = open_prefixes(
            bundle,
            folder("prefix_cache", options.get("prefix_cache")),
            limit=parse_bytes("prefix_cache_limit", options.get("prefix_cache_limit", LIMIT)),
        )
        self._sizes = sizes = Sizes(bundle, options, widest=tuning.prefill_chunk)
        self.context, self.slots = sizes.context, sizes.slots
        try:
            self._defaults = Sampling.from_dict(manifest.sampling)
        except ArgumentError as error:
            raise ManifestError(f"sampling: {error.message}", "Export the bundle again.") from error
        self.templates = {
            name: bundle.read_text(file) for name, file in manifest.chat.templates.items()
        }
        self._compiled = None
        if tuning.compiled:  # this may be much work, so whatever may be wrong was told before
            self._compiled = compiled_graph(
                bundle, cache_dir=cache_dir, threads=self.threads, verify=verify
            )
        # Each takes one core, and a large vocabulary about as long as packing weights.
        with ThreadPoolExecutor(1, "edge_llm-tokenizer") as beside:
            reading = beside.submit(self._read_tokenizer)
            decoder = self._open_decoder()
            self.tokenizer = reading.result()
        release_memory()  # reading a tokenizer frees nearly as much as it keeps
        self.engine = self._make_engine(decoder, queue_limit, on_request)
        # Runs when the object goes, and at exit: the engine's thread must not outlive Python.
        self.finalizer = weakref.finalize(self, _close, self.engine, self.prefixes)
        self.load_seconds = time.perf_counter() - started

    @functools.cached_property
    def owner(self) -> str:
        """What tells this model's saved states from others'.

        Raises:
            ArgumentError: The model is another program's folder.
        """
        return state_owner(self.bundle)

    @property
    def memory(self) -> MemoryEstimate:
        """What the model takes when its slots are full, as it was loaded."""
        return self._sizes.memory(self._compiled)

    def prompt_tokens(
        self, prompt: Prompt | NDArray[np.int64], name: str = "prompt"
    ) -> NDArray[np.int64]:
        """The tokens of an argument that is text or tokens, int64 [tokens].

        Args:
            prompt: Text, or tokens as they are.
            name: The argument's name.

        Raises:
            ArgumentError: It is neither, or there is no token.
        """
        tokens: object = prompt
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
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

    def generation(
        self, prompt: NDArray[np.int64], options: GenerateOptions, *, stream: bool
    ) -> Generation:
        """The job that answers a prompt.

        Raises:
            ContextLengthError: Prompt and answer do not fit into the context.
            ArgumentError: An option is unknown, or outside its domain.
            ClosedError: The model was closed.
        """
        self.engine.check_usable()
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
            self.tokenizer,
            vocab=self.manifest.dims.vocab,
            drafting=self.drafting,
            load_seconds=self.load_seconds,
        )

    def scoring(
        self, text: Prompt, *, cancel: threading.Event | None, timeout: float | None, priority: int
    ) -> Scoring:
        """The job that scores a text.

        Raises:
            ContextLengthError: The text does not fit into the context.
            ArgumentError: An argument is outside its domain.
        """
        tokens = self.prompt_tokens(text, "text")
        if len(tokens) > self.context:
            raise ContextLengthError(len(tokens), 0, self.context)
        return Scoring(
            tokens,
            vocab=self.manifest.dims.vocab,
            cancel=cancel_event(cancel),
            timeout=seconds("timeout", timeout),
            priority=priority_level(priority),
        )

    def complete(self, prompt: NDArray[np.int64], options: GenerateOptions) -> Completion:
        """Answer a prompt."""
        (chunk,) = self._chunks(self.generation(prompt, options, stream=False), options)
        return Completion.of(chunk)

    def stream(self, prompt: NDArray[np.int64], options: GenerateOptions) -> Iterator[Chunk]:
        """Answer a prompt piece by piece; the arguments are checked by this call."""
        return self._chunks(self.generation(prompt, options, stream=True), options)

    async def acomplete(self, prompt: NDArray[np.int64], options: GenerateOptions) -> Completion:
        """Answer a prompt while the event loop goes on."""
        generation = self.generation(prompt, options, stream=False)
        (chunk,) = [chunk async for chunk in self._achunks(generation, options)]
        return Completion.of(chunk)

    def astream(self, prompt: NDArray[np.int64], options: GenerateOptions) -> AsyncIterator[Chunk]:
        """Answer a prompt piece by piece; the arguments are checked by this call."""
        return self._achunks(self.generation(prompt, options, stream=True), options)

    def execute(self, job: Job) -> object:
        """The one result of a job."""
        (result,) = self.engine.execute(job)
        return result

    async def aexecute(self, job: Job) -> object:
        """The one result of a job."""
        (result,) = [result async for result in _aresults(self.engine, job)]
        return result

    def _chunks(self, generation: Generation, options: GenerateOptions) -> Iterator[Chunk]:
        with contextlib.closing(self.engine.execute(generation)) as results:
            for result in results:
                if chunk := _chunk(generation, result, options):
                    yield chunk

    async def _achunks(
        self, generation: Generation, options: GenerateOptions
    ) -> AsyncIterator[Chunk]:
        async with contextlib.aclosing(_aresults(self.engine, generation)) as results:
            async for result in results:
                if chunk := _chunk(generation, result, options):
                    yield chunk

    def _read_tokenizer(self) -> Tokenizer:
        manifest = self.manifest
        return Tokenizer.from_file(
            self.bundle.file(manifest.tokenizer),
            bos=manifest.tokens.bos,
            eos=manifest.tokens.eos,
            add_bos=manifest.tokens.add_bos,
            vocab=manifest.dims.vocab,
        )

    def _open_decoder(self) -> Decoder:
        manifest, tuning = self.manifest, self.tuning
        session = open_session(
            self.bundle.file(manifest.decoder.graph),
            compiled=self._compiled,
            threads=self.threads,
            minimum=manifest.min_onnxruntime,
            spin=tuning.spin,
            affinities=tuning.affinities,
        )
        return open_decoder(session, manifest, capacity=self.context, rows=self.slots)

    def _make_engine(
        self,
        decoder: Decoder,
        queue_limit: int,
        on_request: Callable[[RequestReport], object] | None,
    ) -> Engine:
        """The engine on a graph that was just opened, and what chooses its drafts."""
        manifest, tuning = self.manifest, self.tuning
        single = _single_token(decoder)
        planner = ChunkPlanner(
            fixed=self._sizes.prefill_chunk,
            widest=min(decoder.widest, tuning.prefill_chunk or decoder.widest),
            single_token=single,
        )
        self.drafting = Drafting(
            StepCosts(single=single, curve=tuning.step_costs),
            possible=decoder.verifies,
            vocab=manifest.dims.vocab,
        )
        return Engine(
            decoder,
            Stepper(decoder, planner, self.drafting),
            Slots(decoder.cache, decoder.rows, self.prefixes),
            queue_limit=queue_limit,
            on_request=on_request,
        )


def _tuning(bundle: Bundle, threads: int | None, cache_dir: Path | None) -> Tuning:
    """What was found for this bundle here, unless another number of threads is asked for."""
    default = Tuning(threads=resolve_threads(threads))
    found = find_tuning(bundle, cache_dir=cache_dir)
    return default if found is None or threads not in (None, found.threads) else found


async def _aresults(engine: Engine, job: Job) -> AsyncGenerator[object, None]:
    """A job's results as they come, on an event loop; leaving early ends the job."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        try:
            loop.call_soon_threadsafe(came.set)
        except RuntimeError:
            # The loop was closed over a reader that it never ended: nobody else tells the engine.
            engine.abandon(job)

    job.notify = notify
    try:
        engine.submit(job)
        async for result in job.aresults(came, lambda: engine.interrupt(job)):
            yield result
    finally:
        engine.abandon(job)


def _chunk(generation: Generation, result: object, options: GenerateOptions) -> Chunk | None:
    """What a caller gets of a result: a chunk where there is new text, and news of its prompt."""
    if not isinstance(result, PromptProgress):
        return generation.chunk(result)
    on_prompt = options.get("on_prompt")
    assert on_prompt is not None
    on_prompt(result.done, result.total)
    return None


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
