"""The audit: compares the members of each shard now and then.

Pure, a part of the controller. All members get the question in one synchronous step, and links are in order, so every
answer is about the same moment: the same number, and the same chain, which covers everything before it (I6). A shard
whose members differ is stopped: any of them may be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvtcp.protocol.operations import AUDIT
from kvtcp.replication.membership.insync import Membership
from kvtcp.replication.outbox import Outbox
from kvtcp.replication.sequencing.link import Link
from kvtcp.replication.sequencing.requests import LINK_LOST
from kvtcp.replication.sequencing.sequencer import Sequencer


class Audit:
    """Audits of the shards of a sequencer. Learners of a shard that is stopped are given up."""

    def __init__(self, sequencer: Sequencer, membership: Membership, outbox: Outbox) -> None:
        self._sequencer = sequencer
        self._membership = membership
        self._outbox = outbox

    def begin(self) -> None:
        """I6: ask all members in one step for the chains of their shards."""
        asked: dict[int, list[Link]] = {}
        for shard in self._sequencer.shards:
            good = [link for link in shard.good if link.connected and not link.full]
            if shard.serving and len(good) > 1:
                asked[shard.number] = good
        answers: dict[int, dict[str, Any]] = {}
        by_link: dict[Link, list[int]] = {}
        for number, links in asked.items():
            for link in links:
                by_link.setdefault(link, []).append(number)
        for link, numbers in by_link.items():
            self._sequencer.call(link, (AUDIT, numbers), self._auditor(link, numbers, answers, asked))

    def _auditor(
        self, link: Link, numbers: list[int], answers: dict[int, dict[str, Any]], asked: dict[int, list[Link]]
    ) -> Callable[[Any], None]:
        def take(result: Any) -> None:
            if result is LINK_LOST:
                return
            for number, position in zip(numbers, result, strict=True):
                found = answers.setdefault(number, {})
                found[link.node] = None if position is None else tuple(position)
                if len(found) == len(asked[number]):
                    self._compare(number, found)

        return take

    def _compare(self, number: int, positions: Mapping[str, Any]) -> None:
        shard = self._sequencer.shards[number]
        if len(set(positions.values())) == 1 or not shard.serving:
            return
        listed = ", ".join(f"{node} {position}" for node, position in sorted(positions.items()))
        why = f"its members differ (number, chain): {listed}"
        self._outbox.alarm(f"shard {number} was stopped: {why}")
        self._sequencer.stop_serving(number, why)
        self._membership.end_learners(number, "its shard was stopped")
