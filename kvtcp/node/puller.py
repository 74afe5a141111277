"""The learner's side of a bulk transfer: a copy is fetched from its donor, stored, loaded and published.

I/O shell between the donor's connection and the node's core. What comes is written to the new snapshot's temporary file
by the worker for files (in mode memory it is collected), as fast as the disk takes it: the donor waits otherwise. When
all of it is there it is read back, verified and made a table in a worker of its own, so the loop never stops for it.
Then

    core.loaded     if the copy is still wanted
    publish         the file gets its name, durably
    core.published  the copy is the node's, by the manifest that names it

A crash before the manifest leaves the old copy as it was. Whatever goes wrong with the transfer is told to the
coordinator (LEARN_FAILED); an error of the disk, other than no space, ends the node as always.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from kvtcp.constants import DONATION_IDLE_MS, LINK_FRAME_BYTES_MAX, RECOVER_WAIT_MS, SNAPSHOT_BUFFER_BYTES
from kvtcp.errors import DataError, ProtocolError
from kvtcp.node.core import NodeCore
from kvtcp.node.durability import Durability
from kvtcp.node.learning import Learning
from kvtcp.protocol.link import CHUNK, GIVE, LINK_VERSION, REFUSED
from kvtcp.runtime.pacer import IdleWatch
from kvtcp.runtime.transport import FramedConnection
from kvtcp.runtime.worker import FileTasks, Worker
from kvtcp.storage.disk.log_format import DIRECTORY_BYTES, FormatError
from kvtcp.storage.disk.snapshot import HEADER_BYTES, SnapshotFile, SnapshotHeader, decode_snapshot
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Logged, Table

log = logging.getLogger("kvtcp.learn")

STOP_WAIT_S: Final = 1.0
SCAN_WAIT_S: Final = 0.5  # between two looks whether a retired copy is still read
NO_DIRECTORY: Final = bytes(DIRECTORY_BYTES)  # in the header of a copy that goes to no disk


class Pulls:
    """All transfers to a node that are under way, and the thread that makes tables of them."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, core: NodeCore, durability: Durability | None,
        on_failed: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self.loop = loop
        self.core = core
        self.durability = durability
        self.on_failed = on_failed  # the node must end
        self.running: dict[int, Pull] = {}
        self.bytes_total = 0  # that came of all copies
        self._loader: Worker | None = None
        self._stopped = False

    @property
    def loader(self) -> Worker:
        """The thread for tables."""
        if self._loader is None:
            self._loader = Worker(self.loop, "kvtcp-load")
        return self._loader

    @property
    def directory(self) -> bytes:
        """Id of the data directory."""
        return NO_DIRECTORY if self.durability is None else self.durability.store.manifest.directory

    def start(self, learning: Learning, host: str, port: int, token: bytes) -> None:
        """Fetch the copy of a shard that is being learned."""
        pull = self.running[learning.shard] = Pull(self, learning, host, port, token)
        pull.begin()

    def end(self, shard: int, reason: str) -> None:
        """End the transfer of a shard, if there is one."""
        pull = self.running.get(shard)
        if pull is not None:
            pull.end(reason)

    def abort(self, reason: str) -> None:
        """The link is gone, and all that was learned with it."""
        for pull in list(self.running.values()):
            pull.end(reason)

    def let_go(self, copy: Copy) -> None:
        """Free a copy that is not used any more, in the thread; not before the last scan of it has ended."""
        if self._stopped:
            return
        if copy.table.is_scanned:
            self.loop.call_later(SCAN_WAIT_S, self.let_go, copy)
        else:
            self.loader.submit(copy.table.release, self._released)

    def _released(self, _: Any, error: BaseException | None) -> None:
        if error is not None:
            self.on_failed(error)

    def stop(self) -> None:
        """The node ends."""
        self._stopped = True
        self.abort("the node stops")
        if self._loader is not None and not self._loader.stop(STOP_WAIT_S):
            log.warning("event=load-not-stopped reason=a table was not made or freed in %s s", STOP_WAIT_S)


class CopySink(Protocol):
    """Where the bytes of a copy go."""

    waiting_bytes: int  # given and not stored yet

    def begin(self, header: SnapshotHeader) -> None:
        """The header is known."""

    def write(self, data: bytes) -> None:
        """The next bytes."""

    def finish(self, done: Callable[[bytes | bytearray], None]) -> None:
        """All were given: they are read back."""

    def publish(self, done: Callable[[int], None]) -> None:
        """Make them what a start finds, if the manifest says so; their number."""

    def abort(self) -> None:
        """Nobody wants them."""


