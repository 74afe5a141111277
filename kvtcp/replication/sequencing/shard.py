"""Shard state: what the coordinator knows of each shard and link, shared by the parts of the sequencer.

Pure. `Admission` (requests in), `Answers` (answers out) and `Sequencer` (links, results, time) all work on one
`ClusterState`; it is a base class of theirs and not an object beside them because an attribute of `self` is the
cheapest thing to reach on the path of every operation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from kvtcp.cluster.map import ClusterMap
from kvtcp.errors import Code
from kvtcp.replication.sequencing.link import Op, Progress
from kvtcp.replication.sequencing.requests import Held, Sink, Waiting


class Following:
    """What a shard knows of a learner: one node's copy on its way into the in-sync set. The learner fills it in."""

    __slots__ = ("acked", "attached", "disk", "holds_writes", "lost_reason", "on_acknowledged")

    def __init__(self, on_acknowledged: Callable[[int], None]) -> None:
        self.on_acknowledged = on_acknowledged  # called with the number up to which an ordinal of the link covers it
        self.attached = False  # LEARN was queued
        self.holds_writes = False  # it does not catch up while writes go on: they wait a moment
        self.acked = 0  # number up to which it has everything, durably; 0 as long as nothing of it counts
        self.disk = ""  # of the copy that it will be a member by
        self.lost_reason = ""  # why its copy is not what it was when it was proposed as a member; empty = it is

    @property
    def takes_writes(self) -> bool:
        """Whether the writes of the shard are queued to it."""
        return self.attached and not self.lost_reason


class ShardState:
    """One shard as the coordinator sees it."""

    __slots__ = (
        "acked", "bad", "base", "commit", "due", "good", "held", "joining", "last_seq", "learners", "members", "number",
        "orphans", "pending", "purge_after_ms", "reason", "serving", "space", "stuck", "targets", "waiting",
        "waiting_reads", "writable",
    )  # fmt: skip

    def __init__(self, number: int, members: list[Progress]) -> None:
        self.number = number
        self.members = members  # E: all of them must have an entry before it is committed; the first answers writes
        self.learners: dict[Progress, Following] = {}  # nodes whose copies are being brought up to date
        self.joining: dict[Progress, str] = {}  # disks of members that the map as it is stored does not name yet
        self.targets = members  # to whom writes are queued: good members, then learners
        self.bad: dict[Progress, str] = {}  # members that do not count, and why, as the end of a sentence
        self.good = members  # members that are not bad, in their order
        self.base = (0, 0)  # number and chain at which this coordinator took the shard over
        self.acked: dict[Progress, int] = dict.fromkeys(members, 0)  # highest number each member has durable
        self.last_seq = 0  # highest number given
        self.commit = 0  # highest number durable on all members; <= last_seq
        self.pending: deque[Op] = deque()  # writes (commit, last_seq], in order
        self.due: deque[tuple[int, Op]] = deque()  # writes committed without their result; the first may be answered
        self.orphans: list[tuple[int, Op]] = []  # writes whose result was lost, to be asked for when a member is linked
        self.held: list[Held] = []  # heap of answers whose first field is above commit
        self.waiting: deque[Waiting] = deque()  # not sequenced yet, in order of arrival
        self.waiting_reads = 0  # reads in `waiting`
        self.serving = False  # its members are equal, and it may be read
        self.reason = "its members have not reported yet"  # why not serving, for people
        self.stuck = ""  # why the pending writes cannot commit now, for people; empty = they can
        self.space = 0  # how short of disk space the worst member is, see Progress.space
        self.writable = False  # every write can be sequenced: see `update_writable`
        self.purge_after_ms = 0  # no purge before this time

    def mark(self, link: Progress, why: str) -> None:
        """The member is bad, or (empty) it is not."""
        if why:
            self.bad[link] = why
        else:
            self.bad.pop(link, None)
        self.update_targets()

    def update_targets(self) -> None:
        """Set `good` and `targets` from what they depend on."""
        self.good = [member for member in self.members if member not in self.bad]
        self.targets = self.good + [
            link for link, learner in self.learners.items() if learner.takes_writes and link not in self.good
        ]

    def told(self) -> int:
        """Up to where nodes are told that writes are committed. They know a result no longer than that, so it is not
        beyond one that is still to be asked for."""
        due = self.due
        while due and due[0][1][1] is None:
            due.popleft()
        return due[0][0] - 1 if due else self.commit

    def is_whole(self) -> bool:
        """Whether every member has a link and counts, so that writes go on as soon as there is room."""
        return not self.bad and all(link.connected for link in self.members)

    def is_blocked(self) -> bool:
        """Whether a member or a learner cannot take a write now."""
        if self.bad or any(learner.holds_writes for learner in self.learners.values()):
            return True
        blocked = False
        for link in self.targets:
            if link.full or not link.connected:
                blocked = True
        return blocked

    def takes_writes(self) -> bool:
        """Whether a write that needs no space can be sequenced now."""
        return self.serving and not self.waiting and not self.is_blocked()

    def update_writable(self) -> None:
        """Set `writable` from what it depends on: serving, nobody waiting, every member good, linked, and with room in
        its window and on its disk."""
        self.writable = not self.space and self.takes_writes()

    def update_space(self) -> None:
        """Set `space` from the members."""
        self.space = max([link.space for link in self.members], default=0)

    def update_stuck(self, min_insync: int) -> None:
        """Set `stuck` from the members that lost what others wait for, if they cannot leave."""
        lost = [f"{link.node} {why}" for link, why in self.bad.items() if self.acked[link] < self.last_seq]
        may_leave = len(self.members) > min_insync and self.good
        self.stuck = "" if may_leave else "; ".join(lost)

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        assert list(self.acked) == self.members, "what members acknowledged is known of members, in their order"
        if self.serving:
            assert self.commit <= self.last_seq, "commit is at most the last number"
            assert len(self.pending) == self.last_seq - self.commit, "pending are the numbers above commit"
            assert self.commit == min(self.acked.values()), "commit is what all members have"
            assert max(self.acked.values()) <= self.last_seq, "nobody acknowledged a number that was not given"
        assert not self.due or self.due[-1][0] <= self.commit, "what is due is committed"
        assert not self.held or self.held[0][0] > self.commit, "what is committed is not held"
        assert not self.held or not self.stuck, "nothing is held for a commit that cannot come"
        reads = sum(entry[4] is None for entry in self.waiting)
        assert self.waiting_reads == reads, "waiting reads are counted"
        if self.writable:
            assert self.serving and not self.waiting, "a writable shard serves, and nobody waits before the next write"
            assert all(link.connected and not link.full for link in self.targets), "all members can take a write"
            assert not self.bad and not self.space, "a writable shard has no bad member, and space"
        assert self.good == [link for link in self.members if link not in self.bad], "good is what is not bad"
        assert self.bad.keys() <= set(self.members), "only a member is bad"
        learning = [link for link, each in self.learners.items() if each.takes_writes and link not in self.good]
        assert self.targets == self.good + learning, "writes go to good members and learners"


