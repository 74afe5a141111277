"""JSON backups: readable files of the whole cluster at one point in time, published whole or not at all.

    backups/<name>/node-<id>.jsonl      one JSON line per pair, sorted by key (file.py)
    backups/<name>/manifest.json        the cut and the sums of all files (manifest.py)
    backups/.<name>.tmp/                the same, unfinished; never read

The coordinator calls, in this order: `begin_backup`; every node writes its file into the temporary directory with
`NodeFileWriter`; `write_manifest`; `publish`. Every step makes its bytes durable before the next begins, and a backup
exists from the rename of the directory on. So a crash or a disk error at any point leaves either no backup or a
complete one.

Verifying and reading (`verify`, `read_pairs`) need no server. Whatever the directory contains, they
give an answer or a DataError that names the file; an error of the disk while reading is a DataError too.
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
from kvtcp.storage.backup.file import NodeFileWriter, node_file_name, read_file_pairs, verify_file
from kvtcp.storage.backup.manifest import MANIFEST_NAME, NODE_FILE, BackupManifest, FileReport, ShardCut, ShardSum
from kvtcp.storage.files import OS_DISK, Disk

__all__ = [
    "BackupManifest",
    "FileReport",
    "NodeFileWriter",
    "ShardCut",
    "ShardSum",
    "VerifyReport",
    "backup_name_from_time",
    "begin_backup",
    "check_backup_name",
    "discard",
    "node_file_name",
    "publish",
    "read_manifest",
    "read_pairs",
    "verify",
    "write_manifest",
]  # fmt: skip

DISCARD_TRIES: Final = 5  # a late node disturbs an attempt once at most, with its one file
_NAME: Final = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{BACKUP_NAME_CHARS_MAX - 1}}}")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Figures of an undamaged backup. `bytes` counts the node files, `created` is ISO 8601 UTC."""

    pairs: int
    bytes: int
    files: int
    shards: int
    cluster: str
    created: str


# --- names ---------------------------------------------------------------------------------------


def backup_name_from_time(when: datetime) -> str:
    """The default name of a backup, e.g. `20261123T152600Z`. `when` is in UTC."""
    assert when.utcoffset() == timedelta(0), "backups are named by UTC, whatever the machine's time zone"
    return when.strftime("%Y%m%dT%H%M%SZ")


def check_backup_name(name: str) -> str:
    """`name`, if it is a plain file name. Raises RequestError."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"backup name {name!r}: allowed are letters, digits and . _ -, not beginning with . or -, "
            f"at most {BACKUP_NAME_CHARS_MAX} characters"
        )
    return name


# --- making --------------------------------------------------------------------------------------


def begin_backup(disk: Disk, backup_dir: Path, name: str, attempt: int = 1) -> Path:
    """Create the empty temporary directory of a backup; returns its path.

    Each attempt has a directory of its own: a node that is still busy with a failed attempt cannot put its file into
    the next. An unfinished backup of the same name is removed. Raises RequestError if the name is taken or no name,
    OSError.
    """
    if disk.exists(backup_dir / check_backup_name(name)):
        raise RequestError(f"backup {name} is there already; choose another name or remove {backup_dir / name}")
    tmp_dir = backup_dir / (f".{name}.tmp" if attempt == 1 else f".{name}.{attempt}.tmp")
    disk.remove_tree(tmp_dir)
    disk.make_directory(tmp_dir)
    return tmp_dir


def discard(disk: Disk, tmp_dir: Path) -> None:
    """Remove the temporary directory of a failed attempt. Raises OSError."""
    assert tmp_dir.name.startswith(".") and tmp_dir.name.endswith(".tmp"), "only unfinished backups are discarded"
    for _ in range(DISCARD_TRIES - 1):
        try:
            disk.remove_tree(tmp_dir)
            return
        except OSError as error:
            # after the directory was listed, a late node created its file or removed it
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
    disk.remove_tree(tmp_dir)


def write_manifest(disk: Disk, directory: Path, manifest: BackupManifest) -> None:
    """Write `manifest.json` durably. Raises DataError, before anything is written, if its parts do not fit together."""
    path = directory / MANIFEST_NAME
    text = manifest.to_json()
    BackupManifest.from_json(text, str(path))
    disk.remove(path)
    file = disk.create(path)
    try:
        file.write(text.encode("utf-8"))
        file.sync()
    finally:
        file.close()
    disk.sync_directory(directory)


def publish(disk: Disk, tmp_dir: Path, final_dir: Path) -> None:
    """Give the complete temporary directory its name. Afterwards the backup exists and is durable.

    Raises FileExistsError if the name is taken, OSError if the disk fails; after either the backup is not published.
    (One exception: if the disk fails, and then fails to take the name back, a complete backup stays under its name.)
    """
    assert disk.exists(tmp_dir / MANIFEST_NAME), "the manifest is written before the backup is published"
    if disk.exists(final_dir):  # rename would replace an empty directory
        raise FileExistsError(17, "a backup of this name is there already", str(final_dir))
    disk.sync_directory(tmp_dir)
    disk.rename(tmp_dir, final_dir)
    try:
        disk.sync_directory(final_dir.parent)
    except OSError:
        with suppress(OSError):  # the first error is the one to report
            disk.rename(final_dir, tmp_dir)
        raise


# --- checking and reading ------------------------------------------------------------------------


def read_manifest(directory: Path, disk: Disk = OS_DISK) -> BackupManifest:
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
    return BackupManifest.from_json(text, str(path))


def verify(directory: Path, disk: Disk = OS_DISK) -> VerifyReport:
    """Verify a whole backup: manifest, files, every line, order, shards, counts and sums.

    Raises DataError with file and line (or field of the manifest) of the first fault.
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
        pairs=manifest.pairs, bytes=manifest.bytes, files=len(manifest.files), shards=manifest.shards,
        cluster=manifest.cluster, created=manifest.created,
    )  # fmt: skip


def read_pairs(directory: Path, prefix: bytes = b"", disk: Disk = OS_DISK) -> Iterator[Pair]:
    """The pairs whose keys begin with `prefix`, in key order over all files, with bounded memory.

    Form and order of the lines are checked on the way (DataError). Sums are not: call `verify` first.
    """
    manifest = read_manifest(directory, disk)
    files = [read_file_pairs(disk, directory / file.name) for file in manifest.files]
    if prefix:
        files = [_with_prefix(pairs, prefix) for pairs in files]
    return heapq.merge(*files, key=itemgetter(0))


def _with_prefix(pairs: Iterator[Pair], prefix: bytes) -> Iterator[Pair]:
    # keys with a common prefix are neighbours in key order, and the prefix itself is the lowest of them
    return takewhile(lambda pair: pair.key.startswith(prefix), dropwhile(lambda pair: pair.key < prefix, pairs))