class Pull:
    """One copy on its way."""

    def __init__(self, pulls: Pulls, learning: Learning, host: str, port: int, token: bytes) -> None:
        self.loop = pulls.loop
        self.ended = False
        self.connection: PullConnection | None = None
        self._pulls = pulls
        self._learning = learning
        self._address = (host, port)
        self._token = token
        self._shard = learning.shard
        self._head = b""  # the first bytes, until there are as many as a header has
        self._header: SnapshotHeader | None = None
        self._bytes = 0
        self._whole = False  # the last byte is here
        self._is_paused = False  # nothing is read until more is stored
        self._began_s = time.monotonic()
        self._sink: CopySink = MemorySink() if pulls.durability is None else DiskSink(pulls.durability, self)
        self._dialling: asyncio.Task[None] | None = None
        self._watch = IdleWatch(
            self.loop, DONATION_IDLE_MS, lambda idle_s: self.fail(f"nothing came from the donor for {idle_s:.0f} s")
        )

    def begin(self) -> None:
        """Dial."""
        log.info("event=pulling shard=%s disk=%s generation=%s donor=%s:%s", self._shard, self._learning.disk,
                 self._learning.generation, *self._address)  # fmt: skip
        self._dialling = self.loop.create_task(self._dial())

    async def _dial(self) -> None:
        try:
            async with asyncio.timeout(RECOVER_WAIT_MS / 1000):
                await self.loop.create_connection(lambda: PullConnection(self), *self._address)
        except (OSError, TimeoutError) as error:
            self.fail(f"the donor {self._address[0]}:{self._address[1]} cannot be reached: {error or 'no answer'}")

    # --- bytes in -----------------------------------------------------------------------------------

    def connected(self, connection: PullConnection) -> None:
        """Ask for the copy."""
        if self.ended:
            connection.abort()
            return
        self.connection = connection
        identity = self._pulls.core.identity
        connection.send((GIVE, {
            "version": LINK_VERSION, "cluster": identity.cluster, "secret": identity.secret, "token": self._token,
            "directory": self._pulls.directory, "generation": self._learning.generation,
        }))  # fmt: skip
        connection.flush()

    def message(self, message: Any) -> None:
        """A frame of the donor."""
        if self.ended or self._whole:
            return
        if type(message) is list and len(message) == 2 and message[0] == CHUNK and type(message[1]) is bytes:
            self._chunk(message[1])
        elif type(message) is list and len(message) >= 3 and message[0] == REFUSED and type(message[2]) is bytes:
            self.fail(f"the donor refused: {message[2].decode('utf-8', 'replace')}")
        else:
            self.fail("the donor sent what is no part of a copy")

    def _chunk(self, data: bytes) -> None:
        self._watch.moved()
        durability = self._pulls.durability
        if not self._pulls.core.is_wanted(self._learning):
            self.end("it is not wanted any more")
        elif durability is not None and durability.space > 0:
            self.fail("there is too little space on the disk for another copy")
        elif data:
            self._bytes += len(data)
            self._pulls.bytes_total += len(data)
            if self._header is None:
                self._head += data
                if len(self._head) >= HEADER_BYTES and self._begin_file():
                    self._write(self._head)
            else:
                self._write(data)
        elif self._header is None:
            self.fail(f"the donor sent {self._bytes} bytes, less than a header")
        else:
            self._whole = True
            self._watch.stop()
            if self.connection is not None:
                self.connection.close()
            self._sink.finish(self._stored)

    def _begin_file(self) -> bool:
        try:
            header = SnapshotHeader.parse(self._head)
        except FormatError as error:
            self.fail(f"the donor sent no snapshot: {error}")
            return False
        expected = (self._pulls.directory, self._shard, self._learning.generation)
        if (header.directory, header.shard, header.generation) != expected:
            self.fail("the donor sent another copy than was asked for")
            return False
        self._header = header
        self._sink.begin(header)
        return True

    def _write(self, data: bytes) -> None:
        self._sink.write(data)
        self.look_at_buffer()

    def look_at_buffer(self) -> None:
        """Read on, or wait until more is stored."""
        transport = None if self.connection is None else self.connection.transport
        if transport is None or transport.is_closing() or self._whole:
            return
        if self._sink.waiting_bytes > SNAPSHOT_BUFFER_BYTES and not self._is_paused:
            self._is_paused = True
            transport.pause_reading()
        elif self._sink.waiting_bytes <= SNAPSHOT_BUFFER_BYTES and self._is_paused:
            self._is_paused = False
            transport.resume_reading()

    def lost(self, reason: str) -> None:
        """The connection is gone."""
        if not self._whole:
            self.fail(f"the connection to the donor was lost after {self._bytes} bytes: {reason}")

    # --- the copy -----------------------------------------------------------------------------------

    def _stored(self, data: bytes | bytearray) -> None:
        header = self._header
        assert header is not None, "all of it came"
        directory = self._pulls.directory
        self._pulls.loader.submit(lambda: decode_snapshot(data, header.name, directory), self._decoded)

    def _decoded(self, result: tuple[Table, list[Logged]] | None, error: BaseException | None) -> None:
        if self.ended:
            return
        if isinstance(error, (FormatError, DataError)):
            self.fail(f"the copy that came is damaged: {error}")
            return
        if error is not None or result is None:
            self._pulls.on_failed(error or AssertionError("a table was made"))
            return
        if self._pulls.core.loaded(self._learning, *result):
            self._sink.publish(self._published)
        else:
            self.end("it is of no use, or not wanted any more")

    def _published(self, size: int) -> None:
        if self.ended:
            self._sink.abort()
            return
        header = self._header
        assert header is not None, "all of it came"
        if not self._pulls.core.published(self._learning, (header, size)):
            self.end("it is not wanted any more")
            return
        log.info("event=pulled shard=%s seq=%s bytes=%s ms=%.0f", self._shard, header.seq, size,
                 (time.monotonic() - self._began_s) * 1000)  # fmt: skip
        self._end()

    # --- the end ------------------------------------------------------------------------------------

    def fail(self, reason: str) -> None:
        """The coordinator is told, if it still wants the copy."""
        if self.ended:
            return
        self.end(reason)
        self._pulls.core.pull_failed(self._learning, reason)

    def end(self, reason: str) -> None:
        """Nobody wants it."""
        if not self.ended:
            log.warning("event=pull-ended shard=%s bytes=%s reason=%s", self._shard, self._bytes, reason)
            self._end()
            self._sink.abort()

    def _end(self) -> None:
        self.ended = True
        self._watch.stop()
        if self._dialling is not None and not self._dialling.done():
            self._dialling.cancel()
        if self.connection is not None:
            self.connection.abort()
        if self._pulls.running.get(self._shard) is self:
            del self._pulls.running[self._shard]


