"""`kvtcp-coordinator`: start a cluster (or link to nodes started elsewhere) and serve until stopped.

A start has two halves. The first only looks: arguments, data directories, the main port (taken, not yet listening),
who listens at the addresses of the nodes. Whatever is wrong there is one sentence and exit code 2, and the data
directory is as it was. The second acts: the epoch goes up, durably, above every epoch that a running node promised;
nodes are spawned or adopted and linked; when all have reported, clients are let in. If it fails half-way, or a signal
comes, what was spawned is stopped again.

A stop: no new clients, open requests answered (DRAIN_MS at most), nodes told to stop and waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtcp.constants import (
    BASE_PORT_DEFAULT,
    DRAIN_MS,
    HOST_DEFAULT,
    MAIN_PORT_DEFAULT,
    NODES_DEFAULT,
    NODES_MAX,
    ORPHAN_MS,
    REPLICATION_FACTOR_DEFAULT,
    SHARDS_DEFAULT,
    SHARDS_MAX,
)
from kvtcp.server import runtime
from kvtcp.server.coordinator import ClusterConfig, CoordinatorServer
from kvtcp.server.identity import DataDirectory, IdentityError, write_identity
from kvtcp.server.runtime import StartError
from kvtcp.server.supervisor import Supervisor, who_is_there

log = logging.getLogger("kvtcp.coordinator")

START_S = 30.0  # for all nodes to report


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="kvtcp-coordinator",
        description="The coordinator of a kvtcp cluster: routes and orders requests, and supervises local nodes.",
    )
    parser.add_argument("--num-nodes", type=int, help=f"local nodes to spawn (default: {NODES_DEFAULT})")
    parser.add_argument(
        "--nodes", metavar="HOST:PORT,...", help="use nodes started elsewhere with kvtcp-node, as n1, n2, ..."
    )
    parser.add_argument(
        "--replication-factor",
        type=int,
        help=f"copies of every key (default: {REPLICATION_FACTOR_DEFAULT}, or the number of nodes if that is smaller)",
    )
    parser.add_argument(
        "--min-insync",
        type=int,
        help="fewest copies a write may be acknowledged with; this version acknowledges with all of them only "
        "(default: min(2, factor))",
    )
    parser.add_argument(
        "--shards", type=int, help=f"slices of the key space, fixed for ever (default: {SHARDS_DEFAULT})"
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
        help="identity of the cluster, and the directories of local nodes; created if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--backup-dir",
        type=Path,
        default=Path("backups"),
        help="where backups are written and restored from; created if missing (default: %(default)s)",
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


def node_addresses(options: argparse.Namespace) -> dict[str, tuple[str, int]]:
    """node id -> address, for local or foreign nodes. Raises StartError."""
    if options.nodes is not None:
        if options.num_nodes is not None:
            raise StartError("give --nodes (started elsewhere) or --num-nodes (spawned here), not both")
        addresses = parse_nodes(options.nodes)
    else:
        count = NODES_DEFAULT if options.num_nodes is None else options.num_nodes
        if not 1 <= count <= NODES_MAX:
            raise StartError(f"--num-nodes must be from 1 to {NODES_MAX}, not {count}")
        if not 1 <= options.base_port <= 65536 - count:
            raise StartError(f"--base-port {options.base_port} leaves no room for {count} ports up to 65535")
        ports = range(options.base_port, options.base_port + count)
        if options.main_port in ports:
            raise StartError(
                f"--main-port {options.main_port} is also the port of node n{ports.index(options.main_port) + 1}"
            )
        # only this coordinator talks to them, so they stay on this machine whatever --host says
        host = options.host if runtime.is_loopback(options.host) else HOST_DEFAULT
        addresses = [(host, port) for port in ports]
    if len(addresses) > NODES_MAX:
        raise StartError(f"there are {len(addresses)} nodes, the limit is {NODES_MAX}")
    return {f"n{number}": address for number, address in enumerate(addresses, 1)}


def settle_identity(options: argparse.Namespace, stored: dict[str, Any] | None, nodes: Sequence[str]) -> dict[str, Any]:
    """The cluster's fixed values: those stored if there are any, else those asked for. Raises StartError."""
    if stored is None:
        factor = options.replication_factor
        if factor is None:
            factor = min(REPLICATION_FACTOR_DEFAULT, len(nodes))
        fields = {
            "cluster": secrets.token_hex(8),
            "secret": secrets.token_hex(16),
            "epoch": 0,
            "shards": SHARDS_DEFAULT if options.shards is None else options.shards,
            "factor": factor,
            "min_insync": min(2, factor) if options.min_insync is None else options.min_insync,
            "nodes": list(nodes),
        }
    else:
        fields = dict(stored)
        asked = (
            ("--shards", "shards", options.shards),
            ("--replication-factor", "factor", options.replication_factor),
            ("--min-insync", "min_insync", options.min_insync),
            ("the number of nodes", "nodes", list(nodes)),
        )
        for flag, name, value in asked:
            if value is not None and value != fields[name]:
                was, now = fields[name], value
                if name == "nodes":
                    was, now = len(fields[name]), len(value)
                raise StartError(
                    f"the cluster in {options.data_dir} was created with {flag} {was}, not {now}: this is fixed; "
                    "start with the old value, or make a new cluster with another --data-dir and move the data with "
                    "export and import"
                )
    if not 1 <= fields["shards"] <= SHARDS_MAX:
        raise StartError(f"--shards must be from 1 to {SHARDS_MAX}, not {fields['shards']}")
    if not 1 <= fields["factor"] <= len(nodes):
        raise StartError(
            f"--replication-factor {fields['factor']} needs at least {fields['factor']} nodes, there are {len(nodes)}"
            if fields["factor"] > 0
            else f"--replication-factor must be at least 1, not {fields['factor']}"
        )
    if not 1 <= fields["min_insync"] <= fields["factor"]:
        raise StartError(
            f"--min-insync must be from 1 to the replication factor {fields['factor']}, not {fields['min_insync']}"
        )
    return fields


