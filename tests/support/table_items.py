"""Write items and a plain model of a shard, for the tests of the table and of what is built on it."""

import re
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from typing import Any

from hypothesis import strategies as st

from kvtcp.constants import INTEGER_MAX, VALUE_BYTES_MAX
from kvtcp.errors import Code
from kvtcp.protocol import operations as op

Model = dict[bytes, tuple[bytes, int, int | None]]  # key -> value, rev, deadline_ms

KEYS = st.sampled_from([b"%c" % c for c in b"abcdefgh"]) | st.binary(min_size=1, max_size=2)
HOT = st.sampled_from([b"a", b"b", b"c"])  # of what changes and compares: it has to meet something
VALUES = st.sampled_from([b"", b"0", b"-0", b"7", b"-12", b"007", b"9223372036854775807", b"x"]) | st.binary(max_size=3)
TTLS = st.integers(-2, 12)
LIMITS = st.integers(-1, 40)
STAMP = 1_700_000_000_000
DECIMALS = st.sampled_from(
    [b"0", b"1", b"0.1", b"-.25", b"+3.", b"5e-1", b"1e-17", b"4e-18", b"-1e308", b"9.9e307", b"x", b"", b"1e309"]
)
# offsets beyond these values, and beyond all values
OFFSETS = st.integers(0, 9) | st.sampled_from([VALUE_BYTES_MAX - 1, VALUE_BYTES_MAX])
KEEP_OR_NONE = st.tuples(st.sampled_from([op.KEEP_DEADLINE, op.NO_DEADLINE]), st.just(0))
FUTURE = st.tuples(st.just(op.IN_MS), st.integers(1, 12) | st.just(INTEGER_MAX >> 1)) | st.tuples(
    st.just(op.AT_MS), st.sampled_from([1, STAMP - 1, STAMP, STAMP + 4, STAMP + 30, INTEGER_MAX])
)
ANY_TIME = FUTURE | st.tuples(
    st.sampled_from([op.IN_MS, op.AT_MS]), st.integers(-2, 1) | st.just(-(INTEGER_MAX >> 1)) | st.just(STAMP + 9)
)
KEY_READS = st.sampled_from([op.GET, op.EXISTS, op.TTL, op.DEADLINE_OF])


def string_items() -> st.SearchStrategy[tuple[Any, ...]]:
    """[op, key, *args] of the operations of strings, all arguments given."""
    conditions = st.sampled_from([op.ALWAYS, op.IF_ABSENT, op.IF_PRESENT])
    stored = st.tuples(st.just(op.STORE), HOT, VALUES, KEEP_OR_NONE | FUTURE)
    kinds = [
        st.tuples(stored, conditions, st.none(), st.booleans()).map(lambda t: (*t[0][:3], *t[0][3], *t[1:])),
        st.tuples(stored, st.just(op.IF_EQUAL), VALUES, st.booleans()).map(lambda t: (*t[0][:3], *t[0][3], *t[1:])),
        st.tuples(st.just(op.TAKE), HOT),
        st.tuples(st.just(op.TOUCH), HOT, KEEP_OR_NONE | FUTURE).map(lambda t: (*t[:2], *t[2])),
        st.tuples(st.just(op.EXPIRE_IF), HOT, ANY_TIME, st.sampled_from([0, 1, 2, 4, 5, 6])).map(
            lambda t: (*t[:2], *t[2], t[3])
        ),
        st.tuples(st.just(op.APPEND), HOT, VALUES),
        st.tuples(st.just(op.SETRANGE), HOT, OFFSETS, VALUES),
        st.tuples(st.just(op.SETBIT), HOT, st.integers(0, 40) | st.just(VALUE_BYTES_MAX * 8), st.integers(0, 1)),
        st.tuples(st.just(op.INCR_DECIMAL), HOT, DECIMALS),
        st.tuples(st.sampled_from([op.STORE]), HOT, DECIMALS).map(lambda t: (*t, op.KEEP_DEADLINE, 0, 0, None, False)),
        st.tuples(st.just(op.RENAME), HOT, HOT, st.booleans()),
        st.tuples(st.just(op.COPY), HOT, HOT, st.booleans()),
        st.tuples(
            st.lists(st.tuples(HOT, VALUES), min_size=1, max_size=4), st.booleans()
        ).map(lambda t: (op.PUT_ALL, t[0][0][0], t[0], t[1])),
    ]  # fmt: skip
    return st.one_of(kinds)


