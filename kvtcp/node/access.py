"""Access: what a caller of a node has to say in its first frame, and the one check of who it is.

Pure. A part of the node's core. The first frame of a connection is HELLO (a coordinator links), ASK (a caller wants to
know what is here) or GIVE (another node comes for a copy). All three name the link version, the cluster and its secret,
and `check` is the only place that compares them. A node that belongs to no cluster yet takes every caller: the first
coordinator whose HELLO it accepts founds its identity.
"""

from __future__ import annotations

import hmac
from typing import Any, Final

from kvtcp.constants import SHARDS_MAX
from kvtcp.errors import ProtocolError
from kvtcp.node.replica import Refused
from kvtcp.protocol.link import ASK, GIVE, HELLO, LINK_VERSION
from kvtcp.storage.disk.log_format import DIRECTORY_BYTES

_NAMES: Final = {HELLO: "a HELLO", ASK: "an ASK", GIVE: "a GIVE"}
_FIELDS: Final[dict[int, dict[bytes, type]]] = {
    HELLO: {
        b"version": int, b"cluster": bytes, b"secret": bytes, b"epoch": int, b"coordinator": bytes, b"link": int,
        b"node": bytes, b"shards": list, b"map_version": int, b"heard_version": int, b"durability": bytes,
    },
    ASK: {b"cluster": bytes, b"secret": bytes, b"node": bytes},
    GIVE: {b"cluster": bytes, b"secret": bytes},
}  # fmt: skip


class Identity:
    """The cluster of a node and its secret; both None until the first coordinator founds them."""

    __slots__ = ("cluster", "secret")

    def __init__(self, cluster: str | None = None, secret: str | None = None) -> None:
        self.cluster = cluster
        self.secret = secret


def check(fields: dict[bytes, Any], identity: Identity) -> Refused | None:
    """Why a caller with these fields is refused, or None: its version, its secret, its cluster."""
    if fields.get(b"version") != LINK_VERSION:
        return Refused("VERSION", f"this node speaks link version {LINK_VERSION}")
    if identity.secret is not None and not hmac.compare_digest(fields[b"secret"], identity.secret.encode()):
        return Refused("SECRET", "the cluster's secret is not the one of this node")
    if identity.cluster is not None and fields[b"cluster"] != identity.cluster.encode():
        return Refused("CLUSTER", f"this node belongs to cluster {identity.cluster}")
    return None


def check_fields(kind: int, fields: Any) -> None:
    """Raise ProtocolError unless a first frame of this kind has all its fields."""
    wanted = _FIELDS[kind]
    is_whole = type(fields) is dict and all(type(fields.get(name)) is of for name, of in wanted.items())
    if not is_whole or (kind == HELLO and not _is_hello(fields)):
        raise ProtocolError(f"{_NAMES[kind]} lacks fields")


def _is_hello(fields: dict[bytes, Any]) -> bool:
    cluster_map = fields.get(b"map")
    if cluster_map is not None and type(cluster_map) is not bytes:
        return False
    try:
        for text in (*[fields[name] for name, of in _FIELDS[HELLO].items() if of is bytes], cluster_map or b""):
            text.decode()
    except UnicodeDecodeError:
        return False
    return all(type(shard) is int and 0 <= shard < SHARDS_MAX for shard in fields[b"shards"])


def names_copy(fields: dict[bytes, Any]) -> bool:
    """Whether a GIVE has a token, and says what the copy will be called: the learner's directory, and a generation."""
    directory, generation = fields.get(b"directory"), fields.get(b"generation")
    return (
        type(fields.get(b"token")) is bytes
        and type(directory) is bytes and len(directory) == DIRECTORY_BYTES
        and type(generation) is int and 0 < generation < 1 << 63
    )  # fmt: skip
