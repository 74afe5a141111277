"""Which shard a key belongs to.

Pure. The shard of a key is `crc16(key) mod shards`, with CRC-16/XMODEM (polynomial 0x1021, start value 0), the hash of
Redis Cluster, so related keys are kept together in the same way: if the key contains a `{` and somewhere after it a
`}`, with at least one byte between, only the bytes between the first `{` and the first `}` after it are hashed.
`{user:1}:name` and `{user:1}:mail` are in one shard. An empty tag `{}` counts as no tag.

The rule is part of the format of a cluster: the number of shards is fixed when it is created, and neither may change
afterwards. `binascii.crc_hqx(data, 0)` is that CRC, in C. Most keys have no tag and cost one `in` test besides.
"""

from __future__ import annotations

from binascii import crc_hqx


def shard_of(key: bytes, shards: int) -> int:
    """The shard of `key`, 0 to `shards` - 1."""
    if b"{" in key:
        start = key.index(b"{") + 1
        end = key.find(b"}", start)
        if end > start:
            key = key[start:end]
    return crc_hqx(key, 0) % shards
