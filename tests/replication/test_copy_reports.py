"""Tests of copy reports: what is said of each kind of bad copy."""

from __future__ import annotations

import pytest

from kvtcp.protocol.link import CopyReport
from kvtcp.replication.copy_reports import foreign_copy, incomplete_copy


@pytest.mark.parametrize(
    ("copy", "why"),
    [
        (CopyReport("d"), "came back without its data"),
        (CopyReport("d", seq=3), "came back without its data: what it has is not what was written to this cluster"),
        (CopyReport("d", seq=3, damage="the log is torn"), "has a damaged copy: the log is torn"),
    ],
)
def test_a_foreign_copy(copy: CopyReport, why: str) -> None:
    """Damage is the better reason; entries of its own are said."""
    assert foreign_copy(copy) == why


def test_an_incomplete_copy() -> None:
    """The node may say why."""
    assert incomplete_copy(CopyReport("d", complete=False)) == "has an incomplete copy: it was never finished"
    damaged = CopyReport("d", complete=False, damage="no snapshot")
    assert incomplete_copy(damaged) == "has an incomplete copy: no snapshot"
