"""The outbox: frames, links to close, nodes that come and go, and lines of the log, for the shell of a controller.

Pure. The controller owns one and hands it to its parts; `Controller.act` empties it, in order, after every step.

Invariant: a frame is only sent to a node that reported in this epoch.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

# ("send", node, frame), ("close", node, reason), ("add", node), ("remove", node) or ("open", "")
Action = tuple[Any, ...]
Event = tuple[str, str, dict[str, Any]]  # level, word, fields


class Outbox:
    """Actions and events, in order. `reported` are the nodes that reported and are linked."""

    def __init__(self, reported: Container[str]) -> None:
        self.actions: list[Action] = []
        self.events: list[Event] = []
        self._reported = reported

    def take_actions(self) -> list[Action]:
        """Take the actions."""
        actions, self.actions = self.actions, []
        return actions

    def take_events(self) -> list[Event]:
        """Take the events."""
        events, self.events = self.events, []
        return events

    def send(self, node: str, frame: tuple[Any, ...]) -> None:
        """Send a frame to a node that reported."""
        assert node in self._reported, "frames go to nodes that reported"
        self.actions.append(("send", node, frame))

    def close_link(self, node: str, reason: str) -> None:
        """Close the connection to a node; it is dialled again."""
        self.actions.append(("close", node, reason))

    def event(self, level: str, word: str, **fields: Any) -> None:
        """Log a line."""
        self.events.append((level, word, fields))

    def alarm(self, sentence: str) -> None:
        """Log an error that should never occur."""
        self.event("error", "alarm", reason=sentence)
