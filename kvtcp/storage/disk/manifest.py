"""The manifest of a node: everything but its data that must survive a restart.

I/O shell (`files`) around a small JSON file, replaced whole: temporary file, fsync, rename, fsync of the directory.

    manifest.json   {"format", "crc32" of the canonical JSON of "node", "node": {
        "directory"     id of the data directory, 16 hexadecimal digits: names it in log and snapshots
        "durability"    mode of the process that wrote it
        "boot"          id of the boot of the machine in which it was written
        "clean"         whether that process ended in order, everything written
        "promised", "coordinator"       highest epoch accepted, and the coordinator that has it
        "map_version", "map"            highest version of the cluster map seen, and that map as its coordinator sent it
        "segment"       first LSN of the newest segment at that time: a log without one as new was cut
        "durable_lsn"   highest LSN known to be on the disk at that time: a log that ends before it was cut
        "shards"        {number: [disk, generation, complete, reason]}      the copies; see copy.py
        "generations"   {number: generation}    highest generation of all copies of a shard on this node, dropped ones
                        included: the log may have their entries. A shard that is missing never had another copy
    }}

Invariant: everything that a report tells a coordinator is still true after a restart. So promise and copies are written
here before the report is sent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from kvtcp.constants import MANIFEST_FORMAT_VERSION
from kvtcp.storage.disk.log_format import DIRECTORY_BYTES, FormatError, VersionError
from kvtcp.storage.files import Disk

FILE: Final = "manifest.json"

CopyRow = tuple[str, int, bool, str]  # disk, generation, complete, reason


@dataclass(slots=True)
class Manifest:
    """The fields; `shards` maps shard numbers to (disk, generation, complete, reason)."""

    directory: bytes
    durability: str
    boot: str = ""
    clean: bool = False
    promised: int = 0
    coordinator: str = ""
    map_version: int = 0
    map: bytes = b""
    segment: int = 0
    durable_lsn: int = 0
    shards: dict[int, CopyRow] = field(default_factory=dict)
    generations: dict[int, int] = field(default_factory=dict)

    def power_failed(self, boot: str) -> bool:
        """Whether the machine was restarted (its present boot is `boot`) while a process ran in a mode that does not
        sync. Then any part of its last writes may be missing. If the system has no boot id (`boot` is empty), a restart
        is assumed."""
        return self.durability != "sync" and not self.clean and (not boot or self.boot != boot)

    def encode(self) -> bytes:
        """The file's content."""
        node = {
            "directory": self.directory.hex(),
            "durability": self.durability,
            "boot": self.boot,
            "clean": self.clean,
            "promised": self.promised,
            "coordinator": self.coordinator,
            "map_version": self.map_version,
            "map": self.map.decode(),
            "segment": self.segment,
            "durable_lsn": self.durable_lsn,
            "shards": {str(shard): list(row) for shard, row in sorted(self.shards.items())},
            "generations": {str(shard): number for shard, number in sorted(self.generations.items())},
        }
        content = {"format": MANIFEST_FORMAT_VERSION, "crc32": _sum(node), "node": node}
        return json.dumps(content, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """The manifest in a file's content. Raises VersionError, FormatError."""
        try:
            content = json.loads(data)
            version = content["format"]
            if type(version) is int and version != MANIFEST_FORMAT_VERSION:
                raise VersionError(
                    f"it has format {version}, this version of kvtcp knows format {MANIFEST_FORMAT_VERSION}"
                )
            node = content["node"]
            if content["crc32"] != _sum(node):
                raise FormatError("its sum is wrong")
            directory = bytes.fromhex(node["directory"])
            if len(directory) != DIRECTORY_BYTES:
                raise FormatError("its directory id has the wrong length")
            return cls(
                directory=directory,
                durability=node["durability"],
                boot=node["boot"],
                clean=node["clean"],
                promised=node["promised"],
                coordinator=node["coordinator"],
                map_version=node["map_version"],
                map=node["map"].encode(),
                segment=node["segment"],
                durable_lsn=node["durable_lsn"],
                shards={
                    int(shard): (disk, generation, complete, reason)
                    for shard, (disk, generation, complete, reason) in node["shards"].items()
                },
                generations={int(shard): number for shard, number in node["generations"].items()},
            )
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise FormatError(f"it is not a manifest of a node ({error!r})") from error


def _sum(node: dict[str, Any]) -> int:
    return crc32(json.dumps(node, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(disk: Disk, directory: Path) -> Manifest | None:
    """The manifest in a data directory, None if there is none. Raises VersionError, FormatError, OSError."""
    try:
        data = disk.read(directory / FILE)
    except FileNotFoundError:
        return None
    return Manifest.parse(data)


def write_manifest(disk: Disk, directory: Path, data: bytes) -> None:
    """Replace the manifest by an encoded one, durably. After an OSError the old or the new one may be there."""
    temporary = directory / (FILE + ".tmp")
    disk.remove(temporary)
    file = disk.create(temporary)
    try:
        file.write(data)
        file.sync()
    finally:
        file.close()
    disk.rename(temporary, directory / FILE)
    disk.sync_directory(directory)
