"""Shards of keys: known values of the CRC, and the rule of the tag."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtcp.protocol.hashing import shard_of


@pytest.mark.parametrize(("key", "slot"), [(b"123456789", 0x31C3), (b"foo", 12182), (b"", 0), (b"user:1", 10778)])
def test_is_crc16_xmodem(key: bytes, slot: int) -> None:
    """The check value of CRC-16/XMODEM and the slots that Redis Cluster documents come out."""
    assert shard_of(key, 16384) == slot % 16384


@pytest.mark.parametrize(("key", "hashed"), [
    (b"{user:1}:name", b"user:1"), (b"a{user:1}", b"user:1"), (b"{a}{b}", b"a"), (b"foo{{bar}}zap", b"{bar"),
    (b"foo{}{bar}", b"foo{}{bar}"), (b"foo{bar", b"foo{bar"), (b"foo}bar{", b"foo}bar{"), (b"}{a}", b"a"),
    (b"{\x00}z", b"\x00"),
])  # fmt: skip
def test_only_a_tag_that_is_not_empty_is_hashed(key: bytes, hashed: bytes) -> None:
    """The first `{` with bytes before the next `}` names what is hashed; otherwise the whole key is."""
    import binascii

    for shards in (1, 64, 4096, 16384):
        assert shard_of(key, shards) == binascii.crc_hqx(hashed, 0) % shards


@given(st.binary(max_size=40), st.integers(1, 4096))
def test_is_always_a_shard(key: bytes, shards: int) -> None:
    """Any bytes have a shard from 0 to shards - 1."""
    assert 0 <= shard_of(key, shards) < shards
