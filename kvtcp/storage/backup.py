"""JSON backups: readable files with one point in time of the whole cluster, published whole or not at all.

    backups/<name>/node-<id>.jsonl      one JSON line per pair, sorted by key (backup_file.py)
    backups/<name>/manifest.json        the cut and the sums of all files (backup_manifest.py)
    backups/.<name>.tmp/                the same, unfinished; nobody reads it

The coordinator calls, in this order: `begin_backup`; every node writes its file into the temporary directory with
`NodeFileWriter`; `write_manifest`; `publish`. Every step makes its bytes durable before the next begins, and the rename
of the directory is the only thing that makes a backup exist. So a crash or a disk error at any point leaves either
no backup or a complete one.

Checking and reading (`verify`, `read_pairs`) need no server. Whatever is in the directory, they give an answer or a
DataError that names the file; an error of the disk while reading is a DataError too.
"""

from __future__ import annotations

import errno
import heapq
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import dropwhile, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Final

from kvtcp.constants import BACKUP_NAME_CHARS_MAX
from kvtcp.errors import DataError, RequestError
from kvtcp.jsonl import Pair
from kvtcp.storage.backup_file import NodeFileWriter, node_file_name, read_file_pairs, verify_file
from kvtcp.storage.backup_manifest import MANIFEST_NAME, NODE_FILE, FileReport, Manifest, ShardCut, ShardSum
from kvtcp.storage.files import OS_DISK, Disk

__all__ = [
    "FileReport", "Manifest", "NodeFileWriter", "ShardCut", "ShardSum", "VerifyReport",
    "backup_name_from_time", "begin_backup", "check_backup_name", "discard", "node_file_name", "publish",
    "read_manifest", "read_pairs", "verify", "write_manifest",
]  # fmt: skip

DISCARD_TRIES: Final = 5  # each node disturbs it once at most, with its one file
_NAME: Final = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{BACKUP_NAME_CHARS_MAX - 1}}}")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A backup that is what it was. `bytes` are those of the node files, `created` is ISO 8601 UTC."""

    pairs: int
    bytes: int
    files: int
    shards: int
    cluster: str
    created: str


# --- names ---------------------------------------------------------------------------------------


def backup_name_from_time(when: datetime) -> str:
    """The name of a backup nobody named, e.g. `20261123T152600Z`. `when` is in UTC."""
    assert when.utcoffset() == timedelta(0), "backups are named by UTC, whatever the machine's time zone"
    return when.strftime("%Y%m%dT%H%M%SZ")


def check_backup_name(name: str) -> str:
    """The name, if it is a plain file name. Raises RequestError."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"backup name {name!r}: allowed are letters, digits and . _ -, not beginning with . or -, "
            f"at most {BACKUP_NAME_CHARS_MAX} characters"
        )
    return name


# --- making --------------------------------------------------------------------------------------


def begin_backup(disk: Disk, backup_dir: Path, name: str, attempt: int = 1) -> Path:
    """Makes the empty temporary directory of a backup and returns its path.

    Each attempt has a directory of its own, so that a node still busy with a failed one cannot drop its file into the
    next. What an earlier backup of this name left unfinished is removed. RequestError if the name is taken or not a
    name, OSError of the disk.
    """
    if disk.exists(backup_dir / check_backup_name(name)):
        raise RequestError(f"backup {name} is there already; choose another name or remove {backup_dir / name}")
    tmp_dir = backup_dir / (f".{name}.tmp" if attempt == 1 else f".{name}.{attempt}.tmp")
    disk.remove_tree(tmp_dir)
    disk.make_directory(tmp_dir)
    return tmp_dir


def discard(disk: Disk, tmp_dir: Path) -> None:
    """Removes what a failed attempt has written. Raises OSError."""
    assert tmp_dir.name.startswith(".") and tmp_dir.name.endswith(".tmp"), "only unfinished backups are discarded"
    for _ in range(DISCARD_TRIES - 1):
        try:
            disk.remove_tree(tmp_dir)
            return
        except OSError as error:
            # a node that is late made a file, or removed its own, after the directory was listed
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
    disk.remove_tree(tmp_dir)


def write_manifest(disk: Disk, directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` durably. DataError, before anything is written, if its parts do not fit together."""
    path = directory / MANIFEST_NAME
    text = manifest.to_json()
    Manifest.from_json(text, str(path))
    disk.remove(path)
    file = disk.create(path)
    try:
        file.write(text.encode("utf-8"))
        file.sync()
    finally:
        file.close()
    disk.sync_directory(directory)


