"""Settings: what `kvtcp-coordinator` was asked for, and what it makes of that: the nodes and the shape of a cluster.

No I/O: the command line is parsed in main.py, and launch.py acts. The values of a cluster that are in its
map win over defaults; a flag that contradicts them is a StartError, one sentence that names the flag.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtcp.cluster.map import ClusterMap
from kvtcp.constants import (
    BASE_PORT_DEFAULT,
    DURABILITY_DEFAULT,
    HOST_DEFAULT,
    MAIN_PORT_DEFAULT,
    NODES_DEFAULT,
    NODES_MAX,
    ORPHAN_MS,
    REPLICATION_FACTOR_DEFAULT,
    SHARDS_DEFAULT,
    SHARDS_MAX,
)
from kvtcp.coordinator.rebuild_map import Places
from kvtcp.runtime.process import StartError, is_loopback


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of the command, which explains them (`--help`), and their defaults. None = it was not given."""

    num_nodes: int | None = None
    nodes: str | None = None
    replication_factor: int | None = None
    min_insync: int | None = None
    shards: int | None = None
    main_port: int = MAIN_PORT_DEFAULT
    base_port: int = BASE_PORT_DEFAULT
    data_dir: Path = Path("data")
    backup_dir: Path = Path("backups")
    recover_map: str | None = None
    no_resp: bool = False
    orphan_ms: int = ORPHAN_MS
    host: str = HOST_DEFAULT
    allow_insecure: bool = False
    durability: str = DURABILITY_DEFAULT
    log_level: str = "warning"
    loop: str = "auto"


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


def check_nodes(settings: Settings) -> None:
    """Raise StartError for values of --nodes and --num-nodes that fit no cluster."""
    if settings.nodes is not None:
        if settings.num_nodes is not None:
            raise StartError("give --nodes (started elsewhere) or --num-nodes (spawned here), not both")
        if len(parse_nodes(settings.nodes)) > NODES_MAX:
            raise StartError(f"there are {len(parse_nodes(settings.nodes))} nodes, the limit is {NODES_MAX}")
    else:
        count = NODES_DEFAULT if settings.num_nodes is None else settings.num_nodes
        if not 1 <= count <= NODES_MAX:
            raise StartError(f"--num-nodes must be from 1 to {NODES_MAX}, not {count}")
        _check_ports(settings, [f"n{number}" for number in range(1, count + 1)])


def _check_ports(settings: Settings, nodes: Sequence[str]) -> dict[str, int]:
    """The ports of local nodes, by their numbers from --base-port on. Raises StartError."""
    base_port = settings.base_port
    ports = {node: base_port + int(node[1:]) - 1 for node in nodes}
    if not 1 <= base_port <= 65536 - max((port - base_port + 1 for port in ports.values()), default=0):
        raise StartError(f"--base-port {base_port} leaves no room for {len(ports)} ports up to 65535")
    for node, port in ports.items():
        if port == settings.main_port:
            raise StartError(f"--main-port {settings.main_port} is also the port of node {node}")
    return ports


def settle_nodes(
    settings: Settings, stored: ClusterMap | None, spawned: Collection[str] | None, directories: Collection[str] = (),
) -> Nodes:  # fmt: skip
    """Ids and addresses of the nodes. Raises StartError.

    Nodes of the map keep their ids. With --nodes all are started elsewhere. Else those are local that this data
    directory `spawned` before (None: that was not remembered), or that run as if it had; others are those of
    `node add`, and stay where the map says. `directories` are the names of the directories that it has.
    """
    known = {} if stored is None else dict(stored.nodes)
    next_number = 1 if stored is None else stored.last_node + 1
    if settings.nodes is not None:
        given = parse_nodes(settings.nodes)
        ids = sorted(known, key=lambda node: int(node[1:]))[: len(given)]
        ids += [f"n{next_number + at}" for at in range(len(given) - len(ids))]
        return Nodes({**known, **dict(zip(ids, given, strict=True))}, {})
    host = _local_host(settings)

    def is_local(node: str) -> bool:
        has_directory = node in directories
        has_address = known[node] == (host, settings.base_port + int(node[1:]) - 1)
        if spawned is None:
            return has_directory or has_address
        return node in spawned or (has_directory and has_address)

    nodes = [node for node in known if is_local(node)]
    count = settings.num_nodes or (NODES_DEFAULT if stored is None else len(nodes))
    if count < len(nodes):
        raise StartError(
            f"the cluster in {settings.data_dir} has {len(nodes)} local nodes, not {count}: to have fewer, start it as "
            "it is, then drain and remove nodes in the shell"
        )
    nodes += [f"n{next_number + at}" for at in range(count - len(nodes))]
    ports = _check_ports(settings, nodes)
    return Nodes({**known, **{node: (host, port) for node, port in ports.items()}}, ports)


def _local_host(settings: Settings) -> str:
    """Where local nodes listen: only this coordinator talks to them, so on this machine whatever --host says."""
    return settings.host if is_loopback(settings.host) else HOST_DEFAULT


def find_places(settings: Settings, spawned: Collection[str] | None, directories: Collection[str]) -> Places:
    """Where nodes may be, if there is no map that says it: all of --nodes, else the local ones that have `directories`;
    `spawned` as for `settle_nodes`. Raises StartError."""
    nodes = [] if settings.nodes is not None else directories
    nodes = [node for node in nodes if spawned is None or node in spawned]
    return Places(
        settings.data_dir, _local_host(settings), settings.base_port, _check_ports(settings, nodes),
        [] if settings.nodes is None else parse_nodes(settings.nodes), node_arguments(settings),
    )  # fmt: skip


def node_arguments(settings: Settings) -> list[str]:
    """Command line of a node that is spawned, without id, address and directory."""
    return [
        "--log-level", settings.log_level, "--loop", settings.loop, "--orphan-ms", str(settings.orphan_ms),
        "--durability", settings.durability,
    ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The values of a cluster that are fixed when it is created."""

    shards: int
    factor: int
    min_insync: int


def settle_shape(settings: Settings, stored: ClusterMap | None, nodes: Sequence[str]) -> Shape:
    """The cluster's fixed values: those of the map if there is one, else those asked for. Raises StartError."""
    if stored is None:
        factor = settings.replication_factor
        if factor is None:
            factor = min(REPLICATION_FACTOR_DEFAULT, len(nodes))
        shards = SHARDS_DEFAULT if settings.shards is None else settings.shards
        shape = Shape(shards, factor, min(2, factor) if settings.min_insync is None else settings.min_insync)
    else:
        minimum = stored.min_insync if settings.min_insync is None else settings.min_insync
        shape = Shape(stored.shards, stored.factor, minimum)
        asked = (
            ("--shards", stored.shards, settings.shards),
            ("--replication-factor", stored.factor, settings.replication_factor),
        )
        for flag, was, now in asked:
            if now is not None and now != was:
                raise StartError(
                    f"the cluster in {settings.data_dir} was created with {flag} {was}, not {now}: this is fixed; "
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
