"""Status: what the coordinator tells of itself, its nodes and its shards.

It reads the server and the cores and changes nothing. docs/administration.md explains every key. `degraded` has one
sentence for everything that is not as it should be, so that an empty list means: all is well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtcp._version import __version__
from kvtcp.constants import EVICT_AFTER_MS
from kvtcp.errors import show_bytes
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
    down = [shard for shard in shards if not shard.serving]
    if down:
        first = f"shard {down[0].number}: {down[0].reason}"
        sentences.append(f"{len(down)} shards are down, the first is {first}")
    readonly = [shard for shard in shards if shard.serving and not shard.is_whole()]
    if readonly:
        sentences.append(f"{len(readonly)} shards refuse writes: a replica of each is missing or bad")
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
    prefix = server.backups.restoring
    if prefix is not None:
        shown = f"keys that begin with {show_bytes(prefix)}" if prefix else "all keys"
        sentences.append(f"{shown} are closed until a restore completes")
    return sentences


def _degraded_node(server: CoordinatorServer, link: NodeLink) -> list[str]:
    """What is wrong with a node."""
    sentences = []
    bad = _bad_shards(link)
    count = len(link.progress.shards)
    if bad and len(bad) == count:
        sentences.append(f"{link.node} serves nothing: {next(iter(bad.values()))}")
    elif bad:
        number, why = next(iter(bad.items()))
        sentences.append(
            f"{link.node}: {len(bad)} of {count} shards are bad, the first is shard {number}: it {why}"
        )
    if not link.progress.connected:
        sentences.append(f"{link.node} is not linked: {link.progress.reason}")
    elif _is_silent(server, link):
        silent_ms = server.now_ms() - link.progress.heard_ms
        sentences.append(f"{link.node} has not answered for {silent_ms} ms: writes of its shards wait for it")
    return sentences


def _bad_shards(link: NodeLink) -> dict[int, str]:
    """The shards whose copy on this node is bad, and why."""
    progress = link.progress
    return {shard.number: shard.bad[progress] for shard in progress.shards if progress in shard.bad}


def _is_silent(server: CoordinatorServer, link: NodeLink) -> bool:
    """Whether a linked node does not even answer heartbeats."""
    return link.progress.connected and server.now_ms() - link.progress.heard_ms >= EVICT_AFTER_MS


def status(server: CoordinatorServer) -> dict[str, Any]:
    """The map of `status`."""
    sequencer = server.sequencer
    sentences = degraded(server)
    return {
        "cluster": server.map.cluster,
        "server": f"kvtcp {__version__}",
        "state": "degraded" if sentences else "ok",
        "degraded": sentences,
        "epoch": server.map.epoch,
        "nodes": len(server.links),
        "nodes_linked": sum(link.progress.connected for link in server.links.values()),
        "shards": server.map.shards,
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
        "running": server.backups.busy,
        "uptime_s": int(server.uptime_s()),
    }


def nodes(server: CoordinatorServer) -> list[dict[str, Any]]:
    """The list of `nodes`."""

    def state(link: NodeLink) -> str:
        if not link.progress.connected:
            return "unreachable"
        if _bad_shards(link):
            return "bad"
        return "silent" if _is_silent(server, link) else "linked"

    return [
        {
            "node": link.node,
            "address": f"{link.host}:{link.port}",
            "state": state(link),
            "reason": next(iter(_bad_shards(link).values()), "") or link.progress.reason,
            "shards": len(link.progress.shards),
            "first_of": sum(shard.members[0] is link.progress for shard in link.progress.shards),
            "outstanding": link.progress.items,
            "outstanding_bytes": link.progress.bytes,
            "pid": None if link.report is None else link.report.pid,
        }
        for link in server.links.values()
    ]


def shards(server: CoordinatorServer) -> list[dict[str, Any]]:
    """The list of `shards`."""

    def state(shard: ShardState) -> str:
        if not shard.serving:
            return "down"
        return "ok" if shard.is_whole() else "read-only"

    def reason(shard: ShardState) -> str:
        bad = "; ".join(f"{link.node} {why}" for link, why in shard.bad.items())
        return shard.reason or shard.stuck or bad

    return [
        {
            "shard": shard.number,
            "state": state(shard),
            "nodes": [link.node for link in shard.members],
            "seq": shard.last_seq,
            "commit": shard.commit,
            "waiting": len(shard.waiting),
            "reason": reason(shard),
        }
        for shard in server.sequencer.shards
    ]
