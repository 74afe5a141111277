"""Check: verify the data directory of a stopped node, and say what is in it.

I/O shell that only reads: it replays everything as a start would, then lets each table verify its own invariants. What
a start would give up, keep aside or report is a *finding*; a torn end of the log is none, since nothing that was
acknowledged is in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvtcp.errors import KvtcpError
from kvtcp.storage.files import Disk
from kvtcp.storage.manifest import Manifest
from kvtcp.storage.replay import Progress, Replayed, replay


@dataclass(slots=True)
class CheckReport:
    """`lines` describe the directory, `findings` what is wrong with it; empty = nothing."""

    lines: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def check_directory(
    disk: Disk,
    directory: Path,
    manifest: Manifest,
    progress: Progress = lambda *_: None,
    boot: str = "",
) -> CheckReport:
    """Verify everything, in this boot of the machine. Raises VersionError for files of another format, OSError for a
    disk that cannot be read."""
    found = replay(disk, directory, manifest, progress, manifest.power_failed(boot))
    report = CheckReport()
    keys = 0
    for shard, copy in sorted(found.copies.items()):
        if not copy.complete:
            report.findings.append(f"shard {shard} is incomplete: {copy.reason}")
        elif shard not in found.doubts:
            keys += len(copy.table)
            try:
                copy.table.check()
            except (AssertionError, KvtcpError) as error:
                report.findings.append(f"shard {shard}: {error}")
    report.findings += [f"shard {shard} would be incomplete: {reason}" for shard, reason in found.doubts.items()]
    report.findings += [str(damage) for damage in found.damages]
    report.lines = _describe(manifest, found, keys)
    return report


def _describe(manifest: Manifest, found: Replayed, keys: int) -> list[str]:
    whole = sum(copy.complete and shard not in found.doubts for shard, copy in found.copies.items())
    log_bytes = sum(segment.size for segment in found.segments)
    snapshot_bytes = sum(found.snapshot_bytes.values())
    lines = [
        f"durability {manifest.durability}, promised epoch {manifest.promised}, map version {manifest.map_version}, "
        + ("stopped in order" if manifest.clean else "not stopped in order"),
        f"{len(found.copies)} shards, {whole} of them whole, {keys} keys",
        f"{len(found.snapshots)} snapshots, {snapshot_bytes} bytes",
        f"log: {len(found.segments)} segments, {log_bytes} bytes, {found.entries} entries beyond the snapshots, "
        f"durable up to record {found.mark}, {len(found.tail)} records above it",
    ]
    if found.cut:
        lines.append(f"the log ends torn, above everything acknowledged: {found.cut}")
    return lines
