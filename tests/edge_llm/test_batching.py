"""Lists and streams of prompts, samples of one prompt, and answers on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from numpy.typing import NDArray

from edge_llm import LLM, ArgumentError, Chunk, ContextLengthError, batching
from edge_llm.batching import BatchItem
from edge_llm.engine import thread
from edge_llm.engine.job import Job
from edge_llm.errors import CancelledError, ClosedError, DeadlineError, QueueFullError

TEXTS = ["It was the best of times", "the age of wisdom, it was", "東京", "a", "epoch of belief"]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
LONG: dict[str, Any] = {"max_tokens": 240, "min_tokens": 240, "speculation": "off"}


@pytest.fixture
def llm(tiny_bundle: Path) -> Iterator[LLM]:
    with LLM(tiny_bundle, slots=3) as llm:
        yield llm


def test_results_come_in_order_or_as_they_are_done(llm: LLM) -> None:
    prompts = [TEXTS[i % 5] + str(i) for i in range(20)]
    alone = [llm.generate(prompt, **GREEDY).text for prompt in prompts]
    done: list[int] = []
    assert [one.text for one in llm.batch(prompts, on_progress=done.append, **GREEDY)] == alone
    assert done == list(range(1, 21))
    results = list(llm.batch(iter(prompts), ordered=False, **GREEDY))
    assert sorted(one.index for one in results) == list(range(20))
    assert all(one.text == alone[one.index] for one in results)
    assert llm.stats().rows_per_step > 1.2


def test_every_kind_of_prompt(llm: LLM) -> None:
    messages = [{"role": "user", "content": "best of times"}]
    prompts: list[Any] = ["a", llm.tokenize("epoch"), messages]
    texts = [one.text for one in llm.batch(prompts, **GREEDY)]
    assert texts == [
        llm.generate("a", **GREEDY).text,
        llm.generate("epoch", **GREEDY).text,
        llm.chat(messages, **GREEDY).text,
    ]
    assert list(llm.batch([])) == []


def test_an_endless_iterator_is_read_only_as_far_as_it_is_needed(llm: LLM) -> None:
    read = itertools.count()
    results = llm.batch((f"{TEXTS[0]} {next(read)}" for _ in itertools.count()), **GREEDY)
    for index in range(30):
        assert next(results).index == index
        assert next(read) - index < 40
    results.close()  # type: ignore[attr-defined]
    until_idle(llm)


def test_a_prompt_may_wait_for_the_answer_before_it(llm: LLM) -> None:
    asked: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for ordered in (True, False):
        asked.put(TEXTS[0])
        results = llm.batch(iter(asked.get, None), ordered=ordered, **GREEDY)
        for index in range(4):
            result = next(results)
            assert result.index == index
            asked.put(result.text[:5] + "a")
        asked.put(None)
        assert [one.index for one in results] == [4]
    until_idle(llm)


def readers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "edge_llm-batch"]


def test_reading_ends_with_the_batch(llm: LLM) -> None:
    let_go: list[bool] = []

    def prompts() -> Iterator[str]:
        try:
            while True:
                yield "a"
        finally:
            let_go.append(True)

    llm.batch(prompts())  # nobody asks for a result, so no prompt is read
    results = llm.batch(prompts(), **GREEDY)
    next(results)
    assert len(readers()) == 1
    del results
    until(lambda: not readers() and len(let_go) == 1)
    until_idle(llm)


@pytest.mark.parametrize("ordered", [True, False])
def test_what_reading_raises_comes_behind_the_results(llm: LLM, ordered: bool) -> None:
    def prompts() -> Iterator[str]:
        yield from ("a", "b", "c")
        raise OSError("the line is cut")

    results = llm.batch(prompts(), ordered=ordered, errors="return", **GREEDY)
    assert sorted(next(results).index for _ in range(3)) == [0, 1, 2]
    with pytest.raises(OSError, match="the line is cut"):
        next(results)
    until_idle(llm)


def test_a_long_answer_holds_up_no_slot_but_its_own(llm: LLM) -> None:
    lengths = [80 if i % 8 == 0 else 4 for i in range(40)]
    prompts = [BatchItem("a", {"max_tokens": n, "min_tokens": n}) for n in lengths]
    steps = []
    for ordered in (True, False):
        before = llm.stats().steps
        options: dict[str, Any] = {"temperature": 0, "speculation": "off"}
        results = [one.index for one in llm.batch(prompts, ordered=ordered, **options)]
        assert (results == list(range(40))) is ordered
        steps.append(llm.stats().steps - before)
    assert steps[0] < 1.3 * steps[1]


def test_answers_that_come_early_are_bounded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "EARLY", 3)
    read: list[int] = []

    def prompts() -> Iterator[BatchItem]:
        for i in range(200):
            read.append(i)
            length = 2 if i else 200
            yield BatchItem("a", {"max_tokens": length, "min_tokens": length})

    results = llm.batch(prompts(), temperature=0, speculation="off")
    assert next(results).index == 0
    assert len(read) <= 3 * (batching.AHEAD + 3) + 3 + 1, "and those that are read and not taken"
    assert len(list(results)) == 199


def until_idle(llm: LLM) -> None:
    until(lambda: not (llm.stats().running or llm.stats().waiting))


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_progress_within_prompts(tiny_bundle: Path) -> None:
    prompts = [[66] * 20, [65] * 40]
    told: dict[int, list[int]] = {20: [], 40: []}
    threads = set()

    def tell(done: int, total: int) -> None:
        told[total].append(done)
        threads.add(threading.current_thread())

    with LLM(tiny_bundle, slots=3, prefill_chunk=16) as llm:
        items: list[Any] = [*prompts, BatchItem("a", {"on_prompt": None})]
        assert len(list(llm.batch(items, on_prompt=tell, **GREEDY))) == 3
        assert told == {20: [0, 16], 40: [0, 16, 32]}
        assert len(llm.samples([67] * 20, 2, on_prompt=tell, **GREEDY)) == 2
        assert len(told[20]) > 3
        assert threads == {threading.current_thread()}, "as for generate"
        for error in (ZeroDivisionError(), DeadlineError("mine")):
            failing = Mock(side_effect=error)
            with pytest.raises(type(error)):
                next(llm.batch([prompts[0]], errors="return", on_prompt=failing))
            until_idle(llm)


def test_progress_counts_every_result(llm: LLM) -> None:
    done: list[int] = []
    prompts: list[Any] = ["a", "epoch " * 300, "b", -1]
    results = llm.batch(prompts, errors="return", on_progress=done.append, **GREEDY)
    assert len(list(results)) == 4
    assert done == [1, 2, 3, 4]


def test_what_progress_raises_ends_the_batch(llm: LLM) -> None:
    def stop(done: int) -> None:
        if done == 2:
            raise RuntimeError("enough")

    results = llm.batch(itertools.repeat("a"), on_progress=stop, **LONG)
    with pytest.raises(RuntimeError, match="enough"):
        list(results)
    until_idle(llm)
    until(lambda: not readers())


def test_errors_are_raised_in_their_place_or_given(llm: LLM) -> None:
    prompts: list[Any] = ["a", "epoch " * 300, "b", -1, "c"]
    results = llm.batch(prompts, **GREEDY)
    assert next(results).index == 0
    with pytest.raises(ContextLengthError):
        next(results)
    until_idle(llm)
    given = list(llm.batch(prompts, errors="return", **GREEDY))
    kinds = [type(one.error) for one in given]
    assert kinds == [type(None), ContextLengthError, type(None), ArgumentError, type(None)]
    with pytest.raises(ArgumentError, match="prompt"):
        _ = given[3].text
    with pytest.raises(ArgumentError, match="errors must be 'raise' or 'return'"):
        llm.batch(["a"], errors="ignore")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="max_tokns"):
        list(llm.batch(["a"], max_tokns=3))  # type: ignore[call-arg]


def test_drafts_leave_room_for_a_row_that_is_nearly_full(llm: LLM) -> None:
    prompts = [[65] * length for length in (1, 40, 7, 90, 30, 2)]
    options: dict[str, Any] = {"temperature": 0, "min_tokens": 150}
    alone = [llm.generate(prompt, **options).tokens for prompt in prompts]
    found = [one.completion for one in llm.batch(prompts, **options)]
    assert [one.tokens for one in found if one] == alone
    assert llm.stats().accepted_tokens > 0


def test_cancelling_a_batch_ends_what_is_under_way(llm: LLM) -> None:
    cancel = threading.Event()
    results = llm.batch(["a"] * 9, max_tokens=200, min_tokens=200, cancel=cancel, speculation="off")
    threading.Timer(0.02, cancel.set).start()
    assert {one.completion.finish_reason for one in results if one.completion} <= {
        "cancelled",
        "length",
    }


def test_a_batch_leaves_room_in_the_queue_and_waits_where_it_is_full(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, slots=1, queue_limit=1) as llm:
        assert len(list(llm.batch(["a"] * 10, **GREEDY))) == 10
        with pytest.raises(QueueFullError):
            asyncio.run(gather(llm, 8))


def test_a_model_that_is_closed_when_a_prompt_is_offered(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm._model.engine
    offer = engine.offer

    def close_first(job: Job) -> None:
        engine.close()
        offer(job)

    monkeypatch.setattr(engine, "offer", close_first)
    given = list(llm.batch(["a", "b"], errors="return", **GREEDY))
    assert [type(one.error) for one in given] == [ClosedError] * 2


def test_a_hook_that_returns_after_close_does_not_disturb_its_batch(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread, "CLOSE_SECONDS", 0.05)
    entered, gate = threading.Event(), threading.Event()
    prompts: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def hang(so_far: Sequence[int], logits: NDArray[Any]) -> NDArray[Any]:
        entered.set()
        gate.wait(60)
        return logits

    def close() -> None:
        entered.wait(60)
        model.close()

    with LLM(tiny_bundle, slots=1) as model:
        closing = threading.Thread(target=close)
        closing.start()
        results = model.batch(iter(prompts.get, None), errors="return", logits_hook=hang)
        prompts.put("a")
        assert isinstance(next(results).error, ClosedError)
        gate.set()
        closing.join()
        until(lambda: not model._model.engine._thread.alive)
        prompts.put("b")
        prompts.put(None)
        assert [type(one.error) for one in results] == [ClosedError]


async def gather(llm: LLM, count: int) -> None:
    await asyncio.gather(*(llm.agenerate("a", max_tokens=100, min_tokens=90) for _ in range(count)))


def test_samples_share_the_computing_of_their_prompt(llm: LLM) -> None:
    prompt = llm.tokenize("It was the best of times, it was the worst of times, it was " * 3)
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 1.0}
    before = llm.stats()
    answers = llm.samples(prompt, 5, seed=7, **options)
    after = llm.stats()
    computed = (after.prompt_tokens - after.reused_tokens) - (
        before.prompt_tokens - before.reused_tokens
    )
    assert computed < 2 * len(prompt)
    alone = [llm.generate(prompt, seed=7 + i, **options) for i in range(5)]
    assert [one.tokens for one in answers] == [one.tokens for one in alone]
    assert len({one.tokens for one in answers}) > 1
    assert len(llm.samples([{"role": "user", "content": "a"}], 2, **GREEDY)) == 2
    with pytest.raises(ArgumentError, match="n must be an integer of at least 1"):
        llm.samples("a", 0)


# asyncio


def test_asyncio_gives_what_threads_give(llm: LLM) -> None:
    messages = [{"role": "user", "content": "best of times"}]

    async def ask() -> None:
        answers = await asyncio.gather(*(llm.agenerate(text, **GREEDY) for text in TEXTS))
        assert [one.text for one in answers] == [llm.generate(t, **GREEDY).text for t in TEXTS]
        chunks = [chunk async for chunk in llm.astream(TEXTS[0], **GREEDY)]
        assert "".join(chunk.text for chunk in chunks) == answers[0].text
        assert [bool(chunk.finish_reason) for chunk in chunks][-1]
        assert (await llm.achat(messages, **GREEDY)).text == llm.chat(messages, **GREEDY).text
        chunks = [chunk async for chunk in llm.astream_chat(messages, **GREEDY)]
        assert "".join(c.text for c in chunks) == llm.chat(messages, **GREEDY).text
        assert (await llm.ascore(TEXTS[0])).logprobs == pytest.approx(
            llm.score(TEXTS[0]).logprobs, abs=1e-4
        )

    asyncio.run(ask())


def test_the_event_loop_goes_on_and_cancelling_a_task_ends_its_answer(llm: LLM) -> None:
    async def ask() -> None:
        task = asyncio.create_task(llm.agenerate("a", logits_hook=slow, **LONG))
        for _ in range(5):
            await asyncio.sleep(0.005)
        assert not task.done()
        assert llm.stats().running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def slow(so_far: Any, logits: Any) -> Any:
        time.sleep(0.003)
        return logits

    asyncio.run(ask())
    until_idle(llm)


def test_an_async_stream_that_is_left_early_ends(llm: LLM) -> None:
    async def ask() -> list[Chunk]:
        got = []
        async with contextlib.aclosing(llm.astream("a", **LONG)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                got.append(chunk)
                if len(got) == 3:
                    break
        return got

    assert len(asyncio.run(ask())) == 3
    until_idle(llm)


def test_async_deadlines_cancel_events_and_errors(llm: LLM) -> None:
    async def ask() -> None:
        assert (await llm.agenerate("a", timeout=0.02, **LONG)).finish_reason in (
            "timeout",
            "length",
        )
        cancel = threading.Event()
        cancel.set()
        assert (await llm.agenerate("a", cancel=cancel)).finish_reason == "cancelled"
        with pytest.raises(CancelledError):
            await llm.ascore("a b c", cancel=cancel)
        with pytest.raises(DeadlineError):
            await llm.ascore("a b c", timeout=1e-9)
        with pytest.raises(ArgumentError):
            llm.astream("a", top_p=2)
        with pytest.raises(ContextLengthError):
            await llm.agenerate("a", max_tokens=1000)
        llm.close()
        with pytest.raises(ClosedError):
            await llm.agenerate("a")

    asyncio.run(ask())
