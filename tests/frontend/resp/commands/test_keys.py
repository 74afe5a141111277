"""Commands on keys: what they ask of a shard, what they answer, and which arguments they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import INTEGER_MAX, KEY_BYTES_MAX, RESP_KEYS_MAX
from kvtcp.errors import Code
from kvtcp.protocol import operations as op
from tests.support.resp_tools import Client, Error, Status, World, parse


@pytest.mark.parametrize(
    ("command", "operation", "args", "result", "reply"),
    [
        ("del a", op.DELETE, (), True, 1), ("unlink a", op.DELETE, (), False, 0), ("exists a", op.EXISTS, (), True, 1),
        ("touch a", op.EXISTS, (), False, 0), ("type a", op.EXISTS, (), True, Status("string")),
        ("type a", op.EXISTS, (), False, Status("none")),
        ("expire a 5", op.EXPIRE_IF, (op.IN_MS, 5000, op.ALWAYS), True, 1),
        ("pexpire a -5", op.EXPIRE_IF, (op.IN_MS, -5, op.ALWAYS), True, 1),
        ("expireat a 5", op.EXPIRE_IF, (op.AT_MS, 5000, op.ALWAYS), False, 0),
        (f"pexpireat a {INTEGER_MAX}", op.EXPIRE_IF, (op.AT_MS, INTEGER_MAX, op.ALWAYS), True, 1),
        ("expire a 5 NX", op.EXPIRE_IF, (op.IN_MS, 5000, op.IF_ABSENT), True, 1),
        ("expire a 5 xx", op.EXPIRE_IF, (op.IN_MS, 5000, op.IF_PRESENT), True, 1),
        ("expire a 5 gt", op.EXPIRE_IF, (op.IN_MS, 5000, op.IF_LATER), True, 1),
        ("expire a 5 lt", op.EXPIRE_IF, (op.IN_MS, 5000, op.IF_EARLIER), True, 1),
        ("expire a 5 xx gt", op.EXPIRE_IF, (op.IN_MS, 5000, op.IF_LATER), True, 1),
        ("expire a 5 lt xx", op.EXPIRE_IF, (op.IN_MS, 5000, op.IF_PRESENT_EARLIER), True, 1),
        ("ttl a", op.TTL, (), 1499, 1), ("ttl a", op.TTL, (), 1500, 2), ("ttl a", op.TTL, (), None, -2),
        ("ttl a", op.TTL, (), -1, -1), ("pttl a", op.TTL, (), 1499, 1499),
        ("expiretime a", op.DEADLINE_OF, (), 1_700_000_000_000, 1_700_000_000),
        ("pexpiretime a", op.DEADLINE_OF, (), 1_700_000_000_001, 1_700_000_000_001),
        ("persist a", op.PERSIST, (), True, 1), ("rename a a", op.RENAME, (b"a", False), op.RENAMED, Status("OK")),
        ("rename a a", op.RENAME, (b"a", False), op.NO_KEY, Error("ERR no such key")),
        ("renamenx a a", op.RENAME, (b"a", True), op.RENAMED, 1),
        ("renamenx a a", op.RENAME, (b"a", True), op.NEW_KEY_EXISTS, 0),
        ("renamenx a a", op.RENAME, (b"a", True), op.NO_KEY, Error("ERR no such key")),
    ],
)  # fmt: skip
def test_what_is_asked(client: Client, command: str, operation: int, args: Any, result: Any, reply: Any) -> None:
    """One command is one operation on its key; its result becomes the reply."""
    client.send(command)
    (asked,) = client.sequencer.asked
    assert (asked.op, asked.key, asked.args) == (operation, b"a", args)
    asked.answer(result)
    found = parse(client.output())
    assert found == [reply] and type(found[0]) is type(reply)


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("del", "ERR wrong number of arguments for 'del' command"),
        ("type", "ERR wrong number of arguments for 'type' command"),
        ("expire a", "ERR wrong number of arguments for 'expire' command"),
        ("expire a x", "ERR value is not an integer or out of range"), ("expire a 1 yy", "ERR Unsupported option yy"),
        ("expire a 1 nx xx", "ERR NX and XX, GT or LT options at the same time are not compatible"),
        ("expire a 1 nx gt", "ERR NX and XX, GT or LT options at the same time are not compatible"),
        ("expire a 1 lt gt", "ERR GT and LT options at the same time are not compatible"),
        (f"expire a {INTEGER_MAX}", "ERR invalid expire time in 'expire' command"),
        (f"pexpire a {INTEGER_MAX}", "ERR invalid expire time in 'pexpire' command"),
        (f"expireat a {INTEGER_MAX}", "ERR invalid expire time in 'expireat' command"),
        (f"expire a -{INTEGER_MAX}", "ERR invalid expire time in 'expire' command"),
        ("ttl", "ERR wrong number of arguments for 'ttl' command"),
        ("rename a", "ERR wrong number of arguments for 'rename' command"), ("copy {a}1 {a}2 x", "ERR syntax error"),
        ("copy {a}1 {a}2 db", "ERR value is not an integer or out of range"),
        ("copy {a}1 {a}2 db 1", "ERR DB index is out of range"),
        ("copy a a", "ERR source and destination objects are the same"),
    ],
)  # fmt: skip
def test_what_is_refused(command: str, reply: str) -> None:
    """Nothing is asked of a shard, and the text is Redis's."""
    found = World().connect().ask(command)
    assert type(found) is Error and found == reply


