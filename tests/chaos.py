"""Chaos: a cluster of real processes, clients that write down what they saw, faults at random, and a judge at the end.

`make chaos MINUTES=N [SEED=K]` runs rounds until the time is over. A round is a new cluster: three nodes that keep
their data in memory, a coordinator that reaches them through misbehaving proxies, client processes under load. Faults
come one after another: processes stopped (SIGSTOP) and going on, links cut, stalled, delayed and half-open, backups and
restores, crowds of connections. After each everything has to answer again within HEAL_S and `status` has to say what is
so. A round ends with a clean stop, or with a coordinator or a node killed (SIGKILL) under load and started again: all
shards must serve with the next coordinator, and the node, which is empty, must serve nothing. Then each node is asked
for all it holds, and `chaos_checks` compares that and what the clients saw with what is promised.

A seed repeats the choice of faults, not the interleaving of processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from chaos_checks import History
from chaos_proxy import Proxy
from process_cluster import Command, free_ports
from server_tools import Wire

import kvtcp
from kvtcp.errors import KvtcpError, Unavailable
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.link import BATCH, HELLO, LINK_VERSION, REPORT, parse_report
from kvtcp.protocol.operations import PAGE

NODES: Final = ("n1", "n2", "n3")
SHARDS: Final = 16
HEAL_S: Final = 3.0
TOLD_S: Final = 1.5  # after which `status` has to name a node that does not answer
CROWD: Final = 200
ENDINGS: Final = ("clean_end", "kill_coordinator", "kill_node")
KEPT: Final = {f"kept-{n}": f"{n}" * 20 for n in range(200)}  # written once, backed up and restored


class Broken(AssertionError):
    """A promise was broken."""


class Round:
    """One cluster, its clients, its faults."""

    def __init__(self, directory: Path, seed: int, clients: int, nodes: int = 3) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self.clients = clients
        self.node_ports = dict(zip(NODES[:nodes], range(base := free_ports(nodes + 1), base + nodes), strict=True))
        self.main_port = base + nodes
        self.url = f"kvtcp://127.0.0.1:{self.main_port}"
        self.proxies: dict[str, Proxy] = {}
        self.nodes: dict[str, Command] = {}
        self.coordinator: Command
        self.workers: list[Command] = []
        self.kv: Any = None
        self.faults: Counter[str] = Counter()
        self.heal_s: dict[str, float] = {}  # the longest healing after each fault
        self.rss_bytes = 0  # highest of the coordinator
        self.whole = True  # nothing was killed yet
        self.backups = 0
        self.probe_keys = _keys_of_shards(SHARDS)
        self.broken: list[str] = []

    # --- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Processes up, kept keys written, clients at work."""
        for node, port in self.node_ports.items():
            self.proxies[node] = Proxy(port)
            await self.proxies[node].start()
            self.start_node(node)
        for command in self.nodes.values():
            await asyncio.to_thread(command.ready)
        await self.start_coordinator()
        self.kv = await kvtcp.connect(self.url, timeout=HEAL_S)
        await self.kv.put_many(KEPT)
        await self.kv.backup("kept")
        for number in range(self.clients):
            name = f"c{number}"
            path = self.directory / f"{name}.jsonl"
            arguments = (self.url, self.random.randrange(2**32), name, path)
            self.workers.append(_python(self.directory, "chaos_client", *arguments))

    def start_node(self, node: str) -> None:
        """Start the process of a node."""
        data, port = self.directory / node, self.node_ports[node]
        self.nodes[node] = Command(
            self.directory, "kvtcp-node", "--id", node, "--port", port, "--data-dir", data, "--durability", "memory"
        )

    async def start_coordinator(self) -> None:
        """Start the coordinator and wait until it serves."""
        addresses = ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.proxies.values())
        self.coordinator = Command(
            self.directory, "kvtcp-coordinator", "--nodes", addresses, "--main-port", self.main_port,
            "--shards", SHARDS, "--data-dir", self.directory / "data", "--backup-dir", self.directory / "backups",
            "--durability", "memory",
        )  # fmt: skip
        await asyncio.to_thread(self.coordinator.ready)

    async def stop_clients(self) -> History:
        """The clients write down what they saw."""
        for command in self.workers:
            command.signal(signal.SIGTERM)
        history = History()
        for number, command in enumerate(self.workers):
            code = await asyncio.to_thread(command.ended)
            if code != 0:
                raise Broken(f"client c{number} met an error that no promise allows:\n{command.err.read_text()}")
            history.read(self.directory / f"c{number}.jsonl")
        return history

    async def close(self) -> None:
        """End everything."""
        if self.kv is not None:
            await self.kv.close()
        commands = [*self.nodes.values(), *self.workers]
        if hasattr(self, "coordinator"):
            commands.append(self.coordinator)
        for command in commands:
            if command.process.poll() is None:
                command.signal(signal.SIGKILL)
            await asyncio.to_thread(command.ended)
        for proxy in self.proxies.values():
            await proxy.close()

    # --- one round ----------------------------------------------------------------------------------

    async def run(self, seconds: float, ending: str | None) -> History:
        """Faults for so long, an ending (None: at random), the verdict in `broken`."""
        watch = asyncio.ensure_future(self._watch_memory())
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                await self.one(self.random.choice(self._faults()))
            ended_at = time.monotonic()
            await self.one(getattr(self, ending or self.random.choice(ENDINGS)))
            history = await self.stop_clients()
            dumps = await self._dumps()
            for final in dumps:
                self.broken += [text for text in history.check(final, ended_at) if text not in self.broken]
            if history.late_s > 1.0:
                self.broken.append(f"an answer came {history.late_s:.2f} s after its timeout")
            for command in (*self.nodes.values(), self.coordinator):
                text = command.err.read_text()
                if "Traceback" in text:
                    self.broken.append(f"{command.err.name}:\n{text[-4000:]}")
            return history
        finally:
            watch.cancel()

    async def one(self, fault: Callable[[], Awaitable[None]]) -> None:
        """One fault, and what must be true after it."""
        name = fault.__name__
        self.faults[name] += 1
        await fault()
        if self.whole:
            began = time.monotonic()
            await self.healed(name)
            self.heal_s[name] = max(self.heal_s.get(name, 0.0), time.monotonic() - began)
        await asyncio.sleep(self.random.uniform(0.0, 0.5))

    async def healed(self, what: str) -> None:
        """Every shard takes a write and a read within HEAL_S, and `status` finds nothing wrong."""
        began = time.monotonic()

        async def one(key: str) -> None:
            while True:
                try:
                    await self.kv.incr(key, timeout=1.0)
                    await self.kv.get(key, timeout=1.0)
                    return
                except KvtcpError as error:
                    if time.monotonic() - began > HEAL_S:
                        raise Broken(f"{HEAL_S} s after {what}: {type(error).__name__}: {error}") from error
                    await asyncio.sleep(0.02)

        await asyncio.gather(*map(one, self.probe_keys))
        status = await self.kv.status()
        while status["state"] != "ok":
            if time.monotonic() - began > HEAL_S:
                raise Broken(f"{HEAL_S} s after {what}, status says {status['degraded']}")
            await asyncio.sleep(0.02)
            status = await self.kv.status()

    async def told(self, node: str, stopped_at: float) -> None:
        """`status` names a node that has not answered for TOLD_S."""
        wait_s = stopped_at + TOLD_S - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        status = await self.kv.status()
        if not any(node in sentence for sentence in status["degraded"]):
            raise Broken(f"{node} has not answered for {TOLD_S} s, and status says {status}")

    def _faults(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self.stop_node, self.stop_node, self.stop_two_nodes, self.stop_coordinator, self.cut, self.cut_all,
            self.stall, self.delay, self.half_open, self.flap, self.backup, self.restore, self.crowd,
        ]  # fmt: skip

    def _any_node(self) -> str:
        return self.random.choice(list(self.nodes))

    # --- faults -------------------------------------------------------------------------------------

    async def stop_node(self) -> None:
        """SIGSTOP and SIGCONT of a node."""
        node = self._any_node()
        stopped_s = self.random.choice((0.05, 0.4, 1.2, 2.5, 5.0))
        began = time.monotonic()
        self.nodes[node].signal(signal.SIGSTOP)
        try:
            if stopped_s > TOLD_S:
                await self.told(node, began)
            await asyncio.sleep(max(began + stopped_s - time.monotonic(), 0))
        finally:
            self.nodes[node].signal(signal.SIGCONT)

    async def stop_two_nodes(self) -> None:
        """Two nodes stopped, one after the other, and going on in the other order."""
        first, second = self.random.sample(list(self.nodes), 2)
        for node, number in ((first, signal.SIGSTOP), (second, signal.SIGSTOP), (second, signal.SIGCONT)):
            self.nodes[node].signal(number)
            await asyncio.sleep(self.random.uniform(0.0, 0.7))
        self.nodes[first].signal(signal.SIGCONT)

    async def stop_coordinator(self) -> None:
        """SIGSTOP and SIGCONT of the coordinator."""
        self.coordinator.signal(signal.SIGSTOP)
        await asyncio.sleep(self.random.choice((0.05, 0.5, 1.5, 3.0)))
        self.coordinator.signal(signal.SIGCONT)

    async def cut(self) -> None:
        """A link breaks."""
        self.proxies[self._any_node()].cut()

    async def cut_all(self) -> None:
        """All links break at once."""
        for proxy in self.proxies.values():
            proxy.cut()

    async def flap(self) -> None:
        """Links break again and again."""
        for _ in range(8):
            self.proxies[self._any_node()].cut()
            await asyncio.sleep(self.random.uniform(0.0, 0.15))

    async def stall(self) -> None:
        """Nothing passes on a link for a while; then all of it, or the connection breaks."""
        node = self._any_node()
        proxy = self.proxies[node]
        began = time.monotonic()
        stalled_s = self.random.choice((0.2, 1.0, 2.5))
        proxy.stall()
        try:
            if stalled_s > TOLD_S:
                await self.told(node, began)
            await asyncio.sleep(max(began + stalled_s - time.monotonic(), 0))
            if self.random.random() < 0.5:
                proxy.cut()
        finally:
            proxy.flow()

    async def delay(self) -> None:
        """A slow link."""
        proxy = self.proxies[self._any_node()]
        proxy.delay_s = self.random.choice((0.002, 0.02, 0.1))
        await asyncio.sleep(self.random.uniform(0.2, 1.5))
        proxy.delay_s = 0.0

    async def half_open(self) -> None:
        """A link on which nothing arrives any more, and that nobody closes. New ones are fine."""
        self.proxies[self._any_node()].forget()

    async def backup(self) -> None:
        """A backup; with a fault meanwhile it may fail, but says so."""
        self.backups += 1
        task = asyncio.ensure_future(self.kv.backup(f"chaos-{self.backups}", timeout=10.0))
        if self.random.random() < 0.3:
            await self.cut()
        await self._may_fail(task)

    async def restore(self) -> None:
        """The kept keys come back from the backup, and are what they were."""
        mode = self.random.choice(("merge", "replace"))
        while True:
            task = asyncio.ensure_future(self.kv.restore("kept", mode, prefix="kept-", timeout=10.0))
            if self.random.random() < 0.3:
                await self.cut()
            if await self._may_fail(task):
                break
            await self.healed_but_restoring()
        held = {key.decode(): value.decode() async for key, value in self.kv.scan(prefix="kept-")}
        if held != KEPT:
            raise Broken(f"after a restore with {mode}, kept keys are {held}")

    async def healed_but_restoring(self) -> None:
        """All links are back."""
        until = time.monotonic() + HEAL_S
        while (await self.kv.status())["nodes_linked"] < len(self.nodes):
            if time.monotonic() > until:
                raise Broken("links did not come back during a restore")
            await asyncio.sleep(0.02)

    async def _may_fail(self, task: asyncio.Future[Any]) -> bool:
        try:
            await asyncio.wait_for(task, 15.0)
            return True
        except TimeoutError:
            raise Broken("a backup or restore was neither done nor refused within 15 s") from None
        except KvtcpError:
            return False

    async def crowd(self) -> None:
        """Many clients at once; each gets its answer."""

        async def one(number: int) -> None:
            async with kvtcp.connect(self.url, timeout=5.0) as kv:
                await kv.put(f"crowd-{number}", str(number))
                if await kv.get(f"crowd-{number}") != str(number).encode():
                    raise Broken(f"client {number} of a crowd did not read what it wrote")

        await asyncio.gather(*map(one, range(CROWD)))

    # --- endings ------------------------------------------------------------------------------------

    async def clean_end(self) -> None:
        """Nothing more."""

    async def kill_coordinator(self) -> None:
        """SIGKILL under load, with members that differ; the next one makes them equal and serves everything."""
        proxy = self.proxies[self._any_node()]
        if self.random.random() < 0.6:  # one member lacks what the others have, and what nobody may have been told of
            proxy.stall()
            await asyncio.sleep(self.random.uniform(0.2, 0.8))
        self.coordinator.signal(signal.SIGKILL)
        await asyncio.to_thread(self.coordinator.ended)
        proxy.cut()
        proxy.flow()
        await asyncio.sleep(self.random.uniform(0.0, 1.0))
        await self.start_coordinator()
        await self.healed("the coordinator was killed")
        await asyncio.sleep(1.0)  # sleeps: clients go on

    async def kill_node(self) -> None:
        """SIGKILL under load; it comes back empty and must serve nothing, and no write may be executed any more."""
        self.whole = False
        node = self._any_node()
        process = self.nodes.pop(node)
        process.signal(signal.SIGKILL)
        await asyncio.to_thread(process.ended)
        await asyncio.sleep(self.random.uniform(0.0, 1.0))
        self.start_node(node)
        until = time.monotonic() + HEAL_S + 2.0
        while not any(node in s and "without its data" in s for s in (await self.kv.status())["degraded"]):
            if time.monotonic() > until:
                raise Broken(f"{node} lost its data, and status says {(await self.kv.status())['degraded']}")
            await asyncio.sleep(0.05)
        outcomes = await asyncio.gather(
            *(self.kv.incr(key, timeout=1.5) for key in self.probe_keys), return_exceptions=True
        )
        for key, outcome in zip(self.probe_keys, outcomes, strict=True):
            if not isinstance(outcome, Unavailable):
                raise Broken(f"{key}: {outcome!r} of a write while {node} is not a member")
        self.nodes[node].signal(signal.SIGKILL)
        await asyncio.to_thread(self.nodes.pop(node).ended)

    # --- the end ------------------------------------------------------------------------------------

    async def _dumps(self) -> list[dict[str, str]]:
        """All that each node holds, without the coordinator; in a whole cluster that is the same everywhere."""
        until = time.monotonic() + HEAL_S + 2.0
        while self.whole and any(row["outstanding"] for row in await self.kv.nodes()):
            if time.monotonic() > until:
                raise Broken(f"without clients, items are outstanding: {await self.kv.nodes()}")
            await asyncio.sleep(0.02)
        self.coordinator.signal(signal.SIGTERM)
        await asyncio.to_thread(self.coordinator.ended)
        directory = self.directory / "data" / "coordinator"
        secret = json.loads((directory / "identity.json").read_text())["secret"]
        cluster_map = json.loads((directory / "map.json").read_text())["value"]
        # of all: what is expired is expired everywhere
        stamp_ms = max(time.time_ns() // 1_000_000 + 1000, cluster_map["stamp_bound_ms"])
        found = {node: await _dump(self.node_ports[node], node, cluster_map, secret, stamp_ms) for node in self.nodes}
        if self.whole and len({repr(positions) for positions, _ in found.values()}) > 1:
            self.broken.append(f"replicas differ: { {node: positions for node, (positions, _) in found.items()} }")
        dumps: list[dict[str, str]] = []
        for _, dump in found.values():
            if dump not in dumps:
                dumps.append(dump)
        if self.whole and len(dumps) > 1:
            differing = sorted({key for key, _ in set(dumps[0].items()) ^ set(dumps[1].items())})
            self.broken.append(f"replicas with equal chains hold different values: {differing[:20]}")
        for dump in dumps:
            if {key: value for key, value in dump.items() if key.startswith("kept-")} != KEPT:
                self.broken.append("a replica has other kept keys than were written")
        return dumps

    async def _watch_memory(self) -> None:
        while True:
            if self.coordinator.process.poll() is None:
                self.rss_bytes = max(self.rss_bytes, rss_bytes(self.coordinator.pid))
            await asyncio.sleep(0.05)  # sleeps: samples are taken at a pace


async def _dump(
    port: int, node: str, cluster_map: dict[str, Any], secret: str, stamp_ms: int
) -> tuple[list[Any], dict[str, str]]:
    """Positions and pairs of a node, read over a link of an epoch above all others."""
    wire = await Wire.open(("127.0.0.1", port), hello=False)
    shards = list(range(cluster_map["shards"]))
    hello = {
        "version": LINK_VERSION, "cluster": cluster_map["cluster"], "secret": secret,
        "epoch": cluster_map["epoch"] + 1000, "coordinator": "judge", "link": 1, "node": node, "durability": "memory",
        "map_version": 0, "heard_version": 0, "map": None, "shards": shards,
    }  # fmt: skip
    wire.send((HELLO, hello))
    kind, fields = await wire.receive()
    assert kind == REPORT, fields
    report = parse_report(fields)
    dump: dict[str, str] = {}
    lower: bytes = b""
    applied = 0
    while True:
        wire.send((BATCH, stamp_ms, 0, [(PAGE, shards, lower, None, 1000, False, False)]))
        pages: list[Any] = []
        asked, applied = applied + 1, 0
        while applied < asked:  # a large result comes before the frame that says that all are applied
            _, applied, _, results, _ = await wire.receive()
            pages += results
        rows, more = pages[0]
        dump.update((row[0].decode(), row[1].decode()) for row in rows)
        if not more:
            break
        lower = rows[-1][0] + b"\0"
    await wire.close()
    return sorted([number, copy.seq, copy.chain] for number, copy in report.copies.items()), dump


def _keys_of_shards(shards: int) -> list[str]:
    """One key for each shard."""
    keys: dict[int, str] = {}
    number = 0
    while len(keys) < shards:
        keys.setdefault(shard_of(f"probe-{number}".encode(), shards), f"probe-{number}")
        number += 1
    return list(keys.values())


def _python(directory: Path, name: str, *arguments: object) -> Command:
    """A Python program of tests/ as a Command."""
    return Command(directory, f"{name}.py", *arguments, folder="tests")


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


async def run_round(seed: int, seconds: float, clients: int = 3, ending: str | None = None) -> str:
    """One round; returns its report. Raises Broken; the directory with all output is then kept, and named."""
    directory = Path(tempfile.mkdtemp(prefix="kvtcp-chaos-"))
    running = Round(directory, seed, clients)
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # nothing is left running
    try:
        try:
            await running.start()
            history = await running.run(seconds, ending)
        finally:
            await running.close()
        if running.broken:
            raise Broken("\n".join(running.broken[:20]))
    except Exception as error:
        raise Broken(f"seed {seed}, after {dict(running.faults)}, see {directory}: {error}") from error
    shutil.rmtree(directory)
    heal = max(running.heal_s.items(), key=lambda entry: entry[1], default=("nothing", 0.0))
    return (
        f"seed {seed}: {history.calls} calls {dict(history.outcomes)}, {len(history.by_key)} keys, "
        f"{history.undecided} of {history.keys_checked} histories undecided, faults {dict(running.faults)}, "
        f"longest time without any success {history.longest_s:.2f} s, longest healing {heal[1]:.2f} s ({heal[0]}), "
        f"latest answer {history.late_s:.2f} s after its timeout, coordinator up to {running.rss_bytes >> 20} MiB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="of the first round; the next ones count up")
    parser.add_argument("--round-s", type=float, default=20.0, help="faults of a round begin for so long")
    parser.add_argument("--ending", choices=ENDINGS, help="how every round ends, instead of at random")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    until = time.monotonic() + options.minutes * 60
    failures = rounds = 0
    while time.monotonic() < until or not rounds:
        print(f"round {rounds + 1}, seed {seed}", flush=True)
        try:
            print(asyncio.run(run_round(seed, options.round_s, ending=options.ending)), flush=True)
        except Broken as error:
            failures += 1
            print(f"BROKEN {error}", flush=True)
        rounds += 1
        seed += 1
    print(f"{rounds} rounds, {failures} with broken promises")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
