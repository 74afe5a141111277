"""The whole cluster in one thread, from one seed: the product's own cores, and everything around them that can fail.

    python -m tests.simulation.run [SEEDS] [--first SEED] [--jobs N] [--traces]        also `make sim SEEDS=N SEED=K`

Coordinators (`Controller`, `Sequencer`, `MapChanges`), nodes (`NodeCore`, `Replicas`, `Table`) and the map are those of
the product. The shells around them, the clock, the network, the disks, the config store and the clients are those of
the `simulation_*` modules. Even seeds run in *safety* mode: faults until the end, then the oracles. Odd ones run in
*liveness* mode: after the faults everything is healed, and has to complete.

A seed counts if SEED_OPERATIONS of its requests were answered with a result and SEED_FAULTS faults struck: a cluster
that refuses everything violates nothing. The same seed gives the same trace, in any process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvtcp.cluster.map import ClusterMap
from tests.simulation.clients import OPERATIONS_MAX, Clients
from tests.simulation.coordinator import SimCoordinator
from tests.simulation.disk import MEMORY, OS, SYNC
from tests.simulation.faults import Faults
from tests.simulation.network import Network
from tests.simulation.node import SimNode
from tests.simulation.oracles import Oracles
from tests.simulation.store import SimStore
from tests.simulation.world import SMALL, Violation, World, require, small_limits

SEED_OPERATIONS = 500
SEED_FAULTS = 5
FIRST_MS = 1_500  # a run is at least so long
LAST_MS = 14_000  # and at most
QUIET_MS = 150  # before the first fault
CHECK_MS = 100  # between two checks of the cores
SURVIVORS_MS = 700  # between two looks at what would be left


@dataclass
class Result:
    """What a seed came to."""

    seed: int
    operations: int = 0
    faults: int = 0
    takeovers: int = 0
    learned: int = 0
    undecided: int = 0
    ruined: int = 0
    trace: str = ""
    violation: str = ""  # empty = none
    story: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether enough was answered and enough went wrong."""
        return self.operations >= SEED_OPERATIONS and self.faults >= SEED_FAULTS


class Simulation:
    """One run. `fixed` are properties of the run that are not drawn: "liveness", "mode", "shared", "factor",
    "min_insync", and "kinds", the names of the faults that are on."""

    coordinator_class = SimCoordinator
    node_class = SimNode

    def __init__(self, seed: int, **fixed: Any) -> None:
        self.seed = seed
        self.world = world = World(seed)
        rng = world.rng
        self.liveness = fixed.get("liveness", seed % 2 == 1)
        self.mode = fixed.get("mode", rng.choice((SYNC, SYNC, SYNC, OS, MEMORY)))
        self.shared = fixed.get("shared", rng.random() < 0.6)
        count = rng.randint(3, 5)
        factor = rng.choice((1, 2, 2, 3, 3, 3)) if self.mode == SYNC else rng.choice((2, 3, 3))
        factor = fixed.get("factor", factor)
        min_insync = rng.choice((1, factor, rng.randint(1, factor))) if factor > 1 else 1
        self.network = Network(world)
        names = [f"n{number}" for number in range(1, count + 1)]
        cluster_map = ClusterMap.found(
            cluster="c", owner="founder", shards=rng.randint(2, 6), factor=factor,
            min_insync=fixed.get("min_insync", min_insync), durability=self.mode, stamp_bound_ms=0,
            nodes={name: ("h", port) for port, name in enumerate(names, 1)},
        )  # fmt: skip
        self.oracles = Oracles(world, cluster_map)
        self.store = SimStore(world, cluster_map.to_json(), self.shared, lambda *change: self.faults.stored(*change))
        self.by_port: dict[int, SimNode] = {}
        self.nodes: list[SimNode] = []
        for name, (_, port) in cluster_map.nodes.items():
            self.add_node(name, port)
        hosts = ("c1", "c2") if self.shared else ("c1",)
        self.coordinators = [
            self.coordinator_class(world, host, self.mode, self.network, self.store, self.oracles, self.by_port)
            for host in hosts
        ]
        self.oracles.coordinators = self.coordinators
        self.clients = Clients(world, self.oracles, self.coordinators, cluster_map.shards)
        for coordinator in self.coordinators:
            coordinator.clients = self.clients
        self.faults = Faults(self, fixed.get("kinds"))

    def add_node(self, name: str, port: int) -> SimNode:
        """A new machine with a node."""
        node = self.node_class(self.world, name, port, self.mode, self.network, self.oracles, self.by_port)
        self.by_port[port] = node
        self.nodes.append(node)
        return node

    def run(self) -> None:
        """Everything, with all oracles."""
        world = self.world
        for node in self.nodes:
            node.start()
        self.coordinators[0].start()
        self.faults.supervise()
        self.clients.start()
        self._look_at_cores()
        world.at(SURVIVORS_MS, self._look_at_survivors)
        world.run(world.now_ms + QUIET_MS)
        self.faults.start()
        end_ms = world.now_ms + LAST_MS
        while world.now_ms < end_ms and not self._is_enough():
            world.run(world.now_ms + 100)
        if self.liveness:
            self.faults.heal()
            world.run(world.now_ms + 200)
            self.clients.stopped = True
            self.faults.settle()
            self._check_equal()
        self._check_survivors()

    def _is_enough(self) -> bool:
        done = self.clients.completed
        if len(self.clients.requests) > OPERATIONS_MAX:
            return True
        return self.world.now_ms > 1_000 + FIRST_MS and done >= SEED_OPERATIONS + 20 and self.faults.count > SEED_FAULTS

    # --- oracles --------------------------------------------------------------------------------------

    def _look_at_cores(self) -> None:
        for coordinator in self.coordinators:
            coordinator.check_bounds()
            self._check_core(coordinator)
        for node in self.nodes:
            if node.replica is not None:
                size = sum(one.bytes for one in node.replica.learning.values())
                most = SMALL["LEARN_BUFFER_BYTES_MAX"]
                require(size <= most, f"I12: {node.name} sets {size} bytes aside, {most} are allowed")
        self.world.at(CHECK_MS, self._look_at_cores)

    def _check_core(self, coordinator: SimCoordinator) -> None:
        coordinator.check()

    def _look_at_survivors(self) -> None:
        self._check_survivors()
        self.world.at(SURVIVORS_MS, self._look_at_survivors)

    def _check_survivors(self) -> None:
        """If all but the least advanced member of each shard were lost now, nobody could tell by what was answered."""
        reads: list[tuple[bytes, Any]] = []
        tables: dict[int, Any] = {}
        oracles = self.oracles
        for key, shard in self.clients.hot:
            if shard in oracles.ruined:
                continue
            if shard not in tables:
                row = [oracles.archive[disk] for _, disk in oracles.map.members[shard] if disk in oracles.archive]
                if not row:
                    continue
                least = min(row, key=lambda stored: (stored.seq, stored.disk))
                tables[shard] = least.table()
                oracles.sample(shard, tables[shard])
            cell = tables[shard].get(key, 0)
            reads.append((key, None if cell is None else int(cell[0])))
        self.clients.check_histories(reads)

    def _check_equal(self) -> None:
        """After healing: all members of a shard are equal, and it is what is on their disks."""
        owner = next(each for each in self.coordinators if each.is_ready)
        assert owner.controller is not None
        by_name = {node.name: node for node in self.nodes}
        for shard in owner.controller.sequencer.shards:
            number = shard.number
            for node in owner.controller.map.nodes_of(number):
                replica = by_name[node].replica
                assert replica is not None
                table = replica.tables[number]
                table.check()
                self.oracles.sample(number, table)
                require(table.seq == shard.last_seq, f"I13: {node} has {table.seq} of {shard.last_seq}", number)
                known = table.chain if number in self.oracles.ruined else self.oracles.chains[number][-1]
                require(table.chain == known, f"I13: {node} has another chain", number)
                stored = by_name[node].disk.manifest.copies[number]
                require(stored.seq == table.seq, f"I13: {node} has {stored.seq} on its disk", number)
                doubt = replica.copies[number].reason
                require(stored.reason == doubt, f"{node} doubts {stored.disk}: {doubt!r}, {stored.reason!r}", number)


