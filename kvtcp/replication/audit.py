"""The audit: members are asked now and then whether they have the same.

Pure, a part of the controller. All members get the question in one synchronous step, and links are in order, so every
answer is about the same moment: the same number, and the same chain, which stands for everything before it (I6). A
shard whose members differ is stopped: whichever of them is read may be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kvtcp.protocol.operations import AUDIT
from kvtcp.replication.progress import Progress
from kvtcp.replication.shard_state import LINK_LOST

if TYPE_CHECKING:
    from kvtcp.replication.controller import Controller


class Audit:
    """Of one controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def begin(self) -> None:
        """I6: ask all members in one step for the chains of their shards. Links are in order, so they all answer for
        the same moment."""
        asked: dict[int, list[Progress]] = {}
        for shard in self._controller.sequencer.shards:
            good = [link for link in shard.good if link.connected and not link.full]
            if shard.serving and len(good) > 1:
                asked[shard.number] = good
        answers: dict[int, dict[str, Any]] = {}
        by_link: dict[Progress, list[int]] = {}
        for number, links in asked.items():
            for link in links:
                by_link.setdefault(link, []).append(number)
        for link, numbers in by_link.items():
            self._controller.call(link, (AUDIT, numbers), self._auditor(link, numbers, answers, asked))

    def _auditor(
        self, link: Progress, numbers: list[int], answers: dict[int, dict[str, Any]], asked: dict[int, list[Progress]]
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
        shard = self._controller.sequencer.shards[number]
        if len(set(positions.values())) == 1 or not shard.serving:
            return
        told = ", ".join(f"{node} {position}" for node, position in sorted(positions.items()))
        why = f"its members differ (number, chain): {told}"
        self._controller.alarm(f"shard {number} was stopped: {why}")
        self._controller.sequencer.stop_serving(number, why)
        for learner in list(shard.learners.values()):
            learner.fail("its shard was stopped")
