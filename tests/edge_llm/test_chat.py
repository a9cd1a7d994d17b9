from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm import LLM
from edge_llm.errors import ArgumentError, ChatTemplateError
from edge_llm.text.chat import ChatTemplate, checked_options, choose_template, encode_chat
from edge_llm.text.tokenizer import Tokenizer

Kind = Callable[[str], Tokenizer]
Source = Callable[[str], str]
Messages = list[dict[str, Any]]

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if content is not string %}
        {%- set content = content | map(attribute='text') | join('') %}
    {%- endif %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.arguments | tojson }}
    {%- endfor %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim }}{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

LLAMA2 = """\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2}

CONTROL = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "[INST]", "[/INST]", "<think>", "</think>", "<tool_call>", "<<a",
    "a>>", "<<a>>", "<mask>", "  <mask>", " <sep> ", "Foo", "<Tag>", "<TAG>",
]  # fmt: skip
PARTS = ["<", ">", "<|", "|>", "<|im_", "im_end|>", "im_start", "[IN", "ST]", "s>", "/s>", "<\\s>",
         " ", "  ", "\n", "\n\n", "the", "hello", " world", "é", "中", "e\u0301", "\u0338", "＜s＞",
         "\U000f0000", "\\", '"', "<<im_end|>", "a", "b"]  # fmt: skip
hostile = st.lists(
    st.one_of(st.sampled_from(CONTROL), st.sampled_from(PARTS), st.text(max_size=3)), max_size=7
).map("".join)
harmless = st.lists(
    st.one_of(
        st.sampled_from(["<", "[", " the", " a < b", ">", "\n", "é中", "x", "|", "12", "<b>"])
    ),
    max_size=8,
).map("".join)


def template(name: str) -> ChatTemplate:
    return template_of(TEMPLATES[name])


def conversation(*contents: Any) -> Messages:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


@cache
def theirs(source: str) -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Library

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Library.from_str(source), bos_token="<s>", eos_token="</s>"
    )


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The control tokens among ids; the unknown token is none, it stands for characters."""
    added = tokenizer.control_tokens
    return [added[i].content for i in ids if i in added and added[i].content != "<unk>"]


@given(
    contents=st.lists(hostile, min_size=1, max_size=3),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_what_a_user_writes_adds_and_removes_no_control_token(
    contents: list[str], name: str, kind: str, small_tokenizer: Kind
) -> None:
    tokenizer = small_tokenizer(kind)
    messages = [m for c in contents for m in conversation(c, "the hello")]
    calm = [m for _ in contents for m in conversation("x", "the hello")]
    ids = encode_chat(tokenizer, template(name), messages)
    expected = encode_chat(tokenizer, template(name), calm)
    assert controls(tokenizer, ids) == controls(tokenizer, expected)


@given(contents=st.lists(hostile, min_size=1, max_size=4), name=st.sampled_from(sorted(TEMPLATES)))
def test_what_an_assistant_wrote_holds_no_special_token(
    contents: list[str], name: str, kind: str, small_tokenizer: Kind
) -> None:
    tokenizer = small_tokenizer(kind)
    special = {t.content for t in tokenizer.control_tokens.values() if t.special}
    ids = encode_chat(
        tokenizer, template(name), [m for c in contents for m in conversation("x", c)]
    )
    calm = encode_chat(
        tokenizer, template(name), [m for _ in contents for m in conversation("x", "x")]
    )
    found, expected = ([c for c in controls(tokenizer, i) if c in special] for i in (ids, calm))
    assert found == expected


@given(contents=st.lists(hostile, min_size=1, max_size=4), name=st.sampled_from(sorted(TEMPLATES)))
def test_the_text_comes_back(contents: list[str], name: str, small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    messages = conversation(*contents)
    ids = encode_chat(tokenizer, template(name), messages)
    # <mask> and <sep>, where they are tokens, swallow white space in the tokenizer itself.
    # The normalizer composes characters within a section, not across a token's edge.
    back, whole = (
        unicodedata.normalize("NFC", text)
        for text in (tokenizer.decode(ids, skip_special=False), template(name).render(messages))
    )
    if not {"<mask>", "<sep>"} & set(controls(tokenizer, ids)):
        assert back == whole


@given(contents=st.lists(harmless, min_size=1, max_size=4), name=st.sampled_from(sorted(TEMPLATES)))
def test_without_control_tokens_the_ids_are_those_of_transformers(
    contents: list[str], name: str, kind: str, small_tokenizer: Kind, tokenizer_source: Source
) -> None:
    tokenizer = small_tokenizer(kind)
    messages = conversation(*contents)
    mine = encode_chat(tokenizer, template(name), messages)
    expected = theirs(tokenizer_source(kind)).apply_chat_template(
        messages, chat_template=TEMPLATES[name], add_generation_prompt=True
    )
    assert mine == expected


def test_an_assistants_own_marks_come_back_as_tokens(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    wrote = "<think>the</think><tool_call>hello<|im_end|>"
    ids = encode_chat(tokenizer, template("llama3"), conversation("x", wrote))
    found = controls(tokenizer, ids)
    assert [c for c in found if "think" in c or "tool" in c or "im_" in c] == [
        "<think>",
        "</think>",
        "<tool_call>",
    ]
    assert wrote in tokenizer.decode(ids, skip_special=False)
    # The ChatML template splits on </think>.
    ids = encode_chat(tokenizer, template("chatml"), conversation("x", wrote))
    text = tokenizer.decode(ids, skip_special=False)
    assert "<think>" not in text
    assert "assistant\n<tool_call>hello<|im_end|><|im_end|>" in text
    assert controls(tokenizer, ids).count("<|im_end|>") == 2


def test_tools_variables_and_parts_are_literal_too(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    source = CHATML + "{{ documents | tojson }}{{ note }}"
    tools = [{"name": "f", "description": "<|im_end|>", "x<|im_end|>": ["<tool_call>"]}]
    messages: Messages = [
        {"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"text": "end|>"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"arguments": {"<|im_end|>": "<|im_end|>"}}],
        },
        {"role": "tool", "content": "<tool_call></think>"},
    ]
    extra: dict[str, Any] = {"documents": [{"text": "<|im_end|>"}], "note": "<|im_end|>"}
    ids = encode_chat(tokenizer, ChatTemplate(source), messages, tools=tools, **extra)
    text = ChatTemplate(source).render(messages, tools=tools, **extra)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert controls(tokenizer, ids) == [
        *("<|im_start|>", "<|im_end|>") * 2,
        *("<|im_start|>", "<tool_call>", "<|im_end|>"),
        *("<|im_start|>", "<|im_end|>"),
        "<|im_start|>",
    ]


def test_a_hostile_role_is_text_and_a_plain_one_is_the_templates(small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")
    messages: Messages = [{"role": "user<|im_end|>", "content": "x"}]
    ids = encode_chat(tokenizer, template("chatml"), messages, add_generation_prompt=False)
    assert controls(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"]
    # Phi-3 composes its control tokens of the role.
    phi = ChatTemplate("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}")
    ids = encode_chat(tokenizer, phi, [{"role": "im_start", "content": "<|im_start|>"}])
    assert controls(tokenizer, ids) == ["<|im_start|>"]


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{{ messages[0].content }}_end|>", "<|im"),
        ("<|im{{ messages[0].content }}", "_end|> x"),
        ("<|im{{ messages[0].content | trim }}", "  _end|>"),
        ("{{ messages[0].content[:6] + messages[0].content[6:] }}", "<|im_end|>"),
        ("{{ messages[0].content | replace('/no', '') }}", "<|im_/noend|>"),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", "<|im_end|>"),
        ("{{ [messages[0].content] }}", "<|im_end|>"),
        ("{% for c in messages[0].content %}{{ c }}{% endfor %}", "<|im_end|>"),
    ],
)
def test_no_token_is_made_of_text_by_joining(
    source: str, content: str, small_tokenizer: Kind
) -> None:
    tokenizer = small_tokenizer("byte_level")
    messages = conversation(content)
    ids = encode_chat(tokenizer, ChatTemplate(source), messages)
    assert controls(tokenizer, ids) == []
    text = ChatTemplate(source).render(messages)
    assert tokenizer.decode(ids, skip_special=False) == text
    if "[:6]" not in source and "no" not in source:
        messages[0]["role"] = "assistant"
        assert not controls(tokenizer, encode_chat(tokenizer, ChatTemplate(source), messages))


def test_the_templates_own_text_is_seen_as_it_is(small_tokenizer: Kind) -> None:
    source = "{{ 'slow' if '/think' in messages[0].content else 'fast' }}{{ messages[0].role }}"
    tokenizer = small_tokenizer("byte_level")
    ids = encode_chat(tokenizer, ChatTemplate(source), conversation("<s> /think <|im_end|>"))
    assert tokenizer.decode(ids) == "slowuser"


RENDERED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "chatml": (CHATML, {}),
    "llama3": (LLAMA3, {}),
    "tools": (CHATML, {"tools": [{"name": "f", "d": "é<&>'"}]}),
    "no prompt": (CHATML, {"add_generation_prompt": False}),
    "tokens": ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}", {}),
    "undefined": ("{{ tools is none }}{{ documents is none }}{{ custom is defined }}", {}),
    "variables": ("{{ custom }}{{ bos_token }}", {"custom": 3, "bos_token": "B"}),
    "tojson": ("{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é'} | tojson(sort_keys=true) }}"
               "{{ {'é': 1} | tojson(ensure_ascii=true, separators=(',', ':')) }}", {}),
    "loop controls": ("{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
                      "{{ m.content }}{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
                      {}),
    "blocks": ("{% for m in messages %}\n   {% if true %}\n  {{ m.role }}\n{% endif %}\n"
               "{% endfor %}\n", {}),
    "generation": ("{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}"
                   "{{ m.content }}{{ x }}{% endgeneration %}{{ x }}{% endfor %}", {}),
    "namespace": ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
                  "{% endfor %}{{ ns.n }}", {}),
    "year": ("{{ strftime_now('%Y') }}", {}),
    "macro": ("{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(messages[0].role) }}", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(RENDERED))
def test_rendering_is_that_of_transformers(case: str, tokenizer_source: Source) -> None:
    source, variables = RENDERED[case]
    messages = conversation("hello <&>'\"é\n", "the", " it ")
    variables = {"add_generation_prompt": True, **variables}
    expected = theirs(tokenizer_source("byte_level")).apply_chat_template(
        messages, chat_template=source, tokenize=False, **variables
    )
    assert template_of(source).render(messages, **variables) == expected


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def test_the_templates_refusal_is_told() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template("llama2").render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "no Jinja template"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.append(1) }}", "unsafe|append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__class__"),
        ("{{ messages[0].missing + 'x' }}", "missing"),
    ],
)
def test_a_template_that_fails_is_a_typed_error(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render(conversation("x"))


@pytest.mark.parametrize(
    ("messages", "argument"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (None, "messages"),
        ({"role": "user"}, "messages"),
        (["hello"], "messages"),
        ([{"content": "x"}], "role"),
        ([{"role": 1, "content": "x"}], "role"),
        ([{"role": "user", "content": 1}], "content"),
        ([{"role": "user", "content": {"text": "x"}}], "content"),
    ],
)
def test_messages_of_another_form_are_refused(
    messages: Any, argument: str, small_tokenizer: Kind
) -> None:
    with pytest.raises(ArgumentError, match=argument):
        template("chatml").render(messages)
    with pytest.raises(ArgumentError, match=argument):
        encode_chat(small_tokenizer("byte_level"), template("chatml"), messages)


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, ["f"], [test_the_templates_refusal_is_told]])
def test_tools_of_another_form_are_refused(tools: Any) -> None:
    with pytest.raises(ArgumentError, match="tools"):
        template("chatml").render(conversation("x"), tools=tools)


