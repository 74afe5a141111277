"""The chaos driver: a short run, and a judge that finds planted mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chaos import run_round
from chaos_checks import History

ROUND_S = 3.0


async def test_a_short_run() -> None:
    """One round of faults on real processes breaks no promise; its report says how to repeat it."""
    report = await run_round(seed=8, seconds=ROUND_S, clients=2)
    assert report.startswith("seed 8: "), report


def verdict(path: Path, lines: list[list[Any]], final: dict[str, str] | None = None) -> list[str]:
    """What the judge says of these calls."""
    file = path / "history.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"late_s": 0.0}]))
    history = History()
    history.read(file)
    return history.check(final)


HONEST: list[list[Any]] = [
    ["put", "hot-0", 0, 1, "x", "ok", "ok"], ["get", "hot-0", 2, 3, None, "x", "ok"],
    ["cas", "hot-0", 4, 5, ["x", "y"], True, "ok"], ["put", "hot-0", 6, 7, "z", None, "refused"],
    ["incr", "count-0", 0, 1, 1, 1, "ok"], ["incr", "count-0", 2, 3, 1, None, "unknown"],
    ["incr", "count-0", 4, 5, 1, 3, "ok"],
    ["put", "pair-c-0-a", 0, 1, 1, 7, "ok"], ["put", "pair-c-0-b", 2, 3, 1, 8, "ok"],
    ["scan", "c", 4, 5, None, {"pair-c-0-a": 1, "pair-c-0-b": 1}, "ok"],
    ["put", "ttl-0", 0, 0.1, 1.0, 9, "ok"], ["get", "ttl-0", 0.2, 0.3, None, "x", "ok"],
    ["get", "ttl-0", 2, 2.1, None, None, "ok"],
]  # fmt: skip
HELD = {"hot-0": "y", "count-0": "3", "pair-c-0-a": "1", "pair-c-0-b": "1"}


def test_an_honest_history(tmp_path: Path) -> None:
    """Nothing is said of a history that is as promised."""
    assert verdict(tmp_path, HONEST, HELD) == []


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (["get", "hot-0", 8, 9, None, "x", "ok"], "hot-0 is not linearizable"),  # goes backwards
        (["get", "hot-0", 8, 9, None, "z", "ok"], "hot-0 is not linearizable"),  # a refused write happened
        (["incr", "count-0", 6, 7, 1, 3, "ok"], "count-0: an answer was given twice"),
        (["incr", "count-0", 6, 7, 1, 9, "ok"], "count-0: counted 9"),
        (["mget", "c", 6, 7, None, {"pair-c-0-a": 1, "pair-c-0-b": 2}, "ok"], "pair-c-0-b is 2, its a is 1"),
        (["scan", "c", 6, 7, None, {"pair-c-0-a": 0}, "ok"], "shows 0, after 1"),
        (["get", "ttl-0", 3, 3.1, None, "x", "ok"], "ttl-0 is there"),
        (["get", "ttl-0", 0.4, 0.5, None, None, "ok"], "ttl-0 is gone"),
    ],
)
def test_lies_are_found(tmp_path: Path, lie: list[Any], said: str) -> None:
    """One false answer in an honest history is named."""
    assert said in "\n".join(verdict(tmp_path, [*HONEST, lie]))


@pytest.mark.parametrize(
    ("key", "value"), [("hot-0", "x"), ("hot-0", None), ("count-0", "1"), ("count-0", "4"), ("pair-c-0-b", "0")]
)
def test_a_replica_without_what_was_acknowledged(tmp_path: Path, key: str, value: str | None) -> None:
    """What a node holds in the end is a read of every key: a write that is missing or doubled there is named."""
    held = {name: text for name, text in (HELD | {key: value}).items() if text is not None}
    assert key in "\n".join(verdict(tmp_path, HONEST, held))
