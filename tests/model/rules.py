"""The steps of the replication model: what coordinators, nodes, the config store and an operator may do next.

`Rules(scope).successors(state)` gives every state that may follow, as (label, state); a step that breaks a property
raises Violation. The rules, the properties and what is left out are told in explore.py, which searches;
`mutant` names the one rule that is taken away.

A state is made of tuples alone. A log is a tuple of entries, an entry is epoch * 10 + its index in the script of
writes. All that belongs to one node (also its place in the stored map and what both coordinators hold about it) is in
its Node, so that nodes can be sorted: they are interchangeable. Coordinators are not; who owns which epoch is fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

NONE = -1  # no disk: not a member, no link
DESTROYED = -2  # disk of a node that never answers again
NO_LOG = (-1,)  # no report or answer yet

STOPPED, RECOVERING, CATCHING_UP, ACTIVE = range(4)  # roles of a coordinator
NO_CAS, SENT, APPLIED, FORGOTTEN = range(4)  # its map change; FORGOTTEN only in a mutant
SERVES, CONFIRMED = 1, 2  # what a node did for the pending read, as bits

Log = tuple[int, ...]


class Violation(Exception):
    """A step broke a property; args are the label of the step and the property."""


class View(NamedTuple):
    """What one coordinator holds about one node."""

    member: int = NONE  # disk by which the node is in the ISR, as far as this coordinator knows
    proposed: int = NONE  # the same in the map change under way
    link: int = NONE  # disk that answered its last HELLO
    acked: int = 0  # entries acknowledged over that link
    report: Log = NO_LOG  # log told in the HELLO, kept while recovering

    def trusted(self) -> bool:
        """A member that answered from the disk by which it is one."""
        return self.member != NONE and self.link == self.member

    def foreign(self) -> bool:
        """A member that answered from another disk."""
        return self.member != NONE and self.link not in (NONE, self.member)

    def learns(self) -> bool:
        """No member, but linked."""
        return self.member == NONE != self.link


NO_VIEW = View()


class Node(NamedTuple):
    """A node, its place in the stored map, and what both coordinators hold about it."""

    promised: int  # highest epoch that said HELLO
    disk: int
    log: Log
    member: int  # disk by which the stored map has it in the ISR
    views: tuple[View, View]
    mark: int = 0  # SERVES | CONFIRMED for the pending read

    def viewed(self, i: int, view: View) -> Node:
        """With another view of coordinator i."""
        views = (view, self.views[1]) if i == 0 else (self.views[0], view)
        return Node(self.promised, self.disk, self.log, self.member, views, self.mark)

    def edit_view(self, i: int, **changes: Any) -> Node:
        """With some fields of coordinator i's view changed."""
        return self.viewed(i, self.views[i]._replace(**changes))

    def proposed(self, i: int, disk: int) -> Node:
        """With this disk in the map change of coordinator i."""
        view = self.views[i]
        return self.viewed(i, View(view.member, disk, view.link, view.acked, view.report))

    def marked(self, mark: int) -> Node:
        """With another mark."""
        return Node(self.promised, self.disk, self.log, self.member, self.views, mark)

    def whole(self) -> bool:
        """A member whose disk is the one that the stored map names."""
        return self.disk == self.member


class Coordinator(NamedTuple):
    """A coordinator; what it holds about nodes is with the nodes."""

    role: int = STOPPED
    epoch: int = 0
    log: Log = ()
    commit: int = 0
    cas: int = NO_CAS


STOPPED_COORDINATOR = Coordinator()


class Read(NamedTuple):
    """The read under way; there is at most one."""

    at: int  # coordinator
    key: str
    queued: int  # last sequence number queued before it: it sees exactly those
    floor: int  # length of the history when it arrived
    seen: Log = NO_LOG  # its answer: the log up to the last entry that touches the key


