"""Tests of the simulation: seeds that must pass, the same seed twice, and the parts of the world it is made of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtcp.cluster.store import Outcome, Stored
from kvtcp.storage.shard.table import Table
from tests.simulation.disk import OS, SYNC, NodeDisk
from tests.simulation.network import TO_CLIENT, TO_SERVER, Network
from tests.simulation.run import SEED_FAULTS, SEED_OPERATIONS, Simulation, run_seed, run_seeds
from tests.simulation.store import SimStore
from tests.simulation.world import Process, Violation, World, require

ROOT = Path(__file__).parent.parent.parent
COUNTED_MIN = 0.8  # of all seeds


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 100), marks=pytest.mark.slow)], ids=str)
def test_seeds(seeds: range) -> None:
    """Seeds with all faults in both modes: no violation, and enough of them answered enough."""
    counted = 0
    for result in run_seeds(seeds, 1):
        told = "\n".join(result.story)
        assert not result.violation, f"seed {result.seed}: {result.violation}\n{told}"
        counted += result.counts
        assert result.undecided == 0, f"seed {result.seed}: the checker did not come to an end"
    told = f"{counted} of {len(seeds)} seeds had {SEED_OPERATIONS} operations, {SEED_FAULTS} faults"
    assert counted >= COUNTED_MIN * len(seeds), told


def traces(hash_seed: str) -> list[str]:
    """What a process with this seed of its hashes tells of some seeds."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.simulation.run", "12", "--traces", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "trace" in line]


def test_the_same_seed_is_the_same_run() -> None:
    """Two processes, whose hashes and addresses differ, come to the same traces, and every seed to another one."""
    first, second = traces("1"), traces("2")
    assert first == second
    assert len(set(first)) == 12


class Wrong(Simulation):
    """One in which an oracle is never content."""

    def _check_survivors(self) -> None:
        require(False, "the sentence", 1)


def test_a_violation_has_its_story() -> None:
    """What is told of a violation is its sentence, and events of its shard."""
    result = run_seed(3, Wrong)
    assert result.violation == "the sentence"
    assert len(result.story) > 10
    assert any("BATCH" in line for line in result.story)


def test_any_exception_is_a_violation() -> None:
    """A core that raises is told with its traceback."""

    class Broken(Simulation):
        def _check_survivors(self) -> None:
            raise KeyError("nothing there")

    result = run_seed(3, Broken)
    assert result.violation == "KeyError: 'nothing there'"
    assert any("Traceback" in line for line in result.story)


# --- processes ----------------------------------------------------------------------------------------


def test_a_paused_process_goes_on_later() -> None:
    """What comes due while it is paused is done when it goes on, in its order; what is due after its death never is."""
    world = World(1)
    process = Process(world, "p")
    done: list[str] = []
    process.born()
    process.later(5, done.append, "late")
    process.paused = True
    process.now(done.append, "now")
    world.run(world.now_ms + 10)
    assert done == []
    process.resume()
    assert done == ["now", "late"]
    process.later(5, done.append, "never")
    process.died()
    process.born()
    process.now(done.append, "again")
    world.run(world.now_ms + 10)
    assert done == ["now", "late", "again"]


# --- network ------------------------------------------------------------------------------------------


class Server(Process):
    """It notes what arrives."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "server")
        self.got: list[Any] = []
        self.connection: Any = None

    def accept(self, connection: Any) -> None:
        """Somebody connects."""
        self.connection = connection
        connection.on_frame[TO_SERVER] = self.got.append
        connection.on_end[TO_SERVER] = self.got.append


@pytest.fixture
def wired() -> tuple[World, Any, Server, list[Any]]:
    """A world, a connection, its server, and what arrives at its client."""
    world = World(3)
    client, server = Process(world, "client"), Server(world)
    client.born()
    server.born()
    connection = Network(world).connect(client, server)
    back: list[Any] = []
    connection.on_frame[TO_CLIENT] = back.append
    connection.on_end[TO_CLIENT] = back.append
    return world, connection, server, back


def test_a_connection_keeps_its_order(wired: Any) -> None:
    """Frames of one direction arrive in order, however slow the path is meanwhile."""
    world, connection, server, back = wired
    for number in range(50):
        connection.path.delay_ms = 1 + number * 7 % 20
        connection.send(TO_SERVER, [20, number])
    world.run(world.now_ms + 100)
    assert server.got == [[20, number] for number in range(50)]
    connection.send(TO_CLIENT, [21])
    connection.close(TO_SERVER)
    world.run(world.now_ms + 100)
    assert back == [[21], "connection reset"]


def test_what_is_blocked_arrives_later(wired: Any) -> None:
    """A path that is blocked in one direction loses nothing; the other direction goes on."""
    world, connection, server, back = wired
    connection.send(TO_SERVER, [20])
    world.run(world.now_ms + 50)
    connection.network.block(connection.path, [TO_SERVER])
    connection.send(TO_SERVER, [21])
    connection.send(TO_CLIENT, [22])
    world.run(world.now_ms + 50)
    assert server.got == [[20]]
    assert back == [[22]]
    connection.network.unblock(connection.path)
    world.run(world.now_ms + 50)
    assert server.got == [[20], [21]]


def test_a_reset_ends_both_sides(wired: Any) -> None:
    """Of what was under way a beginning arrives, then the end, and nothing that was sent later."""
    world, connection, server, back = wired
    connection.send(TO_SERVER, [0])
    world.run(world.now_ms + 50)
    for number in range(1, 20):
        connection.send(TO_SERVER, [number])
    connection.reset()
    connection.send(TO_SERVER, [99])
    world.run(world.now_ms + 50)
    *frames, end = server.got
    assert end == "connection reset"
    assert frames == [[number] for number in range(len(frames))]
    assert back == ["connection reset"]


def test_nobody_is_there(wired: Any) -> None:
    """A connection to a process that does not live ends; one whose process dies, too."""
    world, connection, server, back = wired
    server.died()
    connection.send(TO_SERVER, [1])
    world.run(world.now_ms + 50)
    assert back == ["connection reset"]
    assert server.got == []


# --- disk ---------------------------------------------------------------------------------------------


class Owner(Process):
    """A process with a disk."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "n1")
        self.told: list[int] = []
        self.born()

    def logged(self, entries: list[Any]) -> None:
        """No oracle hears of them."""

    def on_durable(self, connection: Any, ordinal: int) -> None:
        """See NodeDisk."""
        self.told.append(ordinal)


