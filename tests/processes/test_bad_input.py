"""Running servers under attack: whatever comes in on a port gets a clear error or a closed connection with a logged
reason, memory stays under the caps, and a healthy client beside it notices nothing. On both event loops."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest

import kvtcp
from kvtcp.constants import FRAME_BYTES_MAX, KEY_BYTES_MAX, MIB, REQUEST_ID_MAX, VALUE_BYTES_MAX
from kvtcp.coordinator.links import NodeLink
from kvtcp.errors import Code
from kvtcp.frontend import clients as clients_module
from kvtcp.frontend import connection as caps_module
from kvtcp.frontend.native.session import ClientSession
from kvtcp.protocol.link import HELLO, REFUSED, REPORT
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes import raw_client as raw
from tests.processes.raw_client import Wire, event_loop_policy, healthy, until

__all__ = ["event_loop_policy"]
pytestmark = raw.BOTH_LOOPS


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    """Two nodes with both copies; at the end everything is checked and nobody is left behind."""
    async with LocalCluster(2, shards=8) as running:
        yield running
        await until(lambda: not running.coordinator.clients.sessions, "the end of all sessions")
        running.coordinator.sequencer.check()
        assert not running.coordinator.failed.done()
        assert running.coordinator.status.degraded() == []


def logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    """Whether a warning with this text is in the log."""
    return any(text in record.getMessage() for record in caplog.records if record.levelname == "WARNING")


# --- bytes that are not the protocol ------------------------------------------------------------------


async def test_random_bytes(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand connections with random bytes on every kind of port end, and the servers go on."""
    seed = 20261123
    chance = random.Random(seed)
    ports = [cluster.coordinator.address, *(node.address for node in cluster.nodes.values())]

    async def attack(number: int) -> None:
        data = bytearray(chance.randbytes(chance.choice((1, 4, 5, 6, 40, 500, 5000))))
        if number % 2:
            data[0] = 0xCE
        if number % 4 == 3 and len(data) > 5:
            data[1:5] = (len(data) - 5).to_bytes(4, "big")
        async with await Wire.open(ports[number % 3], hello=False) as wire:
            wire.write(bytes(data))
            if chance.random() < 0.5:
                wire.writer.write_eof()
                await wire.closed()

    async with healthy(cluster):
        for start in range(0, 1000, 50):
            await asyncio.gather(*(attack(number) for number in range(start, start + 50)))
    assert logged(caplog, "event=protocol-error"), f"seed {seed}"


@pytest.mark.parametrize(("data", "reason"), [
    (b"\xce\xff\xff\xff\xff", "over the limit"),
    (b"\xce" + (FRAME_BYTES_MAX + 1).to_bytes(4, "big") + b"x", "over the limit"),
    (b"\xce\x00\x00\x00\x03\xc0\xc0\xc0", "the prefix says 3 bytes"),
    (b"\xce\x00\x00\x00\x02\x93\x01", "does not end there"),
    (b"\xce\x00\x00\x00\x00", "does not start a frame"),
    (b"\xce\x00\x00\x00\x01\xc1", "malformed"),
    (raw.pack([1, "hello", 1, "x"]) + b"\xcf", "does not start a frame"),
    (b"\xce\x00\x00\x00\x09\x94\x01\xa3put\x81\x91\x01\x02", "malformed"),  # an array as the key of a map
    (raw.pack({"id": 1}), "a request is an array"),
    (raw.pack([1]), "a request is an array"),
    (raw.pack(7), "a request is an array"),
    (raw.pack([-1, "status"]), "the id of a request"),
    (raw.pack([REQUEST_ID_MAX + 1, "status"]), "the id of a request"),
    (raw.pack([True, "status"]), "the id of a request"),
    (raw.pack(["1", "status"]), "the id of a request"),
])  # fmt: skip
async def test_frame_errors_close(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture, data: bytes, reason: str
) -> None:
    """Bytes that cannot be answered close the connection, with the reason in the log, and nobody else's."""
    async with healthy(cluster), await Wire.open(cluster.coordinator.address) as wire:
        wire.write(data)
        await wire.closed()
    assert logged(caplog, reason)
    assert cluster.coordinator.clients.protocol_errors == 1


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"set a 1\r\n", b"*1\r\n$4\r\nPING\r\n"])
async def test_another_protocol(caplog: pytest.LogCaptureFixture, line: bytes) -> None:
    """Without the face of Redis, a browser, a telnet user and a redis client get one line that says what this is."""
    async with LocalCluster(1, resp=False) as cluster:
        async with await Wire.open(cluster.coordinator.address, hello=False) as wire:
            wire.write(line)
            answer = await wire.closed()
        assert answer.startswith(b"-ERR this port speaks the kvtcp protocol") and answer.endswith(b"\r\n")
        assert answer.count(b"\n") == 1
        assert logged(caplog, "first byte is")


