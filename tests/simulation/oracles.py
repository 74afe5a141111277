"""Oracles of a simulation: the invariants of docs/replication.md, as far as they can be seen from outside.

What is looked at, and when:

- I1  every entry that is written follows the last one of its copy, by number and by chain: at every append.
- I2  the promise that a node reports never decreases while it has its disk, and one coordinator has each epoch there.
- I3  a node changes a shard only for the epoch that it promised last: at every entry that is made.
- I4  when a write is answered, every member of E has it durable, by the disk by which it is a member: at the answer.
- I5  every member of the stored ISR holds every committed entry: at every commit and at every change of the map.
- I6  same epoch and number, same chain, in copies of members; same chain, same digest: at every entry, and at samples.
- I7  the stored ISR has min_insync members; while a shard is served, one change differs from the last by one member.
- I8  version and epoch of the map only grow: at every change.
- I9  what was refused did not happen: its value is in no entry, ever.
- I10 revisions do not go backwards: in `simulation_clients`.
- I11 commits do not decrease: after every step of a coordinator.
- I12 what is buffered has its bound: after every step.
- I13 after healing everything completes: in `simulation_faults`.

*Committed* is what a coordinator has answered, or would: the commit of a shard that it serves. `chains` is the one
history of committed entries; whoever takes over must have all of it. Stamps do not decrease along any history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import msgpack

from kvtcp.cluster.map import ClusterMap
from kvtcp.cluster.store import Stored as StoredMap
from kvtcp.protocol.operations import PATCH, SET
from kvtcp.storage.shard.table import Logged, Table
from tests.simulation.disk import Stored
from tests.simulation.world import World, require

if TYPE_CHECKING:
    from tests.simulation.clients import Request
    from tests.simulation.coordinator import SimCoordinator

Member = tuple[str, str]


class Oracles:
    """Everything that is known about a run by somebody who sees all of it."""

    def __init__(self, world: World, cluster_map: ClusterMap) -> None:
        self.world = world
        self.map = cluster_map  # as the store has it
        self.archive: dict[str, Stored] = {}  # every copy that there ever was, by disk
        shards = cluster_map.shards
        # entries that anybody logged: (number, chain) -> (chain before, or -1 where a history begins; epoch; stamp)
        self.ledger: list[dict[tuple[int, int], tuple[int, int, int]]] = [{(0, 0): (0, 0, 0)} for _ in range(shards)]
        self.made: list[dict[tuple[int, int], int]] = [{} for _ in range(shards)]  # (epoch, number) -> chain
        self.chains: list[list[int]] = [[0] for _ in range(shards)]  # of committed entries, by number
        self.values: set[bytes] = set()  # set by any entry
        self.refused: dict[bytes, int] = {}  # values of writes that were refused -> shard
        self.digests: dict[tuple[int, int, int], int] = {}  # (shard, number, chain) -> digest
        self.promises: dict[str, tuple[int, str]] = {}  # node -> what it reported last, forgotten with its disk
        self.lost: set[str] = set()  # disks whose content is gone
        self.lost_since = [0] * shards  # disks that were lost of a shard since its last answer
        self.ruined: set[int] = set()  # shards whose data is lost, and rightly so
        self.coordinators: list[SimCoordinator] = []

    # --- entries --------------------------------------------------------------------------------------

    def logged(self, node: str, disk: str, entry: Logged, epoch_max: int) -> None:
        """A node applied an entry to the copy of this disk, and will write it. `epoch_max` is its promise."""
        shard, _, seq, chain, _ = entry
        known = self.ledger[shard].get((seq, chain))
        epoch = self._is_new(node, entry, epoch_max) if known is None else known[1]
        # a learner may have another history until it is compared
        if shard not in self.ruined and (node, disk) in self.map.members[shard]:
            made = self.made[shard].setdefault((epoch, seq), chain)
            require(made == chain, f"I6: two entries {seq} of epoch {epoch}, one by {disk}", shard)

    def _is_new(self, node: str, entry: Logged, epoch_max: int) -> int:
        """The first time that this entry is seen; its epoch."""
        shard, _, seq, chain, packed = entry
        epoch, number, stamp_ms, effects = msgpack.unpackb(packed)
        require(number == seq, f"I1: entry {number} of {node} is logged as {seq}", shard)
        require(epoch <= epoch_max, f"I3: {node} makes an entry of epoch {epoch}, it promised {epoch_max}", shard)
        before = self._before(shard, seq, packed, chain)
        require(before is not None, f"I1: entry {seq} of {node} follows nothing that is known", shard)
        assert before is not None
        _, epoch_before, stamp_before_ms = self.ledger[shard][seq - 1, before]
        require(epoch >= epoch_before, f"an entry of epoch {epoch} follows one of {epoch_before}", shard)
        require(stamp_ms >= stamp_before_ms, f"R12: stamp {stamp_ms} follows {stamp_before_ms}", shard)
        bound_ms = self.map.stamp_bound_ms
        require(stamp_ms <= bound_ms, f"R12: stamp {stamp_ms} is above {bound_ms}, which is stored", shard)
        self.ledger[shard][seq, chain] = (before, epoch, stamp_ms)
        for effect in effects:
            if effect[0] in (SET, PATCH):
                value = effect[2] if effect[0] == SET else effect[3]
                self.values.add(value)
                require(value not in self.refused, f"I9: {value!r} was refused and is entry {seq}", shard)
        return int(epoch)

    def _before(self, shard: int, seq: int, packed: bytes, chain: int) -> int | None:
        """The chain that this entry follows."""
        ledger = self.ledger[shard]
        committed = self.chains[shard]
        if seq - 1 < len(committed) and crc32(packed, committed[seq - 1]) == chain:
            return committed[seq - 1]
        return next((c for number, c in reversed(ledger) if number == seq - 1 and crc32(packed, c) == chain), None)

    def history(self, shard: int, epoch: int, seq: int, chain: int) -> tuple[int, list[int]]:
        """The history that ends in this entry: the number where it begins, and the chains from there on. One that ends
        in no known entry begins there, which is right only after all disks were lost."""
        ledger = self.ledger[shard]
        if (seq, chain) not in ledger:
            require(shard in self.ruined, f"a history of epoch {epoch} begins at {seq}, nothing was lost", shard)
            ledger[seq, chain] = (-1, epoch, 0)
        chains = [chain]
        while seq and (chain := ledger[seq, chain][0]) >= 0:
            seq -= 1
            chains.append(chain)
        return seq, chains[::-1]

    # --- commits --------------------------------------------------------------------------------------

    def committed(self, who: str, shard: int, commit: int, members: list[Member]) -> None:
        """A coordinator that serves the shard has committed up to here, with these members as E."""
        if shard in self.ruined:
            return
        if commit >= len(self.chains[shard]):
            self.lost_since[shard] = sum(disk in self.lost for _, disk in members)
        for _, disk in members:
            stored = self.archive[disk]
            chains = self.chains[shard]
            known = min(commit, len(chains) - 1)
            require(stored.seq >= commit, f"I4: {who} commits {commit}, {disk} has {stored.seq} durable", shard)
            require(stored.holds(known, chains[known]), f"{who} commits another entry {known} at {disk}", shard)
            chains += stored.between(len(chains), commit)
            require(stored.holds(commit, chains[commit]), f"I6: {disk} has another entry {commit}", shard)
        self.check_members(shard)

    def check_members(self, shard: int) -> None:
        """I5."""
        chains = self.chains[shard]
        last = len(chains) - 1
        if not last or shard in self.ruined:
            return
        for node, disk in self.map.members[shard]:
            stored = self.archive.get(disk)
            if stored is None:
                require(False, f"I5: {last} entries are committed, {node} is a member by {disk!r}", shard)
                continue
            require(stored.holds(last, chains[last]), f"I5: {disk} lacks entry {last}, it has {stored.seq}", shard)

    def answered(self, request: Request) -> None:
        """I4 at the answer, I9 for what was refused."""
        if request.outcome == "refused":
            value = _value_of(request)
            if value is not None and request.shard is not None:
                require(value not in self.values, f"I9: {value!r} was refused, and happened", request.shard)
                self.refused[value] = request.shard
        elif request.outcome == "ok" and request.seq and request.shard not in (None, *self.ruined):
            shard = request.shard
            for node, disk in request.coordinator.members(shard):
                stored = self.archive.get(disk)
                require(
                    stored is not None and stored.seq >= request.seq,
                    f"I4: entry {request.seq} is answered, {node} has it not by {disk}", shard,
                )  # fmt: skip

    def takes_over(self, who: str, shard: int, commit: int) -> None:
        """The coordinator of the map's epoch begins to serve: it has everything that was answered or shown."""
        last = len(self.chains[shard]) - 1
        if shard in self.ruined:
            return
        require(commit >= last, f"{who} serves with {commit} entries, {last} are committed", shard)

    # --- the map --------------------------------------------------------------------------------------

    def stored(self, before: StoredMap, after: StoredMap) -> None:
        """The map was changed."""
        old, new = self.map, ClusterMap.from_json(after.value)
        assert before.version < after.version
        self.map = new
        require(new.version == old.version + 1, f"I8: version {new.version} follows {old.version}")
        require(new.epoch >= old.epoch, f"I8: epoch {new.epoch} follows {old.epoch}")
        same_epoch = new.epoch == old.epoch
        require(new.owner == old.owner or not same_epoch, "R3: the owner changes within an epoch")
        for shard, row in enumerate(new.members):
            if row == old.members[shard]:
                continue
            require(len(row) >= new.min_insync, f"I7: {row} is stored as the ISR", shard)
            gone = [member for member in old.members[shard] if member not in row]
            come = [member for member in row if member not in old.members[shard]]
            self.world.note(f"map {new.version}: {old.members[shard]} -> {row}", shard)
            if same_epoch and any(each.serves(shard, new.epoch) for each in self.coordinators):
                in_its_place = len(gone) == len(come) == 1 and gone[0][0] in (come[0][0], *new.destroyed)
                one = len(gone) + len(come) <= 1 or in_its_place
                require(one, f"I7: {old.members[shard]} becomes {row}", shard)
            self.check_members(shard)
            self.look_for_ruin(shard)

    # --- nodes ----------------------------------------------------------------------------------------

    def reported(self, node: str, promised: int, coordinator: str) -> None:
        """A node sends a report for this epoch."""
        before = self.promises.get(node, (0, ""))
        require(promised >= before[0], f"I2: {node} promised {before[0]}, now {promised}")
        require(promised > before[0] or before[1] in ("", coordinator), f"I2: {node} has two owners of {promised}")
        self.promises[node] = (promised, coordinator)

    def wiped(self, node: str, copies: list[Stored]) -> None:
        """The node has lost its disk, or what a power cut left are other copies."""
        for stored in copies:
            self.lost.add(stored.disk)
            self.lost_since[stored.shard] += 1
            self.look_for_ruin(stored.shard)

    def look_for_ruin(self, shard: int) -> None:
        """Is there a member in the map that has its data? If not, it must have lost as many disks as can matter."""
        row = self.map.members[shard]
        if shard in self.ruined or any(not disk or self.has_data(disk) for _, disk in row):
            return
        lost = self.lost_since[shard]
        require(
            lost >= self.map.min_insync, f"{lost} disks were lost since the last answer, and no member has data", shard
        )
        self.ruined.add(shard)

    def forgot(self, node: str) -> None:
        """The promise was on the disk that is lost."""
        self.promises.pop(node, None)

    def has_data(self, disk: str) -> bool:
        """Whether a member of the map is still there with its disk."""
        return disk in self.archive and disk not in self.lost

    def sample(self, shard: int, table: Table) -> None:
        """I6: the digest of a table."""
        key = (shard, table.seq, table.chain)
        digest = table.digest()
        require(self.digests.setdefault(key, digest) == digest, f"I6: two digests at number {table.seq}", shard)


def _value_of(request: Request) -> bytes | None:
    """The value that only this request can have written."""
    if request.kind in ("put", "add", "swap", "append", "pair"):
        return b"%d" % request.argument
    return b"%d" % request.argument[1] if request.kind == "cas" else None