def disk_of(mode: str, seed: int) -> tuple[World, Owner, NodeDisk, Table]:
    """A node's disk with one empty copy of shard 0."""
    world = World(seed)
    owner = Owner(world)
    disk = NodeDisk(owner, mode, {})
    table = Table(0)

    named: Any = SimpleNamespace(shard=0, disk=disk.new_disk(), generation=1, reason="", table=table)
    disk.found([named])
    return world, owner, disk, table


def write(table: Table, count: int) -> list[Any]:
    """So many entries of a table."""
    entries = []
    for _ in range(count):
        table.apply((1, 0, table.seq + 1, 0, b"k", b"v"), 5)
        entries.append((0, 1, table.seq, table.chain, table.last_entry))
    return entries


@pytest.mark.parametrize("seed", range(20))
def test_what_was_acknowledged_survives(seed: int) -> None:
    """In mode sync a power cut leaves everything that the node was told of, and at most what was being written more."""
    world, owner, disk, table = disk_of(SYNC, seed)
    for ordinal in range(1, 9):
        assert not disk.append(write(table, 2), "link", ordinal)
        disk.flush()
        world.run(world.now_ms + world.rng.randrange(4))
    told = max(owner.told, default=0)
    owner.died()
    disk.crash(power=True)
    stored = disk.manifest.copies[0]
    assert 2 * told <= stored.seq <= 16
    assert stored.table().seq == stored.seq
    assert stored.position[2] == stored.chains[-1]


def test_a_power_cut_in_mode_os_makes_another_copy() -> None:
    """What the node was told of may be lost, so its copy is another one; the archive still has the one that was."""
    lost = 0
    for seed in range(20):
        world, owner, disk, table = disk_of(OS, seed)
        for ordinal in range(1, 6):
            disk.append(write(table, 1), "link", ordinal)
            disk.flush()
            world.run(world.now_ms + 10)
        assert owner.told == [1, 2, 3, 4, 5]
        disk.crash(power=True)
        stored = disk.manifest.copies[0]
        assert stored.disk != "n1/1"
        assert disk.archive["n1/1"].seq == 5
        lost += stored.seq < 5
    assert lost


# --- store --------------------------------------------------------------------------------------------


def test_an_unknown_outcome_may_be_applied() -> None:
    """Of many changes whose reply is lost some are applied, each at most once, and the asker is told once."""
    world = World(5)
    asker = Process(world, "c1")
    asker.born()
    stored: list[int] = []
    store = SimStore(world, b"{}", True, lambda before, after: stored.append(after.version))
    store.loses_replies = 0.5
    told: list[Any] = []
    for _ in range(30):
        store.compare_and_set(asker, store.stored.version, b"x", lambda outcome, found: told.append(outcome))
        world.run(world.now_ms + 100)
    assert len(told) == 30
    assert Outcome.UNKNOWN in told
    assert told.count(Outcome.DONE) < len(stored) == store.stored.version - 1
    assert stored == list(range(2, store.stored.version + 1))
    assert store.under_way == []


def test_a_conflict_changes_nothing() -> None:
    """Who expects another version changes nothing."""
    world = World(5)
    asker = Process(world, "c1")
    asker.born()
    store = SimStore(world, b"{}", True, lambda before, after: None)
    told: list[Any] = []
    store.compare_and_set(asker, 7, b"x", lambda outcome, found: told.append((outcome, found)))
    world.run(world.now_ms + 100)
    assert told == [(Outcome.CONFLICT, Stored(1, b"{}"))]


def test_require() -> None:
    """An oracle names its shard."""
    require(True, "fine")
    with pytest.raises(Violation, match="not so") as caught:
        require(False, "not so", 4)
    assert caught.value.shard == 4
