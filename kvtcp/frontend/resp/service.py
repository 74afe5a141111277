"""RespService: the parts that all clients of the Redis protocol share.

Pure. They are the sequencer and the keyspace, the positions of SCANs, and the host, which describes the server. Time
and randomness come from the I/O shell.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from kvtcp.constants import SCAN_CURSOR_IDLE_MS, SCAN_CURSORS_MAX
from kvtcp.frontend.keyspace import Keyspace
from kvtcp.frontend.resp.client_state import ClientState
from kvtcp.frontend.resp.plan import CommandError
from kvtcp.replication.sequencing.sequencer import Sequencer


class Host(Protocol):
    """The server, as commands describe it to clients."""

    def facts(self) -> dict[str, dict[str, Any]]:
        """The sections of INFO, without the number of keys."""

    def status(self) -> dict[str, Any]:
        """The map of `status`."""

    def resp_clients(self) -> Iterable[ClientState]:
        """The states of the clients that are connected."""


class Position(NamedTuple):
    """The place of a scan between two of its pages."""

    key: bytes  # the first one of the next page
    used_ms: int
    before: int  # number of the position before it


class RespService:
    """One per coordinator. `random` gives numbers below its argument; `now_ms` is monotonic, `wall_us` since 1970."""

    def __init__(
        self, sequencer: Sequencer, keyspace: Keyspace, host: Host,
        now_ms: Callable[[], int], wall_us: Callable[[], int], random: Callable[[int], int],
    ) -> None:  # fmt: skip
        self.sequencer = sequencer
        self.keyspace = keyspace
        self.host = host
        self.now_ms = now_ms
        self.wall_us = wall_us
        self.random = random
        self._last_client = 0
        self._last_cursor = 1 + random(1 << 40)  # so that those of an earlier coordinator are not known
        self._cursors: OrderedDict[int, Position] = OrderedDict()  # in the order in which they were used

    def next_client(self) -> int:
        """Return a number for a client."""
        self._last_client += 1
        return self._last_client

    # --- positions of scans -------------------------------------------------------------------------

    def keep_cursor(self, key: bytes, before: int) -> int:
        """Return the number of a new position at this key. `before` is the number of the last one, 0 for none."""
        self._last_cursor += 1
        self._cursors[self._last_cursor] = Position(key, self.now_ms(), before)
        self._forget_cursors()
        return self._last_cursor

    def cursor(self, number: int) -> bytes:
        """Return the key at which the scan of this number continues. The position stays known, for a client that asks
        again. The one before it is forgotten: a long scan does not crowd out others. Raises CommandError."""
        self._forget_cursors()
        found = self._cursors.pop(number, None)
        if found is None:
            raise CommandError(
                f"ERR the cursor {number} is not known: it is from before a restart of the server, was not used for "
                f"{SCAN_CURSOR_IDLE_MS // 60_000} minutes, made room for {SCAN_CURSORS_MAX} newer ones, or is none; "
                "begin again with 0"
            )
        self._cursors[number] = found._replace(used_ms=self.now_ms())
        self._cursors.pop(found.before, None)
        return found.key

    def _forget_cursors(self) -> None:
        cursors = self._cursors
        oldest_ms = self.now_ms() - SCAN_CURSOR_IDLE_MS
        while cursors and (len(cursors) > SCAN_CURSORS_MAX or next(iter(cursors.values())).used_ms < oldest_ms):
            cursors.popitem(last=False)
