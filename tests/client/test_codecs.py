"""Codecs: what goes in comes out, and what does not fit is refused with the right error."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtcp.client import codecs

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
json_values = st.recursive(
    scalars.filter(lambda v: v not in (math.inf, -math.inf)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
msgpack_values = st.recursive(
    scalars | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner),
    max_leaves=12,
)


@given(st.binary() | st.text())
def test_raw_keeps_bytes(value: bytes | str) -> None:
    """Bytes come back as they were, text as its UTF-8."""
    assert codecs.raw.decode(codecs.raw.encode(value)) == (value.encode() if isinstance(value, str) else value)


def test_raw_takes_other_buffers() -> None:
    """Buffers are copied to bytes; nothing else is turned into text behind the caller's back."""
    assert codecs.raw.encode(bytearray(b"a")) == b"a"  # type: ignore[arg-type]
    assert codecs.raw.encode(memoryview(b"a")) == b"a"  # type: ignore[arg-type]
    for value in (None, 1, 1.5, ["a"]):
        with pytest.raises(TypeError, match=r"must be bytes or text, not \w+"):
            codecs.raw.encode(value)  # type: ignore[arg-type]


@given(st.text())
def test_text(value: str) -> None:
    """Text comes back as it was."""
    assert codecs.text.decode(codecs.text.encode(value)) == value


def test_text_refuses_bytes() -> None:
    """Bytes are not text, neither on the way in nor, if they are not UTF-8, on the way out."""
    with pytest.raises(TypeError):
        codecs.text.encode(b"a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="utf-8"):
        codecs.text.decode(b"\xff")


@given(json_values)
def test_json(value: Any) -> None:
    """What JSON can hold comes back equal."""
    assert codecs.json.decode(codecs.json.encode(value)) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, b"bytes", {1, 2}, object()])
def test_json_refuses(value: Any) -> None:
    """What JSON cannot hold is refused, NaN included."""
    with pytest.raises((TypeError, ValueError)):
        codecs.json.encode(value)


def test_json_depth() -> None:
    """A value that contains itself, or text nested beyond the interpreter's depth, is a ValueError."""
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError):
        codecs.json.encode(loop)
    with pytest.raises(ValueError, match="nested too deeply"):
        codecs.json.decode(b"[" * 100_000)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"nul"])
def test_json_refuses_other_bytes(data: bytes) -> None:
    """Bytes that are not JSON are a ValueError."""
    with pytest.raises(ValueError):
        codecs.json.decode(data)


@given(msgpack_values)
def test_msgpack(value: Any) -> None:
    """What msgpack can hold comes back equal, bytes and text told apart."""
    assert codecs.msgpack.decode(codecs.msgpack.encode(value)) == value


@given(st.binary(max_size=40))
def test_msgpack_decodes_or_refuses(data: bytes) -> None:
    """Any bytes decode or are a ValueError."""
    try:
        codecs.msgpack.decode(data)
    except ValueError:
        pass


@pytest.mark.parametrize("value", [2**64, object(), {1, 2}])
def test_msgpack_refuses(value: Any) -> None:
    """What msgpack cannot hold is refused."""
    with pytest.raises((TypeError, ValueError)):
        codecs.msgpack.encode(value)


def test_msgpack_refuses_ext() -> None:
    """Ext types could become objects: they are not decoded."""
    with pytest.raises(ValueError, match="ext type 5"):
        codecs.msgpack.decode(b"\xd4\x05\x00")
