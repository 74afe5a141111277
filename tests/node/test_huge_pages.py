"""Huge pages: which ranges they are, and that collapsing them changes nothing but that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvtcp.node import huge_pages
from kvtcp.node.huge_pages import HugePages, heap_mappings, whole_ranges

MIB = 1024 * 1024

MAPS = """\
00400000-00420000 r--p 00000000 fe:00 1234                       /usr/bin/python3.11
00a00000-00a80000 rw-p 00600000 fe:00 1234                       /usr/bin/python3.11
00a80000-00b00000 rw-p 00000000 00:00 0
01c3f000-0220a000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000500000 rw-p 00000000 00:00 0
7f0000500000-7f0000700000 ---p 00000000 00:00 0
7f0000700000-7f0000900000 rw-s 00000000 00:01 77                 /dev/shm/x
7f0000900000-7f0000a00000 rw-p 00000000 00:00 0                  [anon:x]
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                  [stack]
"""


def test_mappings_of_the_heap() -> None:
    """Anonymous, private, writable; no files, stacks, or memory that is shared or named."""
    found = list(heap_mappings(MAPS.splitlines(keepends=True)))
    assert found == [(0xA80000, 0xB00000), (0x1C3F000, 0x220A000), (0x7F0000000000, 0x7F0000500000)]


def test_whole_ranges() -> None:
    """Aligned, and within one mapping."""
    found = list(whole_ranges([(0xA80000, 0xB00000), (0x1C3F000, 0x220A000), (0x200000, 0x600000)], 2 * MIB))
    assert found == [0x1E00000, 0x2000000, 0x200000, 0x400000]


def test_a_kernel_that_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No size: no thread. A kernel that refuses is not asked again."""
    monkeypatch.setattr(huge_pages, "SIZE_FILE", tmp_path / "none")
    assert HugePages().size == 0
    pages = HugePages()
    pages.start()
    pages.size = 2 * MIB
    monkeypatch.setattr(huge_pages, "MADV_COLLAPSE", 9_999)
    held = [bytes(1_000) for _ in range(20_000)]  # 20 MB: at least one range is whole
    assert pages.look() == 0 and pages.size == 0 and len(held) == 20_000


PROGRAM = """
from kvtcp.node import huge_pages
from kvtcp.node.huge_pages import HugePages
held = [b""] * 400_000
for number in range(400_000):  # 65 MB
    held[number] = b"%08d" % number * 16
def huge_kib():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
def resident_kib():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Rss"))
pages = HugePages()
before, resident = huge_kib(), resident_kib()
collapsed = pages.look() if pages.size else 0
assert all(value == b"%08d" % number * 16 for number, value in enumerate(held)), "everything is what it was"
assert resident_kib() < resident + 8 * 1024, "no more memory is taken"
if pages.size:
    assert collapsed >= 8 and pages.collapsed_bytes == collapsed * pages.size
    assert huge_kib() >= before + 8 * pages.size // 1024, (before, huge_kib())
    for _ in range(huge_pages.TRIES):
        pages.look()
    assert pages.look() == 0, "what was tried is not tried for ever"
    assert not any(pages._left.values())
print("collapsed" if pages.size else "not here", collapsed)
"""


def test_the_heap_is_collapsed() -> None:
    """Where the kernel does it; where it does not, nothing happens. Values stay, memory does not grow."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(("collapsed ", "not here 0"))
