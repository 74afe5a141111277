"""The chaos driver: a short run, and a judge that finds planted mistakes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvtcp.protocol.hashing import shard_of
from kvtcp.protocol.operations import PUT
from kvtcp.storage.disk.store import open_store
from kvtcp.storage.files import OS_DISK
from kvtcp.storage.shard.copy import Copy
from tests.chaos.checks import Availability, Gap, History, blame
from tests.chaos.cluster import Shape
from tests.chaos.disks import read_members
from tests.chaos.run import Options, run_round

ROUND_S = 3.0
FAULTS = ("kill_node", "kill_coordinator", "cut")


async def test_a_short_run() -> None:
    """One round of faults on real processes breaks no promise."""
    options = Options(clients=1, only=FAULTS, with_operator=False, ballast=100)
    report = await run_round(seed=8, seconds=ROUND_S, shape=Shape("linked"), options=options)
    assert report.broken == [], report.text()
    assert report.kills["node"] > 0 and report.kills["coordinator"] > 0 and report.calls > 200, report.text()


def read(path: Path, lines: list[list[Any]]) -> History:
    """These calls as a history."""
    file = path / "history.jsonl"
    end = {"late_s": 0.0, "lag_s": 0.0, "counts": {"ok": 3, "refused": 1}}
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, end]))
    history = History()
    history.read(file)
    return history


def verdict(
    path: Path, lines: list[list[Any]], final: dict[str, str] | None = None, takeovers: tuple[float, ...] = ()
) -> list[str]:
    """What the judge says of these calls."""
    return read(path, lines).check(final, takeovers)


HONEST: list[list[Any]] = [
    ["put", "hot-0", 0, 1, "x", "ok", "ok"], ["get", "hot-0", 2, 3, None, "x", "ok"],
    ["cas", "hot-0", 4, 5, ["x", "y"], True, "ok"], ["put", "hot-0", 6, 7, "z", None, "refused"],
    ["incr", "count-0", 0, 1, 1, 1, "ok"], ["incr", "count-0", 2, 3, 1, None, "unknown"],
    ["incr", "count-0", 4, 5, 1, 3, "ok"],
    ["put", "pair-c-0-a", 0, 1, 1, 7, "ok"], ["put", "pair-c-0-b", 2, 3, 1, 8, "ok"],
    ["scan", "c", 4, 5, None, {"pair-c-0-a": 1, "pair-c-0-b": 1}, "ok"],
    ["put", "ttl-0", 0, 0.1, 1.0, 9, "ok"], ["get", "ttl-0", 0.2, 0.3, None, "x", "ok"],
    ["get", "ttl-0", 2, 2.1, None, None, "ok"],
    ["put", "cold-0", 0, 1, 1, 7, "ok"], ["put", "cold-0", 2, 3, 2, 11, "ok"],
    ["get", "cold-0", 4, 5, None, 2, "ok"], ["put", "cold-0", 6, 8, 3, None, "unknown"],
    ["put", "cold-1", 0, 1, 1, 7, "ok"], ["put", "cold-1", 2, 3, 2, None, "refused"],
]  # fmt: skip
HELD = {"hot-0": "y", "count-0": "3", "pair-c-0-a": "1", "pair-c-0-b": "1", "cold-0": "2", "cold-1": "1  "}


@pytest.mark.parametrize("cold", ["2", "3"])
def test_an_honest_history(tmp_path: Path, cold: str) -> None:
    """Nothing is said of a history that is as promised, whether what is unknown happened or not."""
    assert verdict(tmp_path, HONEST, HELD | {"cold-0": cold}) == []


@pytest.mark.parametrize(("lie", "said"), [
    (["get", "hot-0", 8, 9, None, "x", "ok"], "hot-0 is not linearizable"),  # goes backwards
    (["get", "hot-0", 8, 9, None, "z", "ok"], "hot-0 is not linearizable"),  # a refused write happened
    (["incr", "count-0", 6, 7, 1, 3, "ok"], "count-0: an answer was given twice"),
    (["incr", "count-0", 6, 7, 1, 9, "ok"], "count-0: counted 9"),
    (["mget", "c", 6, 7, None, {"pair-c-0-a": 1, "pair-c-0-b": 2}, "ok"], "pair-c-0-b is 2, its a is 1"),
    (["scan", "c", 6, 7, None, {"pair-c-0-a": 0}, "ok"], "shows 0, after 1"),
    (["get", "ttl-0", 3, 3.1, None, "x", "ok"], "ttl-0 is there"),
    (["get", "ttl-0", 0.4, 0.5, None, None, "ok"], "ttl-0 is gone"),
    (["get", "cold-0", 4, 5, None, 1, "ok"], "shows 1, after 2"),  # an old value
    (["get", "cold-0", 4, 5, None, 3, "ok"], "shows 3, which was refused or not written yet"),
    (["get", "cold-1", 4, 5, None, 2, "ok"], "shows 2, which was refused or not written yet"),
    (["put", "cold-0", 9, 9, 4, 11, "ok"], "its revisions do not grow"),
])  # fmt: skip
def test_lies_are_found(tmp_path: Path, lie: list[Any], said: str) -> None:
    """One false answer in an honest history is named."""
    assert said in "\n".join(verdict(tmp_path, [*HONEST, lie]))


@pytest.mark.parametrize(("key", "value"), [
    ("hot-0", "x"), ("hot-0", None), ("count-0", "1"), ("count-0", "4"), ("pair-c-0-b", "0"), ("cold-0", "1"),
    ("cold-0", "4"), ("cold-1", "2"), ("cold-1", None),
])  # fmt: skip
def test_a_replica_without_what_was_acknowledged(tmp_path: Path, key: str, value: str | None) -> None:
    """What a node holds in the end is a read of every key: a write that is missing or doubled there is named."""
    held = {name: text for name, text in (HELD | {key: value}).items() if text is not None}
    assert key in "\n".join(verdict(tmp_path, HONEST, held))


def test_deadlines_after_a_takeover(tmp_path: Path) -> None:
    """Time may jump ahead by some seconds when a coordinator ended without a word, and for some seconds only."""
    gone = ["get", "ttl-0", 0.4, 0.5, None, None, "ok"]
    assert verdict(tmp_path, [*HONEST, gone], takeovers=(-3.0,)) == []
    assert verdict(tmp_path, [*HONEST, gone], takeovers=(-20.0, 7.0)) != []


def test_how_much_was_served(tmp_path: Path) -> None:
    """The gaps of each shard are found, also at the edges, and laid to the fault that was there."""
    keys = {shard_of(key.encode(), 2): key for key in ("cold-0", "cold-1", "cold-2")}
    lines = [["put", keys[0], at - 0.1, at, 1, 1, "ok"] for at in (1.0, 2.0, 6.5, 7.0, 8.0, 9.0)]
    lines += [["put", keys[1], at - 0.1, at, 1, 1, "ok"] for at in (0.5, 9.5)]
    lines += [["put", keys[1], 4.0, 5.0, 1, 1, "unknown"], ["get", keys[1], 4.0, 5.0, None, 1, "ok"]]
    history = read(tmp_path, lines)
    assert history.answered == 0.75
    found = Availability(history, 2, 0.0, 10.0)
    assert found.worst() == [4.5, 9.0]
    assert found.gaps(2.0) == [Gap(0, 2.0, 6.5), Gap(1, 0.5, 9.5)]
    assert found.longest_stall_s() == 4.5
    assert found.served() == (6 + 2) / 20
    assert blame(found.gaps(2.0), [(0.1, "cut"), (1.0, "kill"), (3.0, "stop")]) == {"kill": [9.0], "stop": [4.5]}


def make_node(directory: Path, values: list[str]) -> str:
    """The data directory of a stopped node with one shard, and the disk of its copy."""
    directory.mkdir(parents=True)
    store = open_store(OS_DISK, directory, "sync", os.urandom, "")
    copy = Copy(0, directory.name)
    store.copies[0] = copy
    store.write_manifest(store.encode_manifest([copy]))
    entries = []
    for number, value in enumerate(values, 1):
        copy.table.epoch = 1
        copy.table.apply((PUT, 0, number, 0, f"key-{number}".encode(), value.encode()), 1000 + number)
        entries.append((0, 1, *copy.table.position[1:], copy.table.last_entry))
    prepared = store.log.prepare(entries)
    store.log.write(prepared)
    store.log.written(prepared)
    store.close_clean()
    return copy.disk


@pytest.mark.parametrize(("values", "disk", "said"), [
    (["a", "b"], "n2", ""),
    (["a"], "n2", "members differ"),
    (["a", "c"], "n2", "members differ"),
    (["a", "b"], "other", "n2 is a member by other and holds n2 (complete)"),
])  # fmt: skip
def test_members_that_differ(tmp_path: Path, values: list[str], disk: str, said: str) -> None:
    """Members whose data differ are named, with all versions of what they hold; so is one with another disk."""
    make_node(tmp_path / "n1", ["a", "b"])
    make_node(tmp_path / "n2", values)
    value = {"nodes": {"n1": [], "n2": []}, "members": [[["n1", "n1"], ["n2", disk]]]}
    versions, broken = read_members(value, lambda node: tmp_path / node)
    assert versions[0] == {"key-1": "a", "key-2": "b"}
    assert len(versions) == (2 if said == "members differ" else 1)
    assert said in "\n".join(broken) and bool(broken) == bool(said), broken
