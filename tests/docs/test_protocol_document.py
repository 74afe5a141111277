"""docs/protocol.md says what the code does: its tables, limits, example and numbers are read from the page."""

import json
import re
from pathlib import Path
from typing import Any

from kvtcp import constants
from kvtcp.errors import CLASS_OF, Code
from kvtcp.frontend.native.handler import LIMITS
from kvtcp.protocol import link, operations
from kvtcp.protocol.framing import FrameDecoder
from kvtcp.protocol.messages import REQUESTS, request_id
from tests.support import wire_golden

TEXT = (Path(__file__).parent.parent.parent / "docs" / "protocol.md").read_text()


def table(first_cell: str) -> list[list[str]]:
    """The rows below the header that starts with `first_cell`, as cells."""
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def as_text(value: Any) -> Any:
    """A decoded value with text for bytes, as JSON shows it."""
    if type(value) is bytes:
        return value.decode()
    if type(value) is list:
        return [as_text(item) for item in value]
    if type(value) is dict:
        return {as_text(name): as_text(item) for name, item in value.items()}
    return value


def test_the_example_is_true() -> None:
    """Each frame of the dump decodes to what stands below it; requests pass the table, replies answer a request."""
    (block,) = re.findall(r"```hex\n(.*?)```", TEXT, re.S)
    frames = re.findall(r"^([<>]) ([0-9a-f]+)\n    (.+)$", block, re.M)
    assert len(frames) * 2 == len(block.splitlines()) >= 20
    waiting: dict[int, bytes] = {}
    for direction, dump, shown in frames:
        decoder = FrameDecoder()
        (message,) = decoder.feed(bytes.fromhex(dump))
        assert decoder.buffered_bytes == 0
        assert as_text(message) == json.loads(shown)
        if direction == ">":
            REQUESTS[message[1]].check(message)
            waiting[request_id(message)] = message[1]
        else:
            op = waiting.pop(message[0])
            assert message[1] in list(Code)
            assert op in REQUESTS
    assert not waiting


def test_every_request_is_in_the_table() -> None:
    """Operations of the page and of the code are the same, in the same order, and so are their options."""
    rows = table("op")
    assert [row[0].strip("`") for row in rows] == [op.decode() for op in REQUESTS]
    for row in rows:
        forms = [form for form, _ in wire_golden.REQUEST_FORMS if form[0] == row[0].strip("`")]
        used = {name for form in forms for last in form[-1:] if type(last) is dict for name in last}
        (listed,) = re.findall(r"\{(.*)\}", row[1]) or [""]
        assert used <= set(re.findall(r"`(\w+)`", listed)), row[0]


def test_every_error_is_in_the_table() -> None:
    """Codes, names and classes of the page are those of the code."""
    listed = {int(row[0]): (row[1], row[2]) for row in table("code")}
    assert listed == {int(code): (code.name, class_.__name__) for code, class_ in CLASS_OF.items()}


def test_the_limits_are_those_of_the_code() -> None:
    """The table of limits is what `hello` answers, and numbers in the text are the constants."""
    listed = {row[0].strip("`"): int(row[1]) for row in table("name")}
    assert listed == LIMITS
    for number in (
        constants.FRAME_BYTES_MAX, constants.ARRAY_ITEMS_MAX, constants.MESSAGE_CONTAINERS_MAX,
        constants.REQUEST_ID_MAX, constants.TTL_MS_MAX,
    ):  # fmt: skip
        assert f"{number:,}" in TEXT
    assert f"within {constants.FRAME_WAIT_MS // 1000} seconds" in TEXT
    assert f"version {constants.PROTOCOL_VERSION}\n" in TEXT


def test_the_link_kinds_are_those_of_the_code() -> None:
    """Numbers and names of the page are those of the module."""
    listed = {row[1]: int(row[0]) for row in table("kind")}
    assert listed == {name: n for name, n in wire_golden.numbers(link).items() if name != "LINK_VERSION"}


def test_the_operations_of_the_link_are_those_of_the_code() -> None:
    """Every operation and every effect is in the table, writes and reads apart."""
    listed = {row[0]: [name.strip() for name in row[1].split(",")] for row in table("items")}
    numbers = wire_golden.numbers(operations)
    names = list(numbers)
    effects = names[names.index("SET") : names.index("CLONE") + 1]
    assert listed.pop("effects of an entry") == effects
    known = set(names[: names.index("SET")]) - {"WRITE_OP_END"}
    assert sorted(name for those in listed.values() for name in those) == sorted(known)
    for items, those in listed.items():
        for name in those:
            assert (numbers[name] < operations.WRITE_OP_END) == items.startswith("writes")
