"""A disk in memory on which a test can cut the power: after every call, in every way, thousands of times a second.

`CrashDisk` is a `Disk` of kvtcp.storage.files (see there what each call promises) with faults to order. It keeps a
journal, `events`, of everything that changed it; the model of what survives is in state.py. A harness runs its
workload once and then looks at all crashes of it:

    disk = CrashDisk()
    workload(disk)                            remembers len(disk.events) with each promise that it gave
    crashes = Crashes(disk)
    for boundary in crashes.walk():           0, 1, ... len(disk.events): so many events have happened
        recovered = recover(crashes.sample(Random(f"{seed} {boundary} {number}")))
        must hold: every promise given at or before `boundary`

A sampled disk is a `CrashDisk` of its own, with an empty journal and everything on it durable, so that a recovery can
be cut off in its turn. Copies share the bytes of files; a walk costs the sum of its events, a sample the number of
files and the bytes that are pending.

Inside an event. A power cut during a write, a rename or any change of a name leaves what a cut after it may leave, as
all of it is still pending then (torn, some blocks, done or not), and one during a sync what a cut before it may leave.
So boundaries are enough, and what follows an event is judged at the boundary after it. A process that is killed is
different: `process_kill` leaves everything that was written, still pending; given a generator it also cuts the next
event, if that is a write, at any byte.

Simplifications, and why they hold:
- One thread. A write while a sync runs in another thread is `finish = file.start_sync(); file.write(...); finish()`.
- `open_read` gives the content as it is; no later writes show up. Nothing reads a file that it still writes.
- Modes of files are not kept: `private` is a matter of test_files.py. Paths are taken from the root, without `..`.
- A failing close is not modelled: close writes nothing, and callers have synced before.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from random import Random
from typing import IO

from tests.crash import state as journal
from tests.crash.state import ROOT, Data, Names, State

UNLIMITED_BYTES = 1 << 40


def _error(number: int, path: Path | str, new: Path | None = None) -> OSError:
    """As the system raises it; the class follows the number."""
    if new is not None:
        return OSError(number, os.strerror(number), str(path), None, str(new))
    return OSError(number, os.strerror(number), str(path))


class CrashDisk:
    """A disk whose call number `fail_at` (from 1; 0 = never) raises OSError(`error_number`); with `dead` all later too.

    Calls that may change something count: create, write, sync, rename, sync_directory, remove, remove_tree and
    make_directory, also if they find nothing to do. A failing write leaves any first part of its bytes, pending; a
    failing sync leaves its blocks in limbo; a failing sync_directory leaves names pending; a failing remove_tree or
    make_directory has done any first part of its work; a failing create, rename or remove has done nothing.
    `rng` decides how much.
    """

    def __init__(
        self, *, fail_at: int = 0, error_number: int = errno.EIO, dead: bool = False,
        capacity_bytes: int = UNLIMITED_BYTES, rng: Random | None = None, state: State | None = None,
        origin: str = "a new disk",
    ) -> None:  # fmt: skip
        self.calls: list[tuple[str, Path]] = []  # (what, file or directory), in order
        self.events: list[journal.Event] = []  # what came of them: 0 to many each
        self.fail_at = fail_at
        self.error_number = error_number
        self.dead = dead
        self.capacity_bytes = capacity_bytes
        self.origin = origin  # how it came about, for the text of a failed test
        self._rng = rng
        self._state = State() if state is None else state
        self._start: State | None = None  # before the first event; None while there was none

    # ---- reading

    def open_read(self, path: Path) -> IO[bytes]:
        """The file as a stream."""
        return BytesIO(self.read(path))

    def read(self, path: Path) -> bytes:
        """The whole content of a file."""
        return self._state.files[self._file(path)].freeze()

    def size(self, path: Path) -> int:
        """Bytes in a file."""
        return len(self._state.files[self._file(path)].data)

    def free_bytes(self, directory: Path) -> int:
        """What is left of the capacity."""
        self._directory(directory)
        return self._free_bytes()

    def list(self, directory: Path) -> list[str]:
        """Names of everything in `directory`, sorted."""
        return sorted(self._state.names[self._directory(directory)])

    def exists(self, path: Path) -> bool:
        """Whether there is anything under that name."""
        return self._find(path) is not None

    def is_directory(self, path: Path) -> bool:
        """Whether there is a directory under that name."""
        return self._find(path) in self._state.names

    def tree(self) -> dict[str, bytes | None]:
        """Everything on the disk by its path: content of a file, None for a directory."""
        found: dict[str, bytes | None] = {}
        directories = [(ROOT, "")]
        for directory, prefix in directories:  # which grows by those found
            for name, node in sorted(self._state.names[directory].items()):
                path = f"{prefix}/{name}"
                if node in self._state.names:
                    directories.append((node, path))
                    found[path] = None
                else:
                    found[path] = self._state.files[node].freeze()
        return found

    # ---- changing

    def create(self, path: Path, private: bool = False) -> CrashFile:
        """A new, empty file."""
        self._call("create", path)
        directory, name = self._place(path)
        if name in self._state.names[directory]:
            raise _error(errno.EEXIST, path)
        node = self._state.next_node
        self._do(journal.Create(str(path), directory, name, node))
        return CrashFile(self, node, path)

    def make_directory(self, directory: Path) -> None:
        """Makes `directory` and missing parents, each durable in the one above it."""
        failure = self._failure("make_directory", directory)
        missing: list[Path] = []
        while not self.is_directory(directory):
            missing.append(directory)
            directory = directory.parent
        if failure is not None:
            steps = self._random().randrange(2 * len(missing) or 1)
        else:
            steps = 2 * len(missing)
        for step in range(steps):
            path = missing[-1 - step // 2]
            parent, name = self._place(path)
            if step % 2:
                self._do(journal.SyncDirectory(str(path.parent), parent))
            elif name in self._state.names[parent]:
                raise _error(errno.EEXIST, path)
            else:
                self._do(journal.Create(str(path), parent, name, self._state.next_node, True))
        if failure is not None:
            raise failure

    def rename(self, old: Path, new: Path) -> None:
        """Atomically gives `old` the name `new`."""
        failure = self._failure("rename", old, new)
        if failure is not None:
            raise failure
        try:
            event = self._rename(old, new)
        except OSError as error:
            assert error.errno is not None
            raise _error(error.errno, old, new) from error
        if event is not None:
            self._do(event)

    def sync_directory(self, directory: Path) -> None:
        """The names in `directory` are on the disk."""
        self._call("sync_directory", directory)
        self._do(journal.SyncDirectory(str(directory), self._directory(directory)))

    def remove(self, path: Path) -> None:
        """Removes a file; fine if there is none."""
        self._call("remove", path)
        node = self._find(path)
        if node is None:
            if any(self._find(parent) in self._state.files for parent in path.parents):
                raise _error(errno.ENOTDIR, path)
            return
        if node in self._state.names:
            raise _error(errno.EISDIR, path)
        self._do(journal.Remove(str(path), *self._place(path), node))

    def remove_tree(self, directory: Path) -> None:
        """Removes a directory with everything in it; fine if there is none."""
        failure = self._failure("remove_tree", directory)
        node = self._find(directory)
        removals = () if node is None else tuple(self._removals(directory, self._directory(directory)))
        if failure is not None:
            removals = removals[: self._random().randrange(len(removals) or 1)]
        for event in removals:
            self._do(event)
        if failure is not None:
            raise failure

    def flip_bit(self, path: Path, bit_number: int) -> None:
        """Inverts a bit of the file, in memory and on the disk: what a rotten sector or a bad cable does."""
        self._do(journal.FlipBit(str(path), self._file(path), bit_number))

    # ---- crashing

    @property
    def start(self) -> State:
        """The state before the first event, to replay from."""
        return (self._state if self._start is None else self._start).copy()

    def power_cut(self, rng: Random, names: Names | None = None, data: Data | None = None) -> CrashDisk:
        """A disk as it may be if the power fails now. What survives is drawn, by the given strategies if any."""
        return _power_cut(self, self._state, f"after {len(self.events)} events", rng, names, data)

    def process_kill(self) -> CrashDisk:
        """The disk if the process is killed now: everything is there, and what was pending still is."""
        return CrashDisk(
            capacity_bytes=self.capacity_bytes,
            state=self._state.copy(),
            origin=f"({self.origin}), killed after {len(self.events)} events",
        )

    # ---- below

    def write_at_end(self, node: int, path: Path, data: bytes) -> None:
        """What `CrashFile.write` does."""
        failure = self._failure("write", path)
        if failure is not None:
            data = data[: self._random().randint(0, len(data))]
        if self._state.files[node].named and len(data) > self._free_bytes():
            data, failure = data[: self._free_bytes()], failure or _error(errno.ENOSPC, path)
        self._do(journal.Write(str(path), node, data))
        if failure is not None:
            raise failure

    def _free_bytes(self) -> int:
        """Never below zero, though a power cut may bring removed files back beside those that took their place."""
        return max(self.capacity_bytes - self._state.used_bytes, 0)

    def file_bytes(self, node: int) -> int:
        """Size of an open file."""
        return len(self._state.files[node].data)

    def sync_until(self, node: int, path: Path, until_bytes: int) -> None:
        """What `CrashFile.sync` does."""
        failure = self._failure("sync", path)
        self._do(journal.Sync(str(path), node, until_bytes, failure is not None))
        if failure is not None:
            raise failure

    def _do(self, event: journal.Event) -> None:
        """Every change comes by here."""
        if self._start is None:
            self._start = self._state.copy()
        self._state.apply(event)
        self.events.append(event)

    def _failure(self, what: str, path: Path, new: Path | None = None) -> OSError | None:
        """Counts a call; the error to raise, if it is its turn."""
        self.calls.append((what, path))
        number = len(self.calls)
        fails = number == self.fail_at or (self.dead and number > self.fail_at > 0)
        return _error(self.error_number, path, new) if fails else None

    def _call(self, what: str, path: Path) -> None:
        """Counts a call; raises if it is its turn."""
        failure = self._failure(what, path)
        if failure is not None:
            raise failure

    def _random(self) -> Random:
        """Made when it is needed: that takes longer than the rest of a new disk."""
        if self._rng is None:
            self._rng = Random(self.fail_at)
        return self._rng

    def _find(self, path: Path) -> int | None:
        """The node of a path."""
        node: int | None = ROOT
        for name in _names(path):
            if node is None:
                return None
            node = self._state.names.get(node, {}).get(name)
        return node

    def _place(self, path: Path) -> tuple[int, str]:
        """The directory that a path is in, and its name there."""
        assert _names(path), "the root is not a name in a directory"
        return self._directory(path.parent, path), path.name

    def _directory(self, path: Path, of: Path | None = None) -> int:
        """The node of a directory; the error tells `of`."""
        node = ROOT
        for name in _names(path):
            table = self._state.names.get(node)
            if table is None:
                raise _error(errno.ENOTDIR, of or path)
            if name not in table:
                raise _error(errno.ENOENT, of or path)
            node = table[name]
        if node not in self._state.names:
            raise _error(errno.ENOTDIR, of or path)
        return node

    def _file(self, path: Path) -> int:
        """The node of a file."""
        directory, name = self._place(path)
        node = self._state.names[directory].get(name)
        if node is None:
            raise _error(errno.ENOENT, path)
        if node in self._state.names:
            raise _error(errno.EISDIR, path)
        return node

    def _rename(self, old: Path, new: Path) -> journal.Rename | None:
        """What a rename does; None if nothing. Errors are those of Linux, and in its order."""
        directory, name = self._place(old)
        new_directory, new_name = self._place(new)
        node = self._state.names[directory].get(name)
        if node is None:
            raise _error(errno.ENOENT, old)
        there = self._state.names[new_directory].get(new_name)
        if there == node:
            return None
        if _is_below(new, old):
            raise _error(errno.EINVAL, new)
        if there is not None:
            table, there_table = self._state.names.get(node), self._state.names.get(there)
            if there_table and (table is not None or _is_below(old, new)):
                raise _error(errno.ENOTEMPTY, new)
            if (table is None) != (there_table is None):
                raise _error(errno.ENOTDIR if there_table is None else errno.EISDIR, new)
        return journal.Rename(str(old), directory, name, node, str(new), new_directory, new_name, there)

    def _removals(self, directory: Path, node: int) -> Iterator[journal.Remove]:
        """What removes a directory, its content first."""
        for name, inner in sorted(self._state.names[node].items()):
            if inner in self._state.names:
                yield from self._removals(directory / name, inner)
            else:
                yield journal.Remove(str(directory / name), node, name, inner)
        yield journal.Remove(str(directory), *self._place(directory), node)


class CrashFile:
    """`AppendFile` on a `CrashDisk`."""

    def __init__(self, disk: CrashDisk, node: int, path: Path) -> None:
        self._disk = disk
        self._node = node
        self._path = path
        self._is_open = True

    def write(self, data: bytes) -> None:
        """Appends all of `data`."""
        assert self._is_open, "the file is closed"
        self._disk.write_at_end(self._node, self._path, data)

    def sync(self) -> None:
        """Makes durable what was written."""
        self.start_sync()()

    def start_sync(self) -> Callable[[], None]:
        """A sync that begins now and ends when the result is called: what is written meanwhile is not covered."""
        assert self._is_open, "the file is closed"
        until_bytes = self._disk.file_bytes(self._node)
        return lambda: self._disk.sync_until(self._node, self._path, until_bytes)

    def close(self) -> None:
        """Makes nothing durable."""
        self._is_open = False


class Crashes:
    """Walks along the journal of a disk, event by event; at each boundary it gives disks as a crash leaves them."""

    def __init__(self, disk: CrashDisk, position: int = 0) -> None:
        self.position = 0  # so many events have happened
        self._disk = disk
        self._state = disk.start
        while self.position < position:
            self.advance()

    def advance(self) -> None:
        """Lets the next event happen."""
        self._state.apply(self._disk.events[self.position])
        self.position += 1

    def walk(self) -> Iterator[int]:
        """All boundaries from here to the end of the journal: the number of events before each."""
        while True:
            yield self.position
            if self.position == len(self._disk.events):
                return
            self.advance()

    def sample(self, rng: Random, names: Names | None = None, data: Data | None = None) -> CrashDisk:
        """A disk as it may be if the power failed here."""
        return _power_cut(self._disk, self._state, self._where(), rng, names, data)

    def process_kill(self, rng: Random | None = None) -> CrashDisk:
        """The disk if the process was killed here, or, with `rng`, in the next event if that is a write."""
        state = self._state.copy()
        if rng is not None and self.position < len(self._disk.events):
            event = self._disk.events[self.position]
            if isinstance(event, journal.Write):
                state.apply(event._replace(data=event.data[: rng.randint(0, len(event.data))]))
        origin = f"({self._disk.origin}), killed {self._where()}"
        return CrashDisk(capacity_bytes=self._disk.capacity_bytes, state=state, origin=origin)

    def _where(self) -> str:
        """Describes the boundary."""
        if not self.position:
            return "before the first event"
        event = self._disk.events[self.position - 1]
        return f"after event {self.position}, {type(event).__name__} {event.path}"


def _power_cut(
    disk: CrashDisk, state: State, where: str, rng: Random, names: Names | None, data: Data | None
) -> CrashDisk:
    """A disk with what survives of a state."""
    return CrashDisk(
        capacity_bytes=disk.capacity_bytes,
        state=state.power_cut(rng, names, data),
        origin=f"({disk.origin}), power cut {where}",
    )


def _names(path: Path) -> tuple[str, ...]:
    """The names on the way from the root."""
    parts = path.parts
    names = parts[1:] if parts and parts[0] == "/" else parts
    assert ".." not in names, "paths lead downwards"
    return names


def _is_below(path: Path, directory: Path) -> bool:
    """Whether a path leads through a directory."""
    return _names(path)[: len(_names(directory))] == _names(directory)
