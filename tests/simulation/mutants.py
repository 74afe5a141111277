"""Mutants: small wrong versions of the cores and of what a node does with its disk. The simulation finds each.

    python -m tests.simulation.mutants [PART OF A NAME] [--seeds N] [--record]        also `make mutants`

A simulation that finds nothing proves nothing. Each mutant takes one rule away, most of them as the mutants of the
explicit-state model do. The search runs seeds until one has a violation; `--record` keeps the first one in FOUND_FILE,
which tests/simulation/test_mutants.py runs again. The cores' own checks are off meanwhile: the oracles have to see it.

What is not here is found elsewhere: sync of a directory, truncation at a bad checksum (test_crash_enumeration), cut of
a backup (test_backup), reads that a new disk confirms (test_confirm), kept entries of another copy (test_backlog).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack

from kvtcp.cluster.changes import MapChanges
from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.store import Outcome
from kvtcp.errors import Code
from kvtcp.node.core import NodeCore
from kvtcp.node.replica import Replicas
from kvtcp.protocol.link import BATCH, LEARNED, SHIPPED, STOP
from kvtcp.replication import ownership
from kvtcp.replication.controller import Controller
from kvtcp.replication.membership import learner, recovery
from kvtcp.replication.membership.insync import Membership
from kvtcp.replication.membership.learner import Learner
from kvtcp.replication.membership.recovery import Recovery
from kvtcp.replication.ownership import Ownership
from kvtcp.replication.sequencing.confirm import ConfirmingSequencer
from kvtcp.replication.sequencing.link import Batch
from kvtcp.replication.sequencing.requests import NUMBER
from kvtcp.replication.sequencing.sequencer import Sequencer
from kvtcp.replication.sequencing.shard import Shard, answer_write
from kvtcp.storage.shard.table import Table
from tests.simulation.clients import Client
from tests.simulation.coordinator import SimCoordinator
from tests.simulation.disk import NodeDisk
from tests.simulation.node import SimNode
from tests.simulation.run import Result, Simulation, run_seed

SEEDS = 2_000  # each mutant is found within so many
FOUND_FILE = Path(__file__).parent / "found.json"  # mutant -> seed

Patcher = Callable[["Patches"], None]


class Patches:
    """Attributes that a mutant replaces, until the stack is closed."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def put(self, owner: Any, name: str, value: Any) -> Any:
        """Put this in the place of an attribute; returns what was there."""
        before = getattr(owner, name)
        self._stack.enter_context(mock.patch.object(owner, name, value))
        return before


@dataclass(frozen=True)
class Mutant:
    """`rule` is what it breaks."""

    name: str
    rule: str
    patch: Patcher
    fixed: dict[str, Any]  # what of a run is not drawn, so that it does not take too many of them


MUTANTS: dict[str, Mutant] = {}


def mutant(rule: str, **fixed: Any) -> Callable[[Patcher], Patcher]:
    """Make the function a mutant of its own name."""

    def register(patch: Patcher) -> Patcher:
        MUTANTS[patch.__name__] = Mutant(patch.__name__, rule, patch, fixed)
        return patch

    return register


class Unchecked(Simulation):
    """The cores do not look at themselves."""

    def _check_core(self, coordinator: SimCoordinator) -> None:
        """Nothing."""


@contextlib.contextmanager
def patched(name: str) -> Iterator[None]:
    """Run with this mutant in the place of the cores."""
    with contextlib.ExitStack() as stack:
        MUTANTS[name].patch(Patches(stack))
        yield


def run_with(name: str, seed: int) -> Result:
    """Run a seed with a mutant."""
    with patched(name):
        result = run_seed(seed, Unchecked, **MUTANTS[name].fixed)
    if result.violation.startswith(("TypeError", "AttributeError", "NameError")):  # it does not fit the cores any more
        raise AssertionError(f"{name} is wrong in another way than it should: {result.violation}")
    return result


# --- R1: commit -----------------------------------------------------------------------------------------


@mutant("R1")
def commit_on_minimum(patches: Patches) -> None:
    """Committed is what min_insync members have."""

    def acknowledged(self: Any, link: Any, seq: int) -> None:
        if link in self.learners or seq <= self.acked.get(link, seq):
            before(self, link, seq)
            return
        self.acked[link] = seq
        commit = sorted(self.acked.values())[-self.cluster.min_insync]
        if commit > self.commit:
            self.commit_to(commit)

    before = patches.put(Shard, "acknowledged", acknowledged)


@mutant("R1")
def answers_when_applied(patches: Patches) -> None:
    """A write counts as durable when it is applied."""

    def on_results(self: Any, node: str, applied: int, durable: int, results: Any, flags: Any) -> None:
        before(self, node, applied, applied, results, flags)

    before = patches.put(Sequencer, "on_results", on_results)


# --- R2, R3, R4: changes of the map -----------------------------------------------------------------------


