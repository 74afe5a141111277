"""Identity: the few facts that a data directory keeps about its cluster.

`identity.json` (mode 0600: it holds the cluster's secret) lies in the data directory of the coordinator and of every
node. It is written with temp file, fsync, rename and directory fsync, and read before anything else is started.

    coordinator  {"format": 1, "role": "coordinator", "cluster", "secret", "local"}
    node         {"format": 1, "role": "node", "cluster", "secret", "node"}

`local` lists the nodes that the coordinator spawned: others of the cluster were started elsewhere. An identity that
--recover-map has put together from those of the nodes does not have it before the next start. Everything else that a
coordinator has to know of its cluster is in the cluster map, beside it in `map.json`.

A directory is locked (`lock` file, flock) while a process uses it, so that two can never believe they own it. The lock
ends with its process, however that ends, so "is it locked" is also the answer to "does the process still run"; the file
holds the process id for people. A directory that was made for a start which was then refused is removed again.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
FILE: Final = "identity.json"
LOCK: Final = "lock"
# somebody who only looks (`lock_holder`) holds the lock for microseconds: not worth a refusal
LOCK_WAIT_S: Final = 0.1

# what an identity must have, by role, beyond format and role
_FIELDS: Final[dict[str, dict[str, type]]] = {
    "coordinator": {"cluster": str, "secret": str},
    "node": {"cluster": str, "secret": str, "node": str},
}
_OPTIONAL: Final[dict[str, dict[str, type]]] = {"coordinator": {"local": list}, "node": {}}


class IdentityError(Exception):
    """The data directory cannot be used; the sentence says why and what to do."""


class DataDirectory:
    """A data directory that this process has locked."""

    def __init__(self, path: Path, role: str) -> None:
        """Create and lock `path`. Raises IdentityError if it is not writable or another process has it."""
        self.path = path
        self.role = role
        # directories made here, outermost first: removed by `unlock` if nothing was kept in them
        self._made = [each for each in (*reversed(path.parents), path) if not each.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._made_lock = not (path / LOCK).exists()
            self._lock = _open_lock(path)
        except OSError as error:
            self._remove_made()
            raise IdentityError(f"the data directory {path} cannot be used: {error.strerror}") from error
        except BlockedError as error:
            raise IdentityError(f"the data directory {path} is in use by {error}") from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def read(self) -> dict[str, Any] | None:
        """The identity, None if there is none yet. Raises IdentityError for one that is not ours."""
        return read_identity(self.path, self.role)

    def write(self, fields: dict[str, Any]) -> None:
        """Replace the identity, durably. Raises IdentityError if that is not possible."""
        try:
            write_identity(self.path, self.role, fields)
        except OSError as error:
            raise IdentityError(f"{self.path / FILE} cannot be written: {error.strerror}") from error

    def unlock(self) -> None:
        """Let go of the directory; one that has no identity is left as it was found."""
        if self._lock < 0:
            return
        if self._made_lock and not (self.path / FILE).exists():
            # still locked: whoever opened the file meanwhile sees that it is not the one of the directory any more
            (self.path / LOCK).unlink(missing_ok=True)
            self._remove_made()
        os.close(self._lock)
        self._lock = -1

    def _remove_made(self) -> None:
        for path in reversed(self._made):
            try:
                path.rmdir()
            except OSError:  # something is in it, or it was never made: then it stays as it is
                return


class BlockedError(Exception):
    """Another process holds the lock; the text names it."""


def _open_lock(path: Path) -> int:
    """The descriptor of the lock file of `path`, locked. Raises BlockedError, OSError."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK)):
                return descriptor
        except FileNotFoundError:
            pass  # removed between open and lock by the process that gave the directory up
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise BlockedError(holder) from error
            time.sleep(LOCK_WAIT_S / 20)
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    pid = os.pread(descriptor, 32, 0).strip().decode("ascii", "replace")
    return f"process {pid}" if pid.isdigit() else "another process"


def lock_holder(path: Path) -> str | None:
    """Who uses the data directory `path` ("process 123"), None if nobody does. Raises OSError."""
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    finally:
        os.close(descriptor)
    return None


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
        optional = {name: kind for name, kind in _OPTIONAL[role].items() if name in fields}
        for name, kind in (_FIELDS[role] | optional).items():
            if type(fields[name]) is not kind or not all(type(item) is str for item in fields[name]):
                raise TypeError(f"{name} is not a {kind.__name__} of texts")
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
