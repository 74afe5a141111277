"""The donor's side of a bulk transfer: a frozen shard leaves as the bytes of a snapshot, in slices between batches.

I/O shell over the replica's donations. The learner opens a connection of its own whose first frame is GIVE, with the
token under which the shard was frozen; from then on the connection belongs to a DonationStream. A slice encodes one
CHUNK and writes it; the pause after it keeps all streams of the node under BULK_BYTES_PER_S and each under BULK_SHARE
of the loop. While the learner does not read, nothing is encoded, so memory stays bounded.

A donation that nobody takes, or that does not move, for DONATION_IDLE_MS is let go: a frozen shard costs its node one
old cell for every key that is written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from kvtcp.constants import (
    BULK_BYTES_PER_S,
    BULK_CHUNK_BYTES,
    BULK_SHARE,
    BULK_SLICE_MS,
    BULK_WRITE_BUFFER_BYTES,
    DONATION_IDLE_MS,
)
from kvtcp.node.learning import Donation
from kvtcp.node.replica import Replicas
from kvtcp.protocol.link import CHUNK
from kvtcp.runtime.pacer import IdleWatch, Pacer
from kvtcp.runtime.transport import FramedConnection
from kvtcp.storage.disk.snapshot import SnapshotHeader, encode_snapshot
from kvtcp.storage.shard.table import Logged

log = logging.getLogger("kvtcp.donation")


class Donations:
    """What a node donates now: the frozen shards that wait, and those that are on their way."""

    def __init__(self, loop: asyncio.AbstractEventLoop, replica: Replicas) -> None:
        self.loop = loop
        self.streams: set[DonationStream] = set()
        self._replica = replica
        self._timers: dict[Donation, asyncio.TimerHandle] = {}  # of those that wait

    def look(self) -> None:
        """New ones are let go if nobody comes for them; those that the replica closed are forgotten."""
        waiting = {donation: token for token, donation in self._replica.donations.items()}
        for donation in [donation for donation in self._timers if donation not in waiting]:
            self._timers.pop(donation).cancel()
        for donation, token in waiting.items():
            if donation not in self._timers:
                self._timers[donation] = self.loop.call_later(DONATION_IDLE_MS / 1000, self._expire, token, donation)

    def _expire(self, token: bytes, donation: Donation) -> None:
        del self._timers[donation]
        if self._replica.donations.get(token) is donation:
            del self._replica.donations[token]
            donation.close()
            log.warning("event=donation-let-go shard=%s reason=nobody came for it in %s ms", donation.shard,
                        DONATION_IDLE_MS)  # fmt: skip

    def send(
        self, connection: FramedConnection, donation: Donation, kept: list[Logged], directory: bytes, generation: int
    ) -> DonationStream:
        """Begin to send a donation that was taken, with these entries, as a snapshot of the learner's directory and
        generation."""
        header = SnapshotHeader(directory, donation.shard, generation, *donation.position)
        pieces = encode_snapshot(header, donation.frozen, kept)
        stream = DonationStream(self, connection, donation, pieces, self._ended)
        self.streams.add(stream)
        stream.begin()
        return stream

    def _ended(self, stream: DonationStream) -> None:
        self.streams.discard(stream)

    def abort(self, reason: str) -> None:
        """The coordinator that asked for all of it is gone: what is under way ends."""
        self.look()
        for stream in list(self.streams):
            stream.abort(reason)


class DonationStream:
    """One frozen shard on its way to one learner."""

    def __init__(
        self, donations: Donations, connection: FramedConnection, donation: Donation, pieces: Iterator[bytes],
        on_end: Callable[[DonationStream], None],
    ) -> None:  # fmt: skip
        self._connection = connection
        self._donation = donation
        self._pieces = pieces
        self._on_end = on_end
        self._bytes = 0  # sent so far
        self._began_s = time.monotonic()
        self._has_ended = False
        self._pacer = Pacer(
            donations.loop, self._slice, share=lambda: BULK_SHARE,
            rate_bytes_s=lambda: BULK_BYTES_PER_S / len(donations.streams),
        )  # fmt: skip
        self._watch = IdleWatch(
            donations.loop, DONATION_IDLE_MS, lambda idle_s: self.abort(f"the learner took nothing for {idle_s:.0f} s")
        )

    def begin(self) -> None:
        """The first slice."""
        transport = self._connection.transport
        if transport is not None:
            transport.set_write_buffer_limits(high=BULK_WRITE_BUFFER_BYTES)
        self._pacer.run()

    def _slice(self) -> int | None:
        end_s = time.monotonic() + BULK_SLICE_MS / 1000
        made: list[bytes] = []
        size = 0
        whole = False
        while size < BULK_CHUNK_BYTES and time.monotonic() < end_s:
            piece = next(self._pieces, None)
            if piece is None:
                whole = True
                break
            made.append(piece)
            size += len(piece)
        if made:
            self._connection.send((CHUNK, b"".join(made)))
            self._bytes += size
            self._watch.moved()
        if whole:
            self._connection.send((CHUNK, b""))
            log.info("event=donated shard=%s seq=%s bytes=%s ms=%.0f peer=%s", self._donation.shard,
                     self._donation.position[1], self._bytes, (time.monotonic() - self._began_s) * 1000,
                     self._connection.peer)  # fmt: skip
            self._end()
            self._connection.close()
            return None
        self._connection.flush()
        if self._connection.write_paused:
            self._pacer.hold()
        return size

    def resumed(self) -> None:
        """The learner reads again."""
        self._pacer.resume()

    def abort(self, reason: str) -> None:
        """End without an end: the learner sees the connection close."""
        if not self._has_ended:
            log.warning("event=donation-let-go shard=%s reason=%s", self._donation.shard, reason)
            self._end()
            self._connection.abort()

    def _end(self) -> None:
        self._has_ended = True
        self._pacer.stop()
        self._watch.stop()
        self._donation.close()
        self._on_end(self)
