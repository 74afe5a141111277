"""Chaos: a cluster of real processes, clients that write down what they saw, faults at random, and a judge at the end.

`make chaos MINUTES=N [SEED=K] [FACTOR=3] [MIN_INSYNC=2]` runs rounds until the time is over. A round is a new cluster
(`chaos_cluster`: local and linked ones take turns) with client processes under load (`chaos_client`), faults one after
another or several at once (`chaos_faults`), and an operator who adds nodes and takes them away (`chaos_operator`). Then
the faults stop. Within HEAL_S `status` must find nothing wrong any more; everything is read, the cluster is stopped,
the data directories are read and verified; and `chaos_checks` compares that and what the clients saw with what is
promised. A round also counts as failed if it did not answer enough: a cluster that refuses everything breaks nothing.

A seed repeats the choice of faults, not the interleaving of processes.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import kvtcp
from kvtcp.errors import KvtcpError
from tests.chaos.checks import Availability, History, blame
from tests.chaos.cluster import Broken, ChaosCluster, Shape
from tests.chaos.disks import read_map, read_members
from tests.chaos.faults import BALLAST_BYTES, CALM_S, KEPT, Faults
from tests.chaos.operator import Operator
from tests.processes.cluster import ROOT, Command

HEAL_S: Final = 60.0
LATE_MAX_S: Final = 1.0  # an answer may come so long after its timeout
GAP_MAX_S: Final = 60.0  # every shard is written in every minute
STALL_S: Final = 0.25  # gaps of a shard from here on are told
ANSWERED_MIN: Final = {2: 0.90, 1: 0.60}  # share of calls answered with a result, by min_insync


@dataclass(frozen=True)
class Options:
    """What a round has besides its cluster."""

    clients: int = 2  # processes
    only: tuple[str, ...] = ()  # these faults again and again, without a pause; empty: all, at their pace
    with_operator: bool = True
    ballast: int = 20_000  # keys besides those of the clients
    keep: bool = False  # the directory, whatever happened


@dataclass
class Report:
    """What a round did, for people and as JSON."""

    seed: int
    shape: dict[str, Any]
    seconds: float = 0.0
    calls: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    answered: float = 0.0
    served: float = 0.0  # share of the seconds of all shards in which a write was acknowledged
    faults: dict[str, int] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    kills_per_minute: float = 0.0
    skipped_wipes: int = 0
    operator: dict[str, int] = field(default_factory=dict)  # steps
    refusals: dict[str, int] = field(default_factory=dict)  # what the operator was told instead
    longest_stall_s: float = 0.0  # without any write of any shard
    worst_gap_s: list[float] = field(default_factory=list)  # of each shard
    stalls_s: dict[str, list[float]] = field(default_factory=dict)  # longest gap of a shard after each fault
    heal_s: float = 0.0  # from the end of the faults to a `status` without complaints
    late_s: float = 0.0
    lag_s: float = 0.0  # how late driver and clients were themselves: what the machine was short of
    keys_checked: int = 0
    undecided: int = 0
    refused_starts: list[str] = field(default_factory=list)
    rss_bytes: int = 0  # highest of the coordinators
    broken: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)  # gates
    directory: str = ""  # kept when something failed

    def text(self) -> str:
        """For people."""
        median, shape = statistics.median, self.shape
        stalls = [f"{name} {median(each):.2f}/{max(each):.2f}" for name, each in sorted(self.stalls_s.items())]
        lines = [
            f"seed {self.seed}: {shape['kind']}, RF {shape['factor']}, min-insync {shape['min_insync']}, "
            f"{shape['durability']}, {self.seconds:.0f} s of faults",
            f"  {self.calls} calls {self.outcomes}, {self.answered:.1%} answered; shards were written in "
            f"{self.served:.1%} of their seconds",
            f"  kills {self.kills}, {self.kills_per_minute:.1f} a minute; faults {self.faults}, "
            f"{self.skipped_wipes} wipes not possible; operator {self.operator}",
            f"  longest time without any write {self.longest_stall_s:.2f} s; worst gap of each shard, s: "
            + " ".join(f"{gap:.1f}" for gap in self.worst_gap_s),
            f"  gaps of a shard by fault, median/max s: {', '.join(stalls)}",
            f"  whole {self.heal_s:.1f} s after the last fault; latest answer {self.late_s:.2f} s after its timeout; "
            f"driver and clients themselves late by up to {self.lag_s:.2f} s",
            f"  {self.undecided} of {self.keys_checked} histories undecided; "
            f"coordinator up to {self.rss_bytes >> 20} MiB",
        ]
        if self.refused_starts:
            lines.append(f"  starts refused: {dict(Counter(self.refused_starts))}")
        lines += [f"  operator was refused {count} times: {why}" for why, count in self.refusals.items()]
        lines += [f"  MISSED {sentence}" for sentence in self.missed]
        lines += [f"  BROKEN {sentence[:4000]}" for sentence in self.broken]
        if self.directory:
            lines.append(f"  see {self.directory}")
        return "\n".join(lines)


class Round:
    """One cluster, its clients, its faults, its judge."""

    def __init__(self, directory: Path, seed: int, shape: Shape, options: Options) -> None:
        self.directory = directory
        self.shape = shape
        self.only = options.only
        self.with_operator = options.with_operator
        self.random = random.Random(seed)
        self.clients = options.clients
        # never changed: so that copying a shard takes its time
        self.ballast = {f"ballast-{n}": f"{n}".ljust(BALLAST_BYTES) for n in range(options.ballast)}
        self.cluster = ChaosCluster(directory, shape)
        self.workers: list[Command] = []
        self.kv: Any = None
        self.faults: Faults
        self.operator: asyncio.Task[None] | None = None
        self.begun: list[tuple[float, str]] = []  # faults
        self.report = Report(seed, asdict(shape))

    async def run(self, seconds: float) -> None:
        """Everything; what is wrong is in the report. Raises Broken if it cannot go on."""
        watch = asyncio.ensure_future(self._watch())
        try:
            await self._start()
            operator = Operator(self.cluster, self.kv, self.random.randrange(2**32))
            if self.with_operator:
                self.operator = asyncio.ensure_future(operator.run())
            began = time.monotonic()
            await self._faults(began, seconds)
            ended = time.monotonic()
            await self._heal(operator)
            await self._stop_clients()
            history = History()
            for number in range(self.clients):
                history.read(self.directory / f"c{number}.jsonl")
            self._measure(history, Availability(history, self.shape.shards, began, ended))
            finals = [await self._read_everything()]
            await self.cluster.stop()
            finals += await asyncio.to_thread(self._read_disks)
            await asyncio.to_thread(self._judge, history, finals)
        finally:
            watch.cancel()

    async def _start(self) -> None:
        await self.cluster.start()
        self.kv = await kvtcp.connect(self.cluster.url, timeout=10.0)
        self.faults = Faults(self.cluster, self.kv, self.random.randrange(2**32))
        await self.kv.put_many(KEPT)
        await self.kv.put_many(self.ballast)
        await self.kv.backup("kept")
        for number in range(self.clients):
            arguments = (self.cluster.url, self.random.randrange(2**32), f"c{number}", f"c{number}.jsonl")
            self.workers.append(Command(self.directory, "tests.chaos.client", *arguments))
        await asyncio.sleep(1.0)  # sleeps: clients are at work before anything happens

    # --- faults -------------------------------------------------------------------------------------

    async def _faults(self, began: float, seconds: float) -> None:
        deck: list[str] = []
        pause_s = 0.0
        while time.monotonic() < began + seconds:
            if not deck:
                deck = list(self.only[::-1]) * 10 if self.only else self.faults.deck()
                pause_s = 0.0 if self.only else 60.0 / len(deck)
            next_at = time.monotonic() + self.random.uniform(0.6, 1.2) * pause_s
            if self.random.random() < 0.75:  # else whatever goes on from the one before meets this one
                await self.faults.wait_whole(CALM_S)
            name = deck.pop()
            self.begun.append((time.monotonic(), name))
            await self.faults.named(name)()
            self._check_processes()
            await asyncio.sleep(max(next_at - time.monotonic(), 0.2))
        await self.faults.end()

    def _check_processes(self) -> None:
        """Nothing that should run has ended. Raises Broken."""
        self.cluster.check_coordinator()
        if self.operator is not None and self.operator.done():
            self.operator.result()  # raises
        for command in self.workers:
            if command.process.poll() is not None:
                raise Broken(f"a client met an error that no promise allows:\n{command.err.read_text()}")

    async def _heal(self, operator: Operator) -> None:
        """No faults any more: the operator comes to an end, and `status` finds nothing wrong soon."""
        began = time.monotonic()
        self.cluster.calm()
        operator.finish(HEAL_S)
        if self.operator is not None:
            await self.operator
        self.report.operator, self.report.refusals = dict(operator.steps), dict(operator.refusals)
        if not await self.faults.wait_whole(HEAL_S):
            status = await self.kv.status()
            rows = [row for row in await self.kv.shards() if row["state"] != "ok" or row["reason"]]
            self.report.broken.append(
                f"{HEAL_S:.0f} s after the last fault: {status['degraded']}, {len(rows)} shards, first {rows[:2]}, "
                f"nodes {await self.kv.nodes()}"
            )
        self.report.heal_s = time.monotonic() - began

    async def _stop_clients(self) -> None:
        self._check_processes()
        for command in self.workers:
            command.signal(signal.SIGTERM)
        for command in self.workers:
            if await asyncio.to_thread(command.ended) != 0:
                raise Broken(f"a client met an error that no promise allows:\n{command.err.read_text()}")

    # --- the judge ----------------------------------------------------------------------------------

    def _measure(self, history: History, availability: Availability) -> None:
        report = self.report
        report.seconds = availability.end - availability.begin
        report.calls, report.outcomes, report.answered = history.calls, dict(history.outcomes), history.answered
        report.served = availability.served()
        report.worst_gap_s = [round(gap, 2) for gap in availability.worst()]
        report.longest_stall_s = availability.longest_stall_s()
        report.stalls_s = blame(availability.gaps(STALL_S), self.begun)
        report.faults = dict(Counter(name for _, name in self.begun))
        report.kills = dict(self.cluster.kills)
        report.kills_per_minute = self.cluster.kills["node"] + self.cluster.kills["coordinator"]
        report.kills_per_minute /= report.seconds / 60
        report.skipped_wipes = self.faults.skipped_wipes
        report.refused_starts = self.cluster.refused_starts
        report.late_s = history.late_s
        wanted = ANSWERED_MIN[min(2, self.shape.min_insync)]
        if report.answered < wanted:
            report.missed.append(f"{report.answered:.1%} of calls were answered, {wanted:.0%} are wanted")
        if max(report.worst_gap_s) > GAP_MAX_S:
            report.missed.append(f"a shard was not written for {max(report.worst_gap_s):.1f} s")
        report.lag_s = max(report.lag_s, history.lag_s)
        if history.late_s > LATE_MAX_S + history.lag_s:
            report.broken.append(f"an answer came {history.late_s:.2f} s after its timeout")

    async def _read_everything(self) -> dict[str, str]:
        """All pairs, as a client sees them."""
        until = time.monotonic() + HEAL_S
        while True:
            try:
                return {key.decode(): value.decode() async for key, value in self.kv.scan()}
            except KvtcpError as error:
                if time.monotonic() > until:
                    raise Broken(f"the cluster cannot be read in the end: {error}") from error
                await asyncio.sleep(0.05)

    def _read_disks(self) -> list[dict[str, str]]:
        """All versions of what the members hold."""
        if self.shape.durability == "memory":
            return []
        versions, broken = read_members(read_map(self.cluster.data), self.cluster.directory_of)
        self.report.broken += broken
        for node in self.cluster.names:
            directory = self.cluster.directory_of(node)
            command = [sys.executable, str(ROOT / "bin" / "kvtcp-node"), "--check", str(directory)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                self.report.broken.append(f"--check of {node}: {done.stdout}{done.stderr}")
        return versions

    def _judge(self, history: History, finals: list[dict[str, str]]) -> None:
        broken = self.report.broken
        for final in finals:
            broken += [text for text in history.check(final, self.faults.takeovers) if text not in broken]
            if {key: value for key, value in final.items() if key.startswith("kept-")} != KEPT:
                broken.append("kept keys are not what was written and restored")
            wrong = [key for key, value in self.ballast.items() if final.get(key) != value]
            if wrong:
                broken.append(f"{len(wrong)} keys that were never changed are not what they were: {wrong[:10]}")
        self.report.keys_checked, self.report.undecided = history.keys_checked, history.undecided
        broken += self.cluster.own_deaths()
        for path in sorted(self.directory.glob("*.err")):
            text = path.read_text()
            if "Traceback" in text:
                broken.append(f"{path.name}:\n{text[text.index('Traceback') :][:4000]}")

    # --- around it ----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            command = self.cluster.coordinator
            if command is not None and command.process.poll() is None:
                self.report.rss_bytes = max(self.report.rss_bytes, rss_bytes(command.pid))
            began = time.monotonic()
            await asyncio.sleep(0.05)  # sleeps: samples are taken at a pace
            self.report.lag_s = max(self.report.lag_s, time.monotonic() - began - 0.05)

    async def close(self) -> None:
        """End everything."""
        self.cluster.calm()
        if self.operator is not None:
            self.operator.cancel()
            await asyncio.wait([self.operator])
        if self.kv is not None:
            await self.kv.close()
        for command in self.workers:
            if command.process.poll() is None:
                command.signal(signal.SIGKILL)
            await asyncio.to_thread(command.ended)
        await self.cluster.close()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


async def run_round(seed: int, seconds: float, shape: Shape, options: Options) -> Report:
    """One round. The directory with all data and output is kept, and named in the report, when something is wrong."""
    directory = Path(tempfile.mkdtemp(prefix="kvtcp-chaos-"))
    running = Round(directory, seed, shape, options)
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # nothing is left running
    try:
        await running.run(seconds)
    except Broken as error:
        running.report.broken.append(str(error))
        running.report.faults = dict(Counter(name for _, name in running.begun))
    finally:
        await running.close()
    if running.report.broken or running.report.missed or options.keep:
        running.report.directory = str(directory)
    else:
        shutil.rmtree(directory)
    return running.report


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=2.0, help="of faults, in all rounds together")
    parser.add_argument("--seed", type=int, help="of the first round; the next ones count up")
    parser.add_argument("--round-s", type=float, default=60.0, help="of faults in a round (default: %(default)s)")
    parser.add_argument("--kind", choices=("local", "linked"), help="of all rounds, instead of both in turn")
    parser.add_argument("--factor", type=int, default=3)
    parser.add_argument("--min-insync", type=int, help="default: 2, or 1 with factor 2")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--durability", choices=("sync", "os"), default="sync")
    parser.add_argument("--clients", type=int, default=2, help="processes")
    parser.add_argument("--only", metavar="FAULT,...", help="these faults again and again, without a pause")
    parser.add_argument(
        "--operator", action=argparse.BooleanOptionalAction, default=True, help="add, drain and remove nodes"
    )
    parser.add_argument("--ballast", type=int, default=Options.ballast, help="keys of 1 KB (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the directories of rounds without errors too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the reports of all rounds")
    return parser.parse_args()


def main() -> int:
    """Rounds until the time is over; 1 if anything was wrong."""
    options = parse_arguments()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    min_insync = options.min_insync or (1 if options.factor == 2 else min(2, options.factor))
    kinds = [options.kind] if options.kind else ["local", "linked"]
    only = tuple(options.only.split(",")) if options.only else ()
    wanted = Options(options.clients, only, options.operator, options.ballast, options.keep)
    reports: list[Report] = []
    left_s = options.minutes * 60
    while left_s > options.round_s / 2 or not reports:
        kind = kinds[seed % len(kinds)]
        shape = Shape(kind, options.factor, min_insync, options.nodes, durability=options.durability)
        print(f"round {len(reports) + 1}, seed {seed}", flush=True)
        report = asyncio.run(run_round(seed, min(options.round_s, left_s), shape, wanted))
        reports.append(report)
        print(report.text(), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(each) for each in reports], indent=1))
        left_s -= options.round_s
        seed += 1
    broken = [report.seed for report in reports if report.broken]
    missed = [report.seed for report in reports if report.missed]
    kills = sum(report.kills.get(what, 0) for report in reports for what in ("node", "coordinator"))
    minutes = sum(report.seconds for report in reports) / 60
    print(
        f"{len(reports)} rounds, {kills} kills in {minutes:.1f} minutes; seeds with broken promises: "
        f"{broken or 'none'}; with too little answered: {missed or 'none'}"
    )
    return 1 if broken or missed else 0


if __name__ == "__main__":
    sys.exit(main())