@mutant("R2")
def ack_before_cas(patches: Patches) -> None:
    """A member is dropped from E first, and then from the map."""

    def evict(self: Any, link: Any, shards: Any, why: str, *rest: Any) -> int:
        leaving = [shard for shard in shards if self.may_leave(shard, link)]
        if leaving:
            numbers = [shard.number for shard in leaving]
            self.changing.update(numbers)
            self._sequencer.leave(leaving, link)
            edit = partial(_without, numbers, link.node)
            self._proposals.propose(edit, lambda _: self.changing.difference_update(numbers))
        return len(leaving)

    patches.put(Membership, "evict", evict)


def _without(numbers: list[int], node: str, old: ClusterMap) -> ClusterMap:
    return old.without(numbers, node)


def _grow_late(patches: Patches, on_unknown: bool) -> None:
    """A learner is one of E when that is stored; with `on_unknown` until its outcome is not known."""

    def learner_is_live(self: Any, one: Learner) -> None:
        shard, number = one.shard, one.shard.number
        if one.replaces is not None:
            before(self, one)
            return
        if one.proposed or number in self.changing or one.following.acked < shard.commit:
            return
        one.proposed = True
        node, disk = one.link.node, one.following.replica_id
        self.changing.add(number)
        if on_unknown:
            self._sequencer.join(shard, one.link)

        def stored(_: Any = None) -> None:
            self.changing.discard(number)
            if not on_unknown and one.link in shard.learners:
                one.following.acked = max(one.following.acked, shard.commit)
                self._sequencer.join(shard, one.link)

        def failed(_: Any) -> None:
            self.changing.discard(number)
            if one.link in shard.acked:
                self._sequencer.leave([shard], one.link)

        edit = partial(_joined, number, node, disk)
        self._proposals._changes.propose(edit, stored, failed if on_unknown else None)

    before = patches.put(Membership, "_learner_is_live", learner_is_live)


def _joined(number: int, node: str, disk: str, old: ClusterMap) -> ClusterMap:
    return old.with_member(number, node, disk)


@mutant("R2")
def expand_late(patches: Patches) -> None:
    """A learner is one of E only when the map says so."""
    _grow_late(patches, on_unknown=False)


@mutant("R2")
def unchanged_read_settles_cas(patches: Patches) -> None:
    """A change whose outcome is not known is taken for one that was not made."""
    _grow_late(patches, on_unknown=True)

    def on_outcome(self: Any, outcome: Outcome, stored: Any = None, *, now_ms: int) -> None:
        if outcome is Outcome.UNKNOWN and self._flight.changes[0].failed is not None:
            self.on_failed(OSError("it is still the old one"), now_ms=now_ms)
        else:
            before(self, outcome, stored, now_ms=now_ms)

    before = patches.put(MapChanges, "on_outcome", on_outcome)


@mutant("R2")
def join_before_committed(patches: Patches) -> None:
    """A learner joins before it has everything committed."""

    def learner_is_live(self: Any, one: Learner) -> None:
        following = one.following
        behind, following.acked = following.acked, max(following.acked, one.shard.commit)
        before(self, one)
        if one.link in one.shard.acked:
            one.shard.acked[one.link] = max(behind, one.shard.commit)

    before = patches.put(Membership, "_learner_is_live", learner_is_live)

    def on_learn(self: Any, result: Any) -> None:
        on_learn_before(self, result)
        if result is not None and not self.fresh and not self.replaces:
            self.phase = learner.LIVE
            self.following.acked = self.seq
            self._on_live(self)

    on_learn_before = patches.put(Learner, "_on_learn", on_learn)


@mutant("R2")
def learner_counts_before_live(patches: Patches) -> None:
    """What a learner has set aside counts as acknowledged."""

    def acknowledged(self: Any, seq: int) -> None:
        self.phase = learner.LIVE
        self.following.acked = max(self.following.acked, seq)
        if self.following.replica_id:
            self._on_live(self)

    patches.put(Learner, "acknowledged", acknowledged)


@mutant("I7")
def two_leave_at_once(patches: Patches) -> None:
    """A member takes the last one of the row along when it leaves."""

    def evict(self: Any, link: Any, shards: Any, why: str, *rest: Any) -> int:
        shards = list(shards)
        for shard in shards:
            other = shard.members[-1] if shard.members else link
            may_both = len(shard.members) > self._map.min_insync + 1
            if other is not link and may_both and self.may_leave(shard, link):
                number = shard.number
                self.changing.add(number)
                self._proposals.propose(
                    lambda old: old.without([number], link.node).without([number], other.node),  # noqa: B023
                    partial(_left, self, shard, link, other),
                )
                return 1
        return int(before(self, link, shards, why, *rest))

    before = patches.put(Membership, "evict", evict)


def _left(membership: Any, shard: Shard, *rest: Any) -> None:
    membership.changing.discard(shard.number)
    for link in rest[:-1]:  # behind them is the map
        membership._sequencer.leave([shard], link)


