"""MULTI, EXEC, DISCARD, WATCH and UNWATCH: what becomes one operation, and what is refused."""

from __future__ import annotations

import pytest

from kvtcp.constants import (
    ARRAY_ITEMS_MAX,
    FRAME_BYTES_MAX,
    KEY_BYTES_MAX,
    MULTI_BYTES_MAX,
    MULTI_KEYS_MAX,
    RESP_KEYS_MAX,
    VALUE_BYTES_MAX,
)
from kvtcp.errors import Code
from kvtcp.frontend.resp.commands.transactions import UNKNOWN
from kvtcp.protocol import operations as op
from tests.support.resp_tools import Client, Error, NilArray, Status, World, parse

ABORTED = "EXECABORT Transaction discarded because of previous errors."


def queued(*commands: str | list[bytes]) -> Client:
    """A client between MULTI and EXEC, with these commands."""
    client = World().connect()
    client.send("multi", *commands)
    assert parse(client.output()) == ["OK"] + ["QUEUED"] * len(commands)
    assert not client.sequencer.asked, "nothing is asked before EXEC"
    return client


def test_a_transaction_is_one_operation() -> None:
    """All commands become one item of their shard; their results become one array of replies."""
    commands = ["set {a}1 x", "get {a}1", "ping", "mset {a}2 y {a}3 z", "incr {a}1", "kv.cas {a}1 v rev 9", "ttl {a}1"]
    client = queued(*commands)
    client.send("exec")
    (asked,) = client.sequencer.asked
    assert (asked.op, asked.key) == (op.TRANSACTION, b"{a}1")
    watched, items = asked.args
    assert watched == [] and [item[0] for item in items] == [op.PUT, op.GET, op.PUT, op.PUT, op.INCR, op.CAS, op.TTL]
    assert items[0] == [op.PUT, b"{a}1", b"x"] and items[1] == [op.GET, b"{a}1"]
    not_a_number = [int(Code.NOT_A_NUMBER), b"it is none", {}]
    asked.answer([5, (b"x", 5, None), 5, 5, not_a_number, [int(Code.MISMATCH), b"no", {}], -1])
    assert parse(client.output()) == [
        ["OK", b"x", "PONG", "OK", "ERR value is not an integer or out of range", None, -1]
    ]
    assert client.resp.state.transaction is None


def test_empty_transaction() -> None:
    """Nothing, or nothing on keys, asks no shard."""
    for commands, reply in ((["multi", "exec"], []), (["multi", "ping", "echo x", "exec"], ["PONG", b"x"])):
        client = World().connect()
        client.send(*commands)
        assert parse(client.output())[-1] == reply


@pytest.mark.parametrize(
    ("code", "word"), [(Code.RECOVERING, "TRYAGAIN"), (Code.UNKNOWN, "UNKNOWN"), (Code.TOO_LARGE, "ERR")]
)
def test_exec_fails_as_a_whole(code: Code, word: str) -> None:
    """The shard's error is EXEC's."""
    client = queued("set a 1", "get a")
    client.send("exec", "ping")
    client.sequencer.take().fail(code)
    assert parse(client.output()) == [f"{word} it said no", "PONG"]


@pytest.mark.parametrize(
    "command",
    ["nosuch", "get", "set a 1 x", "incrby a x", "keys *", "scan 0", "dbsize", "flushall", "info", "randomkey",
     "kv.range - +", "kv.count - +", "kv.status", "select 1", "client nosuch", "get b", "mset a 1 b 2", "rename a b"],
)  # fmt: skip
def test_execabort(command: str, client: Client) -> None:
    """A command that is refused when it is queued makes EXEC refuse all; the next transaction is a new one."""
    client.send("multi", "set a 1", command, "set a 2", "exec", "get a")
    replies = parse(client.output())
    assert [type(reply) for reply in replies] == [Status, Status, Error, Status, Error]
    assert replies[4] == ABORTED
    (asked,) = client.sequencer.asked
    assert asked.op == op.GET, "nothing of it was asked"
    client.sequencer.asked.clear()
    client.send("multi", "set a 1", "exec")
    assert client.sequencer.take().op == op.TRANSACTION


def test_keys_of_several_shards(client: Client) -> None:
    """CROSSSLOT says what to do, at the command; of watched keys at EXEC."""
    client.send("multi", "set a 1", "set b 2")
    reply = parse(client.output())[-1]
    assert reply.startswith("CROSSSLOT") and "transaction=False" in reply
    client.send("discard", "watch b")
    client.sequencer.take().answer(3)
    client.send("multi", "set a 1", "exec")
    assert parse(client.output())[-1].startswith("CROSSSLOT")
    assert not client.sequencer.asked and not client.resp.state.watched


