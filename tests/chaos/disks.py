"""What the nodes of a stopped cluster hold, read from their data directories, and whether the members agree.

Only the cluster map says who is a member of which shard, and by which disk. Members must be complete, at one position
(epoch, number, chain), and hold the same cells; what a node has beyond that (the copy of a node that was thrown out)
is nobody's business.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvtcp.storage.disk.replay import replay
from kvtcp.storage.disk.store import read_store_manifest
from kvtcp.storage.files import OS_DISK
from kvtcp.storage.shard.copy import Copy

FAR_MS: Final = 1 << 50  # whatever has a deadline is gone by then


def read_map(data: Path) -> dict[str, Any]:
    """The cluster map that a coordinator left."""
    value: dict[str, Any] = json.loads((data / "coordinator" / "map.json").read_text())["value"]
    return value


def read_copies(directory: Path) -> dict[int, Copy]:
    """All copies of a stopped node."""
    manifest = read_store_manifest(OS_DISK, directory)
    return {} if manifest is None else replay(OS_DISK, directory, manifest).copies


def rows_of(copy: Copy) -> dict[str, str]:
    """Its pairs without a deadline."""
    return {row[0].decode(): row[1].decode() for row in copy.table.rows(b"", None, None, False, FAR_MS)}


def read_members(
    cluster_map: dict[str, Any], directory_of: Callable[[str], Path]
) -> tuple[list[dict[str, str]], list[str]]:
    """What the members hold in all, by version, and what is broken: one version and nothing if all is well."""
    copies = {node: read_copies(directory_of(node)) for node in cluster_map["nodes"]}
    broken: list[str] = []
    by_shard: list[list[dict[str, str]]] = []  # the different contents of each shard
    for shard, members in enumerate(cluster_map["members"]):
        seen: dict[tuple[Any, ...], list[str]] = {}
        found: list[dict[str, str]] = []
        for node, disk in members:
            copy = copies[node].get(shard)
            if copy is None or not copy.complete or copy.disk != disk:
                held = "nothing" if copy is None else f"{copy.disk} ({'' if copy.complete else 'in'}complete)"
                broken.append(f"shard {shard}: {node} is a member by {disk} and holds {held}")
                continue
            identity = (*copy.table.position, copy.table.digest())
            if identity not in seen:
                found.append(rows_of(copy))
            seen.setdefault(identity, []).append(node)
        if len(seen) > 1:
            broken.append(f"shard {shard}: members differ in (epoch, number, chain, digest): {seen}")
        by_shard.append(found)
    versions = []
    for number in range(max(map(len, by_shard), default=0)):
        version: dict[str, str] = {}
        for found in by_shard:
            version.update(found[min(number, len(found) - 1)] if found else {})
        versions.append(version)
    return versions, broken
