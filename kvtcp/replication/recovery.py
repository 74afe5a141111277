"""Takeover: a coordinator that begins an epoch finds out what the members have, and makes them equal.

Pure. The reports of all nodes and their answers in, frames for the nodes out, a Verdict for every shard in the end.
Nobody reads or writes a shard before. One Takeover is for one set of links: if one of them breaks, it is thrown away
and all nodes are asked again. That loses nothing, because what was shipped stays shipped.

For each shard, when all its members have reported:

1. A member is *bad* if its copy has another disk than the map says, or is not complete, or ends below a number that any
   member was told to be committed (R9). Whatever it holds is not looked at.
2. The best position is the highest (epoch, seq) of the good ones. Two good members with that position and different
   chains: the shard is down.
3. A good member that ends earlier gets the entries that follow, fetched from one at the best position, if that one's
   chain at the place where they join is the same; else it is bad. They keep their epoch and stamp. What nobody was ever
   answered about may so become committed, which is right: it may have happened (R6).
4. Committed is what the best has.

A shard with a good member and a bad one can be read and not written. Without a good member it is down. There are two
exceptions, in which new disks enter the map before the shard serves: a shard in which nothing was ever written is as
complete in an empty copy as in any other; and if the last run kept its data in memory and all members are new and
empty, they are what the end of that run has left, and the shard begins anew.

While a member is bad, what the good ones have counts as committed and is read. That may be more than the lost copy had:
if they are lost in their turn and it is put back, an entry may be missing that was read, never one that was answered.

Simplifications: a shard is brought up to date one member after the other, RECOVERY_SHARDS_MAX shards at a time; members
are waited for without limit, and are never removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from kvtcp.constants import RECOVERY_SHARDS_MAX
from kvtcp.protocol.link import FETCH, SHIP, CopyReport, Report
from kvtcp.replication.cluster_map import ClusterMap, Member
from kvtcp.replication.progress import LinkError

Action = tuple[str, tuple[Any, ...]]  # node, frame for it

LOST_DATA: Final = "came back without its data"


class StaleStore(Exception):
    """The config store does not know what the nodes know: it was lost, or replaced by an older copy."""


@dataclass
class Verdict:
    """How one shard goes on."""

    seq: int = 0  # last number, and committed
    chain: int = 0  # of it
    bad: dict[str, str] = field(default_factory=dict)  # member -> why it is bad, as the end of a sentence
    down: str = ""  # why the shard is not served; empty = it is
    disks: dict[str, str] = field(default_factory=dict)  # members that count by another disk as soon as the map says so


def foreign_copy(copy: CopyReport) -> str:
    """Why a copy whose disk is not the member's is bad."""
    if copy.damage:
        return f"has a damaged copy: {copy.damage}"
    return f"{LOST_DATA}: what it has is not what was written to this cluster" if copy.seq else LOST_DATA


def incomplete_copy(copy: CopyReport) -> str:
    """Why an incomplete copy is bad."""
    return f"has an incomplete copy: {copy.damage or 'it was never finished'}"


class _Shard:
    """A shard whose members are being made equal."""

    def __init__(self, number: int, members: tuple[Member, ...]) -> None:
        self.number = number
        self.members = members
        self.verdict = Verdict()
        self.good: dict[str, CopyReport] = {}  # members as they are now, shipped entries included
        self.donors: list[str] = []  # members at the best position that were not found unable to ship
        self.target = ""  # member that is being brought up to date; empty = none
        self.awaited: tuple[str, int] = ("", 0)  # who has to answer, and the kind of frame it was sent

    def lagging(self) -> str:
        """A good member that is not at the best position, empty if there is none."""
        return next((node for node, copy in self.good.items() if copy.seq != self.verdict.seq), "")

    def is_bad(self, node: str, why: str) -> None:
        """This member does not count."""
        self.verdict.bad[node] = why
        self.good.pop(node, None)


