"""Tests of the handler: every request of the table over real replicas, its errors, and the guard of a restore."""

from __future__ import annotations

from typing import Any

import pytest

from kvtcp.constants import MGET_KEYS_BYTES_MAX, PROTOCOL_VERSION
from kvtcp.errors import Code, ProtocolError, RequestError
from kvtcp.frontend.keyspace import Keyspace
from kvtcp.frontend.native.handler import LIMITS, RequestHandler
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.messages import REQUESTS, Kind, Touches
from tests.support.replication_fakes import Answers, Cluster

# what another table than the handler's carries out
HANDED_OVER = {op for op, spec in REQUESTS.items() if spec.touches is Touches.NOTHING} - {b"hello"}


class Session(Answers):
    """A client connection."""

    def __init__(self) -> None:
        super().__init__()
        self.greeted = True
        self.name = "?"

    def progress(self, token: int, progress: dict[str, Any]) -> None:
        raise AssertionError("the handler itself has no progress to report")


class Served:
    """A handler over a cluster whose links answer at once."""

    def __init__(self) -> None:
        self.cluster = Cluster(nodes=3, factor=2, shards=8)
        self.calls: list[tuple[Any, ...]] = []  # what was handed over
        self.keyspace = Keyspace(8)
        administration = {op: lambda *args, op=op: self.calls.append((op.decode(), *args)) for op in HANDED_OVER}
        self.handler = RequestHandler(self.cluster.sequencer, self.keyspace, administration)
        self.session = Session()
        self.ident = 0

    def ask(self, op: bytes, *args: Any) -> Any:
        """The result of a request, or its error (code, message, details)."""
        self.ident += 1
        self.handler.handle(self.session, [[self.ident, op, *args]])
        self.cluster.pump()
        self.cluster.pump()
        return self.session.ok[self.ident] if self.ident in self.session.ok else self.session.failed[self.ident]


@pytest.fixture
def served() -> Served:
    """A handler with a greeted session."""
    return Served()


def test_single_keys(served: Served) -> None:
    """Every operation on one key, with its result as the protocol document says."""
    ask = served.ask
    assert ask(b"get", b"k") is None and ask(b"exists", b"k") is False and ask(b"ttl", b"k") is None
    assert ask(b"put", b"k", b"v") == 1
    assert ask(b"get", b"k") == (b"v", 1, None)
    assert ask(b"put", b"k", b"w", {b"ttl_ms": 5_000}) == 2
    assert ask(b"ttl", b"k") == 5_000 and ask(b"persist", b"k") is True and ask(b"ttl", b"k") == -1
    assert ask(b"add", b"k", b"x")[0] == Code.EXISTS
    assert ask(b"add", b"new", b"x") >= 1
    assert ask(b"cas", b"k", b"y", {b"value": b"w"}) > 4
    assert ask(b"cas", b"k", b"z", {b"rev": 1})[0] == Code.MISMATCH
    assert ask(b"incr", b"n", 4) == 4 and ask(b"incr", b"n", -5) == -1
    assert ask(b"expire", b"k", 1_000) is True and ask(b"exists", b"k") is True
    assert ask(b"delete", b"k", {b"value": b"no"}) is False and ask(b"delete", b"k") is True


def test_many_keys(served: Served) -> None:
    """m-operations have one result for each key, in order; empty ones are answered at once."""
    ask = served.ask
    revs = ask(b"mput", [[b"a", b"1"], [b"b", b"2", None], [b"c", b"3", 60_000]])
    assert len(revs) == 3 and all(type(rev) is int for rev in revs)
    assert [cell and cell[0] for cell in ask(b"mget", [b"c", b"x", b"a", b"c"])] == [b"3", None, b"1", b"3"]
    assert ask(b"count", None, None) == 3 and ask(b"count", b"b", None) == 2 and ask(b"count", b"b", b"b") == 0
    assert ask(b"mdelete", [b"a", b"x"]) == [True, False]
    assert ask(b"mget", []) == ask(b"mput", []) == ask(b"mdelete", []) == []


def test_part_of_an_mput_that_fails(served: Served) -> None:
    """The error of a key is an array in its place; the others have their results."""
    down = served.cluster.sequencer.shards[shard_of(b"a", 8)]
    other = next(bytes([c]) for c in range(98, 123) if shard_of(bytes([c]), 8) != down.number)
    down.serving, down.writable, down.reason = False, False, "a test"
    result = served.ask(b"mput", [[b"a", b"1"], [other, b"2"]])
    assert result[0][0] == Code.SHARD_DOWN and "a test" in result[0][1] and result[1] == 1


def test_scan(served: Served) -> None:
    """Pages in both directions, until there is no cursor; an empty range needs no node."""
    served.ask(b"mput", [[b"k%d" % n, b"v"] for n in range(7)])
    for options in ({}, {b"reverse": True, b"keys_only": True}):
        seen: list[bytes] = []
        cursor = None
        while True:
            rows, cursor = served.ask(b"scan", None, None, 3, options | ({b"cursor": cursor} if cursor else {}))
            seen += [row[0] for row in rows]
            assert all((row[1] is None) == bool(options) for row in rows)
            if cursor is None:
                break
        assert seen == sorted((b"k%d" % n for n in range(7)), reverse=bool(options))
    assert served.ask(b"scan", b"b", b"a", 3) == [[], None]


def test_hello_comes_first(served: Served) -> None:
    """Before it nothing else is done; it tells version, shards and limits."""
    served.session.greeted = False
    assert served.ask(b"get", b"k")[0] == Code.BAD_REQUEST
    reply = served.ask(b"hello", PROTOCOL_VERSION, b"me")
    assert (reply["shards"], reply["limits"], served.session.name) == (8, LIMITS, "me")
    assert served.ask(b"get", b"k") is None
    assert served.ask(b"hello", 99, b"me")[0] == Code.VERSION


