"""Copies that are pulled from a donor: in memory and on disk, with writes meanwhile, and all that may go wrong."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvtcp.constants import KIB
from kvtcp.node import donor as donations_module
from kvtcp.node import puller as pulls_module
from kvtcp.node.server import NodeServer
from kvtcp.protocol.framing import FrameEncoder
from kvtcp.protocol.link import CHUNK, ENTRIES, FETCH, GIVE, LEARN_FAILED, LEARNED, PULL, REFUSED, SHIP, SHIPPED
from kvtcp.protocol.operations import AUDIT, DELETE, DONATE, DROP, GET, INCR, LEARN, UNLEARN
from kvtcp.storage.disk.snapshot import SnapshotFile, SnapshotHeader
from kvtcp.storage.shard.table import Table
from tests.crash.disk import CrashDisk
from tests.processes.raw_client import BOTH_LOOPS, Wire, event_loop_policy, until
from tests.support.learning_tools import Link, begin_transfer
from tests.support.storage_tools import names, open_small

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


async def start(node: str, disk: CrashDisk | None = None) -> NodeServer:
    """A node, on a disk in memory or without one."""
    store = None if disk is None else open_small(disk, segment_bytes=64 * KIB)
    server = NodeServer(node, cluster="c", secret="s", store=store)
    await server.start("127.0.0.1", 0)
    return server


class Nodes:
    """A member and a learner."""

    def __init__(self, member: NodeServer, learner: NodeServer, disk: CrashDisk | None) -> None:
        self.member_node, self.learner_node, self.disk = member, learner, disk
        self.member: Link
        self.learner: Link

    async def link(self, **changed: Any) -> None:
        """New links."""
        self.member = await Link.open(self.member_node, **changed)
        self.learner = await Link.open(self.learner_node, **changed)

    def same(self, shard: int = 0) -> None:
        """Both have the same."""
        one, other = self.member_node.replica.tables[shard], self.learner_node.replica.tables[shard]
        assert one.position == other.position and one.digest() == other.digest()
        other.check()


@asynccontextmanager
async def linked(member: CrashDisk | None, learner: CrashDisk | None, keys: int, old: int = 0) -> AsyncIterator[Nodes]:
    """A member with so many keys in shard 0, a learner with `old` others, and their links."""
    made = Nodes(await start("n1", member), await start("n2", learner), learner)
    await made.link()
    made.member.batch(*made.member.puts(0, keys, b"v" * 50))
    made.learner.batch(*made.learner.puts(0, old, b"old"))
    await made.member.settled()
    await made.learner.settled()
    yield made
    for node in (made.learner_node, made.member_node):
        await node.close()


@pytest.fixture(params=["memory", "disk"])
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[Nodes]:
    """Two nodes of the same kind; the member has 300 keys in shard 0, the learner 3 others."""
    kind = CrashDisk if request.param == "disk" else lambda: None
    async with linked(kind(), kind(), 300, 3) as made:
        yield made


def recovered(nodes: Nodes) -> Any:
    """What the learner's disk has after a kill."""
    assert nodes.disk is not None
    store = open_small(nodes.disk.process_kill(), seed=9)
    assert not store.damages
    return store.copies


