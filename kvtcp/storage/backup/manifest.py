"""The manifest of a backup: its content, its point in time, and the sums that prove that it is unchanged.

Pure. `manifest.json` is one JSON object (docs/backup.md has every field):

    format, format_version, kvtcp_version, cluster, created, shards,
    cut:    [[shard, epoch, seq, chain], ...]     one row per shard, in order: the point in time
    files:  [{name, bytes, sha256, pairs, shards: [[shard, pairs, sha256], ...], blocks}, ...]     sorted by name
    manifest_sha256                               sha256 of the file itself with these 64 digits replaced by zeros

Invariants, checked when a manifest is read and before one is written: the cut has every shard once; every shard, even
one without pairs, is in exactly one file; the pairs of a file are the sum of those of its shards; a file has one block
(crc32 of BACKUP_BLOCK_LINES lines, 8 hexadecimal digits) per begun hundred lines.

`from_json` trusts nothing: any text gives a BackupManifest, or one DataError that names file and field.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from kvtcp.constants import BACKUP_BLOCK_LINES, BACKUP_FORMAT_VERSION, INTEGER_MAX, SHARDS_MAX
from kvtcp.errors import DataError

FORMAT: Final = "kvtcp-backup"
MANIFEST_NAME: Final = "manifest.json"
NODE_FILE: Final = re.compile(r"node-[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\.jsonl")

_NO_SEAL: Final = "0" * 64
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_BLOCKS: Final = re.compile(r"(?:[0-9a-f]{8})*")
_MANIFEST_FIELDS: Final = (
    "format", "format_version", "kvtcp_version", "cluster", "created", "shards", "cut", "files", "manifest_sha256",
)  # fmt: skip
_FILE_FIELDS: Final = ("name", "bytes", "sha256", "pairs", "shards", "blocks")


@dataclass(frozen=True, slots=True)
class ShardSum:
    """A shard in a file. `sha256` is over its lines, newlines included, in the order of the file."""

    shard: int
    pairs: int
    sha256: str


@dataclass(frozen=True, slots=True)
class FileReport:
    """The sums of one node's file. `blocks` is one string: 8 hexadecimal digits of crc32 per block of lines."""

    name: str
    bytes: int
    sha256: str
    pairs: int
    shards: tuple[ShardSum, ...]
    blocks: str

    def to_fields(self) -> dict[str, Any]:
        """Plain values for msgpack or JSON."""
        return {
            "name": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "pairs": self.pairs,
            "shards": [[s.shard, s.pairs, s.sha256] for s in self.shards],
            "blocks": self.blocks,
        }

    @staticmethod
    def from_fields(fields: object, where: str) -> FileReport:
        """The report from the values of `to_fields`, also with text as bytes, as the wire has it. Raises DataError,
        which begins with `where`."""
        members = _members(_as_text(fields), _FILE_FIELDS, where, "")
        return _file_report(members, where, "")


@dataclass(frozen=True, slots=True)
class ShardCut:
    """The position of one shard at the point in time: epoch, last sequence number included, chain at that number."""

    shard: int
    epoch: int
    seq: int
    chain: int


