"""Exit codes: every class of error has the one that the contract names."""

import pytest

from kvtcp import errors
from kvtcp.errors import Code
from kvtcp.shell.exits import Exit, ShellRefused, UsageError, exit_of

EXPECTED = {
    Code.BAD_REQUEST: 2, Code.TOO_LARGE: 6, Code.NOT_A_NUMBER: 6, Code.RANGE: 6, Code.UNKNOWN_OP: 6, Code.VERSION: 6,
    Code.REFUSED: 6, Code.EXISTS: 6, Code.MISMATCH: 1, Code.OVERLOADED: 3, Code.NOT_ENOUGH_REPLICAS: 6,
    Code.NO_SPACE: 6, Code.RECOVERING: 3, Code.SHARD_DOWN: 3, Code.RESTORING: 3, Code.UNREACHABLE: 3, Code.UNKNOWN: 5,
    Code.BAD_DATA: 7,
}  # fmt: skip


@pytest.mark.parametrize("code", [code for code in Code if code in errors.CLASS_OF], ids=lambda code: code.name)
def test_every_wire_code_has_an_exit_code(code: Code) -> None:
    """No code of the protocol was forgotten."""
    assert exit_of(errors.CLASS_OF[code]("x", code)) == EXPECTED[code]


@pytest.mark.parametrize(("error", "code"), [
    (UsageError("x"), Exit.USAGE),
    (ShellRefused("x"), Exit.REFUSED),
    (ShellRefused("x", Exit.NOT_FOUND), Exit.NOT_FOUND),
    (errors.ProtocolError("x"), Exit.UNREACHABLE),
    (ConnectionRefusedError(), Exit.UNREACHABLE),
    (TimeoutError(), Exit.UNREACHABLE),
    (FileNotFoundError(), Exit.USAGE),
    (errors.DataError("x"), Exit.BAD_DATA),
    (errors.KvtcpError("x"), Exit.UNKNOWN),
    (errors.BatchError("x", [1, errors.Unavailable("x", Code.RECOVERING), errors.DataError("x")]), Exit.BAD_DATA),
    (errors.BatchError("x", [1]), Exit.REFUSED),
])  # fmt: skip
def test_other_errors(error: Exception, code: Exit) -> None:
    """Errors of the shell, of files and of connections have theirs."""
    assert exit_of(error) == code


def test_a_bug_has_no_exit_code() -> None:
    """An unexpected error is not turned into a code of the contract."""
    with pytest.raises(TypeError, match="no exit code for KeyError"):
        exit_of(KeyError("x"))
