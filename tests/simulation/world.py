"""The world of a simulation: one virtual clock, one queue of events, one source of randomness, one trace.

Everything of a run is decided by its seed. Whatever happens is an event in one queue, ordered by time and then by the
order in which it was made; nobody looks at a real clock, at an address in memory, or iterates over a set. What happened
goes into the *trace*: its hash tells two runs apart, and its last part is the *story* that is told after a violation.

A `Process` is something that can be killed and paused. Its events die with it, and wait while it is paused (SIGSTOP:
what arrives stays in its sockets, its timers are late), so it goes on later with what it believed before.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import Any

import msgpack

from kvtcp.protocol import link as wire

STORY_EVENTS = 6_000  # kept for the story
STORY_TOLD = 60  # of them, those that touch the shard

# A few items where the product has thousands, a few milliseconds where it has seconds: everything that happens rarely
# happens often. By the name of the constant, wherever a module of these packages has imported it.
SMALL = {
    "WINDOW_ITEMS_MAX": 40, "WINDOW_BYTES_MAX": 2_000, "WAITING_ITEMS_MAX": 5, "WAITING_MULTI_MAX": 4,
    "DRAIN_SLICE": 2, "BATCH_BYTES_MAX": 400, "UNCOMMITTED_MAX": 4, "RECOVERY_SHARDS_MAX": 2,
    "KEPT_SHARD_BYTES_MAX": 6_000, "KEPT_PASS_ENTRIES": 41, "KEPT_BYTES_MAX": 12_000, "RECENT_BYTES_MAX": 1_800,
    "LEARN_BUFFER_BYTES_MAX": 4_000, "BACKOFF_MIN_MS": 10, "BACKOFF_MAX_MS": 160, "SLOW_INTERVAL_MS": 400,
    "AUDIT_INTERVAL_MS": 150, "LEARNERS_PER_DONOR_MAX": 2, "LEARN_APPLY_ITEMS": 3,
    "TICK_MS": 15, "WRITE_WAIT_MS": 200, "READ_RETRY_MS": 60, "PURGE_INTERVAL_MS": 60, "LINK_GRACE_MS": 20,
    "EVICT_AFTER_MS": 200, "RECOVER_WAIT_MS": 200, "HEARTBEAT_MS": 80, "LINK_SILENCE_MS": 300, "MAP_RESEND_MS": 40,
    "STAMP_AHEAD_MS": 400, "STAMP_MOVE_MS": 200, "BOUND_RETRY_MS": 40, "DONATION_IDLE_MS": 400, "LEAVE_MS": 150,
}  # fmt: skip
SMALL_PACKAGES = ("kvtcp.cluster.", "kvtcp.node.", "kvtcp.replication.", "kvtcp.storage.")


@contextlib.contextmanager
def small_limits() -> Iterator[None]:
    """Let every core have the small limits."""
    changed = []
    for name, module in sorted(sys.modules.items()):
        if name.startswith(SMALL_PACKAGES):
            for constant, value in SMALL.items():
                if constant in vars(module):
                    changed.append((module, constant, getattr(module, constant)))
                    setattr(module, constant, value)
    try:
        yield
    finally:
        for module, constant, value in changed:
            setattr(module, constant, value)


class Violation(AssertionError):
    """Something that must never be was seen. `shard` is the one to tell the story of, None if it is about no shard."""

    def __init__(self, sentence: str, shard: int | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.shard = shard


def require(holds: bool, sentence: str, shard: int | None = None) -> None:
    """An oracle: raise Violation unless it holds."""
    if not holds:
        raise Violation(sentence, shard)


class World:
    """Time, chance, and what happened."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_ms = 1_000
        self._events: list[tuple[int, int, Callable[..., Any], tuple[Any, ...]]] = []  # a heap by time and order
        self._made = 0
        self._hash = hashlib.blake2b(digest_size=12)
        self._story: deque[tuple[int, str, Any]] = deque(maxlen=STORY_EVENTS)
        self.order = 0  # of calls and answers of clients: every one has its own

    def at(self, delay_ms: int, call: Callable[..., Any], *args: Any) -> None:
        """Call it after so many milliseconds."""
        self._made += 1
        heappush(self._events, (self.now_ms + delay_ms, self._made, call, args))

    def run(self, until_ms: int) -> None:
        """Everything that is due until then."""
        events = self._events
        while events and events[0][0] <= until_ms:
            self.now_ms, _, call, args = heappop(events)
            call(*args)
        self.now_ms = until_ms

    def next_order(self) -> int:
        """A time for the histories."""
        self.order += 1
        return self.order

    # --- the trace ------------------------------------------------------------------------------------

    def wire(self, what: str, frame: Any) -> Any:
        """A frame is sent: what will arrive of it."""
        packed = msgpack.packb(frame)
        self._hash.update(b"%d %s" % (self.now_ms, what.encode()))
        self._hash.update(packed)
        self._story.append((self.now_ms, what, frame))
        return msgpack.unpackb(packed, raw=True, strict_map_key=False)

    def note(self, what: str, shard: int | None = None) -> None:
        """Something happened."""
        self._hash.update(b"%d %s" % (self.now_ms, what.encode()))
        self._story.append((self.now_ms, what, shard))

    @property
    def trace(self) -> str:
        """Hash of all that happened."""
        return f"{self.order}-{self._hash.hexdigest()}"

    def story(self, shard: int | None) -> list[str]:
        """The last events that touch the shard, oldest first, with the acknowledgements between them."""
        lines: list[tuple[str, bool]] = []  # and whether it is more than an acknowledgement
        acknowledged: dict[str, Any] = {}  # by connection
        for now_ms, what, detail in self._story:
            line, counts = what, True
            if detail is not None and type(detail) is not int:
                line = f"{what}: {text}" if (text := _tell(detail, shard)) else ""
                if detail[0] == wire.RESULTS:
                    counts = False
                    if acknowledged.get(what) == detail[1:3] and not detail[3]:
                        line = ""
                    acknowledged[what] = detail[1:3]
            elif detail is not None and shard is not None and detail != shard:
                line = ""
            if line:
                lines.append((f"{now_ms:6} {line}", counts))
        left = STORY_TOLD
        first = len(lines)
        while first and left:
            first -= 1
            left -= lines[first][1]
        return [line for line, _ in lines[first:]]


