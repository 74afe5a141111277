"""What a disk holds and what a power cut leaves of it: the model below `CrashDisk`. Randomness is passed in.

A `State` changes by events only, the same ones on a running disk and on a replay of its journal:

    Create, Remove, Rename     a name in a directory; pending until that directory is synced
    SyncDirectory              the names in a directory are durable
    Write                      bytes at the end of a file; pending until the file is synced
    Sync                       bytes of a file are durable, its name is not
    FlipBit                    a bit of a file is another one, in memory and on the disk

Names. Every directory has two tables, name -> node: `names` is what a running process sees, `durable` what is on the
disk; `pending` lists the operations between the two, oldest first. `survive_names` does some of them on a copy of the
durable tables; one that has become impossible because an earlier one is missing is skipped. A rename is one operation,
atomic, in one directory or two; the sync of either makes it durable, so that a file is under its old name or its new
one, never under neither or both. A sync also settles the older operations that its own need (the creation of what was
renamed, the removals in a directory that is gone), and no other.

Data. Files only grow, and the disk takes blocks of 512 bytes whole. A block therefore holds on disk some first bytes of
what it holds in memory: at least its *floor*, which is what the last good sync covered. Above the floor, a power cut
leaves anything: see `Data`. A failed sync is forgotten by the system, as in Linux: the blocks count as clean, later
reads return them, and a later good sync does not write them. They are in *limbo*: durable at their floor only, until
a write into the same block and a sync.

Simplifications, and why they hold:
- A failed `sync_directory` leaves its names pending, and a later good one settles them: a file system whose journal
  failed is read-only from then on, so there is no later good one.
- Between directories, a directory is renamed after everything before it or not at all: tables in which a directory is
  in itself cannot come about, and file systems order these in one journal too.
- A file without a name is not looked at, and gives its bytes back at once, even if it is open: nobody unlinks a file to
  go on using it.
"""

from __future__ import annotations

from enum import Enum
from random import Random
from typing import NamedTuple

BLOCK_BYTES = 512
ROOT = 0  # the node of the directory that is always there
STALE_FILES_MAX = 4

Tables = dict[int, dict[str, int]]  # of each directory: name -> node


class Create(NamedTuple):
    """A new file or directory, empty."""

    path: str
    directory: int
    name: str
    node: int
    is_directory: bool = False


class Remove(NamedTuple):
    """A name is gone; a directory is empty before."""

    path: str
    directory: int
    name: str
    node: int


class Rename(NamedTuple):
    """A node gets another name, in the place of `replaced` if there is one."""

    path: str
    directory: int
    name: str
    node: int
    new_path: str
    new_directory: int
    new_name: str
    replaced: int | None


class SyncDirectory(NamedTuple):
    """The names in a directory become durable."""

    path: str
    directory: int


class Write(NamedTuple):
    """Bytes at the end of a file."""

    path: str
    node: int
    data: bytes


class Sync(NamedTuple):
    """The first `until_bytes` of a file become durable, or, if `failed`, what was pending of them goes to limbo."""

    path: str
    node: int
    until_bytes: int
    failed: bool = False


class FlipBit(NamedTuple):
    """One bit of a file is inverted."""

    path: str
    node: int
    bit_number: int


NameEvent = Create | Remove | Rename
Event = NameEvent | SyncDirectory | Write | Sync | FlipBit


class Names(Enum):
    """What survives of the pending names."""

    NONE = "none"
    ALL = "all"
    PREFIX = "prefix"  # of each directory's operations, each cut at its own place
    SUBSET = "subset"  # any of them, as far as they are possible without the others


class Data(Enum):
    """What survives of the pending bytes of a file. What was synced survives in every case."""

    NONE = "none"
    ALL = "all"
    PREFIX = "prefix"  # up to any byte, where the file ends
    ZEROS = "zeros"  # up to any byte, then zeros up to any size
    TORN = "torn"  # all but the last write: of that, up to any byte, or any blocks
    BLOCKS = "blocks"  # any blocks up to any size; lost ones are zeros above their floor
    STALE = "stale"  # as BLOCKS, but lost ones without a floor are blocks of files removed earlier


