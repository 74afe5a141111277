"""Rules of the house, checked over the source: layers, purity, tests, size and leftovers.

Each rule is a function from parsed modules to complaints, so that a failure lists every place at once. Exceptions to a
rule stand here, each with its reason; there is no other way around.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kvtcp"
TESTS = ROOT / "tests"

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70

# "file" or "file:function" -> why it may be longer
LONG: dict[str, str] = {}

# module -> why there is no test module of its own
UNTESTED: dict[str, str] = {
    "kvtcp/client/channel.py": "the connection under the asynchronous client: test_aio.py drives all of it",
    "kvtcp/client/loop_thread.py": "the loop under the synchronous client: test_sync.py drives all of it",
    "kvtcp/_version.py": "one assignment",
    "kvtcp/cluster/memory_store.py": "test_store.py runs the contract of all stores on it",
    "kvtcp/testing/asyncio_fixtures.py": "one fixture; the tests of the plugin use it",
}

# A module may import from its own layer and from those named for it. A layer is a folder or a module; of two names that
# fit a module the longer one is its layer.
GROUND = {"_version", "constants", "errors"}
LAYERS: dict[str, set[str]] = {
    "_version": set(),
    "constants": set(),
    "errors": {"constants"},
    "jsonl": {"constants", "errors"},
    "protocol": GROUND,
    "storage": GROUND,  # files.py, the seam to the disk
    "storage/shard": GROUND | {"protocol"},
    "storage/disk": GROUND | {"storage", "storage/shard"},
    "storage/backup": GROUND | {"jsonl", "protocol", "storage"},
    "cluster": GROUND | {"protocol", "storage"},
    "replication": GROUND | {"protocol", "cluster"},  # what the three below share
    "replication/sequencing": GROUND | {"protocol", "cluster", "replication"},
    "replication/membership": GROUND | {"protocol", "cluster", "replication", "replication/sequencing"},
    "replication/ownership": GROUND | {"protocol", "cluster", "replication", "replication/sequencing"},
    "replication/controller": GROUND | {"protocol", "cluster", "replication", "replication/sequencing",
                                        "replication/membership", "replication/ownership"},
    "runtime": GROUND | {"protocol"},
    "frontend": GROUND | {"protocol", "runtime"},  # what every frontend needs
    "frontend/native": GROUND | {"protocol", "replication/sequencing", "frontend"},
    "frontend/resp": GROUND | {"protocol", "replication/sequencing", "frontend"},
    "frontend/port": GROUND | {"protocol", "frontend", "frontend/native", "frontend/resp"},
    "coordinator": GROUND | {"jsonl", "protocol", "storage", "storage/backup", "storage/disk", "cluster", "runtime",
                             "replication", "replication/sequencing", "replication/membership",
                             "replication/ownership", "replication/controller", "frontend", "frontend/native",
                             "frontend/resp", "frontend/port"},
    "node": GROUND | {"protocol", "storage", "storage/shard", "storage/disk", "storage/backup", "runtime"},
    "client": GROUND | {"protocol"},
    "shell": GROUND | {"jsonl", "protocol", "client", "storage/backup"},
    "testing": GROUND | {"cluster", "runtime", "coordinator", "node", "client"},
    "__init__": GROUND | {"client"},
}  # fmt: skip

# These are pure; so is every module whose header has a paragraph that starts with "Pure.".
PURE = re.compile(
    r"kvtcp/(constants|errors|jsonl|(protocol|storage/shard|replication)/.*|cluster/(map|placement|changes|rebuild|store)"
    r"|frontend/keyspace|frontend/resp/(?!session).*|node/(access|core|copies|learning|replica|write_results))\.py"
)
IMPURE = {
    "asyncio", "uvloop", "socket", "ssl", "select", "selectors", "socketserver", "threading", "multiprocessing",
    "concurrent", "subprocess", "signal", "time", "random", "secrets", "uuid", "os", "io", "pathlib",
    "shutil", "tempfile", "glob", "fcntl", "mmap", "sys", "logging", "urllib", "http",
}  # fmt: skip
IMPURE_BUILTINS = {"open", "input", "print", "breakpoint", "exec", "eval"}
IMPURE_METHODS = {"now", "utcnow", "today"}  # of datetime and date, which are pure otherwise

MAY_PRINT = re.compile(r"kvtcp/shell/|kvtcp/runtime/process\.py$|.*\bmain\.py$")  # process.py: what the mains share


@cache
def sources(folder: Path) -> dict[str, str]:
    """Text of every Python file below a folder, by its path from the root of the project."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(folder.rglob("*.py"))}


