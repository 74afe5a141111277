"""A node's part of a backup: slices beside writes, disk errors, giving up at any moment."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvtcp.constants import FREEZE_ROWS
from kvtcp.node.backup import BackupJob
from kvtcp.node.replica import FreezeRequest
from kvtcp.protocol.operations import PUT
from kvtcp.storage.backup.file import read_file_pairs
from kvtcp.storage.files import OS_DISK, OsFile
from kvtcp.storage.shard.table import Table
from tests.processes.raw_client import BOTH_LOOPS, event_loop_policy, until

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS
ROWS = 8 * FREEZE_ROWS


class Job:
    """A job over two tables with its report."""

    def __init__(self, directory: Path) -> None:
        self.tables = [Table(0), Table(1)]
        for n in range(ROWS):
            self.put(n, b"old")
        self.reports: list[tuple[Any, str | None]] = []
        frozen = [table.freeze() for table in self.tables]
        request = FreezeRequest("b/1", str(directory), 1_000, frozen)
        self.frozen = frozen
        self.job = BackupJob(asyncio.get_running_loop(), "n1", request, self.done)
        self.path = directory / "node-n1.jsonl"

    def put(self, n: int, value: bytes, ttl_ms: int | None = None) -> None:
        table = self.tables[n % 2]
        table.apply([PUT, n % 2, table.seq + 1, 0, b"k%05d" % n, value, ttl_ms, False], 500)

    def done(self, job: BackupJob, report: dict[str, Any] | None, error: str | None) -> None:
        self.reports.append((report, error))

    async def ended(self) -> tuple[Any, str | None]:
        await until(lambda: self.reports, "the report of the job")
        assert all(frozen._index is None for frozen in self.frozen), "the frozen shards are let go"
        return self.reports[0]


async def test_state_at_the_freeze(tmp_path: Path) -> None:
    """The file has exactly the rows of the freeze, whatever is written between the slices."""
    job = Job(tmp_path)
    job.job.start()
    n = 0
    while not job.reports:
        job.put(n % (2 * ROWS), b"new")
        n += 7
        await asyncio.sleep(0)
    report, error = await job.ended()
    assert error is None and report["pairs"] == ROWS
    pairs = list(read_file_pairs(OS_DISK, job.path))
    assert [pair.key for pair in pairs] == [b"k%05d" % n for n in range(ROWS)]
    assert {pair.value for pair in pairs} == {b"old"}


async def test_expired_keys_are_left_out(tmp_path: Path) -> None:
    """A key past its deadline at the stamp of the freeze is not written; others with the life they have left."""
    job = Job(tmp_path)
    for frozen in job.frozen:
        frozen.close()
    job.put(1, b"gone", 500)
    job.put(2, b"stays", 501)
    job.job._request.frozen = job.frozen = [table.freeze() for table in job.tables]
    job.job.start()
    await job.ended()
    lives = {pair.key: pair.ttl_ms for pair in read_file_pairs(OS_DISK, job.path)}
    assert b"k00001" not in lives and lives[b"k00002"] == 1 and lives[b"k00003"] is None


async def test_directory_that_is_not_there(tmp_path: Path) -> None:
    """A job does not make the directory: one that was given up meanwhile would come back."""
    job = Job(tmp_path / "gone")
    job.job.start()
    report, error = await job.ended()
    assert report is None and error is not None and "does not see" in error
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("call", ["write", "sync"])
async def test_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A failing write or sync ends the job with the error's text, once, and never with a report."""

    def fail(self: OsFile, *args: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(OsFile, call, fail)
    job = Job(tmp_path)
    job.job.start()
    report, error = await job.ended()
    assert report is None and error is not None and "No space left" in error
    await asyncio.sleep(0)
    assert len(job.reports) == 1


async def test_abort_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up before, between or after its slices, a job reports once and stops; its file is removed if it can be."""
    monkeypatch.setattr("kvtcp.node.backup.BACKUP_SLICE_MS", 0.01)
    for turns in (0, 1, 2, 5):
        job = Job(tmp_path)
        job.job.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        finishing = job.job._finishing is not None
        job.job.abort("for the test")
        job.job.abort("again")
        report, error = await job.ended()
        assert (report, error) == (None, "for the test")
        assert finishing or not job.path.exists()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(job.reports) == 1
