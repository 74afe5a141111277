"""Pipeline: replies in order whatever comes first, turns, what is held, and what ends a connection."""

from __future__ import annotations

import random

import pytest

from kvtcp.constants import CLIENT_OUTPUT_BYTES_MAX, KEY_BYTES_MAX
from kvtcp.errors import Code
from kvtcp.frontend.resp.pipeline import LARGE_REPLY_BYTES, RUN_BYTES, TURN_BYTES_MAX
from kvtcp.protocol import operations as op
from tests.fuzz.resp import array
from tests.support.resp_tools import Client, Error, World, one, parse


def test_replies_in_order() -> None:
    """Answers come in any order and at any time; replies leave in the order of the commands, as soon as they can."""
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    for _ in range(100):
        client = World().connect()
        expected: list[object] = []
        kinds = (b"get", b"GET", b"set", b"SET", b"ping", b"nosuch", b"strlen")
        for n in range(30):
            kind = rng.choice(kinds)
            key = b"k%d" % n
            client.feed(array(kind, *([key, b"v"] if kind.lower() == b"set" else [] if kind == b"ping" else [key])))
            value = b"v" * rng.choice((0, 5, LARGE_REPLY_BYTES, 5000))
            replies = {b"get": value, b"set": "OK", b"ping": "PONG", b"strlen": len(value)}
            expected.append(replies.get(kind.lower()))
            for asked in client.sequencer.asked:
                if asked.key == key:
                    asked.result = 7 if asked.op == op.PUT else [value, 1, None]  # type: ignore[attr-defined]
        got: list[object] = []
        asked_all = client.sequencer.asked[:]
        rng.shuffle(asked_all)
        for asked in asked_all:
            asked.answer(asked.result)  # type: ignore[attr-defined]
            if rng.randrange(2):
                got += parse(client.output())
                assert len(got) < 30 or asked is asked_all[-1]
        got += parse(client.output())
        assert [None if type(reply) is Error else reply for reply in got] == expected, f"seed {seed}"
        assert client.resp.large_bytes == 0 and not client.resp.slots


def test_the_quick_way_and_the_table_agree() -> None:
    """GET and SET without options answer the same in capitals, in small letters, and in neither."""
    for version in (2, 3):
        for name in (b"get", b"GET", b"Get"):
            for cell, value in ((None, None), ([b"", 1, None], b""), ([b"v" * 1007, 1, None], b"v" * 1007),
                                ([b"v" * 1008, 1, 5], b"v" * 1008), ([b"v" * 5000, 1, None], b"v" * 5000)):  # fmt: skip
                client = World().connect()
                client.resp.set_version(version)
                client.send([name, b"a"])
                client.sequencer.take().answer(cell)
                out = client.output()
                assert one(out) == value and (value is not None or out == (b"_\r\n" if version == 3 else b"$-1\r\n"))
                assert client.resp.large_bytes == 0
        for name in (b"set", b"SET", b"Set"):
            client = World().connect()
            client.send([name, b"a", b"v"])
            asked = client.sequencer.take()
            assert (asked.op, asked.key, asked.args, asked.size) == (op.PUT, b"a", (b"v",), 2)
            asked.answer(1)
            assert one(client.output()) == "OK"


@pytest.mark.parametrize("name", ["get", "GET", "Get"])
@pytest.mark.parametrize("arguments", [[], [b""], [b"k" * (KEY_BYTES_MAX + 1)], [b"a", b"b"]])
def test_wrong_gets(name: str, arguments: list[bytes]) -> None:
    """The quick way takes what is right and nothing else."""
    assert type(World().connect().ask([name.encode(), *arguments])) is Error


@pytest.mark.parametrize("arguments", [[], [b"a"], [b"", b"v"], [b"k" * (KEY_BYTES_MAX + 1), b"v"], [b"a", b"v", b"x"]])
def test_wrong_sets(arguments: list[bytes]) -> None:
    """The same of SET."""
    for name in (b"set", b"SET"):
        assert type(World().connect().ask([name, *arguments])) is Error


