"""Proposals: changes of the cluster map by the parts of a controller, each with the versions that nodes have stored.

Pure. A node stores the version of the map that it was sent with HELLO before it reports. The map keeps these versions
(`ClusterMap.heard`), so that the next coordinator knows which copies have seen which in-sync sets.

Invariant: a version is only recorded for a node one of whose copies the map names, or will name after the founding. A
node without such a copy has another directory. The one with the members' data may still come back, if it was not
mounted for example: it must not be taken for an older copy then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvtcp.cluster.changes import Edit, MapChanges
from kvtcp.cluster.map import ClusterMap
from kvtcp.protocol.link import Report


class Proposals:
    """Proposed changes of one map. `reports` are those of the linked nodes, which the controller keeps."""

    def __init__(self, changes: MapChanges, reports: Mapping[str, Report]) -> None:
        self._changes = changes
        self._reports = reports
        self._stored: dict[str, int] = {}  # node -> version of the map that it is known to have stored
        self._named: tuple[ClusterMap | None, set[str]] = (None, set())  # nodes with copies that this map names

    @property
    def map(self) -> ClusterMap:
        """The cluster map in the config store."""
        return self._changes.map

    def node_stored(self, node: str, version: int) -> None:
        """Note that a node reported, and so has stored this version."""
        self._stored[node] = version
        self.reports_changed()

    def reports_changed(self) -> None:
        """Note that a report came or went."""
        self._named = (None, set())

    def propose(
        self, edit: Edit, done: Callable[[ClusterMap], None], failed: Callable[[Exception], None] | None = None
    ) -> None:
        """Change the map, and record in it the versions that nodes have stored; see MapChanges.propose."""
        if self._named[0] is not self.map:
            self._named = (self.map, {node for node, report in self._reports.items() if self._is_named(node, report)})
        heard = {node: self._stored[node] for node in sorted(self._named[1])}
        self._changes.propose(lambda old: edit(old).with_heard(heard), done, failed)

    def _is_named(self, node: str, report: Report) -> bool:
        """Whether a copy of this node is the one that the map names, or will name after the founding."""
        return any(
            number < self.map.shards and dict(self.map.members[number]).get(node) in (copy.replica_id, "")
            for number, copy in report.copies.items()
        )
