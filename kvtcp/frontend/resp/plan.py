"""Plans: the operations of a command, and how its reply is made of their results.

Pure. A command on keys is *compiled*: its arguments are checked and become operations of operations.py, each on one
key, and no shard is asked yet. A plan is then carried out by itself, each operation at its shard, or queued by MULTI
and carried out with others as one transaction. `finish` makes the reply, as replies.py takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from kvtcp.errors import CLASS_OF, Code, OutcomeUnknown, Unavailable
from kvtcp.frontend.resp.replies import Failure
from kvtcp.protocol.messages import check_key
from kvtcp.protocol.numbers import integer_of
from kvtcp.protocol.operations import COPY, PUT_ALL, RENAME, WRITE_OP_END

Arguments = Sequence[bytes]  # of a command, those behind its name

NOT_AN_INTEGER: Final = "ERR value is not an integer or out of range"
NOT_A_FLOAT: Final = "ERR value is not a valid float"
SYNTAX: Final = "ERR syntax error"
CROSS_SHARD: Final = (
    "CROSSSLOT Keys in request don't hash to the same slot: what is one step here concerns keys of one shard; give "
    "them the same {tag}"
)
CROSS_SHARD_MULTI: Final = (
    "CROSSSLOT Keys in request don't hash to the same slot: a transaction concerns keys of one shard; give them the "
    "same {tag}, or use a pipeline without MULTI (redis-py: transaction=False)"
)


class CommandError(Exception):
    """A command is refused and changed nothing; `text` is the reply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Failed(NamedTuple):
    """The error of an operation."""

    code: int
    text: str


class Operation(NamedTuple):
    """One operation on one key."""

    op: int
    key: bytes
    args: tuple[Any, ...]
    size: int  # bytes of its key and values

    @property
    def is_write(self) -> bool:
        """Whether the operation is numbered."""
        return self.op < WRITE_OP_END

    @property
    def keys(self) -> list[bytes]:
        """All keys of the operation, which have to be of one shard."""
        if self.op == PUT_ALL:
            return [key for key, _ in self.args[0]]
        return [self.key, self.args[0]] if self.op in (RENAME, COPY) else [self.key]


class Plan(NamedTuple):
    """A compiled command. `finish` gets the results in the order of the operations. `texts` has the words of Redis for
    errors; None is no error but nil. `one_shard` does the same in one step if all keys are of one shard."""

    operations: Sequence[Operation]
    finish: Callable[[list[Any]], Any]
    texts: Mapping[int, str | None] = {}
    one_shard: Operation | None = None

    def reply(self, results: list[Any]) -> Any:
        """Return the reply, from results and Failed."""
        failed = [result for result in results if type(result) is Failed]
        if not failed:
            return self.finish(results)
        text = self.texts.get(failed[0].code, error_text(failed[0]))
        if text is None:
            return None
        done = len(results) - len(failed)
        if done and any(operation.is_write for operation in self.operations):
            text = f"UNKNOWN {done} of {len(results)} keys were written, of the others the first says: {text}"
        return Failure(text)


def error_text(failed: Failed) -> str:
    """Return an error as clients of Redis get it: the first word says how to react."""
    try:
        kind = CLASS_OF[Code(failed.code)]
    except ValueError:
        kind = OutcomeUnknown
    word = "TRYAGAIN" if kind is Unavailable else "UNKNOWN" if kind is OutcomeUnknown else "ERR"
    return f"{word} {failed.text}"


def first(results: list[Any]) -> Any:
    """Return the one result as it is."""
    return results[0]


def count(results: list[Any]) -> int:
    """Count the results that are true."""
    return sum(map(bool, results))


def integer(text: bytes, error: str = NOT_AN_INTEGER) -> int:
    """Return the signed 64-bit integer of a text. Raises CommandError with `error`."""
    number = integer_of(text)
    if number is None:
        raise CommandError(error)
    return number


def write(op: int, key: bytes, *args: Any, size: int = 0) -> Operation:
    """Make a write of a key; `size` is that of its values in bytes. Raises RequestError if it is no key."""
    return Operation(op, check_key(key), args, len(key) + size)


def read(op: int, key: bytes) -> Operation:
    """Make a read of a key. Raises RequestError if it is none."""
    return Operation(op, check_key(key), (), len(key))