def test_administration(served: Served) -> None:
    """What is about no key is handed over with its checked arguments, also while a restore runs."""
    served.keyspace.restoring = b""
    session = served.session
    requests = [
        [1, b"status"], [2, b"nodes"], [3, b"shards"], [4, b"backup"], [5, b"restore", b"b1", {b"prefix": b"p"}],
    ]  # fmt: skip
    served.handler.handle(session, requests)
    assert served.calls == [
        ("status", session, 1), ("nodes", session, 2), ("shards", session, 3), ("backup", session, 4, None),
        ("restore", session, 5, "b1", "merge", b"p", False),
    ]  # fmt: skip


def test_changes_of_the_cluster(served: Served) -> None:
    """Each is handed over, with its checked arguments, also while a restore runs; a refusal is its answer."""
    served.keyspace.restoring = b""
    requests = [
        [1, b"node_add", b"h", 5000], [2, b"node_drain", b"n1"], [3, b"node_remove", b"n2"],
        [4, b"node_forget", b"n3"], [5, b"rebalance"], [6, b"rebalance", {b"dry_run": True}],
        [7, b"shard_accept_loss", 7], [8, b"node_undrain", b"n1"],
    ]  # fmt: skip
    session = served.session
    served.handler.handle(session, requests)
    assert served.calls == [
        ("node_add", session, 1, "h", 5000), ("node_drain", session, 2, "n1"), ("node_remove", session, 3, "n2"),
        ("node_forget", session, 4, "n3"), ("rebalance", session, 5, False), ("rebalance", session, 6, True),
        ("shard_accept_loss", session, 7, 7), ("node_undrain", session, 8, "n1"),
    ]  # fmt: skip
    assert {request[1] for request in requests} == {op for op, spec in REQUESTS.items() if spec.kind is Kind.ADMIN}

    def refuse(session: Session, ident: int, shard: int) -> None:
        raise RequestError("there is no such shard", Code.BAD_REQUEST, {"shard": shard})

    served.handler.administration = {b"shard_accept_loss": refuse}
    served.ident = 8
    assert served.ask(b"shard_accept_loss", 8) == (Code.BAD_REQUEST, "there is no such shard", {"shard": 8})


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ((b"get",), Code.BAD_REQUEST), ((b"get", b"a", b"b"), Code.BAD_REQUEST), ((b"get", b""), Code.BAD_REQUEST),
        ((b"put", b"a"), Code.BAD_REQUEST), ((b"put", b"a", 5), Code.BAD_REQUEST),
        ((b"put", b"a", b"v", {b"x": 1}), Code.BAD_REQUEST), ((b"mget", [b"a", 5]), Code.BAD_REQUEST),
        ((b"scan", None, None, 0), Code.BAD_REQUEST),
        ((b"mget", [b"k" * 4_096] * (MGET_KEYS_BYTES_MAX // 4_096 + 1)), Code.TOO_LARGE),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_requests(served: Served, request_: tuple[Any, ...], code: Code) -> None:
    """Each is answered with its code, the connection goes on, and nothing was queued."""
    assert served.ask(*request_)[0] == code
    assert all(link.last_ordinal == 0 for link in served.cluster.sequencer.links.values())
    assert served.ask(b"get", b"k") is None


@pytest.mark.parametrize(("op", "shown"), [
    (b"GET", '"GET"'), (b"", '""'), (b"nonsense", '"nonsense"'), (None, "of type NoneType"), (7, "of type int"),
    ([], "of type list"), ({}, "of type dict"), ([b"get"], "of type list"), (True, "of type bool"),
])  # fmt: skip
def test_unknown_operations(served: Served, op: Any, shown: str) -> None:
    """Even what cannot be looked up in a table is an unknown operation, answered as such."""
    assert served.ask(op, b"k") == (Code.UNKNOWN_OP, f"unknown operation {shown}", {})


def test_request_without_an_id(served: Served) -> None:
    """Nobody can be answered: the error is the connection's."""
    with pytest.raises(ProtocolError):
        served.handler.handle(served.session, [[b"get"]])


def test_guard_of_a_restore(served: Served) -> None:
    """What touches the prefix is refused, not executed; everything else goes on."""
    served.keyspace.restoring = b"p"
    for request in (
        (b"get", b"p1"), (b"put", b"p", b"v"), (b"mget", [b"a", b"pp"]), (b"mdelete", [b"p1"]),
        (b"mput", [[b"p1", b"v"]]), (b"scan", None, None, 5), (b"scan", b"p", None, 5), (b"count", b"o", b"pa"),
        (b"count", None, None, {b"prefix": b"p1"}),
    ):  # fmt: skip
        code, text, _ = served.ask(*request)
        assert code == Code.RESTORING and "keys that begin with" in text
    for request in (
        (b"put", b"a", b"v"), (b"mget", [b"a", b"o"]), (b"mput", [[b"q", b"v"]]), (b"scan", b"q", None, 5),
        (b"count", None, b"p"), (b"mdelete", [b"q"]),
    ):  # fmt: skip
        assert type(served.ask(*request)) is not tuple
    served.keyspace.restoring = b""
    assert "all keys are closed until a restore completes" in served.ask(b"get", b"a")[1]
    assert served.ask(b"nonsense")[0] == Code.UNKNOWN_OP


def test_every_request_has_a_handler(served: Served) -> None:
    """The table of messages and the handler know the same operations; administration is handed over."""
    handlers = served.handler._handlers
    assert set(handlers) == set(REQUESTS)
    assert {op for op in handlers if handlers[op] == served.handler._hand_over} == HANDED_OVER
