"""What templates of strangers may not do: read files, run code, go on for ever, fill the memory."""

from __future__ import annotations

import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_llm.errors import ChatTemplateError
from edge_llm.text.budget import weigh
from edge_llm.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
WORK = "does more work than"
BITS = "an integer of more than"
DEEP = "nests values more than"

LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"
LONG = "{% set s = 'a' * 300000 %}"
LIST = "{% set x = range(99999) | list %}"


def grow(first: str, step: str, *, times: int = 80) -> str:
    """A template that computes x from x, many times over."""
    return (
        f"{{% set ns = namespace(x={first}) %}}{{% for i in range({times}) %}}"
        f"{{% set ns.x = {step} %}}{END}"
    )


SHARED = grow("[1]", "[ns.x, ns.x]")
TUPLES = grow("(1,)", "(ns.x, ns.x)")

ENDLESS = {
    "loops": LOOP + LOOP + LOOP + END + END + END,
    "loops without a word": LOOP + LOOP + "{% if false %}x{% endif %}" + END + END,
    "loops over nothing": LOOP + "{% for j in range(99999) if false %}{% endfor %}" + END,
    "loops over letters": LONG + "{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "much text": LOOP + "x" * 60000 + END,
    "many statements": LOOP + "{% if false %}{% endif %}" * 2500 + END,
    "blocks": LOOP + "{% block a scoped %}" + LOOP + END + "{% endblock %}" + END,
    "a block's text": "{% block a %}" + "x" * 60000 + "{% endblock %}" + LOOP + "{{ self.a() }}"
    + END,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 60 + "x" + "{% endcall %}" * 60,
    "recursive loops": "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}"
    "{% endif %}{% endfor %}",
    "arguments": "{% macro f() %}{{ varargs | length }}{% endmacro %}" + LIST + LOOP
    + "{{ f(*x) }}" + END,
    "cycler": "{% set c = cycler(1, 2) %}" + LOOP + LOOP + "{{ c.next() }}" + END + END,
    "repeated text": "{{ 'a' * 10**9 }}",
    "repeated text, turned": "{{ 10**9 * 'a' }}",
    "repeated list": "{{ [1] * 10**9 }}",
    "added text": grow("'ab'", "ns.x + ns.x"),
    "joined text": grow("'ab'", "ns.x ~ ns.x"),
    "joined list": grow("'ab'", "[ns.x, ns.x] | join"),
    "joined by method": grow("'ab'", "ns.x.join([ns.x, ns.x])"),
    "added lists": grow("[1]", "ns.x + ns.x"),
    "percent": grow("'ab'", "'%s%s' % (ns.x, ns.x)"),
    "format filter": grow("'ab'", "'%s%s' | format(ns.x, ns.x)"),
    "format method": grow("'ab'", "'{0}{0}'.format(ns.x)"),
    "format_map": grow("'ab'", "'{a}{a}'.format_map({'a': ns.x})"),
    "format by attr": grow("'ab'", "('{0}{0}' | attr('format'))(ns.x)"),
    "replace method": grow("'ab'", "ns.x.replace('a', ns.x)"),
    "replace filter": grow("'ab'", "ns.x | replace('a', ns.x)"),
    "replace of nothing": LONG + "{{ s.replace('', s) }}",
    "capture": "{% set ns = namespace(x='ab') %}" + LOOP
    + "{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}" + END,
    "escaping": "{% autoescape true %}" + grow("'<'", "(ns.x | forceescape | string) ~ ns.x")
    + "{% endautoescape %}",
    "printed": SHARED + "{{ ns.x }}",
    "compared": SHARED + "{% set y = ns.x %}" + SHARED + "{{ ns.x == y }}",
    "searched": SHARED + "{% set y = ns.x %}" + SHARED + "{{ ns.x in [y] }}",
    "tested": SHARED + "{{ ns.x is upper }}",
    "as JSON": SHARED + "{{ ns.x | tojson }}",
    "as a name": SHARED + "{{ ns | attr(ns.x) }}",
    "as a reason": SHARED + "{{ raise_exception(ns.x) }}",
    "as a key": TUPLES + "{% set d = {ns.x: 1} %}",
    "as an index": TUPLES + "{{ {}[ns.x] }}",
    "as an argument": TUPLES + "{{ {}.get(ns.x) }}",
    "as an element": TUPLES + "{{ [ns.x] | unique | list }}",
    "dictionaries": grow("{}", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x ~ '' }}",
    "center filter": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**9) }}",
    "width": "{{ '{:1000000000}'.format(1) }}",
    "width in braces": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "precision": "{{ '{:.1000000000f}'.format(1.5) }}",
    "widths": "{{ ('{0:99999}' * 50000).format(1) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent key": "{{ '%((a))1000000000d' % {'(a)': 1} }}",
    "percent odd": "{{ '%1000000000d' is odd }}",
    "percent even": "{{ '%1000000000d' is even }}",
    "percent divisible": "{{ '%1000000000d' is divisibleby(3) }}",
    "percent select": "{{ ['%1000000000d'] | select('odd') | list }}",
    "percent many": LONG + "{{ ('%(a)s' * 50000) % {'a': s} }}",
    "map center": "{{ ['a'] | map('center', 10**9) | list }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "indent": "{{ ('a\n' * 10000) | indent(10**9) }}",
    "indent by text": LONG + "{{ ('a\n' * 10000) | indent(s) }}",
    "indented JSON": "{{ (range(9999) | list) | tojson(indent=10**9) }}",
    "separated JSON": LONG + "{{ (range(9999) | list) | tojson(separators=(s, s)) }}",
    "wordwrap": LONG + "{{ s | wordwrap(1) }}",
    "striptags": "{{ ('<!--a-->' * 100000) | striptags }}",
    "strip": LONG + "{{ s.strip('b' * 150000 + 'a') }}",
    "trim": LONG + "{{ s | trim('b' * 150000 + 'a') }}",
    "rfind": LONG + "{{ s.rfind('b' + 'a' * 150000) }}",
    "rsplit": LONG + "{{ s.rsplit('b' + 'a' * 150000) }}",
    "split": "{{ ('a ' * 5000000).split() | length }}",
    "splitlines": "{{ ('\n' * 5000000).splitlines() | length }}",
    "letters": "{{ ('ab' * 5000000) | list | length }}",
    "sum of lists": "{{ (range(99999) | batch(1) | list) | sum(start=[]) | length }}",
    "slices": LONG + LOOP + "{% set y = s[1:] %}" + END,
    "slices of lists": LIST + LOOP + "{% set y = x[::-1] %}" + END,
    "equal": LONG + "{% set t = s ~ 'b' %}{% set u = s ~ 'c' %}" + LOOP + "{{ t == u }}" + END,
    "in text": LONG + LOOP + "{{ 'b' in s }}" + END,
    "in a list": LIST + LOOP + "{{ 'b' in x }}" + END,
    "count": LONG + LOOP + "{{ s.count('b') }}" + END,
    "changed": LIST + LOOP + "{{ loop.changed(x) }}" + END,
    "select": LIST + LOOP + "{% set y = x | select('none') | list %}" + END,
    "views": "{% set d = {'a': 1} %}" + LOOP + LOOP + "{{ d.keys() - d.keys() }}" + END + END,
}  # fmt: skip