def transactions() -> st.SearchStrategy[tuple[Any, ...]]:
    """[TRANSACTION, key, watched, ops]; most watch nothing, since a guessed revision is hardly ever right."""
    ops = st.lists(string_items() | key_items() | st.tuples(KEY_READS, HOT), max_size=6)
    watched = st.just([]) | st.just([]) | st.lists(st.tuples(HOT, st.just(0) | st.integers(0, 12)), max_size=2)
    return st.tuples(st.just(op.TRANSACTION), HOT, watched, ops)


def write_items(*, with_wipe: bool = True) -> st.SearchStrategy[list[Any]]:
    """[op, key, *args] of every write operation, trailing arguments given, nil or left out."""
    return st.one_of(
        key_items(), string_items(), transactions(), st.tuples(st.just(op.PURGE), st.just(b""), LIMITS),
        st.tuples(st.just(op.CLEAR), KEYS, st.none() | KEYS, st.integers(-1, 6)),
        st.tuples(st.just(op.CLEAR), st.just(b""), st.none(), LIMITS if with_wipe else st.integers(0, 5)),
    ).map(list)  # fmt: skip


def key_items() -> st.SearchStrategy[tuple[Any, ...]]:
    """[op, key, *args] of the operations on one key that are not those of strings."""
    maybe_value = st.none() | VALUES
    maybe_rev = st.none() | st.integers(0, 12)
    maybe_ttl = st.none() | TTLS
    puts = st.tuples(st.just(op.PUT), KEYS, VALUES)
    return st.one_of(
        puts, puts, puts, st.tuples(st.just(op.PUT), KEYS, VALUES, maybe_ttl),
        st.tuples(st.just(op.PUT), KEYS, VALUES, maybe_ttl, st.none() | st.booleans()),
        st.tuples(st.just(op.ADD), KEYS, VALUES), st.tuples(st.just(op.ADD), KEYS, VALUES, maybe_ttl),
        st.tuples(st.just(op.DELETE), KEYS), st.tuples(st.just(op.DELETE), KEYS, maybe_value, maybe_rev),
        st.tuples(st.just(op.CAS), KEYS, VALUES, maybe_value, maybe_rev),
        st.tuples(st.just(op.INCR), KEYS, st.integers(-3, 3) | st.integers(-(2**63), 2**64 - 1)),
        st.tuples(st.just(op.EXPIRE), KEYS, TTLS), st.tuples(st.just(op.PERSIST), KEYS),
    )  # fmt: skip


def as_item(write: list[Any], seq: int) -> list[Any]:
    """The item of the link for [op, key, *args]."""
    return [write[0], 0, seq, 0, *write[1:]]


def visible(model: Model, stamp_ms: int) -> Model:
    """The rows that an operation at this stamp sees."""
    return {k: row for k, row in model.items() if row[2] is None or row[2] > stamp_ms}