class Takeover:
    """One attempt to take over all shards of a map."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        self.map = cluster_map
        self.reports: dict[str, Report] = {}
        self.alarms: list[str] = []  # what should never be seen, as sentences
        self.began_empty: list[int] = []  # shards of a run in memory whose data is gone
        self._shards = [_Shard(number, members) for number, members in enumerate(cluster_map.members)]
        self._waiting: list[_Shard] = []  # to be brought up to date when others are
        self._running = 0  # shards that are

    @property
    def is_done(self) -> bool:
        """Whether all shards have their verdict."""
        return len(self.reports) == len(self.map.nodes) and not self._running and not self._waiting

    @property
    def verdicts(self) -> list[Verdict]:
        """One for each shard, when it is done."""
        assert self.is_done, "the verdicts are there when all members have reported and are equal"
        return [shard.verdict for shard in self._shards]

    @property
    def new_disks(self) -> dict[int, dict[str, str]]:
        """What has to be in the map before anything is served: shard -> node -> disk."""
        return {shard.number: shard.verdict.disks for shard in self._shards if shard.verdict.disks}

    @property
    def is_empty(self) -> bool:
        """Whether no shard has a single entry, and none is down."""
        return not any(verdict.seq or verdict.down for verdict in self.verdicts)

    def copies(self, node: str) -> dict[int, CopyReport]:
        """What the node has now, entries that were shipped to it included."""
        copies = dict(self.reports[node].copies)
        for shard in self._shards:
            if node in shard.good:
                copies[shard.number] = shard.good[node]
        return copies

    # --- events -------------------------------------------------------------------------------------

    def on_report(self, report: Report, map_version_max: int) -> list[Action]:
        """A node reported; it may know the map up to this version. Raises StaleStore; then nothing is to be changed."""
        if report.map_version > map_version_max:
            raise StaleStore(
                f"node {report.node} has seen version {report.map_version} of the cluster map, the config store has "
                f"version {map_version_max}"
            )
        assert report.node not in self.reports, "a node that reports again begins another takeover"
        self.reports[report.node] = report
        if len(self.reports) < len(self.map.nodes):
            return []
        for shard in self._shards:
            self._judge(shard)
            if not shard.verdict.down and shard.lagging():
                self._waiting.append(shard)
        return self._start_some()

    def on_entries(self, node: str, number: int, after: int, chain: int | None, entries: Any) -> list[Action]:
        """An ENTRIES frame. Raises LinkError if it was not asked for."""
        shard = self._asked(node, number, FETCH)
        target = shard.target
        copy = shard.good[target]
        if after != copy.seq:
            raise LinkError(f"{node} sent entries of shard {number} after {after}, not after {copy.seq}")
        if not entries:
            shard.donors.remove(node)  # it does not have them any more; another one may
            return self._fetch(shard)
        if not (type(entries) is list and all(map(_is_entry, entries))):
            raise LinkError(f"{node} sent entries of shard {number} that are none")
        if chain is not None and chain != copy.chain:  # one that does not know it: the receiver checks the first entry
            shard.is_bad(target, f"has another history than {node}: they differ at number {after} or before")
            return self._next_target(shard)
        shard.awaited = (target, SHIP)
        return [(target, (SHIP, number, entries))]

    def on_shipped(
        self, node: str, number: int, epoch: int, seq: int, chain: int, error: bytes | None
    ) -> list[Action]:
        """A SHIPPED frame. Raises LinkError if it cannot be true."""
        shard = self._asked(node, number, SHIP)
        verdict = shard.verdict
        if error is not None:
            shard.is_bad(node, f"cannot take what it lacks: {error.decode('utf-8', 'replace')}")
        elif not shard.good[node].seq < seq <= verdict.seq:
            raise LinkError(f"{node} has shard {number} up to {seq}, which it was not sent")
        elif seq == verdict.seq and chain != verdict.chain:
            shard.is_bad(node, f"has another history than {shard.donors[0]}: they differ at number {seq} or before")
        else:
            shard.good[node] = shard.good[node]._replace(epoch=epoch, seq=seq, chain=chain)
            if seq < verdict.seq:
                return self._fetch(shard)
        return self._next_target(shard)

    # --- judging ------------------------------------------------------------------------------------

    def _judge(self, shard: _Shard) -> None:
        """Everything of the verdict but what shipping will show."""
        verdict = shard.verdict
        empty: dict[str, str] = {}  # members with another, empty and complete copy -> its disk
        hint = 0
        for node, disk in shard.members:
            copy = self.reports[node].copies.get(shard.number)
            if copy is None:
                shard.is_bad(node, "has no copy of it")
                continue
            if copy.disk != disk:
                if copy.complete and not copy.seq:
                    empty[node] = copy.disk
                elif not disk:
                    raise StaleStore(f"node {node} has data of shard {shard.number}, the cluster map knows of none")
                shard.is_bad(node, foreign_copy(copy))
                continue
            hint = max(hint, copy.commit)
            if copy.complete:
                shard.good[node] = copy
            else:
                shard.is_bad(node, incomplete_copy(copy))
        for node, copy in list(shard.good.items()):
            if copy.seq < hint:
                shard.is_bad(node, f"ends at number {copy.seq}, but number {hint} was committed")
                self.alarms.append(f"{node} {verdict.bad[node]} in shard {shard.number}")
        if shard.good:
            self._choose_best(shard)
        elif len(empty) == len(shard.members) and (self.map.durability == "memory" or not shard.members[0][1]):
            if shard.members[0][1]:
                self.began_empty.append(shard.number)
        else:
            whys = "; ".join(f"{node} {why}" for node, why in verdict.bad.items())
            verdict.down = f"none of its members has its data: {whys}"
            return
        if not verdict.seq and not verdict.down:
            for node, disk in empty.items():
                verdict.disks[node] = disk
                del verdict.bad[node]
                shard.good[node] = self.reports[node].copies[shard.number]

    def _choose_best(self, shard: _Shard) -> None:
        verdict = shard.verdict
        best = max(shard.good.values(), key=_order)
        shard.donors = [node for node, copy in shard.good.items() if _order(copy) == _order(best)]
        if len({shard.good[node].chain for node in shard.donors}) > 1:
            names = ", ".join(shard.donors)
            verdict.down = f"its members differ: {names} end at number {best.seq} with different histories"
            return
        verdict.seq, verdict.chain = best.seq, best.chain
        for node, copy in list(shard.good.items()):
            if node not in shard.donors and copy.seq >= best.seq:
                shard.is_bad(node, f"has another history than {shard.donors[0]}: it ends in an older epoch")

    # --- shipping -----------------------------------------------------------------------------------

    def _start_some(self) -> list[Action]:
        actions: list[Action] = []
        while self._waiting and self._running < RECOVERY_SHARDS_MAX:
            self._running += 1
            actions += self._next_target(self._waiting.pop(0))
        return actions

    def _next_target(self, shard: _Shard) -> list[Action]:
        """Bring the next member up to date, or be done with the shard."""
        shard.target = shard.lagging()
        if shard.target:
            return self._fetch(shard)
        shard.awaited = ("", 0)
        self._running -= 1
        return self._start_some()

    def _fetch(self, shard: _Shard) -> list[Action]:
        after = shard.good[shard.target].seq
        if not shard.donors:
            shard.donors = [node for node, copy in shard.good.items() if copy.seq == shard.verdict.seq]
            shard.is_bad(
                shard.target,
                f"lacks what follows number {after}, and no member can ship it any more: it needs a full "
                "synchronization, which this version does not do",
            )
            return self._next_target(shard)
        shard.awaited = (shard.donors[0], FETCH)
        return [(shard.donors[0], (FETCH, shard.number, after))]

    def _asked(self, node: str, number: Any, kind: int) -> _Shard:
        if type(number) is not int or not 0 <= number < len(self._shards):
            raise LinkError(f"{node} answers for a shard {number!r}")
        shard = self._shards[number]
        if shard.awaited != (node, kind):
            raise LinkError(f"{node} sent for shard {number} what it was not asked for")
        return shard


def _order(copy: CopyReport) -> tuple[int, int]:
    """Which of two good copies is the better one. The epoch counts first: what an older one left behind may be long."""
    return copy.epoch, copy.seq


def _is_entry(entry: Any) -> bool:
    return type(entry) is list and len(entry) == 2 and type(entry[0]) is int and type(entry[1]) is bytes
