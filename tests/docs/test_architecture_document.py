"""docs/architecture.md against the code: its layers are the folders, its classes and files are there, its times too."""

import re
from pathlib import Path

from kvtcp import constants

ROOT = next(folder for folder in Path(__file__).parents if (folder / "docs").is_dir() and (folder / "kvtcp").is_dir())
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    """The text below a heading."""
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_folder_has_its_line() -> None:
    """The layers name each folder with modules once, and no other."""
    (layers,) = re.findall(r"^```\n(constants.*?)```", section("Layers"), re.M | re.S)
    named = re.findall(r"^([a-z_/]+)/\*?(?= )", layers, re.M)
    package = ROOT / "kvtcp"
    modules = [path for path in package.rglob("*.py") if path.name != "__init__.py" and path.parent != package]
    assert sorted(named) == sorted({path.parent.relative_to(package).as_posix() for path in modules})


def test_the_classes_are_where_the_page_says() -> None:
    """Each row of "Which class decides what" names a class or a function of the file beside it."""
    rows = re.findall(r"^\| .* \| `(\w+)` \| `([\w/.]+)` \|$", section("Which class decides what"), re.M)
    assert len(rows) > 20
    missing = [
        f"{file}: {name}"
        for name, file in rows
        if not (ROOT / file).exists() or not re.search(rf"^(?:class|def) {name}\b", (ROOT / file).read_text(), re.M)
    ]
    assert not missing


def test_the_files_are_there() -> None:
    """Each path of a module or a test that the page names exists."""
    named = set(re.findall(r"`((?:kvtcp|tests)/[\w/]+\.py)`", TEXT))
    assert len(named) > 20
    assert not sorted(name for name in named if not (ROOT / name).exists())


def test_the_times_are_those_of_the_code() -> None:
    """Each row of the table is a constant and its value."""
    rows = re.findall(r"^\| `(\w+_MS)` \| ([\d,]+) \|", TEXT, re.M)
    assert len(rows) >= 10
    assert [(name, int(value.replace(",", ""))) for name, value in rows] == [
        (name, getattr(constants, name)) for name, _ in rows
    ]
