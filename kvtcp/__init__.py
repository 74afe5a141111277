"""kvtcp: a distributed, replicated, ordered key-value store. Public names are exported here.

The clients (`connect`, `sync`, `AsyncClient`, `SyncClient`, `Entry`, `codecs`) are imported when they are first used
(PEP 562), so that a tool that only needs an error or the version does not load asyncio.
"""

from typing import TYPE_CHECKING, Any

from kvtcp._version import __version__
from kvtcp.errors import (
    AdminError,
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

if TYPE_CHECKING:
    from kvtcp.client import codecs, sync
    from kvtcp.client.aio import AsyncClient, connect
    from kvtcp.client.requests import Entry
    from kvtcp.client.sync import SyncClient

# name -> module, and the attribute in it (None: the module itself)
_LAZY = {
    "AsyncClient": ("kvtcp.client.aio", "AsyncClient"),
    "Entry": ("kvtcp.client.requests", "Entry"),
    "SyncClient": ("kvtcp.client.sync", "SyncClient"),
    "codecs": ("kvtcp.client.codecs", None),
    "connect": ("kvtcp.client.aio", "connect"),
    "sync": ("kvtcp.client.sync", None),
}

__all__ = [
    "AdminError",
    "AsyncClient",
    "BatchError",
    "ConditionFailed",
    "DataError",
    "Entry",
    "KeyExists",
    "KvtcpError",
    "Mismatch",
    "OutcomeUnknown",
    "ProtocolError",
    "RequestError",
    "SyncClient",
    "Unavailable",
    "__version__",
    "codecs",
    "connect",
    "sync",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvtcp' has no attribute {name!r}")
    import importlib

    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    found = globals()[name] = module if attribute is None else getattr(module, attribute)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
