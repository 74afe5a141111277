"""The core of a connection: ids, answers, deadlines and the end."""

import random
from typing import Any

import pytest

from kvtcp import errors
from kvtcp.client.core import SILENCE_S, TICKS_PER_S, ConnectionCore
from kvtcp.constants import FRAME_BYTES_MAX, REQUEST_ID_MAX
from kvtcp.protocol.framing import FrameDecoder, FrameEncoder
from kvtcp.protocol.messages import Kind

TICK_S = 1 / TICKS_PER_S
encode = FrameEncoder().encode
OF_KIND = {Kind.READ: b"get", Kind.WRITE: b"put", Kind.ADMIN: b"rebalance", Kind.LONG: b"backup"}


class Harness:
    """A core with named waiters, and the requests it sent."""

    def __init__(self) -> None:
        self.core: ConnectionCore[str] = ConnectionCore()
        self.decoder = FrameDecoder()
        self.now = 1000.0
        self.ids: dict[str, int] = {}

    def ask(self, waiter: str, kind: Kind = Kind.READ, timeout_s: float = 1.0, **more: Any) -> int:
        message: list[Any] = [0, OF_KIND[kind], waiter.encode()]
        self.core.request(message, waiter, self.now, timeout_s, **more)
        self.ids[waiter] = message[0]
        return self.ids[waiter]

    def sent(self) -> list[Any]:
        return self.decoder.feed(self.core.take_output())

    def hear(self, *frames: Any) -> list[Any]:
        return self.core.receive(b"".join(encode(list(frame)) for frame in frames), self.now)

    def later(self, by_s: float) -> list[Any]:
        self.now += by_s
        return self.core.expire(self.now)


@pytest.fixture
def h() -> Harness:
    """One that has sent nothing."""
    return Harness()


def test_answers_in_any_order(h: Harness) -> None:
    """Requests leave in order in one piece; answers find their waiters by id."""
    a, b, c = h.ask("a"), h.ask("b"), h.ask("c")
    assert h.sent() == [[a, b"get", b"a"], [b, b"get", b"b"], [c, b"get", b"c"]]
    assert h.core.take_output() == b""
    assert h.hear((c, 0, 3), (a, 0, 1)) == [("c", 3, None), ("a", 1, None)]
    assert h.hear((b, 0, None)) == [("b", None, None)]
    assert (h.core.outstanding, h.core.outstanding_bytes, h.core.failure) == (0, 0, None)


def test_error_answers_become_exceptions(h: Harness) -> None:
    """An error has the class, sentence and details of its code."""
    h.ask("a")
    h.sent()
    [(waiter, _, error)] = h.hear((h.ids["a"], 20, "it exists", {"rev": 4}))
    assert waiter == "a"
    assert isinstance(error, errors.KeyExists)
    assert (str(error), error.code, error.details) == ("it exists", errors.Code.EXISTS, {"rev": 4})


def test_abandoned_id_is_reserved_and_its_answer_dropped(h: Harness) -> None:
    """After a timeout the id goes to nobody else until the late answer, which reaches nobody."""
    first = h.ask("a")
    h.sent()
    assert [waiter for waiter, _, _ in h.later(1.0 + 2 * TICK_S)] == ["a"]
    h.core._last_id = first - 1  # as after four thousand million requests
    assert h.ask("b") != first
    h.sent()
    assert h.hear((first, 0, "late"), (h.ids["b"], 0, 2)) == [("b", 2, None)]
    assert h.core.outstanding == 0
    h.core._last_id = first - 1
    assert h.ask("c") == first


def test_calls_out_of_time_free_their_room(h: Harness) -> None:
    """What nobody waits for any more keeps no room from others, and a late answer gives none back twice."""
    a, b = h.ask("a", Kind.WRITE), h.ask("b", Kind.WRITE, timeout_s=9.0)
    h.sent()
    both_bytes = h.core.outstanding_bytes
    assert len(h.later(2.0)) == 1
    assert h.core.outstanding_bytes * 2 == both_bytes and h.core.outstanding == 2
    h.hear((a, 0, 1), (b, 0, 2))
    assert h.core.outstanding_bytes == 0 and h.core.outstanding == 0


def test_ids_wrap_around(h: Harness) -> None:
    """After the largest id comes 1, and ids in use are passed over."""
    assert h.ask("a") == 1
    h.core._last_id = REQUEST_ID_MAX - 1
    assert h.ask("b") == REQUEST_ID_MAX
    assert h.ask("c") == 2