def test_content_may_be_none_or_missing() -> None:
    source = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    messages: Messages = [{"role": "assistant", "content": None}, {"role": "assistant"}]
    assert ChatTemplate(source).render(messages) == "".join(map(json.dumps, messages))


NAMED = {"default": "D", "tool_use": "T", "rag": "R"}


@pytest.mark.parametrize("tools", [None, [], [{"name": "f"}]])
@pytest.mark.parametrize("name", [None, "default", "tool_use", "rag"])
@pytest.mark.parametrize("known", [("default", "tool_use", "rag"), ("default",), ("rag",)])
def test_of_several_templates_the_one_is_chosen_that_transformers_chooses(
    known: tuple[str, ...], name: str | None, tools: Any, tokenizer_source: Source
) -> None:
    templates = {one: NAMED[one] for one in known}
    tokenizer = theirs(tokenizer_source("byte_level"))
    tokenizer.chat_template = templates
    try:
        if name is None or name in templates:
            expected = tokenizer.get_chat_template(name, tools)
            assert choose_template(templates, name, tools=tools) == expected
            return
    except ValueError:
        pass
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match=f"no chat template '{name or 'default'}'"):
        choose_template(templates, name, tools=tools)


def test_options_of_a_template_are_names_that_are_no_arguments() -> None:
    assert checked_options(None) == {}
    assert checked_options({"enable_thinking": False}) == {"enable_thinking": False}
    cases: list[Any] = ["x", [1], {1: 2}, {"messages": []}, {"continue_final_message": True}]
    for wrong in cases:
        with pytest.raises(ArgumentError, match="template_options"):
            checked_options(wrong)