@mutant("R9", factor=2, min_insync=2, liveness=True, mode="sync", kinds=("destroy_node", "cut"))
def destroyed_never_replaced(patches: Patches) -> None:
    """A destroyed member that cannot leave is waited for."""
    patches.put(Membership, "_substitute", lambda self, shard, gone: None)


@mutant("R9", factor=3, min_insync=3, mode="sync", kinds=("destroy_node", "slow_disk", "kill_node"))
def replacement_before_committed(patches: Patches) -> None:
    """What takes the place of a member enters the map before it has everything committed."""

    def on_learn(self: Any, result: Any) -> None:
        before(self, result)
        if result is not None and self.replaces is not None:
            self.phase, self.following.acked = learner.LIVE, max(self.seq, self.shard.commit)
            self._on_live(self)

    before = patches.put(Learner, "_on_learn", on_learn)


@mutant("R3")
def cas_no_epoch(patches: Patches) -> None:
    """Who finds that the map was changed by somebody else makes its change all the same."""

    def on_outcome(self: Any, outcome: Outcome, stored: Any = None, *, now_ms: int) -> None:
        if outcome is Outcome.CONFLICT and stored is not None and not self._flight.is_unsure:
            flight, self._flight = self._flight, None
            self._map = ClusterMap.from_json(stored.value)
            self.store_version = stored.version
            self._waiting[:0] = flight.changes
        else:
            before(self, outcome, stored, now_ms=now_ms)

    before = patches.put(MapChanges, "on_outcome", on_outcome)


@mutant("R4")
def isr_below_minimum(patches: Patches) -> None:
    """The last members may leave too."""

    def without(self: Any, shards: Any, node: str) -> ClusterMap:
        rows = {shard: [each for each in self.members[shard] if each[0] != node] for shard in shards}
        return self._with_rows(rows)  # type: ignore[no-any-return]

    def may_leave(self: Any, shard: Shard, link: Any) -> bool:
        return (
            shard.serving and shard.number not in self.changing and link in shard.acked and len(shard.members) > 1
            and any(other is not link and other.connected for other in shard.good)
        )  # fmt: skip

    patches.put(ClusterMap, "without", without)
    patches.put(ClusterMap, "check", lambda self: None)
    patches.put(Membership, "may_leave", may_leave)


# --- R5: fencing --------------------------------------------------------------------------------------------


@mutant("R5")
def report_no_fence(patches: Patches) -> None:
    """A report promises nothing; the first batch does."""

    def hello(self: Any, fields: Any) -> Any:
        promise = (self.promised, self.coordinator)
        report = hello_before(self, fields)
        self.next_promise = (self.promised, self.coordinator)
        if promise[1]:
            self.promised, self.coordinator = promise
        return report

    def begin(self: Any, *batch: Any) -> None:
        self.promised, self.coordinator = getattr(self, "next_promise", (self.promised, self.coordinator))
        begin_before(self, *batch)

    hello_before = patches.put(Replicas, "hello", hello)
    begin_before = patches.put(Replicas, "begin", begin)


@mutant("R5")
def no_node_epoch_check(patches: Patches) -> None:
    """A node takes a HELLO of an epoch that is over."""

    def hello(self: Any, fields: Any) -> Any:
        promise = (self.promised, self.coordinator)
        self.promised, self.coordinator = 0, ""
        report = before(self, fields)
        self.promised, self.coordinator = max(promise, (self.promised, self.coordinator))
        return report | {"promised": self.promised}

    before = patches.put(Replicas, "hello", hello)


@mutant("R5", shared=True, factor=2, mode="sync", kinds=("split", "rival", "kill_node", "pause_coordinator"))
def epoch_volatile(patches: Patches) -> None:
    """The promise does not survive the process."""

    def remember(self: Any, promise: Any, copies: Any, generations: Any) -> None:
        before(self, (0, "", promise[2]), copies, generations)

    before = patches.put(NodeDisk, "_remember", remember)
    patches.put(SimNode, "start", _forgetting_promises(SimNode.start))


def _forgetting_promises(start: Callable[[SimNode], None]) -> Callable[[SimNode], None]:
    def started(self: SimNode) -> None:
        self.oracles.forgot(self.name)  # a later symptom is to be found: two coordinators at once
        start(self)

    return started


@mutant("R5")
def older_links_go_on(patches: Patches) -> None:
    """What an older link sent is applied after the report to the next one."""

    def replace_link(self: Any, link: Any, number: int) -> None:
        older = self.link
        left = [] if older is None or older.running else [frame for frame in older.inbox if frame[0] == BATCH]
        before(self, link, number)
        link.inbox.extendleft(reversed(left))

    def run(self: Any, link: Any) -> None:
        rng = self._process.world.rng
        if rng.random() < 0.5:  # a busy node: what arrives lies in its inbox for a while
            self._process.later(rng.randrange(1, 6), lambda: run_before(self, link) if link is self.link else None)
        else:
            run_before(self, link)

    before = patches.put(NodeCore, "_replace_link", replace_link)
    run_before = patches.put(NodeCore, "run", run)


