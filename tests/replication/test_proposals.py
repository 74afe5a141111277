"""Tests of proposals: the versions that nodes are known to have stored go with every change of the map."""

from __future__ import annotations

from kvtcp.cluster.changes import MapChanges
from kvtcp.cluster.store import Outcome
from kvtcp.protocol.link import CopyReport, Report
from kvtcp.replication.proposals import Proposals
from tests.support.replication_fakes import make_map


class Case:
    """Two nodes with one shard, whose copies have the disk "disk"."""

    def __init__(self, disk: str = "disk") -> None:
        self.changes = MapChanges(make_map(2, 2, shards=1, disk=disk))
        self.reports: dict[str, Report] = {}
        self.proposals = Proposals(self.changes, self.reports)

    def report(self, node: str, version: int, disk: str = "disk", number: int = 0) -> None:
        """A node reports that stored this version."""
        copies = {number: CopyReport(disk)}
        self.reports[node] = Report(node, 1, "sync", stamp_ms=0, promised=2, map_version=0, space=0, copies=copies)
        self.proposals.node_stored(node, version)

    def propose(self) -> dict[str, int]:
        """A change that changes nothing else; what the map says then."""
        told: list[object] = []
        self.proposals.propose(lambda old: old, told.append)
        if self.changes.to_send(0) is not None:
            self.changes.on_outcome(Outcome.DONE, now_ms=0)
        assert told == [self.proposals.map]
        return dict(self.proposals.map.heard)


def test_versions_go_with_a_change() -> None:
    """Of all linked nodes; they only grow, and stay when the link is gone."""
    case = Case()
    assert case.propose() == {}
    case.report("n1", 5)
    case.report("n2", 4)
    assert case.propose() == {"n1": 5, "n2": 4}
    del case.reports["n2"]
    case.proposals.reports_changed()
    case.report("n1", 7)
    assert case.propose() == {"n1": 7, "n2": 4}


def test_a_node_with_another_directory() -> None:
    """Nothing is recorded of it: no copy of it is the one that the map names."""
    case = Case()
    case.report("n1", 5, disk="other")
    case.report("n2", 5, number=9)
    assert case.propose() == {}


def test_a_cluster_that_is_being_founded() -> None:
    """The map names no disk yet, and will name this one."""
    case = Case(disk="")
    case.report("n1", 5, disk="new")
    assert case.propose() == {"n1": 5}


def test_reports_are_looked_at_again_when_the_map_changed() -> None:
    """A copy may be named only now."""
    case = Case()
    case.report("n1", 5, disk="new")
    assert case.propose() == {}
    case.changes.propose(lambda old: old.with_replica_ids({0: {"n1": "new"}}), lambda stored: None)
    assert case.changes.to_send(0) is not None
    case.changes.on_outcome(Outcome.DONE, now_ms=0)
    assert case.propose() == {"n1": 5}