class PullConnection(FramedConnection):
    """The learner's end."""

    def __init__(self, pull: Pull) -> None:
        super().__init__(pull.loop, LINK_FRAME_BYTES_MAX)
        self.pull = pull

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.pull.connected(self)

    def messages_received(self, messages: list[Any]) -> None:
        for message in messages:
            self.pull.message(message)

    def protocol_error(self, error: ProtocolError) -> None:
        super().protocol_error(error)
        self.pull.fail(f"the donor does not speak the protocol: {error}")

    def closed(self, reason: str) -> None:
        self.pull.lost(reason)


class MemorySink:
    """For a node that keeps nothing on a disk."""

    def __init__(self) -> None:
        self.waiting_bytes = 0
        self._data = bytearray()
        self._size = 0

    def begin(self, header: SnapshotHeader) -> None:
        """Nothing is to be made."""

    def write(self, data: bytes) -> None:
        """Collect."""
        self._data += data

    def finish(self, done: Callable[[bytes | bytearray], None]) -> None:
        """They are here."""
        data, self._data = self._data, bytearray()
        self._size = len(data)
        done(data)

    def publish(self, done: Callable[[int], None]) -> None:
        """A restart finds nothing anyway."""
        done(self._size)

    def abort(self) -> None:
        """Free them."""
        self._data = bytearray()


class DiskSink:
    """A snapshot file, written by the worker for files."""

    def __init__(self, durability: Durability, pull: Pull) -> None:
        self.waiting_bytes = 0
        self._durability = durability
        self._pull = pull
        self._file: SnapshotFile | None = None
        self._files = FileTasks(durability.in_files, lambda full: pull.fail(f"no space for another copy: {full}"))

    def begin(self, header: SnapshotHeader) -> None:
        """Make the file."""

        def create() -> None:
            self._file = self._durability.store.create_snapshot(header)

        self._files.add(create, lambda _: None)

    def write(self, data: bytes) -> None:
        """Append."""
        self.waiting_bytes += len(data)
        self._files.add(lambda: self._present().write(data), lambda _: self._taken(len(data)))

    def _taken(self, size: int) -> None:
        self.waiting_bytes -= size
        self._pull.look_at_buffer()

    def _present(self) -> SnapshotFile:
        assert self._file is not None, "it is made before anything is written"
        return self._file

    def finish(self, done: Callable[[bytes | bytearray], None]) -> None:
        """All on the disk, under the temporary name; what is there is what is loaded."""

        def finish() -> bytes:
            self._present().finish()
            return self._present().read_back()

        self._files.add(finish, done)

    def publish(self, done: Callable[[int], None]) -> None:
        """Its name, durably."""
        self._files.add(lambda: self._present().publish(), done)

    def abort(self) -> None:
        """Remove what there is of it, behind everything that is under way."""
        self._files.is_over = True
        self._durability.in_files(self._remove, lambda _: None)

    def _remove(self) -> None:
        if self._file is not None:
            self._file.abort()
            self._durability.store.remove([self._file.path])
