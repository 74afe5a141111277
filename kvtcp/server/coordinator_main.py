"""`kvtcp-coordinator`: start a cluster (or link to nodes started elsewhere) and serve until stopped.

A start has two halves. The first only looks: arguments, data directories, the main port (taken, not yet listening),
who listens at the addresses of the nodes. Whatever is wrong there is one sentence and exit code 2, and the data
directory is as it was. The second acts: nodes are spawned or adopted, and asked what they promised; the epoch goes up,
durably; the nodes are linked and made equal; then clients are let in. If it fails half-way what was spawned is stopped
again, and what was adopted runs on, for it may have the only copy of something; a signal stops all.

With --recover-map a map.json that was lost is made again before all that (recover_map.py).

A stop: no new clients, open requests answered (DRAIN_MS at most), nodes told to stop and waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from kvtcp.config_store.file import FileConfigStore
from kvtcp.config_store.keeper import MapKeeper
from kvtcp.config_store.store import ConfigStoreError
from kvtcp.constants import (
    BASE_PORT_DEFAULT,
    DRAIN_MS,
    HOST_DEFAULT,
    MAIN_PORT_DEFAULT,
    NODES_DEFAULT,
    NODES_MAX,
    ORPHAN_MS,
    RECOVER_WAIT_MS,
    REPLICATION_FACTOR_DEFAULT,
    SHARDS_DEFAULT,
    SHARDS_MAX,
)
from kvtcp.replication.cluster_map import ClusterMap
from kvtcp.server import runtime
from kvtcp.server.coordinator import ClusterConfig, CoordinatorServer
from kvtcp.server.identity import FILE as IDENTITY_FILE
from kvtcp.server.identity import DataDirectory, IdentityError
from kvtcp.server.ownership import CannotServe, check_store, found_map, own_map
from kvtcp.server.recover_map import Places, local_nodes, recover_map
from kvtcp.server.runtime import StartError
from kvtcp.server.supervisor import Found, Supervisor, who_is_there
from kvtcp.storage.files import OS_DISK

log = logging.getLogger("kvtcp.coordinator")

T = TypeVar("T")
# for the nodes of --nodes to answer, and then for a takeover to come further; what is spawned is waited for as long as
# it runs, because reading its data back may take any time
START_S = 30.0
POLL_S: Final = 0.05


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="kvtcp-coordinator",
        description="The coordinator of a kvtcp cluster: routes and orders requests, and supervises local nodes.",
    )
    parser.add_argument(
        "--num-nodes",
        type=int,
        help=f"local nodes, which are spawned and watched (default: {NODES_DEFAULT}, or those that there are); more "
        "adds nodes, which hold nothing before a rebalance, unless shards have too few copies",
    )
    parser.add_argument(
        "--nodes",
        metavar="HOST:PORT,...",
        help="use nodes started elsewhere with kvtcp-node, in the order of their ids; more adds nodes; later starts "
        "know the addresses without it",
    )
    parser.add_argument(
        "--replication-factor",
        type=int,
        help="copies of every key, fixed when the cluster is created "
        f"(default: {REPLICATION_FACTOR_DEFAULT}, or the number of nodes if that is smaller)",
    )
    parser.add_argument(
        "--min-insync",
        type=int,
        help="fewest in-sync copies a shard may have: a write is acknowledged when all in-sync copies have it, and "
        "refused while there are fewer than this; it may change at a start (default: min(2, factor), or as it was)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        help=f"slices of the key space, fixed when the cluster is created (default: {SHARDS_DEFAULT})",
    )
    parser.add_argument(
        "--main-port",
        type=int,
        default=MAIN_PORT_DEFAULT,
        help="port for clients, 0 = any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--base-port", type=int, default=BASE_PORT_DEFAULT, help="port of the first local node (default: %(default)s)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        help="identity and map of the cluster, and the directories of local nodes; created if missing "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--backup-dir",
        type=Path,
        default=Path("backups"),
        help="where backups are written and restored from; created if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--recover-map",
        nargs="?",
        const="all",
        choices=["all", "accept"],
        help="map.json of the coordinator is lost: make it again from what the nodes have, if all of them answer (the "
        "default), then start; with accept without nodes that are gone for good",
    )
    parser.add_argument(
        "--no-resp", action="store_true", help="do not serve clients of Redis and telnet at the main port"
    )
    parser.add_argument("--orphan-ms", type=int, default=ORPHAN_MS, help=argparse.SUPPRESS)
    runtime.add_common_arguments(parser)
    return parser


def parse_nodes(text: str) -> list[tuple[str, int]]:
    """Addresses of `--nodes`. Raises StartError."""
    addresses = []
    for part in text.split(","):
        host, colon, port = part.strip().rpartition(":")
        if not colon or not host or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise StartError(f"--nodes: {part.strip()!r} is not HOST:PORT")
        addresses.append((host.strip("[]"), int(port)))
    if len(set(addresses)) != len(addresses):
        raise StartError("--nodes: an address is there twice")
    return addresses


@dataclass(frozen=True)
class Nodes:
    """The nodes of the cluster: those of its map, and those that are added with this start."""

    addresses: dict[str, tuple[str, int]]
    local: dict[str, int]  # those that are spawned and watched here -> port


def check_nodes(options: argparse.Namespace) -> None:
    """Raise StartError for values of --nodes and --num-nodes that fit no cluster."""
    if options.nodes is not None:
        if options.num_nodes is not None:
            raise StartError("give --nodes (started elsewhere) or --num-nodes (spawned here), not both")
        if len(parse_nodes(options.nodes)) > NODES_MAX:
            raise StartError(f"there are {len(parse_nodes(options.nodes))} nodes, the limit is {NODES_MAX}")
    else:
        count = NODES_DEFAULT if options.num_nodes is None else options.num_nodes
        if not 1 <= count <= NODES_MAX:
            raise StartError(f"--num-nodes must be from 1 to {NODES_MAX}, not {count}")
        _check_ports(options, [f"n{number}" for number in range(1, count + 1)])


def _check_ports(options: argparse.Namespace, nodes: Sequence[str]) -> dict[str, int]:
    """The ports of local nodes, by their numbers from --base-port on. Raises StartError."""
    ports = {node: options.base_port + int(node[1:]) - 1 for node in nodes}
    if not 1 <= options.base_port <= 65536 - max((port - options.base_port + 1 for port in ports.values()), default=0):
        raise StartError(f"--base-port {options.base_port} leaves no room for {len(ports)} ports up to 65535")
    for node, port in ports.items():
        if port == options.main_port:
            raise StartError(f"--main-port {options.main_port} is also the port of node {node}")
    return ports


def settle_nodes(
    options: argparse.Namespace, stored: ClusterMap | None, spawned: Collection[str] | None
) -> Nodes:
    """Who the nodes are and where. Raises StartError.

    Nodes of the map keep their ids. With --nodes all are started elsewhere. Else those are local that this data
    directory `spawned` before (None: that was not remembered), or that run as if it had; others are those of
    `node add`, and stay where the map says.
    """
    known = {} if stored is None else dict(stored.nodes)
    next_number = 1 if stored is None else stored.last_node + 1
    if options.nodes is not None:
        given = parse_nodes(options.nodes)
        ids = sorted(known, key=lambda node: int(node[1:]))[: len(given)]
        ids += [f"n{next_number + at}" for at in range(len(given) - len(ids))]
        return Nodes({**known, **dict(zip(ids, given, strict=True))}, {})
    host = _local_host(options)

    def is_local(node: str) -> bool:
        has_directory = (options.data_dir / node).is_dir()
        has_address = known[node] == (host, options.base_port + int(node[1:]) - 1)
        if spawned is None:
            return has_directory or has_address
        return node in spawned or (has_directory and has_address)

    nodes = [node for node in known if is_local(node)]
    count = options.num_nodes or (NODES_DEFAULT if stored is None else len(nodes))
    if count < len(nodes):
        raise StartError(
            f"the cluster in {options.data_dir} has {len(nodes)} local nodes, not {count}: to have fewer, start it as "
            "it is, then drain and remove nodes in the shell"
        )
    nodes += [f"n{next_number + at}" for at in range(count - len(nodes))]
    ports = _check_ports(options, nodes)
    return Nodes({**known, **{node: (host, port) for node, port in ports.items()}}, ports)


def _local_host(options: argparse.Namespace) -> str:
    """Where local nodes listen: only this coordinator talks to them, so on this machine whatever --host says."""
    return options.host if runtime.is_loopback(options.host) else HOST_DEFAULT


def find_places(options: argparse.Namespace, spawned: Collection[str] | None) -> Places:
    """Where nodes may be, if there is no map that says it; `spawned` as for `settle_nodes`. Raises StartError."""
    nodes = [] if options.nodes is not None else local_nodes(options.data_dir)
    nodes = [node for node in nodes if spawned is None or node in spawned]
    return Places(
        options.data_dir,
        _local_host(options),
        options.base_port,
        _check_ports(options, nodes),
        [] if options.nodes is None else parse_nodes(options.nodes),
        _node_arguments(options),
    )


def _node_arguments(options: argparse.Namespace) -> list[str]:
    """What a node that is spawned is told on its command line, but for id, address and directory."""
    return [
        "--log-level", options.log_level, "--loop", options.loop, "--orphan-ms", str(options.orphan_ms),
        "--durability", options.durability,
    ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The values of a cluster that are fixed when it is created."""

    shards: int
    factor: int
    min_insync: int


