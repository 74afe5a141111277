"""Tests of reads over several shards: those that wait to begin. test_admission.py has them on their way."""

from __future__ import annotations

import pytest

from kvtcp.constants import WRITE_WAIT_MS
from kvtcp.errors import Code
from kvtcp.replication.sequencing import reads
from kvtcp.replication.sequencing.multi_read import count_read
from tests.support.replication_fakes import Cluster


def blocked() -> Cluster:
    """No node has room."""
    cluster = Cluster(shards=2)
    for link in cluster.sequencer.links.values():
        link.fill()
    return cluster


def ask(cluster: Cluster, token: str) -> None:
    """Count over both shards."""
    cluster.sequencer.multi_read(count_read([0, 1], b"", None, cluster.answers, token))
    cluster.sequencer.check()


def test_those_that_wait_begin_in_order() -> None:
    """When a link has room again."""
    cluster = blocked()
    ask(cluster, "first")
    ask(cluster, "second")
    assert [multi.token for multi in cluster.sequencer.reads.waiting()] == ["first", "second"]
    assert cluster.sequencer.waiting_items == 2
    cluster.sequencer._opened(cluster.sequencer.links["n1"])
    assert cluster.sequencer.reads.waiting() == [] and cluster.sequencer.waiting_items == 0
    cluster.pump()
    assert cluster.answers.ok == {"first": 0, "second": 0}


def test_those_that_wait_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused at once, the others in time."""
    monkeypatch.setattr(reads, "WAITING_MULTI_MAX", 1)
    cluster = blocked()
    ask(cluster, "waits")
    ask(cluster, "refused")
    assert cluster.answers.failed.keys() == {"refused"}
    cluster.tick(WRITE_WAIT_MS)
    assert cluster.answers.failed["waits"][0] == Code.OVERLOADED and cluster.sequencer.waiting_bytes == 0


def test_those_of_a_shard_that_is_stopped() -> None:
    """They are refused with its reason; others wait on."""
    cluster = blocked()
    ask(cluster, "both")
    cluster.sequencer.multi_read(count_read([1], b"", None, cluster.answers, "other"))
    cluster.sequencer.stop_serving(0, "its members differ")
    cluster.sequencer.check()
    assert cluster.answers.failed["both"][1] == "shard 0 is down: its members differ"
    assert [multi.token for multi in cluster.sequencer.reads.waiting()] == ["other"]
