"""Kinds of ops differ from operations and from each other; the answers of many keys become one."""

from __future__ import annotations

from kvtcp.protocol import operations
from kvtcp.replication.sequencing import requests
from kvtcp.replication.sequencing.link import ANSWERED
from tests.support.replication_fakes import Answers


def test_kinds_are_no_operations() -> None:
    """The first field of an op is a kind, or the operation of a read."""
    kinds = [requests.WRITE, requests.PART, requests.CALL, ANSWERED[0]]
    reads = [operations.GET, operations.EXISTS, operations.TTL, operations.REVISION]
    assert len({*kinds, *reads}) == len(kinds) + len(reads)


def test_states_of_results_are_no_results() -> None:
    """Each is an object of its own."""
    states = (requests.NUMBER, requests.AWAITED, requests.LOST, requests.UNANSWERED, requests.LINK_LOST)
    assert len(set(map(id, states))) == 5


def test_the_sink_that_ignores() -> None:
    """It takes everything."""
    requests.IGNORE.reply(None, 1)
    requests.IGNORE.fail(None, 1, "why", {})


def test_gather_answers_once() -> None:
    """When the last key is here, in the order of the keys."""
    sink = Answers()
    gather = requests.Gather(sink, "t", 3)
    gather.reply(2, "c")
    gather.fail(0, 31, "text", {})
    assert not sink.ok
    gather.reply(1, "b")
    assert sink.ok == {"t": [[31, "text", {}], "b", "c"]}
