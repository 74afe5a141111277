"""Changes of the map: combined in order, settled after unknown outcomes, ended by a conflict; against random stores."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtcp.cluster.changes import LOST, Edit, MapChanges, NotOwner
from kvtcp.cluster.map import ClusterMap, MapError
from kvtcp.cluster.store import NOTHING, Outcome, Stored
from kvtcp.constants import MAP_RESEND_MS
from tests.support.replication_fakes import make_map

Sent = tuple[int | None, bytes]


class Told:
    """Everything that the changes told, in order: (name, "done", map), (name, "failed", error), ("", "map", map)..."""

    def __init__(self, changes: MapChanges) -> None:
        self.changes = changes
        self.events: list[tuple[str, str, object]] = []
        changes.on_change.append(lambda stored: self.events.append(("", "map", stored)))
        changes.on_lost = lambda error: self.events.append(("", "lost", error))

    def propose(self, name: str, edit: Edit, *, can_fail: bool = False) -> None:
        """Propose under a name."""
        self.changes.propose(
            edit,
            lambda stored: self.events.append((name, "done", stored)),
            (lambda error: self.events.append((name, "failed", error))) if can_fail else None,
        )

    def names(self, what: str) -> list[str]:
        """Who was told this."""
        return [name for name, told, _ in self.events if told == what]


def prefix(name: str) -> Edit:
    """A change of no row: a name is added to the prefix that is restored."""
    return lambda old: replace(old, restoring=(old.restoring or b"") + name.encode())


def disk(shard: int, name: str, node: str = "n1") -> Edit:
    """A change of one row."""
    return lambda old: old.with_replica_ids({shard: {node: name}})


def made() -> tuple[MapChanges, Told]:
    """Changes of a map of version 1."""
    changes = MapChanges(make_map())
    return changes, Told(changes)


def sent(changes: MapChanges, now_ms: int = 0) -> Sent:
    """What is sent now."""
    changes.check()
    found = changes.to_send(now_ms)
    assert found is not None
    changes.check()
    assert changes.to_send(now_ms + 1_000_000) is None, "one at a time"
    return found


def test_a_change() -> None:
    """It expects the version that is stored, has the next one, and is told when it is stored, after the map was."""
    changes, told = made()
    assert not changes.is_busy and changes.to_send(0) is None
    told.propose("a", prefix("a"))
    assert changes.is_busy and changes.proposed is None
    expected, value = sent(changes)
    new = ClusterMap.from_json(value)
    assert (expected, new.version, new.restoring) == (1, 2, b"a")
    assert changes.proposed == new and changes.map.version == 1 and told.events == []
    changes.on_outcome(Outcome.DONE, now_ms=0)
    changes.check()
    assert told.events == [("", "map", new), ("a", "done", new)] and changes.map == new
    assert changes.store_version == 2 and not changes.is_busy and changes.proposed is None


def test_what_waits_goes_together() -> None:
    """What was proposed while a change was in flight is the next one, in order, and each is told the same map."""
    changes, told = made()
    told.propose("a", prefix("a"))
    sent(changes)
    told.propose("b", prefix("b"))
    told.propose("c", disk(1, "c"))
    told.propose("d", prefix("d"))
    told.propose("e", disk(2, "e"))
    changes.on_outcome(Outcome.DONE, now_ms=0)
    expected, value = sent(changes)
    new = ClusterMap.from_json(value)
    assert expected == 2 and new.restoring == b"abd"
    assert new.replica_id_of(1, "n1") == "c" and new.replica_id_of(2, "n1") == "e"
    changes.on_outcome(Outcome.DONE, now_ms=0)
    assert told.names("done") == ["a", "b", "c", "d", "e"] and changes.map == new
    assert [each for name, what, each in told.events if what == "done" and name != "a"] == [new] * 4


@pytest.mark.parametrize("second", [
    lambda old: old.with_replica_ids({1: {"n2": "second"}}),
    lambda old: old.without([0, 1], "n2"),
    lambda old: old.first_answers(1, "n3"),
    lambda old: old.replaced(1, "n2", "n2", "second"),
    lambda old: old.with_replica_ids({1: {"n1": "disk"}}),  # the first is taken back
])  # fmt: skip
def test_two_changes_of_one_row(second: Edit) -> None:
    """The second waits for the next compare-and-set, and what was proposed after it does too (I7)."""
    changes, told = made()
    told.propose("first", disk(1, "first"))
    told.propose("other", disk(2, "other"))
    told.propose("second", second)
    told.propose("after", prefix("after"))
    first = ClusterMap.from_json(sent(changes)[1])
    assert first == disk(2, "other")(disk(1, "first")(replace(make_map(), version=2)))
    changes.on_outcome(Outcome.DONE, now_ms=0)
    assert told.names("done") == ["first", "other"]
    expected, value = sent(changes)
    assert expected == 2 and ClusterMap.from_json(value) == prefix("after")(second(replace(first, version=3)))
    changes.on_outcome(Outcome.DONE, now_ms=0)
    assert told.names("done") == ["first", "other", "second", "after"]


def test_a_change_of_nothing() -> None:
    """It is done without the store, in its turn; what it leads to is sent in the same call."""
    changes, told = made()
    told.propose("a", prefix("a"))
    sent(changes)
    changes.propose(
        lambda old: replace(old, restoring=b"a"), lambda stored: told.propose("b", prefix("b" * stored.version))
    )
    assert told.names("done") == []
    changes.on_outcome(Outcome.DONE, now_ms=0)
    assert told.names("done") == ["a"]
    assert ClusterMap.from_json(sent(changes)[1]).restoring == b"abb"
    changes.on_outcome(Outcome.DONE, now_ms=0)
    told.propose("c", lambda old: old)
    assert changes.is_busy and changes.to_send(0) is None and not changes.is_busy
    assert told.names("done") == ["a", "b", "c"] and changes.map.version == 3


def test_an_unknown_outcome() -> None:
    """The same bytes are sent again after each pause, whatever was proposed meanwhile, until the outcome is known."""
    changes, told = made()
    told.propose("a", prefix("a"))
    first = sent(changes, 1_000)
    now_ms = 1_010
    for number in range(3):
        assert changes.is_unsure == (number > 0)
        changes.on_outcome(Outcome.UNKNOWN, now_ms=now_ms)
        assert changes.is_unsure and "it is not known whether the cluster map was stored" in changes.trouble
        told.propose(f"b{number}", prefix("b"), can_fail=True)
        assert changes.to_send(now_ms + MAP_RESEND_MS - 1) is None
        now_ms += MAP_RESEND_MS
        assert changes.due_ms == now_ms and sent(changes, now_ms) == first
        assert changes.proposed == ClusterMap.from_json(first[1])
    changes.on_outcome(Outcome.DONE, now_ms=now_ms)
    assert changes.trouble == "" and changes.map.version == 2 and told.names("done") == ["a"]
    assert not changes.is_unsure and ClusterMap.from_json(sent(changes, now_ms)[1]).restoring == b"abbb"


def test_a_conflict_after_an_unknown_outcome() -> None:
    """What was read tells whether it was our own value; old or missing reads tell nothing; any other value is final."""
    for number in range(7):
        changes, told = made()
        told.propose("a", prefix("a"))
        expected, value = sent(changes)
        assert expected == 1
        changes.on_outcome(Outcome.UNKNOWN, now_ms=0)
        assert sent(changes, MAP_RESEND_MS) == (expected, value)
        stored, is_ours, is_final = [
            (Stored(2, value), True, False),
            (None, False, False),
            (Stored(1, make_map().to_json()), False, False),
            (Stored(2, value + b" "), False, True),
            (Stored(3, value), False, True),
            (Stored(3, prefix("b")(changes.map).to_json()), False, True),
            (NOTHING, False, True),
        ][number]
        changes.on_outcome(Outcome.CONFLICT, stored, now_ms=MAP_RESEND_MS)
        changes.check()
        assert bool(changes.lost_reason) == is_final
        assert told.names("done") == (["a"] if is_ours else [])
        if is_ours:
            assert changes.map == ClusterMap.from_json(value) and changes.store_version == 2
            told.propose("b", prefix("b"))
            assert sent(changes, MAP_RESEND_MS)[0] == 2
        elif not is_final:
            assert changes.to_send(2 * MAP_RESEND_MS - 1) is None
            assert sent(changes, 2 * MAP_RESEND_MS) == (expected, value)


@pytest.mark.parametrize("stored", [None, Stored(2, b"{}"), NOTHING])
def test_a_conflict_is_final(stored: Stored | None) -> None:
    """At the first attempt it cannot be our own: everybody is told, nothing is sent any more."""
    changes, told = made()
    told.propose("a", prefix("a"), can_fail=True)
    told.propose("b", prefix("b"))
    sent(changes)
    told.propose("c", prefix("c"), can_fail=True)
    changes.on_outcome(Outcome.CONFLICT, stored, now_ms=0)
    changes.check()
    assert changes.lost_reason == LOST and not changes.is_busy and changes.map.version == 1
    assert [(name, what) for name, what, _ in told.events] == [("", "lost"), ("a", "failed"), ("c", "failed")]
    assert all(type(error) is NotOwner and str(error) == LOST for _, _, error in told.events)
    told.propose("d", prefix("d"), can_fail=True)
    told.propose("e", prefix("e"))
    assert told.names("failed") == ["a", "c", "d"] and changes.to_send(10_000_000) is None and not changes.is_busy


def test_an_error_that_changed_nothing() -> None:
    """Who can be told is told, and the change ends; the others are tried again after a pause, first and in order."""
    changes, told = made()
    told.propose("a", prefix("a"))
    told.propose("b", prefix("b"), can_fail=True)
    told.propose("c", prefix("c"))
    sent(changes, 100)
    told.propose("d", prefix("d"))
    error = OSError(28, "No space left on device")
    changes.on_failed(error, now_ms=150)
    changes.check()
    assert told.events == [("b", "failed", error)] and changes.map.version == 1
    assert changes.trouble == f"the cluster map cannot be stored: {error}"
    assert changes.to_send(149 + MAP_RESEND_MS) is None and changes.proposed is None
    expected, value = sent(changes, 150 + MAP_RESEND_MS)
    assert expected == 1 and ClusterMap.from_json(value).restoring == b"acd"
    changes.on_outcome(Outcome.DONE, now_ms=0)
    assert told.names("done") == ["a", "c", "d"] and changes.trouble == ""


def test_an_error_for_everybody() -> None:
    """There is nothing to repeat: the next change does not wait."""
    changes, told = made()
    told.propose("a", prefix("a"), can_fail=True)
    sent(changes, 100)
    changes.on_failed(OSError(), now_ms=100)
    assert not changes.is_busy
    told.propose("b", prefix("b"))
    assert ClusterMap.from_json(sent(changes, 100)[1]).restoring == b"b"


def test_an_error_after_an_unknown_outcome() -> None:
    """It says nothing about the attempt before: the change goes on."""
    changes, told = made()
    told.propose("a", prefix("a"), can_fail=True)
    first = sent(changes)
    changes.on_outcome(Outcome.UNKNOWN, now_ms=0)
    sent(changes, MAP_RESEND_MS)
    changes.on_failed(OSError(28, "No space left on device"), now_ms=MAP_RESEND_MS)
    assert told.events == [] and "No space left" in changes.trouble
    assert sent(changes, 2 * MAP_RESEND_MS) == first
    changes.on_outcome(Outcome.CONFLICT, Stored(2, first[1]), now_ms=0)
    assert told.names("done") == ["a"]


def refused(old: ClusterMap) -> ClusterMap:
    """An edit that does not fit."""
    raise ValueError("it does not fit")


def test_an_edit_that_does_not_fit() -> None:
    """It is not made, and does not hinder the others; without anybody to tell it is an error of the program."""
    changes, told = made()
    told.propose("a", prefix("a"))
    told.propose("b", refused, can_fail=True)
    told.propose("c", prefix("c"))
    assert ClusterMap.from_json(sent(changes)[1]).restoring == b"ac"
    assert [(name, what, str(error)) for name, what, error in told.events] == [("b", "failed", "it does not fit")]
    changes.on_outcome(Outcome.DONE, now_ms=0)
    told.propose("d", refused)
    with pytest.raises(ValueError, match="it does not fit"):
        changes.to_send(0)


def test_an_edit_that_is_wrong() -> None:
    """Nothing that is no map, is older, or broke a precondition gets near the store."""
    wrong: list[tuple[Edit, type[Exception], str]] = [
        (lambda old: replace(old, members=old.members[:3] + ((),)), MapError, "wrong row for shard 3"),
        (lambda old: replace(old, epoch=0), AssertionError, "the epoch only grows"),
        (lambda old: old.without([0], "n9"), AssertionError, "n9 is no member"),
    ]
    for edit, error, words in wrong:
        changes, told = made()
        told.propose("a", prefix("a"))
        told.propose("b", edit, can_fail=True)
        with pytest.raises(error, match=words):
            changes.to_send(0)
        assert told.events == [] and changes.proposed is None
        changes.check()


def test_proposals_out_of_what_is_told() -> None:
    """Whoever is told may propose at once; it is the next change."""
    changes, told = made()
    changes.on_change.append(lambda stored: told.propose("b", prefix("b")) if stored.version == 2 else None)
    changes.propose(prefix("a"), lambda stored: told.propose("c", prefix("c")))
    sent(changes)
    changes.on_outcome(Outcome.DONE, now_ms=0)
    assert ClusterMap.from_json(sent(changes)[1]).restoring == b"abc"


def test_founding() -> None:
    """The first map expects an empty store, and is settled like every other."""
    first = make_map()
    changes = MapChanges.of(None)
    told: list[object] = []
    assert not changes.is_founded and changes.to_send(0) is None
    with pytest.raises(AssertionError, match="founded before"):
        changes.propose(prefix("a"), told.append)
    changes.found(first, told.append, told.append)
    assert sent(changes) == (None, first.to_json())
    changes.on_outcome(Outcome.UNKNOWN, now_ms=0)
    assert sent(changes, MAP_RESEND_MS) == (None, first.to_json())
    changes.on_outcome(Outcome.CONFLICT, NOTHING, now_ms=0)
    assert sent(changes, MAP_RESEND_MS) == (None, first.to_json())
    changes.on_outcome(Outcome.CONFLICT, Stored(1, first.to_json()), now_ms=0)
    changes.check()
    assert told == [first] and changes.is_founded and changes.map == first and changes.store_version == 1
    with pytest.raises(AssertionError, match="founded once"):
        changes.found(first, told.append, told.append)


def test_founding_that_fails() -> None:
    """Nothing was stored: it may be tried again. Somebody else was faster: it is lost."""
    changes = MapChanges.of(None)
    told: list[object] = []
    changes.found(make_map(), told.append, told.append)
    sent(changes)
    error = OSError()
    changes.on_failed(error, now_ms=0)
    assert told == [error] and not changes.is_founded and not changes.is_busy
    changes.found(make_map(), told.append, told.append)
    sent(changes)
    changes.on_outcome(Outcome.CONFLICT, now_ms=0)
    assert changes.lost_reason and type(told[1]) is NotOwner and not changes.is_founded


def test_versions() -> None:
    """The store's is expected, the map's own is stored; both grow by one."""
    old = replace(make_map(), version=8)
    for changes, expected in [
        (MapChanges(old), 8),
        (MapChanges(old, 3), 3),
        (MapChanges.of(Stored(3, old.to_json())), 3),
    ]:
        told = Told(changes)
        for step in range(3):
            told.propose("a", prefix("a"))
            found, value = sent(changes)
            assert (found, ClusterMap.from_json(value).version) == (expected + step, 9 + step)
            changes.on_outcome(Outcome.DONE, now_ms=0)
            assert (changes.store_version, changes.map.version) == (expected + step + 1, 9 + step)
    with pytest.raises(MapError):
        MapChanges.of(Stored(1, b"{}"))


def test_outcomes_that_nobody_waits_for() -> None:
    """They are errors of the shell."""
    changes, told = made()
    with pytest.raises(AssertionError, match="belongs to a compare-and-set"):
        changes.on_outcome(Outcome.DONE, now_ms=0)
    told.propose("a", prefix("a"))
    sent(changes)
    changes.on_outcome(Outcome.UNKNOWN, now_ms=0)
    with pytest.raises(AssertionError, match="belongs to a compare-and-set"):
        changes.on_failed(OSError(), now_ms=0)


SHARDS = 3


class RandomStore(RuleBasedStateMachine):
    """Random proposals and a store that fails, hides outcomes, and applies attempts late; at times an intruder.

    The model is what the store holds after each change, and who proposed what.
    """

    def __init__(self) -> None:
        super().__init__()
        first = make_map(shards=SHARDS)
        self.changes = MapChanges(first)
        self.told = Told(self.changes)
        self.history = [Stored(1, first.to_json())]
        self.late: list[Sent] = []  # attempts that are still under way in the store
        self.attempts: dict[int, bytes] = {}  # expected version -> the only bytes it may be sent with, while unsure
        self.rows: dict[str, set[int]] = {}  # of every proposal, in order
        self.can_fail: set[str] = set()
        self.awaited: Sent | None = None
        self.intruded = False
        self.now_ms = 0

    @property
    def stored(self) -> Stored:
        return self.history[-1]

    def apply(self, attempt: Sent) -> bool:
        """The store's half of a compare-and-set."""
        if attempt[0] != self.stored.version:
            return False
        self.history.append(Stored(self.stored.version + 1, attempt[1]))
        return True

    @rule(shards=st.sets(st.integers(0, SHARDS - 1)), can_fail=st.booleans())
    def propose(self, shards: set[int], can_fail: bool) -> None:
        """Another disk for a member of some shards, or a prefix; each leaves its name."""
        name = f"p{len(self.rows)}"
        self.rows[name] = shards
        if can_fail:
            self.can_fail.add(name)
        edit = prefix(f"{name} ") if not shards else lambda old: old.with_replica_ids({n: {"n1": name} for n in shards})
        self.told.propose(name, edit, can_fail=can_fail)

    @rule(can_fail=st.booleans())
    def propose_nothing(self, can_fail: bool) -> None:
        """A change of nothing, or one that is refused."""
        name = f"p{len(self.rows)}"
        self.rows[name] = set()
        if can_fail:
            self.can_fail.add(name)
        self.told.propose(name, refused if can_fail else lambda old: old, can_fail=can_fail)

    @rule(pause_ms=st.sampled_from([0, 1, MAP_RESEND_MS]))
    def send(self, pause_ms: int) -> None:
        """Time passes, and the next attempt is made if there is one."""
        self.now_ms += pause_ms
        was_awaited = self.awaited is not None
        is_unsure = self.changes.is_unsure
        attempt = self.changes.to_send(self.now_ms)
        if attempt is None:
            return
        assert not was_awaited, "one at a time"
        if is_unsure:
            assert self.attempts[attempt[0] or 0] == attempt[1], "the same bytes"
        self.attempts[attempt[0] or 0] = attempt[1]
        self.awaited = attempt

    @precondition(lambda self: self.awaited is not None)
    @rule(what=st.sampled_from(["done", "done", "hidden", "late", "error"]), reads=st.sampled_from(["", "no", "old"]))
    def answer(self, what: str, reads: str) -> None:
        """The store says something."""
        attempt, self.awaited = self.awaited, None
        assert attempt is not None
        if what == "error":
            self.changes.on_failed(OSError(28, "No space left on device"), now_ms=self.now_ms)
            return
        if what == "late":
            self.late.append(attempt)
            self.changes.on_outcome(Outcome.UNKNOWN, now_ms=self.now_ms)
            return
        is_applied = self.apply(attempt)
        if what == "hidden":
            self.changes.on_outcome(Outcome.UNKNOWN, now_ms=self.now_ms)
        elif is_applied:
            self.changes.on_outcome(Outcome.DONE, now_ms=self.now_ms)
        else:
            old = next(each for each in self.history if each.version == attempt[0])
            read = {"": self.stored, "no": None, "old": old}[reads]
            self.changes.on_outcome(Outcome.CONFLICT, read, now_ms=self.now_ms)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def arrive_late(self, data: st.DataObject) -> None:
        """An attempt whose outcome was told to be unknown is made now."""
        self.apply(self.late.pop(data.draw(st.integers(0, len(self.late) - 1))))

    @precondition(lambda self: not self.intruded)
    @rule(dice=st.integers(0, 9))
    def intrude(self, dice: int) -> None:
        """Somebody else takes the map over, at times."""
        if dice == 0:
            held = ClusterMap.from_json(self.stored.value)
            new = held.taken_over(owner="other", epoch=held.epoch + 1, nodes={}, stamp_bound_ms=0)
            self.apply((self.stored.version, replace(new, version=new.version + 1).to_json()))
            self.intruded = True

    @invariant()
    def holds(self) -> None:
        """The core is consistent, knows nothing that is not so, and told everybody in order and once."""
        changes = self.changes
        changes.check()
        assert changes.store_version is not None
        assert self.history[changes.store_version - 1].value == changes.map.to_json()
        assert not changes.lost_reason or self.intruded, "nobody else changed the map"
        if not self.intruded and not changes.is_unsure and self.awaited is None:
            assert changes.store_version == self.stored.version
        ended = [name for name, what, _ in self.told.events if what in ("done", "failed")]
        assert len(ended) == len(set(ended)), "told once"
        done = self.told.names("done")
        assert done == sorted(done, key=list(self.rows).index), "in the order of the proposals"
        assert set(self.told.names("failed")) <= self.can_fail

    def teardown(self) -> None:
        """From here on the store does what it is asked for: everything ends, and each change is in the store once."""
        while self.changes.is_busy:
            self.send(MAP_RESEND_MS)
            if self.awaited is not None:
                self.answer("done", "")
            self.holds()
        if not self.changes.lost_reason:
            ended = {name for name, what, _ in self.told.events if what in ("done", "failed")}
            assert ended == set(self.rows)
        self.check_history()

    def check_history(self) -> None:
        """Who was done with one version changed different rows, and its map is the one that was stored."""
        for stored in self.history:
            group = [name for name, what, each in self.told.events if what == "done" and each == self.map_of(stored)]
            rows = [row for name in group for row in self.rows[name]]
            assert len(rows) == len(set(rows)), group
        marks = (self.map_of(self.history[-1]).restoring or b"").decode().split()
        assert len(marks) == len(set(marks)), "made once"
        silent = {name for name in self.rows if not self.rows[name]}
        assert set(self.told.names("failed")).isdisjoint(marks) or self.changes.lost_reason
        assert set(marks) <= silent

    @staticmethod
    def map_of(stored: Stored) -> ClusterMap:
        """The map in the store."""
        return ClusterMap.from_json(stored.value)


TestRandomStore = RandomStore.TestCase
TestRandomStore.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