NAMES = tuple(Names)
DATA = tuple(Data)


class File:
    """One file. `synced <= clean <= len(data)`."""

    __slots__ = ("clean", "data", "last", "limbo", "named", "synced")

    def __init__(self, data: bytes = b"") -> None:
        self.data: bytes | bytearray = data  # what reads return; bytes while nobody appends, so that copies share it
        self.synced = len(data)  # the size on disk; below, blocks that are not in limbo are durable
        self.clean = len(data)  # a sync finds work above
        self.last = len(data)  # where the last write began
        self.limbo: dict[int, int] = {}  # block that a failed sync left -> its floor
        self.named = True

    def freeze(self) -> bytes:
        """The content, unchangeable."""
        if not isinstance(self.data, bytes):
            self.data = bytes(self.data)
        return self.data

    def copy(self) -> File:
        """The same file, with what is pending; shares the bytes."""
        copy = File(self.freeze())
        copy.synced, copy.clean, copy.last = self.synced, self.clean, self.last
        copy.limbo, copy.named = dict(self.limbo), self.named
        return copy

    def write(self, data: bytes) -> None:
        """Appends."""
        self.last = len(self.data)
        if isinstance(self.data, bytes):
            self.data = bytearray(self.data)
        self.data += data

    def sync(self, until: int, failed: bool) -> None:
        """Dirty blocks up to byte `until` are written, or forgotten if it failed."""
        dirty = range(self.clean // BLOCK_BYTES, _blocks(until)) if until > self.clean else range(0)
        for block in dirty:
            if failed:
                self.limbo.setdefault(block, self.floor(block))
            else:
                self.limbo.pop(block, None)
        self.clean = max(self.clean, until)
        if not failed:
            self.synced = max(self.synced, until)

    def flip_bit(self, number: int) -> None:
        """Inverts a bit."""
        data = bytearray(self.data)
        data[number // 8] ^= 1 << number % 8
        self.data = data

    def floor(self, block: int) -> int:
        """How many first bytes of the block are on the disk for certain."""
        known = self.limbo.get(block)
        return min(max(self.synced - block * BLOCK_BYTES, 0), BLOCK_BYTES) if known is None else known

    def survive(self, rng: Random, how: Data, stale: list[bytes]) -> bytes:
        """What a power cut leaves."""
        size = len(self.data)
        if how is Data.ALL or (self.synced == size and not self.limbo):
            return self.freeze()
        limbo = list(self.limbo)
        if how is Data.NONE:
            return self._image(self.synced, self.synced, limbo)
        if how is Data.PREFIX:
            size = rng.randint(self.synced, size)
            return self._image(size, size, _subset(rng, limbo))
        if how is Data.ZEROS:
            size = rng.randint(self.synced, size)
            return self._image(rng.randint(self.synced, size), size, _subset(rng, limbo))
        if how is Data.TORN:
            start = max(self.last, self.synced)
            if rng.random() < 0.5:
                cut = rng.randint(start, size)
                return self._image(cut, cut if rng.random() < 0.5 else size, _subset(rng, limbo))
            return self._image(size, size, _subset(rng, self._unsure(start, size)), start)
        if rng.random() < 0.5:
            size = rng.randint(self.synced, size)
        lost = _subset(rng, self._unsure(self.synced, size))
        image = self._image(size, size, lost)
        return _fill(rng, image, [b for b in lost if not self.floor(b)], stale) if how is Data.STALE else image

    def _unsure(self, start: int, end: int) -> list[int]:
        """Blocks with bytes in the range, and those in limbo, each once."""
        blocks = range(start // BLOCK_BYTES, _blocks(end))
        return [*(block for block in self.limbo if block not in blocks), *blocks]

    def _image(self, cut: int, size: int, lost: list[int], kept: int = 0) -> bytes:
        """The first `cut` bytes, then zeros up to `size`; `lost` blocks are zeros above floor and byte `kept`."""
        image = bytearray(memoryview(self.data)[:cut])
        image.extend(bytes(size - cut))
        for block in lost:
            start = max(block * BLOCK_BYTES + self.floor(block), kept)
            end = min((block + 1) * BLOCK_BYTES, size)
            if start < end:
                image[start:end] = bytes(end - start)
        return bytes(image)


class State:
    """Files and directories of a disk, in memory and on it."""

    __slots__ = ("durable", "files", "names", "next_node", "pending", "stale", "used_bytes")

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self.names: Tables = {ROOT: {}}
        self.durable: Tables = {ROOT: {}}
        self.pending: list[NameEvent] = []  # applied to `durable` in this order, they give `names`
        self.next_node = ROOT + 1
        self.used_bytes = 0  # sizes of all files with a name
        self.stale: list[bytes] = []  # contents of files removed last, whose blocks are used again

    def copy(self) -> State:
        """The same state, with all that is pending; shares the bytes of files."""
        copy = State()
        copy.files = {node: file.copy() for node, file in self.files.items()}
        copy.names = {node: dict(table) for node, table in self.names.items()}
        copy.durable = {node: dict(table) for node, table in self.durable.items()}
        copy.pending, copy.stale = list(self.pending), list(self.stale)
        copy.next_node, copy.used_bytes = self.next_node, self.used_bytes
        return copy

    def apply(self, event: Event) -> None:
        """Does what the event says. The caller has checked that it is possible."""
        if isinstance(event, Write):
            file = self.files[event.node]
            file.write(event.data)
            self.used_bytes += len(event.data) if file.named else 0
        elif isinstance(event, Sync):
            self.files[event.node].sync(event.until_bytes, event.failed)
        elif isinstance(event, SyncDirectory):
            self._settle(event.directory)
        elif isinstance(event, FlipBit):
            self.files[event.node].flip_bit(event.bit_number)
        else:
            self._apply_name(event)

    def _apply_name(self, event: NameEvent) -> None:
        if isinstance(event, Create):
            self.next_node = event.node + 1
            if event.is_directory:
                self.names[event.node], self.durable[event.node] = {}, {}
            else:
                self.files[event.node] = File()
        done = _move(self.names, event)
        assert done, f"{event} is not possible"
        self.pending.append(event)
        file = self.files.get(_loses_name(event))
        if file is not None:
            file.named = False
            self.used_bytes -= len(file.data)
            if file.data:
                self.stale = [*self.stale[1 - STALE_FILES_MAX :], file.freeze()]

    def _settle(self, directory: int) -> None:
        """Pending operations of a directory are durable, with the older ones that they need."""
        directories, places = {directory}, set[tuple[int, str]]()
        settled: list[NameEvent] = []
        left: list[NameEvent] = []
        everything = False
        for event in reversed(self.pending):
            its_places = _places(event)
            if not (everything or not places.isdisjoint(its_places) or any(d in directories for d, _ in its_places)):
                left.append(event)
                continue
            settled.append(event)
            places.update(its_places)
            directories.add(_loses_name(event))  # what was in a directory that is gone went before
            everything = everything or self._moves_directory(event)
        for event in reversed(settled):
            done = _move(self.durable, event)
            assert done, f"{event} became durable without what it needs"
        self.pending = left[::-1]

    def _moves_directory(self, event: NameEvent) -> bool:
        """Whether the event takes a directory to another one."""
        return isinstance(event, Rename) and event.node in self.names and event.directory != event.new_directory

    def power_cut(self, rng: Random, names: Names | None = None, data: Data | None = None) -> State:
        """One state that a power cut may leave, all of it durable; strategies not given are chosen at random."""
        if names is None and data is None and (extreme := rng.random()) < 0.2:
            names, data = (Names.NONE, Data.NONE) if extreme < 0.1 else (Names.ALL, Data.ALL)
        tables = self.survive_names(rng, names or rng.choice(NAMES))
        state = State()
        state.next_node, state.stale = self.next_node, self.stale
        directories = [ROOT]
        for directory in directories:  # which grows by those found
            state.names[directory] = dict(tables[directory])
            state.durable[directory] = dict(tables[directory])
            for node in tables[directory].values():
                if node in tables:
                    directories.append(node)
                    continue
                left = self.files[node].survive(rng, data or rng.choice(DATA), self.stale)
                state.files[node] = File(left)
                state.used_bytes += len(left)
        return state

    def survive_names(self, rng: Random, how: Names) -> Tables:
        """The tables of all directories as a power cut leaves them; not to be changed."""
        if how is Names.ALL:
            return self.names
        if how is Names.NONE or not self.pending:
            return self.durable
        if how is Names.SUBSET:
            chosen = set(_subset(rng, list(range(len(self.pending)))))
        else:
            chosen = self._prefixes(rng)
        tables = {directory: dict(table) for directory, table in self.durable.items()}
        complete = True  # so far
        for number, event in enumerate(self.pending):
            done = number in chosen and (complete or not self._moves_directory(event)) and _move(tables, event)
            complete = complete and done
        return tables

    def _prefixes(self, rng: Random) -> set[int]:
        """Numbers of pending operations that are in the prefixes of all of their directories."""
        count: dict[int, int] = {}
        for event in self.pending:
            for directory in {directory for directory, _ in _places(event)}:
                count[directory] = count.get(directory, 0) + 1
        left = {directory: rng.randint(0, number) for directory, number in count.items()}
        chosen = set()
        for number, event in enumerate(self.pending):
            directories = {directory for directory, _ in _places(event)}
            if all(left[directory] for directory in directories):
                chosen.add(number)
                for directory in directories:
                    left[directory] -= 1
            else:
                left.update(dict.fromkeys(directories, 0))
        return chosen


def _move(tables: Tables, event: NameEvent) -> bool:
    """Does a name operation if it is possible; returns whether it was. A node is a directory if it has a table."""
    old = tables[event.directory]
    if isinstance(event, Create):
        if event.name in old:
            return False
        old[event.name] = event.node
        return True
    if old.get(event.name) != event.node:
        return False
    if isinstance(event, Remove):
        if tables.get(event.node):  # not empty
            return False
        del old[event.name]
        return True
    new = tables[event.new_directory]
    there = new.get(event.new_name)
    if there is not None and ((there in tables) != (event.node in tables) or tables.get(there)):
        return False
    del old[event.name]
    new[event.new_name] = event.node
    return True


def _places(event: NameEvent) -> list[tuple[int, str]]:
    """What an operation changes: directories, and names in them."""
    if isinstance(event, Rename):
        return [(event.directory, event.name), (event.new_directory, event.new_name)]
    return [(event.directory, event.name)]


def _loses_name(event: NameEvent) -> int:
    """The node that has no name afterwards; -1 if none."""
    if isinstance(event, Remove):
        return event.node
    if isinstance(event, Rename) and event.replaced is not None:
        return event.replaced
    return -1


def _blocks(size: int) -> int:
    """How many blocks so many bytes take."""
    return -(-size // BLOCK_BYTES)


def _subset(rng: Random, items: list[int]) -> list[int]:
    """A random subset: of about a quarter, a half or three quarters."""
    count = len(items)
    if not count:
        return items
    bits, share = rng.getrandbits(count), rng.randrange(3)
    if share == 0:
        bits &= rng.getrandbits(count)
    elif share == 1:
        bits |= rng.getrandbits(count)
    return [item for item, bit in zip(items, f"{bits:0{count}b}", strict=True) if bit == "1"]


def _fill(rng: Random, image: bytes, blocks: list[int], stale: list[bytes]) -> bytes:
    """The image with blocks of old files in the given places: the same block of one if it has it, or any."""
    if not stale:
        return image
    filled = bytearray(image)
    old = rng.choice(stale)
    for block in blocks:
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, len(image))
        if start >= end:
            continue
        source = block if start < len(old) and rng.random() < 0.5 else rng.randrange(_blocks(len(old)))
        found = old[source * BLOCK_BYTES : source * BLOCK_BYTES + end - start]
        filled[start : start + len(found)] = found
    return bytes(filled)
