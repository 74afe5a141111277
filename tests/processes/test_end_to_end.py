"""The store end to end: real servers, real client, real shell, on the names of Unicode characters."""

import asyncio
import gzip
import json
import random
import sys
import unicodedata
from pathlib import Path

import kvtcp
from kvtcp.protocol.hashing import shard_of
from kvtcp.testing.local_cluster import LocalCluster

SEED = 20261123
SHELL = Path(__file__).parent.parent.parent / "bin" / "kvtcp-shell"


def unicode_names() -> dict[bytes, bytes]:
    """name:CHARACTER NAME -> the character, about 30,000 real records."""
    names = {}
    for code in range(0x20, 0x30000):
        name = unicodedata.name(chr(code), None)
        if name is not None and not name.startswith(("CJK ", "HANGUL SYLLABLE")):
            names[f"name:{name}".encode()] = chr(code).encode()
    return names


async def run_shell(*words: str) -> int:
    """A one-shot shell command; its exit code."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SHELL), *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(60):
        return await process.wait()


def pairs_of(path: Path) -> dict[str, str]:
    """The pairs of an exported file."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return {fields["key"]: fields["value"] for fields in map(json.loads, lines)}


async def test_real_records_from_import_to_a_restored_second_cluster(tmp_path: Path) -> None:
    """Import, count, ordered scan, backup, restore into an empty cluster, export: the same set of pairs."""
    names = unicode_names()
    source = tmp_path / "names.jsonl"
    source.write_text("".join(json.dumps({"key": k.decode(), "value": v.decode()}) + "\n" for k, v in names.items()))
    async with LocalCluster(3, backup_dir=tmp_path / "backups") as cluster:
        assert await run_shell(cluster.url, "import", str(source)) == 0
        async with kvtcp.connect(cluster.url) as kv:
            assert await kv.count(prefix="name:") == len(names)
            found = [pair async for pair in kv.scan(prefix="name:GREEK SMALL LETTER ")]
            assert found == sorted(p for p in names.items() if p[0].startswith(b"name:GREEK SMALL LETTER "))
            backwards = [key async for key in kv.scan_keys(prefix="name:LATIN", reverse=True)]
            assert backwards == sorted((key for key in names if key.startswith(b"name:LATIN")), reverse=True)
        assert await run_shell(cluster.url, "backup", "names") == 0
    files = sorted(path.name for path in (tmp_path / "backups" / "names").iterdir())
    assert files == ["manifest.json", "node-n1.jsonl", "node-n2.jsonl", "node-n3.jsonl"]
    assert all((tmp_path / "backups" / "names" / name).stat().st_size > 100_000 for name in files[1:])
    async with LocalCluster(2, backup_dir=tmp_path / "backups") as cluster:
        assert await run_shell(cluster.url, "restore", "names", "replace") == 0
        exported = tmp_path / "out.jsonl.gz"
        assert await run_shell(cluster.url, "export", str(exported)) == 0
    assert pairs_of(exported) == pairs_of(source)


async def test_every_copy_is_written_and_removed() -> None:
    """With factor 2 a key is on exactly two nodes, and a delete removes both copies."""
    async with LocalCluster(4, replication_factor=2) as cluster, kvtcp.connect(cluster.url) as kv:

        def holders(key: bytes) -> list[str]:
            shard = shard_of(key, cluster.shards)
            return [
                node
                for node, server in cluster.nodes.items()
                if shard in server.replica.tables and server.replica.tables[shard].get(key, 0) is not None
            ]

        keys = [f"k{n}".encode() for n in range(200)]
        await kv.put_many([(key, b"v") for key in keys])
        assert all(len(holders(key)) == 2 for key in keys)
        assert await kv.delete(keys[0])
        assert not holders(keys[0])
        assert sum(len(table) for server in cluster.nodes.values() for table in server.replica.tables.values()) == 398


async def test_cancelled_calls_never_disturb_later_ones() -> None:
    """10,000 calls, each cancelled at a random moment or not: every answer that comes belongs to its call."""
    chooser = random.Random(SEED)
    async with LocalCluster(3) as cluster, kvtcp.connect(cluster.url) as kv:
        await kv.put_many([(f"k{n}", f"value {n}") for n in range(500)])
        answered = cancelled = 0

        async def call(number: int) -> None:
            nonlocal answered
            kind = number % 3
            if kind == 0:
                assert await kv.get(f"k{number % 500}") == f"value {number % 500}".encode(), f"seed {SEED}"
            elif kind == 1:
                assert await kv.exists(f"none{number}") is False, f"seed {SEED}"
            else:
                assert await kv.incr(f"counter {number}", number) == number, f"seed {SEED}"
            answered += 1

        for start in range(0, 10_000, 100):
            tasks = [asyncio.create_task(call(start + n)) for n in range(100)]
            for victim in chooser.sample(tasks, 60):
                if chooser.random() < 0.05:
                    await asyncio.sleep(0)
                victim.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, asyncio.CancelledError):
                    cancelled += 1
                elif outcome is not None:
                    raise outcome
        assert answered + cancelled == 10_000
        assert cancelled > 1_000, "the test means nothing if hardly a call was cancelled"
        assert await kv.get("k1") == b"value 1"
        cluster.coordinator.sequencer.check()