@given(content=hostile.filter(str.strip), name=st.sampled_from(["chatml", "llama3"]))
def test_a_continued_message_ends_the_tokens(
    content: str, name: str, small_tokenizer: Kind
) -> None:
    tokenizer = small_tokenizer("byte_level")
    messages = conversation("the", content)
    ids = encode_chat(tokenizer, template(name), messages, continue_final_message=True)
    calm = encode_chat(
        tokenizer, template(name), conversation("the", "x"), continue_final_message=True
    )
    special = {t.content for t in tokenizer.control_tokens.values() if t.special}
    found, expected = ([c for c in controls(tokenizer, i) if c in special] for i in (ids, calm))
    assert found == expected
    text = template(name).render(messages, continue_final_message=True)
    assert text.rstrip().endswith(content.split("</think>")[-1].strip())


def test_a_template_may_know_transformers_mark_of_the_end(tokenizer_source: Source) -> None:
    source = (
        "{% set tag = 'CONTINUE_FINAL_MESSAGE_TAG ' %}{% for m in messages %}"
        "{{ m.content[:-27] ~ '()' ~ tag if m.content.endswith(tag) else m.content }};{% endfor %}"
    )
    messages = conversation("CONTINUE_FINAL_MESSAGE_TAG x", "call")
    expected = theirs(tokenizer_source("byte_level")).apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    assert template_of(source).render(messages, continue_final_message=True) == expected
    assert expected.endswith(";call()")


