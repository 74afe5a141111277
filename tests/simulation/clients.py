"""Clients of a simulation: a few hot keys, unique values, and the history of what they were told.

A client has one request at a time. It asks a coordinator that it believes in, which may be one that was deposed and
does not know it; it gives up after a while, and whatever it is told then counts no more, but for the oracle that no
request is answered twice. The outcome of a write that was not answered is unknown: it may have happened, or happen yet.

`Request` is the sink of its answer. Each hot key has a history in the terms of the checker of linearizability; keys
with a time to live, and counts of many shards at once, are asked for too, and their answers have to come. Two of the
hot keys, of one shard, are written by transactions only, both with the same value: nobody may ever see them differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtcp.errors import Code
from kvtcp.protocol import operations as op
from kvtcp.replication.sequencing.multi_read import count_read, mget_read, page_read
from kvtcp.testing.linearizability import TimedOperation, check_history
from tests.simulation.disk import MEMORY
from tests.simulation.world import Violation, require

if TYPE_CHECKING:
    from tests.simulation.coordinator import SimCoordinator
    from tests.simulation.oracles import Oracles

CLIENTS_MAX = 8  # so at most so many operations of a key are under way, but for those of unknown outcome
OPERATIONS_MAX = 1_800  # of all keys together, so of each hot key less than a thousand
PATIENCE_MS = 700  # a client waits so long
REFUSED = {Code.OVERLOADED, Code.NOT_ENOUGH_REPLICAS, Code.SHARD_DOWN, Code.NO_SPACE}
COUNTER = b"n"
PAIR = (b"e", b"f")
COLD = b"zcold"  # these have a time to live
CHECK_BUDGET = 500_000  # steps of the checker for one key; what takes more is counted as not decided

READS = ("get", "get", "get", "exists", "ttl", "mget", "scan")
WRITES = ("put", "put", "delete", "add", "cas", "swap", "append")


class Request:
    """One request, and what became of it."""

    __slots__ = (
        "argument", "call", "client", "coordinator", "floors", "kind", "order", "outcome", "results", "ret", "seq",
        "shard", "targets",
    )  # fmt: skip

    def __init__(
        self, client: Client, coordinator: SimCoordinator, kind: str, targets: list[tuple[bytes, int]]
    ) -> None:
        clients = client.clients
        self.client = client
        self.coordinator = coordinator
        self.kind = kind
        self.targets = targets  # hot keys that the answer tells of, and their shards
        self.shard = targets[0][1] if targets else None
        self.argument: Any = None
        self.call = clients.world.next_order()
        self.ret: int | None = None
        self.outcome = ""  # "ok", "refused", "unknown"; empty = none yet
        self.results: list[Any] = []  # one for each target, in the terms of the checker
        self.seq = 0  # the number that a write was given, as far as that is known
        self.floors = [clients.floors.get(key, 0) for key, _ in targets]  # revisions answered before this was asked

    def reply(self, token: Any, result: Any) -> None:
        """See Sink."""
        self._answered("ok")
        kind = self.kind
        if kind in ("put", "add", "cas"):
            self.seq = result
            self.results = ["ok" if kind == "put" else True]
            self._saw(0, result, is_new=True)
        elif kind in ("get", "mget"):
            cells = [result] if kind == "get" else result
            self.results = [None if cell is None else int(cell[0]) for cell in cells]
            for at, cell in enumerate(cells):
                if cell is not None:
                    self._saw(at, cell[1])
        elif kind == "swap":
            self.results = [None if result is None else int(result)]
        elif kind == "pair":
            require(type(result) is list and len(result) == 4, f"a transaction gave {result!r}", self.shard)
            *cells, self.seq, other_seq = result
            require(self.seq == other_seq, f"one transaction has revisions {self.seq} and {other_seq}", self.shard)
            self.results = [None if cell is None else int(cell[0]) for cell in cells]
            for at, cell in enumerate(cells):
                if cell is not None:
                    self._saw(at, cell[1])
                self._saw(at, self.seq, is_new=True)
        elif kind == "scan":
            found = {row[0]: row for row in result[0]}
            self.results = [int(found[key][1]) if key in found else None for key, _ in self.targets]
            for at, (key, _) in enumerate(self.targets):
                if key in found:
                    self._saw(at, found[key][2])
        elif kind == "ttl":
            require(result in (None, -1), f"a key without a deadline has {result} ms left", self.shard)
            self.results = [result is not None]
        else:
            self.results = [result]
        seen = [value for (key, _), value in zip(self.targets, self.results, strict=False) if key in PAIR]
        require(len(seen) < 2 or seen[0] == seen[1], f"half of a transaction is seen: {seen}", self.shard)
        self._tell()

    def fail(self, token: Any, code: int, message: str, details: dict[str, Any]) -> None:
        """See Sink."""
        if code in (Code.EXISTS, Code.MISMATCH):
            self._answered("ok")
            self.results = [False]
        elif code == Code.UNKNOWN:
            self._answered("unknown")
        else:
            require(isinstance(code, int) and code in REFUSED, f"{self.kind} ended with {code}: {message}", self.shard)
            self._answered("refused")
        self._tell()

    def _answered(self, outcome: str) -> None:
        require(not self.ret, f"{self.kind} was answered {self.outcome}, and then {outcome}", self.shard)
        self.ret = self.client.clients.world.next_order()
        require(not self.coordinator.silent, f"{self.kind} was answered after R13", self.shard)
        self.outcome = self.outcome or outcome  # a client that gave up hears nothing

    def _saw(self, at: int, rev: int, is_new: bool = False) -> None:
        """A revision of a target is answered, of what was there or of what was written."""
        key, shard = self.targets[at]
        oracles = self.client.clients.oracles
        # the loss of everything shows: but for a run in memory, new revisions are above all that were lost
        may_go_back = shard in oracles.ruined and (not is_new or oracles.map.durability == MEMORY)
        floor = self.floors[at]
        require(may_go_back or rev >= floor, f"I10: {key!r} has revision {rev}, was {floor} before", shard)
        floors = self.client.clients.floors
        if rev > floors.get(key, 0):
            floors[key] = rev

    def _tell(self) -> None:
        clients = self.client.clients
        clients.oracles.answered(self)
        clients.world.note(f"{self.client.name} {self.told()}", self.shard)
        if self.client.busy is self:
            self.client.next()

    def told(self) -> str:
        """For the story."""
        keys = ",".join(key.decode() for key, _ in self.targets)
        answer = f" = {self.results}" if self.results else ""
        return f"{self.kind} {keys} {self.argument} at {self.coordinator.name}: {self.outcome}{answer}"

    def operation(self, at: int) -> TimedOperation | None:
        """Of this target, for the checker; None if there is nothing to check."""
        kind = {"mget": "get", "scan": "get", "ttl": "exists", "pair": "swap"}.get(self.kind, self.kind)
        if self.outcome == "ok":
            return (self.call, self.ret, kind, self.argument, self.results[at])
        if self.outcome == "refused" or kind in ("get", "exists"):
            return None
        return (self.call, None, kind, self.argument, None)


class Client:
    """One client."""

    def __init__(self, clients: Clients, number: int) -> None:
        self.clients = clients
        self.name = f"client{number}"
        self.busy: Request | None = None

    def next(self) -> None:
        """It has its answer, or none: the next request is soon, or a little later if this one was refused."""
        clients, request = self.clients, self.busy
        self.busy = None
        if not clients.stopped:
            was_refused = request is not None and request.outcome == "refused"
            clients.world.at(clients.think() + (clients.world.rng.randrange(60) if was_refused else 0), self.act)

    def act(self) -> None:
        """Ask for something."""
        clients = self.clients
        if self.busy is not None or clients.stopped:
            return
        coordinator = clients.choose()
        if coordinator is None:
            clients.world.at(clients.world.rng.randrange(5, 40), self.act)
            return
        request = self.busy = clients.make(self, coordinator)
        clients.world.at(PATIENCE_MS, self.give_up, request)
        coordinator.now(coordinator.ask, request)

    def give_up(self, request: Request) -> None:
        """The answer did not come in time."""
        if self.busy is request:
            request.outcome = "unknown"
            self.clients.world.note(f"{self.name} gives up {request.told()}", request.shard)
            self.next()


class Clients:
    """All clients, all requests, all histories."""

    def __init__(self, world: Any, oracles: Oracles, coordinators: list[SimCoordinator], shards: int) -> None:
        self.world = world
        self.oracles = oracles
        self.coordinators = coordinators
        rng = world.rng
        keys = [b"a", b"b", b"c", b"d"][: rng.randint(2, 4)]
        self.hot = [(key, rng.randrange(shards)) for key in keys] + [(COUNTER, rng.randrange(shards))]
        shard = rng.randrange(shards)
        self.pair = [(key, shard) for key in PAIR]
        self.hot += self.pair
        self.shards = shards
        self.clients = [Client(self, n) for n in range(rng.randint(4, CLIENTS_MAX))]
        self.think_ms = rng.choice((6, 15, 40))  # upper bound between an answer and the next request
        self.reads_share = rng.choice((0.3, 0.5, 0.7))
        self.many_share = rng.choice((0.02, 0.1))
        self.stopped = False
        self.requests: list[Request] = []
        self.floors: dict[bytes, int] = {}  # highest revision of a key that was answered
        self.undecided = 0  # histories that took the checker too long
        self._last_value = 10_000  # more than the counter comes to

    def start(self) -> None:
        """Everybody begins."""
        for client in self.clients:
            self.world.at(self.world.rng.randrange(1, 20), client.act)

    def think(self) -> int:
        """Pause between two requests. Often the same, so that requests come together."""
        rng = self.world.rng
        return 1 if rng.random() < 0.4 else rng.randrange(1, self.think_ms + 1)

    def choose(self) -> SimCoordinator | None:
        """One that lets clients in."""
        ready = [each for each in self.coordinators if each.is_ready]
        return self.world.rng.choice(ready) if ready else None

    def make(self, client: Client, coordinator: SimCoordinator) -> Request:
        """A request."""
        rng = self.world.rng
        target = rng.choice(self.hot)
        if rng.random() < self.many_share * 2:
            kind = "other"
        elif rng.random() < self.reads_share:
            kind = rng.choice(READS)
        else:
            kind = rng.choice(WRITES)
            if target[0] == COUNTER and kind != "delete":
                kind = "incr"
            elif target[0] in PAIR:
                kind = "pair"
        targets = [] if kind == "other" else self.hot if kind in ("mget", "scan") else [target]
        if kind == "pair":
            targets = self.pair
        request = Request(client, coordinator, kind, targets)
        self._last_value += 1
        value = self._last_value
        if kind in ("put", "add", "swap", "append", "pair"):
            request.argument = value
        elif kind == "cas":
            request.argument = (value - rng.randrange(1, 14), value)
        elif kind == "incr":
            request.argument = 1
        elif kind == "other":
            request.argument = (rng.randrange(5), rng.randrange(self.shards), value)
        self.requests.append(request)
        return request

    def issue(self, request: Request, sequencer: Any) -> None:
        """What the coordinator does with it."""
        kind, argument = request.kind, request.argument
        if kind == "mget":
            sequencer.multi_read(mget_read([k for k, _ in self.hot], [n for _, n in self.hot], request, 0))
        elif kind == "scan":
            sequencer.multi_read(page_read(list(range(self.shards)), b"a", b"o", 1_000, False, False, request, 0))
        elif kind == "other":
            self._issue_other(request, sequencer, *argument)
        else:
            key, shard = request.targets[0]
            if kind in _READ_OPS:
                sequencer.shards[shard].read(_READ_OPS[kind], key, request, 0)
                return
            code, args = _write_of(kind, argument)
            before = sequencer.shards[shard].last_seq
            sequencer.shards[shard].write(code, key, args, len(key) + 8, request, 0)
            if sequencer.shards[shard].last_seq == before + 1 and not sequencer.shards[shard].waiting:
                request.seq = request.seq or before + 1

    def _issue_other(self, request: Request, sequencer: Any, what: int, shard: int, value: int) -> None:
        if what == 0:
            sequencer.shards[shard].read(op.EXISTS, COLD, request, 0)
        elif what == 1:
            sequencer.multi_read(count_read(list(range(self.shards)), b"", None, request, 0))
        elif what == 2:
            sequencer.shards[shard].read(op.TTL, COLD, request, 0)
        else:
            ttl_ms = (30, None)[value % 2]
            sequencer.shards[shard].write(op.PUT, COLD + b"%d" % (value % 10), (b"%d" % value, ttl_ms), 16, request, 0)

    # --- what became of everything --------------------------------------------------------------------

    @property
    def completed(self) -> int:
        """Requests with a result."""
        return sum(request.outcome == "ok" for request in self.requests)

    def lost(self, coordinator: SimCoordinator) -> None:
        """The coordinator is gone: whoever waits for an answer of it hears of that."""
        for client in self.clients:
            request = client.busy
            if request is not None and request.coordinator is coordinator:
                request.outcome = "unknown"
                client.next()

    def check_histories(self, reads: list[tuple[bytes, Any]]) -> None:
        """Every hot key, with `reads` (key, value) after everything else, is linearizable."""
        last = self.world.order + 1
        by_key: dict[bytes, list[TimedOperation]] = {key: [] for key, _ in self.hot}
        for key, value in reads:
            by_key[key].append((last, last + 1, "get", None, value))
        for request in self.requests:
            for at, (key, _) in enumerate(request.targets):
                operation = request.operation(at)
                if operation is not None:
                    by_key[key].append(operation)
        for key, shard in self.hot:
            if shard in self.oracles.ruined:
                continue
            history = by_key[key]
            # The outcomes that are unknown make the search long, and most of them are not needed to explain anything.
            known = [each for each in history if each[1] is not None or _was_seen(each, history)]
            if len(known) < len(history) and check_history(known, budget=CHECK_BUDGET) is True:
                continue
            verdict = check_history(history, budget=CHECK_BUDGET)
            self.undecided += verdict is None
            if verdict is False:
                raise Violation(f"{key!r} is not linearizable: {sorted(history, key=_by_call)[-30:]}", shard)


_READ_OPS = {"get": op.GET, "exists": op.EXISTS, "ttl": op.TTL}


def _write_of(kind: str, argument: Any) -> tuple[int, tuple[Any, ...]]:
    """Operation and arguments of a write."""
    if kind == "put":
        return op.PUT, (b"%d" % argument,)
    if kind == "add":
        return op.ADD, (b"%d" % argument,)
    if kind == "cas":
        expected, value = argument
        return op.CAS, (b"%d" % value, b"%d" % expected, None)
    if kind == "incr":
        return op.INCR, (argument,)
    if kind == "swap":
        return op.STORE, (b"%d" % argument, op.NO_DEADLINE, 0, op.ALWAYS, None, True)
    if kind == "append":
        return op.APPEND, (b"%d" % argument,)
    if kind == "pair":
        value = b"%d" % argument
        return op.TRANSACTION, ([], [*([op.GET, key] for key in PAIR), *([op.PUT, key, value] for key in PAIR)])
    return op.DELETE, ()


def _by_call(operation: TimedOperation) -> float:
    return operation[0]


def _was_seen(unknown: TimedOperation, history: list[TimedOperation]) -> bool:
    """Whether a value that only this write can have made was read."""
    _, _, kind, argument, _ = unknown
    value = argument[1] if kind == "cas" else argument
    if kind == "append":
        return any(each[2] in ("get", "swap") and str(value) in str(each[4]) for each in history)
    return kind in ("put", "add", "cas", "swap") and any(
        (each[2] in ("get", "swap") and each[4] is not None and str(each[4]).startswith(str(value)))
        or (each[2] == "cas" and each[3][0] == value)
        for each in history
    )
