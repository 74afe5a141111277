"""Status: what the coordinator tells of itself, its nodes and its shards.

Status reads the parts of a coordinator and changes none. docs/administration.md explains every key. `degraded` has one
sentence for everything that is not as it should be, so that an empty list means: all is well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvtcp._version import __version__
from kvtcp.constants import EVICT_AFTER_MS
from kvtcp.coordinator.backups import Backups
from kvtcp.coordinator.latency import WriteTimes
from kvtcp.coordinator.links import NodeLink
from kvtcp.errors import show_bytes
from kvtcp.frontend.clients import Clients
from kvtcp.replication.controller import Controller
from kvtcp.replication.membership.learner import Learner
from kvtcp.replication.membership.recovery import DOWN
from kvtcp.replication.sequencing.link import Link
from kvtcp.replication.sequencing.shard import Shard
from kvtcp.runtime.clock import wall_ms

_DEGRADED = {
    "down": "are down",
    "recovering": "are not served yet",
    "read-only": "take no writes",
    "under-replicated": "have fewer copies than they should",
}


class Status:
    """One per coordinator. The server keeps `lag_ms` up to date."""

    def __init__(
        self, controller: Controller, links: Mapping[str, NodeLink], clients: Clients, backups: Backups,
        write_times: WriteTimes,
    ) -> None:  # fmt: skip
        self._controller = controller
        self._sequencer = controller.sequencer
        self._links = links
        self._clients = clients
        self._backups = backups
        self._write_times = write_times
        self._started_ms = clients.now_ms()
        self.lag_ms = 0.0  # how late the last tick was
        self.restarts_of: Callable[[str], int | None] = lambda node: None  # of a process; None = it is not watched here

    def degraded(self) -> list[str]:
        """Everything that is not as it should be, one sentence each."""
        sentences = []
        for link in self._links.values():
            sentences += self._degraded_node(link)
        shards = self._sequencer.shards
        sentences += self._degraded_shards()
        short = [shard for shard in shards if shard.space and shard.serving]
        if short:
            names = ", ".join(link.node for link in self._sequencer.links.values() if link.space)
            refused = "writes" if max(shard.space for shard in short) > 1 else "growing writes"
            sentences.append(f"{len(short)} shards refuse {refused}: too little disk space on {names}")
        if wall_ms() > self._controller.map.stamp_bound_ms:
            sentences.append(
                "deadlines do not pass: the config store does not take the next bound of time "
                f"({self._controller.ownership.bound_failed or 'its answer is awaited'})"
            )
        elif self._controller.changes.trouble:
            sentences.append(f"in-sync sets cannot change: {self._controller.changes.trouble}")
        prefix = self._backups.restoring
        if prefix is not None:
            shown = f"keys that begin with {show_bytes(prefix)}" if prefix else "all keys"
            sentences.append(f"{shown} are closed until a restore completes")
        return sentences

    def _degraded_shards(self) -> list[str]:
        sentences = []
        states: dict[str, list[Shard]] = {}
        for shard in self._sequencer.shards:
            states.setdefault(self._state(shard), []).append(shard)
        for state, text in _DEGRADED.items():
            found = states.get(state)
            if found:
                first = found[0]
                why = self._reason(first)
                sentences.append(f"{len(found)} shards {text}, the first is shard {first.number}: {why}")
        return sentences

    def _state(self, shard: Shard) -> str:
        if not shard.serving:
            found = self._controller.recovery.shards.get(shard.number)
            return "down" if found is None or found.state == DOWN else "recovering"
        if shard.bad or any(not link.connected for link in shard.members):
            return "read-only"
        if len(shard.members) < self._controller.map.factor:
            return "under-replicated"
        if {link.node for link in shard.members} != set(self._controller.map.wanted[shard.number]):
            return "moving"
        return "ok"

    def _reason(self, shard: Shard) -> str:
        """Why a shard is not as it should be; empty if it is."""
        if not shard.serving:
            return shard.reason
        whys = [f"{link.node} {why}" for link, why in shard.bad.items()]
        whys += [f"{link.node} is missing ({link.reason})" for link in shard.good if not link.connected]
        members = {link.node for link in shard.members}
        learning = {link.node for link in shard.learners}
        for node in self._controller.map.wanted[shard.number]:
            if node in learning:
                whys.append(f"{node} is learning")
            elif node not in members:
                link = self._sequencer.links[node]
                whys.append(f"{node} is not in sync ({link.reason or 'it will learn soon'})")
        if not whys and len(members) < self._controller.map.factor:
            whys.append(f"there are too few nodes for {self._controller.map.factor} copies")
        return "; ".join(whys)

    def _degraded_node(self, link: NodeLink) -> list[str]:
        """What is wrong with a node."""
        if not link.progress.connected:
            return [f"{link.node} is not linked: {link.progress.reason}"]
        if self._is_silent(link):
            silent_ms = self._clients.now_ms() - link.progress.heard_ms
            return [f"{link.node} has not answered for {silent_ms} ms"]
        return []

    def _is_silent(self, link: NodeLink) -> bool:
        """Whether a linked node does not even answer heartbeats."""
        return link.progress.connected and self._clients.now_ms() - link.progress.heard_ms >= EVICT_AFTER_MS

    def summary(self) -> dict[str, Any]:
        """The map of `status`."""
        sequencer = self._sequencer
        sentences = self.degraded()
        states = [self._state(shard) for shard in sequencer.shards]
        return {
            "cluster": self._controller.map.cluster,
            "server": f"kvtcp {__version__}",
            "state": "degraded" if sentences else "ok",
            "degraded": sentences,
            "epoch": self._controller.map.epoch,
            "map_version": self._controller.map.version,
            "nodes": len(self._links),
            "nodes_linked": sum(link.progress.connected for link in self._links.values()),
            "shards": self._controller.map.shards,
            "moving": len(self._controller.membership.unsettled),
            "learning": sum(len(shard.learners) for shard in sequencer.shards),
            "under_replicated": states.count("under-replicated"),
            "down": states.count("down"),
            "replication_factor": self._controller.map.factor,
            "min_insync": self._controller.map.min_insync,
            "durability": self._controller.durability,
            "clients": len(self._clients.sessions),
            "operations": self._clients.requests,
            "unavailable": sequencer.unavailable,
            "outcome_unknown": sequencer.unknown,
            "protocol_errors": self._clients.protocol_errors,
            "waiting": sequencer.waiting_items,
            "buffered_bytes": self._clients.buffered_bytes,
            "loop_lag_ms": round(self.lag_ms, 1),
            "counters": {
                "operations": self._clients.requests,
                "errors": sequencer.unavailable + sequencer.unknown,
                "unavailable": sequencer.unavailable,
                "unknown": sequencer.unknown,
                "p99_ms": self._write_times.p99_ms(),
                "loop_lag_ms": round(self.lag_ms, 1),
                "left_in_sync": self._controller.membership.evictions,
                "joined_in_sync": self._controller.membership.joins,
            },
            "running": self._backups.busy,
            "uptime_s": (self._clients.now_ms() - self._started_ms) // 1000,
        }

    def nodes(self) -> list[dict[str, Any]]:
        """The list of `nodes`."""
        return [self._node(link) for link in self._links.values() if link.node in self._controller.map.nodes]

    def _node(self, link: NodeLink) -> dict[str, Any]:
        cluster_map, progress = self._controller.map, link.progress
        shards = self._sequencer.shards
        learners = [learner for learner in self._controller.membership.learners() if learner.link is progress]
        wanted = sum(link.node in row for row in cluster_map.wanted)
        member_of = len(cluster_map.shards_of(link.node))
        lag_entries = sum(shard.last_seq - shard.acked.get(progress, shard.last_seq) for shard in progress.shards)
        host, port = link.address
        return {
            "node": link.node,
            "address": f"{host}:{port}",
            "state": self._node_state(link, member_of, bool(learners)),
            "reason": progress.reason or _first_bad(progress),
            "shards": 0 if link.report is None else len(link.report.copies),
            "member_of": member_of,
            "wanted": wanted,
            "first_of": sum(bool(shard.members) and shard.members[0] is progress for shard in shards),
            "learning": len(learners),
            "learn_rate_bytes_s": link.stats.get("learn_rate_bytes_s"),
            "lag_entries": lag_entries + sum(learner.entries_left for learner in learners),
            "lag_bytes": progress.bytes,
            "outstanding": progress.items,
            "outstanding_bytes": progress.bytes,
            "pid": None if link.report is None else link.report.pid,
            "restarts": self.restarts_of(link.node),
            "space": progress.space,
            "operations": link.stats.get("operations"),
            "keys": link.stats.get("keys"),
            "sync_p99_ms": link.stats.get("sync_p99_ms"),
            "loop_lag_ms": link.stats.get("lag_ms"),
            "memory_bytes": link.stats.get("memory_bytes"),
            "log_bytes": link.stats.get("log_bytes"),
        }

    def _node_state(self, link: NodeLink, member_of: int, learns: bool) -> str:
        cluster_map = self._controller.map
        if link.node in cluster_map.destroyed:
            return "destroyed"
        if not link.progress.connected:
            return "down"
        if link.node in cluster_map.draining:
            return "draining" if member_of or self._controller.membership.copies_of(link.node) else "drained"
        if self._is_silent(link):
            return "silent"
        return "learning" if learns else "up"

    def shards(self) -> list[dict[str, Any]]:
        """The list of `shards`."""
        return [self._shard(shard) for shard in self._sequencer.shards]

    def _shard(self, shard: Shard) -> dict[str, Any]:
        behind = [shard.last_seq - acked for acked in shard.acked.values()] if shard.serving else []
        return {
            "shard": shard.number,
            "state": self._state(shard),
            "epoch": self._controller.map.epoch,
            "nodes": [link.node for link in shard.members],
            "insync": self._controller.map.nodes_of(shard.number),
            "wanted": list(self._controller.map.wanted[shard.number]),
            "learners": [_learner(learner) for learner in self._controller.membership.learners_of(shard.number)],
            "seq": shard.last_seq,
            "commit": shard.commit,
            "lag_entries": max(behind, default=0),
            "lag_bytes": sum(link.bytes for link in shard.members if shard.acked[link] < shard.last_seq),
            "waiting": len(shard.waiting),
            "reason": self._reason(shard),
        }


def _first_bad(progress: Link) -> str:
    """What is wrong with the first bad copy of a linked node; empty if none is."""
    for shard in progress.shards:
        if progress in shard.bad:
            return f"its copy of shard {shard.number} cannot be used: it {shard.bad[progress]}"
    return ""


def _learner(learner: Learner) -> dict[str, Any]:
    return {
        "node": learner.link.node,
        "donor": learner.donor.node,
        "phase": learner.phase,
        "entries_left": learner.entries_left,
        "entries_shipped": learner.entries_shipped,
        "keys": learner.keys_total,
    }