FORBIDDEN = {
    "{{ 2 ** 99999999999 }}": BITS,
    grow("2", "ns.x * ns.x"): BITS,
    grow("2", "ns.x + ns.x", times=20000): BITS,
    "{{ 1.5 | round(10**9, 'ceil') }}": BITS,
    "{{ 5 | round(precision=-10**9) }}": BITS,
    "{{ ('f' * 300000) | int(0, 16) }}": BITS,
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}": DEEP,
    grow("(1,)", "(ns.x,)", times=20000) + "{% set d = {ns.x: 1} %}": DEEP,
    grow("{}", "{'a': ns.x}.items()", times=20000): DEEP,
    grow("[1]", "ns.x | map('upper')"): "chains more than 50 filters",
    grow("[1]", "ns.x | map('upper')", times=40) + "{{ ns.x | list }}": "",  # allowed
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% block a %}{{ self.a() }}{% endblock %}": "recursion",
    "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}": "recursion",
    "{{ " + "1 + " * 10000 + "1 }}": "recursion",
    "{{ a" + ".b" * 30000 + " }}": "recursion",
    "{% if a %}" + "{% elif b %}" * 4500 + "{% endif %}": "recursion",
    "x" * 70000: "70000 characters",
    "{{ strftime_now('%c' * 10000) }}": "formats a date",
    "{{ 'a'.encode() }}": "may not call the method 'encode'",
    "{{ 'a'.translate({97: 'b'}) }}": "may not call the method 'translate'",
    "{{ (5).to_bytes(10**9, 'big') }}": "may not call the method 'to_bytes'",
    "{{ {}.fromkeys('ab') }}": "may not call the method 'fromkeys'",
    "{{ 'a.com' | urlize }}": "urlize",
    "{{ lipsum(10**6) }}": "lipsum",
    "{% include 'FILE' %}": "no loader",
    "{% include 'FILE' ignore missing %}": "no loader",
    "{% include ['FILE'] %}": "no loader",
    "{% import 'FILE' as m %}": "no loader",
    "{% from 'FILE' import a %}": "no loader",
    "{% extends 'FILE' %}": "no loader",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ ''['__class__']['__mro__'] }}": "unsafe",
    "{{ (''|attr('__class__')).__mro__ }}": "unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ raise_exception.__globals__.json }}": "unsafe",
    "{{ strftime_now.__code__.co_consts }}": "unsafe",
    "{{ self._TemplateReference__context.environment }}": "unsafe",
    "{% macro f() %}{% endmacro %}{{ f._environment.loader }}": "unsafe",
    "{{ (['a'] | map('upper'))._items.gi_frame }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ messages[0].update({}) }}": "unsafe",
    "{{ messages[0].pop('role') }}": "unsafe",
    "{{ ['', ''] | groupby('__class__.__mro__') }}": "unsafe",
    "{% autoescape 'a' | center(10**9) %}{% endautoescape %}": WORK,
    "{% filter center(10**9) %}x{% endfilter %}": WORK,
    "{% set x | center(10**9) %}x{% endset %}": WORK,
}


