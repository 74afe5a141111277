"""Launch: everything a coordinator's process does between its command line and its exit code.

A start has two halves. The first only looks: data directories, the main port (taken, not yet listening), who listens at
the addresses of the nodes. Whatever is wrong there is one sentence and exit code 2, and the data directory is as it
was. The second acts: nodes are spawned or adopted, and asked what they promised; the epoch goes up, durably; the nodes
are linked and made equal; then clients are let in. If it fails half-way what was spawned is stopped again, and what was
adopted runs on, for it may have the only copy of something; a signal stops all.

With --recover-map a map.json that was lost is made again before all that (rebuild_map.py).

A stop: no new clients, open requests answered (DRAIN_MS at most), nodes told to stop and waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from collections.abc import Awaitable, Mapping
from typing import Final, TypeVar

from kvtcp.cluster.file_store import FileConfigStore
from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.map_store import MapStore
from kvtcp.constants import DRAIN_MS, HOST_DEFAULT, RECOVER_WAIT_MS
from kvtcp.coordinator.rebuild_map import local_nodes, recover_map
from kvtcp.coordinator.server import ClusterConfig, CoordinatorServer
from kvtcp.coordinator.settings import Settings, find_places, node_arguments, settle_nodes, settle_shape
from kvtcp.coordinator.supervisor import Found, Supervisor, who_is_there
from kvtcp.coordinator.takeover import check_store, found_map, own_map
from kvtcp.runtime import process as runtime
from kvtcp.runtime.data_directory import DataDirectory
from kvtcp.runtime.process import StartError
from kvtcp.storage.files import OS_DISK

log = logging.getLogger("kvtcp.coordinator")

T = TypeVar("T")
# for the nodes of --nodes to answer, and then for a takeover to come further; what is spawned is waited for as long as
# it runs, because reading its data back may take any time
START_S = 30.0
POLL_S: Final = 0.05


async def serve(settings: Settings, directory: DataDirectory) -> int:
    """Start everything, serve until a signal, stop everything."""
    stop = asyncio.Event()
    runtime.on_stop_signals(stop.set)
    map_store = await MapStore.open(FileConfigStore(directory.path / "map.json", OS_DISK))
    if settings.recover_map is not None:
        spawned = (directory.read() or {}).get("local")
        places = find_places(settings, spawned, local_nodes(settings.data_dir))
        await recover_map(map_store, directory, places, stop, settings.recover_map == "accept")
        if stop.is_set():
            return runtime.EXIT_OK
    known = map_store.map if map_store.is_founded else None
    stored = directory.read()
    directories = [path.name for path in settings.data_dir.iterdir() if path.is_dir()]
    nodes = settle_nodes(settings, known, None if stored is None else stored.get("local"), directories)
    addresses, local = nodes.addresses, nodes.local
    shape = settle_shape(settings, known, list(addresses))
    if map_store.is_founded and stored is None:
        raise StartError(
            f"identity.json is missing in {directory.path}, and map.json is there: put it back, it has the secret of "
            "the cluster"
        )
    is_new = not map_store.is_founded
    identity = dict(stored or {"cluster": secrets.token_hex(8), "secret": secrets.token_hex(16)})
    identity["local"] = sorted({*identity.get("local", ()), *local}, key=lambda node: (len(node), node))
    cluster, secret = identity["cluster"], identity["secret"]
    if map_store.is_founded and map_store.map.cluster != cluster:
        raise StartError(
            f"map.json and identity.json in {directory.path} are of two clusters ({map_store.map.cluster}, {cluster}); "
            "put back those that belong together"
        )
    local_host = addresses[next(iter(local))][0] if local else HOST_DEFAULT
    supervisor = Supervisor(local_host, local, settings.data_dir, node_arguments(settings), stop.set)
    with runtime.bind(settings.host, runtime.check_port(settings.main_port, "--main-port")) as main_socket:
        if local and not is_new and map_store.map.durability != "memory":
            supervisor.check_directories()
        found = await supervisor.survey(cluster, secret)
        found |= await survey({n: at for n, at in addresses.items() if n not in local}, cluster, secret)
        check_store(map_store, found)
        if stop.is_set():
            return runtime.EXIT_OK
        try:
            settings.backup_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"the backup directory {settings.backup_dir} cannot be used: {error.strerror}") from error
        if identity != stored:
            directory.write(identity)
        first = found_map(
            cluster=cluster,
            shards=shape.shards,
            # it may have fewer nodes now than when it was created; then the map's factor stays as it is
            factor=min(shape.factor, len(addresses)),
            min_insync=shape.min_insync,
            durability=settings.durability,
            nodes=addresses,
        )
        config = ClusterConfig(
            secret, settings.durability, settings.backup_dir, not settings.no_resp, supervisor.local_sockets()
        )
        coordinator = Coordinator(config, map_store, supervisor, stop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, supervisor.snapshot_all)
        try:
            await coordinator.start(first)
            if not stop.is_set():
                await _open(coordinator.running, main_socket, is_new)
            coordinator.has_begun = True
            return await coordinator.serve()
        finally:
            await coordinator.end()


async def survey(addresses: Mapping[str, tuple[str, int]], cluster: str, secret: str) -> dict[str, Found]:
    """Who is at the addresses of the nodes. Raises StartError for what can never become a member.

    A node that does not answer yet is waited for later.
    """
    asked = (who_is_there(host, port, node, cluster, secret) for node, (host, port) in addresses.items())
    answers = dict(zip(addresses, await asyncio.gather(*asked), strict=True))
    for node, found in answers.items():
        if found.kind == "foreign":
            address = runtime.join_address(*addresses[node])
            raise StartError(f"at {address}, meant for {node}, is {found.what}; give the right addresses with --nodes")
    return answers


class Coordinator:
    """The second half of a start, and the end."""

    def __init__(
        self, config: ClusterConfig, map_store: MapStore, supervisor: Supervisor, stop: asyncio.Event
    ) -> None:
        self._config = config
        self._map_store = map_store
        self._supervisor = supervisor
        self._stop = stop
        self._server: CoordinatorServer | None = None  # None before the map is owned
        self.has_begun = False  # the start did not fail: all local nodes are this coordinator's to stop

    @property
    def running(self) -> CoordinatorServer:
        """The server, once `start` made it."""
        assert self._server is not None, "a started coordinator has a server"
        return self._server

    async def start(self, first: ClusterMap) -> None:
        """Nodes up, the map owned, the nodes linked and equal; or a stop asked for. Raises StartError, CannotServe."""
        await self._supervisor.start(first.cluster, self._config.secret)
        found = await self._answering(first)
        if found is None:
            return
        check_store(self._map_store, found)
        before = await self._unless_stopped(own_map(self._map_store, first))
        if before is None:
            return
        server = self._server = CoordinatorServer(self._config, self._map_store, before)
        runtime.on_unexpected_errors(server.core_failed)
        server.failed.add_done_callback(lambda _: self._stop.set())
        server.on_node_removed = self._supervisor.release
        server.status.restarts_of = self._supervisor.restarts_of
        server.start_links()
        await self._ready(server)

    async def _answering(self, first: ClusterMap) -> dict[str, Found] | None:
        """What the nodes say when they listen; None if a stop is asked for first. Raises StartError.

        Local nodes are waited for while they read their data back. A new cluster needs all nodes. One that has data
        begins without those that ended again, and after a while without those that listen and do not answer, and
        without foreign ones.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        found: dict[str, Found] = {}
        missing = dict(first.nodes)
        while missing and not self._stop.is_set():
            self._check_processes()
            found |= await survey(missing, first.cluster, self._config.secret)
            missing = {node: address for node, address in first.nodes.items() if found[node].kind != "ours"}
            foreign = missing.keys() - self._supervisor.processes.keys()
            is_hopeless = len(missing) == len(first.nodes) or not self._map_store.is_founded
            if foreign and loop.time() > began + START_S and is_hopeless:
                said = ", ".join(f"{node} ({found[node].what or 'connection refused'})" for node in sorted(foreign))
                raise StartError(f"after {START_S:.0f} s these nodes had not reported: {said}")
            if self._map_store.is_founded and len(missing) < len(first.nodes):
                local = missing.keys() - foreign - self._supervisor.early_exits().keys()
                local = {node for node in local if found[node].kind != "silent"}
                # those that come late have RECOVER_WAIT_MS more, when their shards are recovered
                if not local and loop.time() > began + RECOVER_WAIT_MS / 4000:
                    break
            if missing:
                await self._pause()
        return None if self._stop.is_set() else found

    async def _ready(self, server: CoordinatorServer) -> None:
        """Wait until the shards are served, or a stop is asked for."""
        while not server.ready.is_set() and not self._stop.is_set():
            self._check_processes()
            for link in server.links.values():
                if link.refused:
                    raise StartError(
                        f"node {link.node} at {runtime.join_address(*link.address)} refused: {link.refused}"
                    )
            if server.loop.time() > server.progressed_at + START_S:
                missing = [f"{link.node} ({link.progress.reason})" for link in server.links.values() if not link.report]
                raise StartError(
                    f"after {START_S:.0f} s these nodes had not reported: {', '.join(missing)}"
                    if missing
                    else f"for {START_S:.0f} s the takeover did not come further: "
                    + (self._map_store.changes.trouble or "no node answered")
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await server.ready.wait()
        if server.failed.done():
            server.failed.result()  # raises

    def _check_processes(self) -> None:
        """Raise StartError if nodes ended again, and those that are left cannot serve."""
        ended = self._supervisor.early_exits()
        if not ended:
            return
        if self._map_store.is_founded:
            left = len(self._map_store.map.nodes) - len(ended)
            if left >= self._map_store.map.min_insync:
                return
        raise StartError(f"{next(iter(ended.values()))}; its message is above")

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._stop.wait()

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of `work`; None if a stop is asked for before it is there."""
        working = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return None

    async def serve(self) -> int:
        """Wait for the end; the exit code. Raises what ended the coordinator, if that was no signal."""
        await self._stop.wait()
        if self._server is not None and self._server.failed.done():
            self._server.failed.result()  # raises
        if self._supervisor.failure is not None:
            raise self._supervisor.failure
        return runtime.EXIT_OK

    async def end(self) -> None:
        """Answer what is open, then end the local nodes and everything else."""
        log.info("event=stopping")
        server = self._server
        asked: set[str] = set()
        if server is not None:
            await server.drain(DRAIN_MS)
            if server.controller.ownership.deposed:
                await self._supervisor.leave()
                await server.close()
                return
            if self.has_begun:
                self._supervisor.expect_stop()
                asked = {n for n in self._supervisor.processes if n in server.links and server.links[n].stop_node()}
            await server.close()
        else:
            await self._map_store.close()
        await self._supervisor.stop(asked, only_spawned=not self.has_begun)
        log.info("event=stopped")


async def _open(server: CoordinatorServer, main_socket: socket.socket, is_new: bool) -> None:
    """Let clients in and say so. Raises StartError."""
    try:
        await server.listen(main_socket)
    except OSError as error:  # another process took the port between bind and listen
        host, port = main_socket.getsockname()[:2]
        raise StartError(f"port {port} of {host} cannot be used: {error.strerror or error}") from error
    runtime.announce(
        f"kvtcp-coordinator ready on kvtcp://{runtime.join_address(*server.address)} ({len(server.links)} nodes, "
        f"{server.map.shards} shards, replication factor {server.map.factor}, durability {server.controller.durability}"
        + (", a new cluster)" if is_new else ")")
    )
