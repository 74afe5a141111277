"""Write items and a plain model of a shard, for the tests of the table and of what is built on it."""

from typing import Any

from hypothesis import strategies as st

from kvtcp.errors import Code
from kvtcp.protocol import operations as op

Model = dict[bytes, tuple[bytes, int, int | None]]  # key -> value, rev, deadline_ms

KEYS = st.sampled_from([b"%c" % c for c in b"abcdefgh"]) | st.binary(min_size=1, max_size=2)
VALUES = st.sampled_from([b"", b"0", b"-0", b"7", b"-12", b"007", b"9223372036854775807", b"x"]) | st.binary(max_size=3)
TTLS = st.integers(-2, 12)
LIMITS = st.integers(-1, 40)


def write_items(*, with_wipe: bool = True) -> st.SearchStrategy[list[Any]]:
    """[op, key, *args] of every write operation, trailing arguments given, nil or left out."""
    maybe_value = st.none() | VALUES
    maybe_rev = st.none() | st.integers(0, 12)
    maybe_ttl = st.none() | TTLS
    puts = st.tuples(st.just(op.PUT), KEYS, VALUES)
    return st.one_of(
        puts,
        puts,
        puts,
        st.tuples(st.just(op.PUT), KEYS, VALUES, maybe_ttl),
        st.tuples(st.just(op.PUT), KEYS, VALUES, maybe_ttl, st.none() | st.booleans()),
        st.tuples(st.just(op.ADD), KEYS, VALUES),
        st.tuples(st.just(op.ADD), KEYS, VALUES, maybe_ttl),
        st.tuples(st.just(op.DELETE), KEYS),
        st.tuples(st.just(op.DELETE), KEYS, maybe_value, maybe_rev),
        st.tuples(st.just(op.CAS), KEYS, VALUES, maybe_value, maybe_rev),
        st.tuples(st.just(op.INCR), KEYS, st.integers(-3, 3) | st.integers(-(2**63), 2**64 - 1)),
        st.tuples(st.just(op.EXPIRE), KEYS, TTLS),
        st.tuples(st.just(op.PERSIST), KEYS),
        st.tuples(st.just(op.PURGE), st.just(b""), LIMITS),
        st.tuples(st.just(op.CLEAR), KEYS, st.none() | KEYS, st.integers(-1, 6)),
        st.tuples(st.just(op.CLEAR), st.just(b""), st.none(), LIMITS if with_wipe else st.integers(0, 5)),
    ).map(list)


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


def _is_canonical(text: bytes) -> bool:
    try:
        return str(int(text)).encode() == text and -(2**63) <= int(text) < 2**63
    except ValueError:
        return False
