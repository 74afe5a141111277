"""The manifest: what is written is read back, and everything else is refused by file and field."""

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtcp.errors import DataError
from kvtcp.storage.backup.manifest import BackupManifest, FileReport, ShardCut, ShardSum


def sha(text: str) -> str:
    """Some sha256."""
    return hashlib.sha256(text.encode()).hexdigest()


SUMS = (ShardSum(0, 150, sha("0")), ShardSum(2, 0, sha("")))
FILES = (
    FileReport("node-n1.jsonl", 9000, sha("n1"), 150, SUMS, "0123456776543210"),
    FileReport("node-n2.jsonl", 50, sha("n2"), 1, (ShardSum(1, 1, sha("1")),), "89abcdef"),
)
CUT = (ShardCut(0, 3, 200, 77), ShardCut(1, 3, 1, 2**32 - 1), ShardCut(2, 1, 0, 0))
MANIFEST = BackupManifest("c-1", "2026-11-23T15:26:00Z", "0.1.0", 3, CUT, FILES)


def sealed(fields: dict[str, Any]) -> str:
    """The JSON text of any object, with a seal that is right."""
    text = json.dumps({**fields, "manifest_sha256": "0" * 64})
    seal = hashlib.sha256(text.encode()).hexdigest()
    return text.replace('"manifest_sha256": "' + "0" * 64, '"manifest_sha256": "' + seal)


def test_round_trip() -> None:
    """A manifest is what its text says, and the text is plain JSON with the fields of the documentation."""
    text = MANIFEST.to_json()
    assert BackupManifest.from_json(text, "m") == MANIFEST
    assert (MANIFEST.pairs, MANIFEST.bytes) == (151, 9050)
    fields = json.loads(text)
    assert list(fields) == [
        "format", "format_version", "kvtcp_version", "cluster", "created", "shards", "cut", "files", "manifest_sha256",
    ]  # fmt: skip
    assert fields["cut"] == [[0, 3, 200, 77], [1, 3, 1, 2**32 - 1], [2, 1, 0, 0]]
    assert fields["files"][1] == {
        "name": "node-n2.jsonl", "bytes": 50, "sha256": sha("n2"), "pairs": 1,
        "shards": [[1, 1, sha("1")]], "blocks": "89abcdef",
    }  # fmt: skip


def test_the_seal_is_computed_as_documented() -> None:
    """sha256 of the file with the 64 digits of the seal as zeros; another tool can do that with two commands."""
    text = MANIFEST.to_json()
    seal = json.loads(text)["manifest_sha256"]
    assert hashlib.sha256(text.replace(seal, "0" * 64).encode()).hexdigest() == seal


def test_another_layout_of_the_same_fields_is_read() -> None:
    """Another tool may write the same object without line breaks, if it seals it."""
    assert BackupManifest.from_json(sealed(json.loads(MANIFEST.to_json())), "m") == MANIFEST


def test_every_changed_character_is_found() -> None:
    """Whatever single character is changed, the manifest is refused by its name, never read as something else."""
    text = MANIFEST.to_json()
    for i, character in enumerate(text):
        changed = text[:i] + chr(ord(character) ^ 1) + text[i + 1 :]
        with pytest.raises(DataError, match=r"^b/manifest\.json"):
            BackupManifest.from_json(changed, "b/manifest.json")
        with pytest.raises(DataError, match=r"^b/manifest\.json"):
            BackupManifest.from_json(text[:i], "b/manifest.json")


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    """No text leads to another exception."""
    with pytest.raises(DataError, match=r"^m"):
        BackupManifest.from_json(text, "m")


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(set(json.loads(MANIFEST.to_json())) - {"manifest_sha256"})), json_values)
def test_any_value_in_any_field_is_refused_or_kept(name: str, value: Any) -> None:
    """A sealed manifest with some other value in one field is refused by that field, or read with that value."""
    fields = json.loads(MANIFEST.to_json())
    fields[name] = value
    try:
        manifest = BackupManifest.from_json(sealed(fields), "m")
    except DataError as error:
        assert str(error).startswith("m: ")
    else:
        assert name in ("cluster", "kvtcp_version", "created")
        assert getattr(manifest, name) == value