@pytest.mark.parametrize("command", ["get a", "set a v"])
@pytest.mark.parametrize("code", [Code.SHARD_DOWN, Code.OVERLOADED])
def test_refused_at_once(command: str, code: Code, client: Client) -> None:
    """A sequencer that refuses in the same step is answered to in order too."""
    client.sequencer.refuses = (int(code), "no")
    client.send("ping", command, "ping")
    assert parse(client.output()) == ["PONG", "TRYAGAIN no", "PONG"]


def test_unknown_commands(client: Client) -> None:
    """The text is Redis's, and bounded, whatever the bytes."""
    assert client.ask("nosuch a b") == "ERR unknown command 'nosuch', with args beginning with: 'a' 'b' "
    assert len(client.ask([b"x" * 100_000, *[b"y" * 1000] * 1000])) < 400
    assert client.ask([b"\r\n\xff", b"\r\n+OK\r\n"]).startswith("ERR unknown command '")
    assert client.ask([b""]) == "ERR unknown command '', with args beginning with: "


def test_wakes_once(client: Client) -> None:
    """However many replies there are, the session is told once until it takes them."""
    client.send("ping", "ping", "get a", "set a v", "nosuch")
    assert client.wakes == 1
    client.output()
    client.sequencer.take().answer(None)
    client.sequencer.take().answer(1)
    assert client.wakes == 2


# --- order of reads and writes ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["mget a b", "keys *", "scan 0", "dbsize", "randomkey", "kv.range - +", "info"])
def test_reads_over_shards_do_not_pass_writes_that_wait(command: str) -> None:
    """While writes of this client wait for room, a read that could pass them is asked when they are answered, and what
    is behind it waits; a client that has asked for nothing before does not wait."""
    world = World([b"a"])
    client, other = world.connect(), world.connect()
    client.send("set a 1")
    (write,) = world.sequencer.asked
    world.sequencer.waiting_items = 1
    world.sequencer.shards[write.number].waiting = True
    client.send(command, "set a 2")
    other.send(command)
    assert len(world.sequencer.multi) == 1 and len(world.sequencer.asked) == 1
    assert world.sequencer.answer_reads() and other.output() and client.output() == b""
    write.answer(1)
    assert parse(client.output()) == ["OK"]
    assert len(world.sequencer.multi) == 1 and world.sequencer.asked[1].args == (b"2",)
    assert world.sequencer.answer_reads()
    world.sequencer.asked[1].answer(2)
    assert len(parse(client.output())) == 2 and not client.resp.outstanding


@pytest.mark.parametrize("command", ["get a", "Get a", "strlen a", "exists a b", "ttl a", "mget a"])
def test_reads_do_not_pass_writes_that_wait_for_a_node(command: str) -> None:
    """A read of one key passes writes only if a member of its shard is missing."""
    for is_whole in (True, False):
        world = World()
        client = world.connect()
        client.send("set a 1")
        write = world.sequencer.asked[0]
        world.sequencer.waiting_items = 1
        world.sequencer.shards[write.number].waiting = True
        world.sequencer.shards[write.number].whole = is_whole
        client.send(command, "set c 1")
        assert (len(world.sequencer.asked) > 1) == is_whole
        write.answer(1)
        assert parse(client.output()) == ["OK"]
        assert [asked.key for asked in world.sequencer.asked if asked.op < op.WRITE_OP_END] == [b"a", b"c"]
        assert len(world.sequencer.asked) >= 3


def test_earlier_replies_are_of_the_earlier_version(client: Client) -> None:
    """What was asked before HELLO or RESET is answered in the version of then, though the answer comes later."""
    client.send("get a", "hello 3", "get b", "reset", "get c")
    client.sequencer.take().answer(None)
    out = client.output()
    assert out.startswith(b"$-1\r\n%7\r\n")
    client.sequencer.take().answer(None)
    out = client.output()
    assert out == b"_\r\n+RESET\r\n"
    client.sequencer.take().answer(None)
    assert client.output() == b"$-1\r\n"


# --- endings ----------------------------------------------------------------------------------------------


def test_quit(client: Client) -> None:
    """What came before QUIT is answered, what comes behind is not looked at, in the same read or later."""
    client.feed(b"get a\r\nquit\r\nset a v\r\nping\r\n")
    client.feed(b"set a v\r\n")
    (asked,) = client.sequencer.asked
    assert client.output() == b"" and client.resp.closing
    asked.answer([b"v", 1, None])
    assert parse(client.output()) == [b"v", "OK"] and not client.resp.slots


