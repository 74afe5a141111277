"""Commands on the values of keys: each is compiled to a plan (plan.py).

Pure. The arguments are those behind the command's name. A command that changes a value in place is one operation of the
table (storage/shard/strings.py), never a read and a write. A command that reads a part of a value gets the whole value
from the node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from kvtcp.constants import (
    INTEGER_MAX,
    INTEGER_MIN,
    MGET_KEYS_BYTES_MAX,
    MULTI_BYTES_MAX,
    MULTI_KEYS_MAX,
    RESP_KEYS_MAX,
    TTL_MS_MAX,
    VALUE_BYTES_MAX,
)
from kvtcp.errors import Code
from kvtcp.frontend.resp.plan import (
    NOT_A_FLOAT,
    NOT_AN_INTEGER,
    SYNTAX,
    Arguments,
    CommandError,
    Operation,
    Plan,
    count,
    first,
    integer,
    read,
    write,
)
from kvtcp.frontend.resp.replies import DONE
from kvtcp.protocol import operations as op
from kvtcp.protocol.messages import check_key
from kvtcp.protocol.numbers import decimal_of

TOO_LONG: Final = f"ERR string exceeds maximum allowed size ({VALUE_BYTES_MAX} bytes)"
OVERFLOW: Final = "ERR increment or decrement would overflow"
BIT_OFFSET: Final = "ERR bit offset is not an integer or out of range"
_INTEGER_TEXTS: Final = {int(Code.NOT_A_NUMBER): NOT_AN_INTEGER, int(Code.RANGE): OVERFLOW}
_LENGTH_TEXTS: Final = {int(Code.TOO_LARGE): TOO_LONG}


class Time(NamedTuple):
    """A deadline as an operation takes it."""

    mode: int = op.NO_DEADLINE
    ms: int = 0


def value_of(cell: Any) -> bytes | None:
    """Return the value of a GET's result."""
    return None if cell is None else cell[0]


def take_time(unit: bytes, text: bytes, command: str) -> Time:
    """Return the deadline of an option. `unit` is EX, PX, EXAT or PXAT."""
    number = integer(text)
    ms = number * 1000 if unit in (b"EX", b"EXAT") else number
    mode = op.AT_MS if unit in (b"EXAT", b"PXAT") else op.IN_MS
    if number <= 0 or ms > (INTEGER_MAX if mode == op.AT_MS else INTEGER_MAX >> 1):
        raise CommandError(f"ERR invalid expire time in '{command}' command")
    return Time(mode, ms)


def put(key: bytes, value: bytes, time: Time = Time()) -> Operation:  # noqa: B008
    """Make the plainest operation that stores a value without a condition."""
    if time.mode == op.NO_DEADLINE:
        return write(op.PUT, key, value, size=len(value))
    if time.mode == op.KEEP_DEADLINE:
        return write(op.PUT, key, value, None, True, size=len(value))
    if time.mode == op.IN_MS and time.ms <= TTL_MS_MAX:
        return write(op.PUT, key, value, time.ms, size=len(value))
    return store(key, value, time)


def store(
    key: bytes, value: bytes, time: Time, condition: int = op.ALWAYS, if_value: bytes | None = None, get: bool = False
) -> Operation:
    """Make an operation that stores a value with a condition, or returns the old one."""
    return write(op.STORE, key, value, *time, condition, if_value, get, size=len(value) + len(if_value or b""))


def set_(arguments: Arguments) -> Plan:
    """SET key value [EX s | PX ms | EXAT s | PXAT ms | KEEPTTL] [NX | XX | IFEQ value] [GET]"""
    key, value, *options = arguments
    time: Time | None = None
    condition, if_value, get = op.ALWAYS, None, False
    words = iter(options)
    for word in words:
        name = word.upper()
        if name in (b"EX", b"PX", b"EXAT", b"PXAT") and time is None:
            time = take_time(name, _next(words), "set")
        elif name == b"KEEPTTL" and time is None:
            time = Time(op.KEEP_DEADLINE)
        elif name == b"NX" and condition in (op.ALWAYS, op.IF_ABSENT):
            condition = op.IF_ABSENT
        elif name == b"XX" and condition in (op.ALWAYS, op.IF_PRESENT):
            condition = op.IF_PRESENT
        elif name == b"IFEQ" and condition == op.ALWAYS:
            condition, if_value = op.IF_EQUAL, _next(words)
        elif name == b"GET":
            get = True
        else:
            raise CommandError(SYNTAX)
    time = time or Time()
    if condition == op.ALWAYS and not get:
        return Plan([put(key, value, time)], lambda _: DONE)
    operation = store(key, value, time, condition, if_value, get)
    return Plan([operation], first if get else lambda results: DONE if results[0] else None)