@cache
def trees(folder: Path) -> dict[str, ast.Module]:
    """Syntax tree of every Python file below a folder."""
    return {name: ast.parse(text, name) for name, text in sources(folder).items()}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a tree."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports: inside functions, and for type checkers only, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer_of(name: str) -> str:
    """The layer of a dotted name or of a path, both from kvtcp on."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")[1:]
    for count in range(len(parts), 0, -1):
        if "/".join(parts[:count]) in LAYERS:
            return "/".join(parts[:count])
    return parts[0] if parts else "__init__"


def is_pure(name: str, tree: ast.Module) -> bool:
    """Listed as pure, or says so itself."""
    return bool(PURE.fullmatch(name)) or bool(re.search(r"^Pure[.:]", ast.get_docstring(tree) or "", re.M))


def module_file(dotted: str) -> str | None:
    """The file of a module of kvtcp, for the name of a module or of something in it."""
    path = ROOT / dotted.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path.parent.with_suffix(".py")):
        if candidate.is_file():
            return str(candidate.relative_to(ROOT))
    return None


def test_every_module_has_a_header() -> None:
    """A docstring says what a module is; only packages, the version and the mains may do it in one line."""
    complaints = []
    for name, tree in trees(PACKAGE).items():
        header = ast.get_docstring(tree) or ""
        short = name.endswith(("__init__.py", "_version.py", "/main.py"))
        if not header or (not short and header.count("\n") < 2):
            complaints.append(f"{name}: the header has {len(header.splitlines())} lines")
    assert not complaints


def test_every_module_has_its_tests() -> None:
    """kvtcp/a/b.py is tested by tests/a/test_b.py; packages' own files are exempt."""
    missing = []
    for name in sources(PACKAGE):
        path = Path(name)
        test = TESTS / path.with_name(f"test_{path.name}").relative_to("kvtcp")
        if path.name != "__init__.py" and name not in UNTESTED and not test.is_file():
            missing.append(f"{name}: no {test.relative_to(ROOT)}")
    assert not missing


@pytest.mark.parametrize("table", [UNTESTED, LONG], ids=["untested", "long"])
def test_exceptions_have_a_reason(table: dict[str, str]) -> None:
    """An exception says why, and what it excuses exists."""
    for name, reason in table.items():
        assert len(reason) > 10, name
        assert (ROOT / name.partition(":")[0]).is_file(), name


def test_pure_modules_import_nothing_impure() -> None:
    """No loop, socket, clock, randomness, thread or file below the pure cores, not even through another module."""
    complaints = []
    for name, tree in trees(PACKAGE).items():
        if not is_pure(name, tree):
            continue
        for line, imported in imports(tree):
            if imported.partition(".")[0] in IMPURE:
                complaints.append(f"{name}:{line}: imports {imported}")
            elif imported.startswith("kvtcp."):
                file = module_file(imported)
                if file is not None and not is_pure(file, trees(PACKAGE)[file]) and layer_of(file) != "_version":
                    complaints.append(f"{name}:{line}: imports {imported}, which is not pure")
        complaints += [
            f"{name}:{node.lineno}: calls {node.func.id}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_BUILTINS
        ]
        complaints += [
            f"{name}:{node.lineno}: calls {ast.unparse(node.func)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in IMPURE_METHODS
        ]
    assert not complaints


def test_layers() -> None:
    """A module imports only from layers below its own."""
    complaints = []
    for name, tree in trees(PACKAGE).items():
        layer = layer_of(name)
        assert layer in LAYERS, f"{name}: its layer is not in the table"
        for line, imported in imports(tree):
            if not imported.startswith("kvtcp."):
                continue  # `import kvtcp` alone gives the package, whose place on disk is nobody's layer
            other = layer_of(imported)
            if layer == "__init__" and other not in LAYERS:
                continue
            if other == "__version__":
                other = "_version"
            if other != layer and other not in LAYERS[layer]:
                complaints.append(f"{name}:{line}: {layer} imports {imported}")
    assert not complaints


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one module, by Tarjan's algorithm (1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            component = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(component)

    for name in sorted(arrows):
        if name not in order:
            visit(name)
    return found


def test_circles_are_found() -> None:
    """Two circles that an arrow joins are two; a chain is none."""
    arrows = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"e"}, "e": {"c"}, "f": {"a"}}
    assert circles(arrows) == [{"c", "d", "e"}, {"a", "b"}]


def test_no_modules_import_each_other() -> None:
    """No circle of imports, those for type checkers included."""
    short = {name: name.removeprefix("kvtcp/").removesuffix(".py") for name in trees(PACKAGE)}
    arrows: dict[str, set[str]] = {}
    for name, tree in trees(PACKAGE).items():
        files = {module_file(imported) for _, imported in imports(tree) if imported.startswith("kvtcp.")}
        arrows[short[name]] = {short[file] for file in files if file is not None and file != name}
    assert not circles(arrows)


