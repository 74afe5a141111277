"""The network of a simulation: connections between processes, and what can happen to them.

A `Connection` is what TCP gives: two queues of frames, each in order, with ends that are closed one by one. Each pair
of places has a `Path`, the state of the way between them: how slow it is, and whether anything gets through in either
direction. What is sent over a path that is blocked waits, as retransmissions do, so a connection survives a short
partition; a connection that is given up by one side, or whose process died, is *half-open* for the other side as long
as nothing gets through. Connections do not wait for each other: what was sent over an older one may arrive after what
came over the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from kvtcp.protocol import link as wire
from tests.simulation.world import Process, World

END = object()  # in a queue: the sender closed
DELAY_MS = 4  # upper bound of the delay on a path without trouble

# those by which copies are made equal, shipped and pulled: what breaks then breaks rarely else
RARE_FRAMES = frozenset((
    wire.REPORT, wire.FETCH, wire.ENTRIES, wire.SHIP, wire.SHIPPED, wire.PULL, wire.GIVE, wire.CHUNK, wire.LEARNED,
    wire.LEARN_FAILED,
))  # fmt: skip

TO_SERVER = 0
TO_CLIENT = 1


class Path:
    """The way between two places."""

    def __init__(self) -> None:
        self.delay_ms = DELAY_MS  # upper bound
        self.blocked = [False, False]  # by direction
        self.blocks = 0  # how often it was blocked
        self.untaken = False  # the client's kernel takes nothing that its process writes
        self.connections: list[Connection] = []


class Connection:
    """One connection, made by `client` to `server`. Frames arrive at `on_frame` of its ends, the end of it at `on_end`.

    The end of the server is made by its process when the first frame arrives there (`accept`).
    """

    def __init__(self, network: Network, path: Path, client: Process, server: Process, number: int) -> None:
        self.network = network
        self.path = path
        self.processes = (server, client)  # by direction: who receives
        self.name = f"{client.name}-{server.name}#{number}"
        self.queues: tuple[deque[tuple[int, Any]], deque[tuple[int, Any]]] = (deque(), deque())
        self.open = [True, True]  # the end that receives in this direction
        self.accepted = False
        self.on_frame: list[Callable[[Any], None]] = [_ignore, _ignore]
        self.on_end: list[Callable[[str], None]] = [_ignore, _ignore]

    def send(self, direction: int, frame: Any) -> None:
        """Put a frame into the queue of this direction, if the sender's end is open."""
        if not self.open[1 - direction]:
            return
        world = self.network.world
        if frame is not END:
            if frame[0] in RARE_FRAMES:
                self.network.on_rare_frame()
            frame = world.wire(f"{self.name}{'><'[direction]}", frame)
        self._push(direction, frame)

    def _push(self, direction: int, frame: Any) -> None:
        world, queue = self.network.world, self.queues[direction]
        arrival = world.now_ms + world.rng.randrange(1, self.path.delay_ms + 1)
        if queue and queue[-1][0] > arrival:
            arrival = queue[-1][0]
        queue.append((arrival, frame))
        world.at(arrival - world.now_ms, self.deliver, direction)

    def close(self, direction: int) -> None:
        """Close the end that receives in this direction. What it sent before still arrives, then its end."""
        if self.open[direction]:
            self.send(1 - direction, END)
            self.open[direction] = False
            self._forget()

    def reset(self) -> None:
        """It breaks: of what is under way a part is lost, and both ends hear of it. What is sent after that is lost."""
        rng = self.network.world.rng
        for direction in (TO_SERVER, TO_CLIENT):
            queue = self.queues[direction]
            for _ in range(rng.randint(0, len(queue))):
                queue.pop()
            self._push(direction, END)

    def deliver(self, direction: int) -> None:
        """Hand over what has arrived."""
        world, path, queue = self.network.world, self.path, self.queues[direction]
        while queue and queue[0][0] <= world.now_ms and not path.blocked[direction]:
            _, frame = queue.popleft()
            process = self.processes[direction]
            if not self.open[direction]:
                continue
            if direction == TO_SERVER and not self.accepted:
                self.accepted = True
                if not process.alive:
                    self.open[TO_SERVER] = False
                    self._answer_refused()
                    continue
                process.accept(self)  # type: ignore[attr-defined]
            if frame is END:
                self.open[direction] = False
                self._forget()
                process.now(self.on_end[direction], "connection reset")
            else:
                process.now(self._received, direction, frame)

    def _received(self, direction: int, frame: Any) -> None:
        if self.open[direction]:
            self.on_frame[direction](frame)

    def _answer_refused(self) -> None:
        self._push(TO_CLIENT, END)

    def process_died(self, process: Process) -> None:
        """One end has no process any more; its kernel tells the other side, if it can."""
        for direction in (TO_SERVER, TO_CLIENT):
            if self.processes[direction] is process and self.open[direction]:
                rng, queue = self.network.world.rng, self.queues[1 - direction]
                for _ in range(rng.choice((0, 0, rng.randint(0, len(queue))))):
                    queue.pop()
                self.close(direction)

    def _forget(self) -> None:
        if not self.open[0] and not self.open[1] and self in self.path.connections:
            self.path.connections.remove(self)


class Network:
    """All paths."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.paths: dict[tuple[str, str], Path] = {}
        self.on_rare_frame: Callable[[], None] = lambda: None  # told of each of RARE_FRAMES that is sent
        self._number = 0

    def path(self, client: str, server: str) -> Path:
        """The way from one place to another one. Connections are made in this direction only."""
        found = self.paths.get((client, server))
        if found is None:
            found = self.paths[client, server] = Path()
        return found

    def connect(self, client: Process, server: Process) -> Connection:
        """A new connection; whether somebody is there shows when the first frame arrives."""
        self._number += 1
        path = self.path(client.name, server.name)
        connection = Connection(self, path, client, server, self._number)
        path.connections.append(connection)
        return connection

    def process_died(self, process: Process) -> None:
        """All its connections lose their end."""
        for (client, server), path in self.paths.items():
            if process.name in (client, server):
                for connection in path.connections[:]:
                    connection.process_died(process)

    # --- troubles -------------------------------------------------------------------------------------

    def block(self, path: Path, directions: list[int]) -> None:
        """Nothing gets through in these directions."""
        for direction in directions:
            path.blocked[direction] = True

    def unblock(self, path: Path) -> None:
        """Everything gets through again, and what waited arrives."""
        path.blocked = [False, False]
        for connection in path.connections[:]:
            for direction in (TO_SERVER, TO_CLIENT):
                if connection.queues[direction]:
                    self.world.at(self.world.rng.randrange(1, 4), connection.deliver, direction)

    def heal(self) -> None:
        """No trouble anywhere."""
        for path in self.paths.values():
            path.delay_ms = DELAY_MS
            path.untaken = False
            self.unblock(path)


def _ignore(_: Any) -> None:
    """An end without a process."""
