"""Does a freshly written bundle run at all?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import TemplateSyntaxError

from edge_llm import LLM
from edge_llm.errors import ChatTemplateError, EdgeLLMError, VerificationError

__all__ = ["run_once"]


def run_once(folder: Path, *, warn: Callable[[str], None]) -> None:
    """Open a bundle, render its chat templates, and let it answer a short prompt.

    Args:
        folder: The bundle.
        warn: Called with what the user should know.

    Raises:
        VerificationError: It does not open, a chat template is no Jinja template, or a step fails
            or gives no numbers.
    """
    try:
        with LLM(folder) as llm:
            _render_once(llm, warn)
            # A prompt and an answer of several tokens each, where the context has room for them.
            prompt = [llm.manifest.tokens.bos or 0] * max(1, min(3, llm.context - 2))
            answer = min(2, llm.context - len(prompt))
            completion = llm.generate(prompt, max_tokens=answer, temperature=0.0, logprobs=0)
    except VerificationError:
        raise
    except EdgeLLMError as error:
        raise VerificationError(
            f"The written bundle does not run: {error}", "Please report this model."
        ) from error
    assert completion.logprobs is not None
    for entry in completion.logprobs:
        if not entry.logprob <= 0:
            raise VerificationError(
                f"The written bundle gives the log-probability {entry.logprob}.",
                "Check the checkpoint's weights for infinities.",
            )


def _render_once(llm: LLM, warn: Callable[[str], None]) -> None:
    """Render a user's message by every template; one that wants more than that may refuse it."""
    for name, file in llm.manifest.chat.templates.items():
        try:
            llm.apply_chat_template([{"role": "user", "content": "Hello"}], template=name)
        except ChatTemplateError as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise VerificationError(
                    f"{file}: {error.message}",
                    "Repair the chat template in the checkpoint, there or in "
                    "tokenizer_config.json.",
                ) from error
            warn(f"{file} does not render a lone message of the user: {error}")
