"""Mutants are found: by the seeds that found them before, or by a few others.

What a seed does depends on every line of the cores, so a recorded seed may have come to miss its mutant; then a short
search has to find it.
"""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS, SEEDS, recorded, run_with

SEARCH = 40  # seeds for one that is missed by its own

FOUND = recorded()


def test_every_mutant_was_found() -> None:
    """At least thirty, each within the promised number of seeds."""
    assert len(MUTANTS) >= 30
    assert FOUND.keys() == MUTANTS.keys(), "run `make mutants` and record what it finds"
    assert max(FOUND.values()) < SEEDS


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_the_mutant_is_found(name: str) -> None:
    """By its recorded seed, or by another one."""
    for seed in [FOUND[name], *range(SEARCH)]:
        if run_with(name, seed).violation:
            return
    pytest.fail(f"{name} was not found by seed {FOUND[name]}, nor by the first {SEARCH}: see `make mutants`")
