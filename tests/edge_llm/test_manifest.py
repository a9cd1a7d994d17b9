"""The manifest is read strictly: whatever is not what the format says is named."""

from __future__ import annotations

import copy
import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_llm.errors import ManifestError, UnsupportedFormatError
from edge_llm.manifest import (
    FORMAT,
    LAYOUTS,
    STATE_KINDS,
    ChatTemplates,
    DecoderGraph,
    Dims,
    FileEntry,
    Manifest,
    Quality,
    Quantization,
    Source,
    StateTensor,
    TensorQuantization,
    Tokens,
)

Path = tuple[str | int, ...]


def example() -> Manifest:
    """A manifest in which no list, object or optional value is empty."""
    state = [
        StateTensor(
            input=f"past.0.{part}",
            output=f"present.0.{part}",
            dtype="float32",
            shape=("batch", 2, "capacity", 16),
            batch_axis=0,
            sequence_axis=2,
            shared=True,
            kind="window",
            window=8,
        )
        for part in ("key", "value")
    ]
    names = ("model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja")
    return Manifest(
        format=FORMAT,
        requires=(),
        min_onnxruntime="1.32",
        name="example",
        source=Source(architecture="llama", repo="org/example", revision="abc", license="mit"),
        dims=Dims(
            layers=1,
            hidden=32,
            intermediate=64,
            heads=4,
            kv_heads=2,
            head_dim=8,
            vocab=100,
            context=256,
            parameters=10_000,
        ),
        decoder=DecoderGraph(graph="model.onnx", layout="edge_llm.v1", state=tuple(state)),
        quantization=Quantization(
            method="rtn",
            bits=4,
            block=32,
            exceptions={"lm_head.weight": TensorQuantization(bits=8, block=32)},
        ),
        tokens=Tokens(bos=1, eos=(2, 3), pad=0, add_bos=True),
        sampling={"temperature": 0.6, "top_k": 40},
        tokenizer="tokenizer.json",
        chat=ChatTemplates(
            templates={"default": "chat_template.jinja"}, special_tokens={"bos_token": "<s>"}
        ),
        files={name: FileEntry(size=5, sha256="0" * 64) for name in names},
        quality=(Quality(metric="kld", data="books", reference=0.0, value=0.01),),
        producer={"edge-llm": "0.1.0"},
        info={"free": [1, None, {"nested": "Größe"}]},
    )


def document() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(example().to_json())
    return content


def dotted(path: Path) -> str:
    """A place as error messages name it: ``decoder.state[0].kind``."""
    text = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in path)
    return text.removeprefix(".")


