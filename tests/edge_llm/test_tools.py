from __future__ import annotations

from collections.abc import Callable
from typing import Any, Dict, List, Literal, Optional, Tuple, Union  # noqa: UP035

import pytest

from edge_llm.errors import ArgumentError
from edge_llm.text.chat import ChatTemplate
from edge_llm.text.tools import function_schema

Function = Callable[..., Any]


def plain(city: str, days: int = 3, exact: bool = False, scale: float = 1.0) -> str:
    """The weather.

    Over two paragraphs,
    as it is.

    Args:
        city: Where. "Quotes": and colons too.
        days: How many days,
            over two lines.

        exact: After a blank line
        scale: Of it

    Returns:
        A line of text

    Raises:
        ValueError: There is no such city.
    """
    return city + str((days, exact, scale))


def containers(
    a: list[str],
    b: dict[str, int],
    c: tuple[int, str],
    d: list[list[float]],
    e: List[int],  # noqa: UP006
    f: Dict[str, Any],  # noqa: UP006
    g: Tuple[bool, int],  # noqa: UP006
    h: list,  # type: ignore[type-arg]
    i: dict[str, list[int]],
    j: Any,
) -> dict[str, Any]:
    """Containers.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
    """
    return {str(key): value for key, value in enumerate((a, b, c, d, e, f, g, h, i, j))}


def unions(
    a: int | None,
    b: Optional[str],  # noqa: UP045
    c: int | str,
    d: Union[list[int], str, None],  # noqa: UP007
    e: Literal["x", "y"],
    f: Literal[1, "x", None] = 1,
    g: None = None,
) -> None:
    """Unions.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F (choices: ["tea ", "coffee"])
        g: G
    """


def nothing() -> None:
    """No arguments at all."""


def no_return(x: int):  # type: ignore[no-untyped-def]
    """No return.

    Args:
        x: X
    """


@pytest.mark.parametrize("function", [plain, containers, unions, nothing, no_return])
def test_schemas_are_those_of_transformers(function: Function) -> None:
    transformers = pytest.importorskip("transformers")
    assert function_schema(function) == transformers.utils.get_json_schema(function)
    messages = [{"role": "user", "content": "x"}]
    source = "{{ tools | tojson }}"
    rendered = ChatTemplate(source).render(messages, tools=[function, {"name": "g"}])
    tokenizer = transformers.utils.chat_template_utils
    (expected,), _ = tokenizer.render_jinja_template(
        [messages], tools=[function, {"name": "g"}], chat_template=source
    )
    assert rendered == expected


def no_doc(x: int) -> None: ...


def no_hint(x) -> None:  # type: ignore[no-untyped-def]
    """A.

    Args:
        x: X
    """


def no_description(x: int, y: int) -> None:
    """A.

    Args:
        x: X
    """


def one_tuple(x: tuple[int]) -> None:
    """A.

    Args:
        x: X
    """


def endless_tuple(x: tuple[int, ...]) -> None:
    """A.

    Args:
        x: X
    """


def a_set(x: set[int]) -> None:
    """A.

    Args:
        x: X
    """


def unknown(x: Nowhere) -> None:  # type: ignore[name-defined] # noqa: F821
    """A.

    Args:
        x: X
    """


def no_choices(x: str) -> None:
    """A.

    Args:
        x: X (choices: tea)
    """


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_doc, "docstring"),
        (no_hint, "x has no type hint"),
        (no_description, "do not describe y"),
        (one_tuple, "no type for"),
        (endless_tuple, "no type for"),
        (a_set, "no type for"),
        (unknown, "Nowhere"),
        (no_choices, "choices of x"),
    ],
)
def test_what_is_missing_is_named(function: Function, reason: str) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(Exception):  # noqa: B017, PT011 - there, each has another one
        transformers.utils.get_json_schema(function)
    with pytest.raises(ArgumentError, match=reason):
        ChatTemplate("").render([{"role": "user"}], tools=[function])


def test_a_bound_method_is_a_tool() -> None:
    class House:
        def light(self, on: bool) -> None:
            """Switches the light.

            Args:
                on: Whether on
            """

    text = ChatTemplate("{{ tools[0].function.parameters.properties }}").render(
        [{"role": "user"}], tools=[House().light]
    )
    assert text == "{'on': {'type': 'boolean', 'description': 'Whether on'}}"