def change(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the member at a path; `...` as value removes it."""

    def apply(fields: dict[str, Any]) -> None:
        inner: Any = fields
        for step in path[:-1]:
            inner = inner[step]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value

    return apply


WRONG = [
    (["format"], "tar", '"format" is not "kvtcp-backup"'),
    (["format_version"], 2, '"format_version" is 2, this version of kvtcp reads 1'),
    (["format_version"], True, '"format_version" is True'),
    (["cluster"], ..., '"cluster" is missing'),
    (["cluster"], "", '"cluster" is not a string'),
    (["surplus"], 1, "'surplus' is not a field"),
    (["created"], "yesterday", "\"created\" 'yesterday' is not an ISO 8601 time in UTC"),
    (["created"], "2026-11-23T15:26:00", "is not an ISO 8601 time in UTC"),
    (["created"], "2026-11-23T15:26:00+01:00", "is not an ISO 8601 time in UTC"),
    (["shards"], 0, '"shards" must be an integer from 1'),
    (["shards"], 2, '"cut" does not have every shard from 0 to 1'),
    (["cut", 1], ..., '"cut" does not have every shard from 0 to 2'),
    (["cut", 1], [1, 2, 3], '"cut[1]" is not an array of 4 items'),
    (["cut", 1, 2], -5, '"cut[1][2]" must be an integer'),
    (["files"], {}, '"files" is not an array'),
    (["files", 1], 7, '"files[1]" is not an object'),
    (["files", 1], ..., '"files": no file holds shard 1 (1 shards are missing)'),
    (["files", 1, "name"], "../node-n2.jsonl", '"files[1].name"'),
    (["files", 1, "name"], "node-n1.jsonl", '"files[1].name" node-n1.jsonl is given twice'),
    (["files", 1, "name"], "node-a.jsonl", '"files[1].name" node-a.jsonl is given twice or not in order'),
    (["files", 1, "sha256"], "ab", '"files[1].sha256" is not a sha256'),
    (["files", 1, "bytes"], "50", '"files[1].bytes" must be an integer'),
    (["files", 0, "pairs"], 151, '"files[0].pairs" is 151, its shards have 150'),
    (["files", 0, "shards", 0, 1], 149, '"files[0].pairs" is 150, its shards have 149'),
    (["files", 0, "shards", 1, 0], 0, '"files[0].shards[1]": shard 0 is given twice'),
    (["files", 0, "shards", 1, 0], 3, '"files[0].shards[1]" is shard 3 of 3'),
    (["files", 0, "shards", 1, 0], 1, '"files[1].shards[0]": shard 1 is in node-n1.jsonl too'),
    (["files", 0, "shards", 1, 2], None, '"files[0].shards[1][2]" is not a sha256'),
    (["files", 0, "blocks"], "01234567", '"files[0].blocks" has 1 blocks, 150 pairs have 2'),
    (["files", 0, "blocks"], "0123456X", '"files[0].blocks" is not made of'),
]


@pytest.mark.parametrize(("path", "value", "sentence"), WRONG, ids=[sentence for _, _, sentence in WRONG])
def test_wrong_fields_are_named(path: list[Any], value: Any, sentence: str) -> None:
    """Each rule of the manifest has a sentence with file and field, although the seal is right."""
    fields = copy.deepcopy(json.loads(MANIFEST.to_json()))
    change(path, value)(fields)
    with pytest.raises(DataError) as caught:
        BackupManifest.from_json(sealed(fields), "b/manifest.json")
    assert str(caught.value).startswith("b/manifest.json: ")
    assert sentence in str(caught.value)


def test_not_json_names_the_line() -> None:
    """A manifest that is not JSON is refused with the line where it ends being that."""
    lines = MANIFEST.to_json().split("\n")
    lines[3] = lines[3].replace('"', "'")
    with pytest.raises(DataError, match=r"^m, line 4: not JSON"):
        BackupManifest.from_json("\n".join(lines), "m")


def test_a_changed_manifest_names_both_hashes() -> None:
    """A change that leaves a legal manifest is found by the seal."""
    text = MANIFEST.to_json().replace("2026-11-23", "2026-11-24")
    with pytest.raises(DataError, match=r"m: the manifest was changed: its sha256 is \w{64}, .* is \w{64}$"):
        BackupManifest.from_json(text, "m")


def test_a_report_survives_the_wire() -> None:
    """A node's report comes over msgpack with text as bytes and is the same report."""
    for file in FILES:
        on_wire = msgpack.unpackb(msgpack.packb(file.to_fields()), raw=True, strict_map_key=True)
        assert FileReport.from_fields(on_wire, "n1") == file


@pytest.mark.parametrize("fields", [None, [], {}, {b"name": b"\xff"}, {**FILES[0].to_fields(), "pairs": -1}])
def test_a_bad_report_is_refused(fields: object) -> None:
    """What is not a report is refused with the place it came from."""
    with pytest.raises(DataError, match=r"^node n1: "):
        FileReport.from_fields(fields, "node n1")
