"""The faults of a chaos round, and the operator who changes the cluster meanwhile.

A method of `Faults` is one fault; it returns when the fault is over or, for a process that is started again by itself,
under way. `deck` is what happens in a minute, in an order that the seed gives; what happens when is not repeated
exactly. With one more for each of the others it has about ten kills (SIGKILL).
"""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import kvtcp
from kvtcp.errors import KvtcpError, OutcomeUnknown, Unavailable
from tests.chaos.cluster import Broken, ChaosCluster

Rows = list[dict[str, Any]]

# of a minute
EVERY_MINUTE: Final = (
    "kill_node", "kill_node", "kill_in_snapshots", "kill_coordinator", "kill_coordinator_and_node",
    "restart_coordinator", "stop_node", "stop_node",
)  # fmt: skip
SOMETIMES: Final = ("kill_two_nodes", "kill_all_nodes", "take_over_without_node", "stop_coordinator")  # two of them
ON_LINKS: Final = ("cut", "cut_all", "flap", "stall", "delay", "half_open", "kill_who_is_ahead")  # two of them
ON_DATA: Final = ("backup", "restore", "crowd")  # one of them
CROWD: Final = 100
BALLAST_BYTES: Final = 1000
KEPT: Final = {f"kept-{n}": f"{n}" * 20 for n in range(200)}  # written once, backed up and restored
CALM_S: Final = 4.0  # most faults wait so long for the one before to be healed
WIPE_WAIT_S: Final = 15.0