@dataclass(frozen=True)
class BackupManifest:
    """The content of `manifest.json`. `created` is ISO 8601 in UTC, `shards` the number of shards of the cluster."""

    cluster: str
    created: str
    kvtcp_version: str
    shards: int
    cut: tuple[ShardCut, ...]
    files: tuple[FileReport, ...]
    format_version: int = BACKUP_FORMAT_VERSION

    @property
    def pairs(self) -> int:
        """Number of pairs in the whole backup."""
        return sum(file.pairs for file in self.files)

    @property
    def bytes(self) -> int:
        """Length of all node files together."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> str:
        """The text of the file, sealed with its own sha256. Equal manifests give equal texts."""
        head = {
            "format": FORMAT,
            "format_version": self.format_version,
            "kvtcp_version": self.kvtcp_version,
            "cluster": self.cluster,
            "created": self.created,
            "shards": self.shards,
        }
        members = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        members.append('"cut": ' + _lines_of([[c.shard, c.epoch, c.seq, c.chain] for c in self.cut], "    "))
        members.append('"files": [\n    ' + ",\n    ".join(_file_json(file) for file in self.files) + "\n  ]")
        members.append(f'"manifest_sha256": "{_NO_SEAL}"')
        text = "{\n  " + ",\n  ".join(members) + "\n}\n"
        seal = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return text[: text.rindex(_NO_SEAL)] + seal + text[text.rindex(_NO_SEAL) + 64 :]

    @staticmethod
    def from_json(text: str, source: str) -> BackupManifest:
        """The manifest in a text. Raises DataError, which names `source` and the field."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            raise DataError(f"{source}, line {error.lineno}: not JSON: {what}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: not JSON that can be read: {error}") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise DataError(f'{source}: "format" is not "{FORMAT}": this is not the manifest of a backup')
        # The version first: another one may have other fields and other sums.
        version = fields.get("format_version")
        if type(version) is not int or version != BACKUP_FORMAT_VERSION:
            raise DataError(
                f'{source}: "format_version" is {version!r}, this version of kvtcp reads {BACKUP_FORMAT_VERSION}'
            )
        members = _members(fields, _MANIFEST_FIELDS, source, "")
        manifest = BackupManifest(
            cluster=_string(members, "cluster", source, ""),
            created=_time(members, source),
            kvtcp_version=_string(members, "kvtcp_version", source, ""),
            shards=_integer(members["shards"], "shards", source, 1, SHARDS_MAX),
            cut=tuple(_shard_cut(row, f"cut[{i}]", source) for i, row in enumerate(_array(members, "cut", source, ""))),
            files=tuple(
                _file_report(_members(f, _FILE_FIELDS, source, f"files[{i}]."), source, f"files[{i}].")
                for i, f in enumerate(_array(members, "files", source, ""))
            ),
        )
        manifest.check(source)
        _check_seal(text, _hash(members, "manifest_sha256", source, ""), source)
        return manifest

    def check(self, source: str) -> None:
        """Verify that the parts fit together. Raises DataError, which names `source` and the field."""
        if [c.shard for c in self.cut] != list(range(self.shards)):
            raise DataError(f'{source}: "cut" does not have every shard from 0 to {self.shards - 1} once, in order')
        holder: dict[int, str] = {}
        for i, file in enumerate(self.files):
            if i and file.name <= self.files[i - 1].name:
                raise DataError(f'{source}: "files[{i}].name" {file.name} is given twice or not in order')
            for j, entry in enumerate(file.shards):
                if entry.shard >= self.shards:
                    raise DataError(f'{source}: "files[{i}].shards[{j}]" is shard {entry.shard} of {self.shards}')
                if entry.shard in holder:
                    raise DataError(
                        f'{source}: "files[{i}].shards[{j}]": shard {entry.shard} is in {holder[entry.shard]} too'
                    )
                holder[entry.shard] = file.name
        missing = [shard for shard in range(self.shards) if shard not in holder]
        if missing:
            raise DataError(f'{source}: "files": no file holds shard {missing[0]} ({len(missing)} shards are missing)')


def _file_json(file: FileReport) -> str:
    fields = file.to_fields()
    rows = _lines_of(fields.pop("shards"), "        ")
    blocks = fields.pop("blocks")
    members = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    members += [f'"shards": {rows}', f'"blocks": "{blocks}"']
    return "{\n      " + ",\n      ".join(members) + "\n    }"


def _lines_of(rows: Sequence[object], indent: str) -> str:
    """A JSON array with one element a line, so that two manifests can be compared by eye and by diff."""
    if not rows:
        return "[]"
    return "[\n" + indent + f",\n{indent}".join(json.dumps(row) for row in rows) + "\n" + indent[:-2] + "]"


def _check_seal(text: str, seal: str, source: str) -> None:
    found = hashlib.sha256(text.replace(seal, _NO_SEAL).encode("utf-8", "surrogatepass")).hexdigest()
    if found != seal:
        raise DataError(f'{source}: the manifest was changed: its sha256 is {found}, "manifest_sha256" is {seal}')


def _shard_cut(value: object, path: str, source: str) -> ShardCut:
    return ShardCut(*(_integer(n, f"{path}[{j}]", source) for j, n in enumerate(_row(value, 4, path, source))))


