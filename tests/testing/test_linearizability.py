"""Tests of the linearizability checker: known verdicts, and random histories of a correct and of a broken register."""

import itertools
import random
from typing import Any

import pytest

from kvtcp.testing.linearizability import Numbered, TimedOperation, check_history, check_order, step

VERDICTS: list[tuple[str, bool, list[TimedOperation]]] = [
    ("empty", True, []),
    ("sequential", True, [(0, 1, "put", 1, "ok"), (2, 3, "get", None, 1)]),
    ("stale read", False, [(0, 1, "put", 1, "ok"), (2, 3, "get", None, None)]),
    ("concurrent read of either", True, [(0, 5, "put", 1, "ok"), (1, 2, "get", None, None), (3, 4, "get", None, 1)]),
    ("going back", False, [(0, 9, "put", 1, "ok"), (1, 2, "get", None, 1), (3, 4, "get", None, None)]),
    ("unknown happened", True, [(0, None, "put", 1, 0), (2, 3, "get", None, 1), (4, 5, "get", None, 1)]),
    ("unknown undone", False, [(0, None, "put", 1, 0), (2, 3, "get", None, 1), (4, 5, "get", None, None)]),
    ("unknown never", True, [(0, None, "put", 1, 0), (2, 3, "get", None, None)]),
    ("unknown once", True, [(0, None, "incr", 1, 0), (2, 3, "incr", 1, 2), (4, 5, "get", None, 2)]),
    ("applied twice", False, [(0, None, "incr", 1, 0), (2, 3, "incr", 1, 3)]),
    ("lost update", False, [(0, 1, "incr", 1, 1), (2, 3, "incr", 1, 1)]),
    ("cas", True, [(0, 1, "add", 1, True), (2, 3, "cas", (1, 2), True), (4, 5, "cas", (1, 3), False)]),
    ("two adds won", False, [(0, 5, "add", 1, True), (0, 5, "add", 2, True)]),
    ("delete", True, [(0, 1, "delete", None, False), (2, 3, "add", 1, True), (4, 5, "delete", None, True)]),
    ("exists", True, [(0, 1, "exists", None, False), (2, 3, "put", 1, "ok"), (4, 5, "exists", None, True)]),
    ("seen too early", False, [(0, 1, "exists", None, True), (2, 3, "put", 1, "ok")]),
    ("swap", True, [(0, 1, "swap", 1, None), (2, 3, "swap", 2, 1), (4, 5, "get", None, 2)]),
    ("swapped twice", False, [(0, 9, "put", 1, "ok"), (10, 19, "swap", 2, 1), (10, 19, "swap", 3, 1)]),
    ("append", True, [(0, 1, "append", 12, 2), (2, 3, "append", 34, 4), (4, 5, "get", None, 1234)]),
    ("append lost", False, [(0, 1, "append", 12, 2), (2, 3, "append", 34, 4), (4, 5, "append", 56, 4)]),
    ("unknown append happened", True, [(0, None, "append", 12, 0), (2, 3, "append", 34, 4)]),
    ("backtracking", True, [(0, 9, "put", 1, "ok"), (0, 9, "put", 2, "ok"), (10, 11, "get", None, 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "verdict", "history"), VERDICTS, ids=[name for name, _, _ in VERDICTS])
def test_verdicts(name: str, verdict: bool, history: list[TimedOperation]) -> None:
    """Histories whose verdict is clear by eye."""
    assert check_history(history) is verdict


def brute_force(history: list[TimedOperation]) -> bool:
    """The definition: some order of all answered and some unanswered operations explains the results."""
    answered = [n for n, operation in enumerate(history) if operation[1] is not None]
    unanswered = [n for n, operation in enumerate(history) if operation[1] is None]
    for count in range(len(unanswered) + 1):
        for extra in itertools.combinations(unanswered, count):
            for order in itertools.permutations([*answered, *extra]):
                if explains(history, order):
                    return True
    return False


def explains(history: list[TimedOperation], order: tuple[int, ...]) -> bool:
    """Whether `order` respects real time and gives every answered result."""
    for earlier, later in itertools.combinations(order, 2):
        ret = history[later][1]
        if ret is not None and ret < history[earlier][0]:
            return False
    state: Any = None
    for n in order:
        _, ret, kind, argument, result = history[n]
        state, outcome = step(state, kind, argument)
        if ret is not None and outcome != result:
            return False
    return True


def random_history(rng: random.Random, count: int) -> list[TimedOperation]:
    """Random small operations with random results: most are not linearizable, some are."""
    history: list[TimedOperation] = []
    for _ in range(count):
        kind = rng.choice(["get", "exists", "put", "delete", "add", "cas", "incr", "incr"])
        argument: Any = {"put": 1, "add": 2, "cas": (1, 2), "incr": 1}.get(kind)
        results: list[Any] = {"get": [None, 1, 2], "put": ["ok"], "incr": [1, 2, 3]}.get(kind, [True, False])
        call = rng.randrange(8)
        ret = None if kind not in ("get", "exists") and rng.random() < 0.2 else call + rng.randrange(1, 6)
        history.append((call, ret, kind, argument, rng.choice(results)))
    return history


def test_brute_force_agrees() -> None:
    """On 400 random small histories the search and the definition agree, and both verdicts occur."""
    rng = random.Random(1)
    verdicts = []
    for _ in range(400):
        history = random_history(rng, rng.randrange(1, 6))
        verdict = brute_force(history)
        assert check_history(history) is verdict, history
        verdicts.append(verdict)
    assert 40 < sum(verdicts) < 360


def test_budget() -> None:
    """A search that is cut off says so and does not guess."""
    history: list[TimedOperation] = [(0, 100, "put", n, "ok") for n in range(12)] + [(101, 102, "get", None, 99)]
    assert check_history(history, budget=1_000) is None


def test_twins() -> None:
    """Forty increments without an answer are no reason to give up: they are all the same."""
    history: list[TimedOperation] = [(n, None, "incr", 1, None) for n in range(40)]
    history += [(100 + 2 * n, 101 + 2 * n, "get", None, n) for n in range(1, 41)]
    assert check_history(history, budget=200_000) is True
    assert check_history([*history, (300, 301, "get", None, 41)]) is False


def test_unknown_kind() -> None:
    """An operation without a specification is an error, not a verdict."""
    with pytest.raises(ValueError, match="unknown kind"):
        check_history([(0, 1, "unlink", 1, "ok")])


def test_order_of_the_log() -> None:
    """The order of numbers has to explain the results and to respect real time; each kind of contradiction is named."""
    good: list[Numbered] = [
        (1, (0, 5, "put", 1, "ok")), (2, (1, None, "incr", 1, None)), (3, (2, 9, "incr", 1, 3)),
        (3, (6, 7, "get", None, 3)), (3, (3, 4, "get", None, 3)), (1, (0, 3, "get", None, 1)),
    ]  # fmt: skip
    assert check_order(good) == ""
    assert check_order([]) == ""
    assert check_order([(1, (0, 1, "get", None, 7))], initial=7) == ""
    assert "two writes" in check_order([*good, (2, (0, 9, "put", 1, "ok"))])
    assert "gave 9 instead of 3" in check_order([*good, (3, (6, 7, "get", None, 9))])
    assert "ended before" in check_order([*good, (4, (0, 1, "put", 1, "ok"))])  # 3 was called at 2
    assert "get at 1 gave None" in check_order([*good, (1, (6, 7, "get", None, None))])


def numbered_history(rng: random.Random, count: int) -> list[Numbered]:
    """A history that is made by its log: every operation takes effect at a random time between call and return."""
    points = sorted(rng.random() * count for _ in range(count))
    state, seq, numbered = None, 0, []
    for point in points:
        kind = rng.choice(["get", "put", "delete", "add", "cas", "incr"])
        argument: Any = {"put": rng.randrange(3), "add": 2, "cas": (1, 2), "incr": 1}.get(kind)
        seq += kind != "get"
        state, result = step(state, kind, argument)
        operation: TimedOperation = (point - rng.random() * 3, point + rng.random() * 3, kind, argument, result)
        numbered.append((seq, operation))
    return numbered


def test_order_and_search_agree() -> None:
    """What the log explains is linearizable; where the search says no, the order says why; both happen."""
    rng = random.Random(3)
    refused = 0
    for _ in range(300):
        numbered = numbered_history(rng, 12)
        assert check_order(rng.sample(numbered, len(numbered))) == "", numbered
        assert check_history([operation for _, operation in numbered]) is True, numbered
        place = rng.randrange(12)
        seq, (call, ret, kind, argument, result) = numbered[place]
        numbered[place] = (seq, (call, ret, kind, argument, rng.choice([result, True, False, None, 0, 1, 2])))
        if check_history([operation for _, operation in numbered]) is False:
            refused += 1
            assert check_order(numbered), numbered
    assert refused > 50
