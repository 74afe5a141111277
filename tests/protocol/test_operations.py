"""Operations and effects: numbers are unique, and writes are told from reads by one comparison."""

from kvtcp.protocol import operations
from kvtcp.protocol.messages import REQUESTS, Kind
from kvtcp.protocol.operations import WRITE_NAMES, WRITE_OP_END
from tests.support import wire_golden

EFFECTS = {"SET", "REMOVE", "DEADLINE", "WIPE", "PATCH", "CLONE"}
ARGUMENTS = {
    "modes": {"KEEP_DEADLINE", "NO_DEADLINE", "IN_MS", "AT_MS"},
    "conditions": {
        "ALWAYS", "IF_ABSENT", "IF_PRESENT", "IF_EQUAL", "IF_LATER", "IF_EARLIER", "IF_PRESENT_EARLIER",
    },
    "results": {"RENAMED", "NEW_KEY_EXISTS", "NO_KEY"},
}  # fmt: skip
# what clients of Redis ask for, through kvtcp.resp
OF_STRINGS = {
    "store", "take", "touch", "expire if", "append", "set range", "set bit", "incr decimal", "rename", "copy",
    "put all", "transaction",
}  # fmt: skip
OPERATIONS = {
    name: number
    for name, number in wire_golden.numbers(operations).items()
    if name not in EFFECTS.union(*ARGUMENTS.values()) and name != "WRITE_OP_END"
}


def test_numbers_are_unique() -> None:
    """No two operations share a number, no two effects, and no two values of one argument."""
    assert len(set(OPERATIONS.values())) == len(OPERATIONS)
    for names in (EFFECTS, *ARGUMENTS.values()):
        assert len({getattr(operations, name) for name in names}) == len(names)
    effects = [getattr(operations, name) for name in EFFECTS]
    assert all(0 < number < 128 for number in (*effects, *OPERATIONS.values())), "one byte each"


def test_writes_are_below_the_split() -> None:
    """`op < WRITE_OP_END` is what tells a write; the names list exactly those."""
    assert set(WRITE_NAMES) == {number for number in OPERATIONS.values() if number < WRITE_OP_END}
    for number, name in WRITE_NAMES.items():
        assert number in (OPERATIONS.get(name.upper().replace(" ", "_")), OPERATIONS.get(name.upper().replace(" ", "")))


def test_writes_of_clients_become_writes_of_the_link() -> None:
    """Each write of the request table is one of the link, or several of one; the link adds only upkeep."""
    singles = {op.decode().removeprefix("m") for op, spec in REQUESTS.items() if spec.kind is Kind.WRITE}
    assert set(WRITE_NAMES.values()) - singles == {"purge", "clear"} | OF_STRINGS
    assert singles <= set(WRITE_NAMES.values())


def test_every_number_is_in_the_golden_file() -> None:
    """A new operation is a visible change of the wire."""
    text = wire_golden.GOLDEN.read_text()
    for name, number in wire_golden.numbers(operations).items():
        assert f"\n{number} {name}\n" in text
