"""Fuzzer of the frame decoder: `python -m tests.fuzz.framing [inputs] [seed]`. The test suite runs a few thousand.

Every input is a byte string made to be almost right (valid frames, spliced, truncated, with bytes changed, with odd
headers) and is fed twice: whole, and cut at random places. Both must give the same verdict: messages, or messages and
one ProtocolError; the messages of the whole feed are a prefix of those of the cut one (a fault drops what came in the
same feed). Prints the seed and the input of a failure.
"""

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import msgpack

from kvtcp.constants import FRAME_PREFIX_BYTES, STREAMED_BODY_BYTES_MAX
from kvtcp.errors import ProtocolError
from kvtcp.protocol.framing import FrameDecoder, frame_prefix

FRAME_BYTES_MAX = 8 * 1024  # a small limit, so that inputs pass it often
HEADERS = (
    b"\xdc\xff\xff", b"\xdc\x00\x01", b"\xdd\xff\xff\xff\xff", b"\xde\xff\xff", b"\xdf\x7f\xff\xff\xff",
    b"\xda\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc4\xff", b"\xc5\x00\x01", b"\xc6\xff\xff\xff\xff",
    b"\xc7\x00\x01", b"\xd6\xff\0\0\0\0", b"\xc9\0\0\0\0\0",
    b"\xc1", b"\x91", b"\x81", b"\x81\x90\x01", b"\x81\x01\x01", b"\xce", b"\xd2", b"\xcb",
)  # fmt: skip


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """A value the protocol can carry."""
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind < 2:
        return rng.choice((0, 1, -1, 127, 128, 2**31, 2**63, 2**64 - 1, -(2**63)))
    if kind < 4:
        return rng.randbytes(rng.choice((0, 1, 5, 31, 32, 40, 300, STREAMED_BODY_BYTES_MAX)) if depth else 3)
    if kind < 7:
        return (None, True, False, 1.5, "text")[rng.randrange(5)]
    if kind == 7:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(6))]
    return {rng.randbytes(2): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def random_input(rng: random.Random) -> bytes:
    """One to six frames, most of them valid, then perhaps damaged."""
    parts: list[bytes] = []
    for _ in range(rng.randrange(1, 7)):
        body = msgpack.packb(random_value(rng))
        damage = rng.randrange(12)
        if damage == 0:
            body = rng.choice(HEADERS) * rng.randrange(1, 40) + body
        elif damage == 1:
            body = body[: rng.randrange(len(body) + 1)]
        elif damage == 2:
            body = rng.randbytes(rng.randrange(1, 40))
        length = len(body) if rng.randrange(10) else max(0, len(body) + rng.choice((-2, -1, 1, 2, 1000, 10_000, 2**31)))
        parts.append(frame_prefix(length) + body)
    data = bytearray(b"".join(parts))
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def run(data: bytes, cuts: list[int]) -> tuple[list[Any], str | None, int]:
    """Messages, the error's sentence or None, and `buffered_bytes` at the end, for `data` fed in pieces."""
    decoder = FrameDecoder(FRAME_BYTES_MAX)
    messages: list[Any] = []
    try:
        for low, high in zip([0, *cuts], [*cuts, len(data)], strict=True):
            messages += decoder.feed(data[low:high])
    except ProtocolError as error:
        return messages, str(error), 0
    return messages, None, decoder.buffered_bytes


def check(data: bytes, cuts: list[int]) -> bool:
    """Compares the two ways of feeding; true if the input was valid."""
    whole, whole_error, whole_bytes = run(data, [])
    pieces, pieces_error, pieces_bytes = run(data, cuts)
    # repr: a NaN is not equal to itself
    if whole_error is None:
        assert pieces_error is None, pieces_error
        assert repr(whole) == repr(pieces)
        assert whole_bytes == pieces_bytes < FRAME_PREFIX_BYTES + FRAME_BYTES_MAX
    else:
        assert pieces_error is not None, whole_error
        assert repr(pieces[: len(whole)]) == repr(whole)
    return whole_error is None


def run_checks(make: Callable[[random.Random], bytes], check: Callable[..., bool], inputs: int, seed: int) -> int:
    """Check so many random inputs; how many were valid. Raises AssertionError that names seed and input."""
    rng = random.Random(seed)
    valid = 0
    for number in range(inputs):
        data = make(rng)
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 8)))
        try:
            valid += check(data, cuts)
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {number}: {data.hex()} cut at {cuts}: {error}") from error
    return valid


def fuzz(inputs: int, seed: int) -> int:
    """Checks of the frame decoder."""
    return run_checks(random_input, check, inputs, seed)


def main(checks: Callable[[int, int], int], what: str, verdict: str) -> None:
    """The command line: run these checks and print what came of them."""
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(2**32)
    print(f"{inputs} inputs{what}, seed {seed}")
    began = time.monotonic()
    valid = checks(inputs, seed)
    print(f"{valid} valid, {inputs - valid} refused, {verdict}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(fuzz, "", "no other outcome")