def _next(words: Any) -> bytes:
    word: bytes | None = next(words, None)
    if word is None:
        raise CommandError(SYNTAX)
    return word


def set_if_absent(arguments: Arguments) -> Plan:
    """SETNX key value"""
    key, value = arguments
    return Plan([store(key, value, Time(), op.IF_ABSENT)], count)


def set_with_time(unit: bytes, command: str) -> Callable[[Arguments], Plan]:
    """SETEX key s value, PSETEX key ms value"""

    def compile_(arguments: Arguments) -> Plan:
        key, number, value = arguments
        return Plan([put(key, value, take_time(unit, number, command))], lambda _: DONE)

    return compile_


def get(arguments: Arguments) -> Plan:
    """GET key"""
    return Plan([read(op.GET, arguments[0])], lambda results: value_of(results[0]))


def get_set(arguments: Arguments) -> Plan:
    """GETSET key value"""
    key, value = arguments
    return Plan([store(key, value, Time(), get=True)], first)


def get_delete(arguments: Arguments) -> Plan:
    """GETDEL key"""
    return Plan([write(op.TAKE, arguments[0])], first)


def get_touch(arguments: Arguments) -> Plan:
    """GETEX key [EX s | PX ms | EXAT s | PXAT ms | PERSIST]"""
    key, *options = arguments
    if not options:
        return get(arguments)
    unit = options[0].upper()
    if unit == b"PERSIST" and len(options) == 1:
        time = Time()
    elif unit in (b"EX", b"PX", b"EXAT", b"PXAT") and len(options) == 2:
        time = take_time(unit, options[1], "getex")
    else:
        raise CommandError(SYNTAX)
    return Plan([write(op.TOUCH, key, *time)], first)


def get_many(arguments: Arguments) -> Plan:
    """MGET key ..."""
    if len(arguments) > MULTI_KEYS_MAX:
        raise CommandError(f"ERR {len(arguments)} keys in one command are over the limit of {MULTI_KEYS_MAX}")
    if sum(map(len, arguments)) > MGET_KEYS_BYTES_MAX:
        raise CommandError(f"ERR the keys of one command are over the limit of {MGET_KEYS_BYTES_MAX} bytes")
    return Plan([read(op.GET, key) for key in arguments], lambda results: [value_of(cell) for cell in results])


def _pairs(arguments: Arguments, command: str) -> list[tuple[bytes, bytes]]:
    if len(arguments) % 2:
        raise CommandError(f"ERR wrong number of arguments for '{command}' command")
    pairs = [(check_key(arguments[n]), arguments[n + 1]) for n in range(0, len(arguments), 2)]
    if len(pairs) > RESP_KEYS_MAX:
        raise CommandError(f"ERR {len(pairs)} keys in one command are over the limit of {RESP_KEYS_MAX}")
    if sum(len(key) + len(value) for key, value in pairs) > MULTI_BYTES_MAX:
        raise CommandError(f"ERR the pairs of one command are over the limit of {MULTI_BYTES_MAX} bytes")
    return pairs


def put_all(pairs: Sequence[tuple[bytes, bytes]], if_absent: bool) -> Operation:
    """Make an operation that stores these pairs of one shard in one step."""
    size = sum(len(key) + len(value) + 16 for key, value in pairs)
    return write(op.PUT_ALL, pairs[0][0], pairs, if_absent, size=size)


def set_many(arguments: Arguments) -> Plan:
    """MSET key value ..."""
    pairs = _pairs(arguments, "mset")
    return Plan([put(key, value) for key, value in pairs], lambda _: DONE, {}, put_all(pairs, False))


def set_many_if_absent(arguments: Arguments) -> Plan:
    """MSETNX key value ..."""
    return Plan([put_all(_pairs(arguments, "msetnx"), True)], count)


def append(arguments: Arguments) -> Plan:
    """APPEND key value"""
    key, value = arguments
    return Plan([write(op.APPEND, key, value, size=len(value))], first, _LENGTH_TEXTS)


