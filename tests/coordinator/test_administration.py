"""The requests of an operator: each reaches the part that carries it out, and is answered with what that says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

import kvtcp
from kvtcp.coordinator import administration as module
from kvtcp.coordinator.administration import Administration
from kvtcp.coordinator.supervisor import Found
from kvtcp.errors import AdminError, Code, RequestError
from kvtcp.node.server import NodeServer
from kvtcp.testing.local_cluster import LocalCluster
from tests.frontend.native.test_handler import HANDED_OVER
from tests.processes.cluster import free_ports
from tests.processes.raw_client import BOTH_LOOPS, event_loop_policy, linked, until
from tests.support.replication_fakes import Answers

__all__ = ["event_loop_policy"]
pytestmark = BOTH_LOOPS


class Changes:
    """A cluster administration that remembers what it was asked, and refuses to remove a node."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def change(*arguments: Any) -> None:
            *what, done = arguments
            self.calls.append((name, *what))
            if name == "remove":
                done(AdminError(f"{what[0]} holds 21 shards: drain it first", details={"node": what[0]}))
            else:
                done({"number": len(self.calls)})

        return change


class Administered:
    """An administration of a cluster that only remembers."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.session = Answers()
        self.backups = Mock()
        self.status = Mock()
        self.acts: list[int] = []  # number of changes at each `act`
        cluster_map = SimpleNamespace(last_node=3, cluster="c", nodes={}, shards=8)
        self.administration = Administration(
            SimpleNamespace(admin=self.changes, map=cluster_map),  # type: ignore[arg-type]
            self.backups,
            self.status,
            "s",
            begin=lambda: None,
            act=lambda: self.acts.append(len(self.changes.calls)),
            start_task=Mock(),
        )

    def ask(self, op: bytes, ident: int, *arguments: Any) -> None:
        """As the request handler does."""
        self.administration.requests[op](self.session, ident, *arguments)


def test_the_table_is_complete() -> None:
    """Everything that the request handler hands over is in it, and nothing else."""
    assert Administered().administration.requests.keys() == HANDED_OVER


async def test_changes_of_the_cluster_are_the_controllers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is handed to the controller, and its answer or its refusal is the client's."""
    asked = Administered()
    monkeypatch.setattr(module, "who_is_there", AsyncMock(return_value=Found("ours")))
    await asked.administration._add_node(asked.session, 1, "h", 5000)  # type: ignore[arg-type]
    asked.ask(b"node_drain", 2, "n1")
    asked.ask(b"node_remove", 3, "n1")
    asked.ask(b"node_forget", 4, "n2")
    asked.ask(b"rebalance", 5, True)
    asked.ask(b"shard_accept_loss", 6, 7)
    asked.ask(b"node_undrain", 7, "n1")
    assert asked.changes.calls == [
        ("add_node", "h", 5000), ("drain", "n1"), ("remove", "n1"), ("forget", "n2"), ("rebalance", True),
        ("accept_loss", 7), ("undrain", "n1"),
    ]  # fmt: skip
    session = asked.session
    assert session.ok == {number: {"number": number} for number in (1, 2, 4, 5, 6, 7)}
    assert session.failed == {3: (Code.REFUSED, "n1 holds 21 shards: drain it first", {"node": "n1"})}
    assert asked.acts == [1, 2, 3, 4, 5, 6, 7], "what a change wants is done at once"


def test_a_shard_that_is_not() -> None:
    """It is refused before anything else, with its number."""
    asked = Administered()
    with pytest.raises(RequestError, match="shard must be from 0 to 7, not 8") as refused:
        asked.ask(b"shard_accept_loss", 1, 8)
    assert (refused.value.code, refused.value.details) == (Code.BAD_REQUEST, {"shard": 8})
    assert asked.changes.calls == asked.acts == []


def test_what_is_asked_of_others() -> None:
    """Status, nodes and shards are answered at once; backups and restores are started."""
    asked = Administered()
    asked.status.configure_mock(**{"summary.return_value": {"state": "ok"}, "nodes.return_value": [1]})
    asked.status.shards.return_value = [2]
    for ident, op in enumerate((b"status", b"nodes", b"shards")):
        asked.ask(op, ident)
    assert asked.session.ok == {0: {"state": "ok"}, 1: [1], 2: [2]}
    asked.ask(b"backup", 3, "b1")
    asked.ask(b"restore", 4, "b1", "merge", b"p", False)
    asked.backups.start_backup.assert_called_once_with(asked.session, 3, "b1")
    asked.backups.start_restore.assert_called_once_with(asked.session, 4, "b1", "merge", b"p", False)


async def test_nodes_that_are_not_added() -> None:
    """A node more is looked at before it is in the map for ever: nobody, no name of a host, somebody else and a node
    with another id are refused; one of the cluster already too. The right one is linked, and a link that cannot be
    made harms nobody."""
    other = NodeServer("n7")
    await other.start("127.0.0.1", 0)
    right = NodeServer("n3")
    await right.start("127.0.0.1", 0)
    async with LocalCluster(2, shards=2) as foreign, LocalCluster(2, shards=2) as cluster:
        coordinator = cluster.coordinator
        async with kvtcp.connect(cluster.url, timeout=5) as kv:
            for address, words in (
                (("127.0.0.1", free_ports(1)), "nobody answers; start the new node there with --id n3, then add it"),
                (("a..b", 1), "is something that does not answer"),
                (foreign.nodes["n1"].address, "is a node of another cluster"),
                (other.address, "is another node of this cluster"),
                (cluster.nodes["n2"].address, "is the address of node n2 already"),
            ):
                with pytest.raises(kvtcp.AdminError, match=words):
                    await kv.node_add(*address)
            assert coordinator.map.last_node == 2 and coordinator.links.keys() == {"n1", "n2"}
            assert (await kv.node_add(*right.address)).node == "n3"
            await linked(coordinator, 3)
            added: list[Any] = []
            coordinator.controller.admin.add_node("a..b", 1, added.append)
            coordinator.map_store.wake()
            await until(lambda: added and "n4" in coordinator.links, "the node in the map")
            coordinator.controller.act(coordinator)
            await until(lambda: "idna" in coordinator.sequencer.links["n4"].reason, "a try to link it")
            assert not coordinator.failed.done()
            await kv.node_remove("n4")
            await kv.put("a", "1")
    for node in (other, right):
        await node.close()
