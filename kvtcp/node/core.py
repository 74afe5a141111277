"""The core of a node: every decision about its links, its frames and its transfers, and the order of these decisions.

Pure: no loop, clock, file or log. First frames of callers, frames of the link, durable ordinals, ends of transfers and
lost connections come in as calls. What is to happen goes out as calls of three things that the caller hands over: the
*connection* of a link, the `Persistence` of the node (what it must not forget, and when that is durable) and its
`NodeProcess`: timers, transfers, the log, the end of the process. The node's server performs them with sockets, threads
and a disk; a simulation performs them with its own. On top of the `Replicas` nothing is decided but here.

- The newest accepted link is the only one. Older ones are closed with their unread input, and everything that was begun
  on them ends: what was learned, pulled, donated, backed up.
- A link takes frames when its REPORT is sent, and that is sent when the promise, new copies and everything applied are
  durable. SHIPPED and LEARNED are sent when everything that was applied before is durable.
- Frames are worked off in their order, batches and others alike. The results of batches that follow each other leave in
  one frame, at once; they are acknowledged as durable when they are: in the same frame if they are already, otherwise
  in one that has nothing else to tell. While the coordinator does not read, nothing more is applied.
- A drop is made durable before anything that was applied after it is logged. The manifest that names a pulled copy is
  queued before anything that was applied to it is logged.
- An exception while applying ends the node without another acknowledgement: a replica that continued after it might
  differ from the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from kvtcp.constants import LEARN_APPLY_ITEMS, LEAVE_MS, RESULTS_BYTES_MAX, YOUNG_CELLS_MAX
from kvtcp.errors import ProtocolError
from kvtcp.node import access
from kvtcp.node.access import Identity
from kvtcp.node.learning import Donation, Learning
from kvtcp.node.replica import FreezeRequest, Refused, Replicas
from kvtcp.protocol.link import (
    ASK,
    BACKUP,
    BATCH,
    ENTRIES,
    FETCH,
    GIVE,
    HELLO,
    LEARN_FAILED,
    LEARNED,
    LEAVE,
    PULL,
    REFUSED,
    REPORT,
    RESULTS,
    SHIP,
    SHIPPED,
    SPACE,
    STOP,
    TOLD,
)
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Logged, Table

PAUSE_MS: Final = 2  # between two slices of work that takes long: for batches
_FRAME_TYPES: Final = {FETCH: (int, int, int), SHIP: (int, int, list), PULL: (int, int, bytes, int, bytes)}


class CallerConnection(Protocol):
    """A connection that was made to the node."""

    peer: str
    write_paused: bool  # the caller does not read: nothing more is applied for it

    def send(self, message: Any) -> None:
        """Queue a frame."""

    def flush(self) -> None:
        """Send what was queued."""

    def close(self) -> None:
        """Close when everything sent has left."""

    def abort(self) -> None:
        """Close at once; nothing more is received."""


class CoordinatorLink:
    """A connection as a link to a coordinator: nothing but a stranger's until its HELLO was accepted."""

    __slots__ = ("accepted", "connection", "durable", "inbox", "running")

    def __init__(self, connection: CallerConnection) -> None:
        self.connection = connection
        self.accepted = False  # its report was sent, and no newer link was accepted: it takes frames
        self.inbox: deque[list[Any]] = deque()  # frames not yet worked off
        self.running = False  # the batch at the head of the inbox is half done
        self.durable = 0  # ordinal up to which everything is durable; <= replica.applied


class Persistence(Protocol):
    """The disk of a node as its core sees it: one queue, worked off in order, that says when something is durable."""

    def append(self, entries: list[Logged], link: CoordinatorLink, ordinal: int) -> bool:
        """Log entries, applied up to `ordinal` of a link. True if everything is durable already; otherwise
        `NodeCore.durable` will be called."""

    def flush(self) -> None:
        """The turn ends: begin to write."""

    def when_durable(self, done: Callable[[], None]) -> None:
        """Call `done` when everything queued so far is durable."""

    def remember(self, replica: Replicas, done: Callable[[], None]) -> None:
        """Make the promise, the map and the names of all copies durable as they are now, after everything queued so
        far; then call `done`."""

    def change_copies(self, copies: Iterable[Copy], pulled: Any = None) -> None:
        """These are the copies from now on: others were dropped, or one was replaced by a `pulled` one."""