def test_nested_and_without(client: Client) -> None:
    """MULTI in MULTI and WATCH in MULTI are errors that abort nothing; EXEC and DISCARD need a MULTI."""
    client.send("exec", "discard", "multi", "multi", "watch a", "set a 1", "discard", "multi", "multi", "exec")
    assert parse(client.output()) == [
        "ERR EXEC without MULTI", "ERR DISCARD without MULTI", "OK", "ERR MULTI calls can not be nested",
        "ERR WATCH inside MULTI is not allowed", "QUEUED", "OK", "OK", "ERR MULTI calls can not be nested", [],
    ]  # fmt: skip
    assert not client.sequencer.asked


def test_reset_and_quit_end_a_transaction() -> None:
    """Both are carried out at once."""
    client = queued("set a 1")
    client.send("reset", "exec")
    assert parse(client.output()) == ["RESET", "ERR EXEC without MULTI"]
    client = queued("set a 1")
    client.send("quit", "exec")
    assert parse(client.output()) == ["OK"] and client.resp.closing


def test_closed_by_a_restore(client: Client) -> None:
    """What a restore keeps out is refused when it is queued, and then nothing of the transaction is executed; one that
    began after that is met at EXEC."""
    client.world.keyspace.restoring = b"a"
    client.send("multi", "set {x}b 1", "set a{x} 1", "exec")
    replies = parse(client.output())
    assert replies[2].startswith("TRYAGAIN keys that begin with") and replies[3] == ABORTED
    client.world.keyspace.restoring = None
    client.send("multi", "set a 1")
    client.world.keyspace.restoring = b""
    client.send("exec", "watch a", "set a 1")
    replies = parse(client.output())
    assert all(reply.startswith("TRYAGAIN all keys are closed until a restore") for reply in replies[2:])
    assert len(replies) == 5 and not client.sequencer.asked


# --- WATCH ------------------------------------------------------------------------------------------------


def test_watch(client: Client) -> None:
    """The revisions go with EXEC; nil says that one was another. EXEC and DISCARD forget them."""
    client.send("watch {a}1 {a}2 {a}1")
    first, second = client.sequencer.asked
    assert first.op == second.op == op.REVISION
    client.sequencer.asked.clear()
    second.answer(None)
    assert client.output() == b""
    first.answer(7)
    assert parse(client.output()) == ["OK"]
    client.send("watch {a}1", "multi", "set {a}1 x", "exec")
    (asked,) = client.sequencer.asked
    assert dict(asked.args[0]) == {b"{a}1": 7, b"{a}2": 0}
    client.sequencer.asked.clear()
    asked.answer(None)
    assert parse(client.output()) == ["OK", "OK", "QUEUED", NilArray]
    assert client.resp.state.watched == {} and client.resp.state.watched_bytes == 0
    for end in ("discard", "reset"):
        client.send("watch a")
        client.sequencer.take().answer(1)
        client.send("multi", end)
        client.output()
        assert client.resp.state.watched == {} and client.resp.state.watched_bytes == 0, end


def test_watch_alone_is_compared_too(client: Client) -> None:
    """An empty transaction after WATCH fails if the key was changed, as in Redis."""
    client.send("watch a")
    client.sequencer.take().answer(1)
    client.send("multi", "ping", "exec")
    client.sequencer.take().answer(None)
    assert parse(client.output())[-1] is NilArray


def test_unwatch(client: Client) -> None:
    """Before MULTI it forgets; between MULTI and EXEC it is one of the commands, too late for this transaction."""
    client.send("watch a")
    client.sequencer.take().answer(1)
    client.send("unwatch", "multi", "exec")
    assert parse(client.output()) == ["OK", "OK", "OK", []]
    client.send("watch a")
    client.sequencer.take().answer(1)
    client.send("multi", "unwatch", "set a 1", "exec")
    assert client.sequencer.take().args[0] == [(b"a", 1)]


def test_exec_without_multi_forgets_nothing(client: Client) -> None:
    """It is an error like others."""
    client.send("watch a")
    client.sequencer.take().answer(1)
    client.send("exec", "multi", "set a 1", "exec")
    assert client.sequencer.take().args[0] == [(b"a", 1)]


def test_watch_pipelined_with_its_transaction(client: Client) -> None:
    """WATCH, MULTI, commands and EXEC in one read: what follows WATCH waits for its revision, in order."""
    client.feed(b"watch a\r\nmulti\r\nset a 1\r\nexec\r\nget a\r\n")
    (asked,) = client.sequencer.asked
    assert asked.op == op.REVISION and client.resp.waits and client.resp.outstanding == 5
    client.feed(b"get b\r\n")
    client.sequencer.take().answer(4)
    # more comes in before the session had its turn
    client.feed(b"get c\r\n")
    assert not client.sequencer.asked, "later commands do not overtake those that were held"
    assert parse(client.output()) == ["OK", "OK", "QUEUED"]
    assert [(asked.op, asked.key) for asked in client.sequencer.asked] == [
        (op.TRANSACTION, b"a"), (op.GET, b"a"), (op.GET, b"b"), (op.GET, b"c"),
    ]  # fmt: skip
    assert client.sequencer.asked[0].args[0] == [(b"a", 4)]