class ClusterState:
    """All shards, all links, and the time."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        self.map = cluster_map
        self.links = {node: Progress(node) for node in cluster_map.nodes}
        self.shards = [
            ShardState(n, [self.links[node] for node, _ in members]) for n, members in enumerate(cluster_map.members)
        ]
        for shard in self.shards:
            for link in shard.members:
                link.shards.append(shard)
        self.min_insync = cluster_map.min_insync
        self.stamp_ms = 0  # of everything queued in this tick; never decreases
        self.stamp_bound_ms = cluster_map.stamp_bound_ms  # stamp_ms never grows beyond it
        self._time_ended = False
        self.now_ms = 0  # monotonic time of this tick, for deadlines only
        self.unavailable = 0  # requests refused as not executed, for status

    def begin(self, wall_ms: int, now_ms: int) -> None:
        """A tick begins: what is queued until `close_batches` has one stamp."""
        if wall_ms > self.stamp_ms:
            # R12: time stands still rather than pass what the next coordinator will begin with
            self.stamp_ms = max(self.stamp_ms, min(wall_ms, self.stamp_bound_ms))
        self.now_ms = now_ms

    def end_time(self) -> int:
        """The coordinator ends in peace: whatever bound is still stored, no stamp is given above the last one, which is
        returned."""
        self._time_ended = True
        self.stamp_bound_ms = self.stamp_ms
        return self.stamp_ms

    def map_changed(self, cluster_map: ClusterMap) -> None:
        """The config store holds this map now."""
        self.map = cluster_map
        self.min_insync = cluster_map.min_insync
        if not self._time_ended:
            self.stamp_bound_ms = cluster_map.stamp_bound_ms
        for shard in self.shards:
            if shard.joining:
                named = cluster_map.members[shard.number]
                shard.joining = {
                    link: disk for link, disk in shard.joining.items() if (link.node, disk) not in named
                }

    def _refuse(self, sink: Sink, token: Any, code: Code, text: str, shard: ShardState) -> None:
        self.unavailable += 1
        sink.fail(token, code, text, {"shard": shard.number})