class InMemory:
    """The Persistence of a node that keeps nothing: everything counts as durable at once."""

    def append(self, entries: list[Logged], link: CoordinatorLink, ordinal: int) -> bool:
        """Nothing is written."""
        return True

    def flush(self) -> None:
        """Nothing waits."""

    def when_durable(self, done: Callable[[], None]) -> None:
        """Nothing is ever more durable than now."""
        done()

    def remember(self, replica: Replicas, done: Callable[[], None]) -> None:
        """A restart remembers nothing."""
        done()

    def change_copies(self, copies: Iterable[Copy], pulled: Any = None) -> None:
        """A restart finds none."""


class NodeProcess(Protocol):
    """The process around a core: timers, transfers, the log, the end."""

    def event(self, level: str, word: str, **fields: Any) -> None:
        """A line for the log: "debug", "info" or "warning"."""

    def later(self, delay_ms: int, callback: Callable[[], None], /) -> None:
        """Call back, unless the node is ending."""

    def failed(self, error: BaseException) -> None:
        """The node has to end, and acknowledges nothing more."""

    def stop(self) -> None:
        """The node is to stop, in order."""

    def founded(self, cluster: str, secret: str) -> None:
        """The node belongs to this cluster from now on."""

    def linked(self) -> None:
        """There is a coordinator."""

    def unlinked(self) -> None:
        """There is none any more."""

    def end_transfers(self, reason: str) -> None:
        """End all pulls, donations and backups."""

    def start_pull(self, learning: Learning, host: str, port: int, token: bytes) -> None:
        """Fetch a copy from another node: `loaded` and `published` are called with it, or `pull_failed`."""

    def end_pull(self, shard: int, reason: str) -> None:
        """End the pull of a shard, if there is one."""

    def donations_changed(self) -> None:
        """Donations of the replica began to wait, or ended."""

    def start_backup(self, request: FreezeRequest) -> None:
        """Write the file of a backup: `backup_ended` is called."""

    def collect_young(self) -> None:
        """Many entries were made: let the collector look at young objects, before there are too many."""


