"""Which shard a key belongs to.

Pure. `shard = CRC-16/XMODEM(key) mod shards`. If the key contains `{` and later `}` with at least one byte between
them, only the bytes between the first `{` and the next `}` after it are hashed, so related keys can be kept together:
`{user:1}:name` and `{user:1}:mail` are in one shard. `binascii.crc_hqx(data, 0)` is that CRC, in C.

The function is part of the formats: backups are checked with it and clients may compute it. It never changes.
"""

from __future__ import annotations

from binascii import crc_hqx


def shard_of(key: bytes, shards: int) -> int:
    """The shard of `key` in a cluster of `shards` shards: 0 to `shards` - 1."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            return crc_hqx(key[start + 1 : end], 0) % shards
    return crc_hqx(key, 0) % shards
