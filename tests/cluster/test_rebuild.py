"""A lost map made again from what nodes tell: what the rows are, when nothing is chosen, and that nothing is lost."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from kvtcp.cluster import rebuild
from kvtcp.cluster.map import LOST_REPLICA, ClusterMap
from kvtcp.constants import STAMP_AHEAD_MS
from kvtcp.protocol.link import CopyReport, Report, Told
from tests.support.replication_fakes import make_map

WALL_MS = 5_000
Copies = Mapping[str, CopyReport | None]  # of the only shard, by node


def known(nodes: int = 3, min_insync: int = 2, shards: int = 1, **changed: Any) -> ClusterMap:
    """The map that the nodes keep: every copy has the disk "disk" there."""
    made = make_map(nodes, min(nodes, 3), shards, min_insync=min_insync)
    return replace(made, epoch=3, version=7, stamp_bound_ms=100, **changed)


def copy(seq: int, epoch: int = 3, *, disk: str = "disk", commit: int = 0, **changed: Any) -> CopyReport:
    """A copy that ends at this number; its chain is the number."""
    return CopyReport(disk, epoch=epoch, seq=seq, commit=commit, **{"chain": seq, **changed})


def tell(node: str, copies: dict[int, CopyReport], kept: ClusterMap | None, **changed: Any) -> Told:
    """What a node says that keeps this map."""
    version = 0 if kept is None else kept.version
    fields = {"durability": "sync", "stamp_ms": 50, "promised": 3, "map_version": version, "space": 0, **changed}
    report = Report(node=node, pid=1, copies=copies, **fields)
    return Told(report, b"" if kept is None else kept.to_json(), linked=False)


def recover(copies: Copies, kept: ClusterMap | None = None, **options: Any) -> rebuild.Recovered:
    """The map for a cluster of one shard whose nodes have these copies (None: no copy); all keep the same map."""
    kept = kept or known()
    told = {node: tell(node, {} if each is None else {0: each}, kept) for node, each in copies.items()}
    return rebuild.recovered_map(told, {}, owner="new", wall_ms=WALL_MS, **options)


def row(copies: Copies, kept: ClusterMap | None = None, **options: Any) -> list[tuple[str, str]]:
    """The row of the only shard, which is served."""
    recovered = recover(copies, kept, **options)
    assert recovered.down == {}
    return list(recovered.map.members[0])


def why_down(copies: Copies, kept: ClusterMap | None = None, **options: Any) -> str:
    """Why the only shard is down. No disk of its row is that of a copy."""
    recovered = recover(copies, kept, **options)
    disks = {node: each.replica_id for node, each in copies.items() if each is not None}
    assert all(disks.get(node) != disk for node, disk in recovered.map.members[0])
    return recovered.down[0]


# --- the map ------------------------------------------------------------------------------------------


def test_fields_of_the_map() -> None:
    """What changes rarely is as in the newest map; epoch, version, bound and ids are above all that was seen."""
    older = known(shards=2)
    newest = replace(older, version=9, restoring=b"r", draining=("n3",), durability="os", last_node=4)
    copies = {0: copy(5), 1: copy(0)}
    told = {
        "n1": tell("n1", copies, older, promised=8, map_version=12, stamp_ms=70),
        "n2": tell("n2", copies, newest, stamp_ms=9_000),
        "n3": tell("n3", copies, None, promised=3),
        "n6": tell("n6", {}, None, promised=0, map_version=0),
    }
    assert rebuild.newest_map(told) == newest
    made = rebuild.recovered_map(told, {}, owner="new", wall_ms=WALL_MS).map
    assert made == replace(
        newest, owner="new", epoch=8, version=12 + rebuild.VERSION_DISTANCE, stamp_bound_ms=9_000 + STAMP_AHEAD_MS,
        last_node=6, heard={"n1": 12, "n2": 9, "n3": 0},
    )  # fmt: skip
    assert ClusterMap.from_json(made.to_json()) == made


def test_the_bound_is_above_the_clock_and_the_last_bound() -> None:
    """Whatever is latest."""
    assert recover({f"n{n}": copy(1) for n in (1, 2, 3)}).map.stamp_bound_ms == WALL_MS + STAMP_AHEAD_MS
    kept = replace(known(), stamp_bound_ms=10**9)
    assert recover({f"n{n}": copy(1) for n in (1, 2, 3)}, kept).map.stamp_bound_ms == 10**9 + STAMP_AHEAD_MS


def test_a_higher_epoch_is_newer_than_a_higher_version() -> None:
    """Versions of maps of two epochs are not compared: a store that was put back counts anew."""
    kept = known()
    told = {
        "n1": tell("n1", {}, replace(kept, epoch=2, version=99)),
        "n2": tell("n2", {}, replace(kept, epoch=3, version=7)),
    }
    assert rebuild.newest_map(told) == kept


def test_no_map_and_maps_that_cannot_be_read() -> None:
    """Both are a sentence, the second with the node."""
    with pytest.raises(rebuild.CannotRecover, match="no node that answers keeps a cluster map"):
        rebuild.recovered_map({"n1": tell("n1", {}, None)}, {}, owner="new", wall_ms=WALL_MS)
    with pytest.raises(rebuild.CannotRecover, match="no node that answers"):
        rebuild.recovered_map({}, {}, owner="new", wall_ms=WALL_MS)
    broken = replace(tell("n1", {}, None), map=b"{}")
    with pytest.raises(rebuild.CannotRecover, match="node n1 keeps cannot be used: the cluster map has no cluster"):
        rebuild.newest_map({"n1": broken})


# --- who has to answer --------------------------------------------------------------------------------


def test_all_nodes_have_to_answer_with_their_data() -> None:
    """Silent ones and ones that came back empty are named; destroyed ones have not to answer."""
    kept = known(4, destroyed=("n4",))
    told = {"n1": tell("n1", {0: copy(5)}, kept), "n2": tell("n2", {}, None, promised=0)}
    assert rebuild.missing_nodes(kept, told, {}) == {"n2": "it has no data of this cluster", "n3": "it does not answer"}
    words = r"lost: n2 \(it has no data .*\), n3 \(off\); .* --recover-map accept"
    with pytest.raises(rebuild.CannotRecover, match=words):
        rebuild.recovered_map(told, {"n3": "off"}, owner="new", wall_ms=WALL_MS)


def test_accepted_without_some_nodes() -> None:
    """With M copies left a shard goes on."""
    found = recover({"n1": copy(5), "n3": copy(4)}, accept=True)
    assert found.missing == {"n2": "it does not answer"} and found.down == {}
    assert found.map.members[0] == (("n1", "disk"), ("n3", "disk"))


def test_accepted_with_too_few_copies() -> None:
    """With fewer than M a shard is down: what the missing ones had may be more."""
    assert why_down({"n1": copy(5)}, accept=True) == (
        "only n1 of the 2 members that every shard had at least can be found"
    )


def test_accepted_without_any_copy() -> None:
    """The row is kept: it is served when its nodes are there. A disk that nobody knew is one that nobody has."""
    kept = known(3, 1, shards=2)
    kept = replace(kept, factor=1, members=((("n1", "disk"),), (("n2", ""),)), wanted=(("n1",), ("n2",)))
    told = {"n3": tell("n3", {}, kept)}
    found = rebuild.recovered_map(told, {}, owner="new", wall_ms=WALL_MS, accept=True)
    assert found.map.members == ((("n1", "disk"),), (("n2", LOST_REPLICA),))
    assert found.down == dict.fromkeys((0, 1), "no node has a copy of it")


def test_nodes_that_are_not_in_the_map_do_not_count() -> None:
    """A node that was removed, or declared destroyed, may have anything."""
    kept = known(4, destroyed=("n4",))
    copies = {f"n{n}": copy(5) for n in (1, 2, 3)}
    assert row({**copies, "n4": copy(9), "n9": copy(9)}, kept) == [("n1", "disk"), ("n2", "disk"), ("n3", "disk")]


# --- rows ---------------------------------------------------------------------------------------------


def test_best_copies_are_the_members() -> None:
    """All that end where the best one ends, whatever their disks were called in the map."""
    assert row({"n1": copy(5), "n2": copy(5, disk="other"), "n3": copy(4)}) == [("n1", "disk"), ("n2", "other")]


def test_the_epoch_counts_before_the_number() -> None:
    """What an older epoch left behind may be long."""
    assert row({"n1": copy(90, 2), "n2": copy(5, 3), "n3": copy(5, 3)}) == [("n2", "disk"), ("n3", "disk")]


def test_others_fill_the_row_up_to_the_fewest_members() -> None:
    """The best of the rest comes next. One that ends below a committed number is replaced whole."""
    assert row({"n1": copy(3), "n2": copy(4), "n3": copy(5)}) == [("n3", "disk"), ("n2", "disk")]
    assert row({"n1": copy(3), "n2": copy(3, 2), "n3": copy(5, commit=4)}) == [("n3", "disk"), ("n1", LOST_REPLICA)]


def test_a_doubtful_copy_fills_the_row() -> None:
    """With fewer doubtful copies than M one that is not was a member; the doubtful one is replaced whole."""
    broken = copy(0, complete=False, damage="bad sector", disk="d3")
    assert row({"n1": None, "n2": copy(5), "n3": broken}) == [("n2", "disk"), ("n3", LOST_REPLICA)]
    kept = known(3, 2, destroyed=("n1",))
    assert row({"n2": copy(5), "n3": None}, kept) == [("n2", "disk"), ("n1", LOST_REPLICA)]


def test_no_more_members_than_copies_are_wanted() -> None:
    """Of many equal ones those that shall hold the shard, in the order of the newest row."""
    kept = known(5)
    kept = replace(kept, wanted=(("n5", "n1", "n3"),), members=((("n3", "disk"), ("n2", "disk")),))
    assert row({f"n{n}": copy(5) for n in range(1, 6)}, kept) == [("n3", "disk"), ("n1", "disk"), ("n5", "disk")]


def test_empty_shards() -> None:
    """A shard in which nothing was ever written has all its copies as members."""
    kept = known()
    kept = replace(kept, members=(tuple((node, "") for node, _ in kept.members[0]),))
    assert row({f"n{n}": copy(0, 0, disk=f"d{n}") for n in (1, 2, 3)}, kept) == [
        ("n1", "d1"), ("n2", "d2"), ("n3", "d3"),
    ]  # fmt: skip


# --- nothing is chosen --------------------------------------------------------------------------------


def test_too_many_doubtful_copies() -> None:
    """If M copies are in doubt, those may have been the members."""
    bad: dict[str, Any] = {"complete": False, "damage": "bad sector", "disk": "new"}
    said = "n2, n3 may have had writes that the others lack, and cannot be relied on any more"
    assert why_down({"n1": copy(5), "n2": copy(9, **bad), "n3": copy(9, **bad)}) == said
    cut: dict[str, Any] = {"damage": "power cut", "disk": "new"}
    assert why_down({"n1": copy(5), "n2": copy(9, **cut), "n3": copy(9, **cut)}) == said
    assert why_down({"n1": None, "n2": copy(9, **bad), "n3": None}).startswith("n2 may have had writes")
    kept = known(3, 1, destroyed=("n1",))
    assert why_down({"n2": copy(5), "n3": copy(5)}, kept).startswith("n1 may have had writes")


def test_a_damage_that_was_repaired() -> None:
    """A copy that a map names as a member after its damage had everything then."""
    repaired: dict[str, Any] = {"damage": "power cut", "disk": "disk"}
    assert row({"n1": copy(5), "n2": copy(9, **repaired), "n3": copy(9, **repaired)}) == [
        ("n2", "disk"), ("n3", "disk"),
    ]  # fmt: skip


def test_directories_made_anew() -> None:
    """Empty copies that no map names: they may have been the only ones with data, and those of it be gone."""
    anew = copy(0, 0, disk="new")
    assert why_down({"n1": copy(5), "n2": anew, "n3": anew}).startswith("n2, n3 may have had writes")
    assert row({"n1": copy(5), "n2": anew, "n3": copy(5)}) == [("n1", "disk"), ("n3", "disk")]
    assert why_down({"n1": copy(0), "n2": anew, "n3": anew}).startswith("n2, n3 may have had writes")
    cut = copy(5, damage="power cut", disk="new")
    assert why_down({"n1": None, "n2": anew, "n3": cut}).startswith("n3, n2 may have had writes")


def test_an_older_copy_of_a_directory() -> None:
    """A node that knows less than it once stored is in doubt with everything it has."""
    kept = known(heard={"n2": 7, "n3": 7})
    told = {f"n{n}": tell(f"n{n}", {0: copy(5)}, kept, map_version=7 if n == 1 else 6) for n in (1, 2, 3)}
    found = rebuild.recovered_map(told, {}, owner="new", wall_ms=WALL_MS)
    assert found.down[0].startswith("n2, n3 may have had writes")
    assert found.map.heard == {"n1": 7, "n2": 7, "n3": 7}, "they are found out by the next HELLO too"


def test_copies_that_vanished() -> None:
    """Fewer than M copies, and nothing that says why: where the others were nobody knows."""
    assert "only n1 of the 2 members" in why_down({"n1": copy(5), "n2": None, "n3": None})


def test_a_committed_number_that_nobody_reaches() -> None:
    """Nobody has what somebody was told to be committed."""
    found = {"n1": copy(5), "n2": copy(5), "n3": copy(0, complete=False, damage="bad sector", commit=6)}
    assert why_down(found) == "number 6 was committed, and the best copy ends at 5"


def test_two_histories() -> None:
    """Two best copies that differ: it is not chosen between them."""
    found = {"n1": copy(5), "n2": copy(5, chain=99), "n3": copy(5)}
    assert why_down(found) == "n1, n2, n3 end at number 5 with different histories"


def test_a_lost_row_in_memory_does_not_look_new() -> None:
    """The row has the copy with data, so the shard is not taken for one that begins anew in mode memory."""
    found = recover({"n3": copy(5), "n1": None}, known(durability="memory"), accept=True)
    assert found.down and found.map.members[0][0] == ("n3", LOST_REPLICA)


# --- nothing committed is lost ------------------------------------------------------------------------


class History:
    """A shard on some nodes as the rules let it go on, with logs as lists of (epoch, write). What the coordinators
    stored is `row`; `map` is what each node keeps of it."""

    def __init__(self, rng: random.Random, nodes: int, min_insync: int) -> None:
        self.rng = rng
        self.minimum = min_insync
        self.epoch = 0
        self.writes = 0
        self.version = 0
        self.committed: list[tuple[int, int]] = []
        self.base = known(nodes, min_insync)
        self.disks = dict.fromkeys(self.base.nodes, "d0")
        self.logs: dict[str, list[tuple[int, int]]] = {node: [] for node in self.base.nodes}
        self.damaged: set[str] = set()
        self.hints = dict.fromkeys(self.base.nodes, 0)
        self.row = {node: self.disks[node] for node in list(self.base.nodes)[: self.base.factor]}
        self.kept: dict[str, ClusterMap | None] = dict.fromkeys(self.base.nodes)
        self.takeover(list(self.base.nodes))

    def good(self) -> list[str]:
        """Members with the disks that the row says."""
        return [node for node, disk in self.row.items() if self.disks[node] == disk]

    def stored(self) -> ClusterMap:
        """The map that is about to be lost."""
        return replace(self.base, epoch=self.epoch, version=self.version, members=(tuple(self.row.items()),))

    def takeover(self, linked: list[str]) -> None:
        """The next epoch: some nodes get the map; the good members that are linked are made equal to the best."""
        self.epoch += 1
        self.version += 1
        for node in linked:
            self.kept[node] = self.stored()
        good = [node for node in self.good() if node in linked]
        for node in [node for node in self.row if node not in good]:
            if good and len(self.row) > self.minimum:
                del self.row[node]
        self.serving = bool(good) and len(good) == len(self.row)
        if self.serving:
            best = max((self.logs[node] for node in good), key=lambda log: (log[-1:], len(log)))
            for node in good:
                self.logs[node] = list(best)
            self.committed = list(best)
            self.last = list(best)
        self.version += 1

    def write(self) -> None:
        """Some writes, which some members have, and perhaps all: then they are committed, with what came before."""
        if not self.serving:
            return
        for _ in range(self.rng.randrange(1, 5)):
            self.writes += 1
            self.last.append((self.epoch, self.writes))
        share = self.rng.choice((0.3, 0.9))
        for node in self.good():
            if self.rng.random() < share:
                self.logs[node] = list(self.last)
        self.commit()

    def commit(self) -> None:
        """What all members have."""
        if self.serving and len(self.good()) == len(self.row):
            upto = min(len(self.logs[node]) for node in self.row)
            if upto > len(self.committed):
                self.committed = self.last[:upto]
            self.hints[self.rng.choice(list(self.row))] = len(self.committed)

    def step(self) -> None:
        """Something happens."""
        rng = self.rng
        nodes = list(self.base.nodes)
        node = rng.choice(nodes)
        kind = rng.random()
        if kind < 0.5:
            self.write()
        elif kind < 0.65:
            if self.serving and node in self.row and len(self.row) > self.minimum:
                others = [each for each in self.good() if each != node]
                if others:
                    del self.row[node]
                    self.commit()
        elif kind < 0.8:
            if self.serving and self.good() and node not in self.good() and (
                node in self.row or len(self.row) <= self.base.factor
            ):
                self.logs[node] = list(self.logs[rng.choice(self.good())])
                if len(self.logs[node]) < len(self.committed):
                    return
                self.disks[node] = f"d{rng.randrange(10**9)}"
                self.damaged.discard(node)
                self.row[node] = self.disks[node]
                self.hints[node] = 0
        elif kind < 0.9:
            self.takeover([each for each in nodes if rng.random() < 0.8])
        elif kind < 0.95:
            self.disks[node] = f"d{rng.randrange(10**9)}"
            self.damaged.add(node)
            self.logs[node] = self.logs[node][: rng.randrange(len(self.logs[node]) + 1)]
            self.serving = self.serving and node not in self.row
        self.version += 1

    def told(self) -> dict[str, Told]:
        """What the nodes say, if all are asked."""
        said = {}
        for node, log in self.logs.items():
            end = log[-1] if log else (0, 0)
            is_damaged = node in self.damaged
            has = CopyReport(
                self.disks[node], 1, not is_damaged or self.rng.random() < 0.5, end[0], len(log), end[1],
                min(self.hints[node], len(log)), "broken" if is_damaged else "",
            )  # fmt: skip
            kept = self.kept[node]
            said[node] = tell(node, {0: has}, kept, promised=0 if kept is None else kept.epoch)
        return said


@pytest.mark.parametrize(("nodes", "minimum"), [(3, 2), (3, 1), (5, 2), (4, 3), (2, 1)])
def test_nothing_committed_is_lost(nodes: int, minimum: int) -> None:
    """Histories by the rules, with lost disks and links at random: whoever is chosen has everything committed. Nodes
    that are missing count like doubtful copies: fewer than M of both together lose nothing."""
    served = down = 0
    for seed in range(400):
        history = History(random.Random(seed), nodes, minimum)
        for _ in range(60):
            history.step()
        told = history.told()
        spare = minimum - 1 - len(history.damaged)
        for node in history.rng.sample(sorted(told), history.rng.randrange(spare + 1) if spare > 0 else 0):
            del told[node]
        found = rebuild.recovered_map(told, {}, owner="new", wall_ms=WALL_MS, accept=True)
        if found.down:
            down += 1
            continue
        served += 1
        good = [node for node, disk in found.map.members[0] if history.disks[node] == disk]
        best = max((history.logs[node] for node in good), key=lambda log: (log[-1:], len(log)))
        is_whole = best[: len(history.committed)] == history.committed
        assert is_whole, f"seed {seed}: {best} lacks some of {history.committed}"
        others = [len(history.logs[node]) for node in good if history.logs[node] != best]
        assert not others or len(found.map.members[0]) == minimum, f"seed {seed}: a member could be left out"
    assert served > 50 and (minimum > 2 or down > 5), f"served {served}, down {down}"
