"""The state of a client: what a transaction counts, and what is forgotten with it."""

from __future__ import annotations

import pytest

from kvtcp.constants import MULTI_BYTES_MAX
from kvtcp.frontend.resp.client_state import QUEUED_BYTES, ClientState, Transaction
from kvtcp.frontend.resp.plan import CommandError, Plan, write
from kvtcp.protocol import operations as op
from tests.support.resp_tools import Client, parse


def test_what_is_queued_counts() -> None:
    """Operations by their keys and bytes, replies by their bytes; what is too much is not queued."""
    transaction = Transaction()
    transaction.queue(b"+OK\r\n")
    transaction.queue(Plan([write(op.RENAME, b"a", b"b", False, size=1)], len))
    assert (transaction.keys, transaction.bytes) == (3, 5 + 2 + 2 * QUEUED_BYTES)
    with pytest.raises(CommandError, match="a transaction is over the limit"):
        transaction.queue(b"v" * MULTI_BYTES_MAX)
    assert len(transaction.queued) == 2 and transaction.keys == 3


def test_unwatch() -> None:
    """No key is watched any more, and none counts."""
    state = ClientState(7, "127.0.0.1:9", 1_000)
    state.watched, state.watched_bytes = {b"a": 5}, 17
    state.unwatch()
    assert state.watched == {} and state.watched_bytes == 0 and state.transaction is None


def test_replies_that_are_queued_count(client: Client) -> None:
    """What concerns only the connection is held as its reply until EXEC, and counts as that."""
    large = [b"ECHO", b"v" * (6 << 20)]
    client.send("multi", large, large, large, "discard")
    assert [reply for reply in parse(client.output()) if "over the limit" in str(reply)]
    assert client.resp.large_bytes == 0 and client.resp.held_bytes == 0


def test_queued_replies_do_not_stay_on_the_account(client: Client) -> None:
    """A large reply within a transaction is counted once, as a part of EXEC's, and not any more when that left."""
    for _ in range(5):
        client.send("multi", [b"ECHO", b"v" * 500_000])
        assert client.resp.held_bytes > 500_000
        client.send("exec")
        client.output()
        assert client.resp.large_bytes == 0 and client.resp.held_bytes == 0