async def test_node_frames_on_the_client_port(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    """A coordinator that dials the client port is told nothing and closed, or gets an error as any client would."""
    async with await Wire.open(cluster.coordinator.address, hello=False) as wire:
        wire.send([HELLO, raw.link_hello(cluster, "n1")])
        code = (await wire.receive())[1]
        assert code == Code.UNKNOWN_OP
    async with await Wire.open(cluster.coordinator.address, hello=False) as wire:
        wire.send([7])
        await wire.closed()
    assert logged(caplog, "a request is an array")


async def test_client_frames_on_a_node(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    """A client that dials a node's port is closed with a reason, and the coordinator's link stays."""
    number = raw.link_number(cluster.coordinator, "n1")
    async with healthy(cluster):
        for frame in ([1, "hello", 1, "x"], [1, "status"], [2, "get", "a"], [3, 0, 0, []], 5, [], [[1], 2], [7]):
            async with await Wire.open(cluster.nodes["n1"].address, hello=False) as wire:
                wire.send(frame)
                await wire.closed()
    assert logged(caplog, "the first frame of a link is HELLO") and logged(caplog, "a HELLO lacks fields")
    assert raw.link_number(cluster.coordinator, "n1") == number, "the link was never cut"
    assert not cluster.nodes["n1"].stopped.is_set(), "a STOP before HELLO is not obeyed"


async def test_hello_of_strangers(cluster: LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    """A HELLO with a wrong or missing secret, cluster, node, epoch, version or number is refused; the link stays."""
    node = cluster.nodes["n1"]
    promised = node.replica.promised
    cases: list[tuple[dict[str, Any], bytes]] = [
        ({"secret": "wrong"}, b"SECRET"),
        ({"cluster": "other"}, b"CLUSTER"),
        ({"node": "n2"}, b"NODE"),
        ({"epoch": 0}, b"FENCED"),
        ({"coordinator": "somebody"}, b"FENCED"),
        ({"version": 99}, b"VERSION"),
        ({"link": 0}, b"LINK"),
    ]
    async with healthy(cluster):
        for changed, code in cases:
            async with await Wire.open(node.address, hello=False) as wire:
                wire.send([HELLO, raw.link_hello(cluster, "n1", **changed)])
                kind, refused, *_ = await wire.receive()
                assert (kind, refused) == (REFUSED, code)
                assert await wire.closed() == b""
        for name, value in (("secret", None), ("secret", b"\xff"), ("shards", [-1]), ("shards", [""]), ("epoch", "")):
            async with await Wire.open(node.address, hello=False) as wire:
                wire.send([HELLO, raw.link_hello(cluster, "n1", **{name: value})])
                assert await wire.closed() == b""
    assert logged(caplog, "a HELLO lacks fields") and logged(caplog, "event=hello-refused")
    assert node.replica.promised == promised


async def test_a_node_that_is_none(caplog: pytest.LogCaptureFixture) -> None:
    """A coordinator whose node answers nonsense keeps trying, says why in `degraded`, and does not die."""
    async with LocalCluster(1, shards=4) as cluster:
        coordinator = cluster.coordinator
        address = cluster.nodes["n1"].address
        await cluster.nodes["n1"].close()
        answers = [b"HTTP/1.1 400 Bad Request\r\n\r\n", raw.pack([REPORT, {}]), raw.pack([REPORT, {"disk": 1}]),
                   raw.pack([4, 1]), raw.pack([REFUSED, 1, 2, 3]), raw.pack([5, "a", None, None]), b""]  # fmt: skip
        asked = 0

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            writer.write(answers[asked % len(answers)])
            asked += 1
            writer.close()

        server = await asyncio.start_server(impostor, *address)
        coordinator.links["n1"].close()
        coordinator.links["n1"].closing = False
        await until(lambda: asked > len(answers), "a try with every answer", 20)
        server.close()
        assert not coordinator.failed.done()
        assert any("n1 is not linked" in sentence for sentence in coordinator.status.degraded())


# --- requests that are wrong ----------------------------------------------------------------------------


async def test_requests_before_hello(cluster: LocalCluster) -> None:
    """Without hello every request is refused; a hello of another version says which one is spoken."""
    async with await Wire.open(cluster.coordinator.address, hello=False) as wire:
        answer = await wire.ask("get", "a")
        assert answer[1] == Code.BAD_REQUEST and b"hello" in answer[2]
        answer = await wire.ask("hello", 2, "future")
        assert answer[1] == Code.VERSION and answer[3] == {b"version": 1}
        assert (await wire.ask("hello", 1, "now"))[1] == 0
        assert (await wire.ask("get", "a"))[1] == 0


async def test_wrong_requests(cluster: LocalCluster) -> None:
    """Wrong arity, types, operations and sizes are answered with their code, and the connection lives on."""
    long_key = b"k" * (KEY_BYTES_MAX + 1)
    cases: list[tuple[list[Any], Code]] = [
        (["get"], Code.BAD_REQUEST), (["get", "a", "b"], Code.BAD_REQUEST), (["put", "a"], Code.BAD_REQUEST),
        (["get", 5], Code.BAD_REQUEST), (["get", None], Code.BAD_REQUEST), (["put", "a", 1.5], Code.BAD_REQUEST),
        (["put", "a", "b", {"when": 1}], Code.BAD_REQUEST), (["put", "a", "b", []], Code.BAD_REQUEST),
        (["put", "a", "b", {"ttl_ms": -5}], Code.BAD_REQUEST), (["incr", "a", "x"], Code.BAD_REQUEST),
        (["incr", "a", 2**63], Code.RANGE), (["mget", "a"], Code.BAD_REQUEST), (["mput", [["a"]]], Code.BAD_REQUEST),
        (["scan", "", None, 0], Code.BAD_REQUEST), (["scan", "", None, 1, {"cursor": "?"}], Code.BAD_REQUEST),
        (["fly", "a"], Code.UNKNOWN_OP), ([b"\xff\x00"], Code.UNKNOWN_OP), ([7], Code.UNKNOWN_OP),
        ([["get"]], Code.UNKNOWN_OP), ([{}], Code.UNKNOWN_OP), ([None], Code.UNKNOWN_OP),
        (["get", ""], Code.BAD_REQUEST), (["get", long_key], Code.TOO_LARGE), (["put", long_key, ""], Code.TOO_LARGE),
        (["mget", ["a"] * 10_001], Code.TOO_LARGE), (["cas", "a", "b", {}], Code.BAD_REQUEST),
        (["backup", "../up"], Code.BAD_REQUEST), (["restore", "none"], Code.BAD_DATA),
        (["restore", "x", {"mode": "all"}], Code.BAD_REQUEST), (["hello", 1], Code.BAD_REQUEST),
    ]  # fmt: skip
    async with healthy(cluster), await Wire.open(cluster.coordinator.address) as wire:
        for request, code in cases:
            answer = await wire.ask(*request)
            while answer[1] == Code.PROGRESS:
                answer = await wire.receive()
            assert answer[1] == code, (request, answer)
            assert len(answer[2]) > 10 and type(answer[3]) is dict
        assert (await wire.ask("get", "a"))[1:] == [0, None]
        assert (await wire.ask("put", "k" * KEY_BYTES_MAX, ""))[1] == 0
        wire.send([REQUEST_ID_MAX, "count", "", None])
        assert (await wire.receive())[:2] == [REQUEST_ID_MAX, 0]
    assert cluster.coordinator.clients.protocol_errors == 0


async def test_errors_of_nodes_are_text(cluster: LocalCluster) -> None:
    """Sentences and names of details are str on the wire, whoever made the error."""
    async with await Wire.open(cluster.coordinator.address) as wire:
        await wire.ask("put", "k", "text")
        for request in (("add", "k", "x"), ("cas", "k", "x", {"rev": 99}), ("incr", "k", 1), ("get", "")):
            wire.send([77, *request])
            async with asyncio.timeout(10):
                prefix = await wire.reader.readexactly(5)
                answer = msgpack.unpackb(await wire.reader.readexactly(int.from_bytes(prefix[1:], "big")), raw=False)
            assert type(answer[2]) is str and all(type(name) is str for name in answer[3])


async def test_largest_values(cluster: LocalCluster) -> None:
    """A value of 8 MiB works, in a cas with an equally large condition too; one byte more is refused by name."""
    largest = b"v" * VALUE_BYTES_MAX
    async with healthy(cluster), await Wire.open(cluster.coordinator.address) as wire:
        answer = await wire.ask("put", "big", largest + b"v")
        assert answer[1] == Code.TOO_LARGE and b"8388609 bytes" in answer[2]
        assert (await wire.ask("put", "big", largest))[1] == 0
        assert (await wire.ask("get", "big"))[2][0] == largest
        # small writes in the same tick fill the batch that the largest possible cas travels in
        condition = {"value": largest}
        new = b"n" * (FRAME_BYTES_MAX - len(raw.pack([99, "cas", "big", b"", condition])) - 8)
        wire.send(*([n, "put", f"s{n}", b"x" * 10_000] for n in range(1000, 1025)), [99, "cas", "big", new, condition])
        answers = [await wire.receive() for _ in range(26)]
        assert all(answer[1] == 0 for answer in answers)
        assert (await wire.ask("get", "big"))[2][0] == new


async def test_large_pages_and_batches(cluster: LocalCluster) -> None:
    """Pages of the largest values and many large reads in one batch arrive: results are split over frames."""
    async with kvtcp.connect(cluster.url, timeout=20) as kv:
        for n in range(6):
            await kv.put(f"big{n}", bytes([n]) * VALUE_BYTES_MAX)
        pages = [page async for page in kv.scan_pages(prefix="big")]
        assert [(key, value[:1], len(value)) for page in pages for key, value in page] == [
            (f"big{n}".encode(), bytes([n]), VALUE_BYTES_MAX) for n in range(6)
        ]
        requests = [[n, "get", f"big{n % 6}"] for n in range(12)]
        requests += [[100 + n, "scan", "big", None, 1] for n in range(8)]
        async with await Wire.open(cluster.coordinator.address) as wire:
            wire.send(*requests)
            sizes = {}
            for _ in requests:
                ident, code, result = await wire.receive()
                assert code == 0
                sizes[ident] = len(result[0] if ident < 100 else result[0][0][1])
            assert set(sizes.values()) == {VALUE_BYTES_MAX} and len(sizes) == len(requests)
        assert [raw.link_number(cluster.coordinator, node) for node in cluster.nodes] == [1, 1], "no link was broken"


async def test_mget_over_the_frame(cluster: LocalCluster) -> None:
    """Many large mgets at once: those that do not fit a frame are TOO_LARGE, the others come, no link breaks."""
    keys = [f"m{n}" for n in range(10_000)]
    async with kvtcp.connect(cluster.url, timeout=20) as kv:
        await kv.put_many(dict.fromkeys(keys, b"v" * 2000))
        async with healthy(cluster), await Wire.open(cluster.coordinator.address) as wire:
            wire.send([1, "mget", keys], [2, "mget", keys[:7_000]])
            wire.send([3, "mget", keys[:6_000]], [4, "mget", keys[:6_000]])
            answers = {answer[0]: answer for answer in [await wire.receive() for _ in range(4)]}
            assert answers[1][1] == Code.TOO_LARGE
            assert [answers[n][1] for n in (2, 3, 4)] == [0, 0, 0]
            assert all(cell[0] == b"v" * 2_000 for cell in answers[2][2])
            # pairs of short keys are many containers in one batch
            wire.send(*([n, "mget", [b"%d" % k for k in range(10_000)]] for n in range(10, 24)))
            answers = {answer[0]: answer[1] for answer in [await wire.receive() for _ in range(14)]}
            assert set(answers.values()) == {0} and len(answers) == 14
    assert [raw.link_number(cluster.coordinator, node) for node in cluster.nodes] == [1, 1], "no link was broken"


# --- slow and silent connections ------------------------------------------------------------------------


async def test_half_closed_connection(cluster: LocalCluster) -> None:
    """A client that shuts its sending side down still gets every answer, those ready at once too, then the end."""
    async with healthy(cluster):
        for requests in ([[1, "status"]], [[n, "incr", "half", 1] for n in range(1, 200)], [[9, "backup", "half"]]):
            async with await Wire.open(cluster.coordinator.address) as wire:
                wire.send(*requests)
                wire.writer.write_eof()
                wanted = {request[0] for request in requests}
                while wanted:
                    answer = await wire.receive()
                    assert answer[1] in (Code.OK, Code.PROGRESS)
                    if answer[1] == Code.OK:
                        wanted.discard(answer[0])
                assert await wire.closed() == b""


async def test_dribbled_frame(cluster: LocalCluster) -> None:
    """A frame that arrives byte by byte is a frame."""
    async with await Wire.open(cluster.coordinator.address, hello=False) as wire:
        for byte in raw.pack([1, "hello", 1, "slow"]) + raw.pack([2, "put", "slow", "value"]):
            wire.write(bytes([byte]))
            await wire.writer.drain()
            await asyncio.sleep(0)
        assert (await wire.receive())[:2] == [1, 0]
        assert (await wire.receive())[:2] == [2, 0]
        (session,) = cluster.coordinator.clients.sessions
        assert isinstance(session, ClientSession) and session.name == "slow"


@pytest.mark.parametrize("data", [b"\xce", b"\xce\0\0\0\x09", b"\xce\0\0\0\x09\x93", b"\xce\0\x50\0\0x"])
async def test_frame_never_finished(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    """A frame that was begun and never finished closes its connection, at whatever byte it stopped."""
    monkeypatch.setattr(caps_module, "FRAME_WAIT_MS", 60)
    async with healthy(cluster), await Wire.open(cluster.coordinator.address) as idle:
        async with await Wire.open(cluster.coordinator.address) as wire:
            wire.write(data)
            await wire.closed()
        assert (await idle.ask("get", "a"))[1] == 0, "who has begun nothing may stay"
    assert logged(caplog, "its frame was never finished")


async def test_truncated_frame(cluster: LocalCluster) -> None:
    """A client that goes away in the middle of a frame leaves nothing behind, and what it began is not executed."""
    frame = raw.pack([5, "put", "torn", b"x" * 100_000])
    async with healthy(cluster):
        for cut in (1, 4, 5, 6, 50, len(frame) - 1):
            async with await Wire.open(cluster.coordinator.address) as wire:
                wire.write(frame[:cut])
        async with await Wire.open(cluster.coordinator.address) as wire:
            assert (await wire.ask("get", "torn"))[2] is None


async def test_idle_connections(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand idle connections cost nothing that others notice; one over the limit is closed."""
    monkeypatch.setattr(clients_module, "CLIENT_CONNECTIONS_MAX", 1002)
    address = cluster.coordinator.address
    async with healthy(cluster):
        wires = []
        for _ in range(20):
            wires += await asyncio.gather(*(Wire.open(address, hello=False) for _ in range(50)))
        await until(lambda: len(cluster.coordinator.clients.sessions) == 1001, "all sessions")
        assert cluster.coordinator.status.summary()["buffered_bytes"] == 0
        wires.append(await Wire.open(address, hello=False))
        await until(lambda: len(cluster.coordinator.clients.sessions) == 1002)
        async with await Wire.open(address, hello=False) as late:
            assert await late.closed() == b""
        await asyncio.gather(*(wire.close() for wire in wires))


# --- memory -------------------------------------------------------------------------------------------


async def test_client_that_never_reads(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers nobody reads stop the reading of that client's requests; over the total cap it is closed, it alone."""
    async with await Wire.open(cluster.coordinator.address) as wire, kvtcp.connect(cluster.url) as kv:
        await kv.put("large", b"v" * MIB)
        session = await until(lambda: next(s for s in cluster.coordinator.clients.sessions if s.name == "test"))
        async with healthy(cluster):
            for n in range(40):
                wire.send([n, "get", "large"])
            await until(lambda: session.unread_bytes > 20 * MIB and not session.outstanding, "unread answers")
            assert session.write_paused
            operations = cluster.coordinator.clients.requests
            wire.send(*([n, "incr", "unread", 1] for n in range(1000, 1100)))
            ticks = cluster.coordinator._ticks
            await until(lambda: cluster.coordinator._ticks > ticks + 1, "two ticks, in which it must not be read")
            assert session.outstanding == 0 and cluster.coordinator.clients.requests >= operations
            assert await kv.get("unread") is None, "its socket is not read any more"
            assert cluster.coordinator.clients.sessions >= {session}, "its own cap alone does not close it"
            monkeypatch.setattr(clients_module, "BUFFERED_BYTES_MAX", 16 * MIB)
            await until(lambda: session not in cluster.coordinator.clients.sessions, "its end")
        assert logged(caplog, "this client holds most of them")
        await until(lambda: cluster.coordinator.clients.buffered_bytes < MIB, "the memory back")


async def test_large_answers_of_one_tick_against_the_total(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The total is looked at whenever answers are written, not only now and then: it cannot be passed by far."""
    monkeypatch.setattr(clients_module, "BUFFERED_BYTES_MAX", 16 * MIB)
    coordinator = cluster.coordinator
    peak = 0
    account = coordinator.clients.account

    def watched(difference_bytes: int) -> None:
        nonlocal peak
        peak = max(peak, coordinator.clients.held_bytes + difference_bytes)
        account(difference_bytes)

    monkeypatch.setattr(coordinator.clients, "account", watched)
    async with await Wire.open(coordinator.address) as wire, kvtcp.connect(cluster.url, timeout=raw.WAIT_S) as kv:
        await kv.put("large", b"v" * MIB)
        session = await until(lambda: next(s for s in coordinator.clients.sessions if s.name == "test"))
        wire.send(*([n, "get", "large"] for n in range(200)))
        await until(lambda: session not in coordinator.clients.sessions, "its end")
        assert 16 * MIB < peak < 48 * MIB
        await until(lambda: not coordinator.clients.is_over_total, "the others read again")
        assert await kv.put("small", "v") > 0
    await until(lambda: coordinator.clients.held_bytes == 0, "nothing held any more")


async def test_reader_that_wakes_up(cluster: LocalCluster) -> None:
    """A client that reads at last gets all its answers in full, and is read again."""
    async with await Wire.open(cluster.coordinator.address) as wire, kvtcp.connect(cluster.url) as kv:
        await kv.put("large", b"v" * MIB)
        wire.send(*([n, "get", "large"] for n in range(30)))
        session = await until(lambda: next(s for s in cluster.coordinator.clients.sessions if s.name == "test"))
        await until(lambda: session.write_paused, "the pause")
        wire.send([100, "incr", "awake", 1])
        answers = [await wire.receive() for _ in range(31)]
        assert {answer[0] for answer in answers} == {*range(30), 100}
        assert all(len(answer[2][0]) == MIB for answer in answers if answer[0] < 30)


async def test_partial_frames_against_the_total(
    cluster: LocalCluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many big unfinished frames reach the total cap: the largest holders are closed until others can go on."""
    monkeypatch.setattr(clients_module, "BUFFERED_BYTES_MAX", 24 * MIB)
    peak = 0
    async with healthy(cluster):
        wires = [await Wire.open(cluster.coordinator.address) for _ in range(12)]

        async def push(wire: Wire) -> None:
            try:
                wire.write(b"\xce" + (15 * MIB).to_bytes(4, "big") + b"x" * 4 * MIB)
                await wire.writer.drain()
                await wire.closed()
            except (ConnectionError, TimeoutError):
                pass

        pushes = [asyncio.ensure_future(push(wire)) for wire in wires]
        await until(lambda: logged(caplog, "event=over-total"), "the cap")
        await until(lambda: logged(caplog, "this client holds most of them"), "the first one closed")
        for _ in range(100):
            peak = max(peak, sum(session.held_bytes for session in cluster.coordinator.clients.sessions))
            await asyncio.sleep(0)
        await until(lambda: not cluster.coordinator.clients.is_over_total, "reading again")
        for wire in wires:
            await wire.close()
        await asyncio.gather(*pushes)
    assert peak < 48 * MIB, "what one read each can bring over the cap"


async def test_total_between_the_limits(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that together stay just under the limit, and never finish, cannot keep everybody out for ever."""
    async with await Wire.open(cluster.coordinator.address) as other:
        wires = [await Wire.open(cluster.coordinator.address) for _ in range(5)]
        for wire in wires:
            wire.write(b"\xce" + (15 * MIB).to_bytes(4, "big") + b"x" * MIB)
        sessions = cluster.coordinator.clients.sessions
        await until(lambda: sum(s.held_bytes for s in sessions) >= 5 * MIB, "all of it buffered")
        monkeypatch.setattr(clients_module, "WRITE_WAIT_MS", 100)
        monkeypatch.setattr(clients_module, "BUFFERED_BYTES_MAX", 5 * MIB - 1)
        await until(lambda: len(sessions) == 5, "one closed for the limit")
        assert cluster.coordinator.clients.is_over_total, "what is left is above the mark for reading again"
        assert (await other.ask("incr", "other", 1))[1:] == [0, 1], "more are closed until it is not"
        for wire in wires:
            await wire.close()


async def test_waiting_writes_against_the_total(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of writes that wait for a node stops the reading of clients, but closes nobody: it goes by itself."""
    monkeypatch.setattr(clients_module, "BUFFERED_BYTES_MAX", 2 * MIB)
    async with await Wire.open(cluster.coordinator.address) as wire:
        go_on = asyncio.Event()
        connect = NodeLink._connect

        async def held(self: NodeLink, connection: Any) -> None:
            await go_on.wait()
            await connect(self, connection)

        monkeypatch.setattr(NodeLink, "_connect", held)
        raw.cut_link(cluster.coordinator, "n1")
        await until(lambda: not cluster.coordinator.links["n1"].progress.connected, "the cut")
        wire.send(*([n, "put", f"w{n}", b"v" * 100_000] for n in range(40)))
        await until(lambda: cluster.coordinator.clients.is_over_total, "the cap")
        for _ in range(40):
            assert (await wire.receive())[1] == Code.NOT_ENOUGH_REPLICAS
        await until(lambda: not cluster.coordinator.clients.is_over_total, "reading again")
        assert (await wire.ask("get", "w1"))[1:] == [0, None]
        go_on.set()
        await until(lambda: cluster.coordinator.links["n1"].progress.connected, "the link")
