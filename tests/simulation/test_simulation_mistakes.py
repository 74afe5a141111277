"""Planted mistakes are found: by the seeds that found them before, or by a few others.

What a seed does depends on every line of the cores, so a recorded seed may have come to miss its mistake; then a short
search has to find it. Those that take hundreds of seeds are left to `make mutants`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.simulation.mistakes import MISTAKES, SEEDS, recorded, run_with

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "replication.md"
SEARCH = 40  # seeds for one that is missed by its own
RARE = 40  # a mistake whose seed is higher is rare

FOUND = recorded()


def test_every_mistake_was_found() -> None:
    """At least thirty, each within the promised number of seeds."""
    assert len(MISTAKES) >= 30
    assert FOUND.keys() == MISTAKES.keys(), "run `make mutants` and record what it finds"
    assert max(FOUND.values()) < SEEDS


def test_every_mistake_is_documented() -> None:
    """The table of the document has them all, with their rules, and no others."""
    table = DOCUMENT.read_text().partition("| rule | mistakes planted in the cores |")[2].partition("\n\n")[0]
    documented = {}
    for line in table.splitlines():
        cells = line.split("|")
        if len(cells) > 2:
            documented |= dict.fromkeys(re.findall(r"`(\w+)`", cells[2]), cells[1].strip())
    assert documented == {name: mistake.rule for name, mistake in MISTAKES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, seed in FOUND.items() if seed <= RARE])
def test_the_mistake_is_found(name: str) -> None:
    """By its recorded seed, or by another one."""
    for seed in [FOUND[name], *range(SEARCH)]:
        if run_with(name, seed).violation:
            return
    pytest.fail(f"{name} was not found by seed {FOUND[name]}, nor by the first {SEARCH}: see `make mutants`")