def schema(hint: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every place of the example and the type that it must have, from the classes themselves."""
    yield path, hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        for field in dataclasses.fields(hint):
            yield from schema(hints[field.name], (*path, field.name))
    elif origin is tuple:
        yield from schema(arguments[0], (*path, 0))
    elif origin is Mapping and arguments[1] is not Any:
        yield from schema(arguments[1], (*path, next(iter(at(document(), path)))))


def at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def exists(path: Path) -> bool:
    try:
        at(document(), path)
    except IndexError:
        return False
    return True


PLACES = [(path, hint) for path, hint in schema(Manifest) if path and exists(path)]
OBJECTS = [
    path for path, hint in schema(Manifest) if dataclasses.is_dataclass(hint) and exists(path)
]
FIELDS = [
    (*path, field.name)
    for path, hint in schema(Manifest)
    if dataclasses.is_dataclass(hint) and exists(path)
    for field in dataclasses.fields(hint)
]


def refused(data: Any) -> str:
    """The message with which a manifest is refused."""
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(data if isinstance(data, str) else json.dumps(data))
    assert caught.value.remedy
    return caught.value.message


def test_the_schema_is_walked_as_a_whole() -> None:
    named = {dotted(path) for path in FIELDS}
    assert {"format", "decoder.state[0].kind", "files.model.onnx.sha256"} <= named
    assert {"quality[0].value", "quantization.exceptions.lm_head.weight.bits"} <= named
    assert len(FIELDS) > 50


def test_round_trip() -> None:
    text = example().to_json()
    assert Manifest.from_json(text) == example()
    assert Manifest.from_json(text).to_json() == text
    assert text.endswith("}\n")
    assert "Größe" in text


QUALITY_EXTRAS = ("standard_error", "sha256", "tokens", "window", "stride")
OPTIONAL = {("info",), ("target",), ("decoder", "state", 0, "window")} | {
    ("quality", 0, name) for name in QUALITY_EXTRAS
}


@pytest.mark.parametrize("path", [path for path in FIELDS if path not in OPTIONAL], ids=dotted)
def test_a_missing_key_is_named(path: Path) -> None:
    data = document()
    del at(data, path[:-1])[path[-1]]
    message = refused(data)
    if path == ("format",):
        assert message.startswith("format must be")
    else:
        assert message == f"{dotted(path)} is missing."


def test_what_came_later_may_be_left_out() -> None:
    data = document()
    del data["info"]
    for figure in data["quality"]:
        for name in QUALITY_EXTRAS:
            del figure[name]
    for state in data["decoder"]["state"]:
        del state["window"]
        state["kind"] = "kv"
    manifest = Manifest.from_json(json.dumps(data | {"format": "1.0"}))
    assert manifest.info == {}
    assert [state.window for state in manifest.decoder.state] == [None, None]


@pytest.mark.parametrize("path", OBJECTS, ids=dotted)
def test_an_unknown_key_is_named(path: Path) -> None:
    data = document()
    at(data, path)["surprise"] = 1
    assert refused(data).startswith(f"{dotted((*path, 'surprise'))} is a key that this format")


def wrong_values(hint: Any) -> Iterator[Any]:
    """JSON values that the type excludes; booleans are no numbers, numbers no strings."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    allowed = arguments if origin is types.UnionType else (hint,)
    for value in (True, 3, 1.5, "text", None, ["x"], {"x": None}):
        fits = type(value) in allowed or (type(value) is int and float in allowed)
        fits |= value is None and types.NoneType in allowed
        if origin is tuple and isinstance(value, list):
            continue  # wrong one level down, which is a place of its own
        if isinstance(value, dict) and (origin is Mapping or dataclasses.is_dataclass(hint)):
            continue
        if not fits:
            yield value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(path, value, id=f"{dotted(path)}={value!r}")
        for path, hint in PLACES
        for value in wrong_values(hint)
    ],
)
def test_a_wrong_type_is_named(path: Path, value: Any) -> None:
    data = document()
    at(data, path[:-1])[path[-1]] = value
    message = refused(data)
    assert message.startswith(f"{dotted(path)} must be ")
    assert f"got {value!r}." in message


def test_types_are_told_in_words() -> None:
    for key, words in (("sampling", "an object"), ("requires", "a list"), ("name", "str")):
        assert refused(document() | {key: 7}) == f"{key} must be {words}, got 7."


@pytest.mark.parametrize("version", ["2.0", "2.7", "10.0"])
def test_a_newer_major_is_refused(version: str) -> None:
    # Whatever else is new in it: the version is looked at first.
    data = {"format": version, "surprise": 1}
    with pytest.raises(UnsupportedFormatError, match=f"format {version}.*Upgrade edge-llm"):
        Manifest.from_json(json.dumps(data))


def test_an_older_major_is_refused() -> None:
    with pytest.raises(UnsupportedFormatError, match="Export the bundle again"):
        Manifest.from_json(json.dumps(document() | {"format": "0.9"}))


def test_a_newer_minor_is_read_where_its_keys_are_known() -> None:
    manifest = Manifest.from_json(json.dumps(document() | {"format": "1.7"}))
    assert manifest.format == "1.7"
    assert "surprise" in refused(document() | {"format": "1.7", "surprise": 1})


