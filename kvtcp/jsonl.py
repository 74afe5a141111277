"""JSON lines: one key-value pair a line, the common form of export, import, `-o jsonl` and backups.

Pure. A line is one JSON object:

    {"key": "user:1", "value": "Ada", "rev": 7, "ttl_ms": 60000}

`key_b64` / `value_b64` (standard base64) stand instead of `key` / `value` only when the bytes are not UTF-8. `rev` and
`ttl_ms` are left out or null where there is none; other fields are refused, so that a misspelt one is not lost in
silence. `decode_pair` is the only reader: whoever reads such a line gets the same checks and the same sentences.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NamedTuple

from kvtcp.constants import KEY_BYTES_MAX, TTL_MS_MAX, VALUE_BYTES_MAX
from kvtcp.errors import DataError

_FIELDS = {"key", "value", "key_b64", "value_b64", "rev", "ttl_ms"}
_encode_string = json.encoder.encode_basestring  # the C encoder, non-ASCII left as it is


class Pair(NamedTuple):
    """One line. `rev` is None where the line has none, `ttl_ms` None for a key without deadline."""

    key: bytes
    value: bytes
    rev: int | None
    ttl_ms: int | None


def _member(name: str, data: bytes) -> str:
    try:
        return f'"{name}": {_encode_string(data.decode("utf-8"))}'
    except UnicodeDecodeError:
        return f'"{name}_b64": "{base64.b64encode(data).decode("ascii")}"'


def encode_pair(key: bytes, value: bytes, rev: int | None = None, ttl_ms: int | None = None) -> str:
    """One line, without its newline. Equal pairs give equal lines."""
    line = "{" + _member("key", key) + ", " + _member("value", value)
    if rev is not None:
        line += f', "rev": {rev}'
    if ttl_ms is not None:
        line += f', "ttl_ms": {ttl_ms}'
    return line + "}"


def _bytes_of(fields: dict[str, Any], name: str, where: str) -> bytes:
    text, encoded = fields.get(name), fields.get(name + "_b64")
    if (text is None) == (encoded is None):
        raise DataError(f'{where}: exactly one of "{name}" and "{name}_b64" is needed')
    if text is not None:
        if not isinstance(text, str):
            raise DataError(f'{where}: "{name}" is not a string')
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f'{where}: "{name}" has a lone surrogate, which is not text; use "{name}_b64"') from error
    if not isinstance(encoded, str):
        raise DataError(f'{where}: "{name}_b64" is not a string')
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f'{where}: "{name}_b64" is not base64: {error}') from error


def _integer(fields: dict[str, Any], name: str, low: int, high: int, where: str) -> int | None:
    number = fields.get(name)
    if number is None:
        return None
    if type(number) is not int or not low <= number <= high:
        raise DataError(f'{where}: "{name}" must be an integer from {low} to {high}')
    return number


def decode_pair(line: str | bytes, source: str, line_number: int) -> Pair:
    """The pair of one line. Raises DataError that names `source`, the line and the field."""
    where = f"{source}, line {line_number}"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: not a JSON object")
    if not fields.keys() <= _FIELDS:
        raise DataError(f"{where}: unknown field {sorted(fields.keys() - _FIELDS)[0]!r}")
    key = _bytes_of(fields, "key", where)
    value = _bytes_of(fields, "value", where)
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        raise DataError(f"{where}: the key has {len(key)} bytes, allowed are 1 to {KEY_BYTES_MAX}")
    if len(value) > VALUE_BYTES_MAX:
        raise DataError(f"{where}: the value has {len(value)} bytes, the limit is {VALUE_BYTES_MAX}")
    rev = _integer(fields, "rev", 0, 2**63 - 1, where)
    return Pair(key, value, rev, _integer(fields, "ttl_ms", 1, TTL_MS_MAX, where))
