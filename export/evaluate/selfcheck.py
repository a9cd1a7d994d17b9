"""Does a freshly written bundle run at all?"""

from __future__ import annotations

from pathlib import Path

from edge_llm import LLM
from edge_llm.errors import EdgeLLMError, VerificationError

__all__ = ["run_once"]


def run_once(folder: Path) -> None:
    """Open a bundle and let it answer a short prompt.

    Raises:
        VerificationError: It does not open, or a step fails or gives no numbers.
    """
    try:
        with LLM(folder) as llm:
            # A prompt and an answer of several tokens each, where the context has room for them.
            prompt = [llm.manifest.tokens.bos or 0] * max(1, min(3, llm.context - 2))
            answer = min(2, llm.context - len(prompt))
            completion = llm.generate(prompt, max_tokens=answer, temperature=0.0, logprobs=0)
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
