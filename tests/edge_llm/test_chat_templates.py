"""Templates in the manner of well-known models are rendered as transformers renders them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import ChatTemplateError
from edge_llm.text.chat import ChatTemplate

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

Messages = list[dict[str, Any]]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in 東京 & elsewhere.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A <city>, \"quoted\" or 'not'"},
                "days": {"type": ["integer", "null"], "description": "How many"},
                "tags": {"type": "array", "items": {"type": "string"}, "description": " spaced "},
                "more": {
                    "type": "object",
                    "additionalProperties": {"type": "number"},
                    "description": "x",
                },
            },
            "required": ["city"],
        },
        "return": {"type": "string", "description": "A line"},
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}},
    },
}


def say(*contents: Any, system: Any = None) -> Messages:
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def call(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    made = [{"type": "function", "id": f"call0000{i}", "function": c} for i, c in enumerate(calls)]
    return {"role": "assistant", "content": content, "tool_calls": made}


ASK = {"name": "weather", "arguments": {"city": "Zürich <b>", "days": 2, "tags": ["a", "ü"]}}
CONVERSATIONS: dict[str, Messages] = {
    "one": say("Hello"),
    "system": say("Hello", system="You are terse."),
    "turns": say("Hello", "Hi!", "And\nnow?\n", "  Yes.  "),
    "long": say(*["text of a turn "] * 21, system="s"),
    "unicode": say(
        "é中 👩‍🚀 \u200b\u00a0", "日本語 <|im_end|>",
        "\\n \t \"x\" 'y' {{ z }} {% if %}",
    ),
    "white space": say("  \n a \r\n", " \n\t ", "\n\nb  ", system="\n x \n"),
    "empty": say("", "", ""),
    "empty system": say("a", system=""),
    "thinking": say("1+1?", "<think>\nhm\n</think>\n\n2", "2+2?", "<think>x</think>4"),
    "reasoning": [*say("a"), {"role": "assistant", "content": "b", "reasoning_content": "\nc\n"}],
    "flags": say("a /no_think", "b", system="Be kind. /no_think "),
    "override": say("a", system="Mine. /system_override"),
    "starts with assistant": [{"role": "assistant", "content": "x"}],
    "two users": [*say("a"), *say("b")],
    "system later": [*say("a", "b"), {"role": "system", "content": "c"}, *say("d")],
    "other role": [{"role": "critic", "content": "x"}],
    "parts": say(
        [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]
    ),
    "system parts": say([{"type": "text", "text": "a"}], system=[{"type": "text", "text": "s"}]),
    "no content": [*say("a"), {"role": "assistant"}],
    "call": [*say("Weather?"), call(ASK)],
    "calls": [*say("Weather?"), call(ASK, {"name": "clock", "arguments": {}}, content="Well:")],
    "result": [*say("Weather?"), call(ASK), {"role": "tool", "content": "sun\n"}],
    "results": [
        *say("Weather?", system="s"),
        call(ASK, ASK),
        {"role": "tool", "name": "weather", "content": '{"sky": "é"}', "tool_call_id": "call00000"},
        {"role": "tool", "name": "weather", "content": "rain", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Sun, then rain."},
        *say("Thanks"),
    ],
    "structured result": [*say("a"), call(ASK), {"role": "tool", "content": [{"sky": "é"}]}],
    "call as text": [*say("a"), call({"name": "f", "arguments": '{"x": 1}'})],
    "tools in a message": [
        {"role": "system", "content": "s", "tools": '[{"name": "f"}]'},
        *say("a"),
    ],
}  # fmt: skip
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": False, "thinking": True, "date_string": "1 Jan 2025"},
    {"documents": [{"doc_id": 1, "title": "t", "text": "é"}], "controls": {"citations": True}},
    {"tools_in_user_message": False, "xml_tools": [WEATHER], "python_tools": ["f"]},
)


def theirs(source: str, messages: Messages, **options: Any) -> str | None:
    """What transformers renders; None where the template fails."""
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({}, "")), **SPECIAL
    )
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, **options
        )
    except Exception:  # whatever a template may fail with
        return None
    assert isinstance(text, str)
    return text


def ours(source: str, messages: Messages, **options: Any) -> str | None:
    try:
        return ChatTemplate(source, special_tokens=SPECIAL).render(messages, **options)
    except ChatTemplateError:
        return None


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_grid_of_conversations(name: str) -> None:
    rendered = 0
    for (case, messages), tools, extra, prompt in product(
        CONVERSATIONS.items(), (None, [WEATHER, CLOCK]), EXTRAS, (True, False)
    ):
        options = {"tools": tools, "add_generation_prompt": prompt, **extra}
        expected = theirs(SOURCES[name], messages, **options)
        assert ours(SOURCES[name], messages, **options) == expected, (case, options)
        rendered += expected is not None
    # More than the simplest conversations: else the grid compares refusals with refusals.
    assert rendered >= 80


contents = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(["<think>", "</think>", "\n", " ", "a", "<|im_end|>", "/think", "'", '"']),
        max_size=5,
    ).map("".join),
)
messages_of_any_roles = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool"]),
            "content": st.one_of(contents, contents.map(lambda t: [{"type": "text", "text": t}])),
        },
        optional={
            "tool_calls": st.lists(st.just({"type": "f", "function": ASK}), max_size=2),
            "reasoning_content": contents,
        },
    ),
    min_size=1,
    max_size=5,
)


@given(
    name=st.sampled_from(sorted(SOURCES)),
    messages=messages_of_any_roles,
    tools=st.sampled_from([None, [], [WEATHER]]),
    prompt=st.booleans(),
)
def test_any_conversation(name: str, messages: Messages, tools: Any, prompt: bool) -> None:
    options = {"tools": tools, "add_generation_prompt": prompt}
    assert ours(SOURCES[name], messages, **options) == theirs(SOURCES[name], messages, **options)


@pytest.mark.parametrize("name", sorted(SOURCES))
@pytest.mark.parametrize(
    "last",
    ["Once upon", " Once upon \n", "", "<think>\n", "1", [{"type": "text", "text": "a "}, {}]],
    ids=repr,
)
def test_a_final_message_is_continued(name: str, last: Any) -> None:
    messages = [*say("Tell me 1 story"), {"role": "assistant", "content": last}]
    if name == "deepseek-r1-distill" and last == "<think>\n":
        messages[-1]["content"] = "<think>x</think>y"  # which the template leaves out: a refusal
    options = {"continue_final_message": True, "tools": [WEATHER]}
    expected = theirs(SOURCES[name], messages, **options)
    assert ours(SOURCES[name], messages, **options) == expected
    if last == "Once upon":
        assert expected is not None
        assert expected.endswith("Once upon")


def test_long_conversations_are_rendered() -> None:
    """What templates may cost grows with the conversation."""
    turns = say(*[f"{i}: what a user writes and a model answers. " * 20 for i in range(201)])
    for name, source in SOURCES.items():
        options = {"tools": [WEATHER] * 40, "add_generation_prompt": True}
        text = ours(source, turns, **options)
        assert text is not None, name
        assert text == theirs(source, turns, **options)
