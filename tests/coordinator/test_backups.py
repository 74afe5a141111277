"""Backups and restores of running clusters: one point in time, whole or not at all, whatever is lost meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvtcp
from kvtcp.coordinator import backups
from kvtcp.errors import Code, DataError, KvtcpError, OutcomeUnknown, RequestError, Unavailable
from kvtcp.node import backup as backup_job
from kvtcp.protocol.operations import CLEAR, FREEZE
from kvtcp.replication.membership.insync import Membership
from kvtcp.replication.sequencing.shard import Shard
from kvtcp.storage.backup import archive as files
from kvtcp.testing.local_cluster import LocalCluster
from tests.processes.raw_client import (
    BOTH_LOOPS,
    Wire,
    bad_shards,
    cut_link,
    event_loop_policy,
    keys_of_shards,
    kill_node,
    linked,
    restart_empty,
    until,
)
from tests.support.learning_tools import deafen

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    """Three nodes with two copies each."""
    async with LocalCluster(3, replication_factor=2, shards=16, backup_dir=tmp_path / "backups") as running:
        yield running
        running.coordinator.sequencer.check()
        assert not running.coordinator.failed.done()


@pytest.fixture
async def kv(cluster: LocalCluster) -> AsyncIterator[Any]:
    """A client."""
    async with kvtcp.connect(cluster.url, timeout=5) as client:
        yield client


@pytest.fixture
async def impatient(cluster: LocalCluster) -> AsyncIterator[Any]:
    """A client that hardly repeats what was refused."""
    async with kvtcp.connect(cluster.url, timeout=0.2) as client:
        yield client


def content(directory: Path) -> dict[bytes, bytes]:
    """What a backup holds, after it was verified."""
    files.verify(directory)
    return {pair.key: pair.value for pair in files.read_pairs(directory)}


async def everything(kv: Any) -> dict[bytes, bytes]:
    """What the cluster holds."""
    return {key: value async for key, value in kv.scan()}


async def test_one_point_in_time(cluster: LocalCluster, kv: Any) -> None:
    """Keys written one after the other over all shards: a backup holds the first n of them, without a hole, and of a
    key written without waiting a value between those acknowledged before the backup began and sent before it ended."""
    written = 0
    streams = keys_of_shards(cluster, prefix="stream")
    acked = dict.fromkeys(streams, 0)
    sent = dict.fromkeys(streams, 0)
    stop = asyncio.Event()

    async def ordered() -> None:
        nonlocal written
        while not stop.is_set():
            await kv.put(f"seq-{written + 1:06d}", "x")
            written += 1

    async def pipelined(key: str) -> None:
        async def one() -> None:
            acked[key] = max(acked[key], await kv.incr(key))

        while not stop.is_set():
            sent[key] += 4
            await asyncio.gather(*(one() for _ in range(4)))

    tasks = [asyncio.ensure_future(ordered()), *(asyncio.ensure_future(pipelined(key)) for key in streams[:6])]
    before_last = 0
    async with kvtcp.connect(cluster.url) as other:
        for number in range(6):
            begun = written
            acked_before = dict(acked)
            await until(lambda: written > begun + 30, "writes between backups")  # noqa: B023
            begun, acked_before = written, dict(acked)
            await other.backup(f"b{number}")
            ended, sent_after = written + 1, dict(sent)
            pairs = content(cluster.backup_dir / f"b{number}")
            found = sorted(key for key in pairs if key.startswith(b"seq-"))
            assert found == [b"seq-%06d" % n for n in range(1, len(found) + 1)], "a hole: not one point in time"
            assert begun <= len(found) <= ended and len(found) > before_last
            before_last = len(found)
            for key in streams[:6]:
                assert acked_before[key] <= int(pairs.get(key.encode(), b"0")) <= sent_after[key]
    stop.set()
    await asyncio.gather(*tasks)
    assert sorted(path.name for path in cluster.backup_dir.iterdir()) == [f"b{n}" for n in range(6)]


async def test_summary_and_spread(cluster: LocalCluster, kv: Any) -> None:
    """A backup says what it wrote; every node wrote a file, every shard is in one of them, progress was shown."""
    keys = keys_of_shards(cluster, 3)
    await kv.put_many(dict.fromkeys(keys, "v"))
    shown: list[dict[str, Any]] = []
    summary = await kv.backup("whole", progress=shown.append)
    assert summary["name"] == "whole" and summary["pairs"] == len(keys) and summary["files"] == 3
    assert shown == [{"phase": "save"}, *({"phase": "save", "files_done": n, "files": 3} for n in range(4))]
    manifest = files.read_manifest(cluster.backup_dir / "whole")
    held = [len(file.shards) for file in manifest.files]
    assert sum(held) == cluster.shards and max(held) - min(held) <= 2
    assert (await kv.status())["running"] == ""


async def test_progress_in_every_phase(cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase that takes long in one step keeps telling of itself, so its client's idle timeout does not end it."""
    monkeypatch.setattr(backups, "PROGRESS_S", 0.01)
    await kv.put_many(dict.fromkeys(keys_of_shards(cluster, 3), "v"))
    await kv.backup("base")
    shown: list[dict[str, Any]] = []

    async def stand_still() -> None:
        before = len(shown)
        await until(lambda: len(shown) >= before + 30, "progress of a phase that stands still")

    def hold(name: str) -> None:
        step = getattr(backups.Backups, name)

        async def slow(self: backups.Backups, *args: Any) -> Any:
            monkeypatch.setattr(backups.Backups, name, step)
            await stand_still()
            return await step(self, *args)

        monkeypatch.setattr(backups.Backups, name, slow)

    async def pages(self: backups.Backups, prefix: bytes, read: Any = backups.Backups._pages) -> AsyncIterator[Any]:
        await stand_still()
        async for page in read(self, prefix):
            yield page

    for name in ("_count", "_attempt", "_write", "_put_all"):
        hold(name)
    monkeypatch.setattr(backups.Backups, "_pages", pages)
    summary = await kv.restore("base", "replace", progress=shown.append, timeout=0.25)
    assert summary["pairs"] == len(await everything(kv))
    phases = [progress["phase"] for progress in shown]
    assert list(dict.fromkeys(phases)) == ["verify", "save", "clear", "load", "compare"]
    assert shown[-1] == {"phase": "compare", "pairs_done": summary["pairs"], "pairs": summary["pairs"]}


