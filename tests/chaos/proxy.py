"""A TCP proxy that misbehaves on demand, between the coordinator and a node.

TCP keeps order and loses nothing as long as a connection lives, so neither does this: it delays, stalls, cuts, and
forgets. A connection that is *forgotten* is the half-open one: each side believes that it is up, and nothing that is
sent on it ever arrives. New connections are not concerned.
"""

import asyncio
import contextlib

CHUNK_BYTES = 64 << 10


class Proxy:
    """Listens on a port of its own and forwards to `port`."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.delay_s = 0.0  # before each chunk goes on
        self._flow = asyncio.Event()  # clear: nothing is forwarded, new connections neither
        self._flow.set()
        self._closing = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._forgotten: set[asyncio.StreamWriter] = set()  # what is meant for these is dropped
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and end every connection."""
        assert self._server is not None
        self._server.close()
        self.cut()
        self._closing.set()
        self.flow()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break every connection, with what is held back on it."""
        self.forget()
        for writer in self._writers:
            writer.transport.abort()

    def stall(self) -> None:
        """Forward nothing until `flow`."""
        self._flow.clear()

    def flow(self) -> None:
        """Forward again, what was held back first."""
        self._flow.set()

    def forget(self) -> None:
        """The connections there are become half-open."""
        self._forgotten |= self._writers

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        pair = {writer}
        self._writers.add(writer)
        try:
            await self._flow.wait()
            node_reader, node_writer = await asyncio.open_connection("127.0.0.1", self.target)
            pair.add(node_writer)
            self._writers.add(node_writer)
            await asyncio.gather(self._pump(reader, node_writer), self._pump(node_reader, writer))
        except OSError:
            pass  # one side is gone: so is the other, below
        finally:
            self._tasks.discard(task)
            self._writers -= pair
            self._forgotten -= pair
            for each in pair:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._flow.wait()
            if writer in self._forgotten:
                continue
            writer.write(data)
            await writer.drain()
        # the end is news too, and travels the same way
        if writer in self._forgotten:
            await self._closing.wait()
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()
        raise ConnectionResetError("one side is gone")
