"""What the tests of the Redis face share: a sequencer that only remembers, a client of it, and a reader of replies.

Nothing here has a socket or a clock: a test says when which answer comes, and how late it is.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from kvtcp.frontend.keyspace import Keyspace
from kvtcp.frontend.resp.client_state import ClientState
from kvtcp.frontend.resp.parser import RespParser
from kvtcp.frontend.resp.pipeline import Pipeline
from kvtcp.frontend.resp.service import RespService
from kvtcp.protocol import operations as op
from kvtcp.protocol.hashing import shard_of
from kvtcp.replication.sequencing.multi_read import MultiRead

SHARDS = 8


@dataclass
class Asked:
    """One operation that was asked of a shard, and not answered."""

    op: int
    number: int
    key: bytes
    args: tuple[Any, ...]
    size: int
    sink: Any
    token: Any

    def answer(self, result: Any) -> None:
        """The shard's result."""
        self.sink.reply(self.token, result)

    def fail(self, code: int, text: str = "it said no") -> None:
        """The shard's error."""
        self.sink.fail(self.token, int(code), text, {})


@dataclass
class FakeShard:
    """Whether writes wait for it, and whether all its members are there."""

    number: int
    sequencer: FakeSequencer
    waiting: bool = False
    whole: bool = True

    def is_whole(self) -> bool:
        """As of a Shard."""
        return self.whole

    def write(self, op: int, key: bytes, args: Any, size: int, sink: Any, token: Any) -> None:
        """A write."""
        self.sequencer.ask(Asked(op, self.number, key, tuple(args), size, sink, token))

    def read(self, op: int, key: bytes, sink: Any, token: Any) -> None:
        """A read of one key."""
        self.sequencer.ask(Asked(op, self.number, key, (), len(key), sink, token))


@dataclass
class FakeSequencer:
    """Remembers what it is asked. Reads over ranges are answered from `keys` by `answer_reads`."""

    asked: list[Asked] = field(default_factory=list)
    multi: list[MultiRead] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # sorted
    refuses: tuple[int, str] | None = None  # everything is refused at once
    map: Any = field(default_factory=lambda: SimpleNamespace(shards=SHARDS))
    waiting_items: int = 0
    shards: list[FakeShard] = field(init=False)

    def __post_init__(self) -> None:
        self.shards = [FakeShard(number, self) for number in range(SHARDS)]

    def ask(self, asked: Asked) -> None:
        """One operation."""
        assert asked.key == b"" or asked.number == shard_of(asked.key, SHARDS), "asked of the shard of the key"
        if self.refuses is not None:
            asked.fail(*self.refuses)
        else:
            self.asked.append(asked)

    def multi_read(self, multi: MultiRead) -> None:
        """A read over shards."""
        if self.refuses is not None:
            multi.sink.fail(multi.token, self.refuses[0], self.refuses[1], {})
        else:
            self.multi.append(multi)

    def take(self) -> Asked:
        """The oldest that was asked."""
        return self.asked.pop(0)

    def answer_reads(self) -> int:
        """Answer all reads over shards from `keys`; returns how many there were."""
        reads, self.multi = self.multi, []
        for multi in reads:
            item, _ = multi.build(list(multi.shards))
            multi.start(1, {})
            assert multi.take(multi.attempt, 0, self._result(item))
            multi.answer()
        return len(reads)

    def _result(self, item: tuple[Any, ...]) -> Any:
        keys = self.keys
        if item[0] == op.ANY_KEY:
            return (keys[item[2] % len(keys)] if keys else None, len(keys))
        if item[0] == op.MGET:
            return [[b"of " + key, 1, None] if key in keys else None for _, key in item[1]]
        lower, upper = item[2], item[3]
        low = bisect.bisect_left(keys, lower)
        high = len(keys) if upper is None else bisect.bisect_left(keys, upper)
        if item[0] == op.COUNT:
            return max(0, high - low)
        assert item[0] == op.PAGE
        limit, reverse, keys_only = item[4:7]
        found = keys[low:high][::-1] if reverse else keys[low:high]
        more = len(found) > limit
        found = found[:limit]
        return [found, None if keys_only else [b"of " + key for key in found], [1] * len(found), None, more]


