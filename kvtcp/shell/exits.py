"""Exit codes of the shell, and which one an error has.

Pure. The codes tell a script apart its next steps: repeat (3), look first (5), fix the request (2, 6) or the file (7).
They are part of the shell's contract and never change their meaning.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from kvtcp.errors import (
    BatchError,
    Code,
    ConditionFailed,
    DataError,
    KeyExists,
    KvtcpError,
    OutcomeUnknown,
    ProtocolError,
    RequestError,
    Unavailable,
)


class Exit(IntEnum):
    """The exit code of the process."""

    OK = 0
    NOT_FOUND = 1  # no such key, or a condition that was false
    USAGE = 2
    UNREACHABLE = 3  # or timed out; nothing was applied
    UNKNOWN = 5  # a write may or may not have been applied
    REFUSED = 6
    BAD_DATA = 7
    BUG = 70  # an error of an unknown class; EX_SOFTWARE of sysexits.h
    INTERRUPTED = 130


MEANINGS: Final = {
    Exit.OK: "done",
    Exit.NOT_FOUND: "no such key, a condition that was false, or a question answered with no",
    Exit.USAGE: "wrong command line, or a local file that cannot be read or written",
    Exit.UNREACHABLE: "unreachable, not ready or timed out; nothing was applied, so it may be repeated",
    Exit.UNKNOWN: "a write was sent and its outcome is not known: look before repeating",
    Exit.REFUSED: "refused: the key exists, too large, not a number, not enough replicas, no space, more than max=, "
    "a change that the cluster is not ready for",
    Exit.BAD_DATA: "damaged or foreign data in an import or a backup",
    Exit.BUG: "a bug of the shell, with a traceback",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
}
assert set(MEANINGS) == set(Exit), "every exit code has a meaning"


class UsageError(Exception):
    """The command line is wrong. The text has the right form."""


class ShellRefused(Exception):
    """The shell itself refuses: a limit that the user set, or a question that was not answered with yes."""

    def __init__(self, message: str, code: Exit = Exit.REFUSED) -> None:
        super().__init__(message)
        self.code = code


# the cluster refused for a reason that a short wait does not change
_REFUSING_CODES = frozenset({Code.NOT_ENOUGH_REPLICAS, Code.NO_SPACE})
# the first class that an error belongs to decides; those of one code each
_CODES: Final = (
    (UsageError, Exit.USAGE),
    (OutcomeUnknown, Exit.UNKNOWN),
    (DataError, Exit.BAD_DATA),
    (KeyExists, Exit.REFUSED),
    (ConditionFailed, Exit.NOT_FOUND),
    ((ProtocolError, ConnectionError, TimeoutError), Exit.UNREACHABLE),
    (KvtcpError, Exit.UNKNOWN),
    (OSError, Exit.USAGE),  # a local file that cannot be opened, read or written
)


def exit_of(error: BaseException) -> Exit:
    """The exit code for an error that ended a command. Raises TypeError for one that is a bug and shows a traceback."""
    if isinstance(error, BatchError):
        codes = {exit_of(result) for result in error.results if isinstance(result, KvtcpError)}
        # an unknown outcome outweighs a refusal; a script must look before it repeats
        for code in (Exit.UNKNOWN, Exit.REFUSED, Exit.BAD_DATA, Exit.USAGE, Exit.UNREACHABLE, Exit.NOT_FOUND):
            if code in codes:
                return code
        return Exit.REFUSED
    if isinstance(error, ShellRefused):
        return error.code
    if isinstance(error, Unavailable):
        return Exit.REFUSED if error.code in _REFUSING_CODES else Exit.UNREACHABLE
    if isinstance(error, RequestError):  # BAD_REQUEST: malformed, so the command line is to be fixed
        return Exit.USAGE if error.code == Code.BAD_REQUEST else Exit.REFUSED
    for classes, code in _CODES:
        if isinstance(error, classes):
            return code
    raise TypeError(f"no exit code for {type(error).__name__}") from error