@mutant("R5")
def link_number_not_checked(patches: Patches) -> None:
    """A HELLO that was late takes the place of the link that its coordinator made after it."""
    patches.put(NodeCore, "_older_link", lambda self, epoch, number: None)


# --- R6, R9: recovery -----------------------------------------------------------------------------------------


@mutant("R6")
def recover_from_any(patches: Patches) -> None:
    """A shard is served with the members that answered; the others are not waited for, and stay."""

    def judge(self: Any, shard: Any) -> None:
        proposals, reports = self._proposals, self._reports
        rows = list(proposals.map.members)
        row = rows[shard.number]
        heard = tuple(member for member in row if member[0] in reports)
        copies = {node: reports[node].copies.get(shard.number) for node, _ in heard}
        good = [node for node, disk in heard if copies[node] is not None and copies[node].replica_id == disk]
        if shard.state == recovery.WAITING and good and len(heard) < len(row) and all(disk for _, disk in row):
            rows[shard.number] = heard
            with mock.patch.object(type(proposals), "map", _with_rows(proposals.map, rows)):
                before(self, shard)
        else:
            before(self, shard)

    before = patches.put(Recovery, "_judge", judge)


def _with_rows(cluster_map: ClusterMap, rows: Any) -> ClusterMap:
    return cluster_map._with_rows(dict(enumerate(rows)))


@mutant("R6")
def serve_before_catchup(patches: Patches) -> None:
    """A shard is served when the best member is known."""
    patches.put(recovery._Shard, "lagging", lambda self: "")


@mutant("R6")
def swap_in_recovery(patches: Patches) -> None:
    """A member that stays silent is taken for destroyed, and another node learns in its place."""

    def down(self: Any, shard: Any, why: str) -> None:
        before(self, shard, why)
        if shard.silent and shard.good:
            node = shard.silent[0]
            self._proposals.propose(lambda old: old.with_destroyed(node), lambda _: self.begin(shard.number))

    before = patches.put(Recovery, "_down", down)


@mutant("R6", min_insync=1, factor=2, mode="sync", kinds=("wipe_node", "kill_coordinator", "partition", "kill_node"))
def remove_last_good(patches: Patches) -> None:
    """A silent member is removed before a good one has answered."""

    def down(self: Any, shard: Any, why: str) -> None:
        row = self._map.members[shard.number]
        if not shard.good and shard.bad and shard.silent and len(row) > self._map.min_insync:
            node, number = shard.silent[0], shard.number
            self._proposals.propose(lambda old: old.without([number], node), lambda _: self.begin(number))
        else:
            before(self, shard, why)

    before = patches.put(Recovery, "_down", down)


@mutant("R6", factor=2, min_insync=1, mode="sync", kinds=("kill_coordinator", "kill_node", "slow_disk"))
def judged_while_shipping(patches: Patches) -> None:
    """A shard that starts over is judged by what its members had before they were sent entries."""

    def judge(self: Any, shard: Any) -> None:
        shard.unanswered = []
        before(self, shard)

    before = patches.put(Recovery, "_judge", judge)


@mutant("R5")
def report_before_durable(patches: Patches) -> None:
    """A node reports what it has in memory."""

    def report_when_durable(self: Any, link: Any, report: Any) -> None:
        self._report(link, report)
        self.persistence.remember(self.replica, lambda: None)

    patches.put(NodeCore, "_report_when_durable", report_when_durable)


@mutant("R9")
def amnesia(patches: Patches) -> None:
    """A copy that lost its tail with the power is the same copy."""

    def lose_tail(self: Any) -> None:
        names = {shard: stored.disk for shard, stored in self.manifest.copies.items()}
        before(self)
        for shard, name in names.items():
            self.manifest.copies[shard].disk = name
            self.archive[name] = self.manifest.copies[shard]

    before = patches.put(NodeDisk, "_lose_tail", lose_tail)


@mutant("R9")
def wiped_member_is_good(patches: Patches) -> None:
    """A member is known by its node, whatever disk it has."""

    def node_up(self: Any, node: str, report: Any) -> None:
        for shard, copy in list(report.copies.items()):
            disk = dict(self.map.members[shard]).get(node)
            if disk:
                report.copies[shard] = copy._replace(replica_id=disk)
        before(self, node, report)

    before = patches.put(Controller, "node_up", node_up)


@mutant("R9", liveness=True, mode="sync", factor=2, min_insync=2, kinds=("wipe_node", "kill_coordinator", "cut"))
def bad_member_never_kept(patches: Patches) -> None:
    """A bad member that cannot be removed is waited for, for ever."""
    patches.put(Membership, "repair", lambda self, number: None)