async def test_empty_cluster(cluster: LocalCluster, kv: Any) -> None:
    """A backup of nothing is a backup, and restoring it with replace empties the cluster."""
    assert (await kv.backup("nothing"))["pairs"] == 0
    await kv.put("a", "1")
    summary = await kv.restore("nothing", "replace")
    assert summary["pairs"] == 0 and await everything(kv) == {}
    assert content(cluster.backup_dir / summary["saved_as"]) == {b"a": b"1"}


async def test_names(cluster: LocalCluster, kv: Any) -> None:
    """A taken or bad name is refused, one without a name is called after the time, a second backup is refused."""
    await kv.backup("one")
    for name in ("one", ".hidden", "a/b", "-x"):
        with pytest.raises(RequestError):
            await kv.backup(name)
    assert (await kv.backup())["name"].endswith("Z")
    async with await Wire.open(cluster.coordinator.address) as wire:
        wire.send([1, "backup", "two"], [2, "backup", "three"], [3, "restore", "one"])
        answers: dict[int, Any] = {}
        while len(answers) < 3:
            ident, code, *rest = await wire.receive()
            if code != Code.PROGRESS:
                answers[ident] = (code, rest)
    assert answers[1][0] == Code.OK and answers[2][0] == answers[3][0] == Code.OVERLOADED
    assert b"backup two is running" in answers[2][1][0]


async def test_merge_replace_prefix_and_dry_run(cluster: LocalCluster, kv: Any) -> None:
    """`merge` overwrites and keeps, `replace` makes equal, a prefix limits both, a dry run changes nothing."""
    await kv.put_many({"a1": "old", "a2": "old", "b1": "old"})
    await kv.backup("base")
    await kv.put_many({"a1": "new", "a3": "new", "b1": "new"})
    now = await everything(kv)
    dry = await kv.restore("base", "replace", dry_run=True)
    assert dry["dry_run"] is True and (dry["pairs"], dry["present"]) == (3, 4)
    assert await everything(kv) == now
    await kv.restore("base", prefix="b")
    assert await everything(kv) == {**now, b"b1": b"old"}
    await kv.restore("base", "replace", prefix="a")
    assert await everything(kv) == {b"a1": b"old", b"a2": b"old", b"b1": b"old"}
    await kv.put("b2", "new")
    await kv.restore("base")
    assert await everything(kv) == {b"a1": b"old", b"a2": b"old", b"b1": b"old", b"b2": b"new"}
    # two in the same second need two names for what they save
    saved = {(await kv.restore("base", "replace"))["saved_as"] for _ in range(3)}
    assert len(saved) == 3 and await everything(kv) == {b"a1": b"old", b"a2": b"old", b"b1": b"old"}


