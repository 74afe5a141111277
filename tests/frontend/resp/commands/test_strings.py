"""Commands on values: what they ask of a shard, what they answer, and which arguments they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import INTEGER_MAX, INTEGER_MIN, MGET_KEYS_BYTES_MAX, MULTI_KEYS_MAX, RESP_KEYS_MAX
from kvtcp.errors import Code
from kvtcp.protocol import operations as op
from tests.support.resp_tools import Client, Error, Status, World, parse

CELL = [b"value", 7, None]


@pytest.mark.parametrize(
    ("command", "operation", "args", "result", "reply"),
    [
        ("get a", op.GET, (), CELL, b"value"), ("get a", op.GET, (), None, None), ("Get a", op.GET, (), CELL, b"value"),
        ("set a v", op.PUT, (b"v",), 1, Status("OK")), ("SeT a v", op.PUT, (b"v",), 1, Status("OK")),
        ("set a v ex 10", op.PUT, (b"v", 10_000), 1, Status("OK")),
        ("set a v PX 10", op.PUT, (b"v", 10), 1, Status("OK")),
        ("set a v keepttl", op.PUT, (b"v", None, True), 1, Status("OK")),
        ("set a v exat 10", op.STORE, (b"v", op.AT_MS, 10_000, op.ALWAYS, None, False), True, Status("OK")),
        ("set a v pxat 10", op.STORE, (b"v", op.AT_MS, 10, op.ALWAYS, None, False), True, Status("OK")),
        ("set a v nx", op.STORE, (b"v", op.NO_DEADLINE, 0, op.IF_ABSENT, None, False), False, None),
        ("set a v xx px 5", op.STORE, (b"v", op.IN_MS, 5, op.IF_PRESENT, None, False), True, Status("OK")),
        ("set a v get", op.STORE, (b"v", op.NO_DEADLINE, 0, op.ALWAYS, None, True), b"old", b"old"),
        ("set a v get nx", op.STORE, (b"v", op.NO_DEADLINE, 0, op.IF_ABSENT, None, True), None, None),
        ("set a v ifeq old", op.STORE, (b"v", op.NO_DEADLINE, 0, op.IF_EQUAL, b"old", False), True, Status("OK")),
        ("setnx a v", op.STORE, (b"v", op.NO_DEADLINE, 0, op.IF_ABSENT, None, False), True, 1),
        ("setex a 3 v", op.PUT, (b"v", 3000), 1, Status("OK")), ("psetex a 3 v", op.PUT, (b"v", 3), 1, Status("OK")),
        ("getset a v", op.STORE, (b"v", op.NO_DEADLINE, 0, op.ALWAYS, None, True), None, None),
        ("getdel a", op.TAKE, (), b"v", b"v"), ("getex a", op.GET, (), CELL, b"value"),
        ("getex a persist", op.TOUCH, (op.NO_DEADLINE, 0), b"v", b"v"),
        ("getex a ex 2", op.TOUCH, (op.IN_MS, 2000), None, None),
        ("getex a pxat 2", op.TOUCH, (op.AT_MS, 2), b"v", b"v"), ("mget a", op.GET, (), CELL, [b"value"]),
        ("mset a v", op.PUT, (b"v",), 1, Status("OK")), ("msetnx a v", op.PUT_ALL, ([(b"a", b"v")], True), True, 1),
        ("append a v", op.APPEND, (b"v",), 6, 6), ("strlen a", op.GET, (), CELL, 5), ("strlen a", op.GET, (), None, 0),
        ("setrange a 3 v", op.SETRANGE, (3, b"v"), 4, 4), ("setbit a 9 1", op.SETBIT, (9, 1), 0, 0),
        ("incr a", op.INCR, (1,), 5, 5), ("decr a", op.INCR, (-1,), 5, 5), ("incrby a 7", op.INCR, (7,), 5, 5),
        ("decrby a 7", op.INCR, (-7,), 5, 5), (f"incrby a {INTEGER_MIN}", op.INCR, (INTEGER_MIN,), 5, 5),
        ("incrbyfloat a 1.5e3", op.INCR_DECIMAL, (b"1.5e3",), b"1500", b"1500"),
        ("delifeq a v", op.DELETE, (b"v",), False, 0), ("kv.cas a v value old", op.CAS, (b"v", b"old", None), 9, 9),
        ("kv.cas a v rev 4", op.CAS, (b"v", None, 4), 9, 9), ("kv.cas a v absent", op.CAS, (b"v", None, 0), 9, 9),
    ],
)  # fmt: skip
def test_what_is_asked(client: Client, command: str, operation: int, args: Any, result: Any, reply: Any) -> None:
    """One command is one operation on its key; its result becomes the reply."""
    client.send(command)
    (asked,) = client.sequencer.asked
    assert (asked.op, asked.key, asked.args) == (operation, b"a", args)
    assert asked.size >= 1 + sum(len(arg) for arg in args if type(arg) is bytes)
    asked.answer(result)
    found = parse(client.output())
    assert found == [reply] and type(found[0]) is type(reply)


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("get", "ERR wrong number of arguments for 'get' command"),
        ("get a b", "ERR wrong number of arguments for 'get' command"),
        ("set a", "ERR wrong number of arguments for 'set' command"), ("set a v x", "ERR syntax error"),
        ("set a v ex", "ERR syntax error"), ("set a v ifeq", "ERR syntax error"),
        ("set a v ex 1 px 1", "ERR syntax error"), ("set a v keepttl ex 1", "ERR syntax error"),
        ("set a v ex 1 keepttl", "ERR syntax error"), ("set a v nx xx", "ERR syntax error"),
        ("set a v nx ifeq x", "ERR syntax error"), ("set a v ifeq x ifeq y", "ERR syntax error"),
        ("set a v ex x", "ERR value is not an integer or out of range"),
        ("set a v ex 0", "ERR invalid expire time in 'set' command"),
        ("set a v px -1", "ERR invalid expire time in 'set' command"),
        (f"set a v ex {INTEGER_MAX}", "ERR invalid expire time in 'set' command"),
        (f"set a v px {INTEGER_MAX}", "ERR invalid expire time in 'set' command"),
        (f"set a v exat {INTEGER_MAX}", "ERR invalid expire time in 'set' command"),
        ("setex a 0 v", "ERR invalid expire time in 'setex' command"),
        ("psetex a x v", "ERR value is not an integer or out of range"), ("getex a ex", "ERR syntax error"),
        ("getex a persist ex 1", "ERR syntax error"), ("getex a nx", "ERR syntax error"),
        ("getex a ex 0", "ERR invalid expire time in 'getex' command"),
        ("mset a", "ERR wrong number of arguments for 'mset' command"),
        ("mset a 1 b", "ERR wrong number of arguments for 'mset' command"),
        ("msetnx a 1 b", "ERR wrong number of arguments for 'msetnx' command"),
        ("getrange a 1", "ERR wrong number of arguments for 'getrange' command"),
        ("getrange a x 1", "ERR value is not an integer or out of range"),
        ("setrange a -1 v", "ERR offset is out of range"),
        ("setrange a x v", "ERR value is not an integer or out of range"),
        ("setrange a 8388608 v", "ERR string exceeds maximum allowed size (8388608 bytes)"),
        ("setbit a -1 1", "ERR bit offset is not an integer or out of range"),
        ("setbit a 67108864 1", "ERR bit offset is not an integer or out of range"),
        ("setbit a x 1", "ERR bit offset is not an integer or out of range"),
        ("setbit a 1 2", "ERR bit is not an integer or out of range"),
        ("getbit a x", "ERR bit offset is not an integer or out of range"),
        ("incrby a 1.5", "ERR value is not an integer or out of range"),
        ("incrby a 9223372036854775808", "ERR value is not an integer or out of range"),
        (f"decrby a {INTEGER_MIN}", "ERR decrement would overflow"),
        ("incrbyfloat a x", "ERR value is not a valid float"),
        ("incrbyfloat a 1e400", "ERR value is not a valid float"),
        ("incrbyfloat a -inf", "ERR increment would produce NaN or Infinity"),
        ("kv.cas a v", "ERR wrong number of arguments for 'kv.cas' command"), ("kv.cas a v rev", "ERR syntax error"),
        ("kv.cas a v rev x", "ERR value is not an integer or out of range"),
        ("kv.cas a v absent x", "ERR syntax error"), ("kv.cas a v maybe", "ERR syntax error"),
    ],
)  # fmt: skip
def test_what_is_refused(command: str, reply: str) -> None:
    """Nothing is asked of a shard, and the text is Redis's."""
    found = World().connect().ask(command)
    assert type(found) is Error and found == reply