def run_model(model: Model, write: list[Any], seq: int, stamp_ms: int) -> Any:
    """Apply a write to the model; its result, of an error the code and details only. Written from the protocol's table
    of operations, not from the code under test."""
    kind, key, *rest = write
    if kind == op.TRANSACTION:
        return _run_transaction(model, rest[0], rest[1], seq, stamp_ms)
    if kind >= op.STORE:
        return _run_string(model, write, seq, stamp_ms)
    args = [*rest, None, None, None, None]
    row = visible(model, stamp_ms).get(key)

    def put(value: bytes, deadline_ms: int | None) -> int:
        model[key] = (value, seq, deadline_ms)
        return seq

    def deadline(ttl_ms: int | None) -> int | None:
        return None if ttl_ms is None else stamp_ms + max(ttl_ms, 0)

    if kind == op.PUT:
        keeps = args[2] and args[1] is None and row is not None
        return put(args[0], row[2] if keeps and row else deadline(args[1]))
    if kind == op.ADD:
        return put(args[0], deadline(args[1])) if row is None else (Code.EXISTS, {"rev": row[1]})
    if kind == op.DELETE:
        if row is None or args[0] not in (None, row[0]) or args[1] not in (None, row[1]):
            return False
        del model[key]
        return True
    if kind == op.CAS:
        if args[1] is None and args[2] is None:
            return Code.BAD_REQUEST, {}
        if row is None and args[1] is None and args[2] == 0:
            return put(args[0], None)
        if row is None or args[1] not in (None, row[0]) or args[2] not in (None, row[1]):
            return Code.MISMATCH, {"rev": row[1] if row else 0}
        return put(args[0], row[2])
    if kind == op.INCR:
        text = row[0] if row else b"0"
        if text not in {b"0", b"7", b"-12", b"9223372036854775807"} and not _is_canonical(text):
            return Code.NOT_A_NUMBER, {}
        total = int(text) + args[0]
        if not -(2**63) <= total < 2**63:
            return Code.RANGE, {}
        put(str(total).encode(), row[2] if row else None)
        return total
    if kind in (op.EXPIRE, op.PERSIST):
        if row is None or (kind == op.PERSIST and row[2] is None):
            return False
        if kind == op.EXPIRE and args[0] <= 0:
            del model[key]
        else:
            model[key] = (row[0], seq, deadline(args[0]) if kind == op.EXPIRE else None)
        return True
    if kind == op.PURGE:
        expired = sorted((r[2], k) for k, r in model.items() if r[2] is not None and r[2] <= stamp_ms)
        gone = [k for _, k in expired[: max(0, args[0])]]
    else:
        gone = sorted(k for k in model if key <= k and (args[0] is None or k < args[0]))[: max(0, args[1])]
    for k in gone:
        del model[k]
    return len(gone)


def _run_transaction(model: Model, watched: list[Any], ops: list[Any], seq: int, stamp_ms: int) -> Any:
    seen = visible(model, stamp_ms)
    if any(rev != (seen[key][1] if key in seen else 0) for key, rev in watched):
        return None
    results: list[Any] = []
    for each in ops:
        if each[0] < op.WRITE_OP_END:
            results.append(run_model(model, list(each), seq, stamp_ms))
            continue
        row = visible(model, stamp_ms).get(each[1])
        if each[0] == op.EXISTS:
            results.append(row is not None)
        elif row is None:
            results.append(None)
        elif each[0] == op.GET:
            results.append((row[0], row[1], None if row[2] is None else row[2] - stamp_ms))
        else:
            left = -1 if row[2] is None else row[2] - (stamp_ms if each[0] == op.TTL else 0)
            results.append(left)
    return [results]


