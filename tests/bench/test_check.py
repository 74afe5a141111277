"""The guard against becoming slower: verdicts, the commit it compares with, and which bench/ measures."""

import random
import subprocess
from pathlib import Path

import pytest

from bench import check


def test_the_guard_finds_what_is_worse() -> None:
    """Rates that fall and times that rise, by the median of the rounds; names that one side lacks are told."""
    rng = random.Random(2)
    rounds = []
    for _ in range(5):
        busy = rng.uniform(1, 3)  # meets both sides of a round
        base = {"put": [100 / busy, "ops/s"], "restart": [2 * busy, "s"], "same": [5 * busy, "us"], "old": [1, "us"]}
        head = {"put": [80 / busy, "ops/s"], "restart": [3 * busy, "s"], "same": [5.2 * busy, "us"], "new": [1, "us"]}
        rounds.append((base, head))
    found = check.changes(rounds)
    assert [(each.name, round(each.worse, 2)) for each in found] == [("restart", 1.5), ("put", 1.25), ("same", 1.04)]
    assert check.only_one(rounds) == ["new", "old"]
    assert [cells[-1] for cells in check.rows_of(found, 0.10)[1:]] == ["WORSE", "WORSE", ""]
    swapped = check.changes([(head, base) for base, head in rounds])
    assert [cells[-1] for cells in check.rows_of(swapped, 0.10)[1:]] == ["", "better", "better"]


def test_the_guard_takes_the_tag_before_or_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """If git knows no tag."""
    monkeypatch.setattr(check, "git", lambda *arguments: "v1" if arguments[-1] == "HEAD^" else "")
    assert check.default_base("HEAD") == "v1"

    def no_tag(*arguments: str) -> str:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(check, "git", no_tag)
    assert check.default_base("HEAD") == "HEAD~1"


@pytest.mark.parametrize("has_it", [True, False])
def test_a_commit_with_other_modules_is_measured_by_its_own_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_it: bool
) -> None:
    """The bench/ of this checkout is laid over both commits or none: all that it imports has to be in both."""
    for side in ("mine", "base", "head"):
        (tmp_path / side / "bench" / "load").mkdir(parents=True)
        (tmp_path / side / "bench" / "load" / "probe.py").write_text(f"SIDE = {side!r}\n")
        (tmp_path / side / "kvtcp" / "node").mkdir(parents=True)
        (tmp_path / side / "kvtcp" / "errors.py").touch()
    imported = "import kvtcp.errors, os.path\nfrom kvtcp.node import server\nfrom kvtcp.link.x import y\n"
    (tmp_path / "mine" / "bench" / "__init__.py").write_text(imported)
    (tmp_path / "head" / "kvtcp" / "link").mkdir()
    (tmp_path / "head" / "kvtcp" / "link" / "x.py").touch()
    if has_it:
        (tmp_path / "base" / "kvtcp" / "link" / "x").mkdir(parents=True)
    places = [tmp_path / "base", tmp_path / "head"]
    assert check.lay_over(places, tmp_path / "mine" / "bench") is has_it
    found = [(place / "bench" / "load" / "probe.py").read_text() for place in places]
    assert found == (["SIDE = 'mine'\n"] * 2 if has_it else ["SIDE = 'base'\n", "SIDE = 'head'\n"])
    said = capsys.readouterr().err
    assert said == "" if has_it else "base has no kvtcp.link.x: each is measured by its own bench/" in said


def test_this_checkout_has_what_its_bench_imports() -> None:
    """So it is measured by the bench/ beside it."""
    assert check.lacking(check.ROOT) == []