@pytest.mark.parametrize(
    ("command", "code", "reply"),
    [
        ("incr a", Code.NOT_A_NUMBER, "ERR value is not an integer or out of range"),
        ("incr a", Code.RANGE, "ERR increment or decrement would overflow"),
        ("incrbyfloat a 1", Code.NOT_A_NUMBER, "ERR value is not a valid float"),
        ("incrbyfloat a 1", Code.RANGE, "ERR increment would produce NaN or Infinity"),
        ("append a v", Code.TOO_LARGE, "ERR string exceeds maximum allowed size (8388608 bytes)"),
        ("kv.cas a v rev 1", Code.MISMATCH, None), ("get a", Code.RECOVERING, "TRYAGAIN it said no"),
        ("set a v", Code.NOT_ENOUGH_REPLICAS, "TRYAGAIN it said no"), ("set a v", Code.NO_SPACE, "TRYAGAIN it said no"),
        ("set a v", Code.UNKNOWN, "UNKNOWN it said no"), ("set a v nx", Code.UNKNOWN, "UNKNOWN it said no"),
    ],
)  # fmt: skip
def test_errors_of_shards(command: str, code: Code, reply: str | None, client: Client) -> None:
    """Errors of values in the words of Redis, those of the cluster by what the client is to do."""
    client.send(command)
    client.sequencer.take().fail(code)
    assert parse(client.output()) == [reply]


