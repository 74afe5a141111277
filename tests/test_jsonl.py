"""JSON lines: what is written comes back, and every bad line is refused by source, line and field."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtcp.constants import INTEGER_MAX, KEY_BYTES_MAX, TTL_MS_MAX, VALUE_BYTES_MAX
from kvtcp.errors import Code, DataError
from kvtcp.jsonl import Pair, decode_pair, encode_pair

some_bytes = st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8"))
pairs = st.builds(
    Pair,
    key=some_bytes.filter(lambda key: key != b""),
    value=some_bytes,
    rev=st.none() | st.integers(0, INTEGER_MAX),
    ttl_ms=st.none() | st.integers(1, TTL_MS_MAX),
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(pairs)
def test_round_trip_of_any_bytes(pair: Pair) -> None:
    """A pair written as a line comes back equal, from text and from bytes, with and without the newline."""
    line = encode_pair(*pair)
    assert "\n" not in line and "\r" not in line
    for form in (line, line + "\n", line.encode("utf-8"), line.encode("utf-8") + b"\n"):
        assert decode_pair(form, "f", 1) == pair


@given(pairs)
def test_base64_only_where_it_is_needed(pair: Pair) -> None:
    """Bytes that are UTF-8 stand as text that any JSON reader gives back; only others become base64."""
    fields = json.loads(encode_pair(*pair))
    for name, data in (("key", pair.key), ("value", pair.value)):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            assert base64.b64decode(fields[name + "_b64"]) == data and name not in fields
        else:
            assert fields[name] == text and name + "_b64" not in fields
    assert fields.get("rev") == pair.rev and ("rev" in fields) == (pair.rev is not None)
    assert fields.get("ttl_ms") == pair.ttl_ms and ("ttl_ms" in fields) == (pair.ttl_ms is not None)


def test_a_time_to_live_beyond_the_limit() -> None:
    """Deadlines that are given as a time since 1970 may be farther away than any time to live: a backup of such a key
    can be read and restored, with the longest time that there is."""
    line = encode_pair(b"k", b"v", 7, INTEGER_MAX)
    assert decode_pair(line, "f", 1) == Pair(b"k", b"v", 7, TTL_MS_MAX)
    assert encode_pair(b"k", b"v", 7, TTL_MS_MAX) == line


def test_the_line_is_this_one() -> None:
    """The form in the documentation, to the character: files are compared by diff and by hash."""
    assert encode_pair(b"user:1", "Zo\xeb \"\\\n".encode(), 7, 60000) == (
        '{"key": "user:1", "value": "Zo\xeb \\"\\\\\\n", "rev": 7, "ttl_ms": 60000}'
    )
    assert encode_pair(b"\xff", b"") == '{"key_b64": "/w==", "value": ""}'


@pytest.mark.parametrize(
    ("line", "pair"),
    [
        (' {"value":"b","key":"a"} \r\n', Pair(b"a", b"b", None, None)),
        ('{"key": "a", "key_b64": null, "value_b64": "Yg==", "rev": null}', Pair(b"a", b"b", None, None)),
        ('{"key": "\\u00e9", "value": "\\ud83d\\ude00", "ttl_ms": 1}', Pair("é".encode(), "😀".encode(), None, 1)),
        ('{"key": "a", "value": "b", "rev": 0, "ttl_ms": null}', Pair(b"a", b"b", 0, None)),
        ('{"key": "' + "k" * KEY_BYTES_MAX + '", "value": ""}', Pair(b"k" * KEY_BYTES_MAX, b"", None, None)),
        (f'{{"key": "a", "value": "", "rev": {INTEGER_MAX}}}', Pair(b"a", b"", INTEGER_MAX, None)),
        (f'{{"key": "a", "value": "", "ttl_ms": {TTL_MS_MAX}}}', Pair(b"a", b"", None, TTL_MS_MAX)),
    ],
)
def test_lines_of_other_tools(line: str, pair: Pair) -> None:
    """Other spacing, order, escapes and nulls are the same pair, up to the limits included."""
    assert decode_pair(line, "f", 1) == pair
    assert decode_pair(line.encode("utf-8"), "f", 1) == pair


BAD_LINES = [
    ("", "not JSON: Expecting value at column 1"),
    ("\n", "not JSON: Expecting value"),
    ('{"key": "a", "value": "b"', "not JSON: Expecting ',' delimiter at column 26"),
    ('{"key": "a", "value": "b"} x', "not JSON: Extra data at column 28"),
    ('{"key": "a", "value": "b\tc"}', "not JSON: Invalid control character at column 25"),
    ('["key", "value"]', "not a JSON object"),
    ('"key"', "not a JSON object"),
    ("7", "not a JSON object"),
    ("null", "not a JSON object"),
    ("[" * 100_000, "not JSON that can be read"),
    ('{"key": "a", "value": "b", "rev": ' + "1" * 5000 + "}", "not JSON that can be read"),
    (b'{"key": "a\xff", "value": "b"}', "not UTF-8: byte 0xff at column 11"),
    (b'{"key": "\xed\xa0\x80", "value": "b"}', "not UTF-8: byte 0xed"),
    ("{}", 'exactly one of "key" and "key_b64" is needed'),
    ('{"value": "b"}', 'exactly one of "key" and "key_b64" is needed'),
    ('{"key": "a"}', 'exactly one of "value" and "value_b64" is needed'),
    ('{"key": "a", "value": null}', 'exactly one of "value" and "value_b64" is needed'),
    ('{"key": "a", "key_b64": "YQ==", "value": "b"}', 'exactly one of "key" and "key_b64" is needed'),
    ('{"key": "a", "value": "b", "ttl": 5}', "unknown field 'ttl'"),
    ('{"key": "a", "value": "b", "rev": 1, "revv": 1}', "unknown field 'revv'"),
    ('{"key": "a", "value": "b", "value": "c"}', "'value' is given twice"),
    ('{"key": "a", "value": "b", "rev": 1, "rev": 1}', "'rev' is given twice"),
    ('{"key": 5, "value": "b"}', '"key" is not a string'),
    ('{"key": "a", "value": ["b"]}', '"value" is not a string'),
    ('{"key": "a", "value": {"b": 1}}', '"value" is not a string'),
    ('{"key": "a", "value": NaN}', '"value" is not a string'),
    ('{"key": "a", "value_b64": 5}', '"value_b64" is not a string'),
    ('{"key": "a", "value_b64": "Yg="}', '"value_b64" is not base64'),
    ('{"key": "a", "value_b64": "Y g=="}', '"value_b64" is not base64'),
    ('{"key": "a", "value_b64": "é"}', '"value_b64" is not base64'),
    ('{"key": "\\ud800", "value": "b"}', '"key" has a lone surrogate'),
    ('{"key": "a", "value": "\\udc00"}', '"value" has a lone surrogate'),
    ('{"key": "", "value": "b"}', '"key" has 0 bytes, allowed are 1 to 4096'),
    ('{"key_b64": "", "value": "b"}', '"key" has 0 bytes'),
    ('{"key": "' + "é" * 2049 + '", "value": "b"}', '"key" has 4098 bytes'),
    ('{"key": "a", "value": "' + "v" * (VALUE_BYTES_MAX + 1) + '"}', f'"value" has {VALUE_BYTES_MAX + 1} bytes'),
    ('{"key": "a", "value": "b", "rev": -1}', '"rev" must be an integer from 0'),
    ('{"key": "a", "value": "b", "rev": true}', '"rev" must be an integer'),
    ('{"key": "a", "value": "b", "rev": 1.0}', '"rev" must be an integer'),
    ('{"key": "a", "value": "b", "rev": "1"}', '"rev" must be an integer'),
    (f'{{"key": "a", "value": "b", "rev": {INTEGER_MAX + 1}}}', '"rev" must be an integer'),
    ('{"key": "a", "value": "b", "ttl_ms": 0}', '"ttl_ms" must be an integer from 1'),
    ('{"key": "a", "value": "b", "rev": 1, "ttl_ms": 1.5}', '"ttl_ms" must be an integer'),
    (f'{{"key": "a", "value": "b", "ttl_ms": {TTL_MS_MAX + 1}}}', '"ttl_ms" must be an integer'),
]


@pytest.mark.parametrize(("line", "sentence"), BAD_LINES, ids=[sentence for _, sentence in BAD_LINES])
def test_bad_lines_are_named(line: str | bytes, sentence: str) -> None:
    """Every way to be wrong has a sentence with source, line and field."""
    with pytest.raises(DataError) as caught:
        decode_pair(line, "dir/f.jsonl", 17)
    assert str(caught.value).startswith("dir/f.jsonl, line 17: " + sentence)
    assert caught.value.code == Code.BAD_DATA


def decode_or_refuse(line: str | bytes) -> Pair | None:
    """The pair, None if it was refused properly; any other exception fails the test."""
    try:
        return decode_pair(line, "f", 7)
    except DataError as error:
        assert str(error).startswith("f, line 7: ")
        return None


@given(st.text() | st.binary())
def test_any_text_is_refused_properly(line: str | bytes) -> None:
    """No text or bytes lead to another exception than DataError."""
    decode_or_refuse(line)


names = st.sampled_from(["key", "value", "key_b64", "value_b64", "rev", "ttl_ms", "other"])


@given(st.dictionaries(names, json_values | st.sampled_from(["YQ==", "a", 7]), max_size=6))
def test_any_object_is_a_pair_or_refused(fields: dict[str, Any]) -> None:
    """An object with these names and any values is taken exactly as a plain reading of the rules says."""
    pair = decode_or_refuse(json.dumps(fields))
    if pair is None:
        return
    assert "other" not in fields
    assert (fields.get("key") is None) != (fields.get("key_b64") is None)
    assert pair.rev == fields.get("rev") and pair.ttl_ms == fields.get("ttl_ms")
    if fields.get("key") is not None:
        assert pair.key == fields["key"].encode("utf-8")
    if fields.get("value") is not None:
        assert pair.value == fields["value"].encode("utf-8")


@given(pairs, st.data())
def test_a_changed_byte_gives_a_pair_or_a_refusal(pair: Pair, data: st.DataObject) -> None:
    """A line with one changed byte never raises anything else, and what it gives can be written again."""
    line = bytearray(encode_pair(*pair).encode("utf-8"))
    line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    changed = decode_or_refuse(bytes(line))
    if changed is not None:
        assert decode_pair(encode_pair(*changed), "f", 1) == changed
