"""Recovery: compares the members of a shard, and makes them equal before the shard is served.

Pure. Every shard begins here with a coordinator's epoch, each for itself, and then goes to the sequencer; one that is
down stays here and is judged again when a node comes. The controller passes on reports and answers; bad members are
replaced by Membership.

    WAITING    for reports of its members, RECOVER_WAIT_MS at most; without limit while the cluster is being founded
    CHANGING   a change of its row in the map is on its way
    SHIPPING   good members that lag get the entries they lack
    REPAIRING  bad members that have to stay are replaced whole, each by a learner
    DOWN       too few members that could be made good; judged again when one of its nodes reports

1. A member is *bad* if its copy is not the one in the map, or is not complete, or ends below a number that any member
   knows to be committed (R9). Its data is ignored.
2. The best position is the highest (epoch, seq) of the good ones. If two good members with that position have different
   chains, the shard is down.
3. Silent and bad members are removed from the map, never below `min_insync`, and none before a good one has answered
   (R6). A silent one that has to stay keeps the shard down, unless an operator declared its node destroyed.
4. A good member that ends earlier gets the entries that follow, fetched from one at the best position, if that one's
   chain at the place where they join is the same; else it is bad. They keep their epoch and stamp. Entries that were
   never answered may so become committed, which is right: clients were not told that they failed.
5. A bad member that has to stay is brought whole to the best copy, and enters the map under its new replica id; only
   then the shard is served. All entries of the best copy are committed.

Two exceptions, in which new replica ids enter the map at once: a shard without any write is as complete in an empty
copy as in any other; and if the last run kept its data in memory and all members are new and empty, the shard begins
empty.

A shard that was served comes back here when all its members have lost their data, or are destroyed. A good copy may
still come; but a number given in this epoch is not given to another entry in it. So a shard kept in memory begins empty
above these numbers, and one whose best copy lacks some of them is down until the next epoch.

If the link of a member breaks, its shard starts over; shipped entries stay, and those on their way are waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kvtcp.cluster.map import LOST_REPLICA, ClusterMap
from kvtcp.constants import RECOVER_WAIT_MS, RECOVERY_SHARDS_MAX
from kvtcp.protocol.link import FETCH, SHIP, CopyReport, Report, is_entry
from kvtcp.replication.copy_reports import UNKNOWN_COPY, foreign_copy, incomplete_copy
from kvtcp.replication.membership.insync import Membership
from kvtcp.replication.membership.learner import Learner
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.proposals import Proposals
from kvtcp.replication.sequencing.link import LinkError
from kvtcp.replication.sequencing.sequencer import Sequencer

WAITING: Final = "waiting"
CHANGING: Final = "changing"
SHIPPING: Final = "shipping"
REPAIRING: Final = "repairing"
DOWN: Final = "down"


class StaleStore(Exception):
    """Raised if a node has seen a newer map than the config store has: it was lost, or replaced by an older copy."""


class _Shard:
    """A shard whose members are being made equal."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.state = WAITING
        self.since_ms: int | None = None  # when the wait for reports began; None = it begins when the shard is judged
        self.again = False  # a link broke while the map is being changed: start over after the change
        self.differ = False  # DOWN because good members have different histories
        self.given = 0  # last number given in this epoch, which must not be given to other entries in it
        self.found: dict[str, str] = {}  # members found bad while shipping, and why
        self.good: dict[str, CopyReport] = {}
        self.bad: dict[str, str] = {}
        self.silent: list[str] = []
        self.donors: list[str] = []  # members at the best position, without those that could not ship
        self.seq = 0  # the best position
        self.chain = 0
        self.target = ""  # member that is being brought up to date; empty = none
        self.awaited: tuple[str, int] = ("", 0)  # node that has to answer, and the kind of frame it was sent
        # Members that were sent entries and did not answer yet. They will apply them, whatever happens to the shard
        # meanwhile, so it is not judged by their older reports.
        self.unanswered: list[str] = []

    def lagging(self) -> str:
        """A good member that is not at the best position, empty if there is none."""
        return next((node for node, copy in self.good.items() if copy.seq != self.seq), "")


@dataclass
class _RowChange:
    """A change of one shard's row: new replica ids of members, or members that are removed, and why."""

    shard: _Shard
    replica_ids: dict[str, str] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    is_made: bool = True  # the members were removed


