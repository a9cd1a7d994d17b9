"""Every exception and warning that edge_llm raises on purpose, in one tree.

::

    EdgeLLMError
    ├── ArgumentError (also a ValueError)       an argument is outside its domain
    │   ├── ContextLengthError                  the request needs more tokens than the context holds
    │   └── MemoryLimitError                    the model needs more memory than it may take
    ├── BundleError                             a bundle cannot be used
    │   ├── BundleNotFoundError (also a FileNotFoundError)
    │   ├── ManifestError                       manifest.json is not what the format says
    │   ├── UnsupportedFormatError              made for a newer runtime
    │   └── IntegrityError                      a file is missing or altered
    ├── ChatTemplateError                       a chat template is missing or refused this
    ├── CancelledError                      cancelled before there was a result
    ├── ClosedError                             the model was used after close()
    ├── DeadlineError (also a TimeoutError) the time was up before there was a result
    ├── ForkError                               the model was used in a forked child
    ├── PlatformError                           this machine cannot run the runtime
    ├── QueueFullError                          as many requests wait as may
    ├── RuntimeFailure                          ONNX Runtime refused or failed a step
    ├── SessionError                            a saved session cannot be gone on from
    └── ExportError                             a bundle cannot be made
        ├── CheckpointError (also a BundleError) the files that a model came in are not usable
        ├── UnsupportedModelError               the checkpoint asks for the unknown
        └── VerificationError                   the written bundle did not behave as it must

    EdgeLLMWarning (also a UserWarning)
    ├── CacheWarning                            a cache cannot be written, so nothing is kept there
    ├── SlowKernelWarning                       this CPU has no fast kernels for the weights
    └── TelemetryWarning                        onnxruntime was imported with its telemetry on
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ArgumentError",
    "BundleError",
    "BundleNotFoundError",
    "CacheWarning",
    "CancelledError",
    "ChatTemplateError",
    "CheckpointError",
    "ClosedError",
    "ContextLengthError",
    "DeadlineError",
    "EdgeLLMError",
    "EdgeLLMWarning",
    "ExportError",
    "ForkError",
    "IntegrityError",
    "ManifestError",
    "MemoryLimitError",
    "PlatformError",
    "QueueFullError",
    "RuntimeFailure",
    "SessionError",
    "SlowKernelWarning",
    "TelemetryWarning",
    "UnsupportedFormatError",
    "UnsupportedModelError",
    "VerificationError",
]


class EdgeLLMError(Exception):
    """Base of every error that edge_llm raises on purpose.

    Args:
        message: What is wrong, in one sentence.
        remedy: What the user can do about it; printed after the message.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".rstrip()


class ArgumentError(EdgeLLMError, ValueError):
    """An argument is outside its domain.

    Args:
        argument: The argument's name, as the caller wrote it.
        domain: What it may be ("an integer of at least 1").
        value: What it was.
        remedy: What to do; may be empty where the domain says it all.
    """

    def __init__(self, argument: str, domain: str, value: object, remedy: str = "") -> None:
        shown = repr(value)
        if len(shown) > 200:
            shown = f"{shown[:200]}… ({len(shown)} characters)"
        super().__init__(f"{argument} must be {domain}, got {shown}.", remedy)
        # args rebuilds the exception when it is pickled, so it holds what __init__ takes.
        self.args = (argument, domain, value, remedy)
        self.argument = argument
        self.domain = domain
        self.value = value


class ContextLengthError(ArgumentError):
    """Prompt and answer together need more tokens than the context holds.

    Args:
        prompt_tokens: Tokens in the prompt.
        max_tokens: Tokens asked for.
        context: Tokens that the context holds.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, context: int) -> None:
        over = prompt_tokens + max_tokens - context
        super().__init__(
            "prompt + max_tokens",
            f"at most {context} tokens (the context)",
            prompt_tokens + max_tokens,
            f"That is {over} tokens too many ({prompt_tokens} in the prompt, {max_tokens} asked "
            "for): shorten the prompt, lower max_tokens, or load the model with a larger context.",
        )
        self.args = (prompt_tokens, max_tokens, context)
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context = context
        self.over = over


class MemoryLimitError(ArgumentError):
    """The model needs more memory than it may take.

    Args:
        limit: Bytes that it may take.
        context: Tokens of the context that was tried, the shortest that would do.
        terms: Bytes that it needs for that, by what for.
    """

    def __init__(self, limit: int, context: int, terms: Mapping[str, int]) -> None:
        needed = sum(terms.values())
        parts = " + ".join(
            f"{name.replace('_', ' ')} {size / 1e6:,.1f}" for name, size in terms.items()
        )
        super().__init__(
            "memory_limit",
            f"at least {needed} bytes for a context of {context} tokens",
            limit,
            f"In MB: {parts} = {needed / 1e6:,.1f}. Allow more, ask for a smaller context, or take "
            "a smaller model.",
        )
        self.args = (limit, context, terms)
        self.limit = limit
        self.context = context
        self.terms = terms
        self.needed = needed


class BundleError(EdgeLLMError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at the path."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.errno, self.strerror = errno.ENOENT, message  # OSError took them from its arguments


class ManifestError(BundleError):
    """manifest.json is not what the format says."""


class UnsupportedFormatError(BundleError):
    """The bundle was made for a newer runtime, or needs a feature that this one lacks."""


class IntegrityError(BundleError):
    """A file of the bundle is missing or is not the one that was exported."""


class ChatTemplateError(EdgeLLMError):
    """A chat template is missing, broken, or refused these messages."""


class CancelledError(EdgeLLMError):
    """The work was cancelled before it had a result; an answer has one at any time."""


class DeadlineError(EdgeLLMError, TimeoutError):
    """The time was up before there was a result; an answer has one at any time."""


class ClosedError(EdgeLLMError):
    """The model was used after close()."""


class ForkError(EdgeLLMError):
    """The model was used in a child process made by fork()."""


class PlatformError(EdgeLLMError):
    """This machine cannot run the runtime."""


class QueueFullError(EdgeLLMError):
    """As many requests wait as may.

    Args:
        limit: Requests that may wait.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"{limit} requests wait already, which is queue_limit.",
            "Ask again later, load the model with a higher queue_limit, or give lists of prompts "
            "to batch().",
        )
        self.args = (limit,)
        self.limit = limit


class RuntimeFailure(EdgeLLMError):  # noqa: N818 - the tree's one failure that is nobody's mistake
    """ONNX Runtime refused the graph or failed during a step."""


class SessionError(EdgeLLMError):
    """A saved session is damaged, or belongs to another model, runtime or processor."""


class ExportError(EdgeLLMError):
    """A bundle cannot be made: exported or imported."""


class CheckpointError(ExportError, BundleError):
    """The files that a model came in are not usable, to export, to import or to run them."""


class UnsupportedModelError(ExportError):
    """The checkpoint asks for something that the builder does not know or cannot honour."""


class VerificationError(ExportError):
    """The written bundle did not behave as it must."""


class EdgeLLMWarning(UserWarning):
    """Base of the warnings that edge_llm gives."""


class SlowKernelWarning(EdgeLLMWarning):
    """This CPU has no fast kernels for the model's weights."""


class CacheWarning(EdgeLLMWarning):
    """A cache's folder cannot be read or written; work goes on without it."""


class TelemetryWarning(EdgeLLMWarning):
    """onnxruntime was imported earlier with its telemetry switched on."""
