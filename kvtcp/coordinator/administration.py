"""Administration: the requests of an operator, each carried out by the part of the coordinator that it is about.

I/O shell. `requests` is the table that the handler hands over to: an entry is called with the session, the number of
the request and its checked arguments, and answers the session itself, at once or later. Changes of the cluster are
decided by the controller (replication/membership/admin.py) and answered when they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtcp.coordinator.backups import Backups
from kvtcp.coordinator.status import Status
from kvtcp.coordinator.supervisor import who_is_there
from kvtcp.errors import AdminError, Code, RequestError
from kvtcp.frontend.native.handler import AdministrativeRequest, Session
from kvtcp.replication.controller import Controller
from kvtcp.runtime.process import StartTask, join_address


class Administration:
    """One per coordinator. `begin` begins a turn, `act` does what the controller wants."""

    def __init__(
        self, controller: Controller, backups: Backups, status: Status, secret: str, *, begin: Callable[[], None],
        act: Callable[[], None], start_task: StartTask,
    ) -> None:  # fmt: skip
        self._controller = controller
        self._secret = secret
        self._begin = begin
        self._act = act
        self._start_task = start_task
        admin = controller.admin
        self.requests: dict[bytes, AdministrativeRequest] = {
            b"status": lambda session, ident: session.reply(ident, status.summary()),
            b"nodes": lambda session, ident: session.reply(ident, status.nodes()),
            b"shards": lambda session, ident: session.reply(ident, status.shards()),
            b"backup": backups.start_backup,
            b"restore": backups.start_restore,
            b"node_add": self._node_add,
            b"node_drain": self._change(admin.drain),
            b"node_undrain": self._change(admin.undrain),
            b"node_remove": self._change(admin.remove),
            b"node_forget": self._change(admin.forget),
            b"rebalance": self._change(admin.rebalance),
            b"shard_accept_loss": self._shard_accept_loss,
        }

    def _change(self, change: Callable[..., None]) -> AdministrativeRequest:
        """The request that makes a change of the cluster: answered when that is stored, or with its refusal."""

        def carry_out(session: Session, ident: int, *arguments: Any) -> None:
            def done(answer: dict[str, Any] | AdminError) -> None:
                if isinstance(answer, AdminError):
                    session.fail(ident, answer.code, answer.message, answer.details)
                else:
                    session.reply(ident, answer)

            change(*arguments, done)
            self._act()

        return carry_out

    def _node_add(self, session: Session, ident: int, host: str, port: int) -> None:
        """Add the node at this address to the cluster."""
        self._start_task(self._add_node(session, ident, host, port), "node add")

    async def _add_node(self, session: Session, ident: int, host: str, port: int) -> None:
        """Look who is there first: a wrong address would be a node that is never linked and stays in the map, and keep
        the next coordinator from starting."""
        cluster_map = self._controller.map
        node = f"n{cluster_map.last_node + 1}"
        if (host, port) not in cluster_map.nodes.values():  # else it is refused below
            found = await who_is_there(host, port, node, cluster_map.cluster, self._secret)
            self._begin()  # a turn, at whose end the answer leaves
            if found.kind != "ours":
                what = f"is {found.what}" if found.what else "nobody answers"
                text = f"at {join_address(host, port)} {what}; start the new node there with --id {node}, then add it"
                session.fail(ident, Code.REFUSED, text, {})
                return
        self._change(self._controller.admin.add_node)(session, ident, host, port)

    def _shard_accept_loss(self, session: Session, ident: int, shard: int) -> None:
        """Serve a shard that is down with what is left of it. Raises RequestError."""
        shards = self._controller.map.shards
        if shard >= shards:
            text = f"shard must be from 0 to {shards - 1}, not {shard}"
            raise RequestError(text, Code.BAD_REQUEST, {"shard": shard})
        self._change(self._controller.admin.accept_loss)(session, ident, shard)