def _tell(frame: Any, shard: int | None) -> str:
    """A frame as far as it touches the shard; empty if it does not."""
    kind = frame[0]
    if kind == wire.BATCH:
        _, stamp_ms, commit, items = frame
        mine = [item for item in items if shard is None or _touches(item[1], shard)]
        return f"BATCH stamp {stamp_ms} commit {commit}, {len(mine)} of {len(items)}: {mine}" if mine else ""
    if kind == wire.HELLO:
        return "HELLO epoch {epoch} link {link} map {map_version} shards {shards}".format_map(frame[1])
    if kind == wire.REPORT:
        rows = [row for row in frame[1]["shards"] if shard is None or row[0] == shard]
        return f"REPORT promised {frame[1]['promised']} map {frame[1]['map_version']}: {rows}"
    if kind == wire.RESULTS:
        return f"RESULTS applied {frame[1]} durable {frame[2]}: {str(frame[3])[:200]}"
    if kind in _OF_A_SHARD and shard is not None and frame[1] != shard:
        return ""
    text = f"{_OF_A_SHARD.get(kind, kind)} {frame[1:]!r}"
    return text if len(text) < 500 else text[:500] + "..."


def _touches(where: Any, shard: int) -> bool:
    """Whether the second field of an item names this shard: a number, numbers, or pairs of number and key."""
    if type(where) is int:
        return where == shard
    return any(each == shard or (type(each) is not int and each[0] == shard) for each in where)


_OF_A_SHARD = {
    wire.FETCH: "FETCH", wire.ENTRIES: "ENTRIES", wire.SHIP: "SHIP", wire.SHIPPED: "SHIPPED", wire.PULL: "PULL",
    wire.LEARNED: "LEARNED", wire.LEARN_FAILED: "LEARN_FAILED",
}  # fmt: skip


class Process:
    """A process. `later` is how it does anything at another time."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = False
        self.paused = False
        self.life = 0  # which incarnation
        self._deferred: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []  # what came due while it was paused

    def later(self, delay_ms: int, call: Callable[..., Any], *args: Any) -> None:
        """Do it after so many milliseconds, if this incarnation still lives; later if it is paused then."""
        self.world.at(delay_ms, self._do, self.life, call, args)

    def now(self, call: Callable[..., Any], *args: Any) -> None:
        """Do it at once, or when it is not paused any more."""
        self._do(self.life, call, args)

    def _do(self, life: int, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if life != self.life or not self.alive:
            return
        if self.paused:
            self._deferred.append((call, args))
        else:
            call(*args)

    def born(self) -> None:
        """A new incarnation."""
        self.life += 1
        self.alive = True
        self.paused = False
        self._deferred = []

    def died(self) -> None:
        """This incarnation is gone."""
        self.life += 1
        self.alive = False
        self.paused = False
        self._deferred = []

    def resume(self) -> None:
        """It goes on, with everything that came due meanwhile in its order."""
        self.paused = False
        life = self.life
        deferred, self._deferred = self._deferred, []
        for at, (call, args) in enumerate(deferred):
            if self.paused:  # one of them led to another pause
                self._deferred += deferred[at:]
                return
            self._do(life, call, args)
