"""Tests of the outbox: order, and frames for nodes that did not report."""

from __future__ import annotations

import pytest

from kvtcp.replication.outbox import Outbox


def test_everything_is_kept_in_order() -> None:
    """Actions and lines of the log apart; an alarm is a line."""
    reported = {"n1"}
    outbox = Outbox(reported)
    outbox.send("n1", (7,))
    outbox.event("info", "word", shard=1)
    outbox.close_link("n2", "why")
    outbox.alarm("a sentence")
    assert outbox.actions == [("send", "n1", (7,)), ("close", "n2", "why")]
    assert outbox.events == [("info", "word", {"shard": 1}), ("error", "alarm", {"reason": "a sentence"})]


def test_a_frame_for_a_node_that_is_not_linked() -> None:
    """A mistake of the caller."""
    reported = {"n1"}
    outbox = Outbox(reported)
    reported.clear()
    with pytest.raises(AssertionError, match="frames go to nodes that reported"):
        outbox.send("n1", (7,))
