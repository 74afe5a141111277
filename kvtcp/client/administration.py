"""Changes of the cluster as both clients offer them: their requests, and their answers as typed results.

Pure. The requests are checked by the server's own checkers (`kvtcp.protocol.messages`), so that a wrong one fails
before it is sent. An answer is a map; fields that this client does not know (of a newer server) are kept in `details`,
by name. An answer that lacks a field raises ProtocolError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvtcp.client.requests import request, text_bytes
from kvtcp.errors import ProtocolError
from kvtcp.protocol.messages import Message

T = TypeVar("T")


@dataclass(frozen=True)
class NodeChange:
    """A change of one node was accepted."""

    node: str  # its id
    shards: int | None = None  # of a drain: the number of shards to be moved away
    details: dict[str, Any] = field(default_factory=dict)  # other fields of the answer


@dataclass(frozen=True)
class Move:
    """The move of a shard from one node to another."""

    shard: int
    source: str
    target: str


@dataclass(frozen=True)
class Rebalance:
    """The moves that spread the shards evenly; empty if they are so already."""

    moves: tuple[Move, ...]
    left: int  # shards that are still to be moved, those of earlier changes included
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossAccepted:
    """The acceptance of a shard with the copies that are left."""

    shard: int
    details: dict[str, Any] = field(default_factory=dict)


def node_add_request(host: str, port: int) -> Message:
    """The request of `node_add`. Raises RequestError."""
    return request(b"node_add", text_bytes(host, "host"), port)


def node_request(op: bytes, node: str) -> Message:
    """The request of `node_drain`, `node_remove` or `node_forget`. Raises RequestError."""
    return request(op, text_bytes(node, "the node's id"))


def rebalance_request(dry_run: bool) -> Message:
    """The request of `rebalance`. Raises RequestError."""
    return request(b"rebalance", {b"dry_run": dry_run})


def node_change(answer: Any) -> NodeChange:
    """The answer to a change of a node, with text for bytes. Raises ProtocolError."""
    rest = _fields(answer)
    shards = rest.pop("shards", None)
    if shards is not None and type(shards) is not int:
        raise ProtocolError("the number of shards in the answer is not an integer")
    return NodeChange(_take(rest, "node", str), shards, rest)


def rebalance_result(answer: Any) -> Rebalance:
    """The answer to `rebalance`. Raises ProtocolError."""
    rest = _fields(answer)
    moves = tuple(map(_move, _take(rest, "moves", list)))
    return Rebalance(moves, _take(rest, "left", int), rest)


def loss_accepted(answer: Any) -> LossAccepted:
    """The answer to `shard_accept_loss`. Raises ProtocolError."""
    rest = _fields(answer)
    return LossAccepted(_take(rest, "shard", int), rest)


def _fields(answer: Any) -> dict[str, Any]:
    if type(answer) is not dict:
        raise ProtocolError("the answer to a change of the cluster is not a map")
    return dict(answer)


def _take(fields: dict[str, Any], name: str, kind: Callable[..., T]) -> T:
    """Take the field `name`, of exactly this type, out of `fields`."""
    value: T = fields.pop(name, None)
    if type(value) is not kind:
        raise ProtocolError(f"the answer to a change of the cluster has no {name}")
    return value


def _move(move: Any) -> Move:
    if type(move) is not list or [type(part) for part in move] != [int, str, str]:
        raise ProtocolError("a move is not [shard, from, to]")
    return Move(*move)
