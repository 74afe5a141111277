"""Recovery: a coordinator finds out what the members of a shard have, and makes them equal before the shard is served.

Pure. Every shard begins here with a coordinator's epoch, each for itself, and goes to the sequencer when it is through;
one that is down stays here and is judged again when a node comes. The controller brings reports and answers in, and
does what is asked for: frames, changes of the map, learners.

    WAITING    for reports of its members, RECOVER_WAIT_MS at most; without limit while the cluster is being founded
    CHANGING   a change of its row in the map is on its way
    SHIPPING   good members that lag get the entries they lack
    REPAIRING  bad members that have to stay are replaced whole, each by a learner
    DOWN       too few members that could be made good; judged again when one of its nodes reports

1. A member is *bad* if its copy has another disk than the map says, or is not complete, or ends below a number that any
   member was told to be committed (R9). Whatever it holds is not looked at.
2. The best position is the highest (epoch, seq) of the good ones. Two good members with that position and different
   chains: the shard is down.
3. Silent and bad members are removed from the map, never below `min_insync`, and none before a good one has answered
   (R6). A silent one that has to stay keeps the shard down, unless an operator declared its node destroyed.
4. A good member that ends earlier gets the entries that follow, fetched from one at the best position, if that one's
   chain at the place where they join is the same; else it is bad. They keep their epoch and stamp. What nobody was ever
   answered about may so become committed, which is right: it may have happened.
5. A bad member that has to stay is brought whole to the best copy, and enters the map under its new disk; only then the
   shard is served. Committed is what the best has.

Two exceptions, in which new disks enter the map at once: a shard in which nothing was ever written is as complete in an
empty copy as in any other; and if the last run kept its data in memory and all members are new and empty, they are what
the end of that run has left, and the shard begins anew.

A shard that was served comes back here when all its members have lost their data, or are destroyed. What is good of it
may come still; but a number that was given in this epoch is not given to another entry in it. So one that was kept in
memory begins anew above them, and one of which a copy with less comes is down until the next epoch.

If the link of a member breaks, its shard starts over; what was shipped stays shipped, and what is on its way to be
is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from kvtcp.constants import RECOVER_WAIT_MS, RECOVERY_SHARDS_MAX
from kvtcp.protocol.link import FETCH, SHIP, CopyReport, Report
from kvtcp.replication.cluster_map import LOST_DISK, ClusterMap
from kvtcp.replication.learner import is_entry
from kvtcp.replication.progress import LinkError

LOST_DATA: Final = "came back without its data"
UNKNOWN_COPY: Final = "may lack writes: the cluster map, which said whether it does, was lost"

WAITING: Final = "waiting"
CHANGING: Final = "changing"
SHIPPING: Final = "shipping"
REPAIRING: Final = "repairing"
DOWN: Final = "down"

Edit = Callable[[ClusterMap], ClusterMap]


class StaleStore(Exception):
    """The config store does not know what the nodes know: it was lost, or replaced by an older copy."""


class Surroundings(Protocol):
    """What a recovery needs of the controller."""

    now_ms: int
    reports: dict[str, Report]  # of the nodes that are linked, with what changed since

    @property
    def map(self) -> ClusterMap:
        """As the config store holds it."""

    def propose_rows(self, numbers: Iterable[int], edit: Edit, done: Callable[[], None]) -> None:
        """Change these rows of the map; `done` when that is stored."""

    def row_changed(self, number: int) -> None:
        """That is stored: these are its members now, though it is not served yet."""

    def send_to(self, node: str, frame: tuple[Any, ...]) -> None:
        """Send a frame to a node that reported."""

    def recovered(self, number: int, seq: int, chain: int) -> None:
        """All members are equal: serve the shard."""

    def repair(self, number: int, seq: int, bad: Mapping[str, str]) -> None:
        """Replace these members by learners, then call `repaired`, or `begin` if a link broke meanwhile."""

    def repair_in_flight(self, number: int) -> bool:
        """Whether a change of the map for such a member is on its way."""

    def stop_repair(self, number: int) -> None:
        """Replace none of its members: the recovery begins anew, or goes on without an accepted loss."""

    def is_down(self, number: int, why: str) -> None:
        """The shard cannot be served now."""

    def alarm(self, sentence: str) -> None:
        """What should never be seen."""

    def began_empty(self, number: int) -> None:
        """The data of a run in memory is gone."""

    def begin_empty(self, number: int, given: int) -> None:
        """A member begins empty with the numbers above `given`; then the shard is judged anew."""


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

    def __init__(self, number: int) -> None:
        self.number = number
        self.state = WAITING
        self.since_ms: int | None = None  # when the wait for reports began; None = at the next look
        self.again = False  # while a change of the map is on its way: a link broke, start over after it
        self.differ = False  # DOWN because good members have different histories
        self.given = 0  # last number that was given in this epoch, which must not be given to other entries in it
        self.found: dict[str, str] = {}  # members found bad while shipping, and why
        self.good: dict[str, CopyReport] = {}
        self.bad: dict[str, str] = {}
        self.silent: list[str] = []
        self.donors: list[str] = []  # members at the best position that were not found unable to ship
        self.seq = 0  # the best position
        self.chain = 0
        self.target = ""  # member that is being brought up to date; empty = none
        self.awaited: tuple[str, int] = ("", 0)  # who has to answer, and the kind of frame it was sent
        # Members that were sent entries and did not say yet what they have now. They get them, whatever becomes of this
        # shard meanwhile, so it is not judged by what they had before.
        self.unanswered: list[str] = []

    def lagging(self) -> str:
        """A good member that is not at the best position, empty if there is none."""
        return next((node for node, copy in self.good.items() if copy.seq != self.seq), "")


@dataclass
class _Change:
    """A change of one shard's row: new disks of members, or members that are removed, and why."""

    shard: _Shard
    disks: dict[str, str] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    is_made: bool = True  # the members were removed indeed


