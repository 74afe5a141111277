"""Faults of a simulation, and healing.

Each kind is on with probability 1/2 for a seed; those that are on strike at random times. What takes the data of a copy
asks first whether the shards of the node would still have a member with data, whatever change of the map is under way:
a cluster that has lost everything violates nothing. The others have seeds of their own (`ruthless`).

`heal` ends all troubles. Then (I13) everything must complete in bounded time: every request is answered, every shard is
served by exactly the wanted nodes, and they are equal. Shards that lost all their disks go on when an operator accepts
the loss.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.store import Stored as StoredMap
from tests.simulation.disk import MEMORY, OS, SYNC_MS
from tests.simulation.network import DELAY_MS, TO_CLIENT, TO_SERVER, Path
from tests.simulation.world import require

if TYPE_CHECKING:
    from tests.simulation.coordinator import SimCoordinator
    from tests.simulation.node import SimNode
    from tests.simulation.run import Simulation

SETTLE_MS = 8_000  # everything completes in this time after the last fault
DESTROYED_MAX = 2  # machines that are gone for good
OPERATOR_MS = 150  # between two looks of the operator
AWAY_MS = 1_000  # a node that ended is started again after that
NODES_MAX = 6  # of a cluster
MACHINES_MAX = 10  # over all, with those of nodes that were removed
LOOK_MS = 40  # between two looks whether it has


class Faults:
    """What goes wrong with a simulation."""

    def __init__(self, simulation: Simulation, names: Collection[str] | None = None) -> None:
        """With `names` these kinds are on."""
        self.sim = simulation
        self.world = simulation.world
        self.rng = rng = simulation.world.rng
        self.counts: dict[str, int] = {}
        self.ruthless = rng.random() < 0.08 and simulation.mode != MEMORY
        kinds = [
            self.cut, self.partition, self.one_way, self.slow_path, self.untaken, self.slow_disk, self.kill_node,
            self.power_cut, self.wipe_node, self.pause_node, self.pause_coordinator, self.kill_coordinator,
            self.jump_clock, self.store_down, self.slow_store, self.isolate_coordinator, self.hello_twice,
            self.administer, self.black_out, self.stop_node, self.destroy_node,
            self.damage_copy, self.full_disk, self.stop_coordinator,
        ]  # fmt: skip
        if simulation.shared:
            kinds += [self.rival, self.split]
        self.kinds = [kind for kind in kinds if rng.random() < 0.5]
        if simulation.shared and self.rival not in self.kinds and rng.random() < 0.5:
            self.kinds.append(self.rival)
        self.moments = rng.choice((0.0, 0.0, 0.02, 0.08))  # share of rare moments in which something strikes
        if names is not None:
            self.kinds = [kind for kind in kinds if kind.__name__ in names]
        self.mean_ms = rng.choice((40, 80, 160))  # between two faults
        self.long = rng.choice((0.5, 1.0, self.mean_ms / 80))  # how long troubles last
        self.stopped = False
        self._said_ms = 0  # when the operator looked after nodes that are destroyed
        self._splits_at_change = False  # the network splits with the next change of the map
        self._calm_until_ms = 0  # nothing else strikes before

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts.values()) + sum(each.killed_writing for each in self.sim.coordinators)

    def start(self) -> None:
        """From now on."""
        if self.kinds:
            self.sim.network.on_rare_frame = self._rare_moment
            if self.kill_coordinator in self.kinds:
                for coordinator in self.sim.coordinators:
                    coordinator.dies_writing = self.rng.choice((0.0, 0.004, 0.015))
            self.world.at(1 + int(self.rng.expovariate(1 / self.mean_ms)), self._strike_again)

    def _strike_again(self) -> None:
        self._strike()
        self.world.at(1 + int(self.rng.expovariate(1 / self.mean_ms)), self._strike_again)

    def _strike(self) -> None:
        if self.stopped:
            return
        kind = self.rng.choice(self.kinds)
        if self.world.now_ms >= self._calm_until_ms and kind():
            name = kind.__name__
            self.counts[name] = self.counts.get(name, 0) + 1

    def _rare_moment(self) -> None:
        """Something happens that happens rarely: strike now and then in the middle of it."""
        if self.moments and self.rng.random() < self.moments:
            self.world.at(self.rng.randrange(6), self._strike)

    def _for_ms(self, shortest: int, longest: int) -> int:
        return int(self.rng.randint(shortest, longest) * self.long)

    def _node(self) -> SimNode | None:
        alive = [node for node in self.sim.nodes if node.alive and node.name in self.sim.oracles.map.nodes]
        return self.rng.choice(alive) if alive else None

    def _path(self) -> Path:
        return self.rng.choice(list(self.sim.network.paths.values()))

    def _paths_of(self, name: str) -> list[Path]:
        return [path for places, path in self.sim.network.paths.items() if name in places]

    # --- network --------------------------------------------------------------------------------------

    def cut(self) -> bool:
        """A connection breaks."""
        connections = [each for path in self.sim.network.paths.values() for each in path.connections]
        if not connections:
            return False
        connection = self.rng.choice(connections)
        self.world.note(f"fault: {connection.name} breaks")
        connection.reset()
        return True

    def hello_twice(self) -> bool:
        """A coordinator gives a connection up that is not broken, and says HELLO on the next one."""
        links = [link for each in self.sim.coordinators if each.takes_requests for link in each.links.values()]
        links = [link for link in links if link.connection is not None]
        if not links:
            return False
        link = self.rng.choice(links)
        self.world.note(f"fault: {link.coordinator.name} dials {link.node} again")
        assert link.connection is not None
        link.backoff_ms = 2
        if not link.coordinator.paused:
            link.close("it is dialled again")
        return True

    def partition(self) -> bool:
        """Nothing gets through for a while."""
        return self._block(self._path(), [TO_SERVER, TO_CLIENT], "partition")

    def one_way(self) -> bool:
        """Nothing gets through in one direction."""
        return self._block(self._path(), [self.rng.choice((TO_SERVER, TO_CLIENT))], "one way")

    def _block(self, path: Path, directions: list[int], what: str) -> bool:
        if any(path.blocked):
            return False
        self.world.note(f"fault: {what} {self._name(path)} {directions}")
        self._block_for(path, directions, self._for_ms(10, 600))
        return True

    def _block_for(self, path: Path, directions: list[int], ms: int) -> None:
        path.blocks += 1
        self.sim.network.block(path, directions)
        self.world.at(ms, self._unblock, path, path.blocks)

    def _unblock(self, path: Path, block: int) -> None:
        if path.blocks == block and any(path.blocked):
            self.world.note(f"{self._name(path)} is open again")
            self.sim.network.unblock(path)

    def _name(self, path: Path) -> str:
        return next("-".join(places) for places, each in self.sim.network.paths.items() if each is path)

    def isolate_coordinator(self) -> bool:
        """A coordinator reaches nobody; clients still reach it."""
        coordinator = self.rng.choice(self.sim.coordinators)
        if not coordinator.alive:
            return False
        directions = self.rng.choice(([TO_SERVER, TO_CLIENT], [TO_CLIENT], [TO_SERVER]))
        blocked = [self._block(path, directions, "isolated") for path in self._paths_of(coordinator.name)]
        return any(blocked)

    def split(self) -> bool:
        """A coordinator reaches only some of the nodes, perhaps not the store either; another one takes over, and
        reaches the other nodes. Sometimes just then when the store has made a change and nobody heard of it yet."""
        if self.rng.random() < 0.5:
            self._splits_at_change = True
            return False
        return self._split()

    def stored(self, before: StoredMap, after: StoredMap) -> None:
        """The map was changed. A split that waits for that comes when a member was added; the others are on one
        side."""
        old = self.sim.oracles.map.members
        self.sim.oracles.stored(before, after)
        new = self.sim.oracles.map.members
        if new != old:
            self._rare_moment()
        grown = [shard for shard in range(len(new)) if len(new[shard]) > len(old[shard])]
        if self._splits_at_change and grown and not self.stopped:
            self._splits_at_change = False
            if self._split([node for node, _ in old[grown[0]]]):
                self.counts["split"] = self.counts.get("split", 0) + 1

    def _split(self, near: list[str] | None = None) -> bool:
        sim, rng = self.sim, self.rng
        first, second = sim.coordinators if sim.coordinators[0].is_ready else sim.coordinators[::-1]
        if not first.is_ready or second.alive:
            return False
        names = list(sim.oracles.map.nodes)
        if near is None:
            near = rng.sample(names, rng.randint(1, max(1, len(names) // 2)))
        ms = self._for_ms(300, 1_000)
        if rng.random() < 0.7:
            self._calm_until_ms = self.world.now_ms + ms  # it takes some time until the other side serves
        self.world.note(f"fault: {first.name} with {near}, {second.name} with the others")
        if rng.random() < 0.7:
            sim.store.cut_off[first.name] = self.world.now_ms + ms
        for name in names:
            owner = second if name in near else first
            self._block_for(sim.network.path(owner.name, name), [TO_SERVER, TO_CLIENT], ms)
        self.world.at(1, self._start_if_idle, second)
        return True

    def _start_if_idle(self, coordinator: SimCoordinator) -> None:
        if not coordinator.alive and not self.stopped:
            coordinator.start()

    def slow_path(self) -> bool:
        """What is sent arrives late."""
        path = self._path()
        path.delay_ms = self._for_ms(20, 120)
        self.world.note(f"fault: {self._name(path)} is slow: {path.delay_ms} ms")
        self.world.at(self._for_ms(50, 500), setattr, path, "delay_ms", DELAY_MS)
        return True

    def untaken(self) -> bool:
        """The kernel of a coordinator takes nothing more for a node."""
        path = self._path()
        path.untaken = True
        self.world.note(f"fault: {self._name(path)} takes nothing")

        def end() -> None:
            path.untaken = False
            for coordinator in self.sim.coordinators:
                for link in coordinator.links.values():
                    coordinator.now(link.write)

        self.world.at(self._for_ms(10, 300), end)
        return True

    # --- nodes ----------------------------------------------------------------------------------------

    def slow_disk(self) -> bool:
        """Syncs of a node take long."""
        node = self.rng.choice(self.sim.nodes)
        node.disk.sync_ms = self._for_ms(20, 250)
        self.world.note(f"fault: syncs of {node.name} take {node.disk.sync_ms} ms")
        self.world.at(self._for_ms(50, 500), setattr, node.disk, "sync_ms", SYNC_MS)
        return True

    def pause_node(self) -> bool:
        """SIGSTOP, and SIGCONT later."""
        node = self._node()
        return node is not None and self._pause(node)

    def _pause(self, process: Any) -> bool:
        if process.paused or not process.alive:
            return False
        self.world.note(f"fault: {process.name} is stopped")
        process.paused = True
        life = process.life
        self.world.at(self._for_ms(10, 600), self._resume, process, life)
        return True

    def _resume(self, process: Any, life: int) -> None:
        if process.life == life and process.paused:
            self.world.note(f"{process.name} goes on")
            process.resume()

    def kill_node(self) -> bool:
        """SIGKILL."""
        return self._end_node(self._node(), "killed", power=False, wipe=False)

    def power_cut(self) -> bool:
        """The machine of a node loses power."""
        return self._end_node(self._node(), "without power", power=True, wipe=False)

    def wipe_node(self) -> bool:
        """A node comes back with an empty disk."""
        return self._end_node(self._node(), "wiped", power=True, wipe=True)

    def damage_copy(self) -> bool:
        """A node is killed, and finds a damaged copy when it starts."""
        node = self._node()
        if node is None or node.mode == MEMORY or not self._may_lose(node):
            return False
        self.world.note(f"fault: {node.name} is killed, and has a damaged copy")
        node.kill(damage=True)
        self.world.at(self._for_ms(1, 300), self._start, node)
        return True

    def full_disk(self) -> bool:
        """A node is short of space for a while."""
        node = self._node()
        if node is None or node.paused:
            return False
        level = self.rng.choice((1, 1, 2))
        self.world.note(f"fault: {node.name} is short of space: {level}")
        node.tell_space(level)
        self.world.at(self._for_ms(20, 300), lambda: node.now(node.tell_space, 0))
        return True

    def destroy_node(self) -> bool:
        """A machine is gone for good, and an operator says so."""
        node, cluster_map = self._node(), self.sim.oracles.map
        if node is None or len(cluster_map.nodes) <= max(cluster_map.factor, 2) or not self._may_lose(node):
            return False
        if sum(each.is_destroyed for each in self.sim.nodes) >= DESTROYED_MAX:
            return False
        self.world.note(f"fault: {node.name} is destroyed")
        node.kill(power=True, wipe=True)
        node.is_destroyed = True
        return True

    def _say_what_is_destroyed(self) -> None:
        """The operator, to whoever serves, until it is in the map."""
        cluster_map = self.sim.oracles.map
        for node in self.sim.nodes:
            if not node.is_destroyed or node.name in cluster_map.destroyed or node.name not in cluster_map.nodes:
                continue
            for coordinator in self.sim.coordinators:
                if coordinator.is_ready and not coordinator.paused and coordinator.controller is not None:
                    heard = partial(self._heard, coordinator, node.name)
                    coordinator.step(coordinator.controller.admin.forget, node.name, heard)
                    return

    def _accept_losses(self) -> None:
        """The operator, when nothing more will come back: shards that lost all their disks go on without."""
        for coordinator in self.sim.coordinators:
            controller = coordinator.controller
            if coordinator.is_ready and controller is not None:
                for shard in sorted(self.sim.oracles.ruined):
                    if not controller.sequencer.shards[shard].serving:
                        heard = partial(self._heard_of_loss, shard)
                        coordinator.step(controller.admin.accept_loss, shard, heard)

    def _heard_of_loss(self, shard: int, answer: Any) -> None:
        self.world.note(f"the operator, who accepts the loss, hears {answer}", shard)

    def _heard(self, coordinator: SimCoordinator, name: str, answer: Any) -> None:
        self.world.note(f"the operator, who says that {name} is destroyed, hears {answer}")
        if "add a node" in str(answer) and coordinator.controller is not None:
            port = MACHINES_MAX + len(self.sim.nodes)
            coordinator.controller.admin.add_node("h", port, lambda added: self.world.note(f"added: {added}"))

    def stop_node(self) -> bool:
        """A node is stopped in order, and started again."""
        node = self._node()
        if node is None or node.paused or node.mode == MEMORY:
            return False
        self.world.note(f"fault: {node.name} is to stop")
        node.leave()
        self.world.at(self._for_ms(200, 500), self._start, node)
        return True

    def black_out(self) -> bool:
        """All nodes lose power at the same moment."""
        if self.sim.mode != "sync":
            return False
        for node in self.sim.nodes:
            if node.alive:
                self._end_node(node, "without power, like all", power=True, wipe=False)
        return True

    def _end_node(self, node: SimNode | None, how: str, *, power: bool, wipe: bool) -> bool:
        if node is None:
            return False
        loses = wipe or node.mode == MEMORY or (power and node.mode == OS)
        if loses and not self._may_lose(node):
            return False
        self.world.note(f"fault: {node.name} is {how}")
        node.kill(power, wipe)
        self.world.at(self._for_ms(1, 300), self._start, node)
        return True

    def _start(self, node: SimNode) -> None:
        if not node.alive and not node.is_destroyed and node.name in self.sim.oracles.map.nodes:
            node.start()

    def _may_lose(self, node: SimNode) -> bool:
        """Whether every shard of the node has a member with data that is not on it, now and after any change of the map
        that is under way."""
        if self.ruthless:
            return True
        sim = self.sim
        maps = [sim.oracles.map]
        maps += [ClusterMap.from_json(value) for value in sim.store.under_way]
        for coordinator in sim.coordinators:
            if coordinator.changes is not None and coordinator.changes.proposed is not None:
                maps.append(coordinator.changes.proposed)
        for cluster_map in maps:
            for row in cluster_map.members:
                others = [disk for name, disk in row if name != node.name and sim.oracles.has_data(disk)]
                mine = any(name == node.name for name, _ in row)
                if mine and not others:
                    return False
        return True

    # --- coordinators ---------------------------------------------------------------------------------

    def pause_coordinator(self) -> bool:
        """SIGSTOP, and SIGCONT later; it goes on with what it believed before."""
        return self._pause(self.rng.choice(self.sim.coordinators))

    def kill_coordinator(self) -> bool:
        """SIGKILL. Another one starts soon, on the same data or the same store."""
        coordinator = self.rng.choice(self.sim.coordinators)
        if not coordinator.alive:
            return False
        self.world.note(f"fault: {coordinator.name} is killed")
        coordinator.kill()
        return True

    def stop_coordinator(self) -> bool:
        """A coordinator is stopped in order."""
        coordinator = self.rng.choice(self.sim.coordinators)
        if not coordinator.takes_requests or coordinator.paused:
            return False
        self.world.note(f"fault: {coordinator.name} is stopped in order")
        coordinator.leave()
        return True

    def rival(self) -> bool:
        """Another coordinator takes over, whatever the present one does. It knows nothing of that."""
        idle = [each for each in self.sim.coordinators if not each.alive]
        if not idle:
            return False
        other = next(each for each in self.sim.coordinators if each is not idle[0])
        if self.rng.random() < 0.3:
            self._pause(other)
        idle[0].start()
        return True

    def jump_clock(self) -> bool:
        """The clock of a coordinator is set."""
        coordinator = self.rng.choice(self.sim.coordinators)
        by_ms = self.rng.choice((-2_000, -300, 50, 300, 3_000))
        coordinator.clock_ms += by_ms
        self.world.note(f"fault: the clock of {coordinator.name} jumps by {by_ms} ms")
        return True

    # --- the store ------------------------------------------------------------------------------------

    def store_down(self) -> bool:
        """The store does not answer for a while."""
        if self.sim.store.is_down:
            return False
        self.sim.store.down_until_ms = self.world.now_ms + self._for_ms(20, 400)
        self.world.note("fault: the store is down")
        return True

    def slow_store(self) -> bool:
        """The store is slow, and its replies are lost now and then."""
        store = self.sim.store
        store.delay_ms = self.rng.choice((3, 20, 60))
        store.loses_replies = self.rng.choice((0.0, 0.3, 0.7))
        self.world.note(f"fault: the store takes {store.delay_ms} ms, loses {store.loses_replies}")
        return store.delay_ms > 3 or store.loses_replies > 0

    # --- operators ------------------------------------------------------------------------------------

    def administer(self) -> bool:
        """An operator adds, drains or removes a node, or asks for balance."""
        ready = [each for each in self.sim.coordinators if each.is_ready and not each.paused]
        if not ready:
            return False
        coordinator = self.rng.choice(ready)
        controller = coordinator.controller
        assert controller is not None
        draining, nodes = controller.map.draining, controller.map.nodes
        admin = controller.admin
        what = self.rng.choice(("add", "drain", "rebalance", "remove", "rebalance"))

        def done(answer: Any) -> None:
            self.world.note(f"the operator hears {answer}")

        if what == "add":
            if len(nodes) >= NODES_MAX or len(self.sim.nodes) >= MACHINES_MAX:
                return False
            coordinator.step(admin.add_node, "h", MACHINES_MAX + len(self.sim.nodes), done)
        elif what == "drain":
            coordinator.step(admin.drain, self.rng.choice(list(nodes)), done)
        elif what == "remove":
            if not draining:
                return False
            coordinator.step(admin.remove, self.rng.choice(draining), done)
        else:
            coordinator.step(admin.rebalance, False, done)
        self.world.note(f"an operator asks {coordinator.name} to {what}")
        return True

    # --- healing --------------------------------------------------------------------------------------

    def supervise(self) -> None:
        """Once in a while: a coordinator must live; a node that was added is started, one that was removed is ended."""
        sim = self.sim
        names = [node.name for node in sim.nodes]
        for name, (_, port) in sim.oracles.map.nodes.items():
            if name not in names:
                sim.add_node(name, port).start()
        for node in sim.nodes:
            if node.alive and node.name not in sim.oracles.map.nodes:
                node.kill()
            elif not node.alive and (self.stopped or self.world.now_ms - node.ended_ms > AWAY_MS):
                self._start(node)
        if not any(each.alive for each in sim.coordinators) and (self.stopped or self.rng.random() < 0.4):
            self.rng.choice(sim.coordinators).start()
        if self.world.now_ms - self._said_ms > OPERATOR_MS:
            self._said_ms = self.world.now_ms
            self._say_what_is_destroyed()
            if self.stopped:
                self._accept_losses()
        self.world.at(20, self.supervise)

    def heal(self) -> None:
        """No more faults, and an end to those that last."""
        sim = self.sim
        self.stopped = True
        for coordinator in sim.coordinators:
            coordinator.dies_writing = 0.0
        self.world.note("everything is healed")
        sim.network.heal()
        sim.store.down_until_ms = 0
        sim.store.cut_off.clear()
        sim.store.delay_ms, sim.store.loses_replies = 3, 0.0
        for node in sim.nodes:
            node.disk.sync_ms = SYNC_MS
            self._start(node)
            node.resume()
            node.now(node.tell_space, 0)
        for coordinator in sim.coordinators:
            coordinator.resume()

    def settle(self) -> None:
        """I13: run until everything is as it should be, and fail if it does not get there."""
        world = self.world
        end_ms = world.now_ms + SETTLE_MS
        what = ""
        while world.now_ms < end_ms:
            world.run(world.now_ms + LOOK_MS)
            what = self.unsettled()
            if not what:
                return
        shard = int(what.split()[1]) if what.startswith("shard ") else None
        require(False, f"I13: after {SETTLE_MS} ms without a fault {what}", shard)

    def unsettled(self) -> str:
        """What is not as it should be; empty if everything is."""
        sim = self.sim
        owners = [each for each in sim.coordinators if each.is_ready]
        if len(owners) != 1:
            return f"{len(owners)} coordinators serve"
        controller = owners[0].controller
        assert controller is not None
        cluster_map = controller.map
        if controller.changes.is_busy:
            return "the map is being changed"
        usable = len(cluster_map.nodes) - len({*cluster_map.draining, *cluster_map.destroyed})
        for shard in controller.sequencer.shards:
            number = shard.number
            wanted, nodes = cluster_map.wanted[number], cluster_map.nodes_of(number)
            if not shard.serving:
                return f"shard {number} is not served: {shard.reason}"
            if set(nodes) != set(wanted):
                return f"shard {number} is on {nodes}, not on {wanted}"
            if len(wanted) < min(cluster_map.factor, usable):
                return f"shard {number} is wanted on {wanted} only"
            if shard.learners or shard.bad or not shard.is_whole():
                return f"shard {number} has learners {list(shard.learners)}, bad {shard.bad}"
            if shard.commit != shard.last_seq or shard.held or shard.waiting:
                return f"shard {number} has commit {shard.commit} of {shard.last_seq}"
        open_requests = [client.busy.told() for client in sim.clients.clients if client.busy is not None]
        return f"no answer to {open_requests}" if open_requests else ""
