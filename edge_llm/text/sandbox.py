"""Renders Jinja templates of strangers: they read no file, run no code and end soon.

Jinja's own sandbox keeps a template from Python. What it does not bound is work: loops in loops,
`'a' * 10**9`, `'a' | center(10**9)`, `10**10**10`. Here everything that can take long pays from
the rendering's budget before it is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg, pass_context
from jinja2.visitor import NodeTransformer

from edge_llm.errors import ChatTemplateError
from edge_llm.text import costs
from edge_llm.text.budget import CHARACTERS, Budget, check_bits

__all__ = ["render"]

# Twelve times the longest template that the well-known models come with.
LONGEST_SOURCE = 1 << 16
LONGEST_DATE_FORMAT = 100

# They read no more of their argument than one item, or its length.
_FREE_FILTERS = frozenset({"abs", "count", "d", "default", "first", "last", "length"})
_COMPARING_TESTS = "in lower upper == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le"
_SCOPE = ("_block_vars", "_loop_vars")  # arguments that jinja2 adds to calls, for itself
_DEEPEST_CHAIN = 50  # of filters that each wait for the next; Python would end at about 300

_budget: ContextVar[Budget] = ContextVar("budget")

N = TypeVar("N", bound=nodes.Node)


def render(source: str, variables: dict[str, Any]) -> str:
    """The text that a template makes.

    Args:
        source: The template.
        variables: What it may read.

    Raises:
        ChatTemplateError: It is no Jinja template, it fails, or it works too much.
        Exception: What Python raises in the template's expressions.
    """
    template = _compiled(source)
    token = _budget.set(Budget(variables))
    try:
        return template.render(variables)
    finally:
        _budget.reset(token)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > LONGEST_SOURCE:
        raise ChatTemplateError(
            f"The chat template has {len(source)} characters; at most {LONGEST_SOURCE} are read."
        )
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise ChatTemplateError(f"The chat template is no Jinja template: {error}") from error


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    """The sandbox, with the filters and globals that transformers gives to templates.

    Source: transformers.utils.chat_template_utils, `_compile_jinja_template`.
    """
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        finalize=_paid_output,
        optimized=False,  # it would do the work before there is a budget
    )
    environment.filters["tojson"] = _tojson
    # For web pages: regular expressions of cubic time, and random filler.
    del environment.filters["urlize"], environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    for name, function in environment.filters.items():
        if name not in _FREE_FILTERS:
            environment.filters[name] = _paid_filter(name, function)
    tests: dict[str, Any] = environment.tests
    tests |= {name: _paid_test(tests[name]) for name in _COMPARING_TESTS.split()}
    # `'%9999999999d' is odd` would format.
    tests["divisibleby"] = lambda value, num: _operate("%", value, num) == 0
    tests["even"] = lambda value: _operate("%", value, 2) == 0
    tests["odd"] = lambda value: _operate("%", value, 2) == 1
    environment.filters |= {
        _TICK: _tick,
        _READ: _paid_read,
        _SLICE: _paid_slice,
        _JOIN: _paid_join,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model wrote, for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that jinja2 reads

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > LONGEST_DATE_FORMAT:
        raise ChatTemplateError(
            f"The chat template formats a date by more than {LONGEST_DATE_FORMAT} characters."
        )
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which operators, calls and methods pay."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Paying(self).visit(source), *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return _operate(operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            _budget.get().weigh(argument)  # a tuple's hash is computed anew each time
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatting = super().wrap_str_format(value)
        if formatting is None:
            return None

        @wraps(formatting)
        def paid(*args: Any, **kwargs: Any) -> str:
            _budget.get().spend(costs.brace_format(value.__self__, args, kwargs))
            return formatting(*args, **kwargs)

        return paid

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend(5 + len(args) + len(kwargs))
        if isinstance(function, (Macro, LoopContext, BlockReference)):
            text = super().call(context, function, *args, **kwargs)
            budget.spend(len(text) // CHARACTERS)
            return text
        if costs.is_join(function) and args:
            args = (list(args[0]), *args[1:])
        own = {name: value for name, value in kwargs.items() if name not in _SCOPE}
        if args or own:
            budget.weigh((args, own))
        budget.spend(costs.call(function, args, own))
        result = super().call(context, function, *args, **kwargs)
        budget.weigh(result)
        return result


def _operate(operator: str, left: Any, right: Any) -> Any:
    """A binary operator, paid for."""
    budget = _budget.get()
    if type(left) is str and type(right) is str and operator == "+":
        budget.spend(1 + (len(left) + len(right)) // CHARACTERS)
        return left + right
    budget.weigh(left)
    budget.weigh(right)
    budget.spend(costs.operator(operator, left, right))
    result = ImmutableSandboxedEnvironment.default_binop_table[operator](left, right)
    if isinstance(result, int):
        check_bits(result.bit_length())
    return result


def _paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its arguments, for what it makes of them, and for its result."""
    passed = _PassArg.from_obj(function)

    @pass_context  # which also keeps it from being called while the template is compiled
    def paid(context: Context, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        value = args[0]
        if name == "join" and isinstance(value, Iterator):
            args = (value := list(value), *args[1:])
        budget.spend(4)
        budget.weigh((args, kwargs) if len(args) > 1 or kwargs else value)
        budget.spend(costs.filtering(name, *args, **kwargs))
        if passed is _PassArg.context:
            args = (context, *args)
        elif passed is _PassArg.eval_context:
            args = (context.eval_ctx, *args)
        elif passed is _PassArg.environment:
            args = (context.environment, *args)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _Items(result, value)
        budget.weigh(result)
        return result

    return paid


def _paid_test(function: Callable[..., Any]) -> Callable[..., Any]:
    def paid(*args: Any, **kwargs: Any) -> Any:
        _budget.get().weigh((args, kwargs))
        return function(*args, **kwargs)

    return paid


class _Items:
    """What a filter gives one by one; each item pays."""

    __slots__ = ("_depth", "_items")

    def __init__(self, items: Iterator[Any], source: Any) -> None:
        self._items = items
        self._depth: int = source._depth + 1 if isinstance(source, _Items) else 1
        if self._depth > _DEEPEST_CHAIN:
            raise ChatTemplateError(
                f"The chat template chains more than {_DEEPEST_CHAIN} filters without a list."
            )

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> Any:
        _budget.get().spend(2)
        return next(self._items)


# Names of filters that no template can spell.
_TICK, _READ, _SLICE, _JOIN = "pays body", "pays reading", "pays slice", "pays join"


@pass_context
def _tick(_: Context, units: int) -> bool:
    _budget.get().spend(units)
    return True


@pass_context
def _paid_read(_: Context, value: Any) -> Any:
    _budget.get().weigh(value)
    return value


@pass_context
def _paid_slice(_: Context, value: Any) -> Any:
    _budget.get().spend(costs.shallow(value))
    return value


@pass_context
def _paid_join(context: Context, values: list[Any]) -> str:
    _budget.get().weigh(values)
    return markup_join(values) if context.eval_ctx.autoescape else str_join(values)


@pass_context
def _paid_output(_: Context, value: Any) -> Any:
    _budget.get().weigh(value)
    return value


class _Paying(NodeTransformer):
    """Puts payment into what the environment's own methods do not see.

    Before::

        {% for m in messages %}{{ a ~ b }}{{ c == d }}{{ e[1:] }}{% endfor %}

    After::

        {% for m in messages %}{{ 3 | pays body }}{{ [a, b] | pays join }}
        {{ c | pays reading == d | pays reading }}{{ e[1:] | pays slice }}{% endfor %}
    """

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment
        self._size = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._size += 1
        return super().visit(node, *args, **kwargs)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        self._size += len(node.data)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        tick = self._body(node)
        if node.test is not None:
            node.test = self._placed(nodes.And(tick, node.test), node)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self._body(node)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self._body(node)
        return node

    def visit_Block(self, node: nodes.Block) -> nodes.Node:  # noqa: N802
        self._body(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes), _JOIN, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = [node.expr, *(operand.expr for operand in node.ops)]
        inside = any(operand.op in ("in", "notin") for operand in node.ops)
        # A comparison with a constant is over at the constant's end, and so is a search in it.
        if any(isinstance(part, nodes.Const) for part in (parts[1:] if inside else parts)):
            return node
        node.expr = self._filter(node.expr, _READ, node)
        for operand in node.ops:
            operand.expr = self._filter(operand.expr, _READ, node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(node, _SLICE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = self._filter(node.key, _READ, node)
        return node

    def _body(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Filter:
        """Lets each run of a body pay for its nodes and its text."""
        before = self._size
        self.generic_visit(node)
        units = 1 + (self._size - before) // CHARACTERS
        tick = self._filter(nodes.Const(units), _TICK, node)
        node.body.insert(0, self._placed(nodes.ExprStmt(tick), node))
        return tick

    def _filter(self, value: nodes.Expr, name: str, near: nodes.Node) -> nodes.Filter:
        return self._placed(nodes.Filter(value, name, [], [], None, None), near)

    def _placed(self, node: N, near: nodes.Node) -> N:
        node.set_lineno(near.lineno)
        node.set_environment(self._environment)
        return node