@pytest.mark.parametrize("frame_bytes", [1, 7, 64, 1000])
def test_answers_cut_anywhere(h: Harness, frame_bytes: int) -> None:
    """Answers may arrive in any pieces."""
    for i in range(20):
        h.ask(f"w{i}")
    h.sent()
    stream = b"".join(encode([h.ids[f"w{i}"], 0, i]) for i in range(20))
    done = [d for i in range(0, len(stream), frame_bytes) for d in h.core.receive(stream[i : i + frame_bytes], h.now)]
    assert done == [(f"w{i}", i, None) for i in range(20)]


@pytest.mark.parametrize("timeout_s", [0.001, 0.02, 0.5, 1.0, 7.3])
def test_time_runs_out_late_by_a_tick_at_most(h: Harness, timeout_s: float) -> None:
    """A call ends after its timeout, not before, and at most a tick later when swept at `next_due`."""
    h.ask("a", timeout_s=timeout_s)
    assert h.core.next_due is not None
    assert timeout_s <= h.core.next_due - h.now <= timeout_s + TICK_S + 1e-9
    assert h.later(timeout_s - 1e-6) == []
    h.now = h.core.next_due or 0.0
    assert [waiter for waiter, _, _ in h.core.expire(h.now)] == ["a"]
    assert h.core.next_due is None


def test_next_due_is_the_earliest(h: Harness) -> None:
    """A shorter timeout moves `next_due` forward; an answered call no longer counts after the sweep."""
    h.ask("a", timeout_s=5)
    late = h.core.next_due
    h.ask("b", timeout_s=1)
    assert late is not None and h.core.next_due is not None and h.core.next_due < late
    h.sent()
    h.hear((h.ids["b"], 0, 1))
    assert h.later(2) == []
    assert h.core.next_due == late


@pytest.mark.parametrize(("kind", "error_class"), [
    (Kind.READ, errors.Unavailable), *((kind, errors.OutcomeUnknown) for kind in (Kind.WRITE, Kind.ADMIN, Kind.LONG)),
])  # fmt: skip
def test_out_of_time(h: Harness, kind: Kind, error_class: type[errors.KvtcpError]) -> None:
    """A read without an answer may be repeated, a write has an unknown outcome."""
    h.ask("a", kind, timeout_s=0.5)
    h.sent()
    [(_, _, error)] = h.later(0.6)
    assert type(error) is error_class
    assert "0.5 s" in str(error)


def test_progress_gives_more_time(h: Harness) -> None:
    """Progress frames are passed on, keep the call, and start its time again."""
    seen: list[Any] = []
    ident = h.ask("a", Kind.LONG, timeout_s=1.0, progress=seen.append)
    h.sent()
    for keys in range(5):
        h.later(0.8)
        assert h.hear((ident, 1, {"keys": keys})) == []
    assert seen == [{b"keys": keys} for keys in range(5)]
    assert h.hear((ident, 0, "done")) == [("a", b"done", None)]
    assert h.later(10) == []


def test_progress_of_a_call_that_was_given_up(h: Harness) -> None:
    """Progress for a call nobody waits for is dropped, and its id stays taken."""
    ident = h.ask("a", Kind.LONG, timeout_s=1.0, progress=lambda fields: pytest.fail("nobody listens"))
    h.sent()
    assert len(h.later(1.1)) == 1
    assert h.hear((ident, 1, {})) == []
    assert h.core.outstanding == 1
    assert h.hear((ident, 0, 1)) == []
    assert h.core.outstanding == 0


def test_progress_callback_that_fails(h: Harness) -> None:
    """The caller's own exception ends the caller's call and nothing else."""
    error = ZeroDivisionError()

    def fail(fields: Any) -> None:
        raise error

    ident = h.ask("a", Kind.LONG, progress=fail)
    other = h.ask("b")
    h.sent()
    assert h.hear((ident, 1, {}), (other, 0, 1)) == [("a", None, error), ("b", 1, None)]
    assert h.core.failure is None
    assert h.hear((ident, 0, 1)) == []


@pytest.mark.parametrize("trash", [False, True])
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("sent", [False, True])
def test_end_of_connection(h: Harness, sent: bool, kind: Kind, trash: bool) -> None:
    """What a call ends with: unsent is Unavailable, a sent write unknown, a sent read by what ended the connection."""
    if sent:
        h.ask("a", kind)
        h.sent()
    if trash:
        h.core.receive(b"HTTP/1.1 400 Bad Request\r\n", h.now)
        assert h.core.failure is not None
    else:
        if not sent:
            h.ask("a", kind)
        [(_, _, error)] = h.core.lost("the connection was lost")
        expected = errors.Unavailable if not sent or kind is Kind.READ else errors.OutcomeUnknown
        assert type(error) is expected
        assert ("was not sent" in str(error)) == (not sent)
        return
    done = h.core.lost("it is over")
    assert [type(error) for _, _, error in done] == (
        [] if not sent else [errors.ProtocolError if kind is Kind.READ else errors.OutcomeUnknown]
    )
    assert h.core.outstanding == h.core.outstanding_bytes == 0