def render(source: str) -> str:
    return ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize("case", sorted(ENDLESS))
def test_endless_work_ends_soon(case: str) -> None:
    started = time.thread_time()
    with pytest.raises(ChatTemplateError, match=WORK):
        render(ENDLESS[case])
    # Most take a tenth of a second; the bound leaves room for a slow machine.
    assert time.thread_time() - started < 5


@pytest.mark.parametrize("source", sorted(FORBIDDEN), ids=lambda source: str(source)[:50])
def test_what_is_forbidden_is_a_typed_error(source: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary.txt"
    canary.write_text("the secret")
    if not FORBIDDEN[source]:
        assert render(source)
        return
    with pytest.raises(ChatTemplateError, match=FORBIDDEN[source]) as caught:
        render(source.replace("FILE", str(canary)))
    assert "the secret" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("source", ["{{ 'a' * 10**9 }}", "{{ 'a' | center(10**9) }}"])
def test_no_memory_is_taken_before_the_refusal(source: str) -> None:
    render("warm")
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


HONEST = {
    "{{ '{0.__class__}'.format('') }}{{ '' | attr('__class__') }}": "",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}": "",
    "{{ ['{0.__class__}'] | map('attr', 'format') | map('string') | list | length }}": "1",
    "{{ 'a' * 9 }}{{ 'b' * -1 }}{{ [1] * 2 }}{{ 2 ** 9 }}{{ 2 ** -1 }}": "aaaaaaaaa[1, 1]5120.5",
    "{{ '%5.1f|%-4s' % (1.25, 'a') }}|{{ '%(x)s' % {'x': 1} }}": "  1.2|a   |1",
    "{{ '%s %d' | format('a', 3) }}{{ '%(name)s' | format(name=2) }}": "a 32",
    "{{ '{:>5}|{x!r}|{0[0]}'.format('ab', x='c') }}": "   ab|'c'|a",
    "{{ 7 is odd }}{{ 8 is even }}{{ 9 is divisibleby 3 }}{{ 'a' is lower }}": "TrueTrueTrueTrue",
    "{{ 'a b'.split() | join('-') }}{{ '-'.join(['a', 'b']) }}": "a-ba-b",
    "{{ '-'.join('ab' | map('upper')) }}{{ 'ab' | map('upper') | join(d='+') }}": "A-BA+B",
    "{{ [3, 1] | sort }}{{ {'b': 1}.items() | list }}{{ [1, 2] | sum }}": "[1, 3][('b', 1)]3",
    "{% autoescape true %}{% set a = '<' %}{{ a ~ a }}{{ (a | safe) ~ a }}{% endautoescape %}":
        "&lt;&lt;<&lt;",
    "{{ 'x' if ['a'] | select('eq', 'b') else 'y' }}": "x",  # an iterator, as in jinja2
    "{{ 1 < 2 < 3 }}{{ 'a' in 'abc' not in 'x' }}{{ (1, 2) == (1, 2) }}": "TrueTrueTrue",
    "{% for k, v in {'a': 1, 'b': 2}.items() if v > 1 %}{{ loop.length }}{{ k }}{% endfor %}": "1b",
    "{% for x in [] %}{{ x }}{% else %}none{% endfor %}": "none",
    "{% for x in [[1, [2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}": "12",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}"
    "{% call f(1) %}x{% endcall %}": "12x",
    "{{ 'abcd'[1:][::-1] }}{{ [1, 2, 3][-1:] }}{{ {(1, 2): 3}[1, 2] }}": "dcb[3]3",
    "{{ 'a\tb'.expandtabs(4) }}{{ 'x'.center(3) }}{{ '7'.zfill(3) }}": "a   b x 007",
    "{{ '  a '.strip() }}{{ 'abca'.strip('a') }}{{ 'a,b,c'.rsplit(',', 1) }}": "abc['a,b', 'c']",
    "{{ 'a\nb' | indent(2, first=true) }}{{ 1.25 | round(1, method='floor') }}": "  a\n  b1.2",
    "{{ [1, 2, 3] | batch(2, fill_with=0) | list }}": "[[1, 2], [3, 0]]",
}  # fmt: skip