@pytest.mark.parametrize(
    "version",
    [
        *("", "1", "1.", ".1", "1.0.0", "1.0 ", " 1.0", "1.0\n", "v1.0", "-1.0", "1.x", "²", "1.²"),
        *("².0", "١.٠", "9" * 5000 + ".0", 1.0, 1, None, ["1", "0"], {"major": 1}),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_malformed_version_is_refused(version: Any) -> None:
    assert refused(document() | {"format": version}).startswith('format must be "major.minor"')


def test_an_unknown_requirement_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"'telepathy'.*Upgrade"):
        Manifest.from_json(json.dumps(document() | {"requires": ["telepathy"]}))
    # Before the keys are looked at, which the same newer format may have brought.
    with pytest.raises(UnsupportedFormatError, match="'telepathy'"):
        Manifest.from_json(json.dumps({"format": FORMAT, "requires": ["telepathy"]}))
    odd: Any
    for odd in ([[]], [{}], [None], [1]):
        assert refused(document() | {"requires": odd}).startswith("requires[0] must be str")


def test_info_is_kept_and_never_interpreted() -> None:
    info = {"format": "99.0", "requires": ["x"], "deep": [[[{"a": None}]]], "n": -1.5, "": True}
    manifest = Manifest.from_json(json.dumps(document() | {"info": info}))
    assert manifest.info == info
    assert Manifest.from_json(manifest.to_json()).info == info


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "7", "\ufeff{}", "{'a': 1}", "[" * 100_000]
)
def test_what_is_no_json_object_is_refused(text: str) -> None:
    message = refused(text)
    assert message.startswith("manifest.json ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("key", ["sampling", "info"])
def test_numbers_that_json_does_not_have_are_refused(number: str, key: str) -> None:
    data = document() | {key: {"temperature": "HERE"}}
    assert number in refused(json.dumps(data).replace('"HERE"', number))


def test_numbers_that_json_does_not_have_are_never_written() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            dataclasses.replace(example(), sampling={"temperature": value}).to_json()


def test_a_key_that_stands_twice_is_refused() -> None:
    text = example().to_json().replace('"name":', '"name": "other", "name":', 1)
    assert "'name' twice" in refused(text)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../up",
        "a/../../up",
        "a/..",
        "C:/x",
        "C:x",
        "a\\b",
        "//host/x",
    ],
)
def test_files_lie_inside_the_bundle(path: str) -> None:
    data = document()
    data["files"][path] = {"size": 1, "sha256": "0" * 64}
    assert refused(data) == f"files: {path!r} is not a relative path inside the bundle."


@pytest.mark.parametrize(
    ("where", "key"),
    [(("decoder",), "graph"), ((), "tokenizer"), (("chat", "templates"), "default")],
)
def test_files_that_are_used_must_be_listed(where: Path, key: str) -> None:
    data = document()
    at(data, where)[key] = "elsewhere.bin"
    assert refused(data) == "files does not list 'elsewhere.bin', which is used."


def test_an_unknown_layout_is_refused() -> None:
    data = document()
    data["decoder"]["layout"] = "edge_llm.v2"
    with pytest.raises(UnsupportedFormatError, match=r"decoder\.layout.*'edge_llm.v2'"):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("kind", "recurrent", UnsupportedFormatError),
        ("dtype", "float31", UnsupportedFormatError),
        ("batch_axis", -1, ManifestError),
        ("batch_axis", 1, ManifestError),
        ("sequence_axis", 0, ManifestError),
        ("sequence_axis", 4, ManifestError),
        ("shape", [], ManifestError),
        ("shape", ["batch", 0, "capacity", 16], ManifestError),
        ("shape", ["batch", "heads", "capacity", 16], ManifestError),
        ("shape", ["capacity", 2, "batch", 16], ManifestError),
        ("shared", False, ManifestError),
        ("window", 0, ManifestError),
        ("window", None, ManifestError),
    ],
)
def test_state_is_checked(key: str, value: Any, error: type[Exception]) -> None:
    data = document()
    data["decoder"]["state"][1][key] = value
    with pytest.raises(error, match=r"^decoder\.state\[1\]\."):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Dims)])
def test_sizes_are_positive(name: str) -> None:
    for value in (0, -1):
        data = document()
        data["dims"][name] = value
        assert refused(data) == f"dims.{name} must be at least 1, got {value}."