def settle_shape(options: argparse.Namespace, stored: ClusterMap | None, nodes: Sequence[str]) -> Shape:
    """The cluster's fixed values: those of the map if there is one, else those asked for. Raises StartError."""
    if stored is None:
        factor = options.replication_factor
        if factor is None:
            factor = min(REPLICATION_FACTOR_DEFAULT, len(nodes))
        shards = SHARDS_DEFAULT if options.shards is None else options.shards
        shape = Shape(shards, factor, min(2, factor) if options.min_insync is None else options.min_insync)
    else:
        minimum = stored.min_insync if options.min_insync is None else options.min_insync
        shape = Shape(stored.shards, stored.factor, minimum)
        asked = (
            ("--shards", stored.shards, options.shards),
            ("--replication-factor", stored.factor, options.replication_factor),
        )
        for flag, was, now in asked:
            if now is not None and now != was:
                raise StartError(
                    f"the cluster in {options.data_dir} was created with {flag} {was}, not {now}: this is fixed; "
                    "start with the old value, or make a new cluster with another --data-dir and move the data with "
                    "export and import"
                )
    if not 1 <= shape.shards <= SHARDS_MAX:
        raise StartError(f"--shards must be from 1 to {SHARDS_MAX}, not {shape.shards}")
    if stored is None and not 1 <= shape.factor <= len(nodes):
        raise StartError(
            f"--replication-factor {shape.factor} needs at least {shape.factor} nodes, there are {len(nodes)}"
            if shape.factor > 0
            else f"--replication-factor must be at least 1, not {shape.factor}"
        )
    if not 1 <= shape.min_insync <= shape.factor:
        raise StartError(
            f"--min-insync must be from 1 to the replication factor {shape.factor}, not {shape.min_insync}"
        )
    short = [] if stored is None else [n for n, row in enumerate(stored.members) if len(row) < shape.min_insync]
    if short:
        raise StartError(
            f"--min-insync {shape.min_insync} needs as many in-sync copies of every shard, and {len(short)} have "
            "fewer; start with the old value, and wait until they have"
        )
    return shape


