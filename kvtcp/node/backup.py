"""A node's part of a backup: the frozen shards become one sorted JSON lines file, in slices between batches.

I/O shell. The rows are exactly the state at the freeze, whatever is written meanwhile; each slice takes about
BACKUP_SLICE_MS of the loop, so that clients hardly notice. The final fsync runs in a thread. Whatever goes wrong is
reported to the coordinator, which fails the backup as a whole; a half-written file is never reported as finished.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from kvtcp.constants import BACKUP_SLICE_MS, FREEZE_ROWS
from kvtcp.node.replica import FreezeRequest
from kvtcp.runtime.pacer import Pacer
from kvtcp.storage.backup.archive import NodeFileWriter
from kvtcp.storage.files import OsDisk
from kvtcp.storage.shard.pages import merge_frozen

log = logging.getLogger("kvtcp.backup")

SHARE: Final = 0.5  # of the loop

Done = Callable[["BackupJob", dict[str, Any] | None, str | None], None]


class BackupJob:
    """One file of one backup."""

    def __init__(self, loop: asyncio.AbstractEventLoop, node: str, request: FreezeRequest, done: Done) -> None:
        self.name = request.name
        self._loop = loop
        self._node = node
        self._request = request
        self._done = done
        self._writer: NodeFileWriter | None = None
        self._rows = self._live_rows()
        self._finished = False
        self._pacer = Pacer(loop, self._slice, share=lambda: SHARE)
        self._finishing: asyncio.Future[dict[str, Any]] | None = None

    def start(self) -> None:
        """Begin with the first slice."""
        self._loop.call_soon(self._pacer.run)

    def _live_rows(self) -> Iterator[tuple[int, bytes, bytes, int, int | None]]:
        stamp_ms = self._request.stamp_ms
        for shard, key, value, rev, deadline_ms in merge_frozen(self._request.frozen):
            if deadline_ms is None:
                yield shard, key, value, rev, None
            elif deadline_ms > stamp_ms:  # an expired key is not part of the content
                yield shard, key, value, rev, deadline_ms - stamp_ms

    def _slice(self) -> int | None:
        if self._finished:
            return None
        try:
            if self._writer is None:
                directory = Path(self._request.directory)
                if not directory.is_dir():
                    self.abort(
                        f"{self._node} does not see {directory}: the backup was given up meanwhile, or coordinator "
                        "and nodes do not share the backup directory"
                    )
                    return None
                shards = [frozen.shard for frozen in self._request.frozen]
                self._writer = NodeFileWriter(OsDisk(), directory, self._node, shards)
            end = time.monotonic() + BACKUP_SLICE_MS / 1000
            while time.monotonic() < end:
                rows = list(islice(self._rows, FREEZE_ROWS // 4))
                if not rows:
                    self._finish()
                    return None
                self._writer.write_rows(rows)
        except OSError as error:
            self.abort(f"{self._node} cannot write its file: {error}")
            return None
        return 0

    def _finish(self) -> None:
        assert self._writer is not None
        self._finishing = self._loop.run_in_executor(None, self._writer.finish)
        self._finishing.add_done_callback(self._synced)

    def _synced(self, future: asyncio.Future[dict[str, Any]]) -> None:
        error = future.exception()
        if self._finished:
            return
        if error is not None:
            self._finishing = None  # nobody else touches the writer any more
            self.abort(f"{self._node} cannot finish its file: {error}")
            return
        self._end()
        self._done(self, future.result(), None)

    def _end(self) -> None:
        self._finished = True
        self._pacer.stop()
        for frozen in self._request.frozen:
            frozen.close()

    def abort(self, reason: str) -> None:
        """Give up: remove the unfinished file and report why."""
        if self._finished:
            return
        log.warning("event=backup-aborted node=%s backup=%s reason=%s", self._node, self.name, reason)
        self._end()
        if self._writer is not None and self._finishing is None:
            try:
                self._writer.abort()
            except OSError as error:
                log.warning("event=backup-leftover node=%s reason=%s", self._node, error)
        self._done(self, None, reason)