def _file_report(members: dict[str, Any], source: str, at: str) -> FileReport:
    """The report in an object. `at` is the path of the object in the document, for messages: "" or "files[1]."."""
    name = _string(members, "name", source, at)
    if not NODE_FILE.fullmatch(name):
        raise DataError(f'{source}: "{at}name" {name!r} is not the name of a node\'s file (node-<id>.jsonl)')
    shards = []
    for i, row in enumerate(_array(members, "shards", source, at)):
        path = f"{at}shards[{i}]"
        shard, pairs, sha256 = _row(row, 3, path, source)
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise DataError(f'{source}: "{path}[2]" is not a sha256 of 64 hexadecimal digits')
        shards.append(ShardSum(_integer(shard, f"{path}[0]", source), _integer(pairs, f"{path}[1]", source), sha256))
        if i and shards[-1].shard <= shards[-2].shard:
            raise DataError(f'{source}: "{path}": shard {shard} is given twice or not in order')
    blocks = _string(members, "blocks", source, at, empty=True)
    if not _BLOCKS.fullmatch(blocks):
        raise DataError(f'{source}: "{at}blocks" is not made of groups of 8 hexadecimal digits')
    report = FileReport(
        name=name, bytes=_integer(members["bytes"], f"{at}bytes", source),
        sha256=_hash(members, "sha256", source, at), pairs=_integer(members["pairs"], f"{at}pairs", source),
        shards=tuple(shards), blocks=blocks,
    )  # fmt: skip
    total = sum(s.pairs for s in shards)
    if report.pairs != total:
        raise DataError(f'{source}: "{at}pairs" is {report.pairs}, its shards have {total}')
    expected = -(-report.pairs // BACKUP_BLOCK_LINES)
    if len(blocks) != 8 * expected:
        raise DataError(f'{source}: "{at}blocks" has {len(blocks) // 8} blocks, {report.pairs} pairs have {expected}')
    return report


def _as_text(value: object) -> object:
    """`value` with text in place of bytes, at any depth."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list | tuple):
        return [_as_text(v) for v in value]
    if isinstance(value, dict):
        return {_as_text(k): _as_text(v) for k, v in value.items()}
    return value


def _members(fields: object, names: Sequence[str], source: str, at: str) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise DataError(f'{source}: "{at[:-1]}" is not an object' if at else f"{source}: not an object")
    for name in names:
        if name not in fields:
            raise DataError(f'{source}: "{at}{name}" is missing')
    for name in fields:
        if name not in names:
            raise DataError(f"{source}: {at + str(name)!r} is not a field of this format")
    return fields


def _integer(value: object, path: str, source: str, low: int = 0, high: int = INTEGER_MAX) -> int:
    if type(value) is not int or not low <= value <= high:
        raise DataError(f'{source}: "{path}" must be an integer from {low} to {high}')
    return value


def _string(members: dict[str, Any], name: str, source: str, at: str, *, empty: bool = False) -> str:
    value = members[name]
    if not isinstance(value, str) or not (value or empty):
        raise DataError(f'{source}: "{at}{name}" is not a string' + ("" if empty else " with something in it"))
    return value


def _hash(members: dict[str, Any], name: str, source: str, at: str) -> str:
    value = _string(members, name, source, at)
    if not _SHA256.fullmatch(value):
        raise DataError(f'{source}: "{at}{name}" is not a sha256 of 64 hexadecimal digits')
    return value


def _array(members: dict[str, Any], name: str, source: str, at: str) -> list[Any]:
    value = members[name]
    if not isinstance(value, list):
        raise DataError(f'{source}: "{at}{name}" is not an array')
    return value


def _row(value: object, items: int, path: str, source: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != items:
        raise DataError(f'{source}: "{path}" is not an array of {items} items')
    return value


def _time(members: dict[str, Any], source: str) -> str:
    text = _string(members, "created", source, "")
    try:
        offset = datetime.fromisoformat(text).utcoffset()
    except ValueError:
        offset = None
    if offset != timedelta(0):
        raise DataError(f'{source}: "created" {text!r} is not an ISO 8601 time in UTC')
    return text