class State(NamedTuple):
    """Everything."""

    epoch: int  # of the stored map, like owner
    owner: int
    nodes: tuple[Node, ...]
    coordinators: tuple[Coordinator, Coordinator]
    history: Log  # entries answered to clients or shown by reads
    answered: int  # how many of them were answered (committed or rolled forward)
    lost: int  # disks lost since the last of those answers
    read: Read | None
    writes_left: int
    reads_left: int
    faults_left: int

    def with_nodes(self, nodes: tuple[Node, ...]) -> State:
        """With these nodes."""
        return State(self.epoch, self.owner, nodes, *self[3:])

    def set_node(self, n: int, node: Node) -> State:
        """With another node n."""
        return self.with_nodes(self.nodes[:n] + (node,) + self.nodes[n + 1 :])

    def set_own(self, i: int, own: Coordinator) -> State:
        """With another coordinator i."""
        coordinators = (own, self.coordinators[1]) if i == 0 else (self.coordinators[0], own)
        return State(self.epoch, self.owner, self.nodes, coordinators, *self[4:])

    def edit_own(self, i: int, **changes: Any) -> State:
        """With some fields of coordinator i changed."""
        return self.set_own(i, self.coordinators[i]._replace(**changes))

    def drop_read(self) -> State:
        """The read is over, or its coordinator is."""
        nodes = tuple(node.marked(0) if node.mark else node for node in self.nodes)
        return self._replace(read=None, nodes=nodes)

    def restart(self, i: int, own: Coordinator = STOPPED_COORDINATOR) -> State:
        """Coordinator i begins as `own`; it has no links, and knows the stored map if it runs."""
        state = self.drop_read() if self.read and self.read.at == i else self
        nodes = tuple(node.viewed(i, View(NONE if own.role == STOPPED else node.member)) for node in state.nodes)
        return state.with_nodes(nodes).set_own(i, own)

    def sorted(self) -> State:
        """The one that stands for all that differ by the order of their nodes."""
        return self.with_nodes(tuple(sorted(self.nodes)))

    def members(self, i: int) -> list[int]:
        """Nodes in the ISR, as far as coordinator i knows."""
        return [n for n, node in enumerate(self.nodes) if node.views[i].member != NONE]


class Scope(NamedTuple):
    """How much may happen."""

    min_insync: int
    max_epoch: int
    script: tuple[str, ...]  # the writes, in order: "put x", "delete x", ...
    reads: int = 0
    faults: tuple[str, ...] = ()  # each strikes any node, in this order: see Rules.fail
    dead_ends: bool = False  # check property 7
    nodes: int = 3
    members: int = 3  # of the first map; the other nodes are spare, and empty
    swaps: bool = False  # a serving coordinator may replace any member, not only one that was declared destroyed


Step = tuple[str, State]


