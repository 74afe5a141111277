"""The core of a node: what is told when, in which order, and what is refused; without socket, thread or disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

from kvtcp.constants import LEAVE_MS, YOUNG_CELLS_MAX
from kvtcp.errors import ProtocolError
from kvtcp.node import core as node_core
from kvtcp.node.access import Identity
from kvtcp.node.core import CoordinatorLink, NodeCore
from kvtcp.node.learning import Learning
from kvtcp.node.replica import FreezeRequest, Replicas
from kvtcp.protocol import link as wire
from kvtcp.protocol.operations import DONATE, DROP, FREEZE, GET, LEARN, PUT
from kvtcp.storage.shard.copy import Copy
from kvtcp.storage.shard.table import Logged, Table
from tests.support.learning_tools import hello_fields as hello
from tests.support.replica_tools import make, put


class Peer:
    """A connection: frames go into its list."""

    def __init__(self) -> None:
        self.peer = "peer"
        self.write_paused = False
        self.frames: list[Any] = []
        self.ended = ""

    def send(self, message: Any) -> None:
        """Keep it."""
        self.frames.append(message)

    def flush(self) -> None:
        """It is sent."""

    def close(self) -> None:
        """Remember how."""
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        """Remember how."""
        self.ended = "aborted"

    def take(self) -> list[Any]:
        """The frames since the last call."""
        frames, self.frames = self.frames, []
        return frames


class Around:
    """The process and the disk of a core. What it is told goes into one list, in its order; nothing is durable before
    `sync`, if it is `slow`."""

    def __init__(self, slow: bool = False, **options: Any) -> None:
        self.calls: list[Any] = []
        self.is_slow = slow
        self.waiting: list[Callable[[], None]] = []
        self.due: list[tuple[int, Callable[[], None]]] = []
        self.replica: Replicas = make(**options)
        self.core = NodeCore(self.replica, self, Identity())
        self.core.persistence = self

    def link(self, **changed: Any) -> tuple[CoordinatorLink, Peer]:
        """A link whose HELLO was said, and its connection, without the report."""
        peer = Peer()
        link = CoordinatorLink(peer)
        self.core.hello(link, hello(**changed))
        self.sync()
        assert [frame[0] for frame in peer.take()] == [wire.REPORT]
        self.calls.clear()
        return link, peer

    def sync(self) -> None:
        """Everything is durable."""
        while self.waiting:
            self.waiting.pop(0)()

    def run_due(self) -> list[int]:
        """The timers; after how many ms they were due."""
        due, self.due = self.due, []
        for _, callback in due:
            callback()
        return [delay_ms for delay_ms, _ in due]

    def names(self) -> list[str]:
        """What it was told, without arguments."""
        return [call[0] for call in self.calls]

    def __getattr__(self, name: str) -> Callable[..., None]:
        """What has no answer is noted."""
        return lambda *args: self.calls.append((name, *args))

    def _durable(self, done: Callable[[], None]) -> None:
        if self.is_slow:
            self.waiting.append(done)
        else:
            done()

    def append(self, entries: list[Logged], link: CoordinatorLink, ordinal: int) -> bool:
        """Of the disk."""
        self.calls.append(("append", [entry[:3] for entry in entries], ordinal))
        if self.is_slow and (entries or self.waiting):
            self.waiting.append(partial(self.core.durable, link, ordinal))
            return False
        return True

    def when_durable(self, done: Callable[[], None]) -> None:
        """Of the disk."""
        self._durable(done)

    def remember(self, replica: Replicas, done: Callable[[], None]) -> None:
        """Of the disk."""
        self.calls.append(("remember", replica.promised, [copy.reason for copy in replica.copies.values()]))
        self._durable(done)

    def change_copies(self, copies: Iterable[Copy], pulled: Any = None) -> None:
        """Of the disk."""
        self.calls.append(("change_copies", [copy.shard for copy in copies], pulled))

    def event(self, level: str, word: str, **fields: Any) -> None:
        """Of the process."""
        self.calls.append((word, level, fields))

    def later(self, delay_ms: int, callback: Callable[[], None], /) -> None:
        """Of the process."""
        self.due.append((delay_ms, callback))

    def start_pull(self, learning: Learning, host: str, port: int, token: bytes) -> None:
        """Of the process."""
        self.calls.append(("start_pull", learning.shard, host, port, token))

    def start_backup(self, request: FreezeRequest) -> None:
        """Of the process."""
        self.calls.append(("start_backup", request.name))


def linked(slow: bool = False, **options: Any) -> tuple[Around, CoordinatorLink, Peer]:
    """A core with a link."""
    around = Around(slow, **options)
    return around, *around.link()


def batch(*items: Any, commit: int = -1) -> list[Any]:
    """A frame."""
    return [wire.BATCH, 1000, commit, list(items)]


def packed(*values: bytes) -> list[list[Any]]:
    """Entries 1, 2, ... of shard 0, as they are shipped."""
    other = make()
    other.hello(hello())
    other.begin(1000, -1, [put(0, seq, value) for seq, value in enumerate(values, 1)])
    assert other.run([])
    entries = other.entries_after(0, 0)[1]
    assert entries is not None
    return entries


# --- HELLO --------------------------------------------------------------------------------------------


def test_a_report_waits_until_the_promise_is_durable() -> None:
    """R5: the promise is stored, and only then the report is sent and frames are taken."""
    around, peer = Around(slow=True), Peer()
    link = CoordinatorLink(peer)
    around.core.hello(link, hello(epoch=3))
    assert around.names() == ["founded", "end_transfers", "linked", "linked", "remember"]
    assert around.calls[-1][1] == 3 and not peer.frames and not link.accepted
    with pytest.raises(ProtocolError, match="the first frame of a link is HELLO"):
        around.core.received(link, [batch(put(0, 1))])
    around.core.space_changed(1)
    assert not peer.frames and around.replica.applied == 0
    around.sync()
    ((kind, report),) = peer.take()
    assert (kind, report["promised"], link.accepted) == (wire.REPORT, 3, True)


def test_a_newer_link_takes_the_place_of_the_older_one() -> None:
    """The older one is closed with what was unread, nothing more is told to it, and what it began ends."""
    around, older, peer = linked(slow=True)
    around.core.received(older, [batch(put(0, 1))])
    peer.write_paused = True
    around.core.received(older, [batch(put(0, 2))])
    peer.take()
    newer, other = CoordinatorLink(Peer()), Peer()
    newer.connection = other
    around.core.hello(newer, hello(link=2))
    assert (peer.ended, list(older.inbox), older.accepted, around.core.link) == ("aborted", [], False, newer)
    assert ("end_transfers", "the link it was asked for on is gone") in around.calls
    around.sync()
    assert [frame[0] for frame in other.take()] == [wire.REPORT] and not peer.frames
    around.calls.clear()
    around.core.closed(older, "reset")
    assert around.core.link is newer and not around.calls, "what becomes of the older one concerns nobody"
    around.core.hello(CoordinatorLink(Peer()), hello(link=3))
    around.core.closed(newer, "reset")
    around.sync()
    assert around.core.link is not None and around.core.link.accepted


def test_a_link_that_is_replaced_before_its_report() -> None:
    """It is never told anything."""
    around, peer, other = Around(slow=True), Peer(), Peer()
    around.core.hello(CoordinatorLink(peer), hello())
    around.core.hello(CoordinatorLink(other), hello(link=2))
    around.sync()
    assert not peer.frames and [frame[0] for frame in other.frames] == [wire.REPORT]


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"version": wire.LINK_VERSION + 1}, "VERSION"), ({"secret": b"x"}, "SECRET"), ({"cluster": b"x"}, "CLUSTER"),
        ({"node": b"n2"}, "NODE"), ({"epoch": 4, "link": 9}, "FENCED"), ({"coordinator": b"x", "link": 9}, "FENCED"),
        ({"link": 2}, "LINK"), ({"link": 1}, "LINK"), ({"epoch": 0}, "FENCED"),
    ],
)  # fmt: skip
def test_refused(changed: dict[str, Any], code: str) -> None:
    """A HELLO that is refused is told why, and changes nothing; one that only asks who is here is no news."""
    around = Around()
    link, _ = around.link(epoch=5, link=2)
    before, peer = around.replica.report(), Peer()
    around.core.hello(CoordinatorLink(peer), hello(**{"epoch": 5, "link": 3} | changed))
    ((kind, why, _, promised, version),) = peer.frames
    assert (kind, why, promised, version, peer.ended) == (wire.REFUSED, code, 5, 1, "closed")
    ((event, level, _),) = around.calls
    assert (event, level) == ("hello-refused", "debug" if "epoch" in changed and not changed["epoch"] else "warning")
    assert around.core.link is link and around.replica.report() == before


def test_the_first_coordinator_founds_the_identity() -> None:
    """Not one that is refused, nor the second one."""
    around = Around()
    around.core.hello(CoordinatorLink(Peer()), hello(node=b"n2", secret=b"x"))
    assert around.core.identity.secret is None and "founded" not in around.names()
    around.link()
    assert (around.core.identity.cluster, around.core.identity.secret) == ("c", "s")
    around.link(epoch=2)
    assert "founded" not in around.names()


# --- batches ------------------------------------------------------------------------------------------


def test_results_are_sent_at_once_and_acknowledged_later() -> None:
    """In one frame for all that follows each other; a frame of its own says that it is durable."""
    around, link, peer = linked(slow=True)
    around.core.received(link, [batch(put(0, 1)), batch([GET, 0, b"k1"], (PUT, 0, 2, 1, b"b", b"v"))])
    assert peer.take() == [(wire.RESULTS, 3, 0, [(b"v", 1, None), 2], [])]
    assert around.names() == ["append", "flush"] and around.calls[0][2] == 3
    around.core.received(link, [batch([GET, 0, b"b"])])
    around.sync()
    frames = peer.take()
    assert frames[0] == (wire.RESULTS, 4, 0, [(b"v", 2, None)], [])
    assert [frame[1:4] for frame in frames[1:]] == [(4, 3, []), (4, 4, [])]
    around.core.durable(link, 4)
    assert not peer.frames, "it is told already"


def test_what_has_nothing_to_tell_is_not_told() -> None:
    """Entries without results wait for the disk; an empty batch wants an answer; what is durable is told at once."""
    around, link, peer = linked(slow=True)
    around.core.received(link, [batch(put(0, 1))])
    assert not peer.frames
    around.core.received(link, [batch()])
    assert peer.take() == [(wire.RESULTS, 1, 0, [], [])]
    around.sync()
    assert peer.take() == [(wire.RESULTS, 1, 1, [], [])]
    around.core.received(link, [batch([GET, 0, b"k1"])])
    assert peer.take() == [(wire.RESULTS, 2, 2, [(b"v", 1, None)], [])]


def test_what_is_durable_is_told_to_the_link_that_applied_it() -> None:
    """An ordinal of a link that is gone means nothing to the next one."""
    around, older, peer = linked(slow=True)
    around.core.received(older, [batch(put(0, 1))])
    left, around.waiting = around.waiting, []
    _, other = around.link(link=2)
    for done in left:
        done()
    assert not peer.frames and not other.frames


def test_nothing_is_applied_while_the_coordinator_does_not_read() -> None:
    """It is worked off when it reads again."""
    around, link, peer = linked()
    peer.write_paused = True
    around.core.received(link, [batch(put(0, 1)), [wire.FETCH, 0, 0]])
    assert around.replica.tables[0].seq == 0 and not peer.frames
    peer.write_paused = False
    around.core.run(link)
    assert [frame[0] for frame in peer.frames] == [wire.RESULTS, wire.ENTRIES]


def test_large_results_leave_in_pieces() -> None:
    """The ordinal stands still within a batch, and each piece is logged before it leaves."""
    around, link, peer = linked()
    around.core.results_bytes_max = 2
    items = [[GET, 0, b"a"] for _ in range(4)]
    around.core.received(link, [batch((PUT, 0, 1, 0, b"a", b"vv"), *items), batch(put(0, 2))])
    frames = peer.take()
    assert [(frame[1], len(frame[3])) for frame in frames] == [(0, 2), (0, 2), (6, 0)]
    assert around.calls[0] == ("append", [(0, 1, 1)], 0)


def test_frames_and_batches_are_worked_off_in_their_order() -> None:
    """What is asked behind a batch sees it; the results of that batch are sent before."""
    around, link, peer = linked()
    around.core.received(
        link,
        [batch((PUT, 0, 1, 1, b"a", b"v")), [wire.FETCH, 0, 0], batch((PUT, 0, 2, 1, b"b", b"v")), [wire.FETCH, 0, 1]]
    )  # fmt: skip
    first, second, third, fourth = peer.take()
    assert first[3] == [1] and third[3] == [2]
    assert (second[0], len(second[4])) == (wire.ENTRIES, 1) and (fourth[0], len(fourth[4])) == (wire.ENTRIES, 1)


@pytest.mark.parametrize(
    "items", [[(PUT, 0, 5, 0, b"a", b"x")], [(PUT, 9, 1, 0, b"a", b"x")], [(200, 0)], [()], [7], [(GET, 0)]]
)
def test_an_error_while_applying_ends_the_node(items: list[Any]) -> None:
    """Nothing of it is acknowledged."""
    around, link, peer = linked()
    around.core.received(link, [batch(put(0, 1), *items)])
    assert around.names() == ["failed"] and peer.ended == "aborted" and not peer.frames


@pytest.mark.parametrize(
    "frame",
    [[wire.FETCH, 0], [wire.FETCH, "0", 0], [wire.SHIP, 0, None], [wire.PULL, 0, 7, 1, b"t"], [wire.BATCH, 1, 0],
     [99], [], 7, [[1], 2], [1, hello()]],
)  # fmt: skip
def test_frames_of_other_types(frame: Any) -> None:
    """They are errors of the caller; what came before them in the same read is not lost, nor worked off yet."""
    around, link, peer = linked()
    with pytest.raises(ProtocolError):
        around.core.received(link, [batch(put(0, 1)), frame])
    assert not around.calls and not peer.frames


def test_many_entries_are_collected() -> None:
    """A collection of young objects for every so many entries."""
    around, link, _ = linked()
    half = YOUNG_CELLS_MAX // 2 + 1
    for first in (1, half + 1):
        assert "collect_young" not in around.names()
        around.core.received(link, [batch(*(put(0, seq) for seq in range(first, first + half)))])
    assert around.names().count("collect_young") == 1


def test_a_backup_is_begun_when_its_batch_is_told() -> None:
    """And its end is told to the coordinator, if there is one."""
    around, link, peer = linked()
    around.core.received(link, [batch([FREEZE, [0, 1], b"b1", b"dir"])])
    assert around.calls[-1] == ("start_backup", "b1") and peer.take()[0][0] == wire.RESULTS
    around.core.backup_ended("b1", {"rows": 0}, None)
    assert peer.take()[0][1:] == ("b1", {"rows": 0}, None)
    around.core.closed(link, "reset")
    around.core.backup_ended("b1", None, "gone")
    assert not peer.frames


# --- copies -------------------------------------------------------------------------------------------


def test_what_was_shipped_is_told_when_it_is_durable() -> None:
    """Behind the entries in the log; not to another link."""
    around, link, peer = linked(slow=True)
    around.core.received(link, [[wire.SHIP, 0, packed(b"a", b"b")]])
    assert around.calls[0] == ("append", [(0, 1, 1), (0, 1, 2)], 0) and not peer.frames
    around.sync()
    assert [(frame[0], frame[3]) for frame in peer.take()] == [(wire.SHIPPED, 2)]
    around.core.received(link, [[wire.SHIP, 0, [[1, b"nonsense"]]]])
    around.sync()
    assert "damaged" in peer.take()[0][5]
    around.core.received(link, [[wire.SHIP, 7, []]])
    left, around.waiting = around.waiting, []
    _, other = around.link(link=2)
    for done in left:
        done()
    assert not peer.frames and not other.frames


def test_a_learned_copy_is_told_when_it_is_durable() -> None:
    """Behind what was shipped to it; its doubt is over, in memory at once and on the disk next."""
    around, link, peer = linked(slow=True, copies=[Copy(0, "d", reason="no power")])
    around.core.received(link, [batch([LEARN, 0, 0, 2, 1])])
    peer.take()
    around.calls.clear()
    around.core.received(link, [[wire.SHIP, 0, packed(b"a", b"b")]])
    assert not peer.frames and around.replica.copies[0].reason == ""
    assert around.names() == ["append", "append", "flush", "donations_changed", "learned", "remember", "flush"]
    assert around.calls[-2] == ("remember", 1, ["", ""])
    around.sync()
    assert [frame[0] for frame in peer.take()] == [wire.SHIPPED, wire.LEARNED]


def test_failures_are_told_before_what_was_learned() -> None:
    """A shard whose copy could not be learned, and one that could: in this order, in one step."""
    around, link, peer = linked()
    around.core.received(link, [batch([LEARN, 0, 0, 2, 1], [LEARN, 1, 1, 0, 1])])
    peer.take()
    assert around.replica.ship(0, packed(b"a", b"b")) is None
    around.core.pull_failed(around.replica.learning[1], "no space")
    assert [frame[:2] for frame in peer.frames] == [(wire.LEARN_FAILED, 1), (wire.LEARNED, 0)]


def test_a_drop_is_durable_before_what_follows() -> None:
    """The manifest without the copy is queued before anything is logged."""
    around, link, _ = linked()
    around.core.received(link, [batch(put(0, 1), [DROP, 1], put(0, 2))])
    assert around.names()[:3] == ["dropped", "change_copies", "append"]
    assert around.calls[1] == ("change_copies", [0], None)


def test_an_index_is_made_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches go on meanwhile; a link that is gone gets no answer."""
    around, link, peer = linked()
    ready = iter((False, False, True, True, False, True))
    index_some = around.replica.backlog.index_some
    monkeypatch.setattr(around.replica.backlog, "index_some", lambda: next(ready) and index_some())
    around.core.received(link, [[wire.FETCH, 0, 0], batch(put(0, 1))])
    assert [frame[0] for frame in peer.take()] == [wire.RESULTS]
    assert around.run_due() == [2] and around.run_due() == [2] and around.run_due() == []
    assert [(frame[0], len(frame[4])) for frame in peer.take()] == [(wire.ENTRIES, 1)]
    around.core.received(link, [[wire.FETCH, 0, 0]])
    around.core.closed(link, "reset")
    around.run_due()
    assert not peer.frames and not around.due


