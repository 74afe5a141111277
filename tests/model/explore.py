"""An explicit-state model of the replication of ONE shard: breadth-first over every interleaving of a small scope.

    python -m tests.model.explore [--quick] [--jobs N] [--cap STATES] [--only NAME]      `make model`

Each scope of the full rules must hold ("exhausted", or "cap" if it ran into the cap), each mutant (a rule taken away)
must be caught, and each goal must be reached, so that what is explored is not empty. The shortest trace is printed.
Exit status 1 if anything is otherwise. The steps are in rules.py; docs/replication.md has the rules
for readers, with the mutants beside them.

What is modelled: three or four nodes, two coordinators, a config store with compare-and-set, an operator. Nothing ever
has to happen: a coordinator may pause for ever and go on later, every message and map change may be late. A node may
lose its whole disk, promise included (disk_lost), or a tail that was not synced (tail_lost), or be destroyed, which is
to never answer again. A *disk* is the identity of one copy of the shard: a node that finds its copy empty, reset or cut
takes a new one before it listens. A *member* is a pair (node, disk). E = the members a coordinator knows, united with
those of its map change under way. M = min_insync. *Good* = answered from the disk by which it is a member.

R1 Commit k when every member of E acknowledged k from the disk by which it is a member.
R2 Shrink: CAS, then drop. Grow: a learner that acknowledged everything *committed* joins E, then CAS. Move: grow, then
    shrink. One change at a time. An unknown outcome keeps the union until the map's version has moved past the one that
    the CAS expects (the same CAS is sent again); a read that shows the map unchanged settles nothing.
R3 A CAS compares the map's version and its leadership together.
R4 The stored ISR never gets smaller than M.
R5 HELLO(epoch): refuse below the promise, persist, then report.
R6 Recovery: every member answers HELLO or is removed by CAS (never below M, and none before a *good* one has answered);
    the best good log is brought to all; then the shard serves. If a link breaks meanwhile it begins anew.
R7 A log is identified by position (epoch, seq, chain); what does not match is wiped.
R9 A bad member that answered is fenced: it is removed by CAS if M stay, or it stays, is brought whole to the best log,
    enters the map under its new disk by CAS, and only then the shard serves. While the coordinator lives the same
    holds: evict and learn, or bring it whole to everything committed, then CAS old disk -> new. Until that CAS is known
    to be applied, acknowledgements, answers and confirmations of the new disk count for nothing and the old one stays
    in E (so nothing commits). No map change may remove the last member known to be good; without one the shard is down.
    A silent member that an operator declared *destroyed* counts as fenced. In recovery it is removed if M stay, else it
    gives its place to another node: that one is brought whole to the best log, then one CAS (old node, disk) -> (new
    node, disk), and only then the shard serves. In a running epoch the same, to everything committed: until the CAS is
    known to be applied E has both, so nothing commits.
R11 (b) A present key's answer waits for commit >= its revision, an absent one for commit >= everything queued before
    the read; (c) |E|-M+1 members of E were heard after it arrived.

R10 is built in (to write = to queue on all links). R13 and R14 are not needed for safety here: refused coordinators go
on, and any member may be evicted at any time. The declaration of an operator is true (destroyed_alive is the mutant in
which it is not) and every coordinator may learn of it at any time, or never. `swaps` scopes allow more than the rules:
a serving coordinator may replace any member in one CAS. That is safe too, as all members of a running epoch are fenced;
it is in recovery that the declaration is needed. Not modelled: R8 (effects), R12 (time), several shards in one map,
results of writes, incomplete snapshots (a copy arrives entry by entry, always from a member that holds it), the commit
hint (by property 1 a member with the right disk is never below it: a tripwire for faults outside the model), an
accepted loss, loss of the map, unknown outcomes of the map changes made during recovery (it waits for them).

Properties: 1 every stored member with its disk holds every answered entry; 2 the active coordinator of the map's epoch
has everything answered or shown by a read; 3 no two different entries are answered at one number; 4 a read is not older
than what was answered or shown before it arrived, and what it showed is never contradicted; 5 fewer than M disks lost
after an answer leave a good member in the map, and no map change knowingly removes the last one; 6 recovery never meets
a good member with entries that the best log lacks; 7 where a scope says so, no dead end: while the map names a good
member and M nodes are not destroyed, its owner can get to where all members hold everything.

Reductions, none of which hides a violation: nodes are interchangeable, so a state keeps them sorted; append + fsync +
acknowledge is one step (a late acknowledgement = the coordinator's next step is late); a read's confirmations, its
answer (fixed when queued: links are FIFO) and its release happen as soon as they can, since waiting only disables them;
a read that can never be released is dropped, and so is, with no fault left to come, a deposed coordinator that all
nodes refuse and that has nothing left to commit (not in mutants).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from typing import NamedTuple

from tests.model.rules import NONE, Rules, Scope, State, Violation

STATES_MAX = 1_500_000
EXHAUSTED, CAPPED, REACHED = "exhausted", "cap", "reached"
DEAD_END = "dead end: a good member and nodes enough, yet the shard can never serve again"

class Found(NamedTuple):
    """What a search found."""

    verdict: str  # EXHAUSTED, CAPPED, REACHED (the goal), or the property that is violated
    trace: list[str]  # labels of the steps to it
    states: int


class Search:
    """Breadth-first search over the states of a scope."""

    def __init__(self, rules: Rules, states_max: int = STATES_MAX, goal: Callable[[State], bool] | None = None) -> None:
        self.rules, self.states_max, self.goal = rules, states_max, goal
        self.parents: dict[State, State | None] = {}
        self.before: defaultdict[State, list[State]] = defaultdict(list)  # kept to find dead ends

    def run(self) -> Found:
        """Search until something is violated, the goal is reached, or the end."""
        rules, parents, dead_ends = self.rules, self.parents, self.rules.scope.dead_ends
        state = rules.initial().sorted()
        parents[state] = None
        queue = deque([state])
        try:
            while queue and len(parents) < self.states_max:
                state = queue.popleft()
                for label, after in rules.successors(state):
                    after = after.sorted()
                    if after not in parents:
                        rules.check(after, label)
                        parents[after] = state
                        queue.append(after)
                        if self.goal is not None and self.goal(after):
                            return Found(REACHED, self.replay(after)[1], len(parents))
                    if dead_ends:
                        self.before[after].append(state)
        except Violation:
            return Found(*self.replay(state), len(parents))
        stuck = self.dead_end() if dead_ends and not queue else None
        if stuck is not None:
            return Found(DEAD_END, self.replay(stuck)[1], len(parents))
        return Found(CAPPED if queue else EXHAUSTED, [], len(parents))

    def dead_end(self) -> State | None:
        """A state that could be healed by what it has, and from which no healthy one is reached."""
        pending = [state for state in self.parents if self.rules.is_healthy(state)]
        alive = set(pending)
        while pending:
            fresh = [state for state in self.before[pending.pop()] if state not in alive]
            alive.update(fresh)
            pending.extend(fresh)
        return next((state for state in self.parents if state not in alive and self.rules.may_heal(state)), None)

    def replay(self, last: State) -> tuple[str, list[str]]:
        """What is violated after a state, and the steps to it, without sorting: every node keeps its number."""
        path: list[State] = []
        following: State | None = last
        while following is not None:
            path.append(following)
            following = self.parents[following]
        state, labels = path.pop(), []
        while path:
            label, state = next(step for step in self.rules.successors(state) if step[1].sorted() == path[-1])
            labels.append(label)
            path.pop()
        try:
            for label, after in self.rules.successors(state):
                self.rules.check(after, label)
        except Violation as violation:
            return violation.args[1], [*labels, violation.args[0]]
        return "", labels


# --- scopes ---------------------------------------------------------------------------------------------

X, XX, XD, XY = ("put x",), ("put x", "put x"), ("put x", "delete x"), ("put x", "put y")
XYD = (*XY, "delete x")
WIPE, TAIL, GONE = ("disk_lost",), ("tail_lost",), ("destroyed",)

QUICK = {  # full rules; the ones that take longest first
    "M2 epochs2 ops2": Scope(2, 2, XD, reads=1),
    "disk lost": Scope(2, 2, X, faults=WIPE, dead_ends=True),
    "tail lost": Scope(2, 2, X, faults=TAIL, dead_ends=True),
    "move, read": Scope(2, 2, X, reads=1, members=2),
    "one of two destroyed": Scope(2, 2, X, faults=GONE, dead_ends=True, members=2),
    "M2 epochs3 ops1": Scope(2, 3, X, reads=1),
    "destroyed, disk lost, read, one epoch": Scope(2, 1, X, reads=1, faults=GONE + WIPE, members=2),
    "M2 epochs2 ops1": Scope(2, 2, X, reads=1),
    "one of three destroyed": Scope(2, 2, X, faults=GONE, dead_ends=True),
    "swaps": Scope(2, 2, X, members=2, swaps=True),
    "disk lost, destroyed, one epoch": Scope(2, 1, X, faults=WIPE + GONE, dead_ends=True, members=2),
}
LONG = {
    "M1 epochs2 ops2": Scope(1, 2, XD, reads=1),
    "4 nodes, one of two destroyed": Scope(2, 2, X, faults=GONE, dead_ends=True, nodes=4, members=2),
    "swaps, read": Scope(2, 2, X, reads=1, members=2, swaps=True),
    "swaps, disk lost": Scope(2, 2, X, faults=WIPE, dead_ends=True, members=2, swaps=True),
    "destroyed, disk lost": Scope(2, 2, X, faults=GONE + WIPE, dead_ends=True, members=2),
    "disk lost, destroyed": Scope(2, 2, X, faults=WIPE + GONE, dead_ends=True, members=2),
    "destroyed, 2 ops": Scope(2, 2, XX, faults=GONE, dead_ends=True, members=2),
    "destroyed, read": Scope(2, 2, X, reads=1, faults=GONE, members=2),
    "destroyed, 3 epochs": Scope(2, 3, X, faults=GONE, dead_ends=True, members=2),
    "4 nodes, one of three destroyed, M3": Scope(3, 2, X, faults=GONE, dead_ends=True, nodes=4),
    "M1 epochs2 ops1": Scope(1, 2, X, reads=1),
    "M2 epochs3 ops2": Scope(2, 3, XD, reads=1),
    "M1 epochs2 ops2, no read": Scope(1, 2, XD),
    "two keys": Scope(2, 2, XY, reads=1),
    "two reads": Scope(2, 2, XD, reads=2),
    "growth under load": Scope(2, 2, XYD),
    "disk lost, read": Scope(2, 2, X, reads=1, faults=WIPE),
    "disk lost, 3 epochs": Scope(2, 3, X, faults=WIPE, dead_ends=True),
    "disk lost, 2 ops": Scope(2, 2, XD, faults=WIPE),
    "disk lost, M1": Scope(1, 2, X, faults=WIPE),
    "tail lost, M1": Scope(1, 2, X, faults=TAIL),
    "two disks lost": Scope(2, 2, X, faults=WIPE * 2),
}

SMALL, READ = Scope(2, 2, X), Scope(2, 2, X, reads=1)
PAIR_WIPE = Scope(1, 2, X, faults=WIPE, nodes=2, members=2)
MUTANTS = {  # name: (rule, scope)
    "destroyed_never_replaced": ("R9", QUICK["one of two destroyed"]),
    "recover_from_any": ("R6", Scope(2, 2, X, reads=1, members=2)),
    "new_disk_confirms": ("R9", Scope(1, 2, X, reads=1, faults=WIPE, nodes=2, members=2)),
    "read_absent_early": ("R11b", QUICK["M2 epochs2 ops2"]),
    "removable_is_kept": ("R9", QUICK["one of three destroyed"]),
    "commit_on_minimum": ("R1", SMALL),
    "ack_before_cas": ("R2", SMALL),
    "expand_late": ("R2", SMALL),
    "join_before_committed": ("R2", SMALL),
    "unchanged_read_settles_cas": ("R2", SMALL),
    "cas_no_epoch": ("R3", SMALL),
    "isr_below_minimum": ("R4", READ),
    "report_no_fence": ("R5", SMALL),
    "no_node_epoch_check": ("R5", SMALL),
    "epoch_volatile": ("R5", Scope(1, 2, X, faults=("forgets_promise",), nodes=2, members=2)),
    "serve_before_catchup": ("R6", Scope(1, 3, X, reads=1, nodes=2, members=2)),
    "swap_in_recovery": ("R6", Scope(2, 2, X, reads=1, members=2)),
    "remove_last_good": ("R6", PAIR_WIPE),
    "removed_before_map": ("R6", Scope(1, 3, X, nodes=2, members=2)),
    "seq_only": ("R7", Scope(1, 2, XX, nodes=2, members=2)),
    "amnesia": ("R9", Scope(2, 1, X, faults=TAIL)),
    "wiped_member_is_good": ("R9", PAIR_WIPE),
    "bad_member_never_kept": ("R9", Scope(2, 2, X, faults=WIPE, dead_ends=True, nodes=2, members=2)),
    "new_disk_before_resync": ("R9", PAIR_WIPE),
    "new_disk_before_map": ("R9", Scope(2, 2, X, faults=WIPE * 2, nodes=2, members=2)),
    "reconnect_by_position": ("R9", Scope(2, 2, X, reads=1, faults=WIPE, nodes=2, members=2)),
    "destroyed_alive": ("R9", Scope(2, 2, X, reads=1, members=2)),
    "destroyed_leaves_early": ("R9", Scope(2, 1, X, faults=GONE + WIPE, members=2)),
    "replacement_before_committed": ("R9", Scope(2, 1, X, faults=GONE, members=2)),
    "replacement_before_cas": ("R9", Scope(2, 1, X, faults=GONE + WIPE, members=2)),
    "replacement_before_whole": ("R9", Scope(2, 2, X, faults=GONE, members=2)),
    "replacement_before_map": ("R9", Scope(2, 2, X, faults=GONE + WIPE, members=2)),
    "read_uncommitted": ("R11b", READ),
    "read_no_confirm": ("R11c", Scope(1, 2, X, reads=1, nodes=2, members=2)),
    "confirm_isr_only": ("R11c", Scope(1, 2, X, reads=1, nodes=2, members=1)),
}


def spare_is_member(state: State) -> bool:
    """The spare node and one other are the members, and a write was answered."""
    return sorted(node.member for node in state.nodes) == [NONE, 0, 1] and state.answered > 0


def spare_is_member_of_epoch_2(state: State) -> bool:
    """The same after a recovery; the write is from the epoch before."""
    return state.epoch == 2 and state.history[:1] == (10,) and spare_is_member(state)


GOALS = {  # name: (what a healthy state of the scope must be, a step on the shortest way there, scope)
    "planned move": (spare_is_member, "propose_shrink", Scope(2, 1, X, members=2)),
    "replacement while serving": (spare_is_member, "propose_replace", Scope(2, 1, X, faults=GONE, members=2)),
    "replacement in recovery": (spare_is_member_of_epoch_2, "cas_replace", Scope(2, 2, X, faults=GONE, members=2)),
}


# --- runs -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One search, and what it has to find."""

    kind: str  # "rules", "mutant" or "goal"
    name: str
    scope: Scope
    rule: str = ""  # that the mutant takes away


