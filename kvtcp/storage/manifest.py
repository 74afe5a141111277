"""The manifest of a node: what it must not forget, apart from its data.

I/O shell (`files`) around a small JSON file, replaced whole: temporary file, fsync, rename, fsync of the directory.

    manifest.json   {"format", "crc32" of the canonical JSON of "node", "node": {
        "directory"     id of the data directory, 16 hexadecimal digits: names it in log and snapshots
        "durability"    mode of the process that wrote it
        "boot"          id of the boot of the machine in which it was written
        "clean"         whether that process ended in order, everything written
        "promised", "coordinator"       highest epoch accepted, and whose it is
        "map_version", "map"            highest version of the cluster map seen, and that map as its coordinator sent it
        "segment"       first LSN of the newest segment when this was written: there is one at least as new
        "durable_lsn"   highest LSN known to be on the disk then: a log that ends before it was cut
        "shards"        {number: [disk, generation, complete, reason]}      the copies; see copy.py
        "generations"   {number: generation}    highest ever given to a copy of that shard here, also to one that was
                        dropped: the log may have its entries. A shard that is missing never had another copy
    }}

Invariant: a report to a coordinator says nothing that a restart would not say again, so promise and copies are written
here before it is sent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from kvtcp.constants import MANIFEST_FORMAT_VERSION
from kvtcp.storage.files import Disk
from kvtcp.storage.log_format import DIRECTORY_BYTES, FormatError, VersionError

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
        sync: then nobody knows what of its last writes is on the disk. A system that does not tell (`boot` empty) may
        have been."""
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
        """Raises VersionError, FormatError."""
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
                shards={int(shard): (row[0], row[1], row[2], row[3]) for shard, row in node["shards"].items()},
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
    """Replace the manifest by an encoded one, durably. Raises OSError: then either may be there."""
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