async def test_a_copy_is_pulled(nodes: Nodes) -> None:
    """The learner ends up with what the member has, what was written meanwhile included, durably, as another disk."""
    answer = await begin_transfer(nodes.member, nodes.learner)
    items = [*nodes.member.puts(0, 20), [DELETE, 0, 321, 0, b"k7"], [INCR, 0, 322, 0, b"n", 5]]
    nodes.member.seqs[0] = 322
    for link in (nodes.member, nodes.learner):
        link.batch(*items)
    frame = await nodes.learner.frame(LEARNED)
    disk, generation = answer[0].decode(), answer[1]
    assert (generation, answer[2]) == (2, False)
    await nodes.member.settled()
    position = nodes.member_node.replica.tables[0].position
    assert frame == [LEARNED, 0, disk.encode(), 2, *position]
    nodes.same()
    report = nodes.learner_node.replica.report()["shards"][0]
    assert report[:4] == [0, disk, 2, True]
    if nodes.disk is not None:
        copy = recovered(nodes)[0]
        assert (copy.disk, copy.generation, copy.table.position) == (disk, 2, position)
        await until(lambda: len(names(nodes.disk, "snapshots")) == 1, "the removal of what was there")
    nodes.learner.batch(*nodes.member.puts(0, 3))
    cell, (audit,) = await nodes.learner.ask([GET, 0, b"k323"], [AUDIT, [0]])
    assert cell == [b"v", 323, None] and audit[0] == 325
    assert not nodes.learner_node.pulls.running and not nodes.member_node.donations.streams
    assert not nodes.member_node.replica.tables[0].is_scanned


async def test_a_copy_of_a_shard_that_was_not_there(nodes: Nodes) -> None:
    """A node that is new to the shard; a dropped copy is gone and another one comes."""
    nodes.learner.batch([DROP, 0])
    await nodes.learner.settled()
    answer = await begin_transfer(nodes.member, nodes.learner)
    assert answer[1] == 2, "no generation is used twice"
    await nodes.learner.frame(LEARNED)
    nodes.same()


async def test_an_empty_copy_is_pulled(nodes: Nodes) -> None:
    """Nothing but its position."""
    nodes.member.batch(*nodes.member.puts(1, 1), [DELETE, 1, 2, 0, b"k1"])
    nodes.member.seqs[1] = 2
    await nodes.member.settled()
    await begin_transfer(nodes.member, nodes.learner, shard=1)
    assert (await nodes.learner.frame(LEARNED))[5] == 2
    nodes.same(1)


async def test_after_an_accepted_loss(nodes: Nodes) -> None:
    """The donor learns from itself, and the other from it: both go on above the number that was given."""
    member, learner = nodes.member, nodes.learner
    await member.ask([DONATE, 0, b"own", 1000], [DONATE, 0, b"t", 1000], [LEARN, 0, 1, 1000, 1])
    host, port = nodes.member_node.address
    member.wire.send([PULL, 0, host, port, b"own"])
    await learner.ask([LEARN, 0, 1, 1000, 1])
    learner.wire.send([PULL, 0, host, port, b"t"])
    for link in (member, learner):
        link.seqs[0] = 1000
        link.batch(*link.puts(0, 2))
    for link in (member, learner):
        assert (await link.frame(LEARNED))[5] == 1002
    nodes.same()
    await learner.settled()
    if nodes.disk is not None:
        assert recovered(nodes)[0].table.seq == 1002


async def test_writes_go_on_and_on(nodes: Nodes) -> None:
    """Thousands of writes while the copy is pulled, in many batches, to both."""
    answer = await begin_transfer(nodes.member, nodes.learner)
    for _ in range(60):
        items = nodes.member.puts(0, 100, b"w" * 40, keys=500)
        nodes.member.batch(*items)
        nodes.learner.batch(*items)
        await asyncio.sleep(0)
    assert (await nodes.learner.frame(LEARNED))[2] == answer[0]
    await nodes.member.settled()
    await nodes.learner.settled()
    nodes.same()


async def test_a_copy_is_completed_by_entries(nodes: Nodes) -> None:
    """SHIP instead of a transfer: LEARNED comes behind SHIPPED, when all of it is durable."""
    learner = nodes.learner_node.replica
    fresh = await Link.open(nodes.member_node, epoch=2)
    fresh.seqs[1] = 0
    fresh.batch(*fresh.puts(1, 50))
    await fresh.settled()
    nodes.learner.batch([LEARN, 1, 0, 50, 1], *fresh.puts(1, 5))
    fresh.batch(*fresh.puts(1, 0))
    while learner.copies[1].table.seq < 50:
        fresh.wire.send([FETCH, 1, learner.copies[1].table.seq])
        entries = (await fresh.frame(ENTRIES))[4]
        nodes.learner.wire.send([SHIP, 1, entries[:20]])
        shipped = await nodes.learner.frame(SHIPPED)
        assert shipped[5] is None
    frame = await nodes.learner.frame(LEARNED)
    assert frame[1] == 1 and frame[3] == 1 and frame[5] == 55
    if nodes.disk is not None:
        assert recovered(nodes)[1].table.seq == 55