async def serve(options: argparse.Namespace, directory: DataDirectory) -> int:
    """Start everything, serve until a signal, stop everything."""
    stop = asyncio.Event()
    runtime.on_stop_signals(stop.set)
    keeper = await MapKeeper.open(FileConfigStore(directory.path / "map.json", OS_DISK))
    if options.recover_map is not None:
        places = find_places(options, (directory.read() or {}).get("local"))
        await recover_map(keeper, directory, places, stop, options.recover_map == "accept")
        if stop.is_set():
            return runtime.EXIT_OK
    known = keeper.map if keeper.is_founded else None
    stored = directory.read()
    nodes = settle_nodes(options, known, None if stored is None else stored.get("local"))
    addresses, local = nodes.addresses, nodes.local
    shape = settle_shape(options, known, list(addresses))
    if keeper.is_founded and stored is None:
        raise StartError(
            f"identity.json is missing in {directory.path}, and map.json is there: put it back, it has the secret of "
            "the cluster"
        )
    is_new = not keeper.is_founded
    identity = dict(stored or {"cluster": secrets.token_hex(8), "secret": secrets.token_hex(16)})
    identity["local"] = sorted({*identity.get("local", ()), *local}, key=lambda node: (len(node), node))
    cluster, secret = identity["cluster"], identity["secret"]
    if keeper.is_founded and keeper.map.cluster != cluster:
        raise StartError(
            f"map.json and identity.json in {directory.path} are of two clusters ({keeper.map.cluster}, {cluster}); "
            "put back those that belong together"
        )
    local_host = addresses[next(iter(local))][0] if local else HOST_DEFAULT
    supervisor = Supervisor(local_host, local, options.data_dir, _node_arguments(options), stop.set)
    with runtime.bind(options.host, runtime.check_port(options.main_port, "--main-port")) as main_socket:
        if local and not is_new and keeper.map.durability != "memory":
            supervisor.check_directories()
        found = await supervisor.survey(cluster, secret)
        found |= await survey({n: at for n, at in addresses.items() if n not in local}, cluster, secret)
        check_store(keeper, found)
        if stop.is_set():
            return runtime.EXIT_OK
        try:
            options.backup_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"the backup directory {options.backup_dir} cannot be used: {error.strerror}") from error
        if identity != stored:
            directory.write(identity)
        first = found_map(
            cluster=cluster,
            shards=shape.shards,
            # it may have fewer nodes now than when it was created; then the map's factor stays as it is
            factor=min(shape.factor, len(addresses)),
            min_insync=shape.min_insync,
            durability=options.durability,
            nodes=addresses,
        )
        config = ClusterConfig(
            secret, options.durability, options.backup_dir, not options.no_resp, supervisor.local_sockets()
        )
        coordinator = Coordinator(config, keeper, supervisor, stop)
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
        self, config: ClusterConfig, keeper: MapKeeper, supervisor: Supervisor, stop: asyncio.Event
    ) -> None:
        self._config = config
        self._keeper = keeper
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
        check_store(self._keeper, found)
        before = await self._unless_stopped(own_map(self._keeper, first))
        if before is None:
            return
        server = self._server = CoordinatorServer(self._config, self._keeper, before)
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
            is_hopeless = len(missing) == len(first.nodes) or not self._keeper.is_founded
            if foreign and loop.time() > began + START_S and is_hopeless:
                said = ", ".join(f"{node} ({found[node].what or 'connection refused'})" for node in sorted(foreign))
                raise StartError(f"after {START_S:.0f} s these nodes had not reported: {said}")
            if self._keeper.is_founded and len(missing) < len(first.nodes):
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
                    + (self._keeper.changes.trouble or "no node answered")
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
        if self._keeper.is_founded:
            left = len(self._keeper.map.nodes) - len(ended)
            if left >= self._keeper.map.min_insync:
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
            if server.is_deposed:
                await self._supervisor.leave()
                await server.close()
                return
            if self.has_begun:
                self._supervisor.expect_stop()
                asked = {n for n in self._supervisor.processes if n in server.links and server.links[n].stop_node()}
            await server.close()
        else:
            await self._keeper.close()
        await self._supervisor.stop(asked, only_spawned=not self.has_begun)
        log.info("event=stopped")


