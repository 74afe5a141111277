"""The manifest: it comes back as it was, or it is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvtcp.storage.disk import manifest as module
from kvtcp.storage.disk.log_format import FormatError, VersionError
from kvtcp.storage.disk.manifest import FILE, Manifest, read_manifest, write_manifest
from tests.crash.disk import CrashDisk

FOLDER = Path("/node")


def manifest(**changes: Any) -> Manifest:
    """One with everything in it."""
    fields: dict[str, Any] = {
        "directory": b"DIRECTRY", "durability": "sync", "boot": "boot 1", "clean": True, "promised": 7,
        "coordinator": "c", "map_version": 9, "map": '{"key": "\u00e4"}'.encode(), "segment": 12,
        "shards": {0: ("d0", 1, True, ""), 11: ("d11", 3, False, "the log is damaged")}, "generations": {2: 4, 11: 3},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})


@pytest.fixture
def disk() -> CrashDisk:
    """A disk with the directory."""
    made = CrashDisk()
    made.make_directory(FOLDER)
    return made


def test_round_trip() -> None:
    """Everything comes back, and shards are in order."""
    assert Manifest.parse(manifest().encode()) == manifest()
    assert Manifest.parse(Manifest(b"DIRECTRY", "os").encode()) == Manifest(b"DIRECTRY", "os")
    assert list(json.loads(manifest().encode())["node"]["shards"]) == ["0", "11"]


def test_golden() -> None:
    """The format is what it was: a change of these bytes needs a new version."""
    small = Manifest(b"DIRECTRY", "sync", shards={3: ("d", 2, True, "")})
    assert json.loads(small.encode()) == {
        "format": 1,
        "crc32": 4042988000,
        "node": {
            "directory": "4449524543545259", "durability": "sync", "boot": "", "clean": False, "promised": 0,
            "coordinator": "", "map_version": 0, "map": "", "segment": 0, "durable_lsn": 0,
            "shards": {"3": ["d", 2, True, ""]}, "generations": {},
        },
    }  # fmt: skip


def test_every_flipped_bit() -> None:
    """It is refused, or says the same as before (the case of a hexadecimal digit in an escape)."""
    data = manifest().encode()
    same = []
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            parsed = Manifest.parse(bytes(changed))
        except FormatError:
            continue
        assert parsed == manifest(), bit
        same.append(bit)
    assert len(same) <= 2, same


def test_every_length() -> None:
    """Half a manifest is none."""
    data = manifest().encode()
    for length in range(len(data)):
        with pytest.raises(FormatError):
            Manifest.parse(data[:length])


def test_other_versions() -> None:
    """Another format is of another version, whatever else is in it."""
    for content in ({"format": 2}, {"format": 2, "crc32": 0, "node": 5}):
        with pytest.raises(VersionError, match="format 2, this version of kvtcp knows format 1"):
            Manifest.parse(json.dumps(content).encode())


@pytest.mark.parametrize(
    "content", ["", "[]", "7", "{}", "null", '"x"', "\ufffd", "[" * 5, '{"format": 1}', '{"format": "1"}']
)
def test_something_else(content: str) -> None:
    """What is no manifest is refused in a sentence."""
    with pytest.raises(FormatError, match="it is not a manifest of a node"):
        Manifest.parse(content.encode())


@pytest.mark.parametrize("name", ["format", "crc32", "node"])
def test_missing_parts(name: str) -> None:
    """Each part has to be there."""
    content = json.loads(manifest().encode())
    del content[name]
    with pytest.raises(FormatError, match="not a manifest"):
        Manifest.parse(json.dumps(content).encode())


def sealed(**changes: Any) -> bytes:
    """A manifest with changed fields (... removes one) and a right sum."""
    content = json.loads(manifest().encode())
    node = {name: value for name, value in {**content["node"], **changes}.items() if value is not ...}
    return json.dumps({"format": 1, "crc32": module._sum(node), "node": node}).encode()


@pytest.mark.parametrize("name", list(json.loads(manifest(generations={}).encode())["node"]))
def test_missing_fields(name: str) -> None:
    """Each field has to be there, whatever the sum."""
    with pytest.raises(FormatError, match="not a manifest"):
        Manifest.parse(sealed(**{name: ...}))


@pytest.mark.parametrize("changes", [
    {"directory": "xx"}, {"directory": "00"}, {"map": 5}, {"shards": []}, {"shards": {"a": []}},
    {"shards": {"1": ["d"]}}, {"generations": {"x": 1}},
])  # fmt: skip
def test_wrong_fields(changes: dict[str, Any]) -> None:
    """A right sum over fields that cannot be."""
    with pytest.raises(FormatError):
        Manifest.parse(sealed(**changes))


def test_none(disk: CrashDisk) -> None:
    """A directory without one is new; a directory that is not there is, too."""
    assert read_manifest(disk, FOLDER) is None and read_manifest(disk, FOLDER / "missing") is None


def test_it_is_replaced_whole(disk: CrashDisk) -> None:
    """Whatever call fails, there is the old one or the new one."""
    write_manifest(disk, FOLDER, manifest().encode())
    begun = len(disk.calls)
    new = manifest(promised=8)
    probe = disk.process_kill()
    write_manifest(probe, FOLDER, new.encode())
    assert [what for what, _ in probe.calls] == ["remove", "create", "write", "sync", "rename", "sync_directory"]
    assert probe.list(FOLDER) == [FILE] and begun
    for number in range(1, len(probe.calls) + 1):
        for dead in (False, True):
            broken = disk.process_kill()
            broken.fail_at, broken.dead = number, dead
            with pytest.raises(OSError, match="Input/output"):
                write_manifest(broken, FOLDER, new.encode())
            again = broken.process_kill()
            assert read_manifest(again, FOLDER) in (manifest(), new)
            write_manifest(again, FOLDER, new.encode())
            assert read_manifest(again, FOLDER) == new and again.list(FOLDER) == [FILE]


def test_power_failures() -> None:
    """Only a mode that does not sync, not stopped in order, in a boot that is not known to be the present one."""
    assert manifest(durability="os", clean=False).power_failed("boot 2")
    assert manifest(durability="os", clean=False).power_failed("")
    assert manifest(durability="os", clean=False, boot="").power_failed("boot 2")
    for durability, clean, boot in (("sync", False, "boot 2"), ("os", True, "boot 2"), ("os", False, "boot 1")):
        assert not manifest(durability=durability, clean=clean).power_failed(boot)