def test_the_layers_have_no_cycle() -> None:
    """The table itself is an order."""
    settled: set[str] = set()
    while ready := {layer for layer, below in LAYERS.items() if layer not in settled and below <= settled}:
        settled |= ready
    assert settled == set(LAYERS)


def test_libraries_do_not_print() -> None:
    """Only the shell and the mains write to a terminal."""
    complaints = [
        f"{name}:{node.lineno}"
        for name, tree in trees(PACKAGE).items()
        if not MAY_PRINT.match(name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not complaints


LEFTOVER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b")
MACHINE_PATH = re.compile(r"/(?:wo" r"rk|ho" r"me)/")


@pytest.mark.parametrize("pattern", [LEFTOVER, MACHINE_PATH], ids=["leftovers", "machine paths"])
def test_nothing_is_left_over(pattern: re.Pattern[str]) -> None:
    """No note to self and no path of a developer's machine in anything that is written by hand."""
    files = [path for folder in ("kvtcp", "tests", "bin", "bench", "docs") for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.suffix in (".md", ".py", ".toml") or path.name == "Makefile"]
    complaints = []
    for path in files:
        if not path.is_file() or "__pycache__" in path.parts or "results" in path.parts:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # not written by hand
        lines = enumerate(text.splitlines(), start=1)
        complaints += [f"{path.relative_to(ROOT)}:{number}" for number, line in lines if pattern.search(line)]
    assert not complaints


def test_no_exception_is_swallowed() -> None:
    """No bare `except`, and nothing as wide as Exception is passed over in silence."""
    complaints = []
    for name, tree in {**trees(PACKAGE), **trees(TESTS)}.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            wide = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            silent = all(
                isinstance(step, (ast.Pass, ast.Continue))
                or (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))
                for step in node.body
            )
            if node.type is None or (wide and silent):
                complaints.append(f"{name}:{node.lineno}")
    assert not complaints


def test_modules_and_functions_are_short() -> None:
    """A long one is on the list with its reason, and nothing else is on it."""
    long = set()
    for name, text in sources(PACKAGE).items():
        if text.count("\n") > MODULE_LINES_MAX:
            long.add(name)
        for function in functions(trees(PACKAGE)[name]):
            assert function.end_lineno is not None
            if function.end_lineno - function.lineno + 1 > FUNCTION_LINES_MAX:
                long.add(f"{name}:{function.name}")
    assert long == set(LONG)


def test_class_names_are_unique() -> None:
    """A name of a class means one thing in the whole package."""
    names = Counter(
        node.name for tree in trees(PACKAGE).values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    assert not {name for name, count in names.items() if count > 1}


def is_test(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A function that pytest collects."""
    return function.name.startswith("test_")


def test_every_test_says_what_it_shows() -> None:
    """Each test has a docstring, and its name is its own within its file."""
    complaints = []
    for name, tree in trees(TESTS).items():
        tests = [function for function in functions(tree) if is_test(function)] if "/test_" in name else []
        complaints += [f"{name}:{test.name}: no docstring" for test in tests if not ast.get_docstring(test)]
        for scope in ast.walk(tree):
            if isinstance(scope, (ast.Module, ast.ClassDef)) and "/test_" in name:
                names = Counter(
                    node.name for node in scope.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                )
                complaints += [f"{name}:{twice}: twice" for twice, count in names.items() if count > 1]
    assert not complaints


POLL_S_MAX = 0.05


def test_tests_do_not_sleep() -> None:
    """No test waits a fixed time. A short pause in a `while` is a wait for a condition; others say `# sleeps: why`."""
    complaints = []
    for name, tree in trees(TESTS).items():
        lines = sources(TESTS)[name].splitlines()
        polls = {inner for loop in ast.walk(tree) if isinstance(loop, ast.While) for inner in ast.walk(loop)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            called = ast.unparse(node.func)
            pause = node.args[0].value if called in ("time.sleep", "asyncio.sleep", "sleep") else 0
            sleeps = pause > (POLL_S_MAX if node in polls else 0)
            if sleeps and "# sleeps:" not in lines[node.lineno - 1]:
                complaints.append(f"{name}:{node.lineno}")
    assert not complaints


def test_files_that_are_named_exist() -> None:
    """A header or a comment that names a module names one that is there."""
    there = [f"/{name}" for folder in (PACKAGE, TESTS, ROOT / "bench") for name in sources(folder)]
    file = re.compile(r"(?<![\w./-])((?:\w+/)*[a-z_0-9]+\.py)\b")
    named = {(name, each) for name, text in sources(PACKAGE).items() for each in file.findall(text)}
    assert not {(name, each) for name, each in named if not any(path.endswith(f"/{each}") for path in there)}
