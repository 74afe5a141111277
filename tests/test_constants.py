"""The limits: relations between them, and one number where two names say so."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import msgpack

from kvtcp import constants
from kvtcp.errors import KvtcpError
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.messages import REQUESTS

SOURCE = Path(constants.__file__).read_text()
NUMBERS = {name: value for name, value in vars(constants).items() if name.isupper()}


def test_no_name_is_given_twice() -> None:
    """A second assignment would silently replace the first."""
    targets = Counter(
        node.target.id
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
    assert set(targets) == set(NUMBERS), "every constant is annotated Final"
    assert [name for name, count in targets.items() if count > 1] == []


def test_names_end_in_their_unit() -> None:
    """Durations and sizes name their unit, so that nobody multiplies by 1000 twice."""
    for name, value in NUMBERS.items():
        assert not re.search(r"_(SECONDS|SEC|MILLIS|SIZE|LEN|LENGTH|TIMEOUT)(_MAX|_MIN|_DEFAULT)?$", name), name
        assert isinstance(value, (int, float, str, tuple)), name


def test_limits_of_a_client_fit_together() -> None:
    """The largest of everything a client may send, and be sent, fits a frame and the decoder's own limits."""
    c = constants
    assert c.KEY_BYTES_MAX + c.VALUE_BYTES_MAX < c.FRAME_BYTES_MAX
    assert max(c.MULTI_KEYS_MAX, c.PAGE_ITEMS_MAX) < c.ARRAY_ITEMS_MAX < c.MESSAGE_CONTAINERS_MAX
    assert c.PAGE_BYTES_MAX + c.VALUE_BYTES_MAX + c.KEY_BYTES_MAX < c.FRAME_BYTES_MAX, "a page ends behind one value"
    assert c.INTEGER_MAX == -c.INTEGER_MIN - 1 == 2**63 - 1
    assert c.TTL_MS_MAX * 2 < c.INTEGER_MAX, "a deadline is an int64"


def test_the_largest_requests_pass_the_decoder() -> None:
    """A put and a cas at all their limits, and a full mput, go through frame and table."""
    key, value = b"k" * constants.KEY_BYTES_MAX, bytes(constants.VALUE_BYTES_MAX)
    small = [[b"%d" % i, b"v", 1] for i in range(constants.MULTI_KEYS_MAX)]
    for request in ([1, "put", key, value, {"ttl_ms": constants.TTL_MS_MAX}], [1, "mput", small]):
        (message,) = FrameDecoder().feed(FrameEncoder().encode(request))
        REQUESTS[message[1]].check(message)
    half = bytes(constants.VALUE_BYTES_MAX // 2)
    (message,) = FrameDecoder().feed(FrameEncoder().encode([1, "cas", key, half, {"value": half}]))
    REQUESTS[message[1]].check(message)


def test_a_cas_of_two_largest_values_is_refused_by_the_sender() -> None:
    """Old and new value of 8 MiB each pass no frame: the encoder says so before anything is sent."""
    value = bytes(constants.VALUE_BYTES_MAX)
    try:
        FrameEncoder().encode([1, "cas", b"k", value, {"value": value}])
    except KvtcpError as error:
        assert error.details["bytes"] == len(msgpack.packb([1, "cas", b"k", value, {"value": value}]))
    else:
        raise AssertionError("two values of the largest size and their frame are over the limit")