def common(first: Log, second: Log) -> int:
    """Length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return next((k for k, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def conflict(first: Log, second: Log) -> bool:
    """Neither log is the beginning of the other."""
    shorter = min(len(first), len(second))
    return first[:shorter] != second[:shorter]


def last_epoch(log: Log) -> int:
    """Epoch of the last entry."""
    return log[-1] // 10 if log else 0


class Rules:
    """The rules, perhaps without one of them, in a scope."""

    def __init__(self, scope: Scope, mutant: str = "") -> None:
        self.scope, self.mutant, self.minimum = scope, mutant, scope.min_insync
        self.keys = sorted({write.split()[1] for write in scope.script})

    def initial(self) -> State:
        """Coordinator 0 serves an empty shard in epoch 1; spare nodes have disk 1 and no link."""
        scope = self.scope
        member = Node(1, 0, (), 0, (View(member=0, link=0), NO_VIEW))
        spare = Node(0, 1, (), NONE, (NO_VIEW, NO_VIEW))
        nodes = (spare,) * (scope.nodes - scope.members) + (member,) * scope.members
        coordinators = (Coordinator(ACTIVE, 1), STOPPED_COORDINATOR)
        return State(1, 0, nodes, coordinators, (), 0, 0, None, len(scope.script), scope.reads, len(scope.faults))

    def successors(self, state: State) -> Iterator[Step]:
        """Every step from a state. With no fault left, coordinators that can do nothing more are stopped."""
        for label, after in self.steps(state):
            if after.read is not None:
                label, after = self.settle_read(after, label)
            yield label, after if self.mutant or after.faults_left else self.retire(after)

    def steps(self, state: State) -> Iterator[Step]:
        """What everybody may do next."""
        for i, own in enumerate(state.coordinators):
            if state.owner != i and state.epoch < self.scope.max_epoch:  # a lease is only a hint: anyone may take over
                new = Coordinator(RECOVERING, state.epoch + 1)
                yield f"c{i}.take_over", state.restart(i, new)._replace(epoch=new.epoch, owner=i)
            if own.role == RECOVERING:
                yield from self.recover(state, i, own)
            if own.role in (CATCHING_UP, ACTIVE):
                yield from self.replicate(state, i, own)
            if own.role == CATCHING_UP:
                yield from self.finish_recovery(state, i, own)
                yield from self.replace_in_recovery(state, i, own)
            if own.role == ACTIVE:
                yield from self.write_and_commit(state, i, own)
                yield from self.follow_links(state, i, own)
                yield from self.change_map(state, i, own)
                yield from self.read(state, i, own)
        if state.faults_left:
            yield from self.fail(state, self.scope.faults[-state.faults_left])

    # --- the in-sync set ---------------------------------------------------------------------------------

    def in_sync(self, state: State, i: int) -> list[tuple[int, int]]:
        """E of coordinator i, as pairs (node, disk): the members it knows, united with those it proposed."""
        members = [(n, node.views[i].member) for n, node in enumerate(state.nodes) if node.views[i].member != NONE]
        if self.mutant == "destroyed_leaves_early":
            members = [(n, disk) for n, disk in members if state.nodes[n].disk != DESTROYED]
        if state.coordinators[i].cas in (NO_CAS, FORGOTTEN):
            return members
        proposed = [(n, node.views[i].proposed) for n, node in enumerate(state.nodes) if node.views[i].proposed != NONE]
        joining = [pair for pair in proposed if pair not in members]
        if not self.mutant:
            return members + joining
        replaced = len(proposed) == len(members) and {n for n, _ in proposed} != {n for n, _ in members}
        if (self.mutant == "ack_before_cas" and not joining) or (self.mutant == "replacement_before_cas" and replaced):
            return proposed
        if self.mutant == "expand_late" and joining:
            return members
        return members + joining

    def acked_by_all(self, state: State, i: int) -> int:
        """Entries that every member of E acknowledged from its disk."""
        acked = []
        for n, disk in self.in_sync(state, i):
            view = state.nodes[n].views[i]
            acked.append(view.acked if view.link == disk else 0)
        if self.mutant == "commit_on_minimum":
            return sorted(acked)[-self.minimum]
        return min(acked)

    def may_remove(self, members: list[int], good: list[int]) -> bool:
        """One of `members` may leave while these others are known to be good."""
        minimum = 1 if self.mutant == "isr_below_minimum" else self.minimum
        return len(members) > minimum and (bool(good) or self.mutant == "remove_last_good")

    def keep_last_good(
        self, state: State, n: int, rest: Iterable[int], good: list[int], heard: list[int], label: str
    ) -> None:
        """A property: no map change knowingly leaves only bad members."""
        if state.nodes[n].whole() and all(m in heard and m not in good for m in rest):
            raise Violation(label, "the map change removes a good member and leaves only members known to be bad")

    def is_declared(self, state: State, i: int, n: int) -> bool:
        """An operator says that node n, which is silent, is destroyed. It is; the mutant is an operator who errs."""
        node = state.nodes[n]
        return node.disk == DESTROYED or (self.mutant == "destroyed_alive" and node.views[i].link == NONE)

    # --- recovery ----------------------------------------------------------------------------------------

    def recover(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """HELLO to every member; the bad ones are removed, as far as enough remain; then the best log is chosen."""
        views = [node.views[i] for node in state.nodes]
        members = state.members(i)
        heard = [n for n in members if views[n].report != NO_LOG]
        good = [n for n in heard if views[n].trusted()]
        owns_map = state.epoch == own.epoch
        for n in members:
            node, view = state.nodes[n], views[n]
            answers = node.disk != DESTROYED and node.promised <= own.epoch
            if answers and (n not in heard or view.link != node.disk):
                told = node.edit_view(i, link=node.disk, report=node.log)
                if self.mutant == "wiped_member_is_good":
                    told = told.edit_view(i, member=node.disk)
                if self.mutant != "report_no_fence":
                    told = told._replace(promised=own.epoch)
                yield f"c{i}.hello(n{n})", state.set_node(n, told)
            if self.mutant == "new_disk_before_resync" and owns_map and n in heard and n not in good:
                known = node.edit_view(i, member=view.link)
                yield f"c{i}.cas_new_disk(n{n})", state.set_node(n, known._replace(member=view.link))
            if owns_map and n not in good and self.may_remove(members, good):
                label = f"c{i}.cas_remove(n{n})"
                self.keep_last_good(state, n, [m for m in members if m != n], good, heard, label)
                left = node.viewed(i, NO_VIEW)
                if self.mutant != "removed_before_map":
                    left = left._replace(member=NONE)
                yield label, state.set_node(n, left)
        if self.mutant == "swap_in_recovery" and owns_map and heard:
            yield from self.swap_silent(state, i, own, members, heard)
        # a destroyed one that may be removed is removed, like any that is silent: afterwards it would be in the way
        small = not self.may_remove(members, good) or self.mutant == "removable_is_kept"
        fenced = [n for n in members if n in heard or (small and self.is_declared(state, i, n))]
        if self.mutant == "bad_member_never_kept":
            fenced = good
        if good and (fenced == members or self.mutant == "recover_from_any"):
            yield self.choose_best(state, i, own, heard, good)

    def swap_silent(
        self, state: State, i: int, own: Coordinator, members: list[int], heard: list[int]
    ) -> Iterator[Step]:
        """The mutant swap_in_recovery: a silent member's place is given to a node that gets what was heard first."""
        for silent in set(members) - set(heard):
            for new in set(range(len(state.nodes))) - set(members):
                node, log = state.nodes[new], state.nodes[heard[0]].views[i].report
                if node.promised <= own.epoch:
                    joined = node.viewed(i, View(node.disk, NONE, node.disk, 0, log))
                    joined = joined._replace(promised=own.epoch, log=log, member=node.disk)
                    gone = state.nodes[silent].viewed(i, NO_VIEW)._replace(member=NONE)
                    yield f"c{i}.cas_swap(n{silent}->n{new})", state.set_node(silent, gone).set_node(new, joined)

    def choose_best(self, state: State, i: int, own: Coordinator, heard: list[int], good: list[int]) -> Step:
        """The best good log becomes the coordinator's; what does not match it is wiped."""
        reports = (state.nodes[n].views[i].report for n in good)
        best = max(reports, key=lambda log: (last_epoch(log), len(log)))
        label = f"c{i}.choose(length {len(best)})"
        for n in heard:
            node, view = state.nodes[n], state.nodes[n].views[i]
            shared = common(view.report, best)
            if n in good and len(view.report) > shared and not self.mutant:
                raise Violation(label, f"good member n{n} has entries that the best log lacks")
            if n not in good and node.disk == view.link and node.promised <= own.epoch:
                node = node._replace(log=node.log[:shared])  # a bad copy is reset; only what matches is kept
            state = state.set_node(n, node.edit_view(i, acked=shared, report=NO_LOG))
        if self.mutant == "serve_before_catchup":
            return label, state.edit_own(i, role=ACTIVE, log=best, commit=len(best))
        return label, state.edit_own(i, role=CATCHING_UP, log=best)

    def finish_recovery(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """All members get the best log; new disks enter the map once they have it; then the shard serves."""
        members = state.members(i)
        views = {n: state.nodes[n].views[i] for n in members}
        if any(view.link not in (NONE, state.nodes[n].disk) for n, view in views.items()):  # a link broke: start over
            nodes = tuple(node.viewed(i, View(node.views[i].member)) for node in state.nodes)
            yield f"c{i}.recover_again", state.with_nodes(nodes).edit_own(i, role=RECOVERING, log=())
        for n in members:
            if views[n].foreign() and views[n].acked == len(own.log):
                known = state.nodes[n].edit_view(i, member=views[n].link)
                if self.mutant == "new_disk_before_map":
                    yield f"c{i}.counts_new_disk(n{n})", state.set_node(n, known)
                elif state.epoch == own.epoch:
                    yield f"c{i}.cas_new_disk(n{n})", state.set_node(n, known._replace(member=views[n].link))
        unheard = self.mutant == "recover_from_any"
        if all(view.acked == len(own.log) and (view.trusted() or unheard) for view in views.values()):
            label = f"c{i}.serve"
            if state.epoch == own.epoch and len(state.history) > len(own.log):
                raise Violation(label, "the new coordinator lacks an entry that was answered or shown")
            yield label, self.answer(state.edit_own(i, role=ACTIVE, commit=len(own.log)), own.log, i, label)

    def replace_in_recovery(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """A member that was declared destroyed gives its place to a node that has the whole best log, by one CAS."""
        gone = [n for n in state.members(i) if self.is_declared(state, i, n)]
        if not gone or self.mutant == "destroyed_never_replaced":
            return
        yield from self.attach_learners(state, i, own)
        for new, node in enumerate(state.nodes):
            view = node.views[i]
            whole = view.acked == len(own.log) or self.mutant == "replacement_before_whole"
            if not (view.learns() and whole):
                continue
            for old in gone:
                joined = node.edit_view(i, member=view.link)
                left = state.nodes[old].viewed(i, NO_VIEW)
                if self.mutant == "replacement_before_map":
                    yield f"c{i}.counts(n{old}->n{new})", state.set_node(old, left).set_node(new, joined)
                elif state.epoch == own.epoch:
                    left, joined = left._replace(member=NONE), joined._replace(member=view.link)
                    yield f"c{i}.cas_replace(n{old}->n{new})", state.set_node(old, left).set_node(new, joined)

    def answer(self, state: State, log: Log, i: int, label: str) -> State:
        """The clients get to know that these entries are committed."""
        if conflict(log, state.history):
            raise Violation(label, "different entries answered or shown at one sequence number")
        if len(log) > state.answered:
            views = [(node.views[i], node.disk) for node in state.nodes]  # a disk may be lost after it acknowledged
            lost = sum(view.link not in (NONE, disk) and view.acked >= len(log) for view, disk in views)
            state = state._replace(answered=len(log), lost=lost)
        return state._replace(history=log) if len(log) > len(state.history) else state

    # --- entries, links, map changes ---------------------------------------------------------------------

    def replicate(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """A linked node appends the next entry, makes it durable and acknowledges it, in one step."""
        for n, node in enumerate(state.nodes):
            view = node.views[i]
            have, seq = view.acked, view.acked + 1
            if view.link == NONE or node.disk != view.link or have == len(own.log):
                continue
            stale = node.promised > own.epoch
            if stale and self.mutant != "no_node_epoch_check":
                continue
            if self.mutant == "seq_only" or stale:
                fits = len(node.log) == have
            else:
                fits = node.log[:have] == own.log[:have] and (len(node.log) == have or own.role == CATCHING_UP)
            in_window = own.role == ACTIVE and have >= own.commit  # still in the coordinator's memory
            if fits and (in_window or self.has_donor(state, i, own, n, seq)):
                log = node.log[:have] + (own.log[have],)
                grown = Node(max(node.promised, own.epoch), node.disk, log, node.member, node.views, node.mark)
                yield f"c{i}.replicate(n{n}, seq {seq})", state.set_node(n, grown.edit_view(i, acked=seq))

    def has_donor(self, state: State, i: int, own: Coordinator, n: int, seq: int) -> bool:
        """Another good member can give the entries up to seq."""
        return any(
            m != n
            and donor.views[i].trusted()
            and donor.disk == donor.views[i].link
            and donor.promised <= own.epoch
            and donor.log[:seq] == own.log[:seq]
            for m, donor in enumerate(state.nodes)
        )

    def write_and_commit(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """The next write is numbered and queued to all of E; what all of E acknowledged is answered."""
        if state.writes_left:
            index = len(self.scope.script) - state.writes_left
            written = state.edit_own(i, log=own.log + (own.epoch * 10 + index,))
            yield f"c{i}.write({self.scope.script[index]})", written._replace(writes_left=state.writes_left - 1)
        acked = self.acked_by_all(state, i)
        if acked > own.commit:
            label = f"c{i}.commit(seq {acked})"
            yield label, self.answer(state.edit_own(i, commit=acked), own.log[:acked], i, label)

    def follow_links(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """HELLO in the same epoch: to a node that comes back with another disk, and to a new learner."""
        for n, node in enumerate(state.nodes):
            view = node.views[i]
            if node.promised > own.epoch or node.disk == DESTROYED:
                continue
            if (view.member != NONE or view.link != NONE) and view.link != node.disk:
                shared = common(node.log, own.log)
                fresh = node.edit_view(i, link=node.disk, acked=shared)
                if self.mutant == "reconnect_by_position" and view.member != NONE and shared >= view.acked:
                    fresh = fresh.edit_view(i, member=node.disk)
                fresh = fresh._replace(promised=own.epoch, log=node.log[:shared], mark=node.mark & SERVES)
                yield f"c{i}.reconnect(n{n})", state.set_node(n, fresh)
            if self.mutant == "new_disk_before_map" and view.foreign() and view.acked >= own.commit:
                yield f"c{i}.counts_new_disk(n{n})", state.set_node(n, node.edit_view(i, member=view.link))
        if own.cas == NO_CAS:
            yield from self.attach_learners(state, i, own)

    def attach_learners(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """HELLO to a node that is no member; what does not match is wiped. One learner at a time."""
        if any(node.views[i].learns() and node.disk == node.views[i].link for node in state.nodes):
            return
        for n, node in enumerate(state.nodes):
            view = node.views[i]
            if view.member != NONE or view.link == node.disk or node.disk == DESTROYED or node.promised > own.epoch:
                continue
            shared = common(node.log, own.log)
            log = node.log[:shared]
            if self.mutant == "seq_only":
                shared, log = min(len(node.log), len(own.log)), node.log
            learner = node.edit_view(i, link=node.disk, acked=shared)._replace(promised=own.epoch, log=log)
            yield f"c{i}.attach_learner(n{n})", state.set_node(n, learner)

    def change_map(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """One map change at a time: it is sent, applied by the store, and known to be applied; or refused."""
        if own.cas == NO_CAS:
            yield from self.propose(state, i, own)
        elif own.cas == APPLIED:
            nodes = tuple(
                node.viewed(i, NO_VIEW)
                if node.views[i].proposed == NONE != node.views[i].member
                else node.edit_view(i, member=node.views[i].proposed, proposed=NONE)
                for node in state.nodes
            )
            yield f"c{i}.learns_cas", state.with_nodes(nodes).edit_own(i, cas=NO_CAS)
        elif state.epoch == own.epoch or self.mutant == "cas_no_epoch":
            nodes = tuple(node._replace(member=node.views[i].proposed) for node in state.nodes)
            applied = own.cas if own.cas == FORGOTTEN else APPLIED
            yield f"c{i}.store_applies_cas", state.with_nodes(nodes).edit_own(i, cas=applied)
            if self.mutant == "unchanged_read_settles_cas" and own.cas == SENT:
                yield f"c{i}.reads_unchanged_map", state.edit_own(i, cas=FORGOTTEN)
        else:
            yield f"c{i}.cas_refused", state.restart(i)

    def propose(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """Shrink, grow, a new disk of a member, or another node in the place of one."""
        views = [node.views[i] for node in state.nodes]
        members = state.members(i)
        good = [n for n in members if views[n].trusted()]
        linked = [n for n in members if views[n].link != NONE]
        gone = [n for n in members if self.is_declared(state, i, n)]
        if self.scope.swaps:
            gone = [n for n in members if any(m != n for m in good)]
        if self.mutant == "destroyed_never_replaced":
            gone = []
        for n, view in enumerate(views):
            complete = view.acked >= own.commit
            if n in members and self.may_remove(members, [m for m in good if m != n]):
                label = f"c{i}.propose_shrink(n{n})"
                self.keep_last_good(state, n, [m for m in members if m != n], good, linked, label)
                yield label, self.proposed(state, i, {n: NONE})
            if view.foreign() and (complete or self.mutant == "new_disk_before_resync"):
                yield f"c{i}.propose_new_disk(n{n})", self.proposed(state, i, {n: view.link})
            if view.learns() and (complete or self.mutant == "join_before_committed"):
                yield f"c{i}.propose_grow(n{n})", self.proposed(state, i, {n: view.link})
            if view.learns() and (complete or self.mutant == "replacement_before_committed"):
                for old in gone:
                    yield f"c{i}.propose_replace(n{old}->n{n})", self.proposed(state, i, {old: NONE, n: view.link})

    def proposed(self, state: State, i: int, changes: dict[int, int]) -> State:
        """The map change of coordinator i that gives these nodes other disks is sent."""
        nodes = tuple(node.proposed(i, changes.get(n, node.views[i].member)) for n, node in enumerate(state.nodes))
        return state.with_nodes(nodes).edit_own(i, cas=SENT)

    # --- reads, faults -----------------------------------------------------------------------------------

    def read(self, state: State, i: int, own: Coordinator) -> Iterator[Step]:
        """A read arrives and is queued to a good member."""
        if state.read is None and state.reads_left:
            for n, node in enumerate(state.nodes):
                for key in self.keys if node.views[i].trusted() else ():
                    read = Read(i, key, len(own.log), len(state.history))
                    arrived = state._replace(read=read, reads_left=state.reads_left - 1)
                    yield f"c{i}.read({key} from n{n})", arrived.set_node(n, node.marked(SERVES))

    def settle_read(self, state: State, label: str) -> Step:
        """The pending read is confirmed, answered and released as far as it can be, or dropped if it never can be."""
        read = state.read
        assert read is not None
        i, own, seen, lame = read.at, state.coordinators[read.at], read.seen, True
        members = self.in_sync(state, i)
        for n, disk in members:
            node = state.nodes[n]
            if node.disk == node.views[i].link == disk and node.promised <= own.epoch:
                if not node.mark & CONFIRMED:
                    state = state.set_node(n, node.marked(node.mark | CONFIRMED))
                if node.mark & SERVES:
                    lame = False
                    if seen == NO_LOG and len(node.log) >= read.queued:
                        seen = node.log[: self.last_touch(node.log[: read.queued], read.key)]
        if seen != read.seen:
            state = state._replace(read=read._replace(seen=seen))
        confirmed, need = self.confirmations(state, i, members)
        present = seen != NO_LOG and len(seen) > 0 and self.scope.script[seen[-1] % 10].startswith("put")
        hold = len(seen) if present else read.queued
        if self.mutant == "read_uncommitted" or (self.mutant == "read_absent_early" and not present):
            hold = 0
        if seen == NO_LOG or own.commit < hold or confirmed < need:
            deposed = own.epoch != state.epoch and own.cas != APPLIED and confirmed < need
            hopeless = (deposed and not self.mutant) or (seen == NO_LOG and lame)
            return label, state.drop_read() if hopeless else state
        label += f" [read releases {read.key} = {f'revision {len(seen)}' if present else 'absent'}]"
        if conflict(seen, state.history):
            raise Violation(label, "a read showed an entry that the history contradicts")
        if self.last_touch(state.history[: read.floor], read.key) > len(seen):
            raise Violation(label, "stale read: older than what was answered or shown before it arrived")
        return label, state.drop_read()._replace(history=max(state.history, seen, key=len))

    def confirmations(self, state: State, i: int, members: list[tuple[int, int]]) -> tuple[int, int]:
        """How many of E confirmed the read, and how many must."""
        nodes = state.nodes
        if self.mutant == "confirm_isr_only":
            members = [(n, nodes[n].views[i].member) for n in state.members(i)]
        if self.mutant == "new_disk_confirms":  # E counted by node, whatever disk it has
            places = {n for n, _ in members}
            return sum(nodes[n].mark & CONFIRMED > 0 for n in places), len(places) - self.minimum + 1
        confirmed = 0
        for n, disk in members:
            if nodes[n].mark & CONFIRMED and nodes[n].views[i].link == disk:
                confirmed += 1
        return confirmed, 1 if self.mutant == "read_no_confirm" else len(members) - self.minimum + 1

    def last_touch(self, log: Log, key: str) -> int:
        """Number of the last entry that touches the key."""
        return next((k for k in range(len(log), 0, -1) if self.scope.script[log[k - 1] % 10].split()[1] == key), 0)

    def fail(self, state: State, fault: str) -> Iterator[Step]:
        """The next fault strikes any node."""
        for n, node in enumerate(state.nodes):
            if node.disk == DESTROYED:
                continue
            label, lost = f"n{n}.{fault}", state.lost + 1
            if fault == "disk_lost":
                broken = node._replace(promised=0, disk=node.disk + 1, log=())
            elif fault == "destroyed":
                broken = node._replace(promised=0, disk=DESTROYED, log=())
            elif fault == "tail_lost":
                broken = node._replace(log=node.log[:-1], disk=node.disk + (self.mutant != "amnesia"))
            else:  # forgets_promise: only a mutant does
                broken, lost = node._replace(promised=max(last_epoch(node.log), 1)), state.lost
            after = state.set_node(n, broken)._replace(faults_left=state.faults_left - 1, lost=lost)
            if state.lost < lost < self.minimum and not any(other.whole() for other in after.nodes):
                raise Violation(label, "fewer than M disks were lost since the last answer, and no good member is left")
            yield label, after

    # --- properties and reductions -----------------------------------------------------------------------

    def check(self, state: State, label: str) -> None:
        """Properties of a state."""
        answered = state.history[: state.answered]
        for n, node in enumerate(state.nodes):
            if node.whole() and node.log[: len(answered)] != answered:
                raise Violation(label, f"an answered entry is missing on member n{n}")
        for i, own in enumerate(state.coordinators):
            if own.role == ACTIVE and own.epoch == state.epoch and own.log[: len(state.history)] != state.history:
                raise Violation(label, f"the active coordinator c{i} lacks an entry that was answered or shown")

    def retire(self, state: State) -> State:
        """Without a deposed coordinator that all nodes refuse and that has nothing left to commit."""
        for i, own in enumerate(state.coordinators):
            if own.role == STOPPED or own.epoch == state.epoch:
                continue
            if any(node.promised <= own.epoch and node.disk != DESTROYED for node in state.nodes):
                continue
            if own.role != ACTIVE or (own.cas != APPLIED and own.commit == self.acked_by_all(state, i)):
                state = state.restart(i)
        return state

    def is_healthy(self, state: State) -> bool:
        """The owner serves, and all members hold everything."""
        own = state.coordinators[state.owner]
        members = [node for node in state.nodes if node.member != NONE]
        views = [node.views[state.owner] for node in members]
        linked = all(view.trusted() and view.acked == len(own.log) for view in views)
        return own.role == ACTIVE and linked and all(node.disk != DESTROYED for node in members)

    def may_heal(self, state: State) -> bool:
        """The map names a good member, and there are nodes enough."""
        living = sum(node.disk != DESTROYED for node in state.nodes)
        return living >= self.minimum and any(node.whole() for node in state.nodes)
