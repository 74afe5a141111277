"""A sampling profiler around a server: `python -m bench.profiling coordinator|node FILE ARGUMENT...`.

Runs the program with its arguments. A timer of the process's CPU time interrupts it every PERIOD_S; the function that
runs then is counted. SIGUSR2 sets the counts to zero, so that starting and filling are not in them; at the end they are
written to FILE as JSON: `{"samples": n, "functions": {"module:function": count, ...}}`.

What runs in C counts for the Python function that called it. An interruption is served when the main thread runs Python
again: what the event loop does between callbacks (polling, reading sockets) and what other threads do meanwhile, such
as the one that syncs the log, counts mostly for the function that is called next, `data_received` above all, and for
`loop` if that is none of the package. Compiled functions are not seen either and
count for their callers: for the finest picture profile the plain source (`make pure`). The interruptions cost a few per
cent, the same for all functions.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

PERIOD_S = 0.002
LOOP = "loop"
PACKAGE = "kvtcp"


def name_of(frame: FrameType | None) -> str:
    """`module:function` of the innermost function of the package, LOOP if none of its functions but mains runs."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parts:
            parts = path.with_suffix("").parts
            module = ".".join(parts[len(parts) - 1 - parts[::-1].index(PACKAGE) + 1 :])
            return LOOP if module.endswith(("_main", "runtime")) else f"{module}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return LOOP


class Sampler:
    """Counts what runs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to interrupt this process."""
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR2, self._reset)
        signal.setitimer(signal.ITIMER_PROF, PERIOD_S, PERIOD_S)

    def stop(self, file: Path) -> None:
        """End it and write the counts."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        file.write_text(json.dumps({"samples": self.counts.total(), "functions": dict(self.counts.most_common())}))

    def _sample(self, _: int, frame: FrameType | None) -> None:
        self.counts[name_of(frame)] += 1

    def _reset(self, *_: Any) -> None:
        self.counts.clear()


def main() -> None:
    """Run a server under the sampler."""
    program, file, *arguments = sys.argv[1:]
    sys.argv = [f"kvtcp-{program}", *arguments]
    if program == "coordinator":
        from kvtcp.coordinator.main import main as run
    else:
        from kvtcp.node.main import main as run
    sampler = Sampler()
    sampler.start()
    try:
        status = run()
    finally:
        sampler.stop(Path(file))
    sys.exit(status)


if __name__ == "__main__":
    main()
