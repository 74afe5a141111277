"""Backups and restores of a whole cluster, as the coordinator runs them.

I/O shell over storage/backup (files) and the sequencer (freeze items, sequenced writes).

A backup is one point in time: the freeze items of all nodes are queued in one synchronous step, so the cut is before or
after each write as a whole, over all shards. Every shard is saved by one replica, spread evenly. The manifest is
written only when every shard has committed what its cut contains; a lost node fails the attempt, and the backup is
begun once more with a new cut.

A restore writes through the sequencer like any client, bounded in flight. `replace` first saves what is there, then
keeps everybody else out of the prefix (RESTORING) until the content was read back and compared. If it fails after the
clearing began the prefix stays closed, since what is there is neither the old nor the new content, until a restore
of it completes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from kvtcp._version import __version__
from kvtcp.constants import CLIENT_TIMEOUT_MS, MULTI_KEYS_MAX, PAGE_ITEMS_MAX, PROGRESS_MS, TICK_MS
from kvtcp.errors import Code, DataError, KvtcpError, OutcomeUnknown, Unavailable, error_from_wire, show_bytes
from kvtcp.frontend.keyspace import Keyspace
from kvtcp.frontend.native.handler import Session
from kvtcp.jsonl import Pair
from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.messages import prefix_bounds
from kvtcp.protocol.operations import CLEAR, FREEZE, PUT
from kvtcp.replication.sequencing.multi_read import count_read, page_read
from kvtcp.replication.sequencing.requests import Gather
from kvtcp.replication.sequencing.sequencer import Sequencer
from kvtcp.runtime.process import StartTask
from kvtcp.storage.backup import archive as files
from kvtcp.storage.backup.manifest import BackupManifest, FileReport, ShardCut
from kvtcp.storage.files import OsDisk

log = logging.getLogger("kvtcp.backup")

T = TypeVar("T")
RESTORE_CHUNK: Final = 500  # pairs written at once by a restore
CLEAR_KEYS: Final = 1_000  # keys one clear entry removes
ATTEMPTS: Final = 2
CUT_WAIT_S: Final = 10.0  # for everything queued before the cut to be committed
FILE_WAIT_S: Final = 600.0  # for the files of the nodes
LOAD_WAIT_S: Final = 10 * CLIENT_TIMEOUT_MS / 1000  # for a chunk of a restore to be written
PROGRESS_S: Final = PROGRESS_MS / 1000

Progress = Callable[[dict[str, Any]], None]


class FutureSink:
    """A sink that completes a future: for the few requests that the coordinator makes itself."""

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.future = future

    def reply(self, token: Any, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        if not self.future.done():
            self.future.set_exception(error_from_wire(code, message, details))


class Pulse:
    """What a long request tells its client: each step at once, and the last one again while no new one comes.

    A client gives up after some time of silence, and some phases take long in one step: reading the sums of large
    files, a node writing its file. So silence means that the coordinator is gone, never that it is busy. Each map has
    `phase`, and what of it is done where that is known. It ends with the `with` block.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Progress) -> None:
        self._loop = loop
        self._send = send
        self._timer: asyncio.TimerHandle | None = None  # of the next repetition, None before the first step

    def __enter__(self) -> Progress:
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tell(self, progress: dict[str, Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._send(progress)
        self._timer = self._loop.call_later(PROGRESS_S, self._tell, progress)


class Backups:
    """One per coordinator; one backup or restore at a time.

    `begin` begins a turn. `remember` stores which prefix is in pieces, None for none, for the next coordinator; it
    raises OSError. `start_task` starts a task that must not fail.
    """

    def __init__(
        self, backup_dir: Path, sequencer: Sequencer, keyspace: Keyspace, *, begin: Callable[[], None],
        remember: Callable[[bytes | None], Awaitable[None]], start_task: StartTask,
    ) -> None:  # fmt: skip
        self.backup_dir = backup_dir.absolute()
        self.sequencer = sequencer
        self.keyspace = keyspace
        self._loop = asyncio.get_running_loop()
        self._begin = begin
        self._remember = remember
        self._start_task = start_task
        self.busy = ""  # what is running, for people; empty = nothing
        self.restoring: bytes | None = None  # prefix whose content is in pieces or being replaced
        self._cleared = 0  # entries by which the running `replace` removed keys
        self._files: dict[str, asyncio.Future[Any]] = {}  # node -> its file of the running backup
        self._name = ""  # of the running backup as the nodes know it
        self._task: asyncio.Task[None] | None = None  # of what is running, or ran last

    def resume(self, restoring: bytes | None) -> None:
        """The shards were taken over: what an earlier coordinator left in pieces stays closed."""
        if restoring is not None:
            log.warning("event=restore-unfinished prefix=%s", show_bytes(restoring))
            self.restoring = self.keyspace.restoring = restoring

    # --- requests -----------------------------------------------------------------------------------

    def start_backup(self, session: Session, ident: int, name: str | None) -> None:
        """Answer `session` with the backup's summary, or why there is none."""
        name = name or files.backup_name_from_time(datetime.now(UTC))
        self._start(f"backup {name}", session, ident, lambda progress: self._backup(name, progress))

    def start_restore(
        self, session: Session, ident: int, name: str, mode: str, prefix: bytes, dry_run: bool
    ) -> None:
        """Answer `session` with what the restore did (or would do)."""
        self._start(
            f"restore {name}", session, ident, lambda progress: self._restore(name, mode, prefix, dry_run, progress)
        )

    def _start(self, what: str, session: Session, ident: int, work: Callable[[Progress], Any]) -> None:
        if self.busy:
            session.fail(ident, Code.OVERLOADED, f"{self.busy} is running; one at a time", {})
            return
        self.busy = what
        session.long_began()
        self._task = self._start_task(self._run(what, session, ident, work), what)

    async def _run(self, what: str, session: Session, ident: int, work: Callable[[Progress], Any]) -> None:
        log.info("event=started what=%s", what)
        error: KvtcpError
        try:
            with Pulse(self._loop, lambda progress: session.progress(ident, progress)) as progress:
                summary = await work(progress)
        except KvtcpError as failed:
            error = failed
        except OSError as failed:
            error = Unavailable(f"{what} failed, nothing was published: {failed}", Code.NO_SPACE)
        except asyncio.CancelledError:
            session.long_ends()
            session.fail(ident, Code.UNKNOWN, f"{what} ended: the coordinator stops", {})
            raise
        else:
            log.info("event=finished what=%s", what)
            session.long_ends()
            session.reply(ident, summary)
            return
        finally:
            self.busy = ""
            self._begin()
        log.warning("event=failed what=%s reason=%s", what, error)
        session.long_ends()
        session.fail(ident, error.code, error.message, error.details)

    async def close(self) -> None:
        """End what is running."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- backup -------------------------------------------------------------------------------------

    def file_done(self, node: str, name: bytes, report: Any, error: bytes | None) -> None:
        """A node finished its file, or says why it could not."""
        future = self._files.get(node)
        if future is None or future.done() or name.decode() != self._name:
            return
        if error is not None:
            future.set_exception(Unavailable(error.decode("utf-8", "replace"), Code.NOT_ENOUGH_REPLICAS))
        else:
            future.set_result(report)

    def node_lost(self, node: str) -> None:
        """The link to `node` is gone: the attempt that waits for its file has failed."""
        future = self._files.get(node)
        if future is not None and not future.done():
            future.set_exception(Unavailable(f"{node} was lost", Code.NOT_ENOUGH_REPLICAS))

    async def _backup(self, name: str, progress: Progress) -> dict[str, Any]:
        disk = OsDisk()
        files.check_backup_name(name)
        progress({"phase": "save"})
        for attempt in range(1, ATTEMPTS + 1):
            tmp_dir = await self._in_thread(files.begin_backup, disk, self.backup_dir, name, attempt)
            try:
                manifest = await self._attempt(f"{name}/{attempt}", tmp_dir, progress)
                await self._in_thread(files.write_manifest, disk, tmp_dir, manifest)
                await self._in_thread(files.publish, disk, tmp_dir, self.backup_dir / name)
            except (Unavailable, OutcomeUnknown, TimeoutError) as error:
                await self._in_thread(files.discard, disk, tmp_dir)
                if attempt == ATTEMPTS:
                    text = str(error) or "the nodes did not finish in time"
                    raise Unavailable(
                        f"backup {name} failed {ATTEMPTS} times, last: {text}; nothing was published",
                        Code.NOT_ENOUGH_REPLICAS,
                    ) from error
                progress({"phase": "save", "begun_again": str(error)})
            except BaseException:
                await self._in_thread(files.discard, disk, tmp_dir)
                raise
            else:
                return {
                    "name": name,
                    "directory": str(self.backup_dir / name),
                    "pairs": manifest.pairs,
                    "bytes": manifest.bytes,
                    "files": len(manifest.files),
                    "created": manifest.created,
                }
        raise AssertionError("the last attempt returns or raises")

    def _spread(self) -> dict[str, list[int]]:
        """node -> shards it saves: one connected replica a shard, as evenly as membership allows."""
        chosen: dict[str, list[int]] = {}
        for shard in self.sequencer.shards:
            members = [link for link in shard.good if link.connected]
            if not members or not shard.serving:
                raise Unavailable(f"no replica of shard {shard.number} can be read", Code.NOT_ENOUGH_REPLICAS)
            best = min(members, key=lambda link: len(chosen.get(link.node, ())))
            chosen.setdefault(best.node, []).append(shard.number)
        return chosen

    async def _attempt(self, attempt_name: str, tmp_dir: Path, progress: Progress) -> BackupManifest:
        sequencer = self.sequencer
        chosen = self._spread()
        self._name = attempt_name
        self._files = {node: self._loop.create_future() for node in chosen}
        cuts = {node: self._loop.create_future() for node in chosen}
        created = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        # One synchronous step: between two of these items no write can be sequenced.
        self._begin()
        for node, shards in chosen.items():
            item = (FREEZE, shards, attempt_name, str(tmp_dir))
            queued = sequencer.control(node, item, shards, FutureSink(cuts[node]), None)
            assert queued, "only connected nodes were chosen"
        try:
            async with asyncio.timeout(CUT_WAIT_S):
                rows = [row for cut in await asyncio.gather(*cuts.values()) for row in cut]
            async with asyncio.timeout(FILE_WAIT_S):
                reports = []
                progress({"phase": "save", "files_done": 0, "files": len(chosen)})
                for future in asyncio.as_completed(self._files.values()):
                    reports.append(FileReport.from_fields(await future, "report of a node"))
                    progress({"phase": "save", "files_done": len(reports), "files": len(chosen)})
        finally:
            for future in (*cuts.values(), *self._files.values()):
                future.cancel()
                if future.done() and not future.cancelled():
                    future.exception()  # looked at: another one's was raised
            self._files = {}
        return BackupManifest(
            cluster=sequencer.map.cluster,
            created=created,
            kvtcp_version=__version__,
            shards=sequencer.map.shards,
            cut=tuple(ShardCut(*row) for row in sorted(rows)),
            files=tuple(sorted(reports, key=lambda report: report.name)),
        )

    # --- restore ------------------------------------------------------------------------------------

    async def _restore(
        self, name: str, mode: str, prefix: bytes, dry_run: bool, progress: Progress
    ) -> dict[str, Any]:
        directory = self.backup_dir / files.check_backup_name(name)
        progress({"phase": "verify"})
        await self._in_thread(files.verify, directory)
        wanted = await self._in_thread(lambda: sum(1 for _ in files.read_pairs(directory, prefix)))
        present = await self._count(prefix)
        summary: dict[str, Any] = {"name": name, "mode": mode, "prefix": prefix, "pairs": wanted, "present": present}
        if dry_run:
            return {**summary, "dry_run": True}
        self._check_members()
        if mode == "merge":
            if self.restoring is not None:
                raise Unavailable(
                    "an unfinished restore (replace) keeps keys closed; repeat that one first", Code.RESTORING
                )
            try:
                await self._load(directory, prefix, wanted, progress)
            except (KvtcpError, OSError) as error:
                raise OutcomeUnknown(f"restore {name} stopped half-way, repeat it: {error}") from error
            return summary
        if self.restoring is not None and self.restoring != prefix:
            raise Unavailable(
                "an unfinished restore of another prefix keeps keys closed; repeat that one first", Code.RESTORING
            )
        again = self.restoring is not None  # what is there then is a torso, not worth saving
        self._close_prefix(prefix)  # before the present content is saved: what is written after the cut would be lost
        if not again:
            try:
                summary["saved_as"] = await self._save(progress)
                await self._remember(prefix)
            except BaseException:
                self._open_prefix()  # nothing was changed yet
                raise
        self._cleared = 0
        try:
            await self._clear(prefix, progress)
            await self._load(directory, prefix, wanted, progress)
            await self._compare(directory, prefix, wanted, progress)
            await self._remember(None)
        except (KvtcpError, OSError) as error:
            if not again and not self._cleared and isinstance(error, Unavailable):
                await self._remember(None)
                self._open_prefix()  # the first removal was refused: nothing was changed
                raise
            shown = f"the keys that begin with {show_bytes(prefix)} stay" if prefix else "all keys stay"
            raise OutcomeUnknown(
                f"restore {name} stopped half-way; {shown} closed until a restore completes: {error}"
            ) from error
        self._open_prefix()
        return summary

    def _check_members(self) -> None:
        """A restore writes to all shards: it is not begun while one of them takes no writes."""
        missing: dict[str, None] = {}  # in order, each once
        for shard in self.sequencer.shards:
            if not shard.serving:
                missing[f"shard {shard.number} is down ({shard.reason})"] = None
            for link, why in shard.bad.items():
                missing[f"{link.node} {why}"] = None
            for link in shard.good:
                if not link.connected:
                    missing[f"{link.node} is missing ({link.reason})"] = None
        if missing:
            names = ", ".join(missing)
            text = f"a restore needs shards that take writes: {names}; nothing was changed"
            raise Unavailable(text, Code.NOT_ENOUGH_REPLICAS)

    async def _save(self, progress: Progress) -> str:
        """Back up what is there under a name that is free; returns it."""
        first = saved = "before-restore-" + files.backup_name_from_time(datetime.now(UTC))
        number = 1
        while await self._in_thread((self.backup_dir / saved).exists):
            number += 1
            saved = f"{first}-{number}"
        await self._backup(saved, progress)
        return saved

    def _close_prefix(self, prefix: bytes) -> None:
        self.restoring = self.keyspace.restoring = prefix
        self.sequencer.refuse_waiting(
            Code.RESTORING, "the key is being restored; nothing was executed", lambda key: key.startswith(prefix)
        )
        self.sequencer.reads.refuse_waiting(
            Code.RESTORING, "keys are being restored; nothing was executed, repeat the request"
        )

    def _open_prefix(self) -> None:
        self.restoring = self.keyspace.restoring = None

    async def _count(self, prefix: bytes) -> int:
        future: asyncio.Future[int] = self._loop.create_future()
        self._begin()
        shards = self.keyspace.all_shards
        self.sequencer.multi_read(count_read(shards, *prefix_bounds(prefix), FutureSink(future), None))
        return await future

    async def _clear(self, prefix: bytes, progress: Progress) -> None:
        lower, upper = prefix_bounds(prefix)
        for number in range(self.keyspace.shards):
            progress({"phase": "clear", "shards_done": number, "shards": self.keyspace.shards})
            while await self._write(CLEAR, number, lower, (upper, CLEAR_KEYS)) > 0:
                self._cleared += 1

    async def _load(self, directory: Path, prefix: bytes, wanted: int, progress: Progress) -> None:
        pairs: Iterator[Pair] = files.read_pairs(directory, prefix)
        done = 0
        progress({"phase": "load", "pairs_done": 0, "pairs": wanted})
        while chunk := await self._in_thread(lambda: list(islice(pairs, min(RESTORE_CHUNK, MULTI_KEYS_MAX)))):
            await self._put_all(chunk)
            done += len(chunk)
            progress({"phase": "load", "pairs_done": done, "pairs": wanted})

    async def _put_all(self, chunk: list[Pair]) -> None:
        left = chunk
        deadline = self._loop.time() + LOAD_WAIT_S
        while left:
            future: asyncio.Future[list[Any]] = self._loop.create_future()
            gather = Gather(FutureSink(future), None, len(left))
            self._begin()
            for index, pair in enumerate(left):
                args = (pair.value,) if pair.ttl_ms is None else (pair.value, pair.ttl_ms)
                size = len(pair.key) + len(pair.value)
                shard = shard_of(pair.key, self.keyspace.shards)
                self.sequencer.shards[shard].write(PUT, pair.key, args, size, gather, index)
            results = await future
            failed = [result for result in results if type(result) is list]
            unknown = [result for result in failed if result[0] == Code.UNKNOWN]
            if unknown and self.restoring is None:
                # with `merge` others go on writing: a put that did happen must not be repeated over theirs
                raise error_from_wire(*unknown[0])
            if failed and self._loop.time() > deadline:
                raise error_from_wire(*failed[0])
            left = [pair for pair, result in zip(left, results, strict=True) if type(result) is list]
            if failed:  # a refusal may come at once: others get their turn before the next try
                await asyncio.sleep(TICK_MS / 1000)

    async def _compare(self, directory: Path, prefix: bytes, wanted: int, progress: Progress) -> None:
        """Read back what was restored. DataError if it is not the backup's content; only expired keys may lack."""
        pairs = files.read_pairs(directory, prefix)
        done = 0
        progress({"phase": "compare", "pairs_done": 0, "pairs": wanted})

        def differs(rows: list[Any], is_last: bool) -> bytes | None:
            """The first key that differs up to the last of `rows`, or in all the rest."""
            for key, value, _, ttl_ms in rows:
                while True:
                    pair = next(pairs, None)
                    if pair is None or pair.key > key:
                        found: bytes = key
                        return found
                    if pair.key == key:
                        break
                    if pair.ttl_ms is None:
                        return pair.key
                if pair.value != value or (pair.ttl_ms is None) != (ttl_ms is None):
                    return pair.key
            if is_last:
                return next((pair.key for pair in pairs if pair.ttl_ms is None), None)
            return None

        async for rows, is_last in self._pages(prefix):
            key = await self._in_thread(differs, rows, is_last)
            if key is not None:
                raise DataError(f"read back after the restore, {show_bytes(key)} is not what the backup has")
            done += len(rows)
            progress({"phase": "compare", "pairs_done": done, "pairs": wanted})

    async def _pages(self, prefix: bytes) -> AsyncIterator[tuple[list[Any], bool]]:
        """The rows with a prefix, page by page; with the last page True."""
        lower, upper = prefix_bounds(prefix)
        while True:
            future: asyncio.Future[Any] = self._loop.create_future()
            self._begin()
            sink = FutureSink(future)
            shards = self.keyspace.all_shards
            self.sequencer.multi_read(page_read(shards, lower, upper, PAGE_ITEMS_MAX, False, False, sink, None))
            rows, cursor = await future
            yield rows, cursor is None
            if cursor is None:
                return
            lower = rows[-1][0] + b"\0"

    async def _write(self, op: int, number: int, key: bytes, args: tuple[Any, ...]) -> int:
        future: asyncio.Future[int] = self._loop.create_future()
        self._begin()
        self.sequencer.shards[number].write(op, key, args, len(key), FutureSink(future), None)
        return await future

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await self._loop.run_in_executor(None, lambda: work(*args))