def length(arguments: Arguments) -> Plan:
    """STRLEN key"""
    return Plan([read(op.GET, arguments[0])], lambda results: len(value_of(results[0]) or b""))


def get_range(arguments: Arguments) -> Plan:
    """GETRANGE key start end, both inclusive and from the end if negative"""
    key, start, end = arguments[0], integer(arguments[1]), integer(arguments[2])

    def finish(results: list[Any]) -> bytes:
        value = value_of(results[0]) or b""
        low = max(0, start + len(value)) if start < 0 else start
        high = max(0, end + len(value)) if end < 0 else end
        is_empty = (start < 0 and end < 0 and start > end) or low > high
        return b"" if is_empty else value[low : high + 1]

    return Plan([read(op.GET, key)], finish)


def set_range(arguments: Arguments) -> Plan:
    """SETRANGE key offset value"""
    key, offset, value = arguments[0], integer(arguments[1]), arguments[2]
    if offset < 0:
        raise CommandError("ERR offset is out of range")
    if value and offset + len(value) > VALUE_BYTES_MAX:
        raise CommandError(TOO_LONG)
    return Plan([write(op.SETRANGE, key, offset, value, size=len(value))], first, _LENGTH_TEXTS)


def _bit_offset(text: bytes) -> int:
    offset = integer(text, BIT_OFFSET)
    if not 0 <= offset < VALUE_BYTES_MAX * 8:
        raise CommandError(BIT_OFFSET)
    return offset


def set_bit(arguments: Arguments) -> Plan:
    """SETBIT key offset 0|1"""
    key, text, bit = arguments
    offset = _bit_offset(text)
    if bit not in (b"0", b"1"):
        raise CommandError("ERR bit is not an integer or out of range")
    return Plan([write(op.SETBIT, key, offset, int(bit))], first, _LENGTH_TEXTS)


def get_bit(arguments: Arguments) -> Plan:
    """GETBIT key offset"""
    key, offset = arguments[0], _bit_offset(arguments[1])

    def finish(results: list[Any]) -> int:
        value = value_of(results[0]) or b""
        place = offset // 8
        return int(place < len(value) and value[place] & 0x80 >> offset % 8 != 0)

    return Plan([read(op.GET, key)], finish)


def incr(sign: int) -> Callable[[Arguments], Plan]:
    """INCR key, DECR key"""
    return lambda arguments: Plan([write(op.INCR, arguments[0], sign)], first, _INTEGER_TEXTS)


def incr_by(sign: int) -> Callable[[Arguments], Plan]:
    """INCRBY key number, DECRBY key number"""

    def compile_(arguments: Arguments) -> Plan:
        by = integer(arguments[1])
        if sign < 0 and by == INTEGER_MIN:
            raise CommandError("ERR decrement would overflow")
        return Plan([write(op.INCR, arguments[0], sign * by)], first, _INTEGER_TEXTS)

    return compile_


def incr_by_float(arguments: Arguments) -> Plan:
    """INCRBYFLOAT key number"""
    key, by = arguments
    if by.lower().lstrip(b"+-") in (b"inf", b"infinity"):
        raise CommandError("ERR increment would produce NaN or Infinity")
    if decimal_of(by) is None:
        raise CommandError(NOT_A_FLOAT)
    texts = {int(Code.NOT_A_NUMBER): NOT_A_FLOAT, int(Code.RANGE): "ERR increment would produce NaN or Infinity"}
    return Plan([write(op.INCR_DECIMAL, key, by, size=len(by))], first, texts)


def delete_if_equal(arguments: Arguments) -> Plan:
    """DELIFEQ key value"""
    key, value = arguments
    return Plan([write(op.DELETE, key, value, size=len(value))], count)


def compare_and_set(arguments: Arguments) -> Plan:
    """KV.CAS key value (VALUE old | REV revision | ABSENT): the new revision, or nil if the condition is false"""
    key, value, kind, *rest = arguments
    kind = kind.upper()
    if kind == b"VALUE" and len(rest) == 1:
        condition: tuple[bytes | None, int | None] = (rest[0], None)
    elif kind == b"REV" and len(rest) == 1:
        condition = (None, integer(rest[0]))
    elif kind == b"ABSENT" and not rest:
        condition = (None, 0)
    else:
        raise CommandError(SYNTAX)
    operation = write(op.CAS, key, value, *condition, size=len(value) + len(condition[0] or b""))
    return Plan([operation], first, {int(Code.MISMATCH): None})