async def test_deadlines(cluster: LocalCluster, kv: Any) -> None:
    """A restored key lives as long as it had left at the backup, from the restore on; one that expires while the
    restore runs is no difference; an expired one is not in the backup."""
    await kv.put("long", "v", ttl=1000)
    await kv.put("short", "v", ttl=0.001)
    await kv.put("soon", "v", ttl=0.25)
    await kv.put("ever", "v")
    await until(lambda: cluster.coordinator.sequencer.stamp_ms, "a tick")
    while await kv.exists("short"):
        await asyncio.sleep(0.002)
    await kv.backup("lives")
    lives = {pair.key: pair.ttl_ms for pair in files.read_pairs(cluster.backup_dir / "lives")}
    assert set(lives) == {b"long", b"soon", b"ever"} and lives[b"ever"] is None
    assert lives[b"soon"] is not None and lives[b"long"] is not None and 990_000 < lives[b"long"] <= 1_000_000
    while await kv.exists("soon"):
        await asyncio.sleep(0.005)
    await kv.restore("lives", "replace")
    assert 990 < await kv.ttl("long") <= lives[b"long"] / 1000 and await kv.ttl("ever") == math.inf
    while await kv.exists("soon"):
        await asyncio.sleep(0.005)
    assert await everything(kv) == {b"long": b"v", b"ever": b"v"}