def publish(disk: Disk, tmp_dir: Path, final_dir: Path) -> None:
    """Gives the complete temporary directory its name. Afterwards the backup exists and is durable.

    Raises FileExistsError if the name is taken, else OSError of the disk; then the backup is not published. (Only if
    the disk fails here and refuses to take the name back too, a complete backup stays under its name.)
    """
    assert disk.exists(tmp_dir / MANIFEST_NAME), "the manifest is written before the backup is published"
    if disk.exists(final_dir):  # rename would replace an empty directory
        raise FileExistsError(17, "a backup of this name is there already", str(final_dir))
    disk.sync_directory(tmp_dir)
    disk.rename(tmp_dir, final_dir)
    try:
        disk.sync_directory(final_dir.parent)
    except OSError:
        with suppress(OSError):  # the error above is the one to report
            disk.rename(final_dir, tmp_dir)
        raise


# --- checking and reading ------------------------------------------------------------------------


def read_manifest(directory: Path, disk: Disk = OS_DISK) -> Manifest:
    """The manifest of a backup. Raises DataError that names the file and the field."""
    path = directory / MANIFEST_NAME
    try:
        text = disk.read(path).decode("utf-8")
    except FileNotFoundError as error:
        what = "the file is missing: this is not a complete backup" if disk.exists(directory) else "no such backup"
        raise DataError(f"{path}: {what}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start + 1}") from error
    return Manifest.from_json(text, str(path))


def verify(directory: Path, disk: Disk = OS_DISK) -> VerifyReport:
    """Checks everything about a backup: manifest, files, every line, order, shards, counts and sums.

    Raises DataError that names file and line (or the manifest's field) of the first thing found wrong.
    """
    manifest = read_manifest(directory, disk)
    known = {file.name for file in manifest.files}
    try:
        names = disk.list(directory)
    except OSError as error:
        raise DataError(f"{directory}: cannot be read: {error.strerror or error}") from error
    for name in names:
        if NODE_FILE.fullmatch(name) and name not in known:
            raise DataError(f"{directory / name}: the manifest does not name this file")
    for file in manifest.files:
        verify_file(disk, directory / file.name, file, manifest.shards)
    return VerifyReport(
        pairs=manifest.pairs,
        bytes=manifest.bytes,
        files=len(manifest.files),
        shards=manifest.shards,
        cluster=manifest.cluster,
        created=manifest.created,
    )


def read_pairs(directory: Path, prefix: bytes = b"", disk: Disk = OS_DISK) -> Iterator[Pair]:
    """The pairs whose keys begin with `prefix`, in key order over all files, with bounded memory.

    Form and order of the lines are checked on the way (DataError), sums are not: `verify` comes first.
    """
    manifest = read_manifest(directory, disk)
    files = [read_file_pairs(disk, directory / file.name) for file in manifest.files]
    if prefix:
        files = [_with_prefix(pairs, prefix) for pairs in files]
    return heapq.merge(*files, key=itemgetter(0))


def _with_prefix(pairs: Iterator[Pair], prefix: bytes) -> Iterator[Pair]:
    # keys with a common prefix are neighbours in key order, and the prefix itself is the lowest of them
    return takewhile(lambda pair: pair.key.startswith(prefix), dropwhile(lambda pair: pair.key < prefix, pairs))
