"""Requests: the answers of many keys become one."""

from __future__ import annotations

from kvtcp.replication.requests import Gather
from tests.replication_fakes import Answers


def test_gather_answers_once() -> None:
    """When the last key is here, in the order of the keys."""
    sink = Answers()
    gather = Gather(sink, "t", 3)
    gather.reply(2, "c")
    gather.fail(0, 31, "text", {})
    assert not sink.ok
    gather.reply(1, "b")
    assert sink.ok == {"t": [[31, "text", {}], "b", "c"]}
