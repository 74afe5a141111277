"""Check: verify the data directory of a stopped node, and describe its content.

I/O shell that only reads: it replays everything as a start would, then lets each table verify its own invariants. Each
thing that a start would give up, move aside or report is a *finding*. A torn end of the log is none, because nothing in
it was acknowledged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvtcp.errors import KvtcpError
from kvtcp.storage.disk.manifest import Manifest
from kvtcp.storage.disk.replay import Replayed, ReplayProgress, replay
from kvtcp.storage.files import Disk

SHARDS_SHOWN: Final = 8  # numbers named of all shards with one reason


@dataclass(slots=True)
class CheckReport:
    """`lines` describe the directory. `findings` are the things wrong with it; empty = none."""

    lines: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def by_reason(reasons: Mapping[int, str]) -> list[tuple[str, str]]:
    """Shards grouped by reason: ("shard 3", reason), ("64 shards (0, 1, 2, ...)", reason)."""
    shards: dict[str, list[int]] = {}
    for shard, reason in sorted(reasons.items()):
        shards.setdefault(reason, []).append(shard)
    named = []
    for reason, numbers in shards.items():
        first = ", ".join(map(str, numbers[:SHARDS_SHOWN]))
        more = ", ..." if len(numbers) > SHARDS_SHOWN else ""
        named.append((f"shard {first}" if len(numbers) == 1 else f"{len(numbers)} shards ({first}{more})", reason))
    return named


def check_directory(
    disk: Disk, directory: Path, manifest: Manifest, progress: ReplayProgress = lambda *_: None, boot: str = "",
) -> CheckReport:  # fmt: skip
    """Verify a data directory; `boot` is the present boot of the machine. Raises VersionError for files of another
    format, OSError for a disk that cannot be read."""
    found = replay(disk, directory, manifest, progress, manifest.power_failed(boot))
    report = CheckReport(findings=[str(damage) for damage in found.damages])
    incomplete = {shard: copy.reason for shard, copy in found.copies.items() if not copy.complete}
    report.findings += [f"incomplete: {shards}: {reason}" for shards, reason in by_reason(incomplete)]
    report.findings += [f"would be incomplete: {shards}: {reason}" for shards, reason in by_reason(found.doubts)]
    keys = 0
    for shard, copy in sorted(found.copies.items()):
        if copy.complete and shard not in found.doubts:
            keys += len(copy.table)
            try:
                copy.table.check()
            except (AssertionError, KvtcpError) as error:
                report.findings.append(f"shard {shard}: {error}")
    report.lines = _describe(manifest, found, keys)
    return report


def _describe(manifest: Manifest, found: Replayed, keys: int) -> list[str]:
    whole = sum(copy.complete and shard not in found.doubts for shard, copy in found.copies.items())
    log_bytes = sum(segment.size for segment in found.segments)
    snapshot_bytes = sum(found.snapshot_bytes.values())
    above = sum(bool(record.entries()) for record in found.tail)  # not the empty one of a clean stop
    lines = [
        f"durability {manifest.durability}, promised epoch {manifest.promised}, map version {manifest.map_version}, "
        + ("stopped in order" if manifest.clean else "not stopped in order"),
        f"{len(found.copies)} shards, {whole} of them whole, {keys} keys",
        f"{_counted(len(found.snapshots), 'snapshot')}, {snapshot_bytes} bytes",
        f"log: {_counted(len(found.segments), 'segment')}, {log_bytes} bytes, {_counted(found.entries, 'entry')} "
        f"beyond the snapshots, durable up to record {found.mark}, {_counted(above, 'record')} with data above it",
    ]
    if found.cut:
        lines.append(f"the log ends torn, above everything acknowledged: {found.cut}")
    return lines


def _counted(count: int, what: str) -> str:
    """A count with its noun: no segments, 1 segment, 2 segments; 3 entries."""
    if count == 1:
        return f"1 {what}"
    return f"{count or 'no'} {what.removesuffix('y')}{'ies' if what.endswith('y') else 's'}"
