"""Tables of rows of figures, as aligned text and as Markdown.

Pure. `matrix` has one line per workload and one column per target, `listing` one line per row with its latencies, CPU
times by role and floor. Both return cells, header first; `text` and `markdown` lay them out.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.measure import Result

Cells = list[list[str]]
MATRIX = ("btree", "codec", "network", "scan", "memory", "recovery")  # suites with few targets


def number(value: float) -> str:
    """A figure in as many digits as mean something."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def with_range(row: Result) -> str:
    """Median (min-max), the median alone if there was one run."""
    if len(row["runs"]) < 2:
        return number(row["median"])
    return f"{number(row['median'])} ({number(row['min'])}-{number(row['max'])})"


def text(cells: Cells) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(cells: Cells) -> str:
    """A table of Markdown, all columns but the first to the right."""
    head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def names_of(results: Sequence[Result]) -> list[str]:
    """Targets in their order, kvtcp's first."""
    names = dict.fromkeys(row["target"] for row in results)
    return sorted(names, key=lambda name: not name.startswith("kvtcp"))


def matrix(results: Sequence[Result]) -> Cells:
    """One line per workload, one column per target: median (min-max); the efficiency of kvtcp's first."""
    names = names_of(results)
    rows = [["", *names, "efficiency"]]
    for workload, unit in dict.fromkeys((row["workload"], row["unit"]) for row in results):
        found = {row["target"]: row for row in results if (row["workload"], row["unit"]) == (workload, unit)}
        cells = [with_range(found[name]) if name in found else "" for name in names]
        efficiencies = [row["efficiency"] for name, row in found.items() if "efficiency" in row and "kvtcp" in name]
        rows.append([f"{workload}, {unit}", *cells, f"{efficiencies[0]:.2f}" if efficiencies else ""])
    return _without_empty_columns(rows)


def listing(results: Sequence[Result]) -> Cells:
    """One line per row."""
    roles = list(dict.fromkeys(role for row in results for role in row.get("cpu_us", ())))
    rows = [["", "median (min-max)", "p50 ms", "p99 ms", *(f"CPU us, {role}" for role in roles), "floor", "efficiency"]]
    for row in results:
        cells = [f"{row['target']}: {row['workload']}, {row['unit']}", with_range(row)]
        cells += [number(row[name]) if name in row else "" for name in ("p50_ms", "p99_ms")]
        cpu = row.get("cpu_us", {})
        cells += [number(cpu[role]) if role in cpu else "" for role in roles]
        cells += [f"{row['floor']['name']} {number(row['floor']['value'])}" if "floor" in row else ""]
        cells += [f"{row['efficiency']:.2f}" if "efficiency" in row else ""]
        rows.append(cells)
    return _without_empty_columns(rows)


def _without_empty_columns(cells: Cells) -> Cells:
    kept = [n for n in range(len(cells[0])) if n == 0 or any(row[n] for row in cells[1:])]
    return [[row[n] for n in kept] for row in cells]


def of_suite(suite: str, results: Sequence[Result]) -> Cells:
    """The table of a suite."""
    return matrix(results) if suite in MATRIX else listing(results)