class FakeHost:
    """What a server would tell."""

    def __init__(self) -> None:
        self.clients: list[Pipeline] = []

    def facts(self) -> dict[str, dict[str, Any]]:
        """Sections of INFO."""
        return {"Server": {"os": "none"}, "Clients": {"connected_clients": len(self.clients)}}

    def status(self) -> dict[str, Any]:
        """KV.STATUS."""
        return {"state": "ok", "nodes": [1, 2.5, None, True]}

    def resp_clients(self) -> Iterable[ClientState]:
        """CLIENT LIST."""
        return [client.state for client in self.clients]


class World:
    """A RespService, its sequencer, and time that stands still."""

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        self.now_ms = 1_000_000
        self.sequencer = FakeSequencer(keys=sorted(keys))
        self.keyspace = Keyspace(SHARDS)
        self.host = FakeHost()
        sequencer: Any = self.sequencer
        self.service = RespService(
            sequencer, self.keyspace, self.host, lambda: self.now_ms, lambda: 1_700_000_000_123_456,
            lambda below: below // 2,
        )  # fmt: skip

    def connect(self) -> Client:
        """A client."""
        return Client(self)


class Client:
    """A Pipeline, and what its session would do for it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sequencer = world.sequencer
        self.wakes = 0
        self.parser = RespParser()
        self.resp = Pipeline(world.service, "127.0.0.1:9", self._wake)
        world.host.clients.append(self.resp)

    def _wake(self) -> None:
        self.wakes += 1

    def feed(self, data: bytes) -> None:
        """Bytes come in."""
        self.resp.handle(self.parser.feed(data))
        if self.parser.error and not self.resp.closing:
            self.resp.protocol_error(self.parser.error)

    def send(self, *commands: str | list[bytes]) -> None:
        """Commands come in with one read; a text is split at spaces."""
        self.resp.handle([c.encode().split() if isinstance(c, str) else list(c) for c in commands])

    def output(self) -> bytes:
        """What can leave now."""
        out = b"".join(self.resp.take_output())
        for _ in range(100_000):
            if not self.resp.has_work:
                return out
            self.resp.resume()
            out += b"".join(self.resp.take_output())
        raise AssertionError("it never comes to an end")

    def ask(self, command: str | list[bytes]) -> Any:
        """The reply of a command that needs no shard."""
        self.send(command)
        assert not self.sequencer.asked, "no shard is asked"
        return one(self.output())

    def ask_range(self, command: str | list[bytes]) -> Any:
        """The reply of a command over ranges."""
        self.send(command)
        out = self.output()
        while self.sequencer.answer_reads():
            out += self.output()
        return one(out)

    def ask_shards(self, command: str | list[bytes], *results: Any) -> Any:
        """The reply when the shards answer this, in the order in which they were asked."""
        self.send(command)
        assert len(self.sequencer.asked) == len(results), self.sequencer.asked
        for result in results:
            self.sequencer.take().answer(result)
        return one(self.output())


# --- replies ----------------------------------------------------------------------------------------------


class Status(str):
    """A status line."""


class Error(str):
    """An error line."""


class NilArray:
    """*-1."""


def parse(data: bytes) -> list[Any]:
    """All replies of these bytes, which end with the last one."""
    replies, place = [], 0
    while place < len(data):
        reply, place = _parse(data, place)
        replies.append(reply)
    return replies


def one(data: bytes) -> Any:
    """The only reply of these bytes."""
    replies = parse(data)
    assert len(replies) == 1, replies
    return replies[0]


def _parse(data: bytes, place: int) -> tuple[Any, int]:
    end = data.index(b"\r\n", place)
    kind, text = data[place : place + 1], data[place + 1 : end]
    place = end + 2
    if kind == b"+":
        return Status(text.decode()), place
    if kind == b"-":
        return Error(text.decode()), place
    if kind == b":":
        return int(text), place
    if kind == b"_":
        return None, place
    if kind == b"#":
        return {b"t": True, b"f": False}[text], place
    if kind == b",":
        return float(text), place
    count = int(text)
    if kind == b"$":
        if count < 0:
            return None, place
        assert data[place + count : place + count + 2] == b"\r\n", "a bulk ends with a line break"
        return data[place : place + count], place + count + 2
    if kind == b"*" and count < 0:
        return NilArray, place
    assert kind in (b"*", b"%"), kind
    items = []
    for _ in range(2 * count if kind == b"%" else count):
        item, place = _parse(data, place)
        items.append(item)
    return (dict(zip(items[::2], items[1::2], strict=True)) if kind == b"%" else items), place