def test_state_is_shared_as_the_layout_says_and_a_window_has_its_kind() -> None:
    data = document()
    data["decoder"]["state"][1] |= {"kind": "kv"}
    assert refused(data) == (
        "decoder.state[1].window must be left out where the kind is 'kv', got 8."
    )
    data["decoder"]["state"][1] |= {"window": None}
    Manifest.from_json(json.dumps(data))
    data["decoder"]["layout"] = "standard.v1"
    assert refused(data) == "decoder.state[0].shared must be False in this layout, got True."
    for state in data["decoder"]["state"]:
        state["shared"] = False
    Manifest.from_json(json.dumps(data))


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(1, 2**40)
ids = st.integers(-(2**31), 2**31)
reals = st.floats(allow_nan=False, allow_infinity=False) | ids
paths = st.text("abcxyz._-", min_size=1, max_size=8).filter(lambda path: path.strip("."))
json_values = st.recursive(
    st.none() | st.booleans() | ids | reals | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def states(draw: st.DrawFn, *, shared: bool) -> StateTensor:
    kind = draw(st.sampled_from(STATE_KINDS))
    sizes: list[int | str] = ["batch", "capacity", *draw(st.lists(counts, max_size=3))]
    shape = draw(st.permutations(sizes))
    return StateTensor(
        input=draw(names),
        output=draw(names),
        dtype=draw(st.sampled_from(["float32", "float16", "int8"])),
        shape=tuple(shape),
        batch_axis=shape.index("batch"),
        sequence_axis=shape.index("capacity"),
        shared=shared,
        kind=kind,
        window=draw(counts) if kind == "window" else None,
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    graph, tokenizer = draw(paths), draw(paths)
    layout, shared = draw(st.sampled_from(sorted(LAYOUTS.items())))
    templates = draw(st.dictionaries(names, paths, max_size=3))
    files = {graph, tokenizer, *templates.values(), *draw(st.lists(paths, max_size=3))}
    exceptions = st.builds(TensorQuantization, bits=counts, block=st.none() | counts)
    text = st.dictionaries(names, names, max_size=3)
    dims = draw(st.builds(Dims, **{one.name: counts for one in dataclasses.fields(Dims)}))
    token_ids = st.integers(0, dims.vocab - 1)
    return Manifest(
        format=draw(st.sampled_from(["1.0", "1.3"])),
        requires=(),
        min_onnxruntime=draw(names),
        name=draw(names),
        source=draw(
            st.builds(
                Source,
                architecture=names,
                repo=st.none() | names,
                revision=st.none() | names,
                license=st.none() | names,
            )
        ),
        dims=dims,
        decoder=DecoderGraph(
            graph=graph,
            layout=layout,
            state=tuple(draw(st.lists(states(shared=shared), max_size=3))),
        ),
        quantization=draw(
            st.builds(
                Quantization,
                method=names,
                bits=counts,
                block=st.none() | counts,
                exceptions=st.dictionaries(names, exceptions, max_size=3),
            )
        ),
        tokens=Tokens(
            bos=draw(st.none() | token_ids),
            eos=tuple(draw(st.lists(token_ids, max_size=3))),
            pad=draw(st.none() | token_ids),
            add_bos=draw(st.booleans()),
        ),
        sampling=draw(st.dictionaries(names, reals, max_size=3)),
        tokenizer=tokenizer,
        chat=ChatTemplates(templates=templates, special_tokens=draw(text)),
        files={name: FileEntry(size=draw(counts), sha256=draw(names)) for name in sorted(files)},
        quality=tuple(
            draw(
                st.lists(
                    st.builds(
                        Quality,
                        metric=names,
                        data=names,
                        reference=reals,
                        value=reals,
                        standard_error=st.none() | reals,
                        sha256=st.none() | names,
                        tokens=st.none() | counts,
                        window=st.none() | counts,
                        stride=st.none() | counts,
                    ),
                    max_size=2,
                )
            )
        ),
        producer=draw(text),
        info=draw(st.dictionaries(names, json_values, max_size=3)),
    )


@given(manifests())
def test_any_manifest_survives_a_round_trip(manifest: Manifest) -> None:
    text = manifest.to_json()
    again = Manifest.from_json(text)
    assert again == manifest
    assert again.to_json() == text


@given(st.data())
def test_any_damage_is_a_typed_error(data: st.DataObject) -> None:
    content = copy.deepcopy(document())
    path = data.draw(st.sampled_from([path for path, _ in PLACES]))
    at(content, path[:-1])[path[-1]] = data.draw(json_values)
    try:
        manifest = Manifest.from_json(json.dumps(content))
    except (ManifestError, UnsupportedFormatError):
        return
    assert json.loads(manifest.to_json()) == content  # the drawn value happened to be right


@pytest.mark.parametrize("key", ["bos", "pad", "eos"])
@pytest.mark.parametrize("token", [-1, 100])
def test_tokens_are_ids_of_the_vocabulary(key: str, token: int) -> None:
    data = json.loads(example().to_json())
    data["tokens"][key] = [token] if key == "eos" else token
    with pytest.raises(ManifestError, match=f"ids from 0 to 99, got {token}"):
        Manifest.from_json(json.dumps(data))


def test_a_file_without_a_hash_is_refused() -> None:
    """Only what is derived in memory may lack it."""
    manifest = dataclasses.replace(
        example(), files={name: FileEntry(size=1, sha256=None) for name in example().files}
    )
    with pytest.raises(ManifestError, match=r"files\.[^ ]+\.sha256 must be str, got None"):
        Manifest.from_json(manifest.to_json())
