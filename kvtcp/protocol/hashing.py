"""The shard of a key.

Pure. CRC-16/XMODEM of the key modulo the number of shards, the CRC of Redis Cluster's slots (`binascii.crc_hqx` is
that CRC in C). If the key contains a `{` followed later by a `}` with at least one byte between, only the bytes between
the first such `{` and the next `}` are hashed, so that keys with the same tag stay together in one shard. Client,
shell, coordinator and backup files all use this one function: it can never change for an existing cluster.
"""

from __future__ import annotations

from binascii import crc_hqx
from typing import Final

_OPENING: Final = ord("{")  # looked for as a byte: `b"{" in key` raises and catches a TypeError first, 0.1 us


def shard_of(key: bytes, shards: int) -> int:
    """The shard of `key`, 0 <= shard < `shards`."""
    if _OPENING in key:
        start = key.find(b"{") + 1
        end = key.find(b"}", start)
        if end > start:
            key = key[start:end]
    return crc_hqx(key, 0) % shards
