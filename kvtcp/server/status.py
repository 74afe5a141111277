"""Status: what the coordinator tells of itself, its nodes and its shards.

It reads the server and the cores and changes nothing. docs/administration.md explains every key. `degraded` has one
sentence for everything that is not as it should be, so that an empty list means: all is well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtcp._version import __version__
from kvtcp.constants import EVICT_AFTER_MS
from kvtcp.errors import show_bytes
from kvtcp.replication.learner import Learner
from kvtcp.replication.progress import Progress
from kvtcp.replication.recovery import DOWN
from kvtcp.replication.shard_state import ShardState
from kvtcp.server.links import NodeLink
from kvtcp.server.ownership import wall_ms

if TYPE_CHECKING:
    from kvtcp.server.coordinator import CoordinatorServer


def degraded(server: CoordinatorServer) -> list[str]:
    """Everything that is not as it should be, one sentence each."""
    sentences = []
    for link in server.links.values():
        sentences += _degraded_node(server, link)
    shards = server.sequencer.shards
    sentences += _degraded_shards(server)
    short = [shard for shard in shards if shard.space and shard.serving]
    if short:
        names = ", ".join(link.node for link in server.sequencer.links.values() if link.space)
        refused = "writes" if max(shard.space for shard in short) > 1 else "growing writes"
        sentences.append(f"{len(short)} shards refuse {refused}: too little disk space on {names}")
    if wall_ms() > server.map.stamp_bound_ms:
        sentences.append(
            "deadlines do not pass: the config store does not take the next bound of time "
            f"({server.bound_failed or 'its answer is awaited'})"
        )
    elif server.keeper.changes.trouble:
        sentences.append(f"in-sync sets cannot change: {server.keeper.changes.trouble}")
    prefix = server.backups.restoring
    if prefix is not None:
        shown = f"keys that begin with {show_bytes(prefix)}" if prefix else "all keys"
        sentences.append(f"{shown} are closed until a restore completes")
    return sentences


def _degraded_shards(server: CoordinatorServer) -> list[str]:
    sentences = []
    states: dict[str, list[ShardState]] = {}
    for shard in server.sequencer.shards:
        states.setdefault(_state(server, shard), []).append(shard)
    for state, text in _DEGRADED.items():
        found = states.get(state)
        if found:
            first = found[0]
            sentences.append(f"{len(found)} shards {text}, the first is shard {first.number}: {_reason(server, first)}")
    return sentences


_DEGRADED = {
    "down": "are down",
    "recovering": "are not served yet",
    "read-only": "take no writes",
    "under-replicated": "have fewer copies than they should",
}


def _state(server: CoordinatorServer, shard: ShardState) -> str:
    if not shard.serving:
        found = server.controller.recovery.shards.get(shard.number)
        return "down" if found is None or found.state == DOWN else "recovering"
    if shard.bad or any(not link.connected for link in shard.members):
        return "read-only"
    if len(shard.members) < server.map.factor:
        return "under-replicated"
    if {link.node for link in shard.members} != set(server.map.wanted[shard.number]):
        return "moving"
    return "ok"


def _reason(server: CoordinatorServer, shard: ShardState) -> str:
    """Why a shard is not as it should be; empty if it is."""
    if not shard.serving:
        return shard.reason
    whys = [f"{link.node} {why}" for link, why in shard.bad.items()]
    whys += [f"{link.node} is missing ({link.reason})" for link in shard.good if not link.connected]
    members = {link.node for link in shard.members}
    learning = {link.node for link in shard.learners}
    for node in server.map.wanted[shard.number]:
        if node in learning:
            whys.append(f"{node} is learning")
        elif node not in members:
            link = server.sequencer.links[node]
            whys.append(f"{node} is not in sync ({link.reason or 'it will learn soon'})")
    if not whys and len(members) < server.map.factor:
        whys.append(f"there are too few nodes for {server.map.factor} copies")
    return "; ".join(whys)


def _degraded_node(server: CoordinatorServer, link: NodeLink) -> list[str]:
    """What is wrong with a node."""
    if not link.progress.connected:
        return [f"{link.node} is not linked: {link.progress.reason}"]
    if _is_silent(server, link):
        silent_ms = server.now_ms() - link.progress.heard_ms
        return [f"{link.node} has not answered for {silent_ms} ms"]
    return []


def _is_silent(server: CoordinatorServer, link: NodeLink) -> bool:
    """Whether a linked node does not even answer heartbeats."""
    return link.progress.connected and server.now_ms() - link.progress.heard_ms >= EVICT_AFTER_MS


def status(server: CoordinatorServer) -> dict[str, Any]:
    """The map of `status`."""
    sequencer = server.sequencer
    sentences = degraded(server)
    states = [_state(server, shard) for shard in sequencer.shards]
    return {
        "cluster": server.map.cluster,
        "server": f"kvtcp {__version__}",
        "state": "degraded" if sentences else "ok",
        "degraded": sentences,
        "epoch": server.map.epoch,
        "map_version": server.map.version,
        "nodes": len(server.links),
        "nodes_linked": sum(link.progress.connected for link in server.links.values()),
        "shards": server.map.shards,
        "moving": len(server.controller.membership.unsettled),
        "learning": sum(len(shard.learners) for shard in sequencer.shards),
        "under_replicated": states.count("under-replicated"),
        "down": states.count("down"),
        "replication_factor": server.map.factor,
        "min_insync": server.map.min_insync,
        "durability": server.durability,
        "clients": len(server.sessions),
        "operations": server.gateway.operations,
        "unavailable": sequencer.unavailable,
        "outcome_unknown": sequencer.unknown,
        "protocol_errors": server.protocol_errors,
        "waiting": sequencer.waiting_items,
        "buffered_bytes": server.buffered_bytes,
        "loop_lag_ms": round(server.lag_ms, 1),
        "counters": {
            "operations": server.gateway.operations,
            "errors": sequencer.unavailable + sequencer.unknown,
            "unavailable": sequencer.unavailable,
            "unknown": sequencer.unknown,
            "p99_ms": server.write_times.p99_ms(),
            "loop_lag_ms": round(server.lag_ms, 1),
            "left_in_sync": server.controller.membership.evictions,
            "joined_in_sync": server.controller.membership.joins,
        },
        "running": server.backups.busy,
        "uptime_s": int(server.uptime_s()),
    }


def nodes(server: CoordinatorServer) -> list[dict[str, Any]]:
    """The list of `nodes`."""
    return [_node(server, link) for link in server.links.values()]


def _node(server: CoordinatorServer, link: NodeLink) -> dict[str, Any]:
    cluster_map, progress = server.map, link.progress
    shards = server.sequencer.shards
    learners = [learner for learner in server.controller.membership.learners() if learner.link is progress]
    wanted = sum(link.node in row for row in cluster_map.wanted)
    member_of = len(cluster_map.shards_of(link.node))
    lag_entries = sum(shard.last_seq - shard.acked.get(progress, shard.last_seq) for shard in progress.shards)
    host, port = link.address
    return {
        "node": link.node,
        "address": f"{host}:{port}",
        "state": _node_state(server, link, member_of, bool(learners)),
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
        "restarts": server.restarts_of(link.node),
        "space": progress.space,
        "operations": link.stats.get("operations"),
        "keys": link.stats.get("keys"),
        "sync_p99_ms": link.stats.get("sync_p99_ms"),
        "loop_lag_ms": link.stats.get("lag_ms"),
        "memory_bytes": link.stats.get("memory_bytes"),
        "log_bytes": link.stats.get("log_bytes"),
    }


def _first_bad(progress: Progress) -> str:
    """What is wrong with the first bad copy of a linked node; empty if none is."""
    for shard in progress.shards:
        if progress in shard.bad:
            return f"its copy of shard {shard.number} cannot be used: it {shard.bad[progress]}"
    return ""


def _node_state(server: CoordinatorServer, link: NodeLink, member_of: int, learns: bool) -> str:
    cluster_map = server.map
    if link.node in cluster_map.destroyed:
        return "destroyed"
    if not link.progress.connected:
        return "down"
    if link.node in cluster_map.draining:
        return "draining" if member_of or server.controller.membership.copies_of(link.node) else "drained"
    if _is_silent(server, link):
        return "silent"
    return "learning" if learns else "up"


def shards(server: CoordinatorServer) -> list[dict[str, Any]]:
    """The list of `shards`."""
    return [_shard(server, shard) for shard in server.sequencer.shards]


def _shard(server: CoordinatorServer, shard: ShardState) -> dict[str, Any]:
    behind = [shard.last_seq - acked for acked in shard.acked.values()] if shard.serving else []
    return {
        "shard": shard.number,
        "state": _state(server, shard),
        "epoch": server.map.epoch,
        "nodes": [link.node for link in shard.members],
        "insync": server.map.nodes_of(shard.number),
        "wanted": list(server.map.wanted[shard.number]),
        "learners": [_learner(learner) for learner in server.controller.membership.learners_of(shard.number)],
        "seq": shard.last_seq,
        "commit": shard.commit,
        "lag_entries": max(behind, default=0),
        "lag_bytes": sum(link.bytes for link in shard.members if shard.acked[link] < shard.last_seq),
        "waiting": len(shard.waiting),
        "reason": _reason(server, shard),
    }


def _learner(learner: Learner) -> dict[str, Any]:
    return {
        "node": learner.link.node,
        "donor": learner.donor.node,
        "phase": learner.phase,
        "entries_left": learner.entries_left,
        "entries_shipped": learner.entries_shipped,
        "keys": learner.keys_total,
    }