@mutant("R9")
def new_disk_before_resync(patches: Patches) -> None:
    """The new disk of a bad member enters the map before its data is there."""

    def adopt_empty(self: Any, shard: Any, empty: Any, size: int) -> bool:
        if empty and shard.good:
            self._change(shard, recovery._RowChange(shard, replica_ids=dict(empty)))
            return True
        return bool(before(self, shard, empty, size))

    before = patches.put(Recovery, "_adopt_empty", adopt_empty)


@mutant("R9")
def new_disk_before_map(patches: Patches) -> None:
    """What takes the place of a bad member counts before the map says so."""

    def learner_is_live(self: Any, one: Learner) -> None:
        was = one.proposed
        before(self, one)
        if one.proposed and not was and one.replaces is not None and one.shard.serving:
            sequencer = self._sequencer
            sequencer.swap(one.shard, sequencer.links[one.replaces], one.link)

    before = patches.put(Membership, "_learner_is_live", learner_is_live)

    def swap(self: Any, shard: Shard, old: Any, link: Any) -> None:
        if link in shard.learners:
            swap_before(self, shard, old, link)

    swap_before = patches.put(Sequencer, "swap", swap)


@mutant("R9")
def reconnect_by_position(patches: Patches) -> None:
    """A node that reconnects is judged by its position, whatever disk it has."""

    def why_bad(self: Any, link: Any, copy: Any) -> str:
        disk = self.joining.get(link) or dict(self.cluster.map.members[self.number]).get(link.node)
        if copy is not None and disk:
            copy = copy._replace(replica_id=disk)
        return str(before(self, link, copy))

    before = patches.put(Shard, "why_bad", why_bad)


# --- R7, R8: logs ------------------------------------------------------------------------------------------------


@mutant("R7", shared=True, mode="sync", factor=3, kinds=("split", "rival", "partition", "cut", "slow_disk"))
def seq_only(patches: Patches) -> None:
    """Histories are told apart by numbers alone."""

    def on_entries(self: Any, node: str, after: int, chain: Any, entries: Any) -> None:
        before(self, node, after, self._chain if chain is not None else None, entries)

    before = patches.put(Learner, "on_entries", on_entries)


@mutant("R8")
def operations_shipped(patches: Patches) -> None:
    """What is shipped is evaluated again, with the epoch and the stamp of the node."""

    def ship(self: Any, shard: int, entries: Any) -> Any:
        again = []
        for _, packed in entries:
            _, seq, stamp_ms, effects = msgpack.unpackb(packed)
            again.append((None, bytes(msgpack.packb((self.promised, seq, stamp_ms + 1, effects)))))
        return before(self, shard, again)

    def with_chains(self: Any, shard: int, entries: Any) -> Any:
        error = ship(self, shard, entries)
        chain = self.copies[shard].table.chain if shard in self.copies else 0
        self._logged = [each if each[3] is not None else (*each[:3], chain, each[4]) for each in self._logged]
        return error

    before = patches.put(Replicas, "ship", with_chains)


@mutant("R7")
def stamp_of_the_resend(patches: Patches) -> None:
    """What is sent again has the stamp of that moment."""

    def link_up(self: Any, node: str, *report: Any) -> Any:
        for batch in self.links[node].resend:
            batch.stamp_ms = self.stamp_ms
        return before(self, node, *report)

    before = patches.put(Sequencer, "link_up", link_up)


@mutant("R7")
def chain_over_batches(patches: Patches) -> None:
    """The chain is that of what was applied together."""

    def take_made(self: Any) -> None:
        if len(self._made) > 1:
            by_shard = {entry[0] for entry in self._made}
            last = {entry[0]: at for at, entry in enumerate(self._made)}
            for shard in sorted(by_shard):
                at = last[shard]
                self._made[at] = (*self._made[at][:3], self._made[at][3] ^ 1, self._made[at][4])
                self.tables[shard].chain ^= 1
        before(self)

    before = patches.put(Replicas, "_take_made", take_made)


# --- R10: one step -----------------------------------------------------------------------------------------------


@mutant("R10")
def await_between_assign_and_enqueue(patches: Patches) -> None:
    """Two writes of a shard may reach a link in another order than they were numbered."""

    def close_batches(self: Any) -> Any:
        for link in self.links.values():
            batch = link.open
            if batch is not None and len(batch.items) > 1 and self.now_ms % 7 == 0:
                first, second = batch.items[-2:]
                if first[0] == second[0] == 1 and first[1] == second[1]:
                    batch.items[-2:] = [second, first]
        return before(self)

    before = patches.put(Sequencer, "close_batches", close_batches)


