"""The operator of a chaos round: adds a node, spreads the shards, drains a node, removes it, and again.

All of it happens during faults, so every request is repeated until the cluster shows that it took effect: a request
that was refused or whose outcome is unknown changes nothing or what was asked for, and either is seen by looking. While
faults go on a step may take as long as it likes. After `finish` the round that was begun has to end within a deadline:
what is to be moved is moved, a drained node holds nothing and can be removed.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from kvtcp.errors import AdminError, OutcomeUnknown, Unavailable
from tests.chaos.cluster import Broken, ChaosCluster


class Operator:
    """Changes the nodes of one cluster."""

    def __init__(self, cluster: ChaosCluster, kv: Any, seed: int) -> None:
        self.cluster = cluster
        self.kv = kv
        self.random = random.Random(seed)
        self.steps: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self._until = float("inf")
        self._finishing = asyncio.Event()

    async def run(self) -> None:
        """Rounds until `finish`. Raises Broken."""
        while not await self._pause(1.0, 4.0):
            node = await self.add()
            await self.rebalance()
            await self._pause(3.0, 8.0)
            local = {f"n{number}" for number in range(1, self.cluster.shape.nodes + 1)} - set(self.cluster.own)
            node = self.random.choice([node, *sorted(set(self.cluster.names) - local)])
            await self.drain(node)
            await self.remove(node)

    def finish(self, within_s: float) -> None:
        """The round that was begun is the last one, and ends soon."""
        self._until = time.monotonic() + within_s
        self._finishing.set()

    async def add(self) -> str:
        """A new node is one of the cluster; its id."""
        expected, port = await self.cluster.add_process()

        async def step() -> bool:
            address = f"127.0.0.1:{port}"
            found = [row["node"] for row in await self.kv.nodes(timeout=1.0) if row["address"] == address]
            if not found:
                await self.kv.node_add("127.0.0.1", port, timeout=2.0)
                return False  # until it is seen
            if found != [expected]:
                raise Broken(f"the node at {address} was added as {found}, not as {expected}")
            return True

        await self._repeat("add", step)
        return expected

    async def rebalance(self) -> None:
        """The shards are on their way to be spread evenly."""

        async def step() -> bool:
            await self.kv.rebalance(timeout=2.0)
            return True

        await self._repeat("rebalance", step)

    async def drain(self, node: str) -> None:
        """A node holds nothing any more."""

        async def step() -> bool:
            await self.kv.node_drain(node, timeout=2.0)
            rows = [row for row in await self.kv.nodes(timeout=1.0) if row["node"] == node]
            return not rows[0]["member_of"] and not rows[0]["learning"]

        await self._repeat("drain", step)

    async def remove(self, node: str) -> None:
        """A node is none of the cluster any more, and its process ended."""

        async def step() -> bool:
            if node not in [row["node"] for row in await self.kv.nodes(timeout=1.0)]:
                return True
            await self.kv.node_remove(node, timeout=2.0)
            return False

        await self._repeat("remove", step)
        await self.cluster.end_process(node)

    async def _repeat(self, name: str, step: Callable[[], Awaitable[bool]]) -> None:
        why: object = "it takes too long"
        while True:
            try:
                if await step():
                    self.steps[name] += 1
                    return
            except (Unavailable, OutcomeUnknown) as error:
                why = error
            except AdminError as error:
                why = error
                self.refusals[f"{name}: {error}"] += 1
            if time.monotonic() > self._until:
                raise Broken(f"without faults the operator's {name} does not succeed: {why}")
            await asyncio.sleep(0.05)

    async def _pause(self, shortest_s: float, longest_s: float) -> bool:
        """Wait; whether it is time to finish."""
        try:
            async with asyncio.timeout(self.random.uniform(shortest_s, longest_s)):
                await self._finishing.wait()
        except TimeoutError:
            return False
        return True