class NodeCore:
    """One node. `persistence` may be replaced before the first call."""

    def __init__(self, replica: Replicas, process: NodeProcess, identity: Identity) -> None:
        self.replica = replica
        self.persistence: Persistence = InMemory()
        self.identity = identity
        self.link: CoordinatorLink | None = None  # the newest accepted one
        self.link_number = 0  # of it; only grows in an epoch
        self.results_bytes_max = RESULTS_BYTES_MAX  # values in one frame of results, before the next one begins
        self._process = process
        self._young_cells = 0  # made since the last collection, at most
        self._is_catching_up = False  # the next slice of a buffer is due
        self._is_leaving = False  # LEAVE was sent: this node is about to stop

    # --- first frames -------------------------------------------------------------------------------

    def hello(self, link: CoordinatorLink, fields: Any) -> None:
        """HELLO: accept or refuse a link. Raises ProtocolError if it is none."""
        access.check_fields(HELLO, fields)
        epoch, number = fields[b"epoch"], fields[b"link"]
        try:
            refused = access.check(fields, self.identity) or self._older_link(epoch, number)
            if refused is not None:
                raise refused
            report = self.replica.hello(fields)
        except Refused as refused:
            # epoch 0: a coordinator that only asks who is here
            self._refuse(link.connection, "hello-refused", refused, "debug" if epoch == 0 else "warning")
            return
        if self.identity.secret is None:  # only now: a coordinator that is refused, or just asks, founds no cluster
            cluster, secret = fields[b"cluster"].decode(), fields[b"secret"].decode()
            self.identity.cluster, self.identity.secret = cluster, secret
            self._process.founded(cluster, secret)
        self._replace_link(link, number)
        self._process.end_transfers("the link it was asked for on is gone")
        self._process.linked()
        self._process.event("info", "linked", peer=link.connection.peer, epoch=epoch, link=number)
        self._report_when_durable(link, report)

    def _older_link(self, epoch: int, number: int) -> Refused | None:
        """Links of one coordinator may arrive in another order than it made them."""
        replica = self.replica
        if epoch == replica.promised and number <= self.link_number and replica.coordinator:
            return Refused("LINK", f"link {number} is older than link {self.link_number}")
        return None

    def _replace_link(self, link: CoordinatorLink, number: int) -> None:
        older, self.link = self.link, link
        self.link_number = number
        if older is not None:
            older.inbox.clear()
            older.accepted = False
            older.connection.abort()

    def _report_when_durable(self, link: CoordinatorLink, report: dict[str, Any]) -> None:
        self.persistence.remember(self.replica, partial(self._report, link, report))

    def _report(self, link: CoordinatorLink, report: dict[str, Any]) -> None:
        """Everything that the report says is durable: send it, and take frames from now on."""
        if link is self.link:
            link.accepted = True
            self.send((REPORT, report))

    def ask(self, connection: CallerConnection, fields: Any) -> None:
        """ASK: tell a caller that rebuilds a lost cluster map what is here, as a restart would find it. Changes
        nothing. Raises ProtocolError if it is none."""
        access.check_fields(ASK, fields)
        replica = self.replica
        refused = access.check(fields, self.identity)
        if refused is None and fields[b"node"] not in (b"", replica.node.encode()):
            refused = Refused("NODE", f"this is node {replica.node}")
        if refused is not None:
            self._refuse(connection, "ask-refused", refused, "debug")
            return
        told = replica.report() | {"map": replica.map or None, "linked": self.link is not None}

        def tell() -> None:
            connection.send((TOLD, told))
            connection.close()

        self.persistence.when_durable(tell)

    def give(self, connection: CallerConnection, fields: Any) -> tuple[Donation, list[Logged]] | None:
        """GIVE: a donation that another node comes for, and the entries to give along; it is no longer the replica's.
        None if the caller was refused. Raises ProtocolError if it is none."""
        access.check_fields(GIVE, fields)
        refused = access.check(fields, self.identity)
        if refused is None:
            found = self.replica.take_donation(fields[b"token"]) if access.names_copy(fields) else None
            if found is not None:
                self._process.donations_changed()
                return found
            refused = Refused("TOKEN", "nothing is donated under this token, or not any more")
        self._refuse(connection, "give-refused", refused, "warning")
        return None

    def _refuse(self, connection: CallerConnection, event: str, refused: Refused, level: str) -> None:
        self._process.event(level, event, peer=connection.peer, code=refused.code, reason=refused)
        connection.send((REFUSED, refused.code, str(refused), self.replica.promised, self.replica.map_version))
        connection.close()

    # --- the link -----------------------------------------------------------------------------------

    def received(self, link: CoordinatorLink, frames: Sequence[Any]) -> None:
        """Frames of one read. Raises ProtocolError for what no coordinator sends to a node that reported."""
        if not link.accepted:
            raise ProtocolError("the first frame of a link is HELLO with the cluster's secret")
        inbox = link.inbox
        for frame in frames:
            if type(frame) is not list or not frame or type(frame[0]) is not int:
                raise ProtocolError("a frame of a link is an array [kind, ...]")
            if frame[0] == BATCH and len(frame) == 4:
                inbox.append(frame)
            elif frame[0] == STOP:
                self._process.event("info", "stop", reason="asked by the coordinator")
                self._process.stop()
            elif _FRAME_TYPES.get(frame[0]) == tuple(map(type, frame)):
                inbox.append(frame)
            else:
                raise ProtocolError(f"a coordinator sends no such frame of kind {frame[0]} to a node that has reported")
        if inbox:
            self.run(link)

    def run(self, link: CoordinatorLink) -> None:
        """Work off the inbox of a link as far as the coordinator reads the results; whatever goes wrong there ends the
        node."""
        try:
            self._run(link)
        except Exception as error:
            link.connection.abort()
            self._process.failed(error)

    def _run(self, link: CoordinatorLink) -> None:
        replica, inbox, connection = self.replica, link.inbox, link.connection
        bytes_max = self.results_bytes_max
        results: list[Any] = []
        heartbeat = False  # a batch without items wants an answer of its own
        while inbox and not connection.write_paused:
            if inbox[0][0] != BATCH:  # the results of what was applied before it are sent
                self._frame(link, inbox.popleft())
                continue
            if not link.running:
                replica.begin(*inbox[0][1:])
                link.running = True
            finished = replica.run(results, bytes_max)
            if finished:
                link.running = False
                heartbeat = not inbox.popleft()[3] or heartbeat
            is_last = not inbox or inbox[0][0] != BATCH
            if not finished or is_last or replica.results_bytes > bytes_max:
                if self._log_applied(link) or results or heartbeat:
                    self._send_results(link, results)
                results = []
                heartbeat = False
        self.persistence.flush()
        while replica.freezes:
            self._process.start_backup(replica.freezes.popleft())
        if replica.news:
            self._tell_news()

    def _send_results(self, link: CoordinatorLink, results: list[Any]) -> None:
        """Send RESULTS: the ordinal that is applied, and the one that is durable."""
        replica, connection = self.replica, link.connection
        connection.send((RESULTS, replica.applied, link.durable, results, replica.take_flags()))
        connection.flush()

    def _log_applied(self, link: CoordinatorLink) -> bool:
        """Log what was applied; true if all of it is durable already."""
        replica = self.replica
        if replica.news:
            dropped = replica.take_dropped()
            if dropped:
                self._process.event("info", "dropped", shards=dropped)
                self.persistence.change_copies(replica.copies.values())
        entries = replica.take_logged()
        self._young_cells += len(entries)
        if self._young_cells > YOUNG_CELLS_MAX:
            self._young_cells = 0
            self._process.collect_young()
        if self.persistence.append(entries, link, replica.applied):
            link.durable = replica.applied
            return True
        return False

    def durable(self, link: CoordinatorLink, ordinal: int) -> None:
        """Everything up to this ordinal of a link is durable."""
        if ordinal == link.durable:
            return  # entries that were shipped, or those of half a batch
        link.durable = ordinal
        if link is self.link and link.accepted:
            self._send_results(link, [])

    def closed(self, link: CoordinatorLink, reason: str) -> None:
        """The connection of a link is gone, or of a caller that never was one."""
        link.inbox.clear()
        if link is not self.link:
            return
        self._process.event("info", "link-closed", reason=reason)
        self.link = None
        self.replica.link_lost()
        self._process.end_transfers("the link closed")
        self._process.unlinked()
        if self._is_leaving:
            self._process.stop()

    def send(self, frame: Any) -> None:
        """To the coordinator, if there is one that takes frames."""
        link = self.link
        if link is not None and link.accepted:
            link.connection.send(frame)
            link.connection.flush()

    def _send_when_durable(self, link: CoordinatorLink, frame: Any) -> None:
        """Send a frame when everything applied so far is durable, if the link is still the same."""
        self.persistence.when_durable(lambda: self.send(frame) if link is self.link else None)

    # --- other frames -------------------------------------------------------------------------------

    def _frame(self, link: CoordinatorLink, frame: list[Any]) -> None:
        """A frame that is no batch: entries are asked for or brought, or a copy is to be fetched."""
        kind, shard, *arguments = frame
        if kind == FETCH:
            self._fetch(link, shard, arguments[0])
        elif kind == SHIP:
            self._ship(link, shard, arguments[0])
        else:
            self._pull(shard, *arguments)

    def _fetch(self, link: CoordinatorLink, shard: int, after: int) -> None:
        """The answer may need an index of many entries, which is made in slices."""
        if link is not self.link:
            return
        if self.replica.backlog.index_some():
            self.send((ENTRIES, shard, after, *self.replica.entries_after(shard, after)))
        else:
            self._process.later(PAUSE_MS, partial(self._fetch, link, shard, after))

    def _ship(self, link: CoordinatorLink, shard: int, entries: list[Any]) -> None:
        replica = self.replica
        error = replica.ship(shard, entries)
        copy = replica.copies.get(shard)
        position = (0, 0, 0) if copy is None else copy.table.position
        self._log_applied(link)
        self._send_when_durable(link, (SHIPPED, shard, *position, error))
        self.changed()

    def _pull(self, shard: int, host: bytes, port: int, token: bytes) -> None:
        self._process.end_pull(shard, "another transfer was asked for")
        learning = self.replica.learning.get(shard)
        if learning is None or not learning.fresh or learning.copy is not None:
            self.send((LEARN_FAILED, shard, "the shard is not being learned"))
        else:
            self._process.start_pull(learning, host.decode("utf-8", "replace"), port, token)

    # --- copies -------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Copies were changed without a batch: log it and tell it; what waits in buffers is applied in slices."""
        link = self.link
        if link is None:
            return
        try:
            more = self.replica.catch_up(LEARN_APPLY_ITEMS)
            self._log_applied(link)
        except Exception as error:
            link.connection.abort()
            self._process.failed(error)
            return
        self.persistence.flush()
        self._tell_news()
        if more and not self._is_catching_up:
            self._is_catching_up = True
            self._process.later(PAUSE_MS, self._catch_up)

    def _catch_up(self) -> None:
        self._is_catching_up = False
        self.changed()

    def _tell_news(self) -> None:
        """Copies that could not be learned, or are live; donations that begin to wait."""
        replica, link = self.replica, self.link
        replica.news = False
        self._process.donations_changed()
        if link is None:
            return
        for shard, reason in replica.take_failed():
            self._process.event("warning", "learn-failed", shard=shard, reason=reason)
            self.send((LEARN_FAILED, shard, reason))
        was_doubtful = False
        for shard in replica.take_learned():
            copy = replica.copies[shard]
            was_doubtful = was_doubtful or bool(copy.reason)
            copy.reason = ""  # what was wrong with it is made good, by what others have
            self._process.event("info", "learned", shard=shard, disk=copy.disk, seq=copy.table.seq)
            self._send_when_durable(link, (LEARNED, shard, copy.disk, copy.generation, *copy.table.position))
        if was_doubtful:
            self.persistence.remember(replica, _nothing)

    def is_wanted(self, learning: Learning) -> bool:
        """Whether a copy that is on its way is still the one that is to be learned."""
        return self.replica.learning.get(learning.shard) is learning

    def loaded(self, learning: Learning, table: Table, kept: Sequence[Logged]) -> bool:
        """All of a pulled copy is here. True: its file is to be published, then `published` is called."""
        if not self.is_wanted(learning):
            return False
        if self.replica.loaded(learning.shard, table, kept) is not None:
            return True
        self.changed()
        return False

    def published(self, learning: Learning, pulled: Any) -> bool:
        """A copy that was loaded is durable, as `pulled` says to the persistence: it takes the place of the older one.
        From here on it is all or nothing: the manifest is queued before anything is logged of the new copy."""
        replica = self.replica
        if not self.is_wanted(learning) or not replica.published(learning.shard):
            return False
        self.persistence.change_copies(replica.copies.values(), pulled)
        self.changed()
        return True

    def pull_failed(self, learning: Learning, reason: str) -> None:
        """A copy could not be fetched or stored: send LEARN_FAILED, if the coordinator still wants it."""
        if self.is_wanted(learning):
            self.replica.learn_failed(learning.shard, reason)
            self.changed()

    # --- what else happens to a node ------------------------------------------------------------------

    def space_changed(self, level: int) -> None:
        """How short of space the disk is, as in the SPACE frame."""
        self.replica.space = level
        self.send((SPACE, level))

    def backup_ended(self, name: str, report: dict[str, Any] | None, error: str | None) -> None:
        """The file of a backup is finished, or cannot be."""
        self.send((BACKUP, name, report, error))

    def leave(self) -> None:
        """Stop, but let the coordinator take this node out of the in-sync sets first, so that no write waits for it. It
        answers with STOP; without a link, at the second call, or after LEAVE_MS the node stops as it is."""
        if self.link is None or not self.link.accepted or self._is_leaving:
            self._process.stop()
            return
        self._is_leaving = True
        self._process.later(LEAVE_MS, self._process.stop)
        self.send((LEAVE,))


def _nothing() -> None:
    """Nothing waits for it."""
