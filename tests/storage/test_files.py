"""The disk seam: whole writes, errors with their path, and the small promises the callers build on."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from kvtcp.storage.files import OS_DISK, _sync_data


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    """Pieces written are the content, in order; closing twice is fine."""
    file = OS_DISK.create(tmp_path / "f")
    file.write(b"one ")
    file.write(b"two")
    file.sync()
    file.close()
    file.close()
    assert OS_DISK.read(tmp_path / "f") == b"one two"
    with OS_DISK.open_read(tmp_path / "f") as stream:
        assert stream.read(3) == b"one"


def test_create_does_not_replace(tmp_path: Path) -> None:
    """A file that is there is never opened by create."""
    (tmp_path / "f").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        OS_DISK.create(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"kept"


def test_a_private_file_is_its_owners_alone(tmp_path: Path) -> None:
    """Mode 0600 for a private file from the start, 0644 for others, whatever a common umask leaves of it."""
    umask = os.umask(0o022)
    try:
        OS_DISK.create(tmp_path / "secret", private=True).close()
        OS_DISK.create(tmp_path / "open").close()
    finally:
        os.umask(umask)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("secret", "open")]
    assert modes == [0o600, 0o644]


def test_size_and_free_space(tmp_path: Path) -> None:
    """size tells the bytes of a file; free_bytes what anybody, not only root, may still write. Absent is an error."""
    file = OS_DISK.create(tmp_path / "f")
    assert OS_DISK.size(tmp_path / "f") == 0
    file.write(b"12345")
    assert OS_DISK.size(tmp_path / "f") == 5
    file.close()
    assert 0 < OS_DISK.free_bytes(tmp_path) <= shutil.disk_usage(tmp_path).total
    for ask in (OS_DISK.size, OS_DISK.free_bytes):
        with pytest.raises(FileNotFoundError, match="absent"):
            ask(tmp_path / "absent")


def test_free_space_is_that_of_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that the file system keeps for root are not free, and a block is of the fragment size."""
    status = os.statvfs_result((65536, 4096, 1000, 500, 300, 10, 10, 10, 0, 255))
    monkeypatch.setattr("kvtcp.storage.files.os.statvfs", lambda path: status)
    assert OS_DISK.free_bytes(tmp_path) == 300 * 4096


def test_a_file_is_synced_without_its_times(tmp_path: Path) -> None:
    """A file's sync is fdatasync where there is one: data and size, not the times."""
    assert _sync_data is getattr(os, "fdatasync", os.fsync)
    file = OS_DISK.create(tmp_path / "f")
    synced: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvtcp.storage.files._sync_data", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
        file.sync()
    file.close()
    assert synced == [str(tmp_path / "f")]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that takes only a part of the bytes is followed by the rest."""
    write = os.write
    monkeypatch.setattr("kvtcp.storage.files.os.write", lambda fd, data: write(fd, bytes(data[:3])))
    file = OS_DISK.create(tmp_path / "f")
    file.write(b"0123456789")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_a_full_disk_is_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is taken in part and then refused raises, with number and path."""
    answers = iter([4])

    def almost_full(fd: int, data: bytes) -> int:
        for taken in answers:
            return taken
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = OS_DISK.create(tmp_path / "f")
    with monkeypatch.context() as patch:
        patch.setattr("kvtcp.storage.files.os.write", almost_full)
        with pytest.raises(OSError, match="No space left") as caught:
            file.write(b"0123456789")
    file.close()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "f"))


def test_a_failed_sync_is_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync of a file or directory that fails is reported, never repeated."""
    calls: list[int] = []

    def broken(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = OS_DISK.create(tmp_path / "f")
    monkeypatch.setattr("kvtcp.storage.files._sync_data", broken)
    monkeypatch.setattr("kvtcp.storage.files.os.fsync", broken)
    with pytest.raises(OSError, match=r"Input/output error: '.*/f'"):
        file.sync()
    with pytest.raises(OSError, match="Input/output error") as caught:
        OS_DISK.sync_directory(tmp_path)
    file.close()
    assert caught.value.filename == str(tmp_path)
    assert len(calls) == 2


def test_directories(tmp_path: Path) -> None:
    """Directories are made with their parents, listed sorted, renamed and removed; absent ones are fine to remove."""
    deep = tmp_path / "a" / "b"
    OS_DISK.make_directory(deep)
    OS_DISK.make_directory(deep)
    for name in ("z", "c"):
        OS_DISK.create(deep / name).close()
    assert OS_DISK.list(deep) == ["c", "z"]
    OS_DISK.rename(deep, tmp_path / "n")
    assert (tmp_path / "n").is_dir() and not OS_DISK.exists(deep)
    OS_DISK.remove(tmp_path / "n" / "c")
    OS_DISK.remove(tmp_path / "n" / "c")
    assert OS_DISK.list(tmp_path / "n") == ["z"]
    OS_DISK.remove_tree(tmp_path / "n")
    OS_DISK.remove_tree(tmp_path / "n")
    assert OS_DISK.list(tmp_path) == ["a"]


def test_new_directories_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory above each new directory is synced, and nothing when there is nothing new."""
    synced: list[str] = []
    monkeypatch.setattr("kvtcp.storage.files.os.fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    OS_DISK.make_directory(tmp_path / "a" / "b")
    assert synced == [str(tmp_path), str(tmp_path / "a")]
    OS_DISK.make_directory(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_a_file_in_the_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    """make_directory does not take a file for a directory."""
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(FileExistsError):
        OS_DISK.make_directory(tmp_path / "f")
    with pytest.raises(OSError, match="f"):
        OS_DISK.make_directory(tmp_path / "f" / "g")