class Outcome(NamedTuple):
    """What a case came to."""

    case: Case
    is_expected: bool
    found: Found
    seconds: float

    def __str__(self) -> str:
        case, found = self.case, self.found
        rule = f" ({case.rule})" if case.rule else ""
        line = f"{'ok  ' if self.is_expected else 'FAIL'} {case.kind} {case.name}{rule}: {found.verdict}"
        line += f" [{found.states} states, {self.seconds:.1f} s]"
        return line + (f", {len(found.trace)} steps:\n    " + " > ".join(found.trace) if found.trace else "")


def cases(*, quick: bool, part_of_name: str = "") -> list[Case]:
    """The cases to run, roughly the longest first, so that several processes end together."""
    scopes = [Case("rules", name, scope) for name, scope in (QUICK if quick else LONG | QUICK).items()]
    mutants = [Case("mutant", name, scope, rule) for name, (rule, scope) in MUTANTS.items()]
    goals = [Case("goal", name, scope) for name, (_, _, scope) in GOALS.items()]
    return [case for case in scopes + mutants + goals if part_of_name in case.name]


def run_case(case: Case, states_max: int = STATES_MAX) -> Outcome:
    """Search, and compare with what is expected."""
    start = time.perf_counter()
    rules = Rules(case.scope, case.name if case.kind == "mutant" else "")
    if case.kind == "goal":
        wanted, step, _ = GOALS[case.name]
        found = Search(rules, states_max, lambda state: wanted(state) and rules.is_healthy(state)).run()
        is_expected = found.verdict == REACHED and any(step in label for label in found.trace)
    else:
        found = Search(rules, states_max).run()
        is_expected = (found.verdict in (EXHAUSTED, CAPPED)) == (case.kind == "rules")
    return Outcome(case, is_expected, found, time.perf_counter() - start)


def run_cases(chosen: Sequence[Case], jobs: int, states_max: int = STATES_MAX) -> Iterator[Outcome]:
    """Run cases in processes of their own, in which garbage is not collected: nothing in a search is cyclic."""
    with Pool(jobs, initializer=gc.disable) as pool:
        yield from pool.imap_unordered(partial(run_case, states_max=states_max), chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases that the command line chooses; 1 if one is not as expected."""
    parser = argparse.ArgumentParser(description="explore every interleaving of the replication of one shard")
    parser.add_argument("--quick", action="store_true", help="the smaller scopes, all mutants and all goals")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--cap", type=int, default=STATES_MAX, help="states per scope")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args(arguments)
    chosen = cases(quick=given.quick, part_of_name=given.only)
    if not chosen:
        parser.error(f"no case is named like {given.only!r}")
    expected = 0
    for outcome in run_cases(chosen, given.jobs, given.cap):
        print(outcome, flush=True)
        expected += outcome.is_expected
    print(f"{expected} of {len(chosen)} as expected")
    return 0 if expected == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
