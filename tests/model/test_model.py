"""The model of the replication rules: the smaller scopes hold, every mutant is caught, every goal is reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.model import explore as replication_model
from tests.model import rules as replication_model_rules
from tests.model.explore import (
    CAPPED,
    EXHAUSTED,
    GOALS,
    MUTANTS,
    QUICK,
    Case,
    Outcome,
    Search,
    cases,
    main,
    run_case,
    run_cases,
)
from tests.model.rules import DESTROYED, Node, Rules, Scope, State, common, conflict

JOBS = 2
SLOW = {"M2 epochs2 ops2", "disk lost", "tail lost"}
SMALL = Scope(2, 2, ("put x",))
SOURCES = [Path(module.__file__) for module in (replication_model, replication_model_rules)]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], Outcome]:
    """All quick cases but the slow ones, searched side by side once; by kind and name."""
    quick = [case for case in cases(quick=True) if case.kind != "rules" or case.name not in SLOW]
    return {(outcome.case.kind, outcome.case.name): outcome for outcome in run_cases(quick, JOBS)}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in QUICK])
def test_the_rules_hold(name: str, outcomes: dict[tuple[str, str], Outcome]) -> None:
    """No interleaving of the scope breaks a property, and all of them were seen."""
    outcome = outcomes.get(("rules", name)) or run_case(Case("rules", name, QUICK[name]))
    assert outcome.found.verdict == EXHAUSTED, str(outcome)
    assert outcome.found.states > 2_000


@pytest.mark.parametrize("name", MUTANTS)
def test_a_rule_taken_away_is_missed(name: str, outcomes: dict[tuple[str, str], Outcome]) -> None:
    """Without the rule a property is broken, or the shard can get stuck, in the same small scope."""
    outcome = outcomes["mutant", name]
    assert outcome.found.verdict not in (EXHAUSTED, CAPPED), str(outcome)
    assert outcome.found.trace


@pytest.mark.parametrize("name", GOALS)
def test_what_is_explored_is_not_empty(name: str, outcomes: dict[tuple[str, str], Outcome]) -> None:
    """A move and both ways to replace a destroyed member come to a healthy end."""
    outcome = outcomes["goal", name]
    assert outcome.is_expected, str(outcome)


@pytest.mark.parametrize("name", sorted(MUTANTS.keys() - {"epoch_volatile"}))
def test_the_rules_hold_where_a_mutant_is_caught(name: str, outcomes: dict[tuple[str, str], Outcome]) -> None:
    """What breaks the property is the mutant: with all rules its scope holds, over the first states at least."""
    found = Search(Rules(MUTANTS[name][1]), min(outcomes["mutant", name].found.states, 2_000)).run()
    assert found.verdict in (EXHAUSTED, CAPPED), found


def test_every_mutant_is_listed() -> None:
    """A mutant is a word in the rules and an entry of the table, and nothing is only one of the two."""
    rules = SOURCES[1].read_text()
    named = set(re.findall(r'self\.mutant [!=]= "(\w+)"', rules))
    assert named | {"epoch_volatile"} == set(MUTANTS)  # that one is a fault: a node forgets its promise


def test_a_capped_search_says_so() -> None:
    """A search that is cut off does not claim to have seen everything."""
    found = Search(Rules(SMALL), 100).run()
    assert found.verdict == CAPPED and found.states >= 100


def test_a_trace_leads_to_the_violation() -> None:
    """The steps of a trace can be taken one after the other from the beginning, and the last one is the violation."""
    rules = Rules(SMALL, "commit_on_minimum")
    found = Search(rules).run()
    state = rules.initial()
    for label in found.trace[:-1]:
        state = dict(rules.successors(state))[label]
    assert found.trace[-1].startswith("c0.commit") and "missing" in found.verdict


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    """0 if all is as expected; 1 if a mutant is not caught, here for a cap far too small."""
    assert main(["--quick", "--jobs", "1", "--only", "expand_late"]) == 0
    assert "1 of 1 as expected" in capsys.readouterr().out
    assert main(["--quick", "--jobs", "1", "--only", "expand_late", "--cap", "50"]) == 1
    assert "FAIL mutant expand_late (R2): cap" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--only", "no such case"])


def test_logs() -> None:
    """The common beginning, and whether two logs can both be true."""
    assert common((10, 11), (10, 21)) == 1
    assert common((), (10,)) == 0
    assert conflict((10, 11), (10, 21))
    assert not conflict((10,), (10, 21))


def test_sorted_states_are_one() -> None:
    """States that differ only by the order of their nodes are the same one after sorting, and only those."""
    state = Rules(Scope(2, 2, ("put x",), members=2)).initial()

    def turned(nodes: tuple[Node, ...]) -> State:
        return state.with_nodes(nodes).sorted()

    assert turned(state.nodes) == turned(state.nodes[::-1])
    assert turned(state.nodes) != turned((*state.nodes[:2], state.nodes[2]._replace(disk=DESTROYED)))
