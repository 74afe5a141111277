"""The asynchronous client against a scripted server: results, timeouts, lost connections, cancellation, batches."""

import asyncio
import contextlib
import gc
import math
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

import kvtcp
from kvtcp import AsyncClient, Entry, OutcomeUnknown, RequestError, Unavailable, constants
from kvtcp.client.administration import LossAccepted, Move, NodeChange, Rebalance
from kvtcp.client.channel import backoff_s
from kvtcp.errors import Code
from kvtcp.node.server import NodeServer
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes.raw_client import BOTH_LOOPS, event_loop_policy, until
from tests.support import fake_server
from tests.support.fake_server import FakeServer

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as server:
        yield server


@pytest_asyncio.fixture
async def kv(server: FakeServer) -> AsyncIterator[AsyncClient[bytes]]:
    async with kvtcp.connect(server.url) as kv:
        yield kv


def connection_of(kv: AsyncClient[bytes]) -> Any:
    """The connection that a client has now."""
    assert kv._channel._connection is not None
    return kv._channel._connection


@contextlib.contextmanager
def takes(least_s: float, most_s: float) -> Iterator[None]:
    """What is done inside takes this long."""
    started = time.monotonic()
    yield
    assert least_s <= time.monotonic() - started < most_s


@contextlib.asynccontextmanager
async def silent_peer() -> AsyncIterator[tuple[AsyncClient[bytes], socket.socket]]:
    """A client, and the socket of a server that answered its hello and reads and says nothing more by itself."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def connect() -> AsyncClient[bytes]:
            return await kvtcp.connect(f"kvtcp://127.0.0.1:{listener.getsockname()[1]}")

        connecting = asyncio.create_task(connect())
        peer, _ = await loop.sock_accept(listener)
        with peer:
            peer.setblocking(False)
            await loop.sock_recv(peer, 65536)
            await loop.sock_sendall(peer, fake_server.FrameEncoder().encode([1, 0, fake_server.INFO]))
            yield await connecting, peer


# --- results ----------------------------------------------------------------------------------------


async def test_one_key(kv: AsyncClient[bytes]) -> None:
    """Every operation on one key gives what its docstring says."""
    assert await kv.get("a") is None
    assert await kv.get("a", 7) == 7
    assert await kv.get_entry("a") is None
    rev = await kv.put("a", "Zoë")
    assert await kv.get(b"a") == "Zoë".encode()
    assert await kv.get_entry("a") == Entry(b"a", "Zoë".encode(), rev, None)
    with pytest.raises(kvtcp.KeyExists) as exists:
        await kv.add("a", b"x")
    assert exists.value.details["rev"] == rev
    assert await kv.add("b", b"x") == rev + 1
    with pytest.raises(kvtcp.Mismatch) as mismatch:
        await kv.cas("a", b"y", if_rev=rev + 9)
    assert mismatch.value.rev == rev
    new = await kv.cas("a", b"y", if_rev=rev)
    assert await kv.cas("a", b"z", if_value=b"y") > new
    assert await kv.exists("a") is True
    assert await kv.delete("a", if_value=b"no") is False
    assert await kv.delete("a", if_rev=1) is False
    assert await kv.delete("a", if_value="z") is True
    assert await kv.exists("a") is False
    assert await kv.delete("a") is False
    assert await kv.incr("n") == 1
    assert await kv.incr("n", -5) == -4
    with pytest.raises(RequestError) as number:
        await kv.incr("b")
    assert number.value.code == Code.NOT_A_NUMBER


async def test_time_to_live(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Durations are seconds for users and milliseconds on the wire; no key and no deadline are told apart."""
    await kv.put("a", b"1", ttl=60)
    assert server.seen(b"put")[-1][4] == {b"ttl_ms": 60_000}
    ttl = await kv.ttl("a")
    assert ttl is not None and 59 < ttl <= 60
    entry = await kv.get_entry("a")
    assert entry is not None and entry.ttl is not None and 59 < entry.ttl <= 60
    await kv.put("a", b"2", keep_ttl=True)
    assert (await kv.ttl("a") or 0) < 61
    assert await kv.persist("a") is True
    assert await kv.persist("a") is False
    assert await kv.ttl("a") == math.inf
    assert await kv.expire("a", 0.0001) is True
    assert server.seen(b"expire")[-1][3] == 1
    assert await kv.expire("nobody", 5) is False
    assert await kv.ttl("nobody") is None
    await kv.add("b", b"1", ttl=2.5)
    assert server.seen(b"add")[-1][4] == {b"ttl_ms": 2500}


async def test_ranges(kv: AsyncClient[bytes]) -> None:
    """Scans go over pages, in both directions, with prefix, bounds and limit; count agrees."""
    pairs = {f"k{i:03}".encode(): str(i).encode() for i in range(40)}
    await kv.put_many({"a": b"", "z": b"", **{k.decode(): v for k, v in pairs.items()}})
    everything = [pair async for pair in kv.scan()]
    assert everything == [(b"a", b""), *sorted(pairs.items()), (b"z", b"")]
    assert dict([pair async for pair in kv.scan(prefix="k")]) == pairs
    assert [key async for key in kv.scan_keys(prefix="k", reverse=True)] == sorted(pairs, reverse=True)
    assert [key async for key in kv.scan_keys(start="k010", end="k013")] == [b"k010", b"k011", b"k012"]
    assert [key async for key in kv.scan_keys(limit=9, prefix=b"k")] == sorted(pairs)[:9]
    assert [key async for key in kv.scan_keys(limit=0)] == []
    assert [item async for item in kv.scan(prefix="k00", limit=2, keys_only=True)] == [(b"k000", None), (b"k001", None)]
    entries = [entry async for entry in kv.scan_entries(prefix="k03")]
    assert [(e.key, e.value, e.ttl) for e in entries] == [(b"k03%d" % i, b"3%d" % i, None) for i in range(10)]
    pages = [page async for page in kv.scan_pages(page_items=5)]
    assert max(map(len, pages)) == 5
    assert [pair for page in pages for pair in page] == everything
    assert await kv.count() == 42
    assert await kv.count(prefix="k01") == 10
    assert await kv.count(start="k005", end="k007") == 2