@pytest.mark.parametrize("command", ["rename a b", "renamenx a b", "copy a b"])
def test_two_keys_of_two_shards(command: str) -> None:
    """What is one step concerns one shard."""
    assert World().connect().ask(command).startswith("CROSSSLOT Keys in request don't hash to the same slot")


def test_copy(client: Client) -> None:
    """With its options, within one shard."""
    client.send("copy {a}1 {a}2 DB 0 REPLACE", "copy {a}1 {a}2")
    first, second = client.sequencer.asked
    assert (first.op, first.key, first.args) == (op.COPY, b"{a}1", (b"{a}2", True))
    assert second.args == (b"{a}2", False)
    first.answer(True)
    second.answer(False)
    assert parse(client.output()) == [1, 0]


def test_several_keys(client: Client) -> None:
    """Each at its shard; the reply counts them, also one that is named twice."""
    assert client.ask_shards("del a b c", True, False, True) == 2
    assert client.ask_shards("exists a a b", True, True, False) == 2


def test_partial_failure(client: Client) -> None:
    """Some keys were deleted, of others it is not known: UNKNOWN; a read is told as it is."""
    client.send("del a b c", "exists a b")
    first, second, third, fourth, fifth = client.sequencer.asked
    first.answer(True)
    second.fail(Code.NOT_ENOUGH_REPLICAS)
    third.answer(True)
    fourth.answer(True)
    fifth.fail(Code.RECOVERING)
    assert parse(client.output()) == [
        "UNKNOWN 2 of 3 keys were written, of the others the first says: TRYAGAIN it said no", "TRYAGAIN it said no"
    ]


@pytest.mark.parametrize("command", ["get", "set", "del", "incr", "ttl", "type", "watch", "mget", "getdel"])
def test_keys_that_are_none(command: str) -> None:
    """An empty key and one that is too long are refused by every command."""
    value = [b"v"] if command == "set" else []
    name = command.encode()
    client = World().connect()
    assert client.ask([name, b"", *value]) == "ERR a key must not be empty"
    assert "over the limit of 4096 bytes" in client.ask([name, b"k" * (KEY_BYTES_MAX + 1), *value])


def test_too_many_keys() -> None:
    """The limit of one command."""
    reply = World().connect().ask([b"DEL", *[b"k"] * (RESP_KEYS_MAX + 1)])
    assert reply == f"ERR {RESP_KEYS_MAX + 1} keys in one command are over the limit of {RESP_KEYS_MAX}"
