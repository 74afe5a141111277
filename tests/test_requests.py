"""Tests of requests: kinds of ops are told apart from operations and from each other."""

from __future__ import annotations

from kvtcp.protocol import operations
from kvtcp.replication.progress import ANSWERED
from kvtcp.replication.requests import AWAITED, CALL, DUE, IGNORE, LINK_LOST, LOST, NUMBER, PART, WRITE


def test_kinds_are_no_operations() -> None:
    """The first field of an op is a kind, or the operation of a read."""
    kinds = [WRITE, PART, CALL, ANSWERED[0]]
    reads = [operations.GET, operations.EXISTS, operations.TTL, operations.REVISION]
    assert len({*kinds, *reads}) == len(kinds) + len(reads)


def test_states_of_results_are_no_results() -> None:
    """Each is an object of its own."""
    assert len({id(state) for state in (NUMBER, AWAITED, LOST, DUE, LINK_LOST)}) == 5


def test_the_sink_that_ignores() -> None:
    """It takes everything."""
    IGNORE.reply(None, 1)
    IGNORE.fail(None, 1, "why", {})