def test_quit_behind_watch(client: Client) -> None:
    """Held commands end with QUIT as others do."""
    client.feed(b"watch a\r\nping\r\nquit\r\nset a v\r\n")
    client.sequencer.take().answer(1)
    assert parse(client.output()) == ["OK", "PONG", "OK"]
    assert client.resp.closing and not client.sequencer.asked and not client.resp.outstanding


def test_protocol_error(client: Client) -> None:
    """Its reply is the last one."""
    client.feed(b"get a\r\n*1\r\n:5\r\n")
    client.feed(b"ping\r\n")
    client.sequencer.take().answer(None)
    assert parse(client.output()) == [None, "ERR Protocol error: expected '$', got ':'"] and client.resp.closing


@pytest.mark.parametrize("line", [b"POST / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n", b"host: b\r\n"])
def test_browsers(line: bytes, client: Client) -> None:
    """What a browser sends ends the connection, and nothing behind it is carried out."""
    client.feed(line + b"set a v\r\n")
    assert client.resp.suspicious and client.resp.closing and not client.sequencer.asked


# --- turns and accounts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["command", "command docs", "info", "kv.status", "client list", "scan 0", "dbsize"])
def test_a_turn_is_bounded(command: str) -> None:
    """Of thousands of expensive commands in one read, few are carried out before others have their turn; all are
    answered, and those behind them in order."""
    world = World([b"a"])
    client = world.connect()
    client.resp.state.name = "n" * 200
    client.send(*[command] * 500, "ping", "get a")
    done = len(client.resp.slots)
    assert done <= max(TURN_BYTES_MAX // RUN_BYTES, TURN_BYTES_MAX // LARGE_REPLY_BYTES) + 1 or command == "client list"
    assert client.resp.large_bytes <= TURN_BYTES_MAX + 100_000
    out = client.output()
    while world.sequencer.answer_reads():
        out += client.output()
    world.sequencer.take().answer(None)
    replies = parse(out + client.output())
    assert len(replies) == 502 and replies[-2:] == ["PONG", None]


def test_cheap_commands_are_one_turn(client: Client) -> None:
    """Thousands of PINGs and SETs are not cut into turns."""
    client.send(*["ping", "set a v", "incr a", "ttl a"] * 2000)
    assert len(client.resp.slots) == 8000 and not client.resp.held


def test_who_does_not_read_is_not_served(client: Client) -> None:
    """While the client does not read, what is held is not begun; then it goes on."""
    client.send(*["command"] * 200)
    client.resp.may_begin = False
    client.resp.take_output()
    assert client.resp.held and not client.resp.has_work
    client.resp.may_begin = True
    assert client.resp.has_work and len(parse(client.output())) > 100


def test_replies_behind_a_slow_one_are_bounded(client: Client) -> None:
    """What waits for an earlier reply is held back at the cap of unread replies, and goes on when that one came."""
    client.send("get slow", *[[b"ECHO", b"x" * 200_000]] * 50)
    assert client.output() == b""
    assert client.resp.held and client.resp.large_bytes <= CLIENT_OUTPUT_BYTES_MAX + TURN_BYTES_MAX + 200_100
    assert client.resp.held_bytes == client.resp.large_bytes
    client.sequencer.take().answer(None)
    assert len(parse(client.output())) == 51
    assert client.resp.held_bytes == 0 and not client.resp.outstanding


def test_order_behind_a_turn(client: Client) -> None:
    """Commands that come while others are held go behind them."""
    client.send(*["command"] * 200, "set a 1")
    assert client.resp.held
    client.send("set a 2")
    assert not client.sequencer.asked, "the second SET does not pass the first"
    client.output()
    assert [asked.args for asked in client.sequencer.asked] == [(b"1",), (b"2",)]


def test_restoring_closes_the_quick_way(client: Client) -> None:
    """GET and SET meet a restore too, whenever it begins."""
    client.world.keyspace.restoring = b"a"
    client.send("get a", "set a v", "set b v")
    replies = client.resp.take_output()
    assert all(reply.startswith(b"-TRYAGAIN keys that begin with ") for reply in replies)
    assert len(replies) == 2 and [asked.key for asked in client.sequencer.asked] == [b"b"]
