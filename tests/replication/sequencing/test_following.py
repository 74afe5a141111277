"""Tests of following: when the writes of a shard are queued to a learner."""

from __future__ import annotations

from kvtcp.replication.sequencing.following import Following


def test_when_writes_are_queued_to_it() -> None:
    """From its attachment on, until its copy is lost."""
    heard: list[int] = []
    following = Following(heard.append)
    assert not following.takes_writes and following.acked == 0
    following.attached = True
    assert following.takes_writes
    following.lost_reason = "has no copy of it"
    assert not following.takes_writes
    following.on_acknowledged(7)
    assert heard == [7]
