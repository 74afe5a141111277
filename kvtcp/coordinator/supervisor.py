"""The supervisor: starts local nodes as processes, restarts those that die, stops them all.

Before anything is changed, `survey` asks who is at each address: nobody (spawn), a node of this cluster (adopt), or
somebody else (refuse to start). It asks with a HELLO of epoch 0, which no node ever accepts: one of this cluster
refuses it as FENCED and says which epoch it promised, and neither its links nor its promise change.

A node that dies is started again with back-off, BACKOFF_MIN_MS doubling to BACKOFF_MAX_MS, reset after it lived
BACKOFF_RESET_MS. That holds for an adopted node too: it is no child of this process, so its life is watched by the
lock on its data directory, which ends with it. Nodes run in sessions of their own, so Ctrl-C reaches the coordinator
alone, which stops them in order: a STOP on the link, then SIGTERM, then SIGKILL, within STOP_MS.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import kvtcp
from kvtcp.constants import (
    BACKOFF_MAX_MS,
    BACKOFF_MIN_MS,
    BACKOFF_RESET_MS,
    LINK_FRAME_BYTES_MAX,
    READ_CHUNK_BYTES_MAX,
    RECOVER_WAIT_MS,
    STOP_MS,
)
from kvtcp.errors import ProtocolError
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.link import HELLO, LINK_VERSION, REFUSED
from kvtcp.runtime.data_directory import FILE, IdentityError, lock_holder, read_identity, write_identity
from kvtcp.runtime.process import StartError, link_socket

log = logging.getLogger("kvtcp.supervisor")

ADOPTED_POLL_S: Final = 0.05  # how often the lock of an adopted node is looked at
SETTLE_S: Final = 2.0  # how long a survey waits for a node that is just coming or going

STRANGER: Final = "something that is not a kvtcp node"
# what a node says of a coordinator that is not its own -> what it means to the one who starts the cluster
_FOREIGN: Final = {
    "SECRET": "a node of another cluster",
    "CLUSTER": "a node of another cluster",
    "NODE": "another node of this cluster",
    "VERSION": "a node of another version of kvtcp",
}


@dataclass(frozen=True)
class Found:
    """Who listens at an address. A node of this cluster says which epoch it promised, and the highest version of the
    cluster map that it has seen."""

    kind: str  # "free", "ours", "silent" (no answer to a connection) or "foreign"
    what: str = ""  # for people
    promised: int = 0
    map_version: int = 0


async def first_answer(host: str, port: int, frame: tuple[Any, ...]) -> Any:
    """The first message that comes in answer to a first frame; a Found if none does. Takes at most 2 x
    RECOVER_WAIT_MS."""
    try:
        async with asyncio.timeout(RECOVER_WAIT_MS / 1000):
            reader, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return Found("free")
    except (OSError, TimeoutError, UnicodeError) as error:  # UnicodeError: of a name that cannot be one
        return Found("silent", f"something that does not answer ({error or 'time-out'})")
    try:
        writer.write(FrameEncoder().encode(frame))
        decoder = FrameDecoder(LINK_FRAME_BYTES_MAX)
        messages: list[Any] = []
        async with asyncio.timeout(RECOVER_WAIT_MS / 1000):
            while not messages:
                data = await reader.read(READ_CHUNK_BYTES_MAX)
                if not data:
                    return Found("silent", "something that closes connections without a word")
                messages = decoder.feed(data)
    except TimeoutError:
        return Found("silent", "something that takes connections and does not answer")
    except OSError as error:
        return Found("silent", f"something that breaks connections ({error.strerror or error})")
    except ProtocolError:
        return Found("foreign", STRANGER)
    finally:
        writer.close()
    return messages[0]


async def who_is_there(host: str, port: int, node: str, cluster: str, secret: str) -> Found:
    """Ask the address for node `node` of the cluster. Changes nothing there. Takes at most 2 x RECOVER_WAIT_MS."""
    hello = {
        "version": LINK_VERSION, "cluster": cluster, "secret": secret, "epoch": 0, "coordinator": "survey",
        "link": 0, "node": node, "durability": "", "map_version": 0, "heard_version": 0, "map": None, "shards": [],
    }  # fmt: skip
    answer = await first_answer(host, port, (HELLO, hello))
    return answer if isinstance(answer, Found) else refusal(answer)


def refusal(answer: Any) -> Found:
    """Who it is that answered a first frame with this, if it is no welcome."""
    match answer:
        case [kind, bytes() as code, bytes() as reason, int() as promised, int() as version] if kind == REFUSED:
            if code == b"FENCED":
                return Found("ours", promised=promised, map_version=version)
            name, text = code.decode("utf-8", "replace"), reason.decode("utf-8", "replace")
            return Found("foreign", _FOREIGN.get(name, f"a kvtcp node that refuses ({text})"))
    return Found("foreign", STRANGER)


def _is_bound(host: str, port: int) -> bool:
    """Whether somebody has the port, listening or not: a node takes it before it reads its data back."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:  # without SO_REUSEADDR
        try:
            probe.bind(address)
        except OSError:
            return True
    return False