@pytest.mark.parametrize("source", sorted(HONEST))
def test_honest_work_is_jinjas(source: str) -> None:
    import jinja2.sandbox

    assert render(source) == HONEST[source]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    assert environment.from_string(source).render() == HONEST[source]


ATOMS = [
    "'ab'",
    "3",
    "1.5",
    "none",
    "x",
    "y",
    "[x, y]",
    "{'k': x}",
    "(x, 1)",
    "10**6",
    "range(999)",
    "-2",
]
FORMS = [
    "{} + {}", "{} * {}", "{} ~ {}", "{} % {}", "{} ** {}", "{} - {}", "{} // {}", "{} in {}",
    "{} == {}", "{} < {}", "{}[{}]", "{}[{}:]", "{} | join({})", "{} | replace('a', {})",
    "{} | center({})", "{} | indent({})", "{} | batch({}) | list", "{} | slice({}) | list",
    "{} | round({})", "{} | tojson(indent={})", "{} | sum(start={})", "{} | wordwrap({})",
    "{} | map('center', {}) | list", "{}.replace('a', {})", "{}.ljust({})", "{}.join({})",
    "{}.split({})", "{}.format({})", "{} is divisibleby {}", "{} | format({})", "{} | truncate({})",
    "{} | list | string ~ {}", "{} | trim({})", "{} | default({})", "{} | unique | list + {}",
]  # fmt: skip
expressions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.builds(
        lambda form, a, b: "(" + form.format(f"({a})", f"({b})") + ")",
        st.sampled_from([form.replace("{}", "{0}", 1).replace("{}", "{1}", 1) for form in FORMS]),
        inner,
        inner,
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(steps=st.lists(st.tuples(st.sampled_from("xy"), expressions), min_size=1, max_size=4))
def test_any_template_ends_in_text_or_a_typed_error(steps: list[tuple[str, str]]) -> None:
    body = "".join(f"{{% set ns.{name} = {value} %}}{{{{ ns.{name} }}}}" for name, value in steps)
    source = "{% set ns = namespace(x='ab', y=[1]) %}{% for i in range(99) %}" + body + END
    started = time.thread_time()
    try:
        text = render(source)
    except ChatTemplateError:
        text = ""
    assert len(text) < 8 << 20
    assert time.thread_time() - started < 5


def test_each_rendering_has_a_budget_of_its_own() -> None:
    """Three renderings, two of them at once, that together would spend more than one budget."""
    template = ChatTemplate("{% for i in range(20000) %}{% set x = [i] | list %}{% endfor %}ok")
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append(template.render(MESSAGES))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*results, template.render(MESSAGES)] == ["ok"] * 3
    with pytest.raises(ChatTemplateError, match=WORK):
        ChatTemplate(template.source * 3).render(MESSAGES)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": x}])
def test_messages_nested_in_themselves_are_a_typed_error(wrap: Any) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = wrap(deep)
    with pytest.raises(ChatTemplateError, match=DEEP):
        ChatTemplate("x").render([{"role": "user", "content": [deep]}])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ChatTemplateError, match=DEEP):
        ChatTemplate("x").render([{"role": "user", "content": loop}])


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=40)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(value=JSON, most=st.integers(0, 30))
def test_weighing(value: Any, most: int) -> None:
    """Additive over lists, proportional to text, and cut where it is told to."""
    whole = weigh(value)
    assert weigh([value, value]) == 1 + 2 * whole
    assert weigh({"k": value}) == 2 + whole
    assert (weigh(value, most=most) > most) == (whole > most)
    assert whole >= len(str(value)) // 2000
