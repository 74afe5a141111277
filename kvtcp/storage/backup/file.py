"""One node's file of a backup: written on the node, checked and read anywhere.

`node-<id>.jsonl` has one JSON line (kvtcp/jsonl.py) per pair of the shards this node saves, sorted by key over the
whole file. Three sums of the lines go into the manifest: sha256 of the file, sha256 of the lines of every shard, and a
crc32 per block of BACKUP_BLOCK_LINES lines. The first shows *whether* the file is damaged; shard and block together
show *where*, usually to a few lines, even if the changed line is still a valid JSON object. `LineSums` computes them
for the writer and for the check, so that both agree.

The writer runs on the event loop of a node between batches of writes: about 3 us a row of 370 bytes. `finish` waits for
the disk and may be called in another thread: the event loop does not use the writer any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

from kvtcp.constants import BACKUP_BLOCK_LINES, BACKUP_WRITE_BYTES, JSON_LINE_BYTES_MAX
from kvtcp.errors import DataError, show_bytes
from kvtcp.jsonl import Pair, decode_pair, encode_pair
from kvtcp.protocol.hashing import shard_of
from kvtcp.storage.backup.manifest import NODE_FILE, FileReport, ShardSum
from kvtcp.storage.files import Disk

BackupRow = tuple[int, bytes, bytes, int, int | None]  # shard, key, value, revision, ttl_ms


def node_file_name(node_id: str) -> str:
    """The name of the file of a node. Raises ValueError if the id does not make a plain file name."""
    name = f"node-{node_id}.jsonl"
    if not NODE_FILE.fullmatch(name):
        raise ValueError(f"node id {node_id!r} does not make a file name; allowed are letters, digits and ._-")
    return name


class LineSums:
    """The sums of a file, line by line. Lines are folded into the hashes in groups: a hash call per line is slow."""

    def __init__(self, shards: Iterable[int]) -> None:
        self.pairs = 0  # lines added
        self.bytes = 0  # bytes folded; after the last fold those of the file
        self._lines: list[bytes] = []  # lines of the current block that are not folded yet, in order
        self._lines_bytes = 0  # their bytes
        self._shard_lines: dict[int, list[bytes]] = {shard: [] for shard in shards}  # the same lines by shard
        self._shard_pairs = dict.fromkeys(self._shard_lines, 0)  # lines folded, by shard
        self._shard_hashes = {shard: hashlib.sha256() for shard in self._shard_lines}
        self._file_hash = hashlib.sha256()
        self._block_left = BACKUP_BLOCK_LINES  # lines until the current block is full
        self._block_crc = 0  # crc32 of the folded lines of the current block
        self._blocks: list[str] = []  # the full blocks

    def add(self, shard: int, line: bytes) -> bytes | None:
        """Add one line with its newline. Returns the bytes folded by this call, if it was time for that."""
        self.pairs += 1
        self._lines.append(line)
        self._lines_bytes += len(line)
        try:
            self._shard_lines[shard].append(line)
        except KeyError:
            self._shard_lines[shard] = [line]
            self._shard_pairs[shard] = 0
            self._shard_hashes[shard] = hashlib.sha256()
        self._block_left -= 1
        if self._block_left and self._lines_bytes < BACKUP_WRITE_BYTES:
            return None
        return self.fold()

    def fold(self) -> bytes:
        """Add the collected lines to the sums; returns them as one piece of the file."""
        piece = b"".join(self._lines)
        self._lines.clear()
        self._lines_bytes = 0
        self.bytes += len(piece)
        self._file_hash.update(piece)
        for shard, lines in self._shard_lines.items():
            if lines:
                self._shard_hashes[shard].update(b"".join(lines))
                self._shard_pairs[shard] += len(lines)
                lines.clear()
        self._block_crc = crc32(piece, self._block_crc)
        if not self._block_left:
            self._end_block()
        return piece

    def _end_block(self) -> None:
        self._blocks.append(f"{self._block_crc:08x}")
        self._block_crc, self._block_left = 0, BACKUP_BLOCK_LINES

    def report(self, name: str) -> FileReport:
        """The sums of all lines. No line may be added afterwards."""
        assert not self._lines, "fold comes before report"
        if self._block_left < BACKUP_BLOCK_LINES:
            self._end_block()
        return FileReport(
            name=name,
            bytes=self.bytes,
            sha256=self._file_hash.hexdigest(),
            pairs=self.pairs,
            shards=tuple(
                ShardSum(shard, self._shard_pairs[shard], self._shard_hashes[shard].hexdigest())
                for shard in sorted(self._shard_lines)
            ),
            blocks="".join(self._blocks),
        )


class NodeFileWriter:
    """Writes the file of one node; `write_rows` as often as needed, then `finish` or `abort`.

    A file of the same name that an earlier attempt left in `directory` is replaced. The directory must exist: if it
    does not, it was discarded with its attempt, and must not come back. `shards` are the shards that the node was asked
    to save. They are reported even without a pair, which distinguishes an empty shard from a forgotten one. All methods
    but `abort` raise OSError; after that only `abort` may be called.
    """

    def __init__(self, disk: Disk, directory: Path, node_id: str, shards: Iterable[int] = ()) -> None:
        self.path = directory / node_file_name(node_id)
        self._disk = disk
        self._directory = directory
        self._sums = LineSums(shards)
        self._last_key = b""  # of the last row; every key is above it
        self._pieces: list[bytes] = []  # folded, not yet written
        self._pieces_bytes = 0  # their bytes, < BACKUP_WRITE_BYTES between calls
        self._usable = True  # rows are taken: not finished, aborted or failed
        disk.remove(self.path)
        self._file = disk.create(self.path)

    def write_rows(self, rows: Iterable[BackupRow]) -> None:
        """Append rows. Raises DataError unless keys strictly increase over all calls."""
        assert self._usable, "the writer was finished, aborted or has failed"
        self._usable = False  # until all rows are written
        add, last_key = self._sums.add, self._last_key
        for shard, key, value, rev, ttl_ms in rows:
            if key <= last_key:
                raise _not_above(self.path, self._sums.pairs + 1, key, last_key)
            last_key = key
            piece = add(shard, (encode_pair(key, value, rev, ttl_ms) + "\n").encode("utf-8"))
            if piece is not None:
                self._keep(piece)
        self._last_key = last_key
        self._usable = True

    def finish(self) -> dict[str, Any]:
        """Make the file and its name durable. Returns `FileReport.to_fields()`: name, bytes, sha256, pairs, ..."""
        assert self._usable, "the writer was finished, aborted or has failed"
        self._usable = False
        self._keep(self._sums.fold())
        self._write()
        self._file.sync()
        self._file.close()
        self._disk.sync_directory(self._directory)
        return self._sums.report(self.path.name).to_fields()

    def abort(self) -> None:
        """Give the file up and remove it, at any time, even after `finish`. Raises nothing."""
        self._usable = False
        # A file that cannot be removed does no harm: its directory was never published, and the next backup of this
        # name replaces it. The error that led here is the one to report.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._disk.remove(self.path)

    def _keep(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._pieces_bytes += len(piece)
        if self._pieces_bytes >= BACKUP_WRITE_BYTES:
            self._write()

    def _write(self) -> None:
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._pieces_bytes = 0
        if data:
            self._file.write(data)


def read_lines(disk: Disk, path: Path) -> Iterator[bytes]:
    """The lines of a file, newlines included, with bounded memory. Raises DataError if they cannot be read."""
    number = 0
    try:
        with disk.open_read(path) as stream:
            while line := stream.readline(JSON_LINE_BYTES_MAX + 1):
                number += 1
                if line[-1] != 0x0A:
                    what = "too long" if len(line) > JSON_LINE_BYTES_MAX else "cut off: it does not end with a newline"
                    raise DataError(f"{path}, line {number}: the line is {what}")
                yield line
    except FileNotFoundError as error:
        raise DataError(f"{path}: the file is missing") from error
    except OSError as error:
        raise DataError(f"{path}, after line {number}: cannot be read: {error.strerror or error}") from error


def read_file_pairs(disk: Disk, path: Path) -> Iterator[Pair]:
    """The pairs of one file, checked for form and order."""
    last_key = b""
    for number, line in enumerate(read_lines(disk, path), 1):
        pair = decode_pair(line, str(path), number)
        if pair.key <= last_key:
            raise _not_above(path, number, pair.key, last_key)
        last_key = pair.key
        yield pair


def verify_file(disk: Disk, path: Path, expected: FileReport, shards: int) -> None:
    """Compare a file with its report in the manifest of a cluster of `shards` shards.

    Raises DataError with the file and, if possible, the line, a few lines or the block of lines.
    """
    held = {entry.shard for entry in expected.shards}
    sums = LineSums(held)
    last_key = b""
    for number, line in enumerate(read_lines(disk, path), 1):
        pair = decode_pair(line, str(path), number)
        if pair.rev is None:
            raise DataError(f'{path}, line {number}: "rev" is missing')
        if pair.key <= last_key:
            raise _not_above(path, number, pair.key, last_key)
        last_key = pair.key
        shard = shard_of(last_key, shards)
        if shard not in held:
            what = f"key {show_bytes(last_key)} belongs to shard {shard}, which this file does not hold"
            raise DataError(f"{path}, line {number}: {what}")
        sums.add(shard, line)
    sums.fold()
    found = sums.report(path.name)
    if found != expected:
        raise DataError(_difference(disk, path, found, expected, shards))


def _not_above(path: Path, number: int, key: bytes, last_key: bytes) -> DataError:
    what = "is there twice" if key == last_key else f"is not above {show_bytes(last_key)} of the line before"
    return DataError(f"{path}, line {number}: key {show_bytes(key)} {what}")


def _difference(disk: Disk, path: Path, found: FileReport, expected: FileReport, shards: int) -> str:
    """The sentence for a file whose lines are well formed and in order, but differ from the manifest."""
    place = str(path)
    differing = [f.shard for f, e in zip(found.shards, expected.shards, strict=True) if f != e]
    block = _first_difference(found.blocks, expected.blocks)
    if found.pairs != expected.pairs:
        if found.pairs < expected.pairs and (block is None or block == found.pairs // BACKUP_BLOCK_LINES):
            # every full block is right, so lines are missing at the end, or just before it
            return f"{place}, line {found.pairs + 1}: the file ends before it, the manifest has {expected.pairs} pairs"
        text = f"{place}: has {found.pairs} pairs, the manifest has {expected.pairs}"
        return text if block is None else f"{text}; the first difference is in {_block_lines(block, found.pairs)}"
    if block is not None:
        place = f"{path}, {_suspects(disk, path, block, set(differing), shards, found.pairs)}"
    if found.sha256 != expected.sha256:
        text = f"{place}: damaged: the sha256 of the file is {found.sha256}, the manifest has {expected.sha256}"
        return text + (f" (shard {', '.join(map(str, differing))})" if differing else "")
    if found.bytes != expected.bytes:
        return f"{place}: has {found.bytes} bytes, the manifest has {expected.bytes}"
    for f, e in zip(found.shards, expected.shards, strict=True):
        if f.pairs != e.pairs:
            return f"{place}: shard {f.shard} has {f.pairs} pairs, the manifest has {e.pairs}"
        if f.sha256 != e.sha256:
            return f"{place}: the sha256 of shard {f.shard} is {f.sha256}, the manifest has {e.sha256}"
    assert block is not None, "reports of equal sums are equal"
    at = slice(8 * block, 8 * block + 8)
    return f"{place}: the crc32 of these lines is {found.blocks[at]}, the manifest has {expected.blocks[at]}"


def _first_difference(found: str, expected: str) -> int | None:
    """The index of the first block that differs; None if the common part is equal."""
    for i in range(0, min(len(found), len(expected)), 8):
        if found[i : i + 8] != expected[i : i + 8]:
            return i // 8
    return None


def _block_lines(block: int, pairs: int) -> str:
    return f"lines {block * BACKUP_BLOCK_LINES + 1}-{min((block + 1) * BACKUP_BLOCK_LINES, pairs)}"


def _suspects(disk: Disk, path: Path, block: int, differing: set[int], shards: int, pairs: int) -> str:
    """The lines of a damaged block that belong to a damaged shard, in words; the whole block if they are many."""
    start = block * BACKUP_BLOCK_LINES
    lines = islice(read_lines(disk, path), start, start + BACKUP_BLOCK_LINES)
    numbers = [
        str(number)
        for number, line in enumerate(lines, start + 1)
        if shard_of(decode_pair(line, str(path), number).key, shards) in differing
    ]
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    if not 1 < len(numbers) <= 12:
        return _block_lines(block, pairs)
    return f"line {', '.join(numbers[:-1])} or {numbers[-1]}"