class Recovery:
    """The shards that are not served. `reports` are those of the linked nodes, kept up to date."""

    def __init__(
        self, sequencer: Sequencer, proposals: Proposals, outbox: Outbox, reports: Mapping[str, Report],
        membership: Membership,
    ) -> None:  # fmt: skip
        self._sequencer = sequencer
        self._proposals = proposals
        self._outbox = outbox
        self._reports = reports
        self._membership = membership
        self.shards = {number: _Shard(number) for number in range(proposals.map.shards)}
        self.emptied: list[int] = []  # shards of a run in memory whose data is gone
        self.losses: dict[int, Learner] = {}  # shards whose loss was accepted, until they are judged again
        self._queue: list[_Shard] = []  # SHIPPING, and waiting for their turn
        self._running = 0  # SHIPPING, and in their turn
        self._changes: list[_RowChange] = []  # of this step, not proposed yet
        self._removed: dict[str, list[tuple[int, str]]] = {}  # node -> shards it was removed from, and why

    @property
    def _map(self) -> ClusterMap:
        return self._proposals.map

    @property
    def _now_ms(self) -> int:
        return self._sequencer.now_ms

    @property
    def is_settled(self) -> bool:
        """Whether every shard that is not served is down, or waits for a repair, which may take long."""
        return all(shard.state in (DOWN, REPAIRING) for shard in self.shards.values())

    def take_back(self, number: int, why: str) -> None:
        """Take a served shard that has no good member any more."""
        shard = self.shards[number] = _Shard(number)
        shard.given = self._sequencer.shards[number].last_seq
        self._sequencer.hand_back(number, why)

    def begin(self, number: int) -> None:
        """Start a shard over: a member of it was replaced, or it is down and is judged again."""
        self._restart(self.shards[number])
        self._start_some()
        self._propose()

    def take_removed(self) -> dict[str, list[tuple[int, str]]]:
        """Take the nodes that were removed from shards since the last call, and why."""
        removed, self._removed = self._removed, {}
        return removed

    # --- events -------------------------------------------------------------------------------------

    def on_report(self, node: str) -> None:
        """Take the report of a node that was linked."""
        for shard in self._of(node):
            if shard.state == DOWN:
                shard.state = WAITING
                shard.since_ms = self._now_ms
            shard.found.pop(node, None)
            shard.unanswered = [each for each in shard.unanswered if each != node]
            self._judge(shard)
        self._propose()

    def on_lost(self, node: str) -> None:
        """Take the loss of a node that had reported."""
        for shard in self.shards.values():
            shard.unanswered = [each for each in shard.unanswered if each != node]
        for shard in self._of(node):
            self._restart(shard)
        self._start_some()  # not before all of them gave up their turns: the node is gone
        self._propose()
        for loss in list(self.losses.values()):
            if loss.link.node == node and not loss.proposed:
                self.learner_failed(loss, f"the link to {node} was lost")

    def tick(self) -> None:
        """Judge the shards that wait for reports."""
        for shard in list(self.shards.values()):
            if shard.state == WAITING:
                self._judge(shard)
        self._propose()

    def replaced(self, number: int, node: str, replica_id: str) -> None:
        """Take a member of a shard that is not served and was replaced in the map by this copy of the node, which may
        have lost the copy since."""
        if number in self.shards:
            shard, repairing = self.shards[number], self._membership.repairing
            # not repaired: a loss was accepted
            if number not in repairing or shard.again or not self._has(node, number, replica_id):
                repairing.discard(number)
                self.begin(number)
            elif not self._sequencer.shards[number].bad:
                repairing.discard(number)
                assert shard.state == REPAIRING, "only a shard under repair is repaired"
                self._finish(shard)
        if self.losses.pop(number, None) is not None:
            self._outbox.event("warning", "loss-accepted", shard=number)

    def begin_from(self, number: int, node: str, replaces: str, seq_min: int) -> None:
        """Continue a shard above `seq_min` with the copy of this node, empty if it has none. The node gives the copy to
        itself under a new replica id, in the place of the member `replaces`."""
        link = self._sequencer.links[node]
        self.losses[number] = self._membership.learn(self._sequencer.shards[number], link, link, replaces, seq_min)

    def learner_failed(self, learner: Learner, why: str) -> None:
        """Take the end of a learner."""
        number = learner.shard.number
        if self.losses.pop(number, None) is not None:
            self._outbox.event("error", "loss-not-accepted", shard=number, reason=why)

    def on_entries(self, node: str, number: int, after: int, chain: int | None, entries: Any) -> None:
        """Take an ENTRIES frame; one that was not asked for is ignored. Raises LinkError if it is malformed."""
        self._take_entries(node, number, after, chain, entries)
        self._propose()

    def on_shipped(self, node: str, number: int, epoch: int, seq: int, chain: int, error: bytes | None) -> None:
        """Take a SHIPPED frame. Raises LinkError if it cannot be true."""
        self._take_shipped(node, number, epoch, seq, chain, error)
        self._propose()

    def _take_entries(self, node: str, number: int, after: int, chain: int | None, entries: Any) -> None:
        shard = self.shards[number]
        if shard.state != SHIPPING or shard.awaited != (node, FETCH):
            return
        target = shard.target
        copy = shard.good[target]
        if after != copy.seq:
            return
        if not entries:
            shard.donors.remove(node)  # it does not have the entries any more; another donor may
            self._fetch(shard)
            return
        if not (type(entries) is list and all(map(is_entry, entries))):
            raise LinkError(f"{node} sent entries of shard {number} that are none")
        if chain is not None and chain != copy.chain:  # None: the donor does not know; the receiver checks the entries
            self._found_bad(shard, f"has another history than {node}: they differ at number {after} or before")
            return
        shard.awaited = (target, SHIP)
        shard.unanswered.append(target)
        self._outbox.send(target, (SHIP, number, entries))

    def _take_shipped(self, node: str, number: int, epoch: int, seq: int, chain: int, error: bytes | None) -> None:
        shard = self.shards[number]
        if node not in shard.unanswered:
            return  # to a learner
        shard.unanswered.remove(node)
        before = self._reports[node].copies[number]
        self._reports[node].copies[number] = before._replace(epoch=epoch, seq=seq, chain=chain)
        if shard.state != SHIPPING or shard.awaited != (node, SHIP):
            self._judge(shard)  # the shard may have waited for this
            return
        if error is not None:
            self._found_bad(shard, f"cannot take what it lacks: {error.decode('utf-8', 'replace')}")
        elif not shard.good[node].seq < seq <= shard.seq:
            raise LinkError(f"{node} has shard {number} up to {seq}, which it was not sent")
        elif seq == shard.seq and chain != shard.chain:
            why = f"has another history than {shard.donors[0]}: they differ at number {seq} or before"
            self._found_bad(shard, why)
        else:
            shard.good[node] = self._reports[node].copies[number]
            if seq < shard.seq:
                self._fetch(shard)
            else:
                self._next_target(shard)

    # --- judging ------------------------------------------------------------------------------------

    def _of(self, node: str) -> list[_Shard]:
        return [shard for shard in self.shards.values() if node in self._map.nodes_of(shard.number)]

    def _restart(self, shard: _Shard) -> None:
        if shard.state == CHANGING or (shard.state == REPAIRING and self._membership.repair_in_flight(shard.number)):
            shard.again = True
            return
        if shard.state == REPAIRING:
            self._membership.stop_repair(shard.number)
        shard.again = False
        self._leave_shipping(shard)
        shard.state = WAITING
        shard.since_ms = self._now_ms
        shard.found.clear()

    def _leave_shipping(self, shard: _Shard) -> None:
        if shard.state == SHIPPING:
            if shard in self._queue:
                self._queue.remove(shard)
            else:
                self._running -= 1
            shard.awaited = ("", 0)

    def _judge(self, shard: _Shard) -> None:
        """Judge a shard that is WAITING by its reports, and proceed as far as they allow."""
        if shard.state != WAITING or shard.unanswered or self._membership.repair_in_flight(shard.number):
            return  # in flight: an accepted loss is being stored, after which the shard starts over
        if shard.since_ms is None:
            shard.since_ms = self._now_ms
        row = self._map.members[shard.number]
        reports, destroyed = self._reports, self._map.destroyed
        shard.silent = [node for node, _ in row if node not in reports and node not in destroyed]
        is_founding = any(not replica_id for _, replica_id in row)
        if shard.silent and (is_founding or self._now_ms < shard.since_ms + RECOVER_WAIT_MS):
            return
        shard.good, shard.bad, empty, hint = {}, {}, {}, 0
        for node, replica_id in row:
            copy = reports[node].copies.get(shard.number) if node in reports else None
            if node in destroyed:
                shard.bad[node] = "was declared destroyed"
            elif node in shard.silent:
                continue
            elif copy is None:
                shard.bad[node] = "has no copy of it"
            elif copy.replica_id != replica_id:
                if copy.complete and not copy.seq:
                    empty[node] = copy.replica_id
                elif not replica_id:
                    raise StaleStore(f"node {node} has data of shard {shard.number}, the cluster map knows of none")
                shard.bad[node] = UNKNOWN_COPY if replica_id == LOST_REPLICA and copy.seq else foreign_copy(copy)
            else:
                hint = max(hint, copy.commit)
                if node in shard.found:
                    shard.bad[node] = shard.found[node]
                elif copy.complete:
                    shard.good[node] = copy
                else:
                    shard.bad[node] = incomplete_copy(copy)
        for node, copy in list(shard.good.items()):
            if copy.seq < hint:
                self._is_bad(shard, node, f"ends at number {copy.seq}, but number {hint} was committed")
                self._outbox.alarm(f"{node} {shard.bad[node]} in shard {shard.number}")
        if not self._adopt_empty(shard, empty, len(row)):
            self._proceed(shard)

    def _is_bad(self, shard: _Shard, node: str, why: str) -> None:
        shard.bad[node] = why
        shard.good.pop(node, None)

    def _adopt_empty(self, shard: _Shard, empty: Mapping[str, str], size: int) -> bool:
        """Apply the exceptions for empty copies; true if the map is being changed."""
        is_founding = any(not replica_id for _, replica_id in self._map.members[shard.number])
        never_written = bool(shard.good) and all(copy.seq == 0 for copy in shard.good.values())
        ended = len(empty) == size and not is_founding and self._map.durability == "memory"
        if not empty or not (never_written or ended or (is_founding and len(empty) == size)):
            return False
        if ended:
            self.emptied.append(shard.number)
            why = "the last run kept its data in memory"
            self._outbox.event("warning", "began-empty", shard=shard.number, reason=why)
            if shard.given:  # not with the same numbers again in the same epoch
                shard.state = DOWN
                nodes = self._map.nodes_of(shard.number)
                self._sequencer.set_members(shard.number, nodes)
                self.begin_from(shard.number, nodes[0], nodes[0], shard.given + 1)
                return True
        self._change(shard, _RowChange(shard, replica_ids=dict(empty)))
        return True

    def _change(self, shard: _Shard, change: _RowChange) -> None:
        """Change the row of the shard, together with others of this step, and judge it again."""
        self._membership.stop_repair(shard.number)
        shard.state = CHANGING
        self._changes.append(change)

    def _propose(self) -> None:
        """Propose the changes of this step as one change of the map: a missing node may be in thousands of shards."""
        if not self._changes:
            return
        changes, self._changes = self._changes, []
        replica_ids = {change.shard.number: change.replica_ids for change in changes if change.replica_ids}

        def edit(old: ClusterMap) -> ClusterMap:
            new = old.with_replica_ids(replica_ids)
            removed: dict[str, list[int]] = {}
            for change in changes:
                # The store may have been slow, or have failed: is one of the good members still known to be good?
                number, good = change.shard.number, change.shard.good
                change.is_made = any(self._has(node, number, copy.replica_id) for node, copy in good.items())
                for node in change.removed if change.is_made else ():
                    removed.setdefault(node, []).append(number)
            for node, numbers in removed.items():
                new = new.without(numbers, node)
            return new

        def done(_: ClusterMap) -> None:
            for change in changes:
                self._changed(change)
            self._propose()

        self._proposals.propose(edit, done)

    def _changed(self, change: _RowChange) -> None:
        """Take a change that was stored."""
        shard = change.shard
        nodes = self._map.nodes_of(shard.number)
        if nodes != [link.node for link in self._sequencer.shards[shard.number].members]:
            self._sequencer.set_members(shard.number, nodes)
        for node, why in change.removed.items() if change.is_made else ():
            self._removed.setdefault(node, []).append((shard.number, why))
        shard.state = WAITING
        if shard.again:
            self._restart(shard)
        self._judge(shard)

    def _proceed(self, shard: _Shard) -> None:
        """Remove members, ship, repair or serve, now that the good members are known."""
        row = self._map.members[shard.number]
        if not shard.good:
            whys = [f"{node} {why}" for node, why in shard.bad.items()]
            whys += [f"{node} is missing" for node in shard.silent]
            self._down(shard, f"none of its members has its data: {'; '.join(whys)}")
            return
        self._membership.stop_repair(shard.number)
        if not self._choose_best(shard):
            return
        gone = shard.silent + [node for node in shard.bad if node in self._map.destroyed]
        gone += [node for node in shard.bad if node not in gone]
        gone = gone[: len(row) - self._map.min_insync]
        if gone:
            whys_gone = {node: f"it {shard.bad.get(node, 'did not report in time')}" for node in gone}
            self._change(shard, _RowChange(shard, removed=whys_gone))
        elif shard.silent:
            names = ", ".join(shard.silent)
            self._down(
                shard, f"{names} may have writes that the others lack, or not: it is waited for, as {len(row)} of its "
                "members are the fewest allowed",
            )  # fmt: skip
        elif shard.lagging():
            shard.state = SHIPPING
            self._queue.append(shard)
            self._start_some()
        else:
            self._repair_or_finish(shard)

    def _has(self, node: str, number: int, replica_id: str) -> bool:
        """Whether the node is linked and has this copy."""
        report = self._reports.get(node)
        copy = None if report is None else report.copies.get(number)
        return copy is not None and copy.replica_id == replica_id

    def _choose_best(self, shard: _Shard) -> bool:
        best = max(shard.good.values(), key=_order)
        shard.donors = [node for node, copy in shard.good.items() if _order(copy) == _order(best)]
        shard.differ = len({shard.good[node].chain for node in shard.donors}) > 1
        if shard.differ:
            names = ", ".join(shard.donors)
            why = f"its members differ: {names} end at number {best.seq} with different histories"
            self._outbox.alarm(f"shard {shard.number}: {why}")
            self._down(shard, why)
            return False
        if best.seq < shard.given:
            self._down(
                shard, f"numbers up to {shard.given} were given in this epoch, and {shard.donors[0]} has those up to "
                f"{best.seq}: restart the coordinator, which begins another epoch",
            )  # fmt: skip
            return False
        shard.seq, shard.chain = best.seq, best.chain
        for node, copy in list(shard.good.items()):
            if node not in shard.donors and copy.seq >= best.seq:
                self._is_bad(shard, node, f"has another history than {shard.donors[0]}: it ends in an older epoch")
        return True

    def _repair_or_finish(self, shard: _Shard) -> None:
        if shard.bad:
            shard.state = REPAIRING
            self._sequencer.equalized(shard.number, shard.seq, shard.bad)
            self._membership.repair(shard.number)
        else:
            self._finish(shard)

    def _finish(self, shard: _Shard) -> None:
        del self.shards[shard.number]
        self._sequencer.shards[shard.number].serve(shard.seq, shard.chain)
        self._membership.unsettled.add(shard.number)

    def _down(self, shard: _Shard, why: str) -> None:
        shard.state = DOWN
        known = self._sequencer.shards[shard.number]
        if known.reason != why:
            known.reason = why
            self._outbox.event("error", "shard-down", shard=shard.number, reason=why)

    # --- shipping -----------------------------------------------------------------------------------

    def _start_some(self) -> None:
        while self._queue and self._running < RECOVERY_SHARDS_MAX:
            self._running += 1
            self._next_target(self._queue.pop(0))

    def _next_target(self, shard: _Shard) -> None:
        """Bring the next member up to date, or end shipping."""
        shard.target = shard.lagging()
        if shard.target:
            self._fetch(shard)
            return
        self._leave_shipping(shard)
        self._repair_or_finish(shard)
        self._start_some()

    def _fetch(self, shard: _Shard) -> None:
        after = shard.good[shard.target].seq
        if not shard.donors:
            self._found_bad(shard, f"lacks what follows number {after}, and no member can ship it any more")
            return
        shard.awaited = (shard.donors[0], FETCH)
        self._outbox.send(shard.donors[0], (FETCH, shard.number, after))

    def _found_bad(self, shard: _Shard, why: str) -> None:
        """Judge the shard again: the target cannot be brought up to date."""
        shard.found[shard.target] = why
        self._leave_shipping(shard)
        shard.state = WAITING
        self._judge(shard)
        self._start_some()


def _order(copy: CopyReport) -> tuple[int, int]:
    """The rank of a good copy. The epoch counts first: uncommitted entries of an older one may be many."""
    return copy.epoch, copy.seq