async def _open(server: CoordinatorServer, main_socket: socket.socket, is_new: bool) -> None:
    """Let clients in and say so. Raises StartError."""
    try:
        await server.listen(main_socket)
    except OSError as error:  # somebody took the port between bind and listen
        host, port = main_socket.getsockname()[:2]
        raise StartError(f"port {port} of {host} cannot be used: {error.strerror or error}") from error
    runtime.announce(
        f"kvtcp-coordinator ready on kvtcp://{runtime.join_address(*server.address)} ({len(server.links)} nodes, "
        f"{server.map.shards} shards, replication factor {server.map.factor}, durability {server.controller.durability}"
        + (", a new cluster)" if is_new else ")")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = make_parser().parse_args(argv)
    runtime.set_up_logging(options.log_level)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until it is known which nodes it is for
    try:
        runtime.check_common_arguments(options)
        check_nodes(options)
        if (options.data_dir / IDENTITY_FILE).exists():
            raise StartError(f"{options.data_dir} is the data directory of a node: take the one above it")
        directory = DataDirectory(options.data_dir / "coordinator", "coordinator")
        try:
            return runtime.run(lambda: serve(options, directory), options.loop)
        finally:
            directory.unlock()
    except (StartError, IdentityError, ConfigStoreError) as error:
        print(f"kvtcp-coordinator: {error}", file=sys.stderr)  # noqa: T201
        return runtime.EXIT_USAGE
    except CannotServe as error:
        print(f"kvtcp-coordinator: {error}", file=sys.stderr)  # noqa: T201
        return runtime.EXIT_USAGE if error.is_start else runtime.EXIT_FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        return runtime.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