@mutant("R10")
def cancelled_client_drops_its_entry(patches: Patches) -> None:
    """The write of a client that gave up is taken out of what was not sent yet."""

    def give_up(self: Any, request: Any) -> None:
        controller = request.coordinator.controller
        if self.busy is request and controller is not None and request.shard is not None:
            shard = controller.sequencer.shards[request.shard]
            for at, op in enumerate(shard.pending):
                if op[1] is request:
                    seq = shard.commit + 1 + at
                    for link in shard.targets:
                        for batch in link.outgoing:
                            batch.items = [i for i in batch.items if not (i[0] < 64 and i[1:3] == (shard.number, seq))]
        before(self, request)

    before = patches.put(Client, "give_up", give_up)

    def act(self: Any) -> None:
        was = self.busy
        act_before(self)
        if self.busy is not None and self.busy is not was:
            self.clients.world.at(self.clients.world.rng.randrange(20), self.give_up, self.busy)

    act_before = patches.put(Client, "act", act)


@mutant("R10")
def responder_by_agreement(patches: Patches) -> None:
    """Who answers a write is the first member of the map that the node knows, not who is asked to."""

    def begin(self: Any, stamp_ms: int, commit: int, items: Any) -> None:
        if self.map:
            rows = ClusterMap.from_json(self.map).members
            items = [
                [*item[:3], int(rows[item[1]][0][0] == self.node), *item[4:]] if item[0] in (2, 3, 4, 5) else item
                for item in items
            ]
        before(self, stamp_ms, commit, items)

    before = patches.put(Replicas, "begin", begin)


@mutant("R10")
def kept_is_forgotten(patches: Patches) -> None:
    """What a link that was lost had not acknowledged is not sent again."""
    patches.put(Sequencer, "_still_due", lambda self, link, batches: [])


@mutant("R10")
def kept_of_shards_that_it_left(patches: Patches) -> None:
    """What a node had not acknowledged of shards that it left is sent to it when it is back."""
    patches.put(Sequencer, "_still_due", lambda self, link, batches: list(batches))
    patches.put(Sequencer, "_forget_resend", lambda self, link, numbers: None)


@mutant("I9")
def error_after_enqueue(patches: Patches) -> None:
    """A write that was sequenced is refused as not executed when a member is lost."""

    def link_down(self: Any, node: str, reason: str) -> None:
        before(self, node, reason)
        for shard in self.links[node].shards:
            for op in shard.pending:
                if op[1] is not None and op[3] is NUMBER:
                    op[1].fail(op[2], Code.NOT_ENOUGH_REPLICAS, "a member is missing", {})
                    op[1] = None

    before = patches.put(Sequencer, "link_down", link_down)


@mutant("I9")
def lost_result_is_made_up(patches: Patches) -> None:
    """A result that died with its link is taken for a success."""

    def unanswered(self: Batch, *rest: Any) -> Any:
        for op in self.answers:
            if len(op) == 4 and op[0] == 0 and op[1] is not None and type(op[3]) is object:
                op[3] = True
        return before(self, *rest)

    before = patches.put(Batch, "unanswered", unanswered)

    def hand_over(self: Any) -> None:
        orphans, self.orphans = self.orphans, []
        for _, op in orphans:
            if op[1] is not None:
                answer_write(op, True)

    patches.put(Shard, "hand_over", hand_over)


# --- R11: reads ---------------------------------------------------------------------------------------------------


@mutant("R11 b")
def read_uncommitted(patches: Patches) -> None:
    """A read is answered when its result is here."""

    def hold(self: Any, needed: int, sink: Any, token: Any, value: Any) -> None:
        if sink is None:
            token.answer()
        else:
            sink.reply(token, value)

    patches.put(Shard, "hold", hold)


@mutant("R11 b")
def read_absent_early(patches: Patches) -> None:
    """That a key is absent is answered when the result is here."""

    def hold(self: Any, needed: int, sink: Any, token: Any, value: Any) -> None:
        if sink is not None and value in (None, False):
            sink.reply(token, value)
        else:
            before(self, needed, sink, token, value)

    before = patches.put(Shard, "hold", hold)


@mutant("R11 c", shared=True, factor=3, min_insync=1, kinds=("split", "one_way"))
def read_no_confirm(patches: Patches) -> None:
    """Reads are not confirmed although the store is shared."""
    patches.put(SimCoordinator, "confirming_class", Sequencer)


@mutant("R11 c", shared=True, factor=2, min_insync=1, mode="sync", kinds=("split", "kill_node", "cut"))
def confirm_isr_only(patches: Patches) -> None:
    """Reads are confirmed by the members that the map names, not by those of E."""

    def is_confirmed(self: Any, numbers: Any, round_: int) -> bool:
        for number in numbers:
            stored = [node for node, _ in self.map.members[number]]
            shard = self.shards[number]
            heard = sum(self._confirmed.get(link, 0) >= round_ for link in shard.good if link.node in stored)
            if heard < len(stored) - self.min_insync + 1:
                return False
        return True

    patches.put(ConfirmingSequencer, "_is_confirmed", is_confirmed)


