"""Random walks through the whole core, frame by frame, with an operator who asks for everything there is.

    python -m tests.support.controller_walk [SEEDS] [FIRST]

The simulation has a network, disks and clients with their time. Here every single frame and outcome of
the config store may come at any moment, also between any two others, links break wherever they are, and administrative
requests cross each other. The cores check themselves after every step, the world checks every map that is stored.

After a walk everything is healed. Then every shard is served by its wanted members, which are equal, or it is down
because nobody has its data; only copies that were lost, or declared so, can be the reason. What was answered is there
if nothing was lost.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

from kvtcp.cluster.store import Outcome
from kvtcp.errors import AdminError
from kvtcp.protocol.link import LEAVE
from kvtcp.protocol.operations import INCR
from tests.support.controller_world import World

STEPS = 400
HEAL_TICKS = 500
COUNTER = b"n"


class Walk:
    """One walk."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        nodes = rng.randint(2, 5)
        factor = rng.randint(1, min(3, nodes))
        self.world = World(
            nodes, factor, rng.randint(1, 4), min_insync=rng.randint(1, factor),
            durability=rng.choice(["sync", "sync", "memory"]), wanted=rng.randint(factor, nodes),
        )  # fmt: skip
        self.tokens = 0
        self.answered: dict[Any, Any] = {}  # (kind, shard, token) -> result, of coordinators that are gone too
        self.has_lost = False  # copies, or an operator said so
        self.steps: list[tuple[Callable[[], None], int]] = [
            (self.world.flush, 20), (self.work, 30), (self.deliver, 50), (self.tick, 15), (self.write, 23),
            (self.read, 6), (self.lose_link, 3), (self.link, 8), (self.wipe, 1), (self.restart, 1), (self.store, 6),
            (self.world.pump, 2), (self.ask, 2), (self.leave, 1), (self.audit, 1), (self.take_over, 1),
            (self.forget_entries, 1), (self.withhold, 1),
        ]  # fmt: skip

    def run(self) -> None:
        """The walk, and the end."""
        steps, weights = zip(*self.steps, strict=True)
        for step in self.rng.choices(steps, weights, k=STEPS):
            step()
        self.heal()
        self.check()

    # --- steps ------------------------------------------------------------------------------------------

    def _linked(self) -> list[str]:
        return [node for node in self.world.nodes if node in self.world.controller.reports]

    def _unlinked(self) -> list[str]:
        world = self.world
        usable = world.map.nodes.keys() - {*world.map.destroyed, *world.controller.reports}
        return [node for node in world.nodes if node in usable]

    def work(self) -> None:
        """A node works off what it got."""
        for node in self.rng.sample(self._linked(), min(1, len(self._linked()))):
            self.world.work(node)

    def deliver(self) -> None:
        """Frames of a node arrive, one or all."""
        for node in self.rng.sample(self._linked(), min(1, len(self._linked()))):
            self.world.deliver(node, self.rng.choice((-1, 1, 1)))

    def tick(self) -> None:
        """Time passes."""
        self.world.tick(self.rng.choice((1, 20, 50, 150, 400, 1_000)))

    def write(self) -> None:
        """A put, or an increment of the counter, which has a result."""
        self.tokens += 1
        shard = self.rng.randrange(len(self.world.shards))
        if self.rng.random() < 0.65:
            self.world.put(("put", shard, self.tokens), shard, b"%d" % self.rng.randrange(5))
        else:
            self.world.write(INCR, ("incr", shard, self.tokens), shard, COUNTER, (1,))

    def read(self) -> None:
        """A read."""
        self.tokens += 1
        shard = self.rng.randrange(len(self.world.shards))
        self.world.get(("get", shard, self.tokens), shard, self.rng.choice((COUNTER, b"0", b"1")))

    def lose_link(self) -> None:
        """A link breaks."""
        for node in self.rng.sample(self._linked(), min(1, len(self._linked()))):
            self.world.down(node)

    def link(self) -> None:
        """A node is linked."""
        for node in self.rng.sample(self._unlinked(), min(1, len(self._unlinked()))):
            self.world.up(node)

    def wipe(self) -> None:
        """Copies are gone."""
        shards = (self.rng.randrange(len(self.world.shards)),) if self.rng.random() < 0.5 else ()
        self.world.replace(self.rng.choice(list(self.world.nodes)), *shards)
        self.has_lost = True

    def restart(self) -> None:
        """A new process with everything."""
        self.world.restart(self.rng.choice(list(self.world.nodes)))

    def store(self) -> None:
        """The config store stands still, says that it does not know, or goes on."""
        world, chance = self.world, self.rng.random()
        if chance < 0.4:
            world.store.is_held = True
        elif chance < 0.6 and world.sent is not None:
            if self.rng.random() < 0.5:
                world.store.compare_and_set(*world.sent)
            world.settle(Outcome.UNKNOWN)
        elif chance < 0.8 and world.sent is not None:
            world.settle(world.store.compare_and_set(*world.sent))
        else:
            world.store.is_held = False
            world.flush()

    def ask(self) -> None:
        """The operator wants something."""
        admin, answers = self.world.controller.admin, []
        node = self.rng.choice(list(self.world.map.nodes))
        wish = self.rng.choice(("add", "drain", "undrain", "remove", "forget", "rebalance", "accept", "accept"))
        if wish == "add":
            admin.add_node("h", 1_000 + self.tokens, answers.append)
        elif wish == "rebalance":
            admin.rebalance(self.rng.random() < 0.3, answers.append)
        elif wish == "accept":
            admin.accept_loss(self.rng.randrange(len(self.world.shards)), answers.append)
            self.has_lost = self.has_lost or not isinstance(answers[0], AdminError)
        else:
            self.has_lost = self.has_lost or wish == "forget"
            getattr(admin, wish)(node, answers.append)
        self.world.check()

    def leave(self) -> None:
        """A node is about to stop."""
        for node in self.rng.sample(self._linked(), min(1, len(self._linked()))):
            self.world.controller.receive(node, (LEAVE,))
            self.world.check()
            self.world.act()

    def audit(self) -> None:
        """Members are compared."""
        self.world.controller.audit.begin()
        self.world.check()

    def take_over(self) -> None:
        """A new coordinator; what was in flight may be stored."""
        world = self.world
        world.down(*self._linked())
        if world.sent is not None and self.rng.random() < 0.5:
            world.store.compare_and_set(*world.sent)
        self.answered.update(world.answers.ok)
        world.answers.ok.clear()
        world.answers.failed.clear()
        world.take_over()

    def forget_entries(self) -> None:
        """A node has no entries to ship any more."""
        node = self.world.nodes[self.rng.choice(list(self.world.nodes))]
        node.backlog.forget(self.rng.randrange(len(self.world.shards)))

    def withhold(self) -> None:
        """A node syncs nothing from now on, or again."""
        node = self.world.nodes[self.rng.choice(list(self.world.nodes))]
        if node.withholds:
            node.release()
        else:
            node.withholds = True

    # --- the end ----------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Nothing stands still, all nodes run, and time passes."""
        world = self.world
        world.store.is_held = False
        for node in world.nodes.values():
            if node.withholds:
                node.release()
        for _ in range(HEAL_TICKS):
            for name, node in world.nodes.items():
                if node.is_stopped:
                    world.restart(name)
            world.up(*self._unlinked())
            world.tick()
            world.pump()

    def check(self) -> None:
        """Everything is as it should be, or what was lost is the reason."""
        world = self.world
        assert not world.words("alarm"), world.words("alarm")
        self.answered.update(world.answers.ok)
        for shard in world.shards:
            number = shard.number
            if not shard.serving:
                assert self.has_lost and "none of its members has its data" in shard.reason, shard.reason
                continue
            assert shard.writable and set(world.row(number)) == set(world.map.wanted[number]), world.row(number)
            world.assert_equal(number)
            if not self.has_lost:
                self._check_answers(number)

    def _check_answers(self, number: int) -> None:
        """What was answered happened once, and is there."""
        puts = [result for (kind, shard, _), result in self.answered.items() if (kind, shard) == ("put", number)]
        assert len(set(puts)) == len(puts) and max(puts, default=0) <= self.world.shards[number].commit
        counts = [result for (kind, shard, _), result in self.answered.items() if (kind, shard) == ("incr", number)]
        assert len(set(counts)) == len(counts), "no increment is answered like another"
        cell = self.world.nodes[self.world.row(number)[0]].replica.tables[number].get(COUNTER, 0)
        assert max(counts, default=0) <= (int(cell[0]) if cell else 0)


def walk(seed: int) -> None:
    """One walk; what goes wrong names its seed."""
    try:
        Walk(seed).run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    count, first = (given + [100, 0][len(given) :])[:2]
    failed = 0
    for each in range(first, first + count):
        try:
            walk(each)
        except AssertionError as error:
            failed += 1
            print(error, flush=True)
    print(f"{count} walks, {failed} failed")
    sys.exit(1 if failed else 0)