async def test_given_up(nodes: Nodes) -> None:
    """UNLEARN, another LEARN and DROP in the middle of it leave nothing behind."""
    for item in ([UNLEARN, 0], [LEARN, 0, 1, 300, 1], [DROP, 0]):
        await begin_transfer(nodes.member, nodes.learner, token=b"t")
        nodes.learner.batch(item)
        await until(lambda: not nodes.learner_node.pulls.running, "the end of the transfer")
        if item[0] == UNLEARN:
            assert nodes.learner_node.replica.copies[0].table.seq == 3
    await until(lambda: not nodes.member_node.donations.streams and not nodes.member_node.replica.donations)
    await nodes.learner.settled()
    if nodes.disk is not None:
        await until(lambda: names(nodes.disk, "snapshots") == [], "the removal")
        assert sorted(recovered(nodes)) == [1]


@pytest.mark.parametrize("lost", ["learner", "member"])
async def test_a_lost_link_ends_transfers(nodes: Nodes, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends: the donor lets go, the learner's old copy is as it was, and a new link can begin anew."""
    monkeypatch.setattr(donations_module, "BULK_BYTES_PER_S", 1000)
    monkeypatch.setattr(donations_module, "BULK_CHUNK_BYTES", 100)
    member, learner = nodes.member_node, nodes.learner_node
    answer = await begin_transfer(nodes.member, nodes.learner)
    await nodes.member.ask([DONATE, 0, b"waits", 0])
    await until(lambda: member.donations.streams and learner.pulls.running, "the first bytes")
    link = getattr(nodes, lost)
    await link.wire.close()
    await until(lambda: link.node.core.link is None, "the loss")
    await until(lambda: not learner.pulls.running and not member.donations.streams, "the end")
    if lost == "learner":
        assert not learner.replica.learning and learner.replica.copies[0].disk != answer[0].decode()
        assert learner.replica.tables[0].seq == 3
    else:
        assert not member.replica.donations and not member.replica.tables[0].is_scanned
        assert "the connection to the donor was lost" in await failure(nodes.learner)
    monkeypatch.undo()
    seqs = nodes.member.seqs
    await nodes.link(epoch=2)
    nodes.member.seqs = seqs
    await begin_transfer(nodes.member, nodes.learner)
    await nodes.learner.frame(LEARNED)
    nodes.same()


async def test_a_snapshot_while_a_shard_is_learned(nodes: Nodes) -> None:
    """The copy that is completed is in the log like the others, so it is snapshotted like them."""
    await nodes.learner.ask([LEARN, 0, 0, 300, 1])
    nodes.learner_node.snapshot_all()
    if nodes.disk is not None:
        await until(lambda: names(nodes.disk, "snapshots"), "the snapshot")
    await nodes.learner.ask([AUDIT, [0, 1]])
    assert nodes.learner_node.failure is None and 0 in nodes.learner_node.replica.learning


# --- failures -----------------------------------------------------------------------------------------


async def failure(link: Link) -> str:
    """The reason of the next LEARN_FAILED, for shard 0; the old copy is there."""
    _, shard, reason = await link.frame(LEARN_FAILED)
    assert shard == 0
    node = link.node
    assert not node.pulls.running and not node.replica.learning and 0 in node.replica.tables
    link.batch([GET, 0, b"k1"])
    await link.settled()
    return str(reason.decode())


async def test_what_is_not_there_to_pull(nodes: Nodes) -> None:
    """No shard that is learned, no donor, no donation."""
    host, port = nodes.member_node.address
    nodes.learner.wire.send([PULL, 0, host, port, b"t"])
    assert await failure(nodes.learner) == "the shard is not being learned"
    await nodes.learner.ask([LEARN, 0, 1, 300, 1])
    nodes.learner.wire.send([PULL, 0, host, port, b"unknown"])
    assert "nothing is donated under this token" in await failure(nodes.learner)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await nodes.learner.ask([LEARN, 0, 1, 300, 1])
    nodes.learner.wire.send([PULL, 0, host, port, b"t"])
    assert "the connection to the donor was lost after 0 bytes" in await failure(nodes.learner)
    server.close()
    await server.wait_closed()
    await nodes.learner.ask([LEARN, 0, 1, 300, 1])
    nodes.learner.wire.send([PULL, 0, host, port, b"t"])
    assert "cannot be reached" in await failure(nodes.learner)


async def test_a_donor_that_sends_nonsense(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged copy, another one, none, or one that never ends: told, and nothing of it stays."""
    monkeypatch.setattr(donations_module, "BULK_CHUNK_BYTES", 4 * KIB)

    async def donor(answer: Callable[[list[Any]], list[Any] | bytes], chunks: list[Any]) -> str:
        """Pull from a donor that changes the chunks; why it failed."""

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10_000)
            frames = answer(list(chunks))
            encoder = FrameEncoder()
            writer.write(frames if isinstance(frames, bytes) else b"".join(encoder.encode(f) for f in frames))
            await reader.read(1)
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        nodes.learner.wire.send([PULL, 0, "127.0.0.1", server.sockets[0].getsockname()[1], b"x"])
        reason = await failure(nodes.learner)
        server.close()
        return reason

    async def real_chunks(generation: int) -> list[Any]:
        """What a real donor sends to a copy of this generation."""
        await nodes.member.ask([DONATE, 0, b"t", 0])
        directory = nodes.learner_node.pulls.directory
        async with await Wire.open(nodes.member_node.address, hello=False) as wire:
            fields = {"version": 3, "cluster": "c", "secret": "s", "token": b"t"}
            wire.send([GIVE, {**fields, "directory": directory, "generation": generation}])
            found = [await wire.receive()]
            while found[-1][1]:
                found.append(await wire.receive())
        return found

    def flipped(frames: list[Any]) -> list[Any]:
        middle = len(frames) // 2
        data = bytearray(frames[middle][1])
        data[len(data) // 2] ^= 1
        return [*frames[:middle], [CHUNK, bytes(data)], *frames[middle + 1 :]]

    cases: list[tuple[Callable[[list[Any]], list[Any] | bytes], str]] = [
        (flipped, "sum"), (lambda frames: frames[:1] + frames[-1:], "without its last frame"),
        (lambda frames: [[CHUNK, b"x" * 100]], "no snapshot"),
        (lambda frames: [[CHUNK, b"KVTCP"], [CHUNK, b""]], "less than a header"),
        (lambda frames: [[CHUNK, SnapshotHeader(bytes(8), 5, 1, 1, 1, 1).encode()]], "another copy"),
        (lambda frames: [7], "no part of a copy"),
        (lambda frames: b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the protocol"),
        (lambda frames: [[CHUNK, frames[0][1]], [REFUSED, b"X", b"no more", 0, 0]], "the donor refused: no more"),
    ]  # fmt: skip
    for answer, expected in cases:
        generation = (await nodes.learner.ask([LEARN, 0, 1, 300, 1]))[0][1]
        chunks = await real_chunks(generation)
        reason = await donor(answer, chunks)
        assert expected in reason
    monkeypatch.setattr(pulls_module, "DONATION_IDLE_MS", 60)
    await nodes.learner.ask([LEARN, 0, 1, 300, 1])
    assert "nothing came from the donor" in await donor(lambda frames: [], [])
    if nodes.disk is not None:
        await until(lambda: names(nodes.disk, "snapshots") == [], "the removal")
    await begin_transfer(nodes.member, nodes.learner)
    await nodes.learner.frame(LEARNED)
    nodes.same()


# --- only on a disk --------------------------------------------------------------------------------------


class FullDisk(CrashDisk):
    """A disk on which the n-th call that concerns a snapshot fails with an error."""

    def __init__(self) -> None:
        super().__init__()
        self.left = -1  # calls until then; negative: never
        self.number = errno.ENOSPC

    def _count(self, path: Path) -> None:
        if "snapshots" in path.parts and self.left >= 0:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.number, "on purpose", str(path))

    def create(self, path: Path, private: bool = False) -> Any:
        self._count(path)
        return super().create(path, private)

    def sync_until(self, node: int, path: Path, until_bytes: int) -> None:
        self._count(path)
        super().sync_until(node, path, until_bytes)

    def rename(self, old: Path, new: Path) -> None:
        self._count(new)
        super().rename(old, new)


@pytest.mark.parametrize("call", range(3))
async def test_no_space_for_another_copy(call: int) -> None:
    """It is given up, the node goes on, and what was written of it is removed; another try succeeds."""
    disk = FullDisk()
    async with linked(None, disk, 300) as nodes:
        disk.left = call
        await begin_transfer(nodes.member, nodes.learner)
        assert "no space for another copy" in await failure(nodes.learner)
        await until(lambda: names(disk, "snapshots") == [], "the removal")
        assert nodes.learner_node.failure is None
        await begin_transfer(nodes.member, nodes.learner)
        await nodes.learner.frame(LEARNED)
        nodes.same()


async def test_a_disk_that_fails_ends_the_node() -> None:
    """Any other error of the disk in a transfer is one of the node."""
    disk = FullDisk()
    async with linked(None, disk, 30) as nodes:
        disk.left, disk.number = 1, errno.EIO
        await begin_transfer(nodes.member, nodes.learner)
        await until(lambda: nodes.learner_node.failure is not None, "the end")


async def test_little_space_ends_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is not fetched as long as the disk is nearly full."""
    async with linked(None, CrashDisk(), 30) as nodes:
        assert nodes.learner_node.durability is not None
        monkeypatch.setattr(nodes.learner_node.durability, "space", 1)
        await begin_transfer(nodes.member, nodes.learner)
        assert "too little space" in await failure(nodes.learner)


class GatedDisk(CrashDisk):
    """A disk on which a file of this name (or end of a name) waits until it may be renamed."""

    def __init__(self, name: str = "manifest.json") -> None:
        super().__init__()
        self.name = name
        self.go = threading.Event()
        self.go.set()
        self.is_waiting = False

    def rename(self, old: Path, new: Path) -> None:
        if new.name.endswith(self.name) and not self.go.is_set():
            self.is_waiting = True
            assert self.go.wait(10)
        super().rename(old, new)


async def test_the_manifest_comes_before_all_else() -> None:
    """Until it names the copy a crash comes back to the old one, and nothing of the new one is acknowledged."""
    disk = GatedDisk()
    async with linked(None, disk, 30, 3) as nodes:
        old = nodes.learner_node.replica.copies[0]
        disk.go.clear()
        await begin_transfer(nodes.member, nodes.learner)
        items = nodes.member.puts(0, 5)
        nodes.member.batch(*items)
        nodes.learner.batch(*items)
        await until(lambda: disk.is_waiting, "the manifest")
        nodes.same()
        later = nodes.member.puts(0, 5)
        nodes.member.batch(*later)
        nodes.learner.batch(*later, [GET, 0, b"k40"])
        await until(lambda: nodes.learner_node.replica.applied == nodes.learner.sent, "the batch")
        copy = recovered(nodes)[0]
        assert (copy.disk, copy.table.seq, copy.complete) == (old.disk, 3, True)
        assert nodes.learner.durable < nodes.learner.sent
        disk.go.set()
        assert (await nodes.learner.frame(LEARNED))[5] == 35
        assert recovered(nodes)[0].table.seq >= 35 and nodes.learner.durable < nodes.learner.sent
        await nodes.learner.settled()
        assert recovered(nodes)[0].table.seq == 40


async def test_a_copy_that_is_published_and_not_wanted() -> None:
    """UNLEARN came while its file got its name: the file is removed, the old copy is in its place."""
    disk = GatedDisk(".snapshot")
    async with linked(None, disk, 30) as nodes:
        disk.go.clear()
        await begin_transfer(nodes.member, nodes.learner)
        await until(lambda: disk.is_waiting, "the publication")
        await nodes.learner.ask([UNLEARN, 0])
        disk.go.set()
        await until(lambda: not nodes.learner_node.pulls.running and names(disk, "snapshots") == [], "the removal")
        assert nodes.learner_node.replica.copies[0].generation == 1 == recovered(nodes)[0].generation


async def test_what_takes_long_is_not_done_by_the_loop(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is made and freed in a thread of its own; a donor sends piece by piece."""
    threads: list[str] = []
    decode, release = pulls_module.decode_snapshot, Table.release

    def noting_decode(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return decode(*args)

    def noting_release(table: Table) -> None:
        threads.append(threading.current_thread().name)
        release(table)

    monkeypatch.setattr(pulls_module, "decode_snapshot", noting_decode)
    monkeypatch.setattr(Table, "release", noting_release)
    monkeypatch.setattr(donations_module, "BULK_CHUNK_BYTES", 1 * KIB)
    slices: list[int] = []
    send = donations_module.DonationStream._slice
    monkeypatch.setattr(donations_module.DonationStream, "_slice", lambda stream: (slices.append(1), send(stream))[1])
    old = nodes.learner_node.replica.tables[0]
    await begin_transfer(nodes.member, nodes.learner)
    await nodes.learner.frame(LEARNED)
    await until(lambda: len(threads) == 2, "the old copy is freed")
    assert threads == ["kvtcp-load"] * 2 and len(slices) >= 3
    assert not old._index.cells


async def test_a_copy_is_freed_after_its_last_scan(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup of the copy that was replaced goes on to its end."""
    monkeypatch.setattr(pulls_module, "SCAN_WAIT_S", 0.01)
    old = nodes.learner_node.replica.tables[0]
    frozen = old.freeze()
    await begin_transfer(nodes.member, nodes.learner)
    await nodes.learner.frame(LEARNED)
    assert [row[1] for row in frozen.next_rows(2)] == [b"old", b"old"] and len(old) == 3
    assert len(frozen.next_rows(2)) == 1
    await until(lambda: not old._index.cells, "it is freed")


async def test_a_disk_that_is_slow(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read of the donor than waits for the disk; it goes on when the disk does."""
    if nodes.disk is None:
        return  # nothing waits in memory
    go = threading.Event()
    write = SnapshotFile.write

    def slowly(file: SnapshotFile, data: bytes) -> None:
        assert go.wait(10)
        write(file, data)

    monkeypatch.setattr(SnapshotFile, "write", slowly)
    monkeypatch.setattr(pulls_module, "SNAPSHOT_BUFFER_BYTES", 200 * KIB)
    nodes.member.batch(*nodes.member.puts(0, 2000, b"v" * 4000))
    await nodes.member.settled()
    await begin_transfer(nodes.member, nodes.learner)
    (pull,) = await until(lambda: list(nodes.learner_node.pulls.running.values()))
    await until(lambda: pull._is_paused, "the pause")
    assert pull._sink.waiting_bytes == pull._bytes < 3000 * KIB
    go.set()
    assert (await nodes.learner.frame(LEARNED))[5] == 2300
    nodes.same()