class Recovery:
    """The shards that are not served."""

    def __init__(self, around: Surroundings, numbers: Iterable[int]) -> None:
        self._around = around
        self.shards = {number: _Shard(number) for number in numbers}
        self._queue: list[_Shard] = []  # SHIPPING, and waiting for their turn
        self._running = 0  # SHIPPING, and in their turn
        self._changes: list[_Change] = []  # of this step, not proposed yet
        self._removed: dict[str, list[tuple[int, str]]] = {}  # node -> shards it was removed from and why, to be told

    @property
    def is_settled(self) -> bool:
        """Whether every shard that is not served waits for something that may take long."""
        return all(shard.state in (DOWN, REPAIRING) for shard in self.shards.values())

    def take_back(self, number: int, given: int) -> None:
        """A shard that was served has no good member any more; `given` is the last number that was given to it."""
        shard = self.shards[number] = _Shard(number)
        shard.given = given

    def begin(self, number: int) -> None:
        """A shard starts over: a member of it was replaced, or it is down and is judged anew."""
        self._restart(self.shards[number])
        self._start_some()
        self._propose()

    def must_restart(self, number: int) -> bool:
        """Whether a link of it broke while a change of the map was on its way."""
        return self.shards[number].again

    def take_removed(self) -> dict[str, list[tuple[int, str]]]:
        """Which nodes were removed from which shards, and why, since this was asked last."""
        removed, self._removed = self._removed, {}
        return removed

    # --- events -------------------------------------------------------------------------------------

    def on_report(self, node: str) -> None:
        """A node was linked."""
        for shard in self._of(node):
            if shard.state == DOWN:
                shard.state = WAITING
                shard.since_ms = self._around.now_ms
            shard.found.pop(node, None)
            shard.unanswered = [each for each in shard.unanswered if each != node]
            self._judge(shard)
        self._propose()

    def on_lost(self, node: str) -> None:
        """A node that had reported was lost."""
        for shard in self.shards.values():
            shard.unanswered = [each for each in shard.unanswered if each != node]
        for shard in self._of(node):
            self._restart(shard)
        self._start_some()  # not before all of them gave up their turns: the node is gone
        self._propose()

    def tick(self) -> None:
        """Time passed."""
        for shard in list(self.shards.values()):
            if shard.state == WAITING:
                self._judge(shard)
        self._propose()

    def repaired(self, number: int) -> None:
        """All members that were to be replaced are."""
        shard = self.shards[number]
        assert shard.state == REPAIRING and not shard.again, "only a shard under repair is repaired"
        self._finish(shard)

    def on_entries(self, node: str, number: int, after: int, chain: int | None, entries: Any) -> None:
        """An ENTRIES frame. What was not asked for is not looked at. Raises LinkError if it is none."""
        self._take_entries(node, number, after, chain, entries)
        self._propose()

    def on_shipped(self, node: str, number: int, epoch: int, seq: int, chain: int, error: bytes | None) -> None:
        """A SHIPPED frame. Raises LinkError if it cannot be true."""
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
            shard.donors.remove(node)  # it does not have them any more; another one may
            self._fetch(shard)
            return
        if not (type(entries) is list and all(map(is_entry, entries))):
            raise LinkError(f"{node} sent entries of shard {number} that are none")
        if chain is not None and chain != copy.chain:  # one that does not know it: the receiver checks the first entry
            self._found_bad(shard, f"has another history than {node}: they differ at number {after} or before")
            return
        shard.awaited = (target, SHIP)
        shard.unanswered.append(target)
        self._around.send_to(target, (SHIP, number, entries))

    def _take_shipped(self, node: str, number: int, epoch: int, seq: int, chain: int, error: bytes | None) -> None:
        shard = self.shards[number]
        if node not in shard.unanswered:
            return  # to a learner
        shard.unanswered.remove(node)
        before = self._around.reports[node].copies[number]
        self._around.reports[node].copies[number] = before._replace(epoch=epoch, seq=seq, chain=chain)
        if shard.state != SHIPPING or shard.awaited != (node, SHIP):
            self._judge(shard)  # it was waited for, if anybody waits
            return
        if error is not None:
            self._found_bad(shard, f"cannot take what it lacks: {error.decode('utf-8', 'replace')}")
        elif not shard.good[node].seq < seq <= shard.seq:
            raise LinkError(f"{node} has shard {number} up to {seq}, which it was not sent")
        elif seq == shard.seq and chain != shard.chain:
            self._found_bad(
                shard, f"has another history than {shard.donors[0]}: they differ at number {seq} or before"
            )
        else:
            shard.good[node] = self._around.reports[node].copies[number]
            if seq < shard.seq:
                self._fetch(shard)
            else:
                self._next_target(shard)

    # --- judging ------------------------------------------------------------------------------------

    def _of(self, node: str) -> list[_Shard]:
        members = self._around.map.members
        return [
            shard for shard in list(self.shards.values()) if any(each == node for each, _ in members[shard.number])
        ]

    def _restart(self, shard: _Shard) -> None:
        if shard.state == CHANGING or (shard.state == REPAIRING and self._around.repair_in_flight(shard.number)):
            shard.again = True
            return
        if shard.state == REPAIRING:
            self._around.stop_repair(shard.number)
        shard.again = False
        self._leave_shipping(shard)
        shard.state = WAITING
        shard.since_ms = self._around.now_ms
        shard.found.clear()

    def _leave_shipping(self, shard: _Shard) -> None:
        if shard.state == SHIPPING:
            if shard in self._queue:
                self._queue.remove(shard)
            else:
                self._running -= 1
            shard.awaited = ("", 0)

    def _judge(self, shard: _Shard) -> None:
        """Look at the reports of a shard that is WAITING, and go on as far as they allow."""
        around = self._around
        if shard.state != WAITING or around.repair_in_flight(shard.number):
            return  # an accepted loss is being stored: it begins anew after that
        if shard.unanswered:
            return
        if shard.since_ms is None:
            shard.since_ms = around.now_ms
        row = around.map.members[shard.number]
        reports, destroyed = around.reports, around.map.destroyed
        shard.silent = [node for node, _ in row if node not in reports and node not in destroyed]
        is_founding = any(not disk for _, disk in row)
        if shard.silent and (is_founding or around.now_ms < shard.since_ms + RECOVER_WAIT_MS):
            return
        shard.good, shard.bad, empty, hint = {}, {}, {}, 0
        for node, disk in row:
            copy = reports[node].copies.get(shard.number) if node in reports else None
            if node in destroyed:
                shard.bad[node] = "was declared destroyed"
            elif node in shard.silent:
                continue
            elif copy is None:
                shard.bad[node] = "has no copy of it"
            elif copy.disk != disk:
                if copy.complete and not copy.seq:
                    empty[node] = copy.disk
                elif not disk:
                    raise StaleStore(f"node {node} has data of shard {shard.number}, the cluster map knows of none")
                shard.bad[node] = UNKNOWN_COPY if disk == LOST_DISK and copy.seq else foreign_copy(copy)
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
                around.alarm(f"{node} {shard.bad[node]} in shard {shard.number}")
        if not self._adopt_empty(shard, empty, len(row)):
            self._go_on(shard)

    def _is_bad(self, shard: _Shard, node: str, why: str) -> None:
        shard.bad[node] = why
        shard.good.pop(node, None)

    def _adopt_empty(self, shard: _Shard, empty: Mapping[str, str], size: int) -> bool:
        """The exceptions for empty copies; true if a change of the map is on its way."""
        around = self._around
        is_founding = any(not disk for _, disk in around.map.members[shard.number])
        never_written = bool(shard.good) and all(copy.seq == 0 for copy in shard.good.values())
        ended = len(empty) == size and not is_founding and around.map.durability == "memory"
        if not empty or not (never_written or ended or (is_founding and len(empty) == size)):
            return False
        if ended:
            around.began_empty(shard.number)
            if shard.given:  # not with the same numbers again in the same epoch
                shard.state = DOWN
                around.begin_empty(shard.number, shard.given)
                return True
        self._change(shard, _Change(shard, disks=dict(empty)))
        return True

    def _change(self, shard: _Shard, change: _Change) -> None:
        """Change the row of the shard, with others in this step, and judge it again."""
        self._around.stop_repair(shard.number)
        shard.state = CHANGING
        self._changes.append(change)

    def _propose(self) -> None:
        """The changes of this step are one change of the map: a missing node may be one in thousands of shards."""
        if not self._changes:
            return
        changes, self._changes = self._changes, []
        disks = {change.shard.number: change.disks for change in changes if change.disks}

        def edit(old: ClusterMap) -> ClusterMap:
            new = old.with_disks(disks)
            removed: dict[str, list[int]] = {}
            for change in changes:
                # The store may have taken its time, or have failed: is one of the good members still known to be good?
                change.is_made = any(
                    self._has(node, change.shard.number, copy.disk) for node, copy in change.shard.good.items()
                )
                for node in change.removed if change.is_made else ():
                    removed.setdefault(node, []).append(change.shard.number)
            for node, numbers in removed.items():
                new = new.without(numbers, node)
            return new

        def done() -> None:
            for change in changes:
                self._changed(change)
            self._propose()

        self._around.propose_rows([change.shard.number for change in changes], edit, done)

    def _changed(self, change: _Change) -> None:
        """It is stored."""
        shard = change.shard
        self._around.row_changed(shard.number)
        for node, why in change.removed.items() if change.is_made else ():
            self._removed.setdefault(node, []).append((shard.number, why))
        shard.state = WAITING
        if shard.again:
            self._restart(shard)
        self._judge(shard)

    def _go_on(self, shard: _Shard) -> None:
        """Who is good is known: remove, ship, repair or serve."""
        around = self._around
        row = around.map.members[shard.number]
        if not shard.good:
            whys = [f"{node} {why}" for node, why in shard.bad.items()]
            whys += [f"{node} is missing" for node in shard.silent]
            self._down(shard, f"none of its members has its data: {'; '.join(whys)}")
            return
        around.stop_repair(shard.number)
        if not self._choose_best(shard):
            return
        gone = shard.silent + [node for node in shard.bad if node in around.map.destroyed]
        gone += [node for node in shard.bad if node not in gone]
        gone = gone[: len(row) - around.map.min_insync]
        if gone:
            whys_gone = {node: f"it {shard.bad.get(node, 'did not report in time')}" for node in gone}
            self._change(shard, _Change(shard, removed=whys_gone))
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

    def _has(self, node: str, number: int, disk: str) -> bool:
        """Whether the node is linked, and has this copy."""
        report = self._around.reports.get(node)
        copy = None if report is None else report.copies.get(number)
        return copy is not None and copy.disk == disk

    def _choose_best(self, shard: _Shard) -> bool:
        best = max(shard.good.values(), key=_order)
        shard.donors = [node for node, copy in shard.good.items() if _order(copy) == _order(best)]
        shard.differ = len({shard.good[node].chain for node in shard.donors}) > 1
        if shard.differ:
            names = ", ".join(shard.donors)
            why = f"its members differ: {names} end at number {best.seq} with different histories"
            self._around.alarm(f"shard {shard.number}: {why}")
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
            self._around.repair(shard.number, shard.seq, shard.bad)
        else:
            self._finish(shard)

    def _finish(self, shard: _Shard) -> None:
        del self.shards[shard.number]
        self._around.recovered(shard.number, shard.seq, shard.chain)

    def _down(self, shard: _Shard, why: str) -> None:
        shard.state = DOWN
        self._around.is_down(shard.number, why)

    # --- shipping -----------------------------------------------------------------------------------

    def _start_some(self) -> None:
        while self._queue and self._running < RECOVERY_SHARDS_MAX:
            self._running += 1
            self._next_target(self._queue.pop(0))

    def _next_target(self, shard: _Shard) -> None:
        """Bring the next member up to date, or be done with shipping."""
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
        self._around.send_to(shard.donors[0], (FETCH, shard.number, after))

    def _found_bad(self, shard: _Shard, why: str) -> None:
        """The target cannot be brought up to date: judge the shard again with that."""
        shard.found[shard.target] = why
        self._leave_shipping(shard)
        shard.state = WAITING
        self._judge(shard)
        self._start_some()


def _order(copy: CopyReport) -> tuple[int, int]:
    """Which of two good copies is the better one. The epoch counts first: what an older one left behind may be long."""
    return copy.epoch, copy.seq
