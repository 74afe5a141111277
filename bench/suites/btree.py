"""The `btree` suite: the ordered index of a shard against a plain dict and two libraries of ordered maps.

`run` returns a list of results and prints nothing; a result is a dict:

    target      "kvtcp index" | "kvtcp table" | "BTrees.OOBTree" | "SortedDict" | "lmdb, no sync" | "dict"
    workload    "insert" | "get" | "get same" | "overwrite" | "scan" | "mixed" | "delete" | "longest insert" | "memory"
    unit        "k/s" (higher is better) | "ms" | "bytes/key" (lower is better)
    median, min, max, runs      over the runs, in that unit; `runs` is the list of all of them

What is compared. "kvtcp index" is what a table uses: hash index, waiting keys and B+tree together, storing the cell
(value, revision, deadline) that it builds for every write. "kvtcp table" is the whole state machine: `Table.apply` of a
put or delete with its packed log entry and chain, `Table.get`, `Table.rows`. The peers store the value alone, each by
its fastest idiom; lmdb keeps them in a file that nobody syncs, each call below is one transaction. dict has no order:
it is the floor for single keys, without scan.

    insert      N random 17-byte keys into an empty structure, one call each; every merge and every sort that is left
                for later is done before the clock stops
    get         half of the keys in random order, as new key objects: every key of a server comes from a socket, so its
                hash is not known yet, and it is compared byte by byte with the key that is stored
    get same    the same with the very objects that were inserted, as maps are usually measured: the hash is known
                and identity spares the comparison. Both rows are reported, because the ratios differ
    overwrite   half of the keys, as new objects
    scan        rows (key and value) read by scans of 1,000 from random keys
    mixed       inserts: 1,000 new keys, then a scan of 100 from a random key, and again
    delete      a fifth of the keys, as new objects
    longest insert      the longest of the N calls of an insert; CPU time of the thread, so that being scheduled away
                        on a shared machine does not count
    memory      growth of resident memory per key with its 16-byte value, without the key object (66 bytes), in a
                process of its own

Structures take turns in a random order in every run. Before every workload everything that exists is collected and
frozen, as a server does when it has started: containers made from then on have their price. kvtcp runs with the
thresholds of the cyclic collector that its servers have (`GC_THRESHOLDS`). Each of the peers runs with these and with
the interpreter's own, and in every workload the setting with the better median counts. Medians are compared, not single
runs: the better of two noisy runs beats one run of the same thing.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from typing import Any

from BTrees.OOBTree import OOBTree
from sortedcontainers import SortedDict

from bench.measure import Options, Result, make_row, resident_bytes
from bench.suites.floors import beside
from kvtcp.constants import GC_THRESHOLDS
from kvtcp.protocol import operations as op
from kvtcp.storage.shard.index import Index
from kvtcp.storage.shard.table import Table

SCAN_ROWS = 1_000
MIXED_INSERTS = 1_000
MIXED_SCAN_ROWS = 100
STAMP_MS = 1_700_000_000_000
LMDB_BYTES = 4 << 30
TITLE = "B-tree: the index of a shard beside other ordered maps"


class DictAdapter:
    """dict, and by inheritance the mappings with the same calls."""

    name = "dict"
    ordered = False
    peer = True
    tracked = True  # the cyclic collector sees what it holds

    def __init__(self) -> None:
        self.map: Any = {}

    def puts(self, keys: Sequence[bytes]) -> Sequence[Any]:
        """What `write` takes, made before the clock starts: every key with a value object of its own."""
        return [(key, b"%016d" % number) for number, key in enumerate(keys)]

    def deletes(self, keys: Sequence[bytes]) -> Sequence[Any]:
        """What `delete` takes, made before the clock starts."""
        return keys

    def write(self, puts: Iterable[Any]) -> None:
        target = self.map
        for key, value in puts:
            target[key] = value

    def write_one(self) -> Callable[[Any], None]:
        target = self.map

        def write(pair: tuple[bytes, bytes]) -> None:
            target[pair[0]] = pair[1]

        return write

    def finish(self) -> None:
        """Do what was left for later."""

    def get(self, keys: Iterable[bytes]) -> None:
        get = self.map.get
        for key in keys:
            get(key)

    def delete(self, keys: Iterable[Any]) -> None:
        target = self.map
        for key in keys:
            del target[key]

    def scan(self, lower: bytes, limit: int) -> Sequence[Any]:
        raise NotImplementedError("a dict has no order")


class OOBTreeAdapter(DictAdapter):
    name = "BTrees.OOBTree"
    ordered = True

    def __init__(self) -> None:
        self.map = OOBTree()

    def scan(self, lower: bytes, limit: int) -> Sequence[Any]:
        return list(islice(self.map.items(lower), limit))


class SortedDictAdapter(DictAdapter):
    name = "SortedDict"
    ordered = True

    def __init__(self) -> None:
        self.map = SortedDict()

    def scan(self, lower: bytes, limit: int) -> Sequence[Any]:
        target = self.map
        return [(key, target[key]) for key in islice(target.irange(lower), limit)]


class IndexAdapter(DictAdapter):
    name = "kvtcp index"
    ordered = True
    peer = False

    def __init__(self) -> None:
        self.index = Index()
        self.rev = 0

    def write(self, puts: Iterable[Any]) -> None:
        set_ = self.index.set
        rev = self.rev
        for key, value in puts:
            rev += 1
            set_(key, (value, rev, None))
        self.rev = rev

    def write_one(self) -> Callable[[Any], None]:
        index = self.index

        def write(pair: tuple[bytes, bytes]) -> None:
            self.rev += 1
            index.set(pair[0], (pair[1], self.rev, None))

        return write

    def finish(self) -> None:
        self.index.merge()
        self.index.tree.settle()

    def get(self, keys: Iterable[bytes]) -> None:
        get = self.index.get
        for key in keys:
            get(key)

    def delete(self, keys: Iterable[Any]) -> None:
        delete = self.index.delete
        for key in keys:
            delete(key)

    def scan(self, lower: bytes, limit: int) -> Sequence[Any]:
        keys = self.index.slice(lower, None, limit)
        return list(zip(keys, self.index.cells_of(keys), strict=True))


class TableAdapter(DictAdapter):
    name = "kvtcp table"
    ordered = True
    peer = False

    def __init__(self) -> None:
        self.table = Table()
        self.prepared = 0  # number of the last item that was prepared

    def puts(self, keys: Sequence[bytes]) -> Sequence[Any]:
        start = self.prepared + 1
        self.prepared += len(keys)
        return [[op.PUT, 0, seq, 0, key, b"%016d" % seq] for seq, key in enumerate(keys, start)]

    def deletes(self, keys: Sequence[bytes]) -> Sequence[Any]:
        start = self.prepared + 1
        self.prepared += len(keys)
        return [[op.DELETE, 0, seq, 0, key] for seq, key in enumerate(keys, start)]

    def write(self, puts: Iterable[Any]) -> None:
        apply = self.table.apply
        stamp_ms = STAMP_MS
        for item in puts:
            apply(item, stamp_ms)

    def write_one(self) -> Callable[[Any], None]:
        apply = self.table.apply

        def write(item: Any) -> None:
            apply(item, STAMP_MS)

        return write

    def finish(self) -> None:
        self.table._index.merge()
        self.table._index.tree.settle()

    def get(self, keys: Iterable[bytes]) -> None:
        get = self.table.get
        stamp_ms = STAMP_MS
        for key in keys:
            get(key, stamp_ms)

    def delete(self, keys: Iterable[Any]) -> None:
        self.write(keys)

    def scan(self, lower: bytes, limit: int) -> Sequence[Any]:
        return self.table.rows(lower, None, limit, False, STAMP_MS)


class LmdbAdapter(DictAdapter):
    name = "lmdb, no sync"
    ordered = True
    tracked = False

    def __init__(self) -> None:
        import lmdb

        self.directory = tempfile.TemporaryDirectory(prefix="kvtcp-bench-lmdb-")
        self.map = lmdb.open(
            self.directory.name, map_size=LMDB_BYTES, sync=False, metasync=False, writemap=True, map_async=True
        )

    def write(self, puts: Iterable[Any]) -> None:
        with self.map.begin(write=True) as transaction:
            put = transaction.put
            for key, value in puts:
                put(key, value)

    def write_one(self) -> Callable[[Any], None]:
        begin = self.map.begin

        def write(pair: tuple[bytes, bytes]) -> None:
            with begin(write=True) as transaction:
                transaction.put(pair[0], pair[1])

        return write

    def get(self, keys: Iterable[bytes]) -> None:
        with self.map.begin() as transaction:
            get = transaction.get
            for key in keys:
                get(key)

    def delete(self, keys: Iterable[Any]) -> None:
        with self.map.begin(write=True) as transaction:
            for key in keys:
                transaction.delete(key)

    def scan(self, lower: bytes, limit: int) -> Sequence[Any]:
        with self.map.begin() as transaction, transaction.cursor() as cursor:
            cursor.set_range(lower)
            return list(islice(cursor.iternext(), limit))


ADAPTERS: list[type[DictAdapter]] = [DictAdapter, SortedDictAdapter, OOBTreeAdapter, IndexAdapter, TableAdapter]
if find_spec("lmdb") is not None:
    ADAPTERS.append(LmdbAdapter)


def random_keys(count: int, rng: random.Random) -> list[bytes]:
    """Distinct keys of 17 bytes in random order."""
    keys: dict[bytes, None] = {}
    while len(keys) < count:
        keys[b"user:%012x" % rng.getrandbits(48)] = None
    return list(keys)


def run(keys: int = 1_000_000, seed: int = 1, runs: int = 3) -> list[Result]:
    """Run the suite with `keys` keys; see the module's text for the results."""
    rng = random.Random(seed)
    # (structure, workload, unit) -> one list of figures for every setting of the collector, in the order of the runs
    figures: dict[tuple[str, str, str], list[list[float]]] = {}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for adapter in ADAPTERS:
            figure = processes.submit(bytes_per_key, adapter, keys, seed).result()
            figures[adapter.name, "memory", "bytes/key"] = [[figure]]
    default = gc.get_threshold()
    for _ in range(runs):
        for adapter in rng.sample(ADAPTERS, len(ADAPTERS)):
            data = random_keys(keys + max(keys // 5, MIXED_INSERTS), random.Random(rng.random()))
            settings = [GC_THRESHOLDS, default] if adapter.peer and adapter.tracked else [GC_THRESHOLDS]
            for number, thresholds in enumerate(settings):
                gc.set_threshold(*thresholds)
                try:
                    for workload, unit, figure in _one_run(adapter, data[:keys], data[keys:], rng):
                        series = figures.setdefault((adapter.name, workload, unit), [[] for _ in settings])
                        series[number].append(figure)
                finally:
                    gc.set_threshold(*default)
                    gc.unfreeze()
    results = []
    for (structure, workload, unit), series in figures.items():
        better = max if unit == "k/s" else min
        values = better(series, key=statistics.median)
        results.append(make_row(structure, workload, unit, values))
    return results


def measure(options: Options) -> list[Result]:
    """All structures, with dict as the floor."""
    if find_spec("lmdb") is None:
        options.skip("lmdb", "it is not installed: pip install '.[peers]'")
    return beside(run(options.keys_or(1_000_000, 100_000), options.seed, options.runs_or(5)), "dict")


def _one_run(
    make: type[DictAdapter], keys: list[bytes], new_keys: list[bytes], rng: random.Random
) -> list[tuple[str, str, float]]:
    """All workloads on one structure: (workload, unit, figure)."""
    results = [("longest insert", "ms", _longest_insert_ms(make, keys))]
    target = make()

    def timed(workload: str, count: int, step: Callable[[], None]) -> None:
        gc.collect()
        gc.freeze()
        start = time.perf_counter()
        step()
        results.append((workload, "k/s", count / (time.perf_counter() - start) / 1000))

    def copies(count: int) -> list[bytes]:
        return [bytes(bytearray(key)) for key in rng.sample(keys, count)]

    def insert(items: Sequence[Any]) -> None:
        target.write(items)
        target.finish()

    def scan(lowers: Sequence[bytes]) -> None:
        for lower in lowers:
            target.scan(lower, SCAN_ROWS)

    def mixed(rounds: Sequence[tuple[Sequence[Any], bytes]]) -> None:
        for items, lower in rounds:
            target.write(items)
            target.scan(lower, MIXED_SCAN_ROWS)

    items = target.puts(keys)
    timed("insert", len(keys), lambda: insert(items))
    sample = copies(len(keys) // 2)
    timed("get", len(sample), lambda: target.get(sample))
    sample = rng.sample(keys, len(keys) // 2)
    timed("get same", len(sample), lambda: target.get(sample))
    items = target.puts(copies(len(keys) // 2))
    timed("overwrite", len(items), lambda: target.write(items))
    if target.ordered:
        lowers = sorted(keys)[: -SCAN_ROWS or None]
        lowers = rng.sample(lowers, min(300, len(lowers)))
        timed("scan", len(lowers) * SCAN_ROWS, lambda: scan(lowers))
        rounds = [
            (target.puts(new_keys[start : start + MIXED_INSERTS]), rng.choice(keys))
            for start in range(0, len(new_keys), MIXED_INSERTS)
        ]
        timed("mixed", len(new_keys), lambda: mixed(rounds))
    items = target.deletes(copies(len(keys) // 5))
    timed("delete", len(items), lambda: target.delete(items))
    return results


def _longest_insert_ms(make: type[DictAdapter], keys: list[bytes]) -> float:
    target = make()
    write = target.write_one()
    items = target.puts(keys)
    gc.collect()
    gc.freeze()
    clock = time.thread_time
    longest = 0.0
    for item in items:
        start = clock()
        write(item)
        spent = clock() - start
        if spent > longest:
            longest = spent
    return longest * 1000


def bytes_per_key(make: type[DictAdapter], count: int, seed: int) -> float:
    """Growth of resident memory while `count` keys are inserted. For a fresh process: memory that was freed earlier and
    is used again would not be seen."""
    target = make()
    keys = random_keys(count, random.Random(seed))
    gc.collect()
    before = resident_bytes(os.getpid())
    for start in range(0, count, SCAN_ROWS):
        target.write(target.puts(keys[start : start + SCAN_ROWS]))
    target.finish()
    return (resident_bytes(os.getpid()) - before) / count


def main() -> None:
    """Print the results as a table, one line per workload, one column per structure."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    results = run(options.keys, options.seed, options.runs)
    names = [adapter.name for adapter in ADAPTERS]
    print(f"{'':26}" + "".join(f"{name:>24}" for name in names))
    for workload, unit in dict.fromkeys((r["workload"], r["unit"]) for r in results):
        cells = []
        for name in names:
            found = [r for r in results if r["workload"] == workload and r["target"] == name]
            text = f"{found[0]['median']:.1f} ({found[0]['min']:.1f}-{found[0]['max']:.1f})" if found else "-"
            cells.append(f"{text:>24}")
        print(f"{workload + ', ' + unit:26}" + "".join(cells))


if __name__ == "__main__":
    main()
