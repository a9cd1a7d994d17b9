"""The file of a decoder's state: what was written comes back, and no damage is missed."""

from __future__ import annotations

import hashlib
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_llm.caching.state_file import (
    ALIGNMENT,
    MAGIC,
    START,
    VERSION,
    DoubtfulFileError,
    SavedState,
    read_tokens,
    write_state,
)

OWNER = "0123456789abcdef"


def example(length: int, seed: int, dtype: str = "float32", *, window: int = 5) -> Any:
    """Tokens, and arrays of a whole cache and of a window."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2**31 - 1, length)
    arrays = {
        f"past.0.{name}": rng.integers(-100, 100, (2, positions, 6)).astype(dtype)
        for name, positions in (("key", length), ("value", min(window, length)))
    }
    return tokens, arrays


def check(
    saved: SavedState, tokens: NDArray[np.int64], arrays: dict[str, NDArray[np.generic]]
) -> None:
    np.testing.assert_array_equal(saved.tokens, tokens)
    assert list(saved.arrays) == list(arrays)
    for name, array in arrays.items():
        assert saved.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(saved.arrays[name], array)
        assert saved.arrays[name].ctypes.data % ALIGNMENT == 0
        assert not saved.arrays[name].flags.writeable


@settings(max_examples=50)
@given(
    st.integers(1, 300),
    st.integers(0, 2**32),
    st.sampled_from(["float32", "float16", "int8", "uint8"]),
)
def test_what_was_written_comes_back(length: int, seed: int, dtype: str) -> None:
    tokens, arrays = example(length, seed, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        # Views of a larger buffer, as a cache gives them.
        wider = {name: np.repeat(array, 2, axis=1)[:, ::2] for name, array in arrays.items()}
        write_state(path, OWNER, tokens, wider)
        np.testing.assert_array_equal(read_tokens(path, OWNER), tokens)
        saved = SavedState.open(path, OWNER)
        check(saved, tokens, arrays)
        saved.verify()
        shorter = max(1, length - 3)
        for name, array in saved.cut(shorter).items():
            held = arrays[name].shape[1]
            np.testing.assert_array_equal(array, arrays[name][:, : max(0, held - length + shorter)])


def opened(path: Path) -> SavedState:
    saved = SavedState.open(path, OWNER)
    saved.verify()
    return saved


@settings(max_examples=300)
@given(st.data())
def test_any_flipped_bit_is_noticed_or_in_the_padding(data: st.DataObject) -> None:
    tokens, arrays = example(20, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        write_state(path, OWNER, tokens, arrays)
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            saved = opened(path)
        except DoubtfulFileError:
            return
        check(saved, tokens, arrays)


def test_pages_that_changed_places_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    array = np.random.default_rng(0).standard_normal((2, 1024, 16)).astype(np.float32)
    write_state(path, OWNER, np.arange(1024), {"past.0.key": array})
    content = path.read_bytes()
    end = len(content)
    one, other, rest = content[end - 12288 : end - 8192], content[end - 8192 : end - 4096], 4096
    path.write_bytes(content[: end - 12288] + other + one + content[end - rest :])
    with pytest.raises(DoubtfulFileError, match="damaged"):
        opened(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"7",
        b"{",
        b"{}",
        b'{"owner": "0123456789abcdef"}',
        b'{"owner": "0123456789abcdef", "tokens": -1}',
        b'{"owner": "0123456789abcdef", "tokens": 1e9}',
        b'{"owner": "0123456789abcdef", "tokens": 0}',
        b'{"owner": "0123456789abcdef", "tokens": 0, "tokens_sha256": "%s"}'
        % hashlib.sha256().hexdigest().encode(),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header: bytes, tmp_path: Path) -> None:
    """Whole, but not what was ever written here."""
    size = START.size + len(header)
    start = START.pack(MAGIC, VERSION, len(header), size, hashlib.sha256(header).digest())
    path = tmp_path / "state"
    path.write_bytes(start + header)
    with pytest.raises(DoubtfulFileError):
        opened(path)


def test_every_byte_of_the_header_counts(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, OWNER, *example(20, 1))
    content = path.read_bytes()
    length = START.unpack(content[: START.size])[2]
    for at in range(START.size + length):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(DoubtfulFileError):
            read_tokens(path, OWNER)


@settings(max_examples=100)
@given(st.integers(0, 3000), st.booleans())
def test_a_file_of_another_length_is_refused(length: int, longer: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        write_state(path, OWNER, *example(20, 1))
        content = path.read_bytes()
        path.write_bytes(content + b"\0" * (length + 1) if longer else content[:length])
        if longer or length < len(content):
            for read in (read_tokens, SavedState.open):
                with pytest.raises(DoubtfulFileError):
                    read(path, OWNER)


def test_another_owner_and_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, OWNER, *example(20, 1))
    with pytest.raises(DoubtfulFileError, match="another model"):
        SavedState.open(path, OWNER[::-1])
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\7" + content[9:])
    with pytest.raises(DoubtfulFileError, match="version 7"):
        SavedState.open(path, OWNER)
    path.write_bytes(b"")
    with pytest.raises(DoubtfulFileError, match="cut off"):
        SavedState.open(path, OWNER)
    path.write_bytes(b"something else altogether, and long enough to be looked at" * 2)
    with pytest.raises(DoubtfulFileError, match="no state"):
        SavedState.open(path, OWNER)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rights")
def test_only_this_user_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, OWNER, *example(20, 1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