def bind(host: str, port: int) -> socket.socket:
    """The main port, taken but not yet listening, so that clients come when the cluster is ready. Raises StartError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise StartError(f"port {port} of {host} cannot be used: {error.strerror or error}") from error
    return bound


async def serve(options: argparse.Namespace, directory: DataDirectory) -> int:
    """Start everything, serve until a signal, stop everything."""
    stop = asyncio.Event()
    runtime.on_stop_signals(stop.set)
    addresses = node_addresses(options)
    fields = settle_identity(options, directory.read(), list(addresses))
    local = {} if options.nodes is not None else {node: port for node, (_, port) in addresses.items()}
    arguments = ["--log-level", options.log_level, "--loop", options.loop, "--orphan-ms", str(options.orphan_ms)]
    local_host = next(iter(addresses.values()))[0]
    supervisor = Supervisor(local_host, local, options.data_dir, arguments, stop.set)
    main_socket = bind(options.host, runtime.check_port(options.main_port, "--main-port"))
    with main_socket:
        if local:
            promised = await supervisor.survey(fields["cluster"], fields["secret"])
        else:
            promised = await survey_foreign(addresses, fields["cluster"], fields["secret"])
        if stop.is_set():
            return runtime.EXIT_OK
        try:
            options.backup_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"the backup directory {options.backup_dir} cannot be used: {error.strerror}") from error
        fields["epoch"] = max(fields["epoch"], promised) + 1
        directory.write(fields)
        restoring = None if fields.get("restoring") is None else bytes.fromhex(fields["restoring"])

        def remember_restoring(prefix: bytes | None) -> None:
            fields["restoring"] = None if prefix is None else prefix.hex()
            write_identity(directory.path, directory.role, fields)

        server = CoordinatorServer(
            ClusterConfig(
                cluster=fields["cluster"],
                secret=fields["secret"],
                nodes=addresses,
                shards=fields["shards"],
                factor=fields["factor"],
                min_insync=fields["min_insync"],
                backup_dir=options.backup_dir,
                epoch=fields["epoch"],
                restoring=restoring,
                remember_restoring=remember_restoring,
            )
        )
        runtime.on_unexpected_errors(server.core_failed)
        try:
            await _start(server, supervisor, stop, fields)
            if not stop.is_set():
                await _open(server, main_socket, fields)
            server.failed.add_done_callback(lambda _: stop.set())
            await stop.wait()
            if server.failed.done():
                server.failed.result()  # raises what ended a core task
            if supervisor.failure is not None:
                raise supervisor.failure
            return runtime.EXIT_OK
        finally:
            await _stop(server, supervisor, local)


async def survey_foreign(addresses: dict[str, tuple[str, int]], cluster: str, secret: str) -> int:
    """The highest epoch that the nodes of `--nodes` promised. Raises StartError for what can never become a member.

    A node that does not answer yet is waited for later.
    """
    asked = (who_is_there(host, port, node, cluster, secret) for node, (host, port) in addresses.items())
    promised = 0
    for (node, (host, port)), found in zip(addresses.items(), await asyncio.gather(*asked), strict=True):
        if found.kind == "foreign":
            raise StartError(f"--nodes: at {runtime.join_address(host, port)}, meant for {node}, is {found.what}")
        promised = max(promised, found.promised)
    return promised


async def _start(
    server: CoordinatorServer, supervisor: Supervisor, stop: asyncio.Event, fields: dict[str, Any]
) -> None:
    """Nodes up and linked, or a stop asked for. Raises StartError."""
    await supervisor.start(fields["cluster"], fields["secret"])
    server.start_links()
    deadline = server.loop.time() + START_S
    while not server.ready.is_set() and not stop.is_set():
        early = supervisor.early_exit()
        if early is not None:
            raise StartError(f"{early}; its message is above")
        for link in server.links.values():
            if link.refused:
                raise StartError(
                    f"node {link.node} at {runtime.join_address(link.host, link.port)} refused: {link.refused}"
                )
        if server.loop.time() > deadline:
            missing = [f"{link.node} ({link.progress.reason})" for link in server.links.values() if not link.report]
            raise StartError(f"after {START_S:.0f} s these nodes had not reported: {', '.join(missing)}")
        try:
            async with asyncio.timeout(0.05):
                await server.ready.wait()
        except TimeoutError:
            continue


async def _open(server: CoordinatorServer, main_socket: socket.socket, fields: dict[str, Any]) -> None:
    """Let clients in and say so. Raises StartError."""
    try:
        await server.listen(main_socket)
    except OSError as error:  # somebody took the port between bind and listen
        host, port = main_socket.getsockname()[:2]
        raise StartError(f"port {port} of {host} cannot be used: {error.strerror or error}") from error
    runtime.announce(
        f"kvtcp-coordinator ready on kvtcp://{runtime.join_address(*server.address)} ({len(server.links)} nodes, "
        f"{fields['shards']} shards, replication factor {fields['factor']}, durability memory)"
    )


async def _stop(server: CoordinatorServer, supervisor: Supervisor, local: dict[str, int]) -> None:
    """Answer what is open, then end the local nodes and everything else."""
    log.info("event=stopping")
    await server.drain(DRAIN_MS)
    supervisor.expect_stop()
    asked = {node for node in local if server.links[node].stop_node()}
    await server.close()
    await supervisor.stop(asked)
    log.info("event=stopped")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = make_parser().parse_args(argv)
    runtime.set_up_logging(options.log_level)
    try:
        runtime.check_common_arguments(options)
        node_addresses(options)
        directory = DataDirectory(options.data_dir / "coordinator", "coordinator")
        try:
            return runtime.run(lambda: serve(options, directory), options.loop)
        finally:
            directory.unlock()
    except (StartError, IdentityError) as error:
        print(f"kvtcp-coordinator: {error}", file=sys.stderr)  # noqa: T201
        return runtime.EXIT_USAGE
    except (KeyboardInterrupt, asyncio.CancelledError):
        return runtime.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
