"""One iteration of the bundled model beside busy neighbours: threads that spin while they wait, or sleep.

    python -m benchmarks.busy_machine [--neighbours 2] [--rounds 3]

Every measurement is a process of its own, since the OpenMP runtime reads how to wait when it is loaded. Settings take
turns within a round, so that what else the machine does meets all of them. Prints seconds of the median round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = {
    "as many threads as cores, asleep while they wait (ours)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "as many threads as cores, spinning (the runtime's default)": {"OMP_WAIT_POLICY": ""},
    "one thread": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
}
LIMIT = 600  # seconds a measurement may take
BUSY = [sys.executable, "-c", "while True: pass"]


def seconds(settings: dict[str, str], folder: Path) -> float:
    """Of the second iteration of a small run; `LIMIT` where it took longer."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")} | settings
    small = ["run.iterations=2", "prompts.per_iteration=2", "evaluation.every=0", "evaluation.test_clips=0"]
    command = [sys.executable, "-m", "omninft", "train", "omninft", *small, "optimiser.micro_batch=16"]
    try:
        subprocess.run(
            [*command, f"run.folder={folder}", "run.name=busy"],
            env=environment,
            check=True,
            capture_output=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return LIMIT
    rows = [json.loads(line) for line in (folder / "busy" / "metrics.jsonl").read_text().splitlines()]
    return float(next(row["seconds"] for row in reversed(rows) if "seconds" in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for count in arguments.neighbours:
        neighbours = [subprocess.Popen(BUSY) for _ in range(count)]
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        try:
            for _ in range(arguments.rounds):
                for name, settings in SETTINGS.items():
                    with tempfile.TemporaryDirectory() as folder:
                        found[name].append(seconds(settings, Path(folder)))
        finally:
            for neighbour in neighbours:
                neighbour.kill()
        print(f"{count} busy neighbours, {os.cpu_count()} cores, median of {arguments.rounds} rounds, seconds")
        for name, times in found.items():
            print(f"  {statistics.median(times):7.1f}  {name}")


if __name__ == "__main__":
    main()