class _NotSettledError(StartError):
    """A node seems to come or go: port and directory do not tell the same."""


class ChildProcess:
    """One local node: spawned, or adopted from a coordinator that died."""

    def __init__(self, node: str, command: list[str], data_dir: Path) -> None:
        self.node = node
        self.data_dir = data_dir
        self.restarts = 0
        self.process: asyncio.subprocess.Process | None = None  # None = adopted, or never started
        self.first_exit: int | None = None  # code of the first end that nobody had asked for
        self._command = command
        self._stopping = asyncio.Event()
        self._spawning = asyncio.Lock()  # held while a process is made, so that none is made after `stop`

    async def start(self) -> None:
        """Spawn the process, unless `stop` was called. Raises OSError."""
        root = str(Path(kvtcp.__file__).parent.parent)
        paths = [root, os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        async with self._spawning:
            if self._stopping.is_set():
                return
            self.process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        log.info("event=spawned node=%s pid=%s", self.node, self.process.pid)

    async def watch(self) -> None:
        """Restart the process whenever it ends, until `stop`."""
        loop = asyncio.get_running_loop()
        backoff_ms = BACKOFF_MIN_MS
        while True:
            started = loop.time()
            code = await self._ended()
            if self._stopping.is_set():
                return
            if self.first_exit is None:
                self.first_exit = code
            if (loop.time() - started) * 1000 > BACKOFF_RESET_MS:
                backoff_ms = BACKOFF_MIN_MS
            log.warning("event=node-died node=%s code=%s restart_in_ms=%s", self.node, code, backoff_ms)
            while True:
                try:
                    async with asyncio.timeout(backoff_ms / 1000):
                        await self._stopping.wait()
                        return
                except TimeoutError:
                    backoff_ms = min(backoff_ms * 2, BACKOFF_MAX_MS)
                try:
                    await self.start()
                    break
                except OSError as error:  # no process or no memory to be had now
                    log.error("event=spawn-failed node=%s reason=%s", self.node, error)
            self.restarts += 1

    async def _ended(self) -> int:
        """Wait for the end of the process; its code, or -1 for an adopted one, whose code nobody tells."""
        if self.process is not None:
            return await self.process.wait()
        while lock_holder(self.data_dir) is not None:  # noqa: ASYNC110 - the kernel tells nobody of a lock let go
            await asyncio.sleep(ADOPTED_POLL_S)
        return -1

    def expect_stop(self) -> None:
        """From now on its end is no accident."""
        self._stopping.set()

    async def stop(self, asked: bool) -> None:
        """Wait for its end. It gets SIGTERM at once if it was not `asked` to stop, else late; SIGKILL at the last."""
        self._stopping.set()
        async with self._spawning:
            pass
        steps: list[tuple[int, float]] = [(0, 0.4)] if asked else []
        for number, share in (*steps, (signal.SIGTERM, 0.4), (signal.SIGKILL, 0.15)):
            if number:
                pid = self.pid()
                if pid is None:
                    return
                if asked:
                    log.warning("event=node-signalled node=%s pid=%s signal=%s", self.node, pid, number)
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    return
            try:
                async with asyncio.timeout(STOP_MS / 1000 * share):
                    await self._ended()
                    return
            except TimeoutError:
                continue
        log.error("event=node-runs-on node=%s pid=%s", self.node, self.pid())

    def pid(self) -> int | None:
        """Whom to signal; None if the process has ended."""
        if self.process is not None:
            return self.process.pid if self.process.returncode is None else None
        holder = lock_holder(self.data_dir) or ""
        pid = holder.rpartition(" ")[2]
        return int(pid) if pid.isdigit() else None


class Supervisor:
    """The local nodes of one coordinator."""

    def __init__(
        self, host: str, ports: dict[str, int], data_dir: Path, arguments: list[str], on_failure: Callable[[], None]
    ) -> None:
        self.host = host
        self.ports = ports  # node -> port
        self.data_dir = data_dir
        self.processes: dict[str, ChildProcess] = {}
        self._arguments = arguments
        self._on_failure = on_failure  # a watcher ended with an exception: nobody restarts its node any more
        self._watchers: list[asyncio.Task[None]] = []
        self._adopt: set[str] = set()  # nodes that the survey found running
        self.failure: BaseException | None = None  # what ended a watcher: a defect, the coordinator must end with it

    def local_sockets(self) -> dict[str, Path]:
        """Where the nodes are reached on this machine without its network."""
        paths = {node: link_socket(self.data_dir / node) for node in self.ports}
        return {node: path for node, path in paths.items() if path is not None}

    def check_directories(self) -> None:
        """The cluster has data: raises StartError if none of its nodes has a directory here."""
        if not any((self.data_dir / node / FILE).exists() for node in self.ports):
            first = self.data_dir / next(iter(self.ports))
            raise StartError(
                f"this cluster has data, and none of its nodes has a directory here ({first} and so on): if they were "
                "started elsewhere, list them with --nodes; if their directories were moved, put them back; to begin a "
                "new cluster use another --data-dir"
            )

    def snapshot_all(self) -> None:
        """Have every local node that runs take snapshots now."""
        for process in self.processes.values():
            pid = process.pid()
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.kill(pid, signal.SIGUSR1)

    async def survey(self, cluster: str, secret: str) -> dict[str, Found]:
        """Look whether every node can be adopted or spawned; returns who is at each address, by node.

        Changes nothing. Raises StartError with one sentence if an address or a directory is somebody else's. A node
        that is killed, stops or begins just now has its port without its directory, or the other way round, for a
        moment: that is waited for. One that reads its data back has both for as long as it takes, and does not listen:
        it is adopted as it is.
        """
        until = asyncio.get_running_loop().time() + SETTLE_S
        while True:
            asked = (who_is_there(self.host, port, node, cluster, secret) for node, port in self.ports.items())
            answers = dict(zip(self.ports, await asyncio.gather(*asked), strict=True))
            try:
                self._adopt = {node for node, found in answers.items() if self._runs(node, found, cluster)}
                return answers
            except _NotSettledError:
                if asyncio.get_running_loop().time() > until:
                    raise
            await asyncio.sleep(ADOPTED_POLL_S)

    def _runs(self, node: str, found: Found, cluster: str) -> bool:
        """Whether the node runs and can be adopted; else it can be spawned. Raises StartError."""
        port = self.ports[node]
        path = self.data_dir / node
        fields, holder = self._look_at(path)
        is_hung = found.kind == "silent" and holder is not None  # it is stopped, or very busy: the others go on
        if found.kind not in ("free", "ours") and not is_hung:
            kind = StartError if found.kind == "foreign" else _NotSettledError
            raise kind(
                f"port {port} of {self.host}, meant for node {node}, is in use by {found.what}; "
                "stop it or choose another --base-port"
            )
        if fields is not None and fields["cluster"] != cluster:
            raise StartError(
                f"the data directory {path} belongs to another cluster ({fields['cluster']}, this one is "
                f"{cluster}); use another --data-dir, or move {path} away"
            )
        if found.kind == "free" and holder is not None and not _is_bound(self.host, port):
            raise _NotSettledError(
                f"the data directory {path} is in use by {holder}, which does not listen on port {port}; start "
                "with the --base-port that it was started with, or stop it (one whose coordinator is gone stops by "
                "itself after a minute)"
            )
        if found.kind == "ours" and holder is None:
            raise _NotSettledError(
                f"port {port} of {self.host} is in use by node {node} of this cluster with a data directory "
                f"other than {path}; stop it, or list it with --nodes"
            )
        return holder is not None

    def _look_at(self, path: Path) -> tuple[dict[str, Any] | None, str | None]:
        """Identity and user of a node's data directory. Raises StartError if it cannot be one."""
        try:
            if path.exists() and not path.is_dir():
                raise StartError(f"the data directory {path} cannot be used: it is not a directory")
            return read_identity(path, "node"), lock_holder(path)
        except IdentityError as error:
            raise StartError(str(error)) from error
        except OSError as error:
            raise StartError(f"the data directory {path} cannot be used: {error.strerror}") from error

    async def start(self, cluster: str, secret: str) -> None:
        """Adopt or spawn every node, as the survey found them. Raises StartError; `stop` ends what was spawned."""
        for node in self.ports.keys() - self._adopt:
            path = self.data_dir / node
            try:
                path.mkdir(parents=True, exist_ok=True)
                if not (path / FILE).exists():
                    write_identity(path, "node", {"cluster": cluster, "secret": secret, "node": node})
            except OSError as error:
                raise StartError(f"the data directory {path} cannot be used: {error.strerror}") from error
        for node, port in self.ports.items():
            path = self.data_dir / node
            command = [
                sys.executable, "-P", "-m", "kvtcp.node.main", "--id", node, "--host", self.host,
                "--port", str(port), "--data-dir", str(path), "--spawned", *self._arguments,
            ]  # fmt: skip
            self.processes[node] = process = ChildProcess(node, command, path)
            if node in self._adopt:
                log.info("event=adopted node=%s port=%s holder=%s", node, port, lock_holder(path))
            else:
                try:
                    await process.start()
                except OSError as error:
                    raise StartError(f"node {node} cannot be spawned: {error.strerror}") from error
            watcher = asyncio.create_task(process.watch(), name=f"watch {node}")
            watcher.add_done_callback(self._watcher_done)
            self._watchers.append(watcher)

    def _watcher_done(self, watcher: asyncio.Task[None]) -> None:
        if not watcher.cancelled() and watcher.exception() is not None:
            self.failure = watcher.exception()
            self._on_failure()

    def early_exits(self) -> dict[str, str]:
        """Nodes that ended without being asked to, since the start; for people."""
        return {
            process.node: f"node {process.node} ended with code {process.first_exit} while starting"
            for process in self.processes.values()
            if process.first_exit is not None
        }

    def restarts_of(self, node: str) -> int | None:
        """How often it was started again; None if it is not a local node."""
        process = self.processes.get(node)
        return None if process is None else process.restarts

    def release(self, node: str) -> None:
        """The node was removed from the cluster and told to stop: it is not started again."""
        process = self.processes.get(node)
        if process is not None:
            process.expect_stop()

    def expect_stop(self) -> None:
        """The nodes are about to be told to stop."""
        for process in self.processes.values():
            process.expect_stop()

    async def leave(self) -> None:
        """Let the local nodes run on: they are not this coordinator's any more."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    async def stop(self, asked: set[str], only_spawned: bool = False) -> None:
        """Wait until all local nodes have ended; `asked` are those that were told to, on their links. With
        `only_spawned` those that were adopted are left alone."""
        self.expect_stop()
        stopped = {n: process for n, process in self.processes.items() if not (only_spawned and n in self._adopt)}
        await asyncio.gather(*(process.stop(node in asked) for node, process in stopped.items()))
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
