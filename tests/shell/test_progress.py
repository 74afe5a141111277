"""The progress bar: what is drawn, how often, and that it disappears."""

import io

from kvtcp.shell.progress import ProgressBar


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_bar_is_drawn_and_removed() -> None:
    """A bar shows share, number and rate, at most every 100 ms, and leaves an empty line."""
    stderr, clock = io.StringIO(), Clock()
    with ProgressBar(stderr, "import", shown=True, clock=clock) as bar:
        clock.now += 1.0
        bar.update(5000, 0.5)
        bar.update(5001, 0.5)
        clock.now += 1.0
        bar.update(12000)
    half = f"\r\x1b[Kimport  50% [{'#' * 15}{'.' * 15}] 5,000 pairs, 5,000/s"
    assert stderr.getvalue() == f"{half}\r\x1b[Kimport 12,000 pairs, 6,000/s\r\x1b[K"


def test_no_terminal_no_bar() -> None:
    """Where stderr is no terminal nothing is written."""
    stderr = io.StringIO()
    with ProgressBar(stderr, "import", shown=False) as bar:
        bar.update(1, 1.0)
        bar.report({"files_done": 1, "files": 2})
    assert stderr.getvalue() == ""


def test_reports_of_servers() -> None:
    """Files and pairs done are shown; a report with neither is passed over, and a total of 0 is no division."""
    stderr, clock = io.StringIO(), Clock()
    bar = ProgressBar(stderr, "backup", shown=True, clock=clock)
    for report in ({"begun_again": "a node was lost"}, {"files_done": 1, "files": 4}, {"pairs_done": 0, "pairs": 0}):
        clock.now += 1.0
        bar.report(report)
    first, second = stderr.getvalue().split("\r\x1b[K")[1:]
    assert " 25% [" in first and "1 files" in first and second == "backup 0 pairs, 0/s"


def test_what_is_left() -> None:
    """Of the most that was ever left; with nothing to do there is no bar."""
    stderr, clock = io.StringIO(), Clock()
    with ProgressBar(stderr, "node drain", shown=True, clock=clock) as bar:
        for left in (0, 20, 1200, 300, 0):
            clock.now += 1.0
            bar.left(left)
    drawn = stderr.getvalue().split("\r\x1b[K")
    assert drawn == [
        "",
        "node drain 0 shards left",
        f"node drain   0% [{'.' * 30}] 20 shards left",
        f"node drain   0% [{'.' * 30}] 1,200 shards left",
        f"node drain  75% [{'#' * 22}{'.' * 8}] 300 shards left",
        f"node drain 100% [{'#' * 30}] 0 shards left",
        "",
    ]
