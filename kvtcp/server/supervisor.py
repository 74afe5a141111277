"""The supervisor: starts local nodes as processes, restarts those that die, stops them all.

Before it spawns it asks who is at the address: nobody (spawn), a node of this cluster (adopt), or somebody else
(refuse to start). A node that dies is started again with back-off, BACKOFF_MIN_MS doubling to BACKOFF_MAX_MS, reset
after it lived BACKOFF_RESET_MS. Nodes run in sessions of their own, so Ctrl-C reaches the coordinator alone, which
stops them in order: a STOP on the link, then SIGTERM, then SIGKILL, within STOP_MS.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import kvtcp
from kvtcp.constants import (
    BACKOFF_MAX_MS,
    BACKOFF_MIN_MS,
    BACKOFF_RESET_MS,
    READ_CHUNK_BYTES_MAX,
    RECOVER_WAIT_MS,
    STOP_MS,
)
from kvtcp.errors import ProtocolError
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.link import HELLO, REFUSED, REPORT
from kvtcp.server.identity import IdentityError, read_identity, write_identity
from kvtcp.server.runtime import StartError

log = logging.getLogger("kvtcp.supervisor")


async def who_is_there(host: str, port: int, hello: dict[str, Any]) -> str:
    """"free", "ours" (a node that accepts `hello`), or why whoever listens there is not a node of this cluster."""
    try:
        async with asyncio.timeout(RECOVER_WAIT_MS / 1000):
            reader, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return "free"
    except (OSError, TimeoutError) as error:
        return f"it does not answer ({error or 'time-out'})"
    try:
        writer.write(FrameEncoder().encode((HELLO, hello)))
        decoder = FrameDecoder()
        messages: list[Any] = []
        async with asyncio.timeout(RECOVER_WAIT_MS / 1000):
            while not messages:
                data = await reader.read(READ_CHUNK_BYTES_MAX)
                if not data:
                    return "it is not a kvtcp node"
                messages = decoder.feed(data)
        first = messages[0]
        if type(first) is list and first and first[0] == REPORT:
            return "ours"
        if type(first) is list and len(first) > 2 and first[0] == REFUSED:
            return str(first[2].decode("utf-8", "replace"))
        return "it is not a kvtcp node"
    except (ProtocolError, OSError, TimeoutError):
        return "it is not a kvtcp node"
    finally:
        writer.close()


class NodeProcess:
    """One spawned node."""

    def __init__(self, node: str, host: str, port: int, data_dir: Path, arguments: list[str]) -> None:
        self.node = node
        self.port = port
        self.restarts = 0
        self.process: asyncio.subprocess.Process | None = None
        self.first_exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._command = [
            sys.executable, "-m", "kvtcp.server.node_main", "--id", node, "--host", host, "--port", str(port),
            "--data-dir", str(data_dir), "--spawned", *arguments,
        ]  # fmt: skip
        self._stopping = False

    async def start(self) -> None:
        """Spawn the process."""
        root = str(Path(kvtcp.__file__).parent.parent)
        paths = [root, os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        log.info("event=spawned node=%s pid=%s", self.node, self.process.pid)

    async def watch(self) -> None:
        """Restart the process whenever it ends, until `stop`."""
        loop = asyncio.get_running_loop()
        backoff_ms = BACKOFF_MIN_MS
        while True:
            assert self.process is not None
            started = loop.time()
            code = await self.process.wait()
            if self._stopping:
                return
            if not self.first_exit.done():
                self.first_exit.set_result(code)
            if (loop.time() - started) * 1000 > BACKOFF_RESET_MS:
                backoff_ms = BACKOFF_MIN_MS
            log.warning(
                "event=node-died node=%s pid=%s code=%s restart_in_ms=%s", self.node, self.process.pid, code, backoff_ms
            )
            await asyncio.sleep(backoff_ms / 1000)
            backoff_ms = min(backoff_ms * 2, BACKOFF_MAX_MS)
            if self._stopping:
                return
            self.restarts += 1
            await self.start()

    def expect_stop(self) -> None:
        """From now on its end is no accident."""
        self._stopping = True

    async def stop(self) -> None:
        """Wait for its end after STOP; SIGTERM after half of STOP_MS, SIGKILL after most of it."""
        self._stopping = True
        process = self.process
        if process is None:
            return
        for action, share in ((None, 0.4), (process.terminate, 0.4), (process.kill, 0.2)):
            if process.returncode is not None:
                return
            if action is not None:
                log.warning("event=node-signalled node=%s pid=%s signal=%s", self.node, process.pid, action.__name__)
                action()
            try:
                async with asyncio.timeout(STOP_MS / 1000 * share):
                    await process.wait()
                    return
            except TimeoutError:
                continue


class Supervisor:
    """The local nodes of one coordinator."""

    def __init__(self, host: str, ports: dict[str, int], data_dir: Path, arguments: list[str]) -> None:
        self.host = host
        self.ports = ports  # node -> port
        self.data_dir = data_dir
        self.processes: dict[str, NodeProcess] = {}
        self._arguments = arguments
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self, hello: dict[str, Any]) -> None:
        """Adopt or spawn every node. Raises StartError, with nothing spawned, if an address is somebody else's."""
        to_spawn = []
        for node, port in self.ports.items():
            found = await who_is_there(self.host, port, {**hello, "node": node, "shards": []})
            if found == "free":
                to_spawn.append(node)
            elif found != "ours":
                raise StartError(f"port {port} of {self.host}, meant for node {node}, is in use: {found}")
            else:
                log.info("event=adopted node=%s port=%s", node, port)
        for node in to_spawn:
            self._prepare_directory(node, hello["cluster"], hello["secret"])
        for node in to_spawn:
            process = NodeProcess(node, self.host, self.ports[node], self.data_dir / node, self._arguments)
            await process.start()
            self.processes[node] = process
            self._watchers.append(asyncio.create_task(process.watch(), name=f"watch {node}"))

    def _prepare_directory(self, node: str, cluster: str, secret: str) -> None:
        path = self.data_dir / node
        try:
            path.mkdir(parents=True, exist_ok=True)
            fields = read_identity(path, "node")
            if fields is None:
                write_identity(path, "node", {"cluster": cluster, "secret": secret, "node": node})
            elif fields["cluster"] != cluster:
                raise StartError(f"the data directory {path} belongs to another cluster ({fields['cluster']})")
        except IdentityError as error:
            raise StartError(str(error)) from error
        except OSError as error:
            raise StartError(f"the data directory {path} cannot be used: {error.strerror}") from error

    def early_exit(self) -> str | None:
        """Which node ended before the cluster was ready, for people."""
        for process in self.processes.values():
            if process.first_exit.done():
                return f"node {process.node} ended with code {process.first_exit.result()} while starting"
        return None

    def expect_stop(self) -> None:
        """The nodes are about to be told to stop."""
        for process in self.processes.values():
            process.expect_stop()

    async def stop(self) -> None:
        """Wait until all spawned nodes have ended."""
        self.expect_stop()
        await asyncio.gather(*(process.stop() for process in self.processes.values()))
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