def test_what_waits_in_a_buffer_is_applied_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slice is due at a time, and each is logged; with the last the copy is live."""
    monkeypatch.setattr(node_core, "LEARN_APPLY_ITEMS", 2)
    around, link, peer = linked()
    around.core.received(link, [batch([LEARN, 0, 0, 2, 1], *(put(0, seq) for seq in range(3, 8)))])
    peer.take()
    learning, table = around.replica.learning[0], around.replica.copies[0].table
    for chain, entry in packed(b"a", b"b"):
        table.apply_entry(entry, chain)
    learning.is_ready = True
    around.core.changed()
    around.core.changed()
    assert len(around.due) == 1 and table.seq == 6 and not peer.frames
    around.run_due()
    assert not around.due and [(frame[0], frame[5]) for frame in peer.frames] == [(wire.LEARNED, 7)]


def test_a_copy_is_pulled() -> None:
    """Only one that is being learned as a whole; an older transfer of the shard ends first. The manifest that names the
    copy is queued before anything that is applied to it is logged."""
    around, link, peer = linked(slow=True)
    pull = [wire.PULL, 0, b"h", 9, b"t"]
    around.core.received(link, [pull])
    assert around.names()[0] == "end_pull" and peer.take() == [(wire.LEARN_FAILED, 0, "the shard is not being learned")]
    around.core.received(link, [batch([LEARN, 0, 1, 1, 1]), pull, batch(put(0, 2))])
    assert ("start_pull", 0, "h", 9, b"t") in around.calls
    learning, table = around.replica.learning[0], Table(0)
    table.apply(put(0, 1), 5)
    assert around.core.is_wanted(learning) and around.core.loaded(learning, table, [])
    around.calls.clear()
    assert around.core.published(learning, "file")
    assert around.calls[:2] == [("change_copies", [0, 1], "file"), ("append", [(0, 2, 2)], around.replica.applied)]
    assert not around.core.is_wanted(learning) and not around.core.published(learning, "file")
    peer.take()
    around.sync()
    assert [frame[0] for frame in peer.take() if frame[0] != wire.RESULTS] == [wire.LEARNED]


def test_a_copy_that_is_of_no_use() -> None:
    """One that ends too early is told; one that is not wanted any more is not."""
    around, link, peer = linked()
    around.core.received(link, [batch([LEARN, 0, 1, 5, 1])])
    learning = around.replica.learning[0]
    peer.take()
    assert not around.core.loaded(learning, Table(0), [])
    assert peer.take()[0][:2] == (wire.LEARN_FAILED, 0)
    assert not around.core.loaded(learning, Table(0), [])
    around.core.pull_failed(learning, "late")
    assert not peer.frames


# --- other callers, and the end -----------------------------------------------------------------------


def test_who_asks_is_told_what_is_durable() -> None:
    """What a restart would find, and nothing is changed by it."""
    around = Around(slow=True, cluster_map=b"{}")
    peer = Peer()
    fields = {b"version": wire.LINK_VERSION, b"cluster": b"c", b"secret": b"s", b"node": b""}
    around.core.ask(peer, fields)
    assert not peer.frames and around.core.identity.secret is None
    around.sync()
    ((kind, told),) = peer.frames
    assert (kind, told["map"], told["linked"], peer.ended) == (wire.TOLD, b"{}", False, "closed")
    around.link()
    for changed, code in (({b"secret": b"x"}, "SECRET"), ({b"node": b"n2"}, "NODE")):
        peer = Peer()
        around.core.ask(peer, fields | changed)
        assert [frame[:2] for frame in peer.frames] == [(wire.REFUSED, code)]


def test_a_donation_is_given_once() -> None:
    """To another node of the cluster that knows the token."""
    around, link, _ = linked()
    around.core.received(link, [batch(put(0, 1), [DONATE, 0, b"t", 0])])
    fields = {
        b"version": wire.LINK_VERSION, b"cluster": b"c", b"secret": b"s", b"token": b"t", b"directory": bytes(8),
        b"generation": 2,
    }  # fmt: skip
    for changed, code in (
        ({b"secret": b"x"}, "SECRET"), ({b"cluster": b"x"}, "CLUSTER"), ({b"version": 0}, "VERSION"),
        ({b"token": b"x"}, "TOKEN"), ({b"generation": 0}, "TOKEN"), ({b"directory": b""}, "TOKEN"),
    ):  # fmt: skip
        peer = Peer()
        assert around.core.give(peer, fields | changed) is None
        assert [frame[:2] for frame in peer.frames] == [(wire.REFUSED, code)] and peer.ended == "closed"
    given = around.core.give(Peer(), fields)
    assert given is not None and given[0].position[1] == 1 and len(given[1]) == 1
    assert around.core.give(Peer(), fields) is None


def test_a_node_that_leaves_waits_until_it_may() -> None:
    """It says so once, and stops when it is told to, when the link is lost, after a while, or at the second call."""
    for ending in ("stop", "lost", "late", "twice"):
        around, link, peer = linked()
        around.core.leave()
        assert peer.take() == [(wire.LEAVE,)] and not around.calls
        if ending == "stop":
            around.core.received(link, [[wire.STOP]])
        elif ending == "lost":
            around.core.closed(link, "reset")
        elif ending == "late":
            assert around.run_due() == [LEAVE_MS]
        else:
            around.core.leave()
        assert around.names()[-1] == "stop", ending
    around = Around()
    around.core.leave()
    assert around.names() == ["stop"], "there is no coordinator to tell"


def test_a_lost_link() -> None:
    """What was learned and donated is as before, and transfers end."""
    around, link, _ = linked()
    around.core.received(link, [batch([LEARN, 0, 1, 1, 1], [DONATE, 1, b"t", 0])])
    around.calls.clear()
    around.core.closed(link, "reset")
    assert around.names() == ["link-closed", "end_transfers", "unlinked"]
    assert not around.replica.learning and not around.replica.donations and 0 in around.replica.tables
    around.core.changed()
    assert around.names()[-1] == "unlinked", "there is nobody to tell"


def test_space() -> None:
    """It is told, and in the next report."""
    around, _, peer = linked()
    around.core.space_changed(2)
    assert peer.take() == [(wire.SPACE, 2)] and around.replica.report()["space"] == 2