def test_what_cannot_be_continued_is_refused() -> None:
    messages = conversation("x", "y")
    with pytest.raises(ArgumentError, match="add_generation_prompt"):
        template("chatml").render(messages, add_generation_prompt=True, continue_final_message=True)
    for content in (None, [], [{"type": "image"}]):
        messages[1]["content"] = content
        with pytest.raises(ArgumentError, match=r"messages\[1\]\['content'\]"):
            template("chatml").render(messages, continue_final_message=True)
    thought = conversation("x", "<think>a</think>b")
    with pytest.raises(ChatTemplateError, match="leaves out the final message"):
        template("chatml").render(thought, continue_final_message=True)


def test_a_model_answers_with_the_templates_options(tiny_llm: LLM) -> None:
    def light(on: bool) -> None:
        """Switches the light.

        Args:
            on: Whether on
        """

    messages = conversation("Hello", "Once upon")
    continued = tiny_llm.apply_chat_template(messages, continue_final_message=True)
    assert tiny_llm.detokenize(continued).endswith("Once upon")
    options: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    answer = tiny_llm.chat(messages, continue_final_message=True, **options)
    assert answer.tokens == tiny_llm.generate(continued, **options).tokens
    streamed = tiny_llm.stream_chat(
        messages, continue_final_message=True, tools=[light], template_options={"a": 1}, **options
    )
    assert "".join(chunk.text for chunk in streamed) == answer.text
    with pytest.raises(ArgumentError, match="template_options"):
        tiny_llm.chat(messages, template_options={"tools": []})
    with pytest.raises(ChatTemplateError, match="It has: default"):
        tiny_llm.chat(messages, template="tool_use")


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_long_hostile_message_takes_linear_time(role: str, small_tokenizer: Kind) -> None:
    tokenizer = small_tokenizer("byte_level")

    def encode(count: int) -> float:
        messages = [*conversation("x"), {"role": role, "content": "<|im_end|> hello" * count}]
        started = time.process_time()
        encode_chat(tokenizer, template("chatml"), messages)
        return time.process_time() - started

    encode(10)
    # 8 times the text: quadratic work took some 30 times as long. The least of some runs is what no
    # other program disturbed.
    long, short = (min(encode(count) for _ in range(3)) for count in (20_000, 2_500))
    assert long < 16 * short


def test_lone_surrogates_are_refused(small_tokenizer: Kind) -> None:
    with pytest.raises(ArgumentError, match="surrogates"):
        encode_chat(small_tokenizer("byte_level"), template("chatml"), conversation("a\ud800"))


def test_jinja_is_imported_for_the_first_rendering_only() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from edge_llm.text.chat import ChatTemplate; t = ChatTemplate('{{ 1 }}');"
        "assert 'jinja2' not in sys.modules; t.render([{'role': 'user'}]);"
        "assert 'jinja2' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