def test_an_error_of_the_protocol_behind_watch(client: Client) -> None:
    """It comes after the replies of the commands before it, and ends the connection then."""
    client.feed(b"watch a\r\nset b 1\r\n*x\r\n")
    assert not client.resp.closing and client.resp.outstanding == 3
    client.sequencer.take().answer(4)
    assert parse(client.output()) == ["OK"]
    client.sequencer.take().answer(5)
    assert parse(client.output()) == ["OK", "ERR Protocol error: invalid multibulk length"]
    assert client.resp.closing and not client.resp.has_work


def test_a_watch_that_failed_lets_no_exec_pass(client: Client) -> None:
    """A revision that could not be read is one that no key has: who does not look at WATCH's error is safe still."""
    client.feed(b"watch {a}1 {a}2\r\nmulti\r\nset {a}1 1\r\nexec\r\n")
    client.sequencer.take().answer(3)
    client.sequencer.take().fail(Code.RECOVERING)
    assert parse(client.output()) == ["TRYAGAIN it said no", "OK", "QUEUED"]
    assert dict(client.sequencer.take().args[0]) == {b"{a}1": 3, b"{a}2": UNKNOWN}
    client.send("unwatch", "watch {a}2")
    client.sequencer.take().fail(Code.RECOVERING)
    client.send("watch {a}2")
    client.sequencer.take().answer(5)
    assert client.resp.state.watched == {b"{a}2": 5}, "it may be tried again"


def test_a_watch_that_is_refused_at_once(client: Client) -> None:
    """A shard that is down refuses in the same step: the client does not wait for ever."""
    client.sequencer.refuses = (int(Code.SHARD_DOWN), "it is down")
    client.send("watch a", "ping")
    assert parse(client.output()) == ["TRYAGAIN it is down", "PONG"] and not client.resp.waits


# --- limits -----------------------------------------------------------------------------------------------


def test_limits_of_a_transaction(client: Client) -> None:
    """Commands, keys and bytes of one transaction are limited, so that it fits a frame with all its arrays."""
    client.send("multi", *["del a"] * MULTI_KEYS_MAX, "del a", "exec")
    replies = parse(client.output())
    assert replies[-3:] == ["QUEUED", f"ERR a transaction is over the limit of {MULTI_KEYS_MAX} commands", ABORTED]
    half = [b"DEL", *[b"a"] * (RESP_KEYS_MAX // 2)]
    limit = f"ERR a transaction is over the limit of {RESP_KEYS_MAX} keys or {MULTI_BYTES_MAX} bytes"
    client.send("multi", half, half, "del a", "exec")
    assert parse(client.output())[-3:] == ["QUEUED", limit, ABORTED]
    pairs = [b"MSETNX", *[b"a", b"b"] * (RESP_KEYS_MAX // 2)]
    client.send("multi", pairs, pairs, "del a", "discard")
    assert parse(client.output())[-3:] == ["QUEUED", limit, "OK"]
    large = [b"SET", b"a", b"v" * VALUE_BYTES_MAX]
    client.send("multi", large, large, "exec")
    assert parse(client.output()) == ["OK", "QUEUED", limit, ABORTED]
    assert RESP_KEYS_MAX + MULTI_KEYS_MAX < ARRAY_ITEMS_MAX and MULTI_BYTES_MAX <= FRAME_BYTES_MAX


def test_limits_of_watched_keys(client: Client) -> None:
    """However many WATCHes there are, and they are counted as held."""
    keys = [b"%d" % n for n in range(MULTI_KEYS_MAX)]
    client.send([b"WATCH", *keys])
    while client.sequencer.asked:
        client.sequencer.take().answer(1)
    client.send("watch another", "watch 5")
    limit = f"ERR the watched keys are over the limit of {MULTI_KEYS_MAX} or {MULTI_BYTES_MAX} bytes"
    assert parse(client.output()) == ["OK", limit, "OK"]
    assert client.resp.held_bytes == client.resp.state.watched_bytes == sum(len(key) + 16 for key in keys)
    client.send("reset", [b"WATCH", *[b"%d" % n + b"k" * (KEY_BYTES_MAX - 4) for n in range(4200)]])
    assert parse(client.output()) == ["RESET", limit]


def test_watched_keys_and_commands_fit_together(client: Client) -> None:
    """Both are in the one item."""
    client.send([b"WATCH", *[b"{a}%d" % n + b"k" * (KEY_BYTES_MAX - 7) for n in range(4000)]])
    while client.sequencer.asked:
        client.sequencer.take().answer(1)
    client.send("multi", [b"SET", b"{a}", b"v" * (1 << 20)], "exec")
    assert parse(client.output())[-1].startswith("EXECABORT the transaction and its watched keys are over")
    assert not client.sequencer.asked
