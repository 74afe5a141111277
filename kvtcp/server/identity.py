"""Identity: the few facts that a data directory keeps about its cluster.

`identity.json` (mode 0600: it holds the cluster's secret) lies in the data directory of the coordinator and of every
node. It is written with temp file, fsync, rename and directory fsync, and read before anything else is started.

    coordinator  {"format": 1, "role": "coordinator", "cluster", "secret", "epoch", "shards", "factor", "min_insync",
                  "nodes": ["n1", ...]}
    node         {"format": 1, "role": "node", "cluster", "secret", "node"}

A directory is locked (`lock` file, flock) while a process uses it, so that two can never believe they own it.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
FILE: Final = "identity.json"


class IdentityError(Exception):
    """The data directory cannot be used; the sentence says why and what to do."""


class DataDirectory:
    """A data directory that this process has locked."""

    def __init__(self, path: Path, role: str) -> None:
        """Create and lock `path`. Raises IdentityError if it is not writable or another process has it."""
        self.path = path
        self.role = role
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise IdentityError(f"the data directory {path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise IdentityError(f"the data directory {path} is in use by another process") from error

    def read(self) -> dict[str, Any] | None:
        """The identity, None if there is none yet. Raises IdentityError for one that is not ours."""
        return read_identity(self.path, self.role)

    def write(self, fields: dict[str, Any]) -> None:
        """Replace the identity, durably."""
        write_identity(self.path, self.role, fields)

    def unlock(self) -> None:
        """Let go of the directory."""
        os.close(self._lock)


def read_identity(path: Path, role: str) -> dict[str, Any] | None:
    """The identity in `path`, None if there is none. Raises IdentityError for one of another role or format."""
    file = path / FILE
    try:
        text = file.read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IdentityError(f"{file} cannot be read: {error.strerror}") from error
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise IdentityError(f"{file} has format {fields['format']}, this version knows format {FORMAT}")
        if fields["role"] != role:
            raise IdentityError(f"{path} is the data directory of a {fields['role']}, not of a {role}")
    except (ValueError, KeyError, TypeError) as error:
        raise IdentityError(f"{file} is not an identity of kvtcp; move it away to start anew") from error
    return dict(fields)


def write_identity(path: Path, role: str, fields: dict[str, Any]) -> None:
    """Write the identity of `path` durably, readable by its owner only."""
    temporary = path / (FILE + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"format": FORMAT, "role": role, **fields}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path / FILE)
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
