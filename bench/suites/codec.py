"""The `codec` suite: what it costs to read and write the bytes of the wire, alone, in one process.

    frames            requests and replies of clients, and the batches of the node links, by `FrameEncoder` and
                      `FrameDecoder`; floor: msgpack's own packer and unpacker on the same messages, without frames,
                      limits and checks of lengths
    RESP              commands as redis-benchmark sends them, by `RespParser`; floor: `bytes.split` of the same bytes

Microseconds per message (per operation of a batch, per row of a page), 64 messages to a read as at depth 64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from bench.load.resp import encode_command, key_of
from bench.measure import Options, Result, Sample, Workload, interleave, with_floor
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.link import BATCH
from kvtcp.protocol.operations import PUT

TITLE = "Codec: bytes of the wire, us per message"
MESSAGES = 64
KEY, VALUE = key_of(7), b"v" * 128


class CodecWorkload:
    """A step on the same input, again and again."""

    unit = "us"

    def __init__(
        self, target: str, workload: str, step: Callable[[], Any], count: int, expected: Any, repetitions: int
    ) -> None:
        self.target, self.workload = target, workload
        self.more: dict[str, Any] = {}
        self._step, self._count, self._expected, self._repetitions = step, count, expected, repetitions

    def prepare(self) -> None:
        """The step gives what it should."""
        self.verify(0)

    def generate(self, run: int) -> int:
        """Nothing is random here."""
        return self._repetitions

    def execute(self, plan: int) -> Sample:
        """Per message."""
        step = self._step
        began = time.process_time()
        for _ in range(plan):
            step()
        return Sample((time.process_time() - began) / (plan * self._count) * 1e6)

    def verify(self, plan: int) -> None:
        """The step gives what it should."""
        found = self._step()
        if found != self._expected:
            raise AssertionError(f"{self.target}, {self.workload}: {found!r} instead of {self._expected!r}"[:400])


def _messages() -> dict[str, tuple[Any, int]]:
    """By name: messages of one read, and how many operations they are."""
    rows = [[key_of(number), VALUE, number, None] for number in range(1_000)]
    return {
        "request get": ([[number, b"get", KEY] for number in range(MESSAGES)], MESSAGES),
        "request put": ([[number, b"put", KEY, VALUE] for number in range(MESSAGES)], MESSAGES),
        "reply of a get": ([[number, 0, [VALUE, number, None]] for number in range(MESSAGES)], MESSAGES),
        "batch of puts": ([[BATCH, 1, 1, [[PUT, 0, n, 0, KEY, VALUE] for n in range(MESSAGES)]]], MESSAGES),
        "page of 1,000 rows": ([[1, 0, [rows, None]]], len(rows)),
    }


def _pack_all(messages: Sequence[Any], pack: Callable[[Any], bytes]) -> Callable[[], bytes]:
    return lambda: b"".join([pack(message) for message in messages])


def _decode_all(data: bytes) -> Callable[[], Any]:
    decoder = FrameDecoder()
    return lambda: decoder.feed(data)


def _unpack_all(data: bytes) -> Callable[[], Any]:
    unpacker = msgpack.Unpacker(raw=True)

    def step() -> Any:
        unpacker.feed(data)
        return list(unpacker)

    return step


def _workloads(repetitions: int) -> list[Workload]:
    found: list[Workload] = []
    for name, (messages, count) in _messages().items():
        times = max(1, repetitions * MESSAGES // count)
        encode, pack = FrameEncoder().encode, msgpack.Packer(autoreset=True, use_bin_type=True).pack
        framed, bare = b"".join(map(encode, messages)), b"".join(map(pack, messages))
        steps = [
            ("kvtcp", "encode", _pack_all(messages, encode), framed),
            ("msgpack", "encode", _pack_all(messages, pack), bare),
            ("kvtcp", "decode", _decode_all(framed), messages),
            ("msgpack", "decode", _unpack_all(bare), messages),
        ]
        for who, verb, step, wanted in steps:
            found.append(CodecWorkload(who, f"{verb}: {name}", step, count, wanted, times))
    return found + _resp_workloads(repetitions)


def _resp_workloads(repetitions: int) -> list[Workload]:
    try:
        from kvtcp.frontend.resp.parser import RespParser
    except ModuleNotFoundError:
        return []
    found: list[Workload] = []
    for name, command in {"SET": [b"SET", KEY, VALUE], "GET": [b"GET", KEY]}.items():
        data = encode_command(command) * MESSAGES
        parse, expected = RespParser().feed, [command] * MESSAGES
        steps: list[tuple[str, Callable[[], Any], Any]] = [
            ("kvtcp", lambda parse=parse, data=data: parse(data), expected),
            ("bytes.split", lambda data=data: data.split(b"\r\n"), data.split(b"\r\n")),
        ]
        for who, step, wanted in steps:
            found.append(CodecWorkload(who, f"RESP: {name}", step, MESSAGES, wanted, repetitions))
    return found


def measure(options: Options) -> list[Result]:
    """All messages, with their floors."""
    rows = interleave(_workloads(options.size(2_000, 200)), options.runs_or(5), options.seed)
    floors = {row["workload"]: row for row in rows if row["target"] != "kvtcp"}
    return [
        with_floor(row, floors[row["workload"]]["target"], floors[row["workload"]]["median"])
        if row["target"] == "kvtcp"
        else row
        for row in rows
    ]