def run_seed(seed: int, simulation_class: type[Simulation] = Simulation, **fixed: Any) -> Result:
    """One seed, whatever comes of it."""
    result = Result(seed)
    simulation = simulation_class(seed, **fixed)
    with small_limits():
        try:
            simulation.run()
        except Violation as violation:
            result.violation = violation.sentence
            result.story = simulation.world.story(violation.shard)
        except Exception as error:
            result.violation = f"{type(error).__name__}: {error}"
            result.story = [*simulation.world.story(None), *traceback.format_exc().splitlines()]
    result.operations = simulation.clients.completed
    result.faults = simulation.faults.count
    result.takeovers = sum(each.takeovers for each in simulation.coordinators)
    result.undecided = simulation.clients.undecided
    result.ruined = len(simulation.oracles.ruined)
    result.kinds = simulation.faults.counts
    result.trace = simulation.world.trace
    return result


def run_seeds(seeds: range, jobs: int) -> Iterator[Result]:
    """Many seeds, in their order."""
    if jobs == 1:
        yield from map(run_seed, seeds)
        return
    with multiprocessing.Pool(jobs) as pool:
        yield from pool.imap(run_seed, seeds, chunksize=4)


def main() -> int:
    """Run seeds, and tell of them."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("seeds", type=int, nargs="?", default=300)
    options.add_argument("--first", type=int, default=0, help="the first seed")
    options.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    options.add_argument("--stories", type=int, default=3, help="violations whose stories are told")
    options.add_argument("--traces", action="store_true", help="tell the trace and the faults of each seed")
    chosen = options.parse_args()
    began = time.monotonic()
    results, failed = [], []
    for result in run_seeds(range(chosen.first, chosen.first + chosen.seeds), chosen.jobs):
        results.append(result)
        if result.violation:
            failed.append(result)
            print(f"seed {result.seed}: {result.violation}", flush=True)
            if len(failed) <= chosen.stories:
                print("\n".join(f"    {line}" for line in result.story), flush=True)
        if chosen.traces or chosen.seeds == 1:
            print(f"seed {result.seed}: trace {result.trace}, {result.operations} operations, {result.kinds}")
    counted = [result for result in results if result.counts]
    spent = time.monotonic() - began
    print(
        f"{len(results)} seeds in {spent:.0f} s, {len(counted)} counted: medians of {_median(counted, 'operations')} "
        f"operations, {_median(counted, 'faults')} faults, {_median(counted, 'takeovers')} takeovers; "
        f"{sum(r.ruined > 0 for r in results)} with shards that lost all their disks, "
        f"{sum(r.undecided for r in results)} histories not decided; {len(failed)} violations"
    )
    return 1 if failed else 0


def _median(results: list[Result], name: str) -> float:
    return statistics.median(getattr(result, name) for result in results) if results else 0


if __name__ == "__main__":
    sys.exit(main())
