"""The public object on a tiny model: answers, streams, chats, scores, reuse, ends."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_llm import LLM
from edge_llm.errors import (
    ArgumentError,
    CancelledError,
    ChatTemplateError,
    ClosedError,
    ContextLengthError,
    DeadlineError,
    IntegrityError,
    ManifestError,
    PlatformError,
    RuntimeFailure,
)
from edge_llm.runtime.session import open_session
from edge_llm.text.tokenizer import Tokenizer

PROMPT = "It was the best of times, it was"


def greedy(llm: LLM, prompt: str | list[int] = PROMPT, **options: Any) -> str:
    return llm.generate(prompt, **({"temperature": 0, "max_tokens": 40} | options)).text


def test_stream_gives_what_generate_gives(tiny_llm: LLM) -> None:
    whole = tiny_llm.generate(PROMPT, max_tokens=40, logprobs=2)
    chunks = list(tiny_llm.stream(PROMPT, max_tokens=40, logprobs=2))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.tokens) == whole.tokens
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    assert whole.logprobs is not None
    # Bit for bit, although the second request reuses the prompt of the first.
    assert logprobs == list(whole.logprobs)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    last = chunks[-1]
    assert last.finish_reason == whole.finish_reason == "length"
    assert last.usage is not None
    assert last.usage.completion_tokens == 40
    assert last.timings is not None
    assert all(chunk.usage is None and chunk.timings is None for chunk in chunks[:-1])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_a_prompt_do_not_change_the_answer(
    chunk: int, tiny_llm: LLM, tiny_bundle: Path
) -> None:
    with LLM(tiny_bundle, prefill_chunk=chunk) as other:
        assert greedy(other) == greedy(tiny_llm)


def test_a_reused_prefix_does_not_change_the_answer(tiny_llm: LLM, tiny_bundle: Path) -> None:
    tokens = tiny_llm.tokenize(PROMPT)
    first = tiny_llm.generate(tokens, max_tokens=20)
    assert first.usage.reused_tokens == 0
    longer = tokens + list(first.tokens) + tiny_llm.tokenize(" and so on")
    second = tiny_llm.generate(longer, max_tokens=20)
    # The last token of an answer was chosen but never fed.
    assert second.usage.reused_tokens == len(tokens) + 19
    with LLM(tiny_bundle) as fresh:
        unaided = fresh.generate(longer, max_tokens=20)
        assert unaided.usage.reused_tokens == 0
        assert unaided.tokens == second.tokens
    # A diverging prompt reuses what is common, and the last two tokens are always computed.
    third = tiny_llm.generate([*tokens[:-1], 5], max_tokens=2)
    assert third.usage.reused_tokens == len(tokens) - 2
    assert tiny_llm.generate(tokens[:3], max_tokens=2).usage.reused_tokens == 1


def test_usage_and_timings_add_up(tiny_llm: LLM) -> None:
    answer = tiny_llm.generate(PROMPT, max_tokens=10)
    assert answer.usage.prompt_tokens == len(tiny_llm.tokenize(PROMPT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 10
    times = answer.timings
    assert times.load == tiny_llm.load_seconds > 0
    assert times.first_token is not None
    assert times.per_token is not None
    assert 0 < times.prompt < times.first_token < times.total
    assert times.per_token * 9 < times.total
    assert tiny_llm.generate(PROMPT, max_tokens=1).timings.per_token is None


def test_seeds_repeat_and_differ(tiny_llm: LLM) -> None:
    def sample(seed: int | None) -> str:
        return tiny_llm.generate(PROMPT, max_tokens=30, temperature=1.0, seed=seed).text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1
    assert len({sample(None) for _ in range(5)}) > 1


def test_stop_strings_end_the_text_before_them(tiny_llm: LLM) -> None:
    text = greedy(tiny_llm)
    stop = text[10:16]  # spans tokens
    before = text[: text.index(stop)]
    for answer_text in (
        greedy(tiny_llm, stop=stop),
        greedy(tiny_llm, stop=["never seen", stop]),
        "".join(chunk.text for chunk in tiny_llm.stream(PROMPT, max_tokens=40, stop=stop)),
    ):
        assert answer_text == before
    answer = tiny_llm.generate(PROMPT, max_tokens=40, stop=stop)
    assert answer.finish_reason == "stop"
    assert tiny_llm.detokenize(answer.tokens).startswith(before + stop)
    # A stop string's beginning that never becomes one is text.
    assert greedy(tiny_llm, stop=text[-3:] + "never") == text


def test_stop_tokens_and_min_tokens(tiny_llm: LLM) -> None:
    tokens = tiny_llm.generate(PROMPT, max_tokens=40).tokens
    stop = tokens[5]
    first = tokens.index(stop)
    answer = tiny_llm.generate(PROMPT, max_tokens=40, stop_tokens=[stop])
    assert answer.tokens == tokens[: first + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == tiny_llm.detokenize(tokens[:first])
    later = tiny_llm.generate(PROMPT, max_tokens=40, stop_tokens=[stop], min_tokens=first + 1)
    assert stop not in later.tokens[: first + 1]
    assert len(later.tokens) > first + 1


def test_the_models_own_end_is_not_text(tiny_llm: LLM) -> None:
    answer = tiny_llm.generate(PROMPT, max_tokens=9, logit_bias={1: 1e4})
    assert answer.tokens == (1,)
    assert answer.text == ""
    assert answer.finish_reason == "stop"
    assert tiny_llm.generate(PROMPT, max_tokens=9, min_tokens=4, logit_bias={1: 1e4}).tokens[4] == 1


def test_logits_hook_and_bias_choose(tiny_llm: LLM) -> None:
    seen: list[list[int]] = []

    def only_seven(tokens: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(list(tokens))
        logits[:] = -np.inf
        logits[7] = 0
        return logits

    prompt = tiny_llm.tokenize(PROMPT)
    answer = tiny_llm.generate(prompt, max_tokens=3, logits_hook=only_seven)
    assert answer.tokens == (7, 7, 7)
    assert seen == [prompt, [*prompt, 7], [*prompt, 7, 7]]
    assert tiny_llm.generate(prompt, max_tokens=2, logit_bias={9: 1e4}).tokens == (9, 9)


def test_a_failing_hook_fails_its_own_request_only(tiny_llm: LLM) -> None:
    def broken(tokens: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        raise LookupError("mine")

    expected = greedy(tiny_llm)
    with pytest.raises(LookupError, match="mine"):
        tiny_llm.generate(PROMPT, max_tokens=3, logits_hook=broken)
    assert greedy(tiny_llm) == expected


def test_logprobs_are_the_models_own(tiny_llm: LLM) -> None:
    plain = tiny_llm.generate(PROMPT, max_tokens=5, logprobs=3).logprobs
    biased = tiny_llm.generate(PROMPT, max_tokens=5, logprobs=3, temperature=2.0, top_k=1).logprobs
    assert plain == biased
    assert plain is not None
    for entry in plain:
        assert entry.logprob == entry.top[0][1]
        assert len(entry.top) == 3
    assert tiny_llm.generate(PROMPT, max_tokens=5).logprobs is None


def test_score_agrees_with_logprobs(tiny_llm: LLM) -> None:
    prompt = tiny_llm.tokenize(PROMPT)
    answer = tiny_llm.generate(prompt, max_tokens=8, logprobs=0)
    assert answer.logprobs is not None
    score = tiny_llm.score([*prompt, *answer.tokens])
    assert len(score.logprobs) == len(score.tokens) - 1
    np.testing.assert_allclose(
        score.logprobs[-8:], [entry.logprob for entry in answer.logprobs], atol=1e-4
    )
    assert score.total == pytest.approx(sum(score.logprobs))
    assert score.perplexity > 1
    assert tiny_llm.score([5]).perplexity == 1
    # Scoring leaves a valid cache behind.
    assert tiny_llm.generate(prompt, max_tokens=8).tokens == answer.tokens


def test_score_ends_early_with_the_usual_exceptions(tiny_llm: LLM) -> None:
    event = threading.Event()
    event.set()
    with pytest.raises(CancelledError):
        tiny_llm.score(PROMPT, cancel=event)
    with pytest.raises(DeadlineError):
        tiny_llm.score(PROMPT, timeout=1e-9)


def test_context_is_refused_before_any_work(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, context=32) as llm:
        with pytest.raises(ContextLengthError, match="9 tokens too many") as caught:
            llm.generate([5] * 30, max_tokens=11)
        assert caught.value.over == 9
        with pytest.raises(ContextLengthError):
            llm.generate([5] * 32)
        with pytest.raises(ContextLengthError):
            llm.score([5] * 33)
        answer = llm.generate([5] * 30, min_tokens=2)
        assert len(answer.tokens) == 2  # what the context has left
        assert len(llm.generate([5] * 22, max_tokens=10, min_tokens=10).tokens) == 10
        assert llm.score([5] * 32).logprobs


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_tokens": [10**6]}, "stop_tokens"),
        ({"stop_tokens": 5}, "stop_tokens"),
        ({"stop_tokens": "12"}, "stop_tokens"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"logits_hook": 3}, "logits_hook"),
        ({"cancel": True}, "cancel"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"on_prompt": 3}, "on_prompt"),
        ({"max_token": 3}, "max_token"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], named: str, tiny_llm: LLM) -> None:
    for call in (tiny_llm.generate, tiny_llm.stream):
        with pytest.raises(ArgumentError) as caught:
            call(PROMPT, **options)
        assert caught.value.argument == named


@pytest.mark.parametrize(
    "prompt", ["", [], [-1], [400], [1.5], [[1]], [[1], [2, 3]], None, 3, ["a"], b"x"]
)
def test_wrong_prompts_are_named(prompt: Any, tiny_llm: LLM) -> None:
    with pytest.raises(ArgumentError, match="prompt"):
        tiny_llm.generate(prompt)
    with pytest.raises(ArgumentError, match="text"):
        tiny_llm.score(prompt)


def test_wrong_options_of_score_are_named(tiny_llm: LLM) -> None:
    with pytest.raises(ArgumentError, match="cancel"):
        tiny_llm.score(PROMPT, cancel=5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="timeout"):
        tiny_llm.score(PROMPT, timeout=-1)
    with pytest.raises(ArgumentError, match="priority must be an integer from -1000 to 1000"):
        tiny_llm.score(PROMPT, priority=1001)


def altered(bundle: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a bundle whose manifest is changed at its top level."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


@pytest.mark.parametrize("sampling", [{"top_k": 40.5}, {"temperature": -1}, {"heat": 1}])
def test_wrong_defaults_are_the_bundles_mistake(
    sampling: dict[str, float], tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match="sampling"):
        LLM(altered(tiny_bundle, tmp_path / "bundle", sampling=sampling))


def test_a_version_that_is_none_is_the_bundles_mistake(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="min_onnxruntime"):
        LLM(altered(tiny_bundle, tmp_path / "bundle", min_onnxruntime="banana"))


def test_state_that_the_graph_does_not_have(tiny_bundle: Path, tmp_path: Path) -> None:
    decoder = json.loads((tiny_bundle / "manifest.json").read_text())["decoder"]
    decoder["state"][0]["input"] = "past.other"
    with pytest.raises(RuntimeFailure, match=r"past\.other"):
        LLM(altered(tiny_bundle, tmp_path / "a", decoder=decoder))
    decoder["state"][0]["input"] = "past.0.key"
    decoder["state"][0]["shape"][1] = 10**15
    with pytest.raises(RuntimeFailure, match=r"'past\.0\.key' is .*1000000000000000"):
        LLM(altered(tiny_bundle, tmp_path / "b", decoder=decoder))


def test_a_chat_template_that_is_no_text(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = altered(tiny_bundle, tmp_path / "bundle")
    file = folder / "chat_template.jinja"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja"):
        LLM(folder)


def test_decoding_keeps_memory_flat(tiny_llm: LLM) -> None:
    """Nothing stays behind of a token but its place in the answer."""
    sizes = []

    def watch(tokens: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        sizes.append(tracemalloc.get_traced_memory()[0])
        return logits

    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}
    tiny_llm.generate(PROMPT, min_tokens=200, max_tokens=200, **options)
    tracemalloc.start()
    try:
        tiny_llm.generate(
            PROMPT, min_tokens=200, max_tokens=200, logits_hook=watch, seed=1, **options
        )
    finally:
        tracemalloc.stop()
    grown = sizes[-1] - sizes[50]
    # 150 tokens, their text and this list; the logits alone would be 240,000 bytes.
    assert grown < 40_000


@pytest.mark.parametrize(
    "options",
    [{"context": 1}, {"context": 257}, {"threads": 0}, {"threads": 10**4}, {"prefill_chunk": 0}],
)
def test_wrong_load_options_are_named(options: dict[str, Any], tiny_bundle: Path) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        LLM(tiny_bundle, **options)


def test_chat_renders_the_template_and_reuses_the_conversation(tiny_llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello <|im_end|> there"}]
    tokens = tiny_llm.apply_chat_template(messages)
    assert tokens.count(1) == 1  # the template's own <|im_end|>; the user's stays text
    text = tiny_llm.detokenize(tokens, skip_special=False)
    assert text == "<|im_start|>user\nhello <|im_end|> there<|im_end|>\n<|im_start|>assistant\n"
    answer = tiny_llm.chat(messages, max_tokens=8)
    streamed = list(tiny_llm.stream_chat(messages, max_tokens=8))
    assert "".join(chunk.text for chunk in streamed) == answer.text
    assert answer.usage.prompt_tokens == len(tokens)
    assert streamed[-1].usage is not None
    assert streamed[-1].usage.reused_tokens == len(tokens) - 2
    with pytest.raises(ChatTemplateError, match="default"):
        tiny_llm.chat(messages, template="other")


def test_cancel_event_and_timeout_end_an_answer(tiny_llm: LLM) -> None:
    expected = greedy(tiny_llm)
    event = threading.Event()
    pieces = []
    for chunk in tiny_llm.stream(PROMPT, min_tokens=200, cancel=event):
        pieces.append(chunk)
        event.set()
    assert pieces[-1].finish_reason == "cancelled"
    assert len(pieces) < 200
    assert tiny_llm.generate(PROMPT, cancel=event).tokens == ()
    late = tiny_llm.generate(PROMPT, min_tokens=200, timeout=1e-6)
    assert late.finish_reason == "timeout"
    assert greedy(tiny_llm) == expected


def test_an_abandoned_stream_frees_the_model(tiny_llm: LLM) -> None:
    expected = greedy(tiny_llm)
    stream = tiny_llm.stream(PROMPT, min_tokens=200)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    for _ in tiny_llm.stream(PROMPT, min_tokens=200):
        break
    gc.collect()
    assert greedy(tiny_llm) == expected


def test_a_slow_reader_holds_nobody_up(tiny_llm: LLM) -> None:
    slow = tiny_llm.stream(PROMPT, max_tokens=30)
    first = next(slow)
    assert greedy(tiny_llm)  # would wait for ever if the stream kept the model
    rest = list(slow)
    assert first.text + "".join(chunk.text for chunk in rest) == greedy(tiny_llm, max_tokens=30)


def test_prompt_progress_is_told_in_the_callers_thread(tiny_bundle: Path) -> None:
    told: list[tuple[int, int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total, threading.get_ident()))

    with LLM(tiny_bundle, prefill_chunk=4) as llm:
        llm.generate([5] * 10, max_tokens=1, on_prompt=progress)
        assert told == [(done, 10, threading.get_ident()) for done in (0, 4, 8)]

        def failing(done: int, total: int) -> None:
            raise LookupError

        with pytest.raises(LookupError):
            llm.generate([6] * 10, max_tokens=1, on_prompt=failing)
        assert llm.generate([5] * 10, max_tokens=1).tokens


def test_cancelling_during_the_prompt_leaves_a_valid_cache(tiny_bundle: Path) -> None:
    event = threading.Event()
    with LLM(tiny_bundle, prefill_chunk=4) as llm:
        prompt = llm.tokenize(PROMPT) * 2
        expected = llm.generate(prompt, max_tokens=8).tokens
        llm.generate([7, 8, 9], max_tokens=1)

        def stop_half_way(done: int, total: int) -> None:
            if done >= total // 2:
                event.set()

        answer = llm.generate(prompt, max_tokens=8, cancel=event, on_prompt=stop_half_way)
        assert answer.finish_reason in ("cancelled", "length")  # the event may come too late
        assert llm.generate(prompt, max_tokens=8).tokens == expected


def test_threads_share_a_model(tiny_llm: LLM) -> None:
    prompts = [[n + 3] * (n + 1) for n in range(8)]
    expected = [tiny_llm.generate(prompt, max_tokens=10).tokens for prompt in prompts]
    got: dict[int, tuple[int, ...]] = {}

    def work(n: int) -> None:
        for _ in range(5):
            got[n] = tiny_llm.generate(prompts[n], max_tokens=10).tokens

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [got[n] for n in range(8)] == expected


def test_closed_models_refuse_work(tiny_bundle: Path) -> None:
    llm = LLM(tiny_bundle)
    stream = llm.stream(PROMPT, min_tokens=200)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(ClosedError):
        list(stream)
    with pytest.raises(ClosedError):
        llm.generate(PROMPT)
    with pytest.raises(ClosedError):
        llm.stream(PROMPT)
    with pytest.raises(ClosedError):
        llm.score(PROMPT)
    assert "closed" in repr(llm)
    assert llm.tokenize("times")


def test_a_forgotten_model_ends_its_thread(tiny_bundle: Path) -> None:
    def engines() -> int:
        return sum(thread.name == "edge_llm-engine" for thread in threading.enumerate())

    before = engines()
    llm = LLM(tiny_bundle)
    llm.generate(PROMPT, max_tokens=1)
    assert engines() == before + 1
    del llm
    gc.collect()
    deadline = time.monotonic() + 10
    while engines() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engines() == before


def test_other_platforms_are_refused_with_the_remedy(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_llm.runtime import session

    def refuse() -> None:
        raise PlatformError("edge_llm needs a 64-bit Python.", "Install one.")

    monkeypatch.setattr(session, "check_platform", refuse)
    session.import_onnxruntime.cache_clear()
    with pytest.raises(PlatformError, match="64-bit"):
        LLM(tiny_bundle)
    session.import_onnxruntime.cache_clear()


def test_tokens_that_the_tokenizer_does_not_know_are_no_text(tiny_llm: LLM) -> None:
    """Many models have more rows of logits than their tokenizer has tokens."""
    assert tiny_llm.detokenize([40, 399, 41]) == tiny_llm.detokenize([40, 41])
    answer = tiny_llm.generate(PROMPT, max_tokens=3, logit_bias={399: 1e4})
    assert answer.tokens == (399, 399, 399)
    assert answer.text == ""
    with pytest.raises(ArgumentError):
        tiny_llm.detokenize([400])


@pytest.mark.parametrize("name", ["cache_dir", "prefix_cache"])
@pytest.mark.parametrize("value", [5, b"folder", "", "a\0b", ["folder"]])
def test_what_is_no_folder_is_refused(name: str, value: Any, tiny_bundle: Path) -> None:
    with pytest.raises(ArgumentError, match=f"{name} must be the path of a folder"):
        LLM(tiny_bundle, **{name: value})


def test_tokenizer_and_graph_are_read_at_the_same_time(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=60)  # which neither passes alone

    def together(work: Callable[..., Any]) -> Callable[..., Any]:
        def wait_and_work(*arguments: Any, **options: Any) -> Any:
            both.wait()
            return work(*arguments, **options)

        return wait_and_work

    monkeypatch.setattr("edge_llm.model.open_session", together(open_session))
    monkeypatch.setattr(Tokenizer, "from_file", together(Tokenizer.from_file))
    with LLM(tiny_bundle) as llm:
        assert greedy(llm)


def test_a_broken_tokenizer_is_told_of_beside_a_whole_graph(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """They are read at the same time."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    file = bundle / "tokenizer.json"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json cannot be read"):
        LLM(bundle)
    (bundle / "model.onnx.data").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data"):
        LLM(bundle)
