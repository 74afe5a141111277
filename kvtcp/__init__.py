"""kvtcp: a distributed, replicated, ordered key-value store. Public names are exported here."""

from kvtcp._version import __version__
from kvtcp.errors import (
    BatchError,
    ConditionFailed,
    DataError,
    KeyExists,
    KvtcpError,
    Mismatch,
    OutcomeUnknown,
    ProtocolError,
    RequestError,
    Unavailable,
)

__all__ = [
    "BatchError",
    "ConditionFailed",
    "DataError",
    "KeyExists",
    "KvtcpError",
    "Mismatch",
    "OutcomeUnknown",
    "ProtocolError",
    "RequestError",
    "Unavailable",
    "__version__",
]
