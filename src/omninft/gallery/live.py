"""A report that follows its run: written again whenever the run has written something."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from omninft.clips.listing import LISTING
from omninft.gallery.report import write_report

REFRESH = 5  # s after which the page loads itself again
_WATCHED = ("config.yaml", "metrics.jsonl", "evaluation.json", f"samples/*/{LISTING}")


def watch_report(
    run_dir: Path,
    is_running: Callable[[], bool],
    written: Callable[[Path], None] = lambda page: None,
    every: float = 2.0,
) -> Path:
    """Keep `report.html` up to date until the run is over or Ctrl-C, looking `every` so many seconds; its path.

    `written` hears of every page. The last one does not load itself again.

    Raises OmniNFTError when `run_dir` is not a folder.
    """
    shown = None
    try:
        while is_running():
            if (found := _fingerprint(run_dir)) != shown:
                shown = found
                written(write_report(run_dir, running=True, refresh=REFRESH))
            time.sleep(every)
    except KeyboardInterrupt:
        return write_report(run_dir, running=is_running())
    return write_report(run_dir)


def _fingerprint(run_dir: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of what a report is made from."""
    found = []
    for pattern in _WATCHED:
        for path in sorted(run_dir.glob(pattern)):
            try:
                status = path.stat()
            except FileNotFoundError:  # replaced just now
                continue
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return found