@mutant("R11 c", shared=True, factor=3, min_insync=1, kinds=("split", "one_way"))
def one_confirmation_is_enough(patches: Patches) -> None:
    """A read is confirmed by any one member."""

    def is_confirmed(self: Any, numbers: Any, round_: int) -> bool:
        return all(
            any(self._confirmed.get(link, 0) >= round_ for link in self.shards[number].good) for number in numbers
        )

    patches.put(ConfirmingSequencer, "_is_confirmed", is_confirmed)


# --- R12: time -----------------------------------------------------------------------------------------------------


@mutant("R12")
def clock_of_the_new_coordinator(patches: Patches) -> None:
    """A new coordinator begins with its own clock."""

    def make_controller(self: Any, changes: Any, before: Any) -> Any:
        controller = made(self, changes, before)
        controller.sequencer.stamp_ms = 0
        return controller

    made = patches.put(SimCoordinator, "make_controller", make_controller)


@mutant("R12")
def stamps_beyond_the_bound(patches: Patches) -> None:
    """Stamps follow the clock, whatever bound is stored."""

    def begin(self: Any, wall_ms: int, now_ms: int) -> None:
        self.stamp_bound_ms = max(self.stamp_bound_ms, wall_ms)
        before(self, wall_ms, now_ms)

    before = patches.put(Sequencer, "begin", begin)


@mutant("R12")
def stamps_go_back(patches: Patches) -> None:
    """Stamps follow the clock when it is set back."""

    def begin(self: Any, wall_ms: int, now_ms: int) -> None:
        self.stamp_ms = min(wall_ms, self.stamp_bound_ms)
        self.now_ms = now_ms

    patches.put(Sequencer, "begin", begin)


@mutant("R12", shared=True, kinds=("jump_clock", "slow_store", "store_down", "kill_coordinator"))
def bound_before_it_is_stored(patches: Patches) -> None:
    """Stamps follow the next bound from the moment on in which it is proposed."""

    def tick(self: Any, wall_ms: int) -> None:
        was_moving = self._is_moving
        before(self, wall_ms)
        if self._is_moving and not was_moving:
            self._sequencer.stamp_bound_ms = wall_ms + ownership.STAMP_AHEAD_MS

    before = patches.put(Ownership, "tick", tick)


# --- R13: deposed ----------------------------------------------------------------------------------------


def _deaf(patches: Patches, name: str) -> None:
    """One door of the controller does not hear that it was deposed."""

    def step(self: Any, *args: Any) -> Any:
        deposed, self.ownership.deposed = self.ownership.deposed, ""
        try:
            return before(self, *args)
        finally:
            self.ownership.deposed = self.ownership.deposed or deposed

    before = patches.put(Controller, name, step)


@mutant("R13")
def results_after_deposing(patches: Patches) -> None:
    """What nodes say is answered to clients, whoever owns the map."""
    _deaf(patches, "receive")


@mutant("R13")
def turns_after_deposing(patches: Patches) -> None:
    """The turn in which the coordinator is deposed ends as all others: batches leave."""
    _deaf(patches, "end_turn")


@mutant("R13")
def time_goes_on_after_deposing(patches: Patches) -> None:
    """What waits too long is refused, whoever owns the map."""
    _deaf(patches, "tick")


# --- turns, and the end of nodes ---------------------------------------------------------------------------


@mutant("R10")
def batches_before_frames(patches: Patches) -> None:
    """A turn lets its batches out first."""

    def end_turn(self: Any, process: Any) -> None:
        if not self.ownership.deposed:
            process.write_batches(self.sequencer.close_batches())
            self.act(process)

    patches.put(Controller, "end_turn", end_turn)


@mutant("R14", kinds=("stop_node", "slow_store"))
def leave_answered_before_it_is_stored(patches: Patches) -> None:
    """A node that asked to leave is told to stop while the change of the map is on its way."""

    def evict_lost(self: Any) -> None:
        for node, state in self.nodes.items():
            link = self._sequencer.links[node]
            if state.leaves and link.connected and not state.may_stop and not self.evict(link, list(link.shards), ""):
                state.may_stop = True
                self._outbox.send(node, (STOP,))
        before(self)

    before = patches.put(Membership, "_evict_lost", evict_lost)


# --- nodes ---------------------------------------------------------------------------------------------------------


@mutant("I11")
def ack_during_sync(patches: Patches) -> None:
    """The end of a sync acknowledges what was appended while it ran."""

    def done(self: Any) -> None:
        flight = self._flight
        if hasattr(flight, "marks"):
            for connection in list(flight.marks):
                flight.marks[connection] = self.node.replica.applied
        before(self)

    before = patches.put(NodeDisk, "_done", done)


@mutant("I4")
def learner_acknowledges_before_it_published(patches: Patches) -> None:
    """A copy that was pulled counts before it is on the disk."""

    def published(self: Any, learning: Any, pulled: Any) -> bool:
        if not self.is_wanted(learning) or not self.replica.published(learning.shard):
            return False
        copies = list(self.replica.copies.values())
        self._process.later(40, partial(self.persistence.change_copies, copies, pulled))
        self.changed()
        return True

    patches.put(NodeCore, "published", published)