@pytest.mark.parametrize("start", range(-7, 8))
def test_getrange_as_in_redis(start: int) -> None:
    """Every start and end of a value of five bytes, against the rules of Redis written down once more."""
    value = b"value"
    for end in range(-7, 8):
        low, high = (i + len(value) if i < 0 else i for i in (start, end))
        low, high = max(low, 0), min(max(high, 0), len(value) - 1)
        empty = (start < 0 and end < 0 and start > end) or low > high
        expected = b"" if empty else value[low : high + 1]
        for name in ("getrange", "substr"):
            assert World().connect().ask_shards(f"{name} a {start} {end}", CELL) == expected, (start, end)


@pytest.mark.parametrize(("offset", "bit"), [(0, 1), (7, 1), (8, 0), (9, 1), (16, 0), (67_108_863, 0)])
def test_getbit(offset: int, bit: int) -> None:
    """Bit 0 is the highest of the first byte; behind the end all are 0."""
    assert World().connect().ask_shards(f"getbit a {offset}", [b"\x81\x40", 1, None]) == bit


def test_mset_of_one_shard_is_one_step(client: Client) -> None:
    """Keys of one shard are written together, those of several each by itself."""
    client.send("mset {t}a 1 {t}b 2")
    (asked,) = client.sequencer.asked
    assert asked.op == op.PUT_ALL and asked.args == ([(b"{t}a", b"1"), (b"{t}b", b"2")], False)
    asked.answer(True)
    assert parse(client.output()) == ["OK"]
    client.sequencer.asked.clear()
    client.send("mset a 1 b 2")
    assert [asked.op for asked in client.sequencer.asked] == [op.PUT, op.PUT]


def test_msetnx_of_several_shards_is_refused() -> None:
    """What is one step concerns one shard."""
    reply = World().connect().ask("msetnx a 1 b 2")
    assert reply.startswith("CROSSSLOT Keys in request don't hash to the same slot")


def test_mget_of_several_keys_is_one_read() -> None:
    """All of one point in time, whatever their shards."""
    world = World([b"a", b"c"])
    client = world.connect()
    assert client.ask_range("mget a b c a") == [b"of a", None, b"of c", b"of a"]


def test_too_many_keys(client: Client) -> None:
    """The limits of one command."""
    many = [b"k"] * (MULTI_KEYS_MAX + 1)
    assert "over the limit of 10000" in client.ask([b"MGET", *many])
    assert f"over the limit of {RESP_KEYS_MAX}" in client.ask([b"MSET", *[b"k"] * (2 * RESP_KEYS_MAX + 2)])
    long = [b"k" * 4096] * (MGET_KEYS_BYTES_MAX // 4096 + 1)
    assert f"over the limit of {MGET_KEYS_BYTES_MAX} bytes" in client.ask([b"MGET", *long])
    large = b"v" * (6 << 20)
    assert "over the limit of 16777216 bytes" in client.ask([b"MSET", b"a", large, b"b", large, b"c", large])