class Faults:
    """What can happen to a cluster."""

    def __init__(self, cluster: ChaosCluster, kv: Any, seed: int) -> None:
        self.cluster = cluster
        self.kv = kv
        self.random = random.Random(seed)
        self.takeovers: list[float] = []  # when a coordinator was killed or stopped
        self.skipped_wipes = 0
        self._backups = 0
        self._background: set[asyncio.Task[None]] = set()

    def deck(self) -> list[str]:
        """The faults of a minute."""
        choose = self.random.sample
        names = [*EVERY_MINUTE, *choose(SOMETIMES, 2), *choose(ON_DATA, 1)]
        if self.cluster.shape.kind == "linked":
            names += choose(ON_LINKS, 2)
        if self.cluster.shape.factor > 2:
            names.append("wipe_node")
        self.random.shuffle(names)
        return names

    def named(self, name: str) -> Callable[[], Awaitable[None]]:
        """The fault of this name."""
        fault: Callable[[], Awaitable[None]] = getattr(self, name)
        return fault

    async def end(self) -> None:
        """Wait for what goes on in the background."""
        await asyncio.gather(*self._background)

    def _any_node(self) -> str:
        return self.random.choice(self.cluster.names)

    def _any_proxy(self) -> Any:
        return self.cluster.own[self.random.choice(sorted(self.cluster.own))].proxy

    def _later(self, delay_s: float, action: Callable[[], object]) -> None:
        async def run() -> None:
            await asyncio.sleep(delay_s)
            action()

        task = asyncio.ensure_future(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _pause_s(self) -> float:
        """How long a node that is started here stays away: hardly, or long enough to be thrown out."""
        return self.random.choice((0.05, 0.2, 1.0, 3.0))

    async def is_whole(self) -> bool:
        """Whether `status` finds nothing wrong, and every shard is where it shall be."""
        try:
            status = await self.kv.status(timeout=1.0)
            if status["state"] != "ok" or status["moving"] or status["learning"]:
                return False
            rows = await self.kv.shards(timeout=1.0)
        except KvtcpError:
            return False
        return all(set(row["insync"]) == set(row["wanted"]) for row in rows)

    async def wait_whole(self, wait_s: float) -> bool:
        """Wait until nothing is wrong any more; whether that came to be."""
        until = time.monotonic() + wait_s
        while not await self.is_whole():
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.05)
        return True

    # --- kills --------------------------------------------------------------------------------------

    async def kill_node(self) -> None:
        """SIGKILL of a node."""
        self.cluster.kill_node(self._any_node(), self._pause_s())

    async def kill_two_nodes(self) -> None:
        """SIGKILL of two nodes, at once or one just after the other."""
        first, second = self.random.sample(self.cluster.names, 2)
        self.cluster.kill_node(first, self._pause_s())
        await asyncio.sleep(self.random.choice((0.0, 0.05, 0.5)))
        self.cluster.kill_node(second, self._pause_s())

    async def kill_in_snapshots(self) -> None:
        """All nodes begin to write snapshots of all shards, and one of them is killed meanwhile."""
        for node in self.cluster.names:
            self.cluster.signal_node(node, signal.SIGUSR1)
        await asyncio.sleep(self.random.uniform(0.0, 0.4))
        self.cluster.kill_node(self._any_node(), self._pause_s())

    async def kill_all_nodes(self) -> None:
        """SIGKILL of all nodes at once."""
        for node in self.random.sample(self.cluster.names, len(self.cluster.names)):
            self.cluster.kill_node(node, 0.1)

    async def wipe_node(self) -> None:
        """SIGKILL of a node, whose data is gone; only while every shard has two good members that are in sync."""
        until = time.monotonic() + WIPE_WAIT_S
        while not await self._has_two_everywhere():
            if time.monotonic() > until:
                self.skipped_wipes += 1
                return
            await asyncio.sleep(0.05)
        node = self._any_node()
        self.cluster.wipe_node(node, self._pause_s())
        if self.random.random() < 0.5:  # then another one, which may be the one that gives it its data
            await asyncio.sleep(self.random.uniform(0.2, 1.5))
            others = [each for each in self.cluster.names if each != node]
            self.cluster.kill_node(self.random.choice(others), self._pause_s())

    async def _has_two_everywhere(self) -> bool:
        try:
            nodes: Rows = await self.kv.nodes(timeout=1.0)
            shards: Rows = await self.kv.shards(timeout=1.0)
        except KvtcpError:
            return False
        up = {row["node"] for row in nodes if row["state"] in ("up", "learning", "draining")}
        return all(row["state"] in ("ok", "under-replicated") and len(up & set(row["insync"])) >= 2 for row in shards)

    # --- the coordinator ----------------------------------------------------------------------------

    async def kill_coordinator(self) -> None:
        """SIGKILL of the coordinator; its nodes run on, and the next one begins a little later."""
        self.takeovers.append(time.monotonic())
        await self.cluster.kill_coordinator()
        await asyncio.sleep(self.random.choice((0.0, 0.1, 1.0)))
        await self.cluster.start_coordinator()

    async def kill_coordinator_and_node(self) -> None:
        """SIGKILL of both, one just before the other."""
        self.takeovers.append(time.monotonic())
        node, pause_s = self._any_node(), self._pause_s()
        if self.random.random() < 0.5:
            self.cluster.kill_node(node, pause_s)
            await asyncio.sleep(self.random.choice((0.0, 0.02, 0.3)))
            await self.cluster.kill_coordinator()
        else:
            await self.cluster.kill_coordinator()
            self.cluster.kill_node(node, pause_s)
        await self.cluster.start_coordinator()

    async def take_over_without_node(self) -> None:
        """SIGKILL of the coordinator while a node is stopped (SIGSTOP), which goes on during the takeover or after."""
        self.takeovers.append(time.monotonic())
        node = self._any_node()
        self.cluster.signal_node(node, signal.SIGSTOP)
        await asyncio.sleep(self.random.choice((0.0, 0.3, 1.5)))
        await self.cluster.kill_coordinator()
        self._later(self.random.choice((0.5, 1.5, 3.0)), lambda: self.cluster.signal_node(node, signal.SIGCONT))
        await self.cluster.start_coordinator()

    async def restart_coordinator(self) -> None:
        """SIGTERM of the coordinator, and a start."""
        self.takeovers.append(time.monotonic())
        await self.cluster.terminate_coordinator()
        await self.cluster.start_coordinator()

    async def stop_coordinator(self) -> None:
        """SIGSTOP and SIGCONT of the coordinator."""
        coordinator = self.cluster.coordinator
        assert coordinator is not None
        coordinator.signal(signal.SIGSTOP)
        await asyncio.sleep(self.random.choice((0.05, 0.5, 1.5, 2.5)))
        coordinator.signal(signal.SIGCONT)

    # --- nodes and links ----------------------------------------------------------------------------

    async def stop_node(self) -> None:
        """SIGSTOP and SIGCONT of a node: too short to be noticed, or long enough to be thrown out."""
        node = self._any_node()
        self.cluster.signal_node(node, signal.SIGSTOP)
        await asyncio.sleep(self.random.choice((0.1, 0.6, 1.5, 4.0)))
        self.cluster.signal_node(node, signal.SIGCONT)

    async def cut(self) -> None:
        """A link breaks."""
        self._any_proxy().cut()

    async def cut_all(self) -> None:
        """All links break at once."""
        for own in self.cluster.own.values():
            own.proxy.cut()

    async def flap(self) -> None:
        """Links break again and again."""
        for _ in range(8):
            self._any_proxy().cut()
            await asyncio.sleep(self.random.uniform(0.0, 0.15))

    async def stall(self) -> None:
        """Nothing passes on a link for a while; then all of it, or the connection breaks."""
        proxy = self._any_proxy()
        proxy.stall()
        try:
            await asyncio.sleep(self.random.choice((0.2, 1.0, 2.5)))
            if self.random.random() < 0.5:
                proxy.cut()
        finally:
            proxy.flow()

    async def delay(self) -> None:
        """A slow link."""
        proxy = self._any_proxy()
        proxy.delay_s = self.random.choice((0.002, 0.02, 0.1))
        await asyncio.sleep(self.random.uniform(0.5, 3.0))
        proxy.delay_s = 0.0

    async def half_open(self) -> None:
        """A link on which nothing arrives any more, and that nobody closes. New ones are fine."""
        self._any_proxy().forget()

    async def kill_who_is_ahead(self) -> None:
        """For a moment the links to all nodes but one let nothing pass, so that it alone has the last writes; then it
        is killed with the coordinator, what was held back is lost, and it comes back late. The next coordinator goes
        on without it: none of those writes may have been acknowledged."""
        self.takeovers.append(time.monotonic())
        own = self.cluster.own
        ahead = self.random.choice(sorted(own))
        behind = [own[node].proxy for node in own if node != ahead]
        for proxy in behind:
            proxy.stall()
        try:
            await asyncio.sleep(self.random.choice((0.1, 0.3, 0.8)))
            self.cluster.kill_node(ahead, 4.0)
            await self.cluster.kill_coordinator()
        finally:
            for proxy in behind:
                proxy.cut()
                proxy.flow()
        await self.cluster.start_coordinator()

    # --- backups, clients ---------------------------------------------------------------------------

    async def backup(self) -> None:
        """A backup, with a fault meanwhile or not; it may fail, but says so."""
        self._backups += 1
        task = asyncio.ensure_future(self.kv.backup(f"chaos-{self._backups}", timeout=10.0))
        if self.random.random() < 0.3:
            await self.kill_node()
        await self._may_fail(task)

    async def restore(self) -> None:
        """The kept keys come back from the backup, and are what they were."""
        until = time.monotonic() + 30.0
        while True:
            mode = self.random.choice(("merge", "replace"))
            task = asyncio.ensure_future(self.kv.restore("kept", mode, prefix="kept-", timeout=10.0))
            if self.random.random() < 0.3:
                await self.kill_node()
            if await self._may_fail(task):
                break
            if time.monotonic() > until:
                raise Broken("in 30 s no restore ended well")
            await asyncio.sleep(0.05)
        held = await self.kept_keys(until)
        if held != KEPT:
            raise Broken(f"after a restore with {mode}, kept keys are {held}")

    async def kept_keys(self, until: float) -> dict[str, str]:
        """What became of them."""
        while True:
            try:
                return {key.decode(): value.decode() async for key, value in self.kv.scan(prefix="kept-")}
            except KvtcpError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)

    async def _may_fail(self, task: asyncio.Future[Any]) -> bool:
        try:
            await asyncio.wait_for(task, 20.0)
            return True
        except TimeoutError:
            raise Broken("a backup or restore was neither done nor refused within 20 s") from None
        except KvtcpError:
            return False

    async def crowd(self) -> None:
        """Many clients at once; each reads what it wrote."""

        async def one(number: int) -> None:
            try:
                async with kvtcp.connect(self.cluster.url, timeout=10.0) as kv:
                    await kv.put(f"crowd-{number}", str(number))
                    if await kv.get(f"crowd-{number}") != str(number).encode():
                        raise Broken(f"client {number} of a crowd did not read what it wrote")
            except (Unavailable, OutcomeUnknown):
                return  # another fault is not over yet

        await asyncio.gather(*map(one, range(CROWD)))
