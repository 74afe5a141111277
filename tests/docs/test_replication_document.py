"""docs/replication.md against the tests: the planted bugs it names are those that are planted, rule by rule."""

import re
from pathlib import Path

from tests.model.explore import MUTANTS as MODEL_MUTANTS
from tests.simulation.mutants import MUTANTS

TESTS = Path(__file__).parent.parent
TEXT = (TESTS.parent / "docs" / "replication.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading row."""
    table = TEXT.partition(heading)[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def names_in(cell: str) -> list[str]:
    """The names in a cell."""
    return re.findall(r"`(\w+)`", cell)


def test_every_mutant_of_the_model_is_told() -> None:
    """The table has each mutant once, beside the rule that it takes away."""
    table = rows("| rule | planted bug in the model |")
    told = [(names_in(bug)[0], rule) for rule, bug, _ in table]
    assert sorted(told) == sorted((name, rule) for name, (rule, _) in MODEL_MUTANTS.items())


def test_every_mutant_of_the_cores_is_told() -> None:
    """The table has each mutant once, beside the rule that it takes away."""
    table = rows("| rule | mutants of the cores |")
    told = [(name, rule) for rule, names in table for name in names_in(names)]
    assert sorted(told) == sorted((mutant.name, mutant.rule) for mutant in MUTANTS.values())


def test_planted_bugs_of_the_store_exist() -> None:
    """Each name is planted in the module whose test is named, and the test is there."""
    missing = []
    found = rows("| rule | planted bug in the store |")
    assert len(found) >= 4
    for _, bugs, test in found:
        named = re.fullmatch(r"`((?:\w+/)*test_\w+)::(test_\w+)`", test)
        assert named, test
        source = (TESTS / f"{named[1]}.py").read_text()
        names = [named[2], *names_in(bugs)]
        assert len(names) > 1, bugs
        there = set(re.findall(r"^(?:class|def|async def) (\w+)", source, re.M))
        missing += [f"{named[1]}: {name}" for name in names if name not in there]
    assert not missing


def test_every_rule_is_told() -> None:
    """R1 to R14, once each and in order."""
    assert re.findall(r"^\| R(\d+) \w+", TEXT, re.M)[:14] == [str(number) for number in range(1, 15)]