async def test_administration(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Names and texts of the administration are str; progress is reported; `info` is what hello said."""
    assert await kv.status() == {"state": "ready", "shards": {"ready": 64}, "blob": b"\xff"}
    assert await kv.nodes() == [{"id": "n1", "address": "127.0.0.1:5000"}]
    assert await kv.shards() == [{"shard": 0, "replicas": ["n1"]}]
    steps = [fake_server.reply(1, {"keys": 1}), fake_server.reply(1, {"keys": 2}), fake_server.execute]
    server.on(b"backup", fake_server.several(*steps))
    seen: list[dict[str, Any]] = []
    assert await kv.backup("nightly", progress=seen.append) == {"name": "nightly", "keys": 0}
    assert seen == [{"keys": 1}, {"keys": 2}]
    assert (await kv.backup())["name"] == "b-1"
    assert await kv.restore("nightly", "replace", prefix="a", dry_run=True) == {
        "name": "nightly", "mode": "replace", "prefix": "a", "dry_run": True,
    }  # fmt: skip
    assert (kv.info.cluster, kv.info.shards, kv.info.limits) == ("c-1", 64, {"key_bytes_max": 4096})
    assert server.seen(b"hello")[0][2:] == [1, f"kvtcp-python/{kvtcp.__version__}".encode()]


async def test_changes_of_the_cluster(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """They have typed results with what else the server said, are writes, and a refusal is AdminError."""
    assert await kv.node_add("10.0.0.4", 5000) == NodeChange("n4", None, {"address": "10.0.0.4:5000"})
    assert await kv.node_drain("n1") == NodeChange("n1", 21)
    assert await kv.node_forget("n1") == NodeChange("n1")
    moves = (Move(5, "n1", "n4"), Move(6, "n2", "n4"))
    assert await kv.rebalance() == Rebalance(moves, 2)
    assert await kv.rebalance(dry_run=True) == Rebalance(moves, 0)
    assert await kv.shard_accept_loss(5) == LossAccepted(5, {"from": "n2"})
    with pytest.raises(kvtcp.AdminError, match="n1 still holds 21 shards: drain it first") as caught:
        await kv.node_remove("n1")
    assert (caught.value.code, caught.value.details) == (Code.REFUSED, {"node": b"n1"})
    server.on(b"node_drain", fake_server.close_after)
    with pytest.raises(kvtcp.OutcomeUnknown):
        await kv.node_drain("n2")
    assert len(server.seen(b"node_drain")) == 2, "it was not repeated"


async def test_connect_by_await(server: FakeServer) -> None:
    """`await connect(url)` gives a client that is closed by hand; a closed one says so."""
    kv = await kvtcp.connect(server.url, name="me")
    assert server.seen(b"hello")[0][3] == b"me"
    await kv.close()
    await kv.close()
    await until(lambda: not server.connections)
    with pytest.raises(RuntimeError, match="closed"):
        await kv.get("a")


async def test_codecs_and_their_errors(server: FakeServer) -> None:
    """Values pass through the codec in every operation; what does not fit names the key."""
    async with kvtcp.connect(server.url, codec=kvtcp.codecs.json) as kv:
        await kv.put("a", {"x": [1, None]})
        assert await kv.get("a") == {"x": [1, None]}
        assert await kv.delete("a", if_value={"x": [1, None]}) is True
        await kv.put_many({"b": 1, "c": "text"})
        assert await kv.get_many(["b", "c", "d"]) == [1, "text", None]
        assert [value async for _, value in kv.scan()] == [1, "text"]
        with pytest.raises(RequestError, match='value of "b" cannot be stored as JSON'):
            await kv.put("b", object())
        server.do_put(b"bad", b"{", None, False)
        with pytest.raises(kvtcp.DataError, match='value of "bad" is not JSON'):
            await kv.get("bad")


@pytest.mark.parametrize(("call", "text"), [
    (lambda kv: kv.get(""), "must not be empty"),
    (lambda kv: kv.get(5), "must be bytes or text, not int"),
    (lambda kv: kv.get("\ud800"), "lone surrogate"),
    (lambda kv: kv.put("k" * (constants.KEY_BYTES_MAX + 1), b""), f"limit of {constants.KEY_BYTES_MAX} bytes"),
    (lambda kv: kv.put("k", bytes(constants.VALUE_BYTES_MAX + 1)), f"the limit is {constants.VALUE_BYTES_MAX}"),
    (lambda kv: kv.put("k", 5), "must be bytes or text, not int"),
    (lambda kv: kv.put("k", b"", ttl=0), "ttl must be over 0"),
    (lambda kv: kv.put("k", b"", ttl=math.nan), "ttl must be over 0"),
    (lambda kv: kv.put("k", b"", ttl=math.inf), "ttl must be over 0"),
    (lambda kv: kv.put("k", b"", ttl="5"), "ttl must be a number"),
    (lambda kv: kv.put("k", b"", ttl=5, keep_ttl=True), "not both"),
    (lambda kv: kv.expire("k", -1), "ttl must be over 0"),
    (lambda kv: kv.cas("k", b""), "exactly one condition"),
    (lambda kv: kv.cas("k", b"", if_rev=1, if_value=b""), "one condition"),
    (lambda kv: kv.delete("k", if_rev=-1), "rev must be from 0"),
    (lambda kv: kv.incr("k", 2**63), "64-bit"),
    (lambda kv: kv.incr("k", 1.5), "by must be an integer"),
    (lambda kv: kv.get("k", timeout=0), "a timeout must be"),
    (lambda kv: kv.get("k", timeout=math.inf), "a timeout must be"),
    (lambda kv: kv.count(start=5), "start must be bytes or text"),
    (lambda kv: kv.put_many([("k",)]), "an item of put_many is"),
    (lambda kv: kv.put_many({"k": 5}), "must be bytes or text"),
    (lambda kv: kv.get_many(["k", ""]), "must not be empty"),
    (lambda kv: kv.restore("a", "wipe"), "merge or replace"),
    (lambda kv: kv.backup(5), "name must be text, not int"),
])  # fmt: skip
async def test_wrong_requests_are_refused_at_once(
    kv: AsyncClient[bytes], server: FakeServer, call: Callable[[Any], Any], text: str
) -> None:
    """What cannot be taken is a RequestError that names the argument and the limit, and nothing is sent."""
    with pytest.raises(RequestError, match=text):
        await call(kv)
    assert [message[1] for message in server.requests] == [b"hello"]


@pytest.mark.parametrize("options", [{"limit": -1}, {"limit": 1.5}, {"prefix": 5}, {"start": "x" * 5000}])
async def test_wrong_scans_are_refused_when_they_are_made(kv: AsyncClient[bytes], options: dict[str, Any]) -> None:
    """A scan with wrong arguments fails where it is written, not where it is first read."""
    with pytest.raises(RequestError):
        kv.scan(**options)


# --- pipelining and cancellation ----------------------------------------------------------------------


async def test_concurrent_calls_leave_in_one_write(
    kv: AsyncClient[bytes], server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 concurrent gets are one write of the transport, and are all answered."""
    connection = connection_of(kv)
    writes: list[int] = []
    transport = connection._transport

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(transport, name)

        def write(self, data: bytes) -> None:
            writes.append(len(data))
            transport.write(data)

    monkeypatch.setattr(connection, "_transport", Counting())
    await kv.put("a", b"1")
    writes.clear()
    assert await asyncio.gather(*(kv.get("a") for _ in range(100))) == [b"1"] * 100
    assert len(writes) == 1
    assert server.reads[-1] == 100


@pytest.mark.parametrize("seed", [1, 2])
async def test_cancelled_calls_never_disturb_others(kv: AsyncClient[bytes], server: FakeServer, seed: int) -> None:
    """5,000 calls cancelled or late at random, answers shuffled: no later call ever gets the answer of another."""
    rng = random.Random(seed)
    server.shuffle = random.Random(seed + 1)
    for i in range(500):
        server.do_put(b"k%d" % i, b"value of %d" % i, None, False)
    outcomes = {"answered": 0, "cancelled": 0, "late": 0}

    async def one(i: int) -> None:
        try:
            value = await kv.get(b"k%d" % i, timeout=rng.choice([0.0005, 2.0, 2.0, 2.0]))
            assert value == b"value of %d" % i, f"seed {seed}: k{i} got {value!r}"
            outcomes["answered"] += 1
        except asyncio.CancelledError:
            outcomes["cancelled"] += 1
            raise
        except Unavailable:
            outcomes["late"] += 1

    done = 0
    while done < 5_000:
        tasks = [asyncio.create_task(one(rng.randrange(500))) for _ in range(50)]
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(rng.choice([0, 0, 0.0005, 0.001]))
            for task in rng.sample(tasks, 8):
                task.cancel()
        if rng.random() < 0.7:  # otherwise the next calls start while these are under way
            await asyncio.wait(tasks)
        done += len(tasks)
    await until(lambda: len(asyncio.all_tasks()) == 1)
    assert sum(outcomes.values()) > 4_900  # a task cancelled before its first step does not run at all
    assert outcomes["answered"] > 1_000 and outcomes["cancelled"] > 200, outcomes
    connection = connection_of(kv)
    await until(lambda: connection._core.outstanding == 0)
    assert server.accepted == 1


async def test_cancelled_while_connecting(server: FakeServer) -> None:
    """A caller that gives up during an attempt to connect does not stop it for the others."""
    async with kvtcp.connect(server.url) as kv:
        server.connections[0].transport.abort()
        await until(lambda: kv._channel._connection is None)
        server.on(b"hello", server.hold)
        calls = [asyncio.create_task(kv.put(f"k{i}", b"")) for i in range(3)]
        await until(lambda: server.held)
        calls[0].cancel()
        await asyncio.wait(calls[:1])
        server.release()
        assert await asyncio.gather(*calls[1:]) == [1, 2]
        assert set(server.cells) == {b"k1", b"k2"}


# --- time and connections -----------------------------------------------------------------------------


async def test_timeouts(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """A read without an answer is Unavailable, a write has an unknown outcome and is sent once; others go on."""
    server.on(b"get", fake_server.drop)
    server.on(b"put", fake_server.drop)
    with takes(0.05, 1.0), pytest.raises(Unavailable, match=r"no answer within 0\.05 s"):
        await kv.get("a", timeout=0.05)
    with takes(0.05, 1.0), pytest.raises(OutcomeUnknown, match=r"sent and had no answer within 0\.05 s"):
        await kv.put("a", b"1", timeout=0.05)
    assert len(server.seen(b"put")) == 1
    assert await kv.put("a", b"2") == 1
    assert server.accepted == 1


async def test_timeouts_wait_for_answers_that_have_arrived(kv: AsyncClient[bytes]) -> None:
    """When the loop was held up past the deadline, answers that lie in the socket are read before time is called."""
    call = asyncio.create_task(kv.put("a", b"1", timeout=0.1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(0.3)  # noqa: ASYNC251  # sleeps: what is tested is a loop that stands still
    assert await call == 1


async def test_time_runs_out_in_a_loop_that_is_always_late(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """A loop whose every step is slow still ends calls: a late sweep is put off once, not for ever."""
    server.on(b"get", fake_server.drop)
    call = asyncio.create_task(kv.get("a", timeout=0.1))
    end = time.monotonic() + 10
    while not call.done() and time.monotonic() < end:
        time.sleep(0.07)  # noqa: ASYNC251  # sleeps: what is tested is a slow loop
        await asyncio.sleep(0)
    assert time.monotonic() < end
    with pytest.raises(Unavailable):
        await call


@pytest.mark.parametrize("op", ["get", "put"])
async def test_unavailable_is_repeated(kv: AsyncClient[bytes], server: FakeServer, op: str) -> None:
    """Reads and writes that the server did not execute are sent again, until they are."""
    server.on(op.encode(), *[fake_server.error(Code.NOT_ENOUGH_REPLICAS)] * 3)
    assert await (kv.get("a") if op == "get" else kv.put("a", b"")) == (None if op == "get" else 1)
    assert len(server.seen(op.encode())) == 4


@pytest.mark.parametrize("code", [Code.NOT_ENOUGH_REPLICAS, Code.OVERLOADED])
async def test_a_refusal_stays_a_refusal(kv: AsyncClient[bytes], server: FakeServer, code: Code) -> None:
    """A write refused for missing replicas or full windows is not sent again when the next refusal would come too late:
    the caller would be told "unknown" of a write that nobody executed."""
    server.on(b"put", fake_server.error(code), fake_server.drop)
    with pytest.raises(Unavailable, match="refused by the script"):
        await kv.put("a", b"1", timeout=1.0)
    assert len(server.seen(b"put")) == 1


async def test_a_read_that_runs_out_of_time_tells_the_last_refusal(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """A read that was refused, and then not answered until the timeout, ends with the reason of the refusal."""
    server.on(b"get", fake_server.error(Code.NOT_ENOUGH_REPLICAS, "n2 is missing"), fake_server.drop)
    with pytest.raises(Unavailable, match="n2 is missing"):
        await kv.get("a", timeout=0.3)
    assert len(server.seen(b"get")) == 2


async def test_unavailable_until_the_timeout(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """When the timeout ends the caller gets the server's own words."""
    server.on(b"put", *[fake_server.error(Code.NO_SPACE, "n2 has no space left")] * 1000)
    with takes(0, 1.0), pytest.raises(Unavailable, match="n2 has no space left") as caught:
        await kv.put("a", b"", timeout=0.2)
    assert caught.value.code == Code.NO_SPACE
    assert 2 <= len(server.seen(b"put")) < 200


@pytest.mark.parametrize("code", [Code.BAD_REQUEST, Code.EXISTS, Code.UNKNOWN, Code.BAD_DATA])
async def test_other_errors_are_not_repeated(kv: AsyncClient[bytes], server: FakeServer, code: Code) -> None:
    """Everything but Unavailable goes to the caller at once; above all an unknown outcome."""
    server.on(b"put", fake_server.error(code))
    with pytest.raises(kvtcp.KvtcpError) as caught:
        await kv.put("a", b"")
    assert caught.value.code == code
    assert len(server.seen(b"put")) == 1


async def test_unanswered_writes_do_not_keep_reads_out(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Large writes that a stopped node leaves without an answer fill the client's bound only until their timeout."""
    server.on(b"put", *[fake_server.drop] * 8)
    values = [b"v" * (2 << 20)] * 8
    outcomes = await asyncio.gather(
        *(kv.put(f"k{n}", value, timeout=0.3) for n, value in enumerate(values)), return_exceptions=True
    )
    assert any(isinstance(outcome, OutcomeUnknown) for outcome in outcomes)
    assert await kv.get("a", timeout=1.0) is None


async def test_lost_connection(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """A read goes over to a new connection; a write that was sent is unknown and is never sent again."""
    server.on(b"get", fake_server.close)
    assert await kv.get("a") is None
    assert server.accepted == 2
    server.on(b"put", fake_server.several(fake_server.execute_silently, fake_server.close))
    with pytest.raises(OutcomeUnknown, match="after the request was sent"):
        await kv.put("a", b"1")
    assert len(server.seen(b"put")) == 1
    assert await kv.get("a") == b"1"
    assert server.accepted == 3


async def test_lost_before_sending(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """A write of a tick in which the connection turns out lost was not sent: it is sent on the next one, once."""
    connection = connection_of(kv)
    call = asyncio.create_task(kv.put("a", b"1"))
    await asyncio.sleep(0)  # the call is queued, the flush comes in the next step of the loop
    connection._transport.abort()
    assert await call == 1
    assert len(server.seen(b"put")) == 1
    assert server.accepted == 2


async def test_nobody_there(server: FakeServer) -> None:
    """Without a server calls are Unavailable when their timeout ends, and connecting fails alike, in plain words."""
    text = f"no connection to {server.url} within %s s: connection refused; is the cluster running?"
    async with kvtcp.connect(server.url) as kv:
        await server.stop()
        await until(lambda: kv._channel._connection is None)
        with takes(0.2, 1.0), pytest.raises(Unavailable) as caught:
            await kv.put("a", b"1", timeout=0.2)
        assert caught.value.message == text % 0.2
    with pytest.raises(Unavailable) as caught:
        await kvtcp.connect(server.url, timeout=1 / 3)
    assert caught.value.message == text % 0.333
    with pytest.raises(Unavailable, match=r"within 0\.1 s: connection refused; is the cluster running"):
        await kvtcp.connect(server.url.replace("127.0.0.1", "localhost"), timeout=0.1)


async def test_port_that_does_not_speak_to_clients(server: FakeServer) -> None:
    """A port that hangs up at the first frame, as that of a node does, is named as such; one that says no is not."""
    text = "within 0.1 s: the server closed the connection at the first frame; that port does not speak to clients;"
    server.on(b"hello", *[fake_server.close] * 100)
    with pytest.raises(Unavailable, match=text):
        await kvtcp.connect(server.url, timeout=0.1)
    server.script[b"hello"].clear()
    async with kvtcp.connect(server.url) as kv:
        server.on(b"hello", *[fake_server.close] * 100)
        server.connections[0].transport.abort()
        await until(lambda: kv._channel._connection is None)
        with pytest.raises(Unavailable, match="within 0.1 s: ") as caught:
            await kv.get("a", timeout=0.1)
        assert "node's port" not in caught.value.message  # it spoke to clients before
    server.script[b"hello"].clear()
    full = fake_server.several(fake_server.error(Code.OVERLOADED, "too many connections"), fake_server.close_after)
    server.on(b"hello", *[full] * 100)
    with pytest.raises(Unavailable, match="within 0.1 s: too many connections$"):
        await kvtcp.connect(server.url, timeout=0.1)
    node = NodeServer("n1", cluster="c", secret="s")
    await node.start("127.0.0.1", 0)
    try:
        with pytest.raises(Unavailable, match="is it a node's port?"):
            await kvtcp.connect(f"kvtcp://127.0.0.1:{node.address[1]}", timeout=0.5)
    finally:
        await node.close()


async def test_reconnects_when_the_server_is_back(server: FakeServer) -> None:
    """A call that waits goes through as soon as the server is there again."""
    async with kvtcp.connect(server.url) as kv:
        await server.stop()
        await until(lambda: kv._channel._connection is None)
        calls = [asyncio.create_task(kv.put(f"k{i}", b"", timeout=10)) for i in range(20)]
        await until(lambda: kv._channel._failures > 2)
        await server.start()
        assert sorted(await asyncio.gather(*calls)) == list(range(1, 21))
        assert server.accepted == 2


async def test_server_that_closes_after_hello(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """It is tried again with pauses, and the error says what happens; another cluster on the address is logged."""
    async with kvtcp.connect(server.url) as kv:
        hello = fake_server.reply(0, {**fake_server.INFO, "cluster": "c-2"})
        server.on(b"hello", *[fake_server.several(hello, lambda c, m: c.transport.close())] * 1000)
        server.connections[0].transport.abort()
        with pytest.raises(Unavailable):
            await kv.get("a", timeout=0.3)
        assert 2 <= server.accepted < 100
        assert kv.info.cluster == "c-2"
        assert "is now cluster c-2, it was c-1" in caplog.text


async def test_refused_hello(server: FakeServer) -> None:
    """Hello may be refused for now, and is then tried again, or for good, and is then an error at once."""
    server.on(b"hello", fake_server.error(Code.RECOVERING), fake_server.close)
    async with kvtcp.connect(server.url) as kv:
        assert await kv.get("a") is None
    assert server.accepted == 3
    server.on(b"hello", fake_server.error(Code.VERSION, "this server speaks 2"))
    with pytest.raises(RequestError, match="this server speaks 2"):
        await kvtcp.connect(server.url)
    assert server.accepted == 4


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xce\x00\x00\x00\x01\x05", b"-ERR no\r\n"])
async def test_not_a_kvtcp_server(server: FakeServer, answer: bytes) -> None:
    """Another protocol on the port is a ProtocolError, at once."""
    server.on(b"hello", fake_server.garbage(answer))
    with pytest.raises(kvtcp.ProtocolError):
        await kvtcp.connect(server.url)
    await until(lambda: not server.connections)


async def test_hello_with_another_answer(server: FakeServer) -> None:
    """An answer to hello without the fields of hello is a ProtocolError."""
    server.on(b"hello", fake_server.reply(0, {"server": "x"}))
    with pytest.raises(kvtcp.ProtocolError, match="answer to hello"):
        await kvtcp.connect(server.url)


async def test_garbage_from_the_server(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Garbage closes the connection: reads are a ProtocolError, sent writes unknown, later calls use a new one."""
    server.on(b"put", server.hold)
    server.on(b"get", fake_server.garbage(b"\xce\x00\x00\x00\x03\xc1\xc1\xc1"))
    write = asyncio.create_task(kv.put("a", b"1"))
    await until(lambda: server.held)
    with pytest.raises(kvtcp.ProtocolError):
        await kv.get("a")
    with pytest.raises(OutcomeUnknown) as caught:
        await write
    assert isinstance(caught.value.__cause__, kvtcp.ProtocolError)
    server.release()
    assert await kv.get("a") == b"1"
    assert server.accepted == 2


@pytest.mark.parametrize("result", [5, b"", [], [b"v", 1], [1, 1, None]])
async def test_result_of_another_form(kv: AsyncClient[bytes], server: FakeServer, result: Any) -> None:
    """A result that is not what the operation promises is a ProtocolError, never a wrong value."""
    server.on(b"get", fake_server.reply(0, result))
    with pytest.raises(kvtcp.ProtocolError):
        await kv.get("a")
    server.on(b"scan", fake_server.reply(0, [[result], None]))
    with pytest.raises(kvtcp.ProtocolError):
        [pair async for pair in kv.scan()]
    server.on(b"mget", fake_server.reply(0, result))
    with pytest.raises(kvtcp.ProtocolError):
        await kv.get_many(["a", "b", "c", "d"])


async def test_silent_server_is_given_up(
    kv: AsyncClient[bytes], server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection on which calls run out of time and nothing at all is heard is replaced."""
    monkeypatch.setattr("kvtcp.client.core.SILENCE_S", 0.1)
    server.on(b"get", *[fake_server.drop] * 3)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await kv.get("a", timeout=0.06)
    assert await kv.get("a") is None
    assert server.accepted == 2


async def test_idle_timeout_of_administration(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """A backup without progress ends with an unknown outcome; one with progress may take longer than its timeout."""
    server.on(b"backup", fake_server.drop)
    with pytest.raises(OutcomeUnknown, match="no progress within"):
        await kv.backup(timeout=0.05)
    server.on(b"backup", server.hold)
    call = asyncio.create_task(kv.backup(timeout=0.2))
    await until(lambda: server.held)
    connection, message = server.held[0]
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        connection.send([message[0], 1, {"keys": 1}])
        await asyncio.sleep(0.01)
    server.release()
    assert (await call)["name"] == "b-1"


async def test_close_ends_calls(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Calls that wait when the client is closed end at once, each with the right class."""
    server.on(b"get", server.hold)
    server.on(b"put", server.hold)
    read, write = asyncio.create_task(kv.get("a")), asyncio.create_task(kv.put("a", b""))
    await until(lambda: len(server.held) == 2)
    await kv.close()
    with pytest.raises(Unavailable, match="client was closed"):
        await read
    with pytest.raises(OutcomeUnknown, match="client was closed"):
        await write


async def test_ipv6() -> None:
    """An address in brackets is connected to over IPv6."""
    loop = asyncio.get_running_loop()
    fake = FakeServer()
    try:
        listener = await loop.create_server(lambda: fake_server.FakeConnection(fake), "::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with kvtcp.connect(f"kvtcp://[::1]:{listener.sockets[0].getsockname()[1]}") as kv:
        assert await kv.get("a") is None
    listener.close()


def test_backoff() -> None:
    """Pauses are random below a bound that doubles up to its maximum."""
    bounds = [backoff_s(failures, 1.0) for failures in range(1, 12)]
    assert bounds == sorted(bounds)
    assert bounds[1] == 2 * bounds[0]
    assert bounds[-1] == backoff_s(10_000, 1.0) == constants.CLIENT_BACKOFF_MAX_MS / 1000
    assert backoff_s(5, 0.0) == 0


# --- backpressure ---------------------------------------------------------------------------------


async def test_outstanding_bytes_are_bounded(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """When too much is unanswered callers wait, in turn, and go on when answers come."""
    calls = 30
    server.on(b"put", *[server.hold] * calls)
    value = bytes(constants.MIB)
    tasks = [asyncio.create_task(kv.put(f"k{i:02}", value, timeout=30)) for i in range(calls)]
    connection = connection_of(kv)
    peak = 0
    while not all(task.done() for task in tasks):
        peak = max(peak, connection._core.outstanding_bytes)
        server.release()
        await asyncio.sleep(0.001)
    bound = constants.CLIENT_OUTSTANDING_BYTES_MAX
    assert bound / 2 < peak <= bound + constants.MIB + 100
    assert [task.result() for task in tasks] == list(range(1, calls + 1))  # first come, first served


async def test_a_socket_that_takes_no_more() -> None:
    """While the peer does not read, callers wait; at their timeout nothing of them was sent; cancelled ones leave."""
    loop = asyncio.get_running_loop()
    async with silent_peer() as (kv, peer):
        connection = connection_of(kv)
        first = [asyncio.create_task(kv.put(f"k{i}", bytes(4 * constants.MIB), timeout=30)) for i in range(2)]
        await until(lambda: not connection.has_room)
        waiting = [asyncio.create_task(kv.put(f"w{i}", b"", timeout=30)) for i in range(3)]
        with pytest.raises(Unavailable, match="took no more data within"):
            await kv.put("late", b"", timeout=0.05)
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        decoder, encoder = fake_server.FrameDecoder(), fake_server.FrameEncoder()
        keys: list[bytes] = []
        while len(keys) < 4:
            for message in decoder.feed(await loop.sock_recv(peer, 65536)):
                keys.append(message[2])
                await loop.sock_sendall(peer, encoder.encode([message[0], 0, len(keys)]))
        assert keys == [b"k0", b"k1", b"w1", b"w2"]
        assert await asyncio.gather(*first, *waiting[1:]) == [1, 2, 3, 4]
        await kv.close()


async def test_close_does_not_wait_for_a_peer_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still in the socket's buffer gets a while to leave, then the connection is dropped."""
    monkeypatch.setattr("kvtcp.client.channel.CLIENT_CLOSE_MS", 50)
    async with silent_peer() as (kv, _):
        calls = [asyncio.create_task(kv.put(f"k{i}", bytes(7 * constants.MIB), timeout=30)) for i in range(3)]
        await asyncio.sleep(0.01)  # sleeps: the socket takes what it can; nothing shows when it is full
        await asyncio.wait_for(kv.close(), 5)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [OutcomeUnknown, OutcomeUnknown, RuntimeError]


# --- many keys ------------------------------------------------------------------------------------


async def test_many_keys(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Results come in the order of the keys; large batches go in several requests; ttl per item or for all."""
    keys = 2 * constants.CLIENT_CHUNK_KEYS_MAX + 5
    revs = await kv.put_many((f"k{i:05}", str(i)) for i in range(keys))
    assert sorted(revs) == list(range(1, keys + 1))
    assert [len(message[2]) for message in server.seen(b"mput")] == [constants.CLIENT_CHUNK_KEYS_MAX] * 2 + [5]
    assert await kv.get_many(["k00007", "none", "k02004"]) == [b"7", None, b"2004"]
    entries = await kv.get_many_entries(["none", "k00007"])
    assert entries == [None, Entry(b"k00007", b"7", revs[7], None)]
    await kv.put_many([("a", b"1"), ("b", b"2", 5.0), ("c", b"3", None)], ttl=2)
    assert server.seen(b"mput")[-1][2] == [[b"a", b"1", 2000], [b"b", b"2", 5000], [b"c", b"3", 2000]]
    assert await kv.delete_many(["a", "none", "b"]) == [True, False, True]
    assert await kv.put_many({}) == []
    assert await kv.get_many([]) == []


async def test_chunks_by_bytes(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Requests stay near 1 MiB; a larger value travels alone."""
    sizes = [400_000, 400_000, 400_000, 3 * constants.MIB, 10]
    assert len(await kv.put_many({f"k{i}": bytes(n) for i, n in enumerate(sizes)})) == 5
    assert [len(message[2]) for message in server.seen(b"mput")] == [2, 1, 1, 1]


async def test_items_that_were_not_executed_are_repeated(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Items refused for a passing reason are sent again, they alone."""
    refused = [int(Code.SHARD_DOWN), "shard 3 is down", {}]
    server.script[b"put item"].extend([None, refused, None])  # type: ignore[list-item]
    assert await kv.put_many({"a": b"1", "b": b"2", "c": b"3"}) == [1, 3, 2]
    assert [[item[0] for item in message[2]] for message in server.seen(b"mput")] == [[b"a", b"b", b"c"], [b"b"]]


async def test_items_that_stay_refused(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Items that are refused until the timeout end with the server's words; the others have their results."""
    refused = [int(Code.SHARD_DOWN), "shard 3 is down", {}]
    server.script[b"put item"].extend([None, *[refused] * 1000])  # type: ignore[list-item]
    with takes(0, 2.0), pytest.raises(kvtcp.BatchError, match="shard 3 is down") as caught:
        await kv.put_many({"a": b"1", "b": b"2"}, timeout=0.2)
    assert caught.value.results[0] == 1
    assert isinstance(caught.value.results[1], Unavailable)


def refuse_each(connection: fake_server.FakeConnection, message: list[Any]) -> None:
    """A step: refuse every item of an m-request for a missing node, each in words of its own."""
    refusals = [[int(Code.NOT_ENOUGH_REPLICAS), f"shard {i} needs n2", {}] for i in range(len(message[2]))]
    connection.answer(message, [0, refusals])


@pytest.mark.parametrize(("timeout_s", "tries_min", "tries_max"), [(0.3, 1, 1), (0.6, 2, 10)])
@pytest.mark.parametrize("op", ["mput", "mdelete"])
async def test_refused_items_stay_refused(
    kv: AsyncClient[bytes], server: FakeServer, monkeypatch: pytest.MonkeyPatch, op: str, timeout_s: float,
    tries_min: int, tries_max: int,
) -> None:  # fmt: skip
    """Items refused after a wait are repeated while there is time for another such wait; then all that failed is
    Unavailable, in the server's words and before the timeout, never unknown."""
    monkeypatch.setattr("kvtcp.client.channel._REFUSAL_S", 0.3)
    server.on(op.encode(), *[fake_server.later(0.05, refuse_each)] * 10, fake_server.drop)
    with takes(0, timeout_s), pytest.raises(Unavailable, match="shard 0 needs n2") as caught:
        if op == "mput":
            await kv.put_many({"a": "1", "b": "2"}, timeout=timeout_s)
        else:
            await kv.delete_many(["a", "b"], timeout=timeout_s)
    assert caught.value.code == Code.NOT_ENOUGH_REPLICAS
    assert tries_min <= len(server.seen(op.encode())) <= tries_max


async def test_repetitions_name_the_timeout_of_the_caller(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """A call whose second try has no answer names the timeout that was asked for, not what was left of it."""
    server.script[b"put item"].append([int(Code.SHARD_DOWN), "down", {}])  # type: ignore[arg-type]
    server.on(b"mput", fake_server.execute, fake_server.drop)
    with pytest.raises(OutcomeUnknown, match=r"no answer within 0\.123 s;"):
        await kv.put_many({"a": "1"}, timeout=0.1234)
    server.on(b"put", fake_server.error(Code.SHARD_DOWN), fake_server.drop)
    with takes(0.2, 1.0), pytest.raises(OutcomeUnknown, match=r"no answer within 0\.2 s;") as caught:
        await kv.put("a", "1", timeout=0.2)
    assert caught.value.details == {"timeout_s": 0.2}


async def test_many_keys_with_a_missing_node() -> None:
    """A cluster with too few nodes refuses many writes as it refuses one: Unavailable, before the timeout ends."""
    async with LocalCluster(nodes=3, shards=8, min_insync=3) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put_many({f"k{i}": "1" for i in range(20)})
        await cluster.kill_node("n2")
        with takes(0, 1.9):
            results = await asyncio.gather(
                kv.put("a", "1", timeout=2), kv.put_many({"a": "1"}, timeout=2),
                kv.put_many({f"k{i}": "2" for i in range(20)}, timeout=2), kv.delete_many(["a", "b"], timeout=2),
                return_exceptions=True,
            )  # fmt: skip
        assert [type(result) for result in results] == [Unavailable] * 4
        assert {getattr(result, "code", None) for result in results} == {Code.NOT_ENOUGH_REPLICAS}


async def test_batch_error(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """When some keys fail, BatchError has a result or an error for each, in order."""
    server.script[b"put item"].extend([None, [int(Code.UNKNOWN), "lost", {}]])  # type: ignore[list-item]
    with pytest.raises(kvtcp.BatchError, match="1 of 3 keys failed, the first with: lost") as caught:
        await kv.put_many({"a": b"1", "b": b"2", "c": b"3"})
    first, second, third = caught.value.results
    assert (first, third) == (1, 2)
    assert isinstance(second, OutcomeUnknown)


async def test_batch_with_repeated_keys_keeps_its_order(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """When a key comes twice nothing is repeated: the later value must not be overwritten by the earlier."""
    server.script[b"put item"].append([int(Code.SHARD_DOWN), "down", {}])  # type: ignore[arg-type]
    with pytest.raises(kvtcp.BatchError) as caught:
        await kv.put_many([("a", b"1"), ("a", b"2")])
    assert isinstance(caught.value.results[0], Unavailable)
    assert await kv.get("a") == b"2"


async def test_batch_that_fails_as_a_whole(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """One reason for all keys is that error itself; with several requests the rest is not sent once one is unknown."""
    server.on(b"mput", fake_server.error(Code.UNKNOWN))
    with pytest.raises(OutcomeUnknown):
        await kv.put_many({"a": b"1", "b": b"2"})
    keys = 30 * constants.CLIENT_CHUNK_KEYS_MAX
    server.on(b"mput", *[fake_server.error(Code.UNKNOWN)] * 100)
    before = len(server.seen(b"mput"))
    with pytest.raises(kvtcp.BatchError) as caught:
        await kv.put_many({f"k{i}": b"" for i in range(keys)})
    assert len(server.seen(b"mput")) - before < 30
    kinds = [type(result) for result in caught.value.results]
    assert kinds[0] is OutcomeUnknown and kinds[-1] is Unavailable and len(kinds) == keys


async def test_answers_that_do_not_fit_are_asked_for_in_parts(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """An mget whose values are too much for one answer is split until they fit."""
    await kv.put_many({f"k{i}": str(i) for i in range(9)})

    def too_large(connection: fake_server.FakeConnection, message: list[Any]) -> None:
        if len(message[2]) > 2:
            connection.answer(message, [int(Code.TOO_LARGE), "too much for one answer", {}])
        else:
            fake_server.execute(connection, message)

    server.on(b"mget", *[too_large] * 100)
    assert await kv.get_many([f"k{i}" for i in range(9)]) == [str(i).encode() for i in range(9)]
    server.script[b"mget"].clear()
    server.on(b"mget", fake_server.error(Code.TOO_LARGE))
    with pytest.raises(RequestError) as caught:
        await kv.get_many(["k1"])
    assert caught.value.code == Code.TOO_LARGE


async def test_cancelled_batch(kv: AsyncClient[bytes], server: FakeServer) -> None:
    """Cancelling a batch of several requests starts no more of them and leaves no task behind."""
    server.on(b"mput", *[server.hold] * 100)
    pairs = {f"k{i}": b"" for i in range(20 * constants.CLIENT_CHUNK_KEYS_MAX)}
    call = asyncio.create_task(kv.put_many(pairs, timeout=30))
    await until(lambda: len(server.held) == 8)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    await until(lambda: len(asyncio.all_tasks()) == 1)
    assert len(server.seen(b"mput")) == 8


async def test_the_next_page_is_on_its_way(server: FakeServer, kv: AsyncClient[bytes]) -> None:
    """Its request arrives while the caller has the rows of this one and does not wait for anything; the last page asks
    for none; a scan that is left takes its request back, and an error that nobody waited for is not complained of."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    await kv.put_many({f"{number}": b"v" for number in range(5)})

    def scans() -> int:
        return sum(request[1] == b"scan" for request in server.requests)

    pages = kv.scan_pages(page_items=2)
    assert [key for key, _ in await anext(pages)] == [b"0", b"1"]
    await until(lambda: scans() == 2)
    assert [key for key, _ in await anext(pages)] == [b"2", b"3"]
    await kv.get("0")  # the last page is there before it is asked for
    assert [key for key, _ in await anext(pages)] == [b"4"]
    assert [page async for page in pages] == [] and scans() == 3
    server.on(b"scan", fake_server.execute, fake_server.error(Code.TOO_LARGE))
    left = kv.scan_pages(page_items=2)
    await anext(left)
    await until(lambda: scans() == 5)
    await kv.get("0")  # the error is here
    await left.aclose()  # type: ignore[attr-defined]
    del left
    gc.collect()
    await kv.get("0")
    assert complaints == []
