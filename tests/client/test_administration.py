"""Changes of the cluster: requests that are refused before they are sent, and answers of every form."""

from collections.abc import Callable
from typing import Any

import pytest

from kvtcp.client import administration as admin
from kvtcp.errors import ProtocolError, RequestError


def test_requests() -> None:
    """They are what the table of messages takes."""
    assert admin.node_add_request("h", 5000) == [0, b"node_add", b"h", 5000]
    assert admin.node_request(b"node_drain", "n1") == [0, b"node_drain", b"n1"]
    assert admin.rebalance_request(True) == [0, b"rebalance", {b"dry_run": True}]


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: admin.node_add_request(b"h", 5000), "host must be text, not bytes"),
    (lambda: admin.node_add_request("a b", 5000), 'host must be a name or an address, not "a b"'),
    (lambda: admin.node_add_request("h\udcff", 5000), "host has a lone surrogate"),
    (lambda: admin.node_add_request("h", 0), "port must be from 1 to 65535, not 0"),
    (lambda: admin.node_add_request("h", "5000"), "port must be an integer"),
    (lambda: admin.node_request(b"node_drain", ""), "the node's id must be a text of 1 to 255 bytes"),
    (lambda: admin.node_request(b"node_drain", 1), "the node's id must be text, not int"),
    (lambda: admin.rebalance_request(1), "dry_run must be true or false"),
])  # fmt: skip
def test_wrong_requests(make: Callable[[], Any], sentence: str) -> None:
    """They fail before anything is sent, with the sentence of the server."""
    with pytest.raises(RequestError, match=sentence):
        make()


def test_answers() -> None:
    """What is known has its field and its type; the rest is kept by name."""
    assert admin.node_change({"node": "n4"}) == admin.NodeChange("n4")
    assert admin.node_change({"node": "n1", "shards": 21, "new": 1}) == admin.NodeChange("n1", 21, {"new": 1})
    moves = [[5, "n1", "n4"], [6, "n2", "n4"]]
    assert admin.rebalance_result({"moves": moves, "left": 3, "new": 1}) == admin.Rebalance(
        (admin.Move(5, "n1", "n4"), admin.Move(6, "n2", "n4")), 3, {"new": 1}
    )
    assert admin.rebalance_result({"moves": [], "left": 0}) == admin.Rebalance((), 0)
    assert admin.loss_accepted({"shard": 0, "from": "n2"}) == admin.LossAccepted(0, {"from": "n2"})


@pytest.mark.parametrize(("read", "answer", "sentence"), [
    (admin.node_change, [], "is not a map"),
    (admin.node_change, {}, "has no node"),
    (admin.node_change, {"node": 4}, "has no node"),
    (admin.node_change, {"node": "n1", "shards": "many"}, "the number of shards in the answer is not an integer"),
    (admin.rebalance_result, None, "is not a map"),
    (admin.rebalance_result, {"left": 1}, "has no moves"),
    (admin.rebalance_result, {"moves": []}, "has no left"),
    (admin.rebalance_result, {"moves": [[5, "n1"]], "left": 1}, r"a move is not \[shard, from, to\]"),
    (admin.rebalance_result, {"moves": [["5", "n1", "n2"]], "left": 1}, r"a move is not \[shard, from, to\]"),
    (admin.loss_accepted, {"shard": True}, "has no shard"),
])  # fmt: skip
def test_answers_that_are_none(read: Callable[[Any], Any], answer: Any, sentence: str) -> None:
    """An answer of another form is the server's mistake, and said so."""
    with pytest.raises(ProtocolError, match=sentence):
        read(answer)
