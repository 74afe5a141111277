"""Commands on keys with values of any kind: each is compiled to a plan (plan.py).

Pure. The arguments are those behind the command's name. Deadlines are given in the units of the command and kept in ms;
a time that is over deletes the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvtcp.constants import INTEGER_MAX, RESP_KEYS_MAX
from kvtcp.frontend.resp.plan import NOT_AN_INTEGER, SYNTAX, Arguments, CommandError, Plan, count, integer, read, write
from kvtcp.frontend.resp.replies import DONE, Failure, Simple
from kvtcp.protocol import operations as op
from kvtcp.protocol.messages import check_key

NO_SUCH_KEY: Final = Failure("ERR no such key")
_CONDITIONS: Final = {
    frozenset[bytes](): op.ALWAYS,
    frozenset({b"NX"}): op.IF_ABSENT,
    frozenset({b"XX"}): op.IF_PRESENT,
    frozenset({b"GT"}): op.IF_LATER,
    frozenset({b"XX", b"GT"}): op.IF_LATER,
    frozenset({b"LT"}): op.IF_EARLIER,
    frozenset({b"XX", b"LT"}): op.IF_PRESENT_EARLIER,
}


def of_each(number: int) -> Callable[[Arguments], Plan]:
    """DEL, UNLINK, EXISTS, TOUCH key ...: how many there were"""

    def compile_(arguments: Arguments) -> Plan:
        if len(arguments) > RESP_KEYS_MAX:
            raise CommandError(f"ERR {len(arguments)} keys in one command are over the limit of {RESP_KEYS_MAX}")
        make = write if number < op.WRITE_OP_END else read
        return Plan([make(number, key) for key in arguments], count)

    return compile_


def type_(arguments: Arguments) -> Plan:
    """TYPE key"""
    return Plan([read(op.EXISTS, arguments[0])], lambda results: Simple("string" if results[0] else "none"))


def expire(unit_ms: int, mode: int, command: str) -> Callable[[Arguments], Plan]:
    """EXPIRE, PEXPIRE, EXPIREAT, PEXPIREAT key time [NX | XX | GT | LT]"""

    def compile_(arguments: Arguments) -> Plan:
        key, text, *options = arguments
        ms = integer(text) * unit_ms
        names = frozenset(option.upper() for option in options)
        for option in options:
            if option.upper() not in (b"NX", b"XX", b"GT", b"LT"):
                raise CommandError(f"ERR Unsupported option {option.decode('utf-8', 'replace')}")
        condition = _CONDITIONS.get(names)
        if condition is None:
            what = "NX and XX, GT or LT" if b"NX" in names else "GT and LT"
            raise CommandError(f"ERR {what} options at the same time are not compatible")
        if abs(ms) > (INTEGER_MAX if mode == op.AT_MS else INTEGER_MAX >> 1):
            raise CommandError(f"ERR invalid expire time in '{command}' command")
        return Plan([write(op.EXPIRE_IF, key, mode, ms, condition)], count)

    return compile_


def time_left(unit_ms: int, number: int) -> Callable[[Arguments], Plan]:
    """TTL, PTTL, EXPIRETIME, PEXPIRETIME key: -2 without key, -1 without deadline"""

    def finish(results: list[Any]) -> int:
        ms: int | None = results[0]
        if ms is None:
            return -2
        return -1 if ms == -1 else (ms + unit_ms // 2) // unit_ms

    return lambda arguments: Plan([read(number, arguments[0])], finish)


def persist(arguments: Arguments) -> Plan:
    """PERSIST key"""
    return Plan([write(op.PERSIST, arguments[0])], count)


def rename(if_absent: bool) -> Callable[[Arguments], Plan]:
    """RENAME, RENAMENX key newkey"""

    def finish(results: list[Any]) -> Any:
        if results[0] == op.NO_KEY:
            return NO_SUCH_KEY
        return int(results[0] == op.RENAMED) if if_absent else DONE

    def compile_(arguments: Arguments) -> Plan:
        key, new_key = arguments
        return Plan([write(op.RENAME, key, check_key(new_key), if_absent, size=len(new_key))], finish)

    return compile_


def copy(arguments: Arguments) -> Plan:
    """COPY source destination [DB 0] [REPLACE]"""
    key, new_key, *options = arguments
    replace = False
    words = iter(options)
    for word in words:
        if word.upper() == b"REPLACE":
            replace = True
        elif word.upper() == b"DB":
            if integer(next(words, b""), NOT_AN_INTEGER) != 0:
                raise CommandError("ERR DB index is out of range")
        else:
            raise CommandError(SYNTAX)
    if key == new_key:
        raise CommandError("ERR source and destination objects are the same")
    return Plan([write(op.COPY, key, check_key(new_key), replace, size=len(new_key))], count)
