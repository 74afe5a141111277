"""Callers of a node that are not its coordinator: somebody who asks what is here, and nodes that come for a copy.

I/O shell, part of node.py. Neither changes anything. They have to know the cluster's secret, which is why both are told
more than strangers are; a caller that is refused is told why, and its connection is closed.
"""

from __future__ import annotations

import hmac
import logging
from typing import TYPE_CHECKING, Any

from kvtcp.errors import ProtocolError
from kvtcp.protocol.link import LINK_VERSION, REFUSED, TOLD

if TYPE_CHECKING:
    from kvtcp.server.node import LinkConnection, NodeServer

log = logging.getLogger("kvtcp.node")


def ask(node: NodeServer, connection: LinkConnection, fields: Any) -> None:
    """Somebody rebuilds a lost cluster map: tell what is here, as a restart would find it. Changes nothing."""
    names = (b"cluster", b"secret", b"node")
    if type(fields) is not dict or not all(type(fields.get(name)) is bytes for name in names):
        raise ProtocolError("an ASK lacks fields")
    code = why = ""
    if fields.get(b"version") != LINK_VERSION:
        code, why = "VERSION", f"this node speaks link version {LINK_VERSION}"
    elif node.secret is not None and not hmac.compare_digest(fields[b"secret"], node.secret.encode()):
        code, why = "SECRET", "the cluster's secret is not the one of this node"
    elif node.cluster is not None and fields[b"cluster"] != node.cluster.encode():
        code, why = "CLUSTER", f"this node belongs to cluster {node.cluster}"
    elif fields[b"node"] not in (b"", node.replica.node.encode()):
        code, why = "NODE", f"this is node {node.replica.node}"
    if code:
        connection.send((REFUSED, code, why, node.replica.promised, node.replica.map_version))
        connection.close()
        return
    told = node.replica.report()
    told["map"] = (node.replica.map if node.durability is None else node.durability.store.manifest.map) or None
    told["linked"] = node.is_linked

    def tell() -> None:
        connection.send((TOLD, told))
        connection.close()

    if node.durability is None:
        tell()
    else:
        node.durability.when_durable(tell)


def give(node: NodeServer, connection: LinkConnection, fields: Any) -> None:
    """Another node comes for what this one donates."""
    if type(fields) is not dict or not all(type(fields.get(name)) is bytes for name in (b"cluster", b"secret")):
        raise ProtocolError("a GIVE lacks fields")
    code, why = "TOKEN", "nothing is donated under this token, or not any more"
    if fields.get(b"version") != LINK_VERSION:
        code, why = "VERSION", f"this node speaks link version {LINK_VERSION}"
    elif (
        node.secret is None
        or node.cluster is None
        or not hmac.compare_digest(fields[b"secret"], node.secret.encode())
        or fields[b"cluster"] != node.cluster.encode()
    ):
        code, why = "SECRET", "cluster and secret are not those of this node"
    else:
        connection.stream = node.donations.give(connection, fields)
        if connection.stream is not None:
            return
    log.warning("event=give-refused peer=%s code=%s reason=%s", connection.peer, code, why)
    connection.send((REFUSED, code, why, node.replica.promised, node.replica.map_version))
    connection.close()
