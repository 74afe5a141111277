"""The donor's side: what is not taken is let go, what is taken leaves in bounded pieces, at a bounded rate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvtcp.constants import KIB, MIB
from kvtcp.node import donor as donations_module
from kvtcp.node.server import NodeServer
from kvtcp.protocol.link import CHUNK, GIVE, LINK_VERSION
from kvtcp.protocol.operations import DONATE, DROP
from kvtcp.storage.disk.snapshot import SnapshotName, decode_snapshot
from tests.processes.raw_client import BOTH_LOOPS, Wire, event_loop_policy, until
from tests.support.learning_tools import Link

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


@pytest.fixture
async def donor() -> AsyncIterator[NodeServer]:
    """A node."""
    server = NodeServer("n1", cluster="c", secret="s")
    await server.start("127.0.0.1", 0)
    yield server
    await server.close()


def give(token: bytes = b"t") -> list[Any]:
    """The first frame of a learner."""
    return [GIVE, {
        "version": LINK_VERSION, "cluster": "c", "secret": "s", "token": token, "directory": b"DIRECTRY",
        "generation": 7,
    }]  # fmt: skip


async def donate(donor: NodeServer, values: int, size: int, token: bytes = b"t") -> Link:
    """A link on which so many values of a size were written and donated."""
    link = await Link.open(donor)
    link.batch(*link.puts(0, values, b"v" * size))
    assert (await link.ask([DONATE, 0, token, 0]))[0][3] == values
    return link


async def test_the_bytes_of_a_snapshot(donor: NodeServer) -> None:
    """Large and small values, in chunks that end; the position and the entries that may be uncommitted are in them."""
    link = await donate(donor, 200, 3000)
    link.batch(*link.puts(0, 50, b"later"))
    await link.settled()
    async with await Wire.open(donor.address, hello=False) as wire:
        wire.send(give())
        chunks = []
        while not chunks or chunks[-1]:
            kind, data = await wire.receive()
            assert kind == CHUNK
            chunks.append(data)
        with pytest.raises(EOFError):
            await wire.receive()
    assert len(chunks) > 5 and max(map(len, chunks)) < 400 * KIB
    table, kept = decode_snapshot(b"".join(chunks), SnapshotName(0, 7, 200), b"DIRECTRY")
    assert table.seq == 200 and table.generation == 7 and len(table) == 200
    assert [entry[1:3] for entry in kept] == [(7, seq) for seq in range(1, 201)]
    assert not donor.replica.tables[0].is_scanned and not donor.replica.donations and not donor.donations.streams


async def test_nobody_comes(
    donor: NodeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A donation is let go after some time; one that was replaced or dropped before is not looked at again."""
    monkeypatch.setattr(donations_module, "DONATION_IDLE_MS", 50)
    link = await donate(donor, 10, 10)
    await link.ask([DONATE, 0, b"t", 0], [DONATE, 1, b"u", 0], [DROP, 1])
    await until(lambda: not donor.replica.donations, "the end of the donation")
    assert not donor.replica.tables[0].is_scanned and not donor.donations._timers
    assert caplog.text.count("event=donation-let-go") == 1


async def test_a_learner_that_reads_nothing(donor: NodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is encoded for it, and after some time it is let go."""
    monkeypatch.setattr(donations_module, "BULK_BYTES_PER_S", 1000 * MIB)
    link = await donate(donor, 100, 256 * KIB)
    monkeypatch.setattr(donations_module, "DONATION_IDLE_MS", 300)
    async with await Wire.open(donor.address, hello=False) as wire:
        wire.writer.transport.pause_reading()
        wire.send(give())
        (stream,) = await until(lambda: donor.donations.streams)
        await until(lambda: stream._pacer._is_held, "the pause")
        assert stream._bytes < 20 * MIB
        await until(lambda: not donor.donations.streams, "the end")
        assert not donor.replica.tables[0].is_scanned
    await link.wire.close()


async def test_the_rate(donor: NodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All streams together send no more in a second than the bound."""
    monkeypatch.setattr(donations_module, "BULK_BYTES_PER_S", 4 * MIB)
    link = await donate(donor, 64, 16 * KIB)
    await link.ask([DONATE, 0, b"u", 0])
    pauses: list[float] = []
    call_later = donor.loop.call_later

    def later(delay: float, callback: Any, *args: Any) -> Any:
        if getattr(callback, "__name__", "") == "run":
            pauses.append(delay)
        return call_later(delay, callback, *args)

    monkeypatch.setattr(donor.donations, "loop", type("Loop", (), {"call_later": staticmethod(later)})())
    async with await Wire.open(donor.address, hello=False) as one, await Wire.open(donor.address, hello=False) as two:
        one.send(give(b"t"))
        two.send(give(b"u"))
        for wire in (one, two):
            while (await wire.receive())[1]:
                pass
    assert len(pauses) >= 8 and sum(pauses) > 0.9, "two of 2 MiB, their entries included, at 4 MiB a second"


async def test_a_learner_that_talks(donor: NodeServer) -> None:
    """After GIVE it says nothing: whatever comes ends the connection and the donation."""
    link = await donate(donor, 200, 100 * KIB)
    async with await Wire.open(donor.address, hello=False) as wire:
        wire.send(give(), give())
        await until(lambda: not donor.donations.streams and not donor.replica.donations, "the end")
        await wire.closed()
    assert not donor.replica.tables[0].is_scanned
    await link.wire.close()
