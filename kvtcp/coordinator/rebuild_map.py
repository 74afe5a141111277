"""`kvtcp-coordinator --recover-map`: a lost map.json made again, before the start goes on as usual.

The shell around cluster/rebuild.py. Nodes with a directory here are spawned, or found running; those of
--nodes, and those that the maps of the others name, are asked where they are. Each is asked by one ASK on a connection
of its own, which changes nothing there, until all nodes of the newest map have answered, or are not to be waited for
any more: one that ended again, one whose directory is missing, one that for ANSWER_S says nothing. What was spawned is
stopped again. Then the map is stored, or the start is refused with one sentence, and the data directory is as it was.

Nothing is decided here, and no node hears of the new map: that is for the takeover which follows.

The identity of the cluster, if it is lost too, is taken from the directories of local nodes, which all have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.map_store import MapStore, NotOwner
from kvtcp.cluster.rebuild import CannotRecover, Recovered, newest_map, recovered_map
from kvtcp.coordinator.supervisor import STRANGER, Found, Supervisor, first_answer, refusal
from kvtcp.errors import ProtocolError
from kvtcp.protocol.link import ASK, LINK_VERSION, TOLD, Told, parse_told
from kvtcp.runtime.clock import wall_ms
from kvtcp.runtime.data_directory import FILE, DataDirectory, IdentityError, read_identity
from kvtcp.runtime.process import StartError, join_address
from kvtcp.storage.disk.check import by_reason

log = logging.getLogger("kvtcp.coordinator")

ANSWER_S: Final = 30.0  # for a node to answer; one that is spawned and reads its data back has as long as it takes
LINKED_S: Final = 2.0  # for nodes to find out that the link of a coordinator which died is gone
POLL_S: Final = 0.05

Address = tuple[str, int]


@dataclass(frozen=True)
class Places:
    """Where nodes may be. The local node nX listens at `base_port` + X - 1 of `host`; there is none if `foreign` nodes
    are given."""

    data_dir: Path
    host: str
    base_port: int
    local: dict[str, int]  # nodes with a directory -> port
    foreign: Sequence[Address]
    arguments: list[str]  # of nodes that are spawned

    def is_local(self, node: str, address: Address) -> bool:
        """Whether a node that has no directory here would have had one."""
        number = node.removeprefix("n")
        return not self.foreign and number.isdigit() and address == (self.host, self.base_port + int(number) - 1)


def local_nodes(data_dir: Path) -> list[str]:
    """The nodes that have a directory with an identity, by their numbers."""
    found = [each.name for each in data_dir.glob("n*") if re.fullmatch("n[1-9][0-9]*", each.name)]
    return sorted((node for node in found if (data_dir / node / FILE).exists()), key=lambda node: int(node[1:]))


async def recover_map(
    map_store: MapStore, directory: DataDirectory, places: Places, stop: asyncio.Event, accept: bool
) -> None:
    """Store a map made from what the nodes tell, unless a stop is asked for first. `accept`: without those that do not.

    Raises StartError, and then nothing was changed.
    """
    if map_store.is_founded:
        raise StartError(
            f"map.json is there in {directory.path}, and --recover-map makes one that is lost: start without it"
        )
    stored = directory.read()
    identity = stored or _identity_of_nodes(places)
    cluster, secret = identity["cluster"], identity["secret"]
    if not places.local and not places.foreign:
        raise StartError(
            f"no node has a directory in {places.data_dir}, so there is nobody to make map.json from: put the "
            "directories back, or, if the nodes are elsewhere, start them and list all of them with --nodes"
        )
    supervisor = Supervisor(places.host, places.local, places.data_dir, places.arguments, stop.set)
    await supervisor.survey(cluster, secret)
    inquiry = Inquiry(places, supervisor, cluster, secret)
    try:
        await supervisor.start(cluster, secret)
        await inquiry.run(stop)
    finally:
        await supervisor.stop(set(), only_spawned=True)
    if supervisor.failure is not None:
        raise supervisor.failure
    if stop.is_set():
        return
    recovered = inquiry.recovered(accept)
    if stored is None:
        directory.write(identity)
    try:
        await map_store.found(recovered.map)
    except (OSError, NotOwner) as error:
        raise StartError(f"the cluster map cannot be stored: {error}") from error
    _tell(recovered)


def _identity_of_nodes(places: Places) -> dict[str, Any]:
    """Cluster and secret, as the directories of the local nodes have them. Raises StartError."""
    found: set[tuple[str, str]] = set()
    for node in places.local:
        try:
            fields = read_identity(places.data_dir / node, "node")
        except IdentityError as error:
            raise StartError(str(error)) from error
        if fields is not None:
            found.add((fields["cluster"], fields["secret"]))
    if len(found) != 1:
        why = "are of several clusters" if found else "are none"
        raise StartError(
            f"identity.json is missing in {places.data_dir / 'coordinator'}, and the directories of nodes in "
            f"{places.data_dir}, which have cluster and secret too, {why}: put it back"
        )
    ((cluster, secret),) = found
    return {"cluster": cluster, "secret": secret}


def _tell(recovered: Recovered) -> None:
    made = recovered.map
    log.warning(
        "event=map-recovered version=%s epoch=%s nodes=%s shards=%s without=%s", made.version, made.epoch,
        ",".join(made.nodes), made.shards, ",".join(recovered.missing) or "-",
    )  # fmt: skip
    for shards, reason in by_reason(recovered.down):
        log.error("event=not-recovered shards=%s reason=%s", shards, reason)


async def ask(address: Address, node: str, cluster: str, secret: str) -> Told | Found:
    """What the node at an address has, or who else is there. `node` may be empty: whichever it is."""
    fields = {"version": LINK_VERSION, "cluster": cluster, "secret": secret, "node": node}
    answer = await first_answer(*address, (ASK, fields))
    match answer:
        case Found():
            return answer
        case [kind, told] if kind == TOLD:
            try:
                return parse_told(told)
            except ProtocolError:
                return Found("foreign", STRANGER)
    return refusal(answer)


class Inquiry:
    """Asks nodes until enough is known."""

    def __init__(self, places: Places, supervisor: Supervisor, cluster: str, secret: str) -> None:
        self.told: dict[str, Told] = {}
        self._places = places
        self._supervisor = supervisor
        self._identity = (cluster, secret)
        self._newest: ClusterMap | None = None
        # addresses that have not told -> node that is meant, empty = whichever
        self._open: dict[Address, str] = dict.fromkeys(places.foreign, "")
        self._open |= {(places.host, port): node for node, port in places.local.items()}
        self._found: dict[Address, Found] = {}  # what they said instead

    async def run(self, stop: asyncio.Event) -> None:
        """Ask until nobody is waited for, or a stop is asked for. Raises StartError."""
        began = asyncio.get_running_loop().time()
        while not stop.is_set():
            elapsed_s = asyncio.get_running_loop().time() - began
            if await self._ask_all(is_late=elapsed_s > LINKED_S):
                self._look_for_more()
            elif not any(self._waits_for(address, elapsed_s) for address in self._open):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await stop.wait()

    def recovered(self, accept: bool) -> Recovered:
        """The map that follows from it. Raises StartError."""
        linked = [node for node, told in self.told.items() if told.linked]
        if linked:
            raise StartError(
                f"{', '.join(linked)} has a link to a coordinator, which has the cluster map: stop that coordinator, "
                "and take its map.json; if it is gone, restart the node"
            )
        if all(told.report.promised == 0 for told in self.told.values()) and self.told:
            raise StartError("no node has data of this cluster: start without --recover-map to begin a new one")
        try:
            return recovered_map(self.told, self._silent(), owner=uuid.uuid4().hex, wall_ms=wall_ms(), accept=accept)
        except CannotRecover as error:
            raise StartError(str(error)) from error

    async def _ask_all(self, is_late: bool) -> bool:
        """Ask everybody who did not tell yet; whether somebody did now."""
        addresses = list(self._open)
        asked = (ask(address, self._open[address], *self._identity) for address in addresses)
        news = False
        for address, answer in zip(addresses, await asyncio.gather(*asked), strict=True):
            if isinstance(answer, Told):
                if is_late or not answer.linked:
                    self.told[answer.report.node] = answer
                    del self._open[address]
                    news = True
                continue
            if answer.kind == "foreign":
                meant = f", meant for {self._open[address]}," if self._open[address] else ""
                raise StartError(
                    f"at {join_address(*address)}{meant} is {answer.what}; give the right addresses with --nodes"
                )
            self._found[address] = answer
        return news

    def _look_for_more(self) -> None:
        """The newest map may have nodes that nobody has asked."""
        try:
            self._newest = newest_map(self.told)
        except CannotRecover as error:
            raise StartError(str(error)) from error
        if self._newest is None:
            return
        known = {*self.told, *self._open.values()}
        for node, address in self._newest.nodes.items():
            if node not in known and node not in self._newest.destroyed:
                self._open.setdefault(address, node)

    def _waits_for(self, address: Address, elapsed_s: float) -> bool:
        """Whether somebody who did not tell yet may still do so."""
        node = self._open[address]
        if node in self._supervisor.processes:
            if node in self._supervisor.early_exits():
                return False
            if address in self._found and self._found[address].kind == "free":
                return True  # it reads its data back
        elif self._places.is_local(node, address):
            return False
        return elapsed_s < ANSWER_S

    def _silent(self) -> dict[str, str]:
        """Why nodes of the newest map did not tell."""
        exits = self._supervisor.early_exits()
        silent = {}
        for node, address in (self._newest.nodes if self._newest is not None else {}).items():
            if node in exits:
                silent[node] = f"{exits[node]}, its message is above"
            elif node not in self._places.local and self._places.is_local(node, address):
                silent[node] = f"{self._places.data_dir / node} is missing"
            else:
                port = self._places.local.get(node)
                place = address if port is None else (self._places.host, port)
                what = self._found[place].what if place in self._found else ""
                silent[node] = f"{what or 'connection refused'} at {join_address(*place)}"
        return silent