def _run_string(model: Model, write: list[Any], seq: int, stamp_ms: int) -> Any:
    kind, key, *args = write
    seen = visible(model, stamp_ms)
    row = seen.get(key)
    value, deadline_ms = (row[0], row[2]) if row else (b"", None)

    def time(mode: int, ms: int) -> int | None:
        return {
            op.KEEP_DEADLINE: deadline_ms, op.NO_DEADLINE: None, op.IN_MS: min(stamp_ms + ms, INTEGER_MAX), op.AT_MS: ms
        }[mode]  # fmt: skip

    def give_deadline(new_ms: int | None) -> None:
        assert row is not None
        if new_ms is not None and new_ms <= stamp_ms:
            del model[key]
        elif new_ms != deadline_ms:
            model[key] = (value, seq, new_ms)

    def place(offset: int, data: bytes) -> Any:
        size = max(len(value), offset + len(data))
        if size > VALUE_BYTES_MAX:
            return Code.TOO_LARGE, {"value_bytes": size, "value_bytes_max": VALUE_BYTES_MAX}
        content = bytearray(value)
        content += bytes(size - len(content))
        content[offset : offset + len(data)] = data
        model[key] = (bytes(content), seq, deadline_ms)
        return size

    if kind == op.STORE:
        new, mode, ms, condition, if_value, get = args
        holds = {
            op.ALWAYS: True, op.IF_ABSENT: row is None, op.IF_PRESENT: row is not None,
            op.IF_EQUAL: row is not None and value == if_value,
        }[condition]  # fmt: skip
        if holds:
            model[key] = (new, seq, time(mode, ms))
        return (row and value) if get else holds
    if kind == op.TAKE:
        if row:
            del model[key]
        return row and value
    if kind == op.TOUCH:
        if row:
            give_deadline(time(*args))
        return row and value
    if kind == op.EXPIRE_IF:
        mode, ms, condition = args
        new_ms, old = time(mode, ms), float("inf") if deadline_ms is None else deadline_ms
        assert new_ms is not None
        holds = row is not None and {
            op.ALWAYS: True, op.IF_ABSENT: deadline_ms is None, op.IF_PRESENT: deadline_ms is not None,
            op.IF_LATER: new_ms > old, op.IF_EARLIER: new_ms < old,
            op.IF_PRESENT_EARLIER: deadline_ms is not None and new_ms < old,
        }[condition]  # fmt: skip
        if holds:
            give_deadline(new_ms)
        return holds
    if kind == op.APPEND:
        return place(len(value), args[0]) if args[0] or not row else len(value)
    if kind == op.SETRANGE:
        return place(*args) if args[1] else len(value)
    if kind == op.SETBIT:
        at, bit = divmod(args[0], 8)
        old_byte = value[at] if at < len(value) else 0
        new_byte = (old_byte & ~(128 >> bit)) | (128 >> bit) * args[1]
        placed = place(at, bytes([new_byte]))
        return placed if isinstance(placed, tuple) else old_byte >> (7 - bit) & 1
    if kind == op.INCR_DECIMAL:
        total = _sum_of_decimals(value if row else b"0", args[0])
        if isinstance(total, bytes):
            model[key] = (total, seq, deadline_ms)
        return total
    if kind == op.PUT_ALL:
        pairs, if_absent = args
        if if_absent and any(k in seen for k, _ in pairs):
            return False
        model.update({k: (v, seq, None) for k, v in pairs})
        return True
    new_key, flag = args
    assert kind in (op.RENAME, op.COPY)
    if row is None:
        return op.NO_KEY if kind == op.RENAME else False
    if new_key in seen and flag == (kind == op.RENAME):
        return op.NEW_KEY_EXISTS if kind == op.RENAME else False
    if kind == op.RENAME:
        if new_key != key:
            model[new_key] = (value, seq, deadline_ms)
            del model[key]
        return op.RENAMED
    model[new_key] = (value, seq, deadline_ms)
    return True


def _sum_of_decimals(*texts: bytes) -> Any:
    """The sum as a plain decimal text of at most 17 places."""
    with localcontext() as context:
        context.prec = 1_000
        numbers = []
        for text in texts:
            try:
                numbers.append(Decimal(text.decode("ascii")))
            except (ArithmeticError, UnicodeDecodeError):
                return Code.NOT_A_NUMBER, {}
        is_plain = all(re.fullmatch(rb"[-+.0-9eE]+", text) for text in texts)
        if not is_plain or any(abs(number) > Decimal("1e308") for number in numbers):
            return Code.NOT_A_NUMBER, {}
        total = sum(numbers).quantize(Decimal("1e-17"), ROUND_HALF_EVEN)
        if abs(total) > Decimal("1e308"):
            return Code.RANGE, {}
        text = f"{total:f}".rstrip("0").removesuffix(".")
        return b"0" if text in ("-0", "0", "") else text.encode()


def _is_canonical(text: bytes) -> bool:
    try:
        return str(int(text)).encode() == text and -(2**63) <= int(text) < 2**63
    except ValueError:
        return False
