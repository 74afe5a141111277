"""The cluster of a chaos round: real processes, and what can be done to them.

Two kinds. In a *local* one the coordinator spawns and supervises its nodes, adopts them when it was killed, and stops
them when it is told to stop. In a *linked* one the nodes are started here, each behind a proxy that can misbehave
(`chaos_proxy`), and the coordinator is given the addresses of the proxies; a node that ends is started again here,
after a pause. Nodes that are added later are always of this second sort; the coordinator must not take them for its
own, so their data is not in its directory.
"""

import asyncio
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvtcp.runtime.data_directory import LOCK, lock_holder
from tests.chaos.disks import read_map
from tests.chaos.proxy import Proxy
from tests.processes.cluster import Command, free_ports, is_running

START_S: Final = 60.0  # for a coordinator to serve, also when its first starts are refused
STOP_S: Final = 10.5
POLL_S: Final = 0.02


class Broken(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True)
class Shape:
    """What kind of cluster."""

    kind: str  # "local" or "linked"
    factor: int = 3
    min_insync: int = 2
    nodes: int = 3
    shards: int = 16
    durability: str = "sync"


@dataclass
class OwnNode:
    """A node that is started here, behind its proxy."""

    port: int
    proxy: Proxy
    command: Command
    pause_s: float = 0.1  # before it is started again
    keeper: asyncio.Task[None] | None = None  # which starts it again when it ends
    codes: list[int] = field(default_factory=list)  # with which it ended

    def let_go(self) -> None:
        """It is not started again: what `command` is now is its last process."""
        if self.keeper is not None:
            self.keeper.cancel()