async def test_key_that_expires_during_the_comparison(
    cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restored key that has expired when the content is read back does not fail the restore; a lost one does."""
    await kv.put_many([("a", "v"), ("b", "v", 0.3), ("c", "v")])
    await kv.backup("base")
    compare = backups.Backups._compare
    lost = ""

    async def late(self: backups.Backups, directory: Path, prefix: bytes, *told: Any) -> None:
        async def count() -> int:
            return await self._count(b"b")

        while await count():
            await asyncio.sleep(0.01)
        if lost:
            await self._write(CLEAR, 0, b"", (None, 1000))
            for number in range(cluster.shards):
                await self._write(CLEAR, number, lost.encode(), (lost.encode() + b"\0", 1))
        await compare(self, directory, prefix, *told)

    monkeypatch.setattr(backups.Backups, "_compare", late)
    await kv.restore("base", "replace")
    assert await everything(kv) == {b"a": b"v", b"c": b"v"}
    lost = "c"
    with pytest.raises(OutcomeUnknown, match=r"read back.*is not what the backup has"):
        await kv.restore("base", "replace")
    monkeypatch.undo()
    await kv.restore("base", "replace")
    assert await kv.get("c") == b"v"


@pytest.mark.parametrize("damage", ["byte", "line", "manifest", "missing"])
async def test_damaged_backup(cluster: LocalCluster, kv: Any, damage: str) -> None:
    """A damaged backup is refused with the file named, before anything is changed, in every mode."""
    await kv.put_many({f"k{n}": "v" * 20 for n in range(50)})
    await kv.backup("base")
    await kv.put("k1", "changed")
    directory = cluster.backup_dir / "base"
    victim = sorted(directory.glob("node-*.jsonl"))[0]
    if damage == "byte":
        victim.write_bytes(victim.read_bytes().replace(b"vvvv", b"vvvw", 1))
    elif damage == "line":
        victim.write_bytes(b"".join(victim.read_bytes().splitlines(keepends=True)[1:]))
    elif damage == "missing":
        victim.unlink()
    else:
        fields = json.loads((directory / "manifest.json").read_text())
        fields["format"] = 999
        (directory / "manifest.json").write_text(json.dumps(fields))
    before = await everything(kv)
    for mode in ("merge", "replace"):
        for dry_run in (True, False):
            with pytest.raises(DataError, match="base"):
                await kv.restore("base", mode, dry_run=dry_run)
    assert await everything(kv) == before
    assert cluster.coordinator.backups.restoring is None
    assert [path.name for path in cluster.backup_dir.iterdir()] == ["base"]


@contextlib.contextmanager
def held_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """A restore that stops before it loads: (it is there, let it go on)."""
    there, go_on = asyncio.Event(), asyncio.Event()
    load = backups.Backups._load

    async def wait(self: backups.Backups, *args: Any) -> None:
        there.set()
        await go_on.wait()
        await load(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(backups.Backups, "_load", wait)
        yield there, go_on


async def test_restoring_answers(cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While `replace` runs, everything that touches the prefix is refused with RESTORING and all else is served."""
    await kv.put_many({"in/1": "v", "out/1": "v"})
    await kv.backup("base")
    with held_load(monkeypatch) as (there, go_on):
        restore = asyncio.ensure_future(kv.restore("base", "replace", prefix="in/"))
        await there.wait()
        async with await Wire.open(cluster.coordinator.address) as wire:
            for request in (
                ["get", "in/1"], ["put", "in/1", "x"], ["add", "in/9", "x"], ["delete", "in/1"], ["incr", "in/n", 1],
                ["cas", "in/1", "x", {"rev": 0}], ["exists", "in/1"], ["ttl", "in/1"], ["expire", "in/1", 5],
                ["persist", "in/1"], ["mget", ["out/1", "in/1"]], ["mput", [["in/1", "x"], ["out/1", "x"]]],
                ["mdelete", ["out/1", "in/1"]], ["scan", "", None, 10], ["scan", "in/", "in0", 10], ["count", "", None],
                ["count", "", None, {"prefix": "in/1"}],
            ):  # fmt: skip
                answer = await wire.ask(*request)
                assert answer[1] == Code.RESTORING and b'"in/"' in answer[2], request
            for request in (
                ["get", "out/1"], ["put", "out/2", "x"], ["mget", ["out/1"]], ["scan", "out", None, 9],
                ["count", "", "in"], ["status"], ["nodes"], ["shards"],
            ):  # fmt: skip
                assert (await wire.ask(*request))[1] == 0, request
            assert (await kv.status())["state"] == "degraded"
        go_on.set()
        await restore
    assert await everything(kv) == {b"in/1": b"v", b"out/1": b"v", b"out/2": b"x"}
    assert (await kv.status())["degraded"] == []


async def test_long_request_and_input_cap(cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection on which a long restore runs goes on being read, however much it writes meanwhile."""
    await kv.put("in/1", "v")
    await kv.backup("base")
    with held_load(monkeypatch) as (there, go_on):
        restore = asyncio.ensure_future(kv.restore("base", "replace", prefix="in/"))
        await there.wait()
        for n in range(20):
            await kv.put(f"much{n % 3}", b"x" * 1_000_000)
        assert not restore.done()
        go_on.set()
        await restore


async def test_waiting_writes_of_a_replace(cluster: LocalCluster, kv: Any) -> None:
    """Writes that wait, not yet sequenced, when `replace` closes their prefix are refused and never executed."""
    await kv.put("in/1", "v")
    await kv.backup("base")
    coordinator = cluster.coordinator
    async with await Wire.open(coordinator.address) as wire:
        for shard in coordinator.sequencer.shards:
            shard.writable = False  # as if a window was full
        wire.send(*([n, "put", f"in/{n}", "late"] for n in range(8)), [100, "put", "out", "x"])
        await until(lambda: coordinator.sequencer.waiting_items == 9, "waiting writes")
        coordinator.backups._close_prefix(b"in/")
        coordinator.begin()
        codes = [(await wire.receive())[1] for _ in range(8)]
        assert codes == [Code.RESTORING] * 8
        coordinator.backups._open_prefix()
        assert coordinator.sequencer.waiting_items == 1
        assert [key async for key in kv.scan_keys(prefix="in/")] == [b"in/1"]
        for link in coordinator.sequencer.links.values():
            coordinator.sequencer._opened(link)
        coordinator.begin()
        assert (await wire.receive())[:2] == [100, 0]


async def test_prefix_is_closed_before_it_is_saved(
    cluster: LocalCluster, kv: Any, impatient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No write can fall between what `replace` saves and what it clears; if saving fails all is open again."""
    await kv.put_many({"in/1": "v"})
    await kv.backup("base")
    await kv.put("in/2", "new")
    save = backups.Backups._save
    refused = []
    failing = True

    async def write_meanwhile(self: backups.Backups, progress: Any) -> str:
        with pytest.raises(Unavailable) as error:
            await impatient.put("in/3", "late")
        refused.append(error.value.code)
        if failing:
            raise Unavailable("no disk", Code.NO_SPACE)
        return await save(self, progress)

    monkeypatch.setattr(backups.Backups, "_save", write_meanwhile)
    with pytest.raises(Unavailable, match="no disk"):
        await impatient.restore("base", "replace", prefix="in/")
    failing = False
    assert await everything(kv) == {b"in/1": b"v", b"in/2": b"new"}
    summary = await kv.restore("base", "replace", prefix="in/")
    assert set(refused) == {Code.RESTORING}
    assert await everything(kv) == {b"in/1": b"v"}
    saved = {pair.key for pair in files.read_pairs(cluster.backup_dir / summary["saved_as"])}
    assert saved == {b"in/1", b"in/2"}


async def test_merge_does_not_repeat_what_may_have_happened(
    cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put of a merge whose outcome is unknown is not sent again, over what others may have written since."""
    await kv.put_many({"in/1": "v"})
    await kv.backup("base")
    puts = []

    def unknown(self: Shard, op: int, key: bytes, args: Any, size: int, sink: Any, token: Any) -> None:
        puts.append(key)
        sink.fail(token, Code.UNKNOWN, "for the test", {})

    monkeypatch.setattr(Shard, "write", unknown)
    with pytest.raises(OutcomeUnknown, match="stopped half-way"):
        await kv.restore("base")
    assert puts == [b"in/1"]


async def test_failure_in_mid_replace(
    cluster: LocalCluster, kv: Any, impatient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `replace` that fails after it began to clear keeps the prefix closed, says so, until one completes."""
    await kv.put_many({"in/1": "v", "out/1": "v"})
    await kv.backup("base")
    put_all = backups.Backups._put_all

    async def fail(self: backups.Backups, chunk: Any) -> None:
        raise Unavailable("no replicas", Code.NOT_ENOUGH_REPLICAS)

    monkeypatch.setattr(backups.Backups, "_put_all", fail)
    with pytest.raises(OutcomeUnknown, match='"in/" stay closed until a restore completes: no replicas'):
        await kv.restore("base", "replace", prefix="in/")
    with pytest.raises(OutcomeUnknown, match="half-way, repeat it") as raised:
        cluster.coordinator.backups.restoring = None
        await kv.restore("base", prefix="out/")
    assert raised.value.code == Code.UNKNOWN
    cluster.coordinator.backups.restoring = b"in/"
    with pytest.raises(Unavailable) as closed:
        await impatient.get("in/1")
    assert closed.value.code == Code.RESTORING
    for mode, prefix in (("merge", "in/"), ("replace", "out/")):
        with pytest.raises(Unavailable) as refused:
            await impatient.restore("base", mode, prefix=prefix)
        assert refused.value.code == Code.RESTORING
    assert "closed until a restore completes" in (await kv.status())["degraded"][0]
    monkeypatch.setattr(backups.Backups, "_put_all", put_all)
    summary = await kv.restore("base", "replace", prefix="in/")
    assert "saved_as" not in summary, "what is half restored is not worth saving"
    assert await everything(kv) == {b"in/1": b"v", b"out/1": b"v"}


async def test_refusals_at_once_do_not_spin(cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore whose writes are refused at once tries again at the pace of ticks, others are served meanwhile."""
    await kv.put_many(dict.fromkeys(keys_of_shards(cluster), "v"))
    await kv.backup("base")
    for shard in cluster.coordinator.sequencer.shards:
        if shard.number % 2:
            shard.serving = shard.writable = False
    monkeypatch.setattr(backups, "LOAD_WAIT_S", 0.4)
    before = cluster.coordinator.sequencer.unavailable
    async with await Wire.open(cluster.coordinator.address) as wire:
        wire.send([1, "restore", "base", {"mode": "merge", "prefix": "k1"}])
        answer = await wire.receive()
        while answer[1] == Code.PROGRESS:
            answer = await wire.receive()
    assert answer[1] in (Code.UNKNOWN, Code.SHARD_DOWN)
    assert cluster.coordinator.sequencer.unavailable - before < 500
    for shard in cluster.coordinator.sequencer.shards:
        shard.serving = shard.writable = True


def interrupt(monkeypatch: pytest.MonkeyPatch, action: Any, times: int = 1) -> None:
    """Do `action` as soon as a node's backup job begins, the first `times` jobs."""
    start = backup_job.BackupJob.start
    done = 0

    def begin(self: backup_job.BackupJob) -> None:
        nonlocal done
        start(self)
        if done < times:
            done += 1
            action(self)

    monkeypatch.setattr(backup_job.BackupJob, "start", begin)


async def test_link_lost_during_a_backup(cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that breaks during a backup: it is begun again once with a new cut, and nothing is left behind."""
    await kv.put_many({f"k{n}": "v" for n in range(500)})
    interrupt(monkeypatch, lambda job: cut_link(cluster.coordinator, job._node))
    shown: list[dict[str, Any]] = []
    await kv.backup("again", progress=shown.append)
    assert any("begun_again" in fields for fields in shown)
    assert len(content(cluster.backup_dir / "again")) == 500
    assert [path.name for path in cluster.backup_dir.iterdir()] == ["again"]
    await linked(cluster.coordinator, 3)


async def test_link_lost_before_the_cut(cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that breaks before its node answered the cut fails that attempt only."""
    await kv.put("k", "v")
    control = cluster.coordinator.sequencer.control
    cuts = 0

    def cut(node: str, item: Any, *args: Any) -> bool:
        nonlocal cuts
        cuts += item[0] == FREEZE
        queued = control(node, item, *args)
        if cuts == 1:
            cut_link(cluster.coordinator, node)
        return queued

    monkeypatch.setattr(cluster.coordinator.sequencer, "control", cut)
    assert (await kv.backup("late"))["pairs"] == 1
    assert cuts > 3
    assert [path.name for path in cluster.backup_dir.iterdir()] == ["late"]
    await linked(cluster.coordinator, 3)


async def test_node_lost_twice(cluster: LocalCluster, kv: Any, impatient: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second loss fails the backup with its reason; no directory is left, and the next backup works."""
    await kv.put_many({f"k{n}": "v" for n in range(100)})
    interrupt(monkeypatch, lambda job: cut_link(cluster.coordinator, job._node), times=1000)
    why = r"(.* was lost|no replica of .* can be read)"  # the second attempt may begin before the link is back
    with pytest.raises(Unavailable, match=rf"failed 2 times, last: {why}; nothing was published"):
        await impatient.backup("never")
    monkeypatch.undo()
    await until(lambda: not any(node._jobs for node in cluster.nodes.values()), "the end of all jobs")
    assert list(cluster.backup_dir.iterdir()) == []
    await linked(cluster.coordinator, 3)
    assert (await kv.backup("never"))["pairs"] == 100


async def test_node_dead_during_a_backup(cluster: LocalCluster, kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is killed during a backup: the second attempt takes every shard from those that are left."""
    keys = keys_of_shards(cluster, 5)
    await kv.put_many(dict.fromkeys(keys, "v"))

    def kill(job: backup_job.BackupJob) -> None:
        server = cluster.nodes[job._node]
        for connection in list(server.connections):
            connection.abort()
        assert server._server is not None
        server._server.close()

    interrupt(monkeypatch, kill)
    summary = await kv.backup("rest")
    assert summary["files"] == 2 and set(content(cluster.backup_dir / "rest")) == {key.encode() for key in keys}


async def test_shards_without_a_reader(cluster: LocalCluster, kv: Any, impatient: Any) -> None:
    """With a shard that nobody can read there is no backup, and the sentence says which."""
    await kv.put("k", "v")
    await kill_node(cluster, "n1")
    await kill_node(cluster, "n2")
    with pytest.raises(Unavailable, match=r"no replica of shard \d+ can be read; nothing was published"):
        await impatient.backup("half")
    assert list(cluster.backup_dir.iterdir()) == []


async def test_cut_that_cannot_commit(
    cluster: LocalCluster, kv: Any, impatient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut that contains what a lost node never acknowledged is given up in time, not after minutes."""
    monkeypatch.setattr(backups, "CUT_WAIT_S", 0.3)
    await kv.put("k", "v")
    await restart_on_other_terms(cluster, kv)
    with pytest.raises(KvtcpError, match=r"did not finish in time|cannot commit"):
        await impatient.backup("stuck")
    assert list(cluster.backup_dir.iterdir()) == []


async def restart_on_other_terms(cluster: LocalCluster, kv: Any) -> None:
    """n1 stops reading with writes on their way to it, then is killed."""
    deafen(cluster.nodes["n1"])
    keys = keys_of_shards(cluster)
    writes = [asyncio.ensure_future(kv.put(key, "pending", timeout=0.2)) for key in keys]
    await asyncio.gather(*writes, return_exceptions=True)
    await kill_node(cluster, "n1")


@pytest.mark.parametrize("where", ["directory", "create", "write", "sync"])
async def test_disk_errors(
    cluster: LocalCluster, kv: Any, impatient: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    """An error of the disk on the coordinator or a node fails the backup with its text and leaves nothing behind."""
    await kv.put_many({f"k{n}": "v" for n in range(100)})

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device", "somewhere")

    if where == "directory":
        (tmp_path / "backups").write_text("in the way")
    elif where == "create":
        monkeypatch.setattr("kvtcp.storage.files.OsDisk.create", fail)
    elif where == "write":
        monkeypatch.setattr("kvtcp.storage.files.OsFile.write", fail)
    else:
        monkeypatch.setattr("kvtcp.storage.files.OsFile.sync", fail)
    with pytest.raises(Unavailable, match=r"Not a directory|File exists|No space left"):
        await impatient.backup("full")
    monkeypatch.undo()
    if where == "directory":
        (tmp_path / "backups").unlink()
    else:
        assert list(cluster.backup_dir.iterdir()) == []
    assert (await kv.backup("full"))["pairs"] == 100


async def test_coordinator_stops_during_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that stops ends its backup and leaves no published half."""
    async with LocalCluster(1, shards=4, backup_dir=tmp_path) as cluster:
        async with await Wire.open(cluster.coordinator.address) as wire:
            monkeypatch.setattr(backup_job.BackupJob, "_slice", lambda self: None)
            wire.send([1, "backup", "cut"])
            await until(lambda: cluster.nodes["n1"]._jobs, "the job")
            await cluster.coordinator.close()
    assert not (tmp_path / "cut").exists()


async def test_restarted_node_and_restore(
    cluster: LocalCluster, kv: Any, impatient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore while shards take no writes is refused before anything is closed or changed: reads go on. When the node
    that came back without its data has learned it, the restore is made."""
    await kv.put_many(dict.fromkeys(keys_of_shards(cluster), "v"))
    await kv.backup("base")
    with monkeypatch.context() as patch:
        patch.setattr(Membership, "_can_learn", lambda *_: False)
        await kill_node(cluster, "n1")
        await restart_empty(cluster, "n1")
        await until(lambda: bad_shards(cluster.coordinator, "n1"), "the empty node")
        for mode in ("replace", "merge"):
            with pytest.raises(
                Unavailable, match="needs shards that take writes: n1 came back without.*; nothing was changed"
            ):
                await impatient.restore("base", mode)
        assert cluster.coordinator.backups.restoring is None
        assert len(await everything(kv)) == len(keys_of_shards(cluster))
    await until(lambda: not cluster.coordinator.status.degraded(), "the new copies")
    await kv.put("more", "1")
    await kv.restore("base", "replace")
    assert await everything(kv) == {key.encode(): b"v" for key in keys_of_shards(cluster)}


async def test_with_a_node_less(tmp_path: Path) -> None:
    """A backup and a restore are made without a node that is missing, if its shards go on without it; it learns what
    was restored when it is back."""
    async with LocalCluster(3, shards=8, backup_dir=tmp_path) as cluster, kvtcp.connect(cluster.url) as kv:
        pairs = {key.encode(): b"v" for key in keys_of_shards(cluster)}
        await kv.put_many(pairs)
        await kill_node(cluster, "n2")
        assert (await kv.backup("base"))["files"] == 2
        await kv.put_many({"more": "1", **dict.fromkeys(pairs, "w")})
        await kv.restore("base", "replace")
        await restart_empty(cluster, "n2")
        await until(lambda: not cluster.coordinator.status.degraded(), "three copies")
        await kill_node(cluster, "n1")
        await kill_node(cluster, "n3")
        assert await everything(kv) == pairs


async def test_replace_refused_at_its_first_removal(
    cluster: LocalCluster, kv: Any, impatient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `replace` that was refused before it removed anything opens the keys again."""
    await kv.put_many(dict.fromkeys(keys_of_shards(cluster), "v"))
    await kv.backup("base")

    async def refused(self: backups.Backups, *args: Any) -> int:
        raise Unavailable("no room", Code.OVERLOADED)

    monkeypatch.setattr(backups.Backups, "_write", refused)
    with pytest.raises(Unavailable, match="no room"):
        await impatient.restore("base", "replace")
    assert cluster.coordinator.backups.restoring is None
    assert len(await everything(kv)) == len(keys_of_shards(cluster))