def _sent_at_once(patches: Patches, kind: int) -> None:
    def send_when_durable(self: Any, link: Any, frame: Any) -> None:
        if frame[0] == kind:
            self.send(frame)
        else:
            before(self, link, frame)

    before = patches.put(NodeCore, "_send_when_durable", send_when_durable)


@mutant("I4")
def learned_before_durable(patches: Patches) -> None:
    """LEARNED is sent when the copy is live in memory."""
    _sent_at_once(patches, LEARNED)


@mutant("I4")
def shipped_before_durable(patches: Patches) -> None:
    """SHIPPED is sent when the entries are applied."""
    _sent_at_once(patches, SHIPPED)


@mutant("I11")
def applied_is_durable(patches: Patches) -> None:
    """A node acknowledges what it has handed to the disk."""

    def log_applied(self: Any, link: Any) -> bool:
        before(self, link)
        link.durable = self.replica.applied
        return True

    before = patches.put(NodeCore, "_log_applied", log_applied)


@mutant("R9", mode="os", kinds=("power_cut", "kill_node", "cut"))
def doubted_for_ever(patches: Patches) -> None:
    """A copy that was doubtful and has learned from the others is doubtful still."""

    def tell_news(self: Any) -> None:
        doubts = {shard: self.replica.copies[shard].reason for shard in self.replica._learned}
        before(self)
        for shard, reason in doubts.items():
            self.replica.copies[shard].reason = reason

    before = patches.put(NodeCore, "_tell_news", tell_news)


@mutant("R9", liveness=True, mode="os", kinds=("power_cut", "kill_node", "cut"))
def doubt_outlives_the_process(patches: Patches) -> None:
    """A node forgets its doubt about a copy, and its disk does not."""

    def tell_news(self: Any) -> None:
        with mock.patch.object(NodeDisk, "remember", lambda *_: None):
            before(self)

    before = patches.put(NodeCore, "_tell_news", tell_news)


@mutant("I1")
def donated_before_attached(patches: Patches) -> None:
    """The copy that is given ends before the writes that the learner was sent; nobody looks."""

    def loaded(self: Any, shard: int, table: Table, kept: Any = ()) -> Any:
        one = self.learning.get(shard)
        if one is not None and one.buffer:
            one.last_seq = 0
            one.buffer.popleft()
        return before(self, shard, table, kept)

    before = patches.put(Replicas, "loaded", loaded)


@mutant("R6")
def committed_is_told_too_early(patches: Patches) -> None:
    """Nodes are told that everything queued to them is committed, so they forget what they may have to ship."""
    patches.put(Sequencer, "committed_ordinal", lambda self, link: link.written_ordinal)


@mutant("I13")
def evicted_for_ever(patches: Patches) -> None:
    """A node that was evicted is not let in again."""
    patches.put(Membership, "_can_learn", lambda self, link: False)


@mutant("I12")
def waiting_without_bound(patches: Patches) -> None:
    """Requests wait in any number."""

    def wait(self: Any, *request: Any) -> None:
        with mock.patch.object(sys.modules["kvtcp.replication.sequencing.shard"], "WAITING_ITEMS_MAX", 10**9):
            before(self, *request)

    before = patches.put(Shard, "wait", wait)


# --- search --------------------------------------------------------------------------------------------------------


def search(name: str, seeds: int = SEEDS) -> Result | None:
    """Return the result of the first seed that finds the mutant, or None."""
    for seed in range(seeds):
        result = run_with(name, seed)
        if result.violation:
            return result
    return None


def recorded() -> dict[str, int]:
    """The seeds that found them."""
    return dict(json.loads(FOUND_FILE.read_text())) if FOUND_FILE.exists() else {}


def main() -> int:
    """Search for all, or some."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("part", nargs="?", default="", help="only mutants whose names contain this")
    options.add_argument("--seeds", type=int, default=SEEDS)
    options.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    options.add_argument("--record", action="store_true", help=f"write the seeds to {FOUND_FILE.name}")
    chosen = options.parse_args()
    names = [name for name in MUTANTS if chosen.part in name]
    found = recorded()
    missed = []
    began = time.monotonic()
    with multiprocessing.Pool(chosen.jobs) as pool:
        results = pool.imap(partial(search, seeds=chosen.seeds), names)
        for name, result in zip(names, results, strict=True):
            if result is None:
                missed.append(name)
                print(f"{name} ({MUTANTS[name].rule}): NOT FOUND in {chosen.seeds} seeds", flush=True)
            else:
                found[name] = result.seed
                print(f"{name} ({MUTANTS[name].rule}): seed {result.seed}: {result.violation[:150]}", flush=True)
    if chosen.record:
        known = {name: found[name] for name in MUTANTS if name in found and name not in missed}
        FOUND_FILE.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{len(names) - len(missed)} of {len(names)} mutants found in {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