class ChaosCluster:
    """The processes of one cluster."""

    def __init__(self, directory: Path, shape: Shape) -> None:
        self.directory = directory
        self.shape = shape
        self.data = directory / "data"
        self.names = [f"n{number}" for number in range(1, shape.nodes + 1)]  # of all nodes there are now
        self.given = shape.nodes  # ids given so far
        self.own: dict[str, OwnNode] = {}
        self.coordinator: Command | None = None
        self.refused_starts: list[str] = []
        self.kills: Counter[str] = Counter()
        self._base = free_ports(shape.nodes + 1)
        self.url = f"kvtcp://127.0.0.1:{self._base + shape.nodes}"

    # --- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Everything up."""
        if self.shape.kind == "linked":
            for number, node in enumerate(self.names):
                await self._start_own(node, self._base + number)
        await self.start_coordinator()

    async def _start_own(self, node: str, port: int) -> OwnNode:
        proxy = Proxy(port)
        await proxy.start()
        own = self.own[node] = OwnNode(port, proxy, self._node_process(node, port))
        await asyncio.to_thread(own.command.ready)
        own.keeper = asyncio.ensure_future(self._keep(node, own))
        return own

    def _node_process(self, node: str, port: int) -> Command:
        return Command(
            self.directory, "kvtcp-node", "--id", node, "--port", port, "--data-dir", self.directory_of(node, True),
            "--durability", self.shape.durability, "--log-level", "info",
        )  # fmt: skip

    def directory_of(self, node: str, is_own: bool | None = None) -> Path:
        """Where the data of a node is."""
        return (self.directory / "nodes" if is_own or node in self.own else self.data) / node

    async def _keep(self, node: str, own: OwnNode) -> None:
        """Start a node again whenever it ends."""
        while True:
            while own.command.process.poll() is None:
                await asyncio.sleep(POLL_S)
            own.codes.append(own.command.process.returncode)
            await asyncio.sleep(own.pause_s)
            own.command = self._node_process(node, own.port)

    def _nodes_arguments(self) -> list[object]:
        """The nodes, for a coordinator that begins a cluster, or that finds some in its map."""
        is_new = not (self.data / "coordinator" / "map.json").exists()
        if self.shape.kind == "local":
            return ["--base-port", self._base, *(["--num-nodes", self.shape.nodes] if is_new else [])]
        nodes = self.names if is_new else sorted(read_map(self.data)["nodes"], key=lambda node: int(node[1:]))
        return ["--nodes", ",".join(f"127.0.0.1:{self.own[node].proxy.port}" for node in nodes)]

    def _coordinator_arguments(self) -> list[object]:
        shape = self.shape
        return [
            *self._nodes_arguments(), "--replication-factor", shape.factor, "--min-insync", shape.min_insync,
            "--shards", shape.shards, "--main-port", self._base + shape.nodes, "--data-dir", self.data,
            "--durability", shape.durability, "--backup-dir", self.directory / "backups", "--log-level", "info",
        ]  # fmt: skip

    async def start_coordinator(self) -> None:
        """Start the coordinator and wait until it serves. One that is refused is started again, as an init would."""
        until = time.monotonic() + START_S
        while True:
            command = self.coordinator = Command(self.directory, "kvtcp-coordinator", *self._coordinator_arguments())
            while not command.out.read_text().endswith("\n"):
                if command.process.poll() is not None:
                    break
                if time.monotonic() > until:
                    raise Broken(f"the coordinator does not serve within {START_S} s: {command.err}")
                await asyncio.sleep(POLL_S)
            else:
                return
            said = command.err.read_text()[-2000:]
            if command.process.returncode != 2 or time.monotonic() > until:
                raise Broken(f"a coordinator ended with {command.process.returncode} while starting: {said}")
            self.refused_starts.append(said.splitlines()[-1] if said else "")
            await asyncio.sleep(0.05)

    def check_coordinator(self) -> None:
        """It runs. Raises Broken with its last words."""
        command = self.coordinator
        assert command is not None
        if command.process.poll() is not None:
            text = command.err.read_text()[-3000:]
            raise Broken(f"the coordinator ended by itself with code {command.process.returncode}:\n{text}")

    async def kill_coordinator(self) -> None:
        """SIGKILL, and its end."""
        assert self.coordinator is not None
        self.check_coordinator()
        self.kills["coordinator"] += 1
        self.coordinator.signal(signal.SIGKILL)
        await asyncio.to_thread(self.coordinator.ended)

    async def terminate_coordinator(self) -> None:
        """SIGTERM, and its end in order. Raises Broken."""
        command = self.coordinator
        assert command is not None
        self.check_coordinator()
        command.signal(signal.SIGTERM)
        began = time.monotonic()
        code = await asyncio.to_thread(command.ended)
        took_s = time.monotonic() - began
        if code != 0 or took_s > STOP_S:
            raise Broken(f"a stop took {took_s:.1f} s, code {code}: {command.err.read_text()[-3000:]}")

    # --- nodes --------------------------------------------------------------------------------------

    def pid(self, node: str) -> int:
        """Process id of a node, 0 if it does not run."""
        if node in self.own:
            process = self.own[node].command.process
            return process.pid if process.poll() is None else 0
        path = self.directory_of(node)
        text = ((lock_holder(path) if path.exists() else None) or "").split()[-1:]
        return int(text[0]) if text and text[0].isdigit() else 0

    def signal_node(self, node: str, number: int) -> bool:
        """Send a signal to a node; whether it was there."""
        pid = self.pid(node)
        if not pid or not is_running(pid):
            return False
        os.kill(pid, number)
        return True

    def kill_node(self, node: str, pause_s: float = 0.1) -> bool:
        """SIGKILL; whether it was there. It is started again: here after `pause_s`, or by its supervisor."""
        if node in self.own:
            self.own[node].pause_s = pause_s
        is_killed = self.signal_node(node, signal.SIGKILL)
        self.kills["node"] += is_killed
        return is_killed

    def wipe_node(self, node: str, pause_s: float = 0.1) -> bool:
        """SIGKILL, and all its data is gone when it comes back."""
        if not self.signal_node(node, signal.SIGSTOP):
            return False
        for path in self.directory_of(node).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:  # by which a supervisor sees that the process lives
                path.unlink()
        self.kills["wiped node"] += 1
        return self.kill_node(node, pause_s)

    async def add_process(self) -> tuple[str, int]:
        """Start one more node, empty; its id, if the coordinator gives the next one, and the port to reach it."""
        self.given += 1
        node = f"n{self.given}"
        own = await self._start_own(node, free_ports(1))
        self.names.append(node)
        return node, own.proxy.port

    async def end_process(self, node: str) -> None:
        """The end of a node that was removed: its coordinator told it to stop, if it was there to hear it."""
        own = self.own.pop(node)
        self.names.remove(node)
        own.let_go()
        if own.command.process.poll() is None:
            own.command.signal(signal.SIGCONT)  # no fault reaches it any more, the end of one neither
        await self._ended(own.command, 1.0)
        if own.command.process.poll() is None:
            own.command.signal(signal.SIGTERM)
        code = await asyncio.to_thread(own.command.ended)
        await own.proxy.close()
        if code not in (0, -signal.SIGKILL, -signal.SIGTERM):  # the signal may come before it is ready for it
            raise Broken(f"{node}, removed, ended with {code}: {own.command.err.read_text()[-2000:]}")

    @staticmethod
    async def _ended(command: Command, within_s: float) -> None:
        """Wait for the end of a process, for so long."""
        until = time.monotonic() + within_s
        while command.process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(POLL_S)

    # --- the end ------------------------------------------------------------------------------------

    def calm(self) -> None:
        """Undo whatever lasts: processes go on, links are as good as new."""
        for node in self.names:
            self.signal_node(node, signal.SIGCONT)
        if self.coordinator is not None and self.coordinator.process.poll() is None:
            self.coordinator.signal(signal.SIGCONT)
        for own in self.own.values():
            own.proxy.delay_s = 0.0
            own.proxy.flow()

    async def stop(self) -> None:
        """Stop everything in order. Raises Broken if something does not end well."""
        await self.terminate_coordinator()
        for own in self.own.values():
            own.let_go()
            if own.command.process.poll() is None:
                own.command.signal(signal.SIGTERM)
        for node, own in self.own.items():
            code = await asyncio.to_thread(own.command.ended)
            if code != 0:
                raise Broken(f"{node} ended with {code}: {own.command.err.read_text()[-2000:]}")

    async def close(self) -> None:
        """End whatever still runs."""
        for own in self.own.values():
            own.let_go()
        commands = [own.command for own in self.own.values()]
        if self.coordinator is not None:
            commands.insert(0, self.coordinator)
        for command in commands:
            if command.process.poll() is None:
                command.signal(signal.SIGKILL)
            await asyncio.to_thread(command.ended)
        for node in self.names:
            self.signal_node(node, signal.SIGKILL)
        for own in self.own.values():
            await own.proxy.close()

    def own_deaths(self) -> list[str]:
        """Ends of nodes that nobody asked for, as far as they are known here and in the coordinators' logs."""
        deaths = [
            f"{node} ended by itself with code {code}"
            for node, own in self.own.items()
            for code in own.codes
            if code not in (0, -signal.SIGKILL)
        ]
        for path in sorted(self.directory.glob("kvtcp-coordinator.*.err")):
            for line in path.read_text().splitlines():
                if "event=node-died" in line and f"code={-signal.SIGKILL} " not in line and "code=-1 " not in line:
                    deaths.append(f"{path.name}: {line}")
        return deaths