@pytest.mark.parametrize("answer", [
    [77, 0, 1], [0, 0, 1], [None, 0, 1], ["x", 0, 1], [1.0, 0, 1], [True, 0, 1], [[], 0, 1], [1], [1, 0], [], 5,
    None, [1, 0, 1, 2, 3], [1, None, 1], [1, True, 1], [1, "x", 1], {"a": 1},
])  # fmt: skip
def test_garbage_ends_the_connection(h: Harness, answer: Any) -> None:
    """A frame that answers nothing that was asked is a failure; answers before it in the same read still count."""
    h.ask("a")
    good = h.ask("b")
    h.sent()
    assert h.core.receive(encode([good, 0, 7]) + encode(answer), h.now) == [("b", 7, None)]
    assert isinstance(h.core.failure, errors.ProtocolError)
    assert [waiter for waiter, _, _ in h.core.lost("over")] == ["a"]


def test_answer_twice(h: Harness) -> None:
    """A second answer to the same request is a failure, never somebody else's result."""
    ident = h.ask("a")
    h.ask("b")
    h.sent()
    assert h.hear((ident, 0, 1), (ident, 0, 2)) == [("a", 1, None)]
    assert h.core.failure is not None
    assert "not outstanding" in str(h.core.failure)


def test_request_over_the_limit_changes_nothing(h: Harness) -> None:
    """A request that does not fit a frame is refused and leaves no trace."""
    with pytest.raises(errors.RequestError) as caught:
        h.core.request([0, b"put", b"k", bytes(FRAME_BYTES_MAX)], "a", h.now, 1.0)
    assert caught.value.code == errors.Code.TOO_LARGE
    assert (h.core.outstanding, h.core.outstanding_bytes, h.core.take_output(), h.core.next_due) == (0, 0, b"", None)


def test_silence(h: Harness) -> None:
    """Only silence with calls out of time counts, from the last bytes heard, and any bytes end it."""
    h.later(100)
    assert not h.core.is_silent(h.now)
    ident = h.ask("a", timeout_s=1)
    h.sent()
    h.later(1.1)
    assert not h.core.is_silent(h.now)
    assert h.core.is_silent(h.now + SILENCE_S)
    h.ask("b", timeout_s=3600)
    h.sent()
    h.hear((ident, 0, 1))
    assert not h.core.is_silent(h.now + SILENCE_S)


def test_long_calls_do_not_make_a_lively_connection_silent(h: Harness) -> None:
    """A call that waited long and ran out of time says nothing about a connection that was heard a moment ago."""
    h.ask("long", Kind.LONG, timeout_s=60)
    h.later(59)
    ident = h.ask("a")
    h.sent()
    h.hear((ident, 0, 1))
    assert len(h.later(1.1)) == 1
    assert not h.core.is_silent(h.now)


@pytest.mark.parametrize("seed", range(20))
def test_random_history(seed: int) -> None:
    """Whatever requests, answers, delays and sweeps come: every call ends once, with its own answer or an error."""
    rng = random.Random(seed)
    h = Harness()
    ended: dict[str, Any] = {}
    waiting: list[tuple[int, str]] = []  # what the server has not answered
    asked = 0

    def finish(done: list[Any]) -> None:
        for waiter, result, error in done:
            assert waiter not in ended, f"seed {seed}: {waiter} ended twice"
            ended[waiter] = error
            assert error is not None or result == waiter.encode(), f"seed {seed}: {waiter} got {result!r}"

    for _ in range(400):
        for _ in range(rng.randrange(5)):
            kind = rng.choice([Kind.READ, Kind.WRITE])
            h.ask(f"w{asked}", kind, rng.choice([0.01, 0.1, 0.1, 2.0]))
            asked += 1
        if rng.random() < 0.1:
            h.core._last_id = rng.choice([0, REQUEST_ID_MAX - 2])
        waiting += [(ident, name.decode()) for ident, _, name in h.sent()]
        rng.shuffle(waiting)
        answers = [waiting.pop() for _ in range(rng.randrange(len(waiting) + 1))]
        stream = b"".join(encode([ident, 0, name.encode()]) for ident, name in answers)
        while stream:
            cut = rng.randrange(1, 60)
            finish(h.core.receive(stream[:cut], h.now))
            stream = stream[cut:]
        finish(h.later(rng.random() * 0.03))
        assert h.core.failure is None, f"seed {seed}"
        assert h.core.outstanding == len(waiting), f"seed {seed}"
    finish(h.core.lost("over"))
    assert len(ended) == asked
    assert h.core.outstanding_bytes == 0
