"""The keyspace as clients see it: how many shards the keys are spread over, and which keys a restore has closed.

Pure. One per coordinator, under all frontends, which check a request here before they give it to the sequencer. A
restore closes the keys of its prefix at its start and opens them when it is complete.
"""

from __future__ import annotations

from kvtcp.errors import Code, RequestError, show_bytes
from kvtcp.protocol.messages import prefix_bounds


class Keyspace:
    """All keys of a cluster."""

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self.all_shards = list(range(shards))
        self.restoring: bytes | None = None  # prefix being restored; None = none. b"" = everything

    @property
    def is_open(self) -> bool:
        """Whether no key is closed."""
        return self.restoring is None

    def check_open(self, key: bytes) -> None:
        """Raise RequestError (RESTORING) if this key is being restored."""
        if self.restoring is not None and key.startswith(self.restoring):
            raise self._closed()

    def check_range_open(self, lower: bytes, upper: bytes | None) -> None:
        """Raise RequestError (RESTORING) if keys of [lower, upper) are being restored."""
        if self.restoring is not None:
            low, high = prefix_bounds(self.restoring)
            if (high is None or lower < high) and (upper is None or low < upper):
                raise self._closed()

    def _closed(self) -> RequestError:
        assert self.restoring is not None, "something is being restored"
        shown = f"keys that begin with {show_bytes(self.restoring)} are" if self.restoring else "all keys are"
        return RequestError(
            f"{shown} closed until a restore completes; nothing was executed (if none is running, one stopped "
            "half-way: repeat it)",
            Code.RESTORING,
        )
