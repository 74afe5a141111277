"""The errors of kvtcp, split by what the caller does next, and their codes on the wire.

Pure. Every error that a server answers has a code (`Code`), a sentence and a map of details; the client raises the
class that `CLASS_OF` names for the code. A code is never given a second meaning.

| class            | the caller                                                        |
|------------------|-------------------------------------------------------------------|
| RequestError     | fixes the request; nothing was changed                            |
| AdminError       | prepares the cluster for the change first; nothing was changed    |
| ConditionFailed  | decides; the condition was false and nothing was changed          |
| Unavailable      | may repeat: the request was *not executed*                        |
| OutcomeUnknown   | must read before repeating: the write may or may not have happened |
| DataError        | has a damaged or foreign file; nothing was changed                |
| ProtocolError    | has a bug, or a wrong port: the bytes are not this protocol       |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

Details = dict[str, Any]


class Code(IntEnum):
    """The second field of every reply."""

    OK = 0
    PROGRESS = 1  # not an error: the request is still running, the third field has its progress

    BAD_REQUEST = 10
    TOO_LARGE = 11
    NOT_A_NUMBER = 12
    RANGE = 13
    UNKNOWN_OP = 14
    VERSION = 15
    REFUSED = 16  # for a change of the cluster; the sentence says why, and what to do

    EXISTS = 20
    MISMATCH = 21

    OVERLOADED = 30
    NOT_ENOUGH_REPLICAS = 31
    NO_SPACE = 32
    RECOVERING = 33
    SHARD_DOWN = 34
    RESTORING = 35
    UNREACHABLE = 36  # made by clients, never sent: no connection, or no answer to a read, within the timeout

    UNKNOWN = 40

    BAD_DATA = 50


class KvtcpError(Exception):
    """Base of all errors of kvtcp. `code` is the wire code, `details` are the values in the sentence."""

    def __init__(self, message: str, code: Code = Code.BAD_REQUEST, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.details: Details = dict(details or {})


class RequestError(KvtcpError):
    """The request is wrong as it stands. Nothing was changed; fix the request."""


class AdminError(RequestError):
    """A change of the cluster is refused in its present state. Nothing was changed; the sentence says what to do."""

    def __init__(
        self, message: str, code: Code = Code.REFUSED, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, code, details)


class ConditionFailed(KvtcpError):
    """The condition of an `add`, `cas` or `delete` was false. Nothing was changed."""


class KeyExists(ConditionFailed):
    """`add` of a key that is present. `details`: `key`, `rev`."""


class Mismatch(ConditionFailed):
    """`cas` whose condition is false. `details`: `key`, `rev` (the current revision, 0 when the key is absent)."""

    @property
    def rev(self) -> int:
        """Current revision of the key, 0 when it is absent."""
        return int(self.details.get("rev", 0))


class Unavailable(KvtcpError):
    """The request was not executed, because the cluster could not take it now. Repeating it is safe."""


class OutcomeUnknown(KvtcpError):
    """The write was sent, but it is unknown whether it happened. Read before repeating it."""

    def __init__(
        self, message: str, code: Code = Code.UNKNOWN, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, code, details)


class DataError(KvtcpError):
    """A file is damaged, incomplete or of another format. The sentence names file and line; nothing was changed."""

    def __init__(
        self, message: str, code: Code = Code.BAD_DATA, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, code, details)


class ProtocolError(KvtcpError):
    """The bytes received are not this protocol. Their connection is closed."""


class BatchError(KvtcpError):
    """Some keys of an m-operation failed. `results` holds, in the order of the keys, a result or a KvtcpError."""

    def __init__(self, message: str, results: Sequence[Any]) -> None:
        first = next((r for r in results if isinstance(r, KvtcpError)), None)
        super().__init__(message, first.code if first is not None else Code.BAD_REQUEST)
        self.results = list(results)


CLASS_OF: dict[Code, type[KvtcpError]] = {
    Code.BAD_REQUEST: RequestError,
    Code.TOO_LARGE: RequestError,
    Code.NOT_A_NUMBER: RequestError,
    Code.RANGE: RequestError,
    Code.UNKNOWN_OP: RequestError,
    Code.VERSION: RequestError,
    Code.REFUSED: AdminError,
    Code.EXISTS: KeyExists,
    Code.MISMATCH: Mismatch,
    Code.OVERLOADED: Unavailable,
    Code.NOT_ENOUGH_REPLICAS: Unavailable,
    Code.NO_SPACE: Unavailable,
    Code.RECOVERING: Unavailable,
    Code.SHARD_DOWN: Unavailable,
    Code.RESTORING: Unavailable,
    Code.UNREACHABLE: Unavailable,
    Code.UNKNOWN: OutcomeUnknown,
    Code.BAD_DATA: DataError,
}
assert set(CLASS_OF) == set(Code) - {Code.OK, Code.PROGRESS}, "every error code has a class"


def text_of(message: object, details: object) -> tuple[str, Details]:
    """Sentence and details of an error as received: text arrives as bytes."""
    text = message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
    fields: Details = {}
    if isinstance(details, dict):
        fields = {k.decode("utf-8", "replace") if isinstance(k, bytes) else str(k): v for k, v in details.items()}
    return text, fields


def error_from_wire(code: int, message: object, details: object) -> KvtcpError:
    """The exception for an error reply. An unknown code, of a newer server, becomes OutcomeUnknown: any other class
    would promise too much."""
    text, fields = text_of(message, details)
    try:
        known = Code(code)
    except ValueError:
        return OutcomeUnknown(f"the server answered code {code}, unknown to this client: {text}", details=fields)
    return CLASS_OF[known](text, known, fields)


def show_bytes(data: bytes, bytes_max: int = 40) -> str:
    """A key for a sentence: as text if it is text, else with c-style escapes; cut to `bytes_max` bytes."""
    head = data[:bytes_max]
    text = "".join(chr(b) if 0x20 <= b < 0x7F and b != 0x5C else f"\\x{b:02x}" for b in head)
    try:
        decoded = head.decode("utf-8")
        if decoded.isprintable():
            text = decoded
    except UnicodeDecodeError:
        pass
    return f'"{text}"' + (f"... ({len(data)} bytes)" if len(data) > bytes_max else "")
